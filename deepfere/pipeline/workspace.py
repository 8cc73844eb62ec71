"""Unfinished work: where each stage leaves what it made, and what is done.

``RESULT.work/`` (or a study's folder), at a path or a URL, holds one folder per section. A stage is done when its
marker says so, with the fingerprint of what it depends on; anything else is done again. Markers are written last and
atomically. One process at a time works in the folder: it holds the folder's lock (`deepfere.locking`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from deepfere.config import digest
from deepfere.errors import DeepfereError, IdentityError, InputError, SectionFailures, StorageError, system_text
from deepfere.locking import held, unwritable
from deepfere.places import Place, UrlPath, place, remove_tree
from deepfere.stopping import STOP, look
from deepfere.store import sync, sync_tree

Progress = Callable[[str, float], None]

STAGES = ("look", "sample", "ions", "structure", "ingest", "align", "tile", "learn", "reconstruct")
"""Names of the markers, in the order in which the stages are done."""

FULL_BELOW_BYTES = 1 << 16
"""Where less is free, what failed did so for want of room."""

IDENTITY, LOCK = "identity.json", "lock"
OURS = ("done", "sections", "training", "factoring.npz", "failure.log", STOP, IDENTITY)
"""What a workspace owns in its folder. A study's results lie beside these and are no work."""


def write_json(path: Place, values: Any) -> None:
    """Write JSON, through a temporary file and a rename or as one object; it stays when this returns."""
    if isinstance(path, UrlPath):
        path.write_text(json.dumps(values, indent=1) + "\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def read_json(path: Place) -> dict[str, Any] | None:
    """What `write_json` wrote; None if it is absent or a machine that went down left no whole file."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None


class SectionFolder:
    """Paths of one section's work."""

    def __init__(self, root: Place) -> None:
        self.root = root
        self.index = root / "index.parquet"
        self.axis = root / "axis.npy"
        self.sample = root / "sample.npz"
        self.structure = root / "structure.npz"
        self.measured = root / "measured.zarr"
        self.result = root / "result.zarr"
        self.overview = root / "overview.npz"
        self.alignment = root / "alignment.json"
        self.alignment_start = root / "alignment_start.json"
        self.plan = root / "plan.json"
        self.planes = root / "planes.zarr"
        self.pooled = root / "pooled.zarr"
        self.pooled_typed = root / "pooled-typed.zarr"
        self.pooled_joint = root / "pooled-joint.zarr"
        self.moments = root / "moments.npz"
        self.arrays = root / "arrays.npz"
        self.fit = root / "fit.npz"
        self.denoised = root / "denoised.npz"
        self.model = root / "model.json"
        self.paper_state = root / "paper.pt"
        self.paper = root / "paper.npz"
        self.journal = root / "journal"


class Workspace:
    """A folder of unfinished work with stage markers.

    Args:
        root: The folder, or its URL; created when first written to.
    """

    def __init__(self, root: str | Place) -> None:
        self.root: Place = place(root).resolve()
        self.training = self.root / "training"
        self.factoring = self.root / "factoring.npz"

    def section(self, name: str) -> SectionFolder:
        """One section's folder."""
        return SectionFolder(self.root / "sections" / name)

    def _identity(self) -> str | None:
        return (read_json(self.root / IDENTITY) or {}).get("identity")

    def belongs_to(self, identity: str) -> bool:
        """Whether work of these inputs and settings lies here."""
        return self._identity() == identity

    def check(self, identity: str, overwrite: bool, parts: dict[str, str] | None = None) -> None:
        """Refuse, before anything is changed, a folder that holds something else.

        Args:
            identity: Hash of inputs and resolved settings.
            overwrite: Work of another identity may be removed.
            parts: Of a study, what identifies each of its sections: those that failed may be others by now, or gone.

        Raises:
            IdentityError: The folder is not ours, or other work lies here and ``overwrite`` is off.
        """
        # A run that was killed while it began leaves the lock and what the marker was written through.
        names = {p.name for p in self.root.iterdir()} if self.root.exists() else set()
        if IDENTITY not in names and any(n not in (LOCK, STOP) and not n.startswith(f".{IDENTITY}.") for n in names):
            raise IdentityError(
                "holds something that deepfere did not write", where=self.root, remedy="choose another output"
            )
        found = self._identity()
        if found is not None and found != identity and not overwrite and self._mended(parts) is None:
            raise IdentityError(
                "holds work of other inputs or settings",
                where=self.root,
                remedy="run that command again, choose another output, or give --overwrite",
            )

    def claim(self, identity: str, overwrite: bool, anew: bool = False, parts: dict[str, str] | None = None) -> bool:
        """Make sure that what lies here belongs to the same inputs and settings.

        Args:
            identity: Hash of inputs and resolved settings.
            overwrite: Remove work of another identity.
            anew: Remove work of this identity, too.
            parts: See `check`.

        Returns:
            Whether there was work to resume.

        Raises:
            IdentityError: Other work lies here and ``overwrite`` is off.
            InputError: The folder cannot be written.
        """
        self.check(identity, overwrite, parts)
        found, mended = self._identity(), self._mended(parts)
        if found is not None and found != identity and mended is not None and not anew:
            # What was made of a section that is another now is found out by its stages.
            self._sign(identity, parts)
            return True
        if found is not None and (anew or found != identity):
            self._clear()
            found = None
        if found is None:
            # Work beside a marker that cannot be read stays: every stage knows what it was made from.
            self._sign(identity, parts)
        return found is not None

    def _sign(self, identity: str, parts: dict[str, str] | None) -> None:
        try:
            write_json(self.root / IDENTITY, {"identity": identity, "parts": parts, "failed": []})
        except OSError as error:
            raise unwritable(self.root, error) from error

    def note_failed(self, names: list[str]) -> None:
        """Note which sections failed in the last run: their inputs may be mended without beginning anew."""
        values = read_json(self.root / IDENTITY)
        if values is not None and values.get("failed") != names:
            write_json(self.root / IDENTITY, {**values, "failed": names})

    def _mended(self, parts: dict[str, str] | None) -> list[str] | None:
        """The sections that are others now, or gone, where all of them had failed; None else."""
        known = read_json(self.root / IDENTITY) or {}
        before, failed = known.get("parts"), known.get("failed")
        if not isinstance(before, dict) or not isinstance(failed, list) or parts is None:
            return None
        changed = [name for name, part in before.items() if parts.get(name) != part]
        return changed if set(changed) <= set(failed) and set(parts) <= set(before) else None

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Be the only process that works here; gives what raises if another one has taken over (at a URL).

        Raises:
            InputError: Another process works here, or the folder cannot be written.
        """
        root = self.root
        if isinstance(root, UrlPath):
            with held(root / LOCK) as check:
                yield check
            return
        missing = [p for p in (root, *root.parents) if not p.exists()]
        with held(root / LOCK) as check:
            try:
                yield check
            except DeepfereError:
                # Refused with no work begun: neither the lock stays nor the folders that were made for it.
                if root.exists() and [p.name for p in root.iterdir()] == [LOCK]:
                    (root / LOCK).unlink()
                with suppress(OSError):
                    for folder in missing:
                        if folder.exists():
                            folder.rmdir()
                raise

    @contextmanager
    def failures(self, section: str | None = None) -> Iterator[None]:
        """Tell a failure in one line; the details go to a file in here, for whoever looks into it.

        Args:
            section: Of a study: every section has its own file, and whatever goes wrong is a failure of it.

        Raises:
            DeepfereError: What was raised inside, a full disk or memory among it. Wrong input passes as it is.
        """
        try:
            yield
        except InputError as error:
            if not self._is_here(error.where):
                raise
            # It was written before: credentials that ended, a bucket that is full or gone.
            raise StorageError(str(error)) from error
        except (SectionFailures, StorageError):
            raise
        except DeepfereError as error:
            raise DeepfereError(f"{error}{self._note(error, section)}") from error
        except OSError as error:
            where = "" if error.filename else f"{self.root}: "
            raise DeepfereError(f"{where}{system_text(error)}{self._note(error, section)}") from error
        except MemoryError as error:
            raise DeepfereError(f"the memory does not suffice{self._note(error, section)}") from error
        except Exception as error:
            if self._is_full(error):  # libraries have their own errors for it
                told = f"{self.root}: {os.strerror(errno.ENOSPC)}{self._note(error, section)}"
                raise DeepfereError(told) from error
            if section is None:
                raise
            told = f"{type(error).__name__}: {error}{self._note(error, section)}"
            raise DeepfereError(told) from error

    def _note(self, error: BaseException, section: str | None) -> str:
        file = (self.root if section is None else self.section(section).root) / "failure.log"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(traceback.format_exception(error)))
        except (OSError, DeepfereError):
            return ""  # the same full disk, or store that fails
        return f" (details in {file})"

    def _is_full(self, error: BaseException) -> bool:
        if isinstance(self.root, UrlPath):
            return False
        free = shutil.disk_usage(self.root).free if self.root.exists() else FULL_BELOW_BYTES
        return os.strerror(errno.ENOSPC) in str(error) or free < FULL_BELOW_BYTES

    def _is_here(self, where: object) -> bool:
        """Whether an error is about this folder, or the result beside it, at a URL."""
        if not isinstance(self.root, UrlPath):
            return False
        ours = (str(self.root), str(self.root).removesuffix(".work"))
        return any(str(where) == one or str(where).startswith(f"{one}/") for one in ours)

    def remove(self) -> None:
        """Delete all work, and the folder if nothing else is in it."""
        self._clear()
        if isinstance(self.root, UrlPath):
            return  # no more than the lock is left, until it is let go of
        (self.root / LOCK).unlink(missing_ok=True)
        try:
            self.root.rmdir()
        except OSError:
            pass  # a study's results stay

    def _clear(self) -> None:
        for name in OURS:
            remove_tree(self.root / name)
        for path in self.root.glob(f".{IDENTITY}.*"):
            path.unlink(missing_ok=True)

    def has_begun(self) -> bool:
        """Whether any stage is done."""
        return any((self.root / "done").glob("*.json"))

    def _marker(self, stage: str, section: str | None) -> Place:
        return self.root / "done" / (f"{stage}.json" if section is None else f"{stage}-{section}.json")

    def done(self, stage: str, fingerprint: str, section: str | None = None) -> dict[str, Any] | None:
        """The marker of a finished stage, or None if it is unfinished or was made from something else."""
        values = read_json(self._marker(stage, section))
        return values if values is not None and values.get("fingerprint") == fingerprint else None

    def forget(self, stage: str, section: str | None = None) -> None:
        """Have a stage done again: what it made is gone."""
        self._marker(stage, section).unlink(missing_ok=True)

    @contextmanager
    def stage(self, stage: str, depends: Any, section: str | None = None) -> Iterator[dict[str, Any] | None]:
        """Run a stage once.

        Yields None if it is done, else a dict to put facts in that are kept with the marker.

        Raises:
            Stopped: The run was asked to stop, and this stage is not done.
        """
        fingerprint = digest(depends)
        if self.done(stage, fingerprint, section) is not None:
            yield None
            return
        look()
        self.forget(stage, section)
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        yield facts
        self._sync(section)
        seconds = round(time.perf_counter() - started, 2)
        ended = {"fingerprint": fingerprint, "seconds": seconds, "ended": time.time()}
        write_json(self._marker(stage, section), {**ended, **facts})

    def _sync(self, section: str | None) -> None:
        """What a stage has made is on disk before it is said to be done: a machine may go down at any moment."""
        if section is not None:
            sync_tree(self.section(section).root)
        elif not isinstance(self.root, UrlPath):
            sync_tree(self.root / "training")
            for path in self.root.glob("*.npz"):
                sync(path)

    def facts(self, stage: str, section: str | None = None) -> dict[str, Any]:
        """What a finished stage recorded."""
        return read_json(self._marker(stage, section)) or {}

    def timings_s(self, section: str) -> dict[str, float]:
        """Seconds per finished stage, of the study and of one section, in the order in which they finished."""
        own, folder = f"-{section}", self.root / "done"
        facts = {stage + end: read_json(folder / f"{stage}{end}.json") for stage in STAGES for end in (own, "")}
        stages = sorted((f.get("ended", 0.0), name) for name, f in facts.items() if f)
        return {name.removesuffix(own): facts[name]["seconds"] for _, name in stages}  # type: ignore[index]
