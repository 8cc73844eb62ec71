"""Training in this process: the same steps as a worker of Ray Train's takes, without the processes around one.

On two cores these take 18 s to begin, where the steps of a section of 40 x 36 pixels take 19 in two threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from deepfere.places import Place
from deepfere.training.checkpoint import CHECKPOINT, Reached, furthest, read_state, resume, state_of, write_state
from deepfere.training.live import Live
from deepfere.training.loop import JointModel, LoopSettings, SectionTask
from deepfere.training.steps import Clock, take_steps

AHEAD = 2
"""Batches that are loaded while one is trained on, at least."""
TELL_EVERY_S = 1.0


def train_alone(
    settings: LoopSettings,
    sections: list[SectionTask],
    load: Callable[[int], Iterable[dict[str, Any]]],
    *,
    parts: int,
    report_every: int,
    run: Place,
    digest: str,
    stop: str,
    on_step: Callable[[int], None] | None = None,
    live: Live | None = None,
) -> dict[str, Any]:
    """Train to the end, or until it is asked to stop, from wherever the run is.

    Args:
        settings: Of the loop.
        sections: The sections' tasks.
        load: From a number of steps on, what gives the batches of all parts of the steps after them.
        parts: Of each step.
        report_every: Steps between reports.
        run: The run's folder.
        digest: Of all that the weights depend on.
        stop: The file that asks it to stop; nothing, if there is none.
        on_step: Called now and then with the number of steps done.
        live: Gets points as they come.

    Returns:
        The last state that was kept (`deepfere.training.checkpoint.state_of`), and ``timing``; nothing, if none was.
    """
    model = JointModel(settings, sections)
    optimiser = model.optimiser()
    file = run / CHECKPOINT
    # A worker of Ray Train's may have got further.
    state = furthest(map(read_state, [file, *(at / CHECKPOINT for at in run.glob("checkpoint_*"))]), digest)
    reached = resume(state, model, optimiser, digest)
    clock, told_s = Clock(), 0.0

    def keep(reached: Reached) -> None:
        nonlocal state
        sums = {name: float(value) for name, value in reached.sums.items()}
        timing = {**clock.reading(), "workers": 1.0}
        state = {**state_of(model, optimiser, reached, sums, digest), "timing": timing}
        write_state(file, state)

    def tell(steps: int) -> None:
        nonlocal told_s
        if on_step is not None and time.monotonic() - told_s >= TELL_EVERY_S:
            told_s = time.monotonic()
            on_step(steps)

    take_steps(
        model,
        optimiser,
        clock.steps(_ahead(load(reached.step), max(AHEAD, parts)), parts),
        reached,
        settings,
        device=torch.device("cpu"),
        report_every=report_every,
        stop=stop,
        clock=clock,
        keep=keep,
        tell=tell,
        live=live,
    )
    return {"timing": {"workers": 1.0}, **state} if state else {}


def _ahead(batches: Iterable[dict[str, Any]], ahead: int) -> Iterator[dict[str, Tensor]]:
    """The batches as tensors, so many of the next ones loaded by a thread meanwhile."""
    source = iter(batches)

    def load() -> dict[str, Tensor] | None:
        batch = next(source, None)
        return None if batch is None else {name: torch.from_numpy(values) for name, values in batch.items()}

    waiting: deque[Future[dict[str, Tensor] | None]] = deque()
    with ThreadPoolExecutor(1, "patches") as loader:
        try:
            waiting.extend(loader.submit(load) for _ in range(ahead))
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(loader.submit(load))
                yield batch
        finally:
            for one in waiting:
                one.cancel()
