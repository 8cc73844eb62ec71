"""Unfinished work: where each stage leaves what it made, and what is done.

``RESULT.work/`` (or a study's folder) holds one folder per section. A stage is done when its marker says
so, with the fingerprint of what it depends on; anything else is done again. Markers are written last and
atomically.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepfere.config import digest
from deepfere.errors import IdentityError, InputError

Progress = Callable[[str, float], None]


def write_json(path: Path, values: Any) -> None:
    """Write JSON through a temporary file and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)


class SectionFolder:
    """Paths of one section's work."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.measured = root / "measured.zarr"
        self.overview = root / "overview.npz"
        self.alignment = root / "alignment.json"
        self.alignment_start = root / "alignment_start.json"
        self.plan = root / "plan.json"
        self.planes = root / "planes.zarr"
        self.pooled = root / "pooled.zarr"
        self.pooled_joint = root / "pooled-joint.zarr"
        self.arrays = root / "arrays.npz"
        self.fit = root / "fit.npz"
        self.model = root / "model.json"
        self.journal = root / "journal"


class Workspace:
    """A folder of unfinished work with stage markers.

    Args:
        root: The folder; created when first written to.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.training = self.root / "training"

    def section(self, name: str) -> SectionFolder:
        """One section's folder."""
        return SectionFolder(self.root / "sections" / name)

    def _identity(self) -> str | None:
        marker = self.root / "identity.json"
        return json.loads(marker.read_text()).get("identity") if marker.exists() else None

    def belongs_to(self, identity: str) -> bool:
        """Whether work of these inputs and settings lies here."""
        return self._identity() == identity

    def claim(self, identity: str, overwrite: bool) -> bool:
        """Make sure that what lies here belongs to the same inputs and settings.

        Args:
            identity: Hash of inputs and resolved settings.
            overwrite: Remove work of another identity.

        Returns:
            Whether there was work to resume.

        Raises:
            IdentityError: Other work lies here and ``overwrite`` is off.
            InputError: The folder cannot be written.
        """
        marker = self.root / "identity.json"
        found = self._identity()
        if not marker.exists() and self.root.exists() and any(self.root.iterdir()):
            raise IdentityError(
                "holds something that deepfere did not write", where=self.root, remedy="choose another output"
            )
        if found is not None and found != identity:
            if not overwrite:
                raise IdentityError(
                    "holds unfinished work of other inputs or settings",
                    where=self.root,
                    remedy="run that command again to finish it, choose another output, or give --overwrite",
                )
            self.remove()
            found = None
        if found is None:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                write_json(marker, {"identity": identity})
            except OSError as error:
                raise InputError(
                    f"cannot be written ({error.strerror or error})", where=self.root, remedy="choose another output"
                ) from error
        return found is not None

    def note_failure(self, error: BaseException) -> Path:
        """Write everything that is known about a failure to a file in here, for whoever looks into it."""
        import traceback

        file = self.root / "failure.log"
        file.write_text("".join(traceback.format_exception(error)))
        return file

    def remove(self) -> None:
        """Delete everything."""
        import shutil

        shutil.rmtree(self.root, ignore_errors=True)

    def _marker(self, stage: str, section: str | None) -> Path:
        return self.root / "done" / (f"{stage}.json" if section is None else f"{stage}-{section}.json")

    def done(self, stage: str, fingerprint: str, section: str | None = None) -> dict[str, Any] | None:
        """The marker of a finished stage, or None if it is unfinished or was made from something else."""
        path = self._marker(stage, section)
        if not path.exists():
            return None
        values = json.loads(path.read_text())
        return values if values.get("fingerprint") == fingerprint else None

    def forget(self, stage: str, section: str | None = None) -> None:
        """Have a stage done again: what it made is gone."""
        self._marker(stage, section).unlink(missing_ok=True)

    @contextmanager
    def stage(self, stage: str, depends: Any, section: str | None = None) -> Iterator[dict[str, Any] | None]:
        """Run a stage once.

        Yields None if it is done, else a dict to put facts in that are kept with the marker.
        """
        fingerprint = digest(depends)
        if self.done(stage, fingerprint, section) is not None:
            yield None
            return
        self.forget(stage, section)
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        yield facts
        seconds = round(time.perf_counter() - started, 2)
        write_json(self._marker(stage, section), {"fingerprint": fingerprint, "seconds": seconds, **facts})

    def facts(self, stage: str, section: str | None = None) -> dict[str, Any]:
        """What a finished stage recorded."""
        path = self._marker(stage, section)
        return json.loads(path.read_text()) if path.exists() else {}

    def timings_s(self) -> dict[str, float]:
        """Seconds per finished stage, in the order in which they finished."""
        folder = self.root / "done"
        files = sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime) if folder.exists() else []
        facts = {path.stem: json.loads(path.read_text()) for path in files}
        # Markers without a fingerprint are notes (the MLflow run), not stages.
        return {name.removesuffix("-section"): f["seconds"] for name, f in facts.items() if "fingerprint" in f}
