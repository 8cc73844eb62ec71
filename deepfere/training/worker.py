"""What one worker of Ray Train's does: batches from Ray Data, the steps of its share, checkpoints for all."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepfere import cores
from deepfere.errors import DeepfereError
from deepfere.places import Place, place
from deepfere.tiling.dataset import Dealing
from deepfere.training.checkpoint import (
    CHECKPOINT,
    Reached,
    furthest,
    note_begin,
    over_workers,
    read_state,
    resume,
    state_of,
    write_folder,
)
from deepfere.training.live import Live, Recording
from deepfere.training.loop import JointModel, LoopSettings, SectionTask
from deepfere.training.steps import Clock, asked, take_steps
from deepfere.training.storage import uploader
from deepfere.training.system import SystemMetrics

TELL_EVERY_S = 2.0


def work(config: dict[str, Any]) -> None:
    """Ray Train's loop: every worker runs it (see `deepfere.training.trainer.train_joint` for ``config``)."""
    from ray import train
    from ray.train.torch import get_device, prepare_model

    settings = LoopSettings(**config["settings"])
    digest, run = config["digest"], place(config["run"])
    torch.set_num_threads(config["threads"])
    cores.limit(config["threads"])
    device = get_device()
    model = JointModel(settings, [SectionTask(**s) for s in config["sections"]])
    optimiser = model.optimiser()
    reached = resume(_state(train.get_checkpoint(), run, digest), model, optimiser, digest)
    # Before DDP copies it: its parameters are the ones that the optimiser holds.
    model.to(device)
    _to_device(optimiser, device)
    wrapped = prepare_model(model, move_to_device=False, parallel_strategy_kwargs={"find_unused_parameters": True})
    world, rank = train.get_context().get_world_size(), train.get_context().get_world_rank()
    dealing = Dealing.of(settings.batch, world, config["most"])
    batches = train.get_dataset_shard("train").iter_torch_batches(
        batch_size=dealing.rows, drop_last=True, prefetch_batches=2, device="cpu"
    )
    upload = uploader(config["run"])
    clock, kept = Clock(), reached.step

    def keep(reached: Reached) -> None:
        nonlocal kept
        sums = over_workers(reached.sums)
        with tempfile.TemporaryDirectory() as folder:
            saved_to = None
            if rank == 0:
                timing = {**clock.reading(), "workers": float(world)}
                write_folder(Path(folder), state_of(model, optimiser, reached, sums, digest), timing)
                saved_to = train.Checkpoint.from_directory(folder)
            told = {**(reached.history[-1] if reached.history else {}), "step": reached.step}
            train.report(told, checkpoint=saved_to, checkpoint_upload_fn=upload)
        # What was reported last is safe only when the next report has gone through.
        if rank == 0:
            note_begin(run, digest, kept)
        kept = reached.step

    def lost() -> None:
        if rank == 0:
            note_begin(run, digest, 0)

    live, load = _recorders(config["recording"], config["node"])
    loaded = clock.steps(batches, dealing.parts)
    take_steps(
        wrapped,
        optimiser,
        _to_come(loaded, reached.step, clock, lost, lambda step: asked(config["stop"], step, device)),
        reached,
        settings,
        device=device,
        report_every=config["report_every"],
        stop=config["stop"],
        clock=clock,
        keep=keep,
        tell=Telling(config["progress"]) if rank == 0 and config["progress"] else None,
        live=live,
    )
    for recorder in (live, load):
        if recorder is not None:
            recorder.close()


def _state(checkpoint: Any, run: Place, digest: str) -> dict[str, Any]:
    """What to go on from: the group's last checkpoint, or what a process alone has kept of more steps."""
    own = None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            own = read_state(Path(folder) / CHECKPOINT)  # None of one that a machine which went down left torn
    return furthest([own, read_state(run / CHECKPOINT)], digest)


def _to_come(
    steps: Iterable[list[dict[str, Tensor]]],
    first: int,
    clock: Clock,
    lost: Callable[[], None],
    stops: Callable[[int], bool],
) -> Iterator[list[dict[str, Tensor]]]:
    """The steps that are not done yet; those before them may have been loaded again.

    Args:
        steps: What is loaded of each.
        first: Steps done.
        clock: Which times them; it begins with the first that is new.
        lost: Called where others came: a checkpoint is gone, and the next attempt has to load all.
        stops: Whether the run is asked to stop before such a step.

    Raises:
        DeepfereError: Others came.
    """
    awaited = None
    for loaded in steps:
        step = int(loaded[0]["step"][0])
        if any(bool((part["step"] != step).any()) for part in loaded):
            lost()
            raise DeepfereError(f"patches of other steps came with those of step {step + 1}")
        if (step > first) if awaited is None else (step != awaited):
            lost()
            raise DeepfereError(f"patches of step {step + 1} came, not those of step {(awaited or first) + 1}")
        awaited = step + 1
        if step < first:
            clock.restart()
            if stops(step):
                return
            continue
        yield loaded


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


def _to_device(optimiser: torch.optim.Optimizer, device: torch.device) -> None:
    """Moments go where the parameters are; counters stay on the host, as PyTorch keeps them."""
    for state in optimiser.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                state[name] = value.to(device)
