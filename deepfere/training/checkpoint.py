"""Where a training stands: kept with model and optimiser, so that it goes on exactly where it was.

Nothing in the loop draws random numbers: patches and flips come from the seed and the number of the step, weights
from the seed. What is here (model, optimiser, step) therefore resumes exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, distributed

from deepfere.errors import DeepfereError
from deepfere.places import Place, UrlPath, reading
from deepfere.store import sync
from deepfere.training.loop import JointModel

CHECKPOINT = "training.pt"
HISTORY = "history.json"
BEGIN = "begin.json"
"""In the run's folder: from which step on patches are loaded when training is begun again."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Of Ray's, there too: which checkpoints a group has."""


@dataclass
class Reached:
    """How far a training is.

    Attributes:
        step: Steps done.
        history: Mean losses per reporting interval: {"step": int, name: float}.
        sums: Of the losses that are not in the history yet, over ``count`` steps.
        count: See ``sums``.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """One more step, with these losses."""
        self.step += 1
        self.count += 1
        self.sums = {name: self.sums.get(name, 0.0) + value.double() for name, value in losses.items()}

    def note(self) -> None:
        """Add the means since the last note to the history; every worker of a group does it together."""
        means = over_workers({name: value / self.count for name, value in self.sums.items()})
        self.history.append({"step": self.step, **means})
        self.sums, self.count = {}, 0


def over_workers(losses: dict[str, Tensor]) -> dict[str, float]:
    """Mean over the workers, each of which saw its own patches."""
    if not losses:
        return {}
    values = torch.stack(list(losses.values()))
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values = values / distributed.get_world_size()
    return dict(zip(losses, values.tolist(), strict=True))


def state_of(
    model: JointModel, optimiser: torch.optim.Optimizer, reached: Reached, sums: dict[str, float], digest: str
) -> dict[str, Any]:
    """What `resume` goes on from; ``sums`` are those of all workers."""
    return {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": reached.step,
        "history": reached.history,
        "sums": sums,
        "count": reached.count,
        "digest": digest,
    }


def resume(state: dict[str, Any], model: JointModel, optimiser: torch.optim.Optimizer, digest: str) -> Reached:
    """How far a kept state is, to which model and optimiser are set.

    Nothing, and a state of other settings or of fits that another version made, is no place to go on from.
    """
    if state.get("digest") != digest:
        return Reached()
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}
    return Reached(state["step"], list(state["history"]), sums, state["count"])


def write_state(file: Place, state: dict[str, Any]) -> None:
    """Keep a state in the place of the one before: either is there whole, whatever happens."""
    content = BytesIO()
    torch.save(state, content)  # to a full disk it would fail in words that say nothing of it
    if isinstance(file, UrlPath):
        file.write_bytes(content.getvalue())
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    try:
        partial.write_bytes(content.getbuffer())
        sync(partial)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_state(file: Place) -> dict[str, Any] | None:
    """What `write_state` kept; None where nothing is, or what is there is no such thing."""
    try:
        with reading(file) as path:
            return torch.load(path, weights_only=True, map_location="cpu")
    except (FileNotFoundError, RuntimeError, EOFError, ValueError, UnpicklingError):
        return None


def furthest(states: Iterable[dict[str, Any] | None], digest: str) -> dict[str, Any]:
    """Of several states the one of a run with the most steps; nothing where there is none."""
    return max((s for s in states if s and s["digest"] == digest), key=lambda s: s["step"], default={})


def begin_at(run: Place, digest: str) -> int:
    """From which step on patches are wanted when a run is begun again: that of its last checkpoint, or before."""
    try:
        found = json.loads((run / BEGIN).read_text())
        return max(0, int(found["step"])) if found["digest"] == digest else 0
    except (OSError, DeepfereError, ValueError, KeyError, TypeError):
        return 0


def drop_torn(run: Place) -> None:
    """Forget a group's last checkpoint that a machine which went down left torn: Ray would end every attempt over it.

    What a process alone has kept, and the checkpoints of other settings, stay.
    """
    snapshot = run / SNAPSHOT
    try:
        told = json.loads(snapshot.read_text())
        names = {one["checkpoint_dir_name"] for one in (*told["checkpoint_results"], told["latest_checkpoint_result"])}
        if all(read_state(run / name / CHECKPOINT) is not None for name in names):
            return
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        pass  # torn itself
    for file in (snapshot, run / BEGIN):
        file.unlink(missing_ok=True)


def note_begin(run: Place, digest: str, step: int) -> None:
    """Keep what `begin_at` gives. A run for which this cannot be kept loads what it does not need, and nothing else."""
    with suppress(OSError, DeepfereError):
        (run / BEGIN).write_text(json.dumps({"digest": digest, "step": step}))


def read_folder(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint of Ray Train's."""
    return torch.load(folder / CHECKPOINT, weights_only=True, map_location="cpu")


def write_folder(folder: Path, state: dict[str, Any], timing: dict[str, float]) -> None:
    """A checkpoint of Ray Train's: the state, and what is wanted of it without loading it."""
    torch.save(state, folder / CHECKPOINT)
    told = {"step": state["step"], "losses": state["history"], "timing": timing}
    (folder / HISTORY).write_text(json.dumps(told))
