"""What one training worker does: batches from Ray Data, steps of the joint model, checkpoints by steps.

Nothing in the loop draws random numbers: patches and flips come from the seed and the number of the step, weights
from the seed. A checkpoint (model, optimiser, step) therefore resumes exactly.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from deepfere.errors import DeepfereError
from deepfere.places import Place, place
from deepfere.stopping import requested
from deepfere.training.live import Live, Recording
from deepfere.training.loop import Batch, JointModel, LoopSettings, SectionTask, on_device, train_step
from deepfere.training.storage import uploader
from deepfere.training.system import SystemMetrics

TELL_EVERY_S = 2.0
CHECKPOINT = "training.pt"
HISTORY = "history.json"
BEGIN = "begin.json"
"""In the run's folder: from which step on patches are loaded when training is begun again."""


class Clock:
    """How long the loop waits for its input, and how long it takes in all, from the second step on."""

    def __init__(self) -> None:
        self._waited_s, self._steps, self._start = 0.0, 0, 0.0

    def steps(self, batches: Iterable[Any], parts: int) -> Iterator[list[Any]]:
        """The ``parts`` batches of each step."""
        source = iter(batches)
        while True:
            began = time.perf_counter()
            if self._steps == 1:
                self._start = began
            step = [batch for _ in range(parts) if (batch := next(source, None)) is not None]
            if self._steps:
                self._waited_s += time.perf_counter() - began
            if len(step) < parts:
                return
            self._steps += 1
            yield step

    def restart(self) -> None:
        """Begin anew with the next step."""
        self._waited_s, self._steps = 0.0, 0

    def reading(self) -> dict[str, float]:
        """``input_wait`` (share of the time) and ``steps_per_s``; empty before the second step."""
        if self._steps < 2:
            return {}
        took = time.perf_counter() - self._start
        return {"input_wait": self._waited_s / took, "steps_per_s": (self._steps - 1) / took}


def work(config: dict[str, Any]) -> None:
    """Ray Train's loop: every worker runs it (see `deepfere.training.trainer.train_joint` for ``config``)."""
    from ray import train
    from ray.train.torch import get_device, prepare_model

    settings = LoopSettings(**config["settings"])
    sections = [SectionTask(**s) for s in config["sections"]]
    torch.set_num_threads(config["threads"])
    device = get_device()
    model = JointModel(settings, sections)
    optimiser = model.optimiser()
    first, history, sums, count = _resume(train.get_checkpoint(), model, optimiser, config["digest"])
    # Before DDP copies it: its parameters are the ones that the optimiser holds.
    model.to(device)
    _to_device(optimiser, device)
    wrapped = prepare_model(model, move_to_device=False, parallel_strategy_kwargs={"find_unused_parameters": True})
    world, rank = train.get_context().get_world_size(), train.get_context().get_world_rank()
    batches = train.get_dataset_shard("train").iter_torch_batches(
        batch_size=max(1, settings.batch // world // config["parts"]), drop_last=True, prefetch_batches=2, device="cpu"
    )
    upload = uploader(config["run"])
    clock, stop = Clock(), config["stop"]
    tells = Telling(config["progress"]) if rank == 0 and config["progress"] else None
    live, load = _recorders(config["recording"], config["node"])
    settled: list[dict[str, float]] = list(history)
    run, kept, awaited = place(config["run"]), first, None
    for loaded in clock.steps(batches, config["parts"]):
        step = int(loaded[0]["step"][0])
        if (step > first) if awaited is None else (step != awaited):
            # A checkpoint was lost since: the next attempt loads all.
            if rank == 0:
                note_begin(run, config["digest"], 0)
            raise DeepfereError(f"patches of step {step + 1} came, not those of step {(awaited or first) + 1}")
        awaited = step + 1
        if step < first:
            clock.restart()
            if _stops(stop, step, device):
                break
            continue
        parts: list[Batch] = [on_device(batch, device) for batch in loaded]
        losses = train_step(wrapped, optimiser, parts, step, settings)
        if tells is not None:
            tells(step + 1)
        sums = {name: sums.get(name, 0.0) + value.double() for name, value in losses.items()}
        count += 1
        last = step + 1 == settings.steps
        reports = (step + 1) % config["report_every"] == 0 or last
        if reports:
            history.append({"step": step + 1, **_over_workers({name: value / count for name, value in sums.items()})})
            sums, count = {}, 0
        stops = not last and _stops(stop, step, device)
        if reports or stops:
            rest = {"sums": _over_workers(sums), "count": count}
            with tempfile.TemporaryDirectory() as folder:
                saved_to = None
                if rank == 0:
                    timing = {**clock.reading(), "workers": float(world)}
                    _save(Path(folder), model, optimiser, step + 1, history, rest, timing, config["digest"])
                    saved_to = train.Checkpoint.from_directory(folder)
                told = {**(history[-1] if history else {}), "step": step + 1}
                train.report(told, checkpoint=saved_to, checkpoint_upload_fn=upload)
            # What was reported last is safe only when the next report has gone through.
            if rank == 0:
                note_begin(run, config["digest"], kept)
            kept = step + 1
            if live is not None:
                live(settled)
                timing = {f"training_{name}": value for name, value in clock.reading().items()}
                settled = [{**history[-1], **timing}] if reports else []
        if last or stops:
            break
    for recorder in (live, load):
        if recorder is not None:
            recorder.close()


def begin_at(run: Place, digest: str) -> int:
    """From which step on patches are wanted when a run is begun again: that of its last checkpoint, or before."""
    try:
        found = json.loads((run / BEGIN).read_text())
        return max(0, int(found["step"])) if found["digest"] == digest else 0
    except (OSError, DeepfereError, ValueError, KeyError, TypeError):
        return 0


def note_begin(run: Place, digest: str, step: int) -> None:
    """Keep what `begin_at` gives. A run for which this cannot be kept loads what it does not need, and nothing else."""
    with suppress(OSError, DeepfereError):
        (run / BEGIN).write_text(json.dumps({"digest": digest, "step": step}))


def _recorders(to: Recording | None, drivers: str) -> tuple[Live | None, SystemMetrics | None]:
    """What this worker sends to MLflow: the first of all the losses, the first of another host its load."""
    import ray
    from ray import train

    node, context = ray.get_runtime_context().get_node_id(), train.get_context()
    if to is None or not to.from_host(node, drivers):
        return None, None
    live = Live(to) if context.get_world_rank() == 0 else None
    loads = to.system_metrics and node != drivers and context.get_local_rank() == 0
    return live, SystemMetrics(to.uri, to.run_id, socket.gethostname()) if loads else None


class Telling:
    """Writes down how far training is; at a URL every few seconds only.

    Args:
        file: Where.
    """

    def __init__(self, file: str) -> None:
        self._file, self._told_s = place(file), 0.0

    def __call__(self, steps: int) -> None:
        """So many steps are done."""
        if isinstance(self._file, Path):
            self._file.write_text(str(steps))
        elif time.monotonic() - self._told_s >= TELL_EVERY_S:
            self._told_s = time.monotonic()
            # Who watches is told less, and training goes on.
            with suppress(DeepfereError):
                self._file.write_text(str(steps))


def _stops(stop: str, step: int, device: torch.device) -> bool:
    """Whether the run is asked to stop; all workers agree on what the first one sees."""
    if not distributed.is_initialized():
        return requested(stop)
    # To ask the others a GPU has to be waited for.
    if device.type != "cpu" and (step + 1) % 10:
        return False
    told = torch.tensor([int(distributed.get_rank() == 0 and requested(stop))], device=device)
    distributed.broadcast(told, 0)
    return bool(told.item())


def _resume(
    checkpoint: Any, model: JointModel, optimiser: torch.optim.Optimizer, digest: str
) -> tuple[int, list[dict[str, float]], dict[str, Tensor], int]:
    """What a checkpoint has behind it; model and optimiser are set to it.

    Returns:
        Its steps, their history, and sums and number of the losses that are not in the history yet.
    """
    if checkpoint is None:
        return 0, [], {}, 0
    with checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / CHECKPOINT, weights_only=True, map_location="cpu")
    # A checkpoint of other settings (or of fits that another version made) is no place to go on from.
    if saved["digest"] != digest:
        return 0, [], {}, 0
    model.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in saved.get("sums", {}).items()}
    return saved["step"], saved["history"], sums, saved.get("count", 0)


def _to_device(optimiser: torch.optim.Optimizer, device: torch.device) -> None:
    """Moments go where the parameters are; counters stay on the host, as PyTorch keeps them."""
    for state in optimiser.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                state[name] = value.to(device)


def _save(
    folder: Path,
    model: JointModel,
    optimiser: torch.optim.Optimizer,
    step: int,
    history: list[dict[str, float]],
    rest: dict[str, Any],
    timing: dict[str, float],
    digest: str,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "history": history,
        **rest,
        "digest": digest,
    }
    torch.save(state, folder / CHECKPOINT)
    (folder / HISTORY).write_text(json.dumps({"step": step, "losses": history, "timing": timing}))


def _over_workers(losses: dict[str, Tensor]) -> dict[str, float]:
    """Mean over the workers, each of which saw its own patches."""
    if not losses:
        return {}
    values = torch.stack(list(losses.values()))
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values = values / distributed.get_world_size()
    return dict(zip(losses, values.tolist(), strict=True))
