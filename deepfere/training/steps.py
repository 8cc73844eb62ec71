"""The steps of a training, to the last one or until it is asked to stop: the same for whoever carries them out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from deepfere.stopping import requested
from deepfere.training.checkpoint import Reached
from deepfere.training.live import Live
from deepfere.training.loop import LoopSettings, on_device, train_step


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


class Keep(Protocol):
    """Keeps where training stands, when this returns; every worker of a group calls it together."""

    def __call__(self, reached: Reached) -> None:
        """With model and optimiser as they are after ``reached.step`` steps."""


def take_steps(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    steps: Iterable[Sequence[dict[str, Tensor]]],
    reached: Reached,
    settings: LoopSettings,
    *,
    device: torch.device,
    report_every: int,
    stop: str,
    clock: Clock,
    keep: Keep,
    tell: Callable[[int], None] | None = None,
    live: Live | None = None,
) -> None:
    """Train from where ``reached`` is, which is counted up.

    Args:
        model: The joint model, or DDP around it.
        optimiser: Of its parameters.
        steps: The loaded parts of every step to come.
        reached: How far training is.
        settings: Of the loop.
        device: Where the model is.
        report_every: Steps between reports.
        stop: The file that asks it to stop; nothing, if there is none.
        clock: Of the input.
        keep: Called at every report, and before it stops.
        tell: Called with the number of steps after each.
        live: Gets the points of a report once the one after it is kept.
    """
    settled: list[dict[str, float]] = list(reached.history)
    for loaded in steps:
        losses = train_step(model, optimiser, [on_device(part, device) for part in loaded], reached.step, settings)
        reached.add(losses)
        if tell is not None:
            tell(reached.step)
        last = reached.step == settings.steps
        reports = reached.step % report_every == 0 or last
        if reports:
            reached.note()
        stops = not last and asked(stop, reached.step, device)
        if reports or stops:
            keep(reached)
            if live is not None:
                live(settled)
                timing = {f"training_{name}": value for name, value in clock.reading().items()}
                settled = [{**reached.history[-1], **timing}] if reports else []
        if last or stops:
            return


def asked(stop: str, steps: int, device: torch.device) -> bool:
    """Whether the run is asked to stop; all workers agree on what the first one sees."""
    if not distributed.is_initialized():
        return requested(stop)
    # To ask the others a GPU has to be waited for.
    if device.type != "cpu" and steps % 10:
        return False
    told = torch.tensor([int(distributed.get_rank() == 0 and requested(stop))], device=device)
    distributed.broadcast(told, 0)
    return bool(told.item())
