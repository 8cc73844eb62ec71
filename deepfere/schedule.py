"""Who carries out rows: a pool of Ray's actors, or this process.

Rows travel in calls of about a second's work, at most `MOST_ROWS`. A worker records all of a call in its journal before
it answers. What a lost actor or node had been given is given to another one; rows must bear being done twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from deepfere import cores
from deepfere.cluster import last_line
from deepfere.errors import DeepfereError
from deepfere.rows import MOST_LOSSES, Open, Phase, Phases, Record, Row, RowWorker, Stream, told
from deepfere.stopping import current, requested, saving

CALL_S = 1.0
"""A call carries so many seconds' work: what Ray needs for one is then small, and so is what a lost one costs."""

MOST_ROWS = 256
START_S = 3.0
"""So long take actors to start: Python, and what they import."""
FEW = 8
"""Phases of so many rows may be worth no actors at all."""
KEPT = 2
"""Workers that an actor keeps, the models of their sections in them."""

LOOK_EVERY_S = 0.2
RESIZE_EVERY_S = 5.0
PATIENCE_S = 30.0
"""Whoever is so long without a worker is told what for; the cluster may still grow, or others may leave it."""
MOST_WAITS = 10
"""So many times that long, where there seems to be room."""

_log = logging.getLogger(__name__)


class Host:
    """Carries out calls of any phase: what an actor is, and what stands in for one in this process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, RowWorker] = OrderedDict()

    def ready(self) -> bool:
        """Answers once the actor is there, its threads pinned as in all processes of a run."""
        import torch

        torch.set_num_threads(1)
        cores.limit(1)
        return True

    def carry_out(self, number: int, shared: tuple[Any, ...], rows: list[Row], stop: str) -> tuple[list[Record], float]:
        """The records of some rows of a phase, and the seconds that they took."""
        began = time.perf_counter()
        try:
            worker = self._worker(number, shared)
        except Exception as error:
            failure = told(error)
            return [{"unit": row["unit"], **failure} for row in rows], time.perf_counter() - began
        began = time.perf_counter()
        records = worker.carry_out(rows, stop)
        return records, time.perf_counter() - began

    def _worker(self, number: int, shared: tuple[Any, ...]) -> RowWorker:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        while len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        (parts,) = shared
        if not isinstance(parts, tuple):
            import ray

            parts = ray.get(parts)
        worker, arguments = parts
        self._kept[number] = worker(*arguments)
        return self._kept[number]


class Workers(Protocol):
    """What carries out a stream's rows."""

    def run(self, stream: Stream, stop: str) -> None:
        """Until all of them are done, or the run is asked to stop."""


class Here:
    """This process, one row after another."""

    def run(self, stream: Stream, stop: str) -> None:
        """See `Workers`."""
        host, mine = Host(), None
        while not requested(stop):
            taken = stream.take(mine, lambda phase: 1, 1)
            if taken is None:
                return
            mine, rows = taken
            parts = (mine.phase.worker, mine.phase.arguments)
            records, _ = host.carry_out(mine.number, (parts,), rows, stop)
            stream.done(mine, rows, records)


@dataclass(eq=False)
class _Actor:
    handle: Any
    job: Open | None = None
    calls: int = 0
    ready: bool = False


class Pool:
    """Ray's actors, as many as the cluster has CPUs (and GPUs, if they use them) for; they stay until `close`.

    A lost actor is replaced, where there is room for one; nodes that join later are used.

    Args:
        title: In the names of its processes: ``ray::Rows(TITLE)``.
        per_gpu: So many actors share a GPU, and there are no others; None = they use none.
        few: Phases of so few rows are carried out without actors, until one is slow enough to need them.
    """

    def __init__(self, title: str, per_gpu: int | None = None, few: int = 0) -> None:
        self._title, self._per_gpu, self._few = title, per_gpu, few
        self._actors: list[_Actor] = []
        self._starting: dict[Any, _Actor] = {}
        self._calls: dict[Any, tuple[_Actor, Open, list[Row]]] = {}
        self._pace_s: dict[type[RowWorker], float] = {}
        self._size, self._sized_s = 0, -RESIZE_EVERY_S
        self._broken = 0
        self._begun, self._waits = False, 0

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            import ray

            ray.kill(actor.handle)
        self._actors, self._starting, self._calls = [], {}, {}

    def run(self, stream: Stream, stop: str) -> None:
        """See `Workers`.

        Raises:
            DeepfereError: Actors do not start, or a call failed for another reason than the loss of its actor.
        """
        import ray

        looked_s, stopping = -LOOK_EVERY_S, False
        alone_s = time.monotonic()
        for actor in self._actors:
            actor.job = None  # of an earlier stream
        try:
            while True:
                if not stopping and (now := time.monotonic()) - looked_s >= LOOK_EVERY_S:
                    looked_s, stopping = now, requested(stop)
                if not stopping and self._few:
                    self._carry_out_few(stream, stop)
                    stopping = requested(stop)
                awaited = bool(self._starting or self._broken)
                if not stopping:
                    self._grow(stream)
                    self._hand_out(stream, stop)
                if not self._calls and (stopping or not stream.open):
                    return
                if not awaited or any(actor.ready for actor in self._actors):
                    alone_s = time.monotonic()
                elif time.monotonic() - alone_s >= PATIENCE_S:
                    # Once, until there are workers again.
                    alone_s = math.inf if self._tell_what_is_awaited() else time.monotonic()
                waiting = [*self._calls, *self._starting]
                ready, _ = ray.wait(waiting, num_returns=1, timeout=LOOK_EVERY_S)
                if ready:
                    ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
                for ref in ready:
                    (self._started if ref in self._starting else self._answered)(ref, stream)
        except BaseException:
            if self._calls:  # nobody waits for them any more: their actors are not to go on
                self.close()
            raise

    def _carry_out_few(self, stream: Stream, stop: str) -> None:
        """In this process, as long as what is left of a phase would take less than actors take to start."""
        host = Host()
        while not self._begun and not requested(stop) and stream.fill(1):
            job = stream.open[0]
            if len(stream.open) > 1 or job.phase.count > self._few:
                return
            rows = job.take(1)
            records, seconds = host.carry_out(job.number, ((job.phase.worker, job.phase.arguments),), rows, stop)
            slow = job.left * seconds > START_S
            stream.done(job, rows, records)
            if slow:
                return

    def _tell_what_is_awaited(self) -> bool:
        """Whether there is something to tell: where there is room, a busy machine only takes its time."""
        import ray

        have, free = ray.cluster_resources(), ray.available_resources()
        kinds = ["CPU", *(["GPU"] if self._per_gpu else [])]
        self._waits += 1
        # Of several hosts one may have the CPUs and another one the GPU.
        if self._waits < MOST_WAITS and all(free.get(kind, 0.0) >= 1 for kind in kinds):
            return False
        room = " and ".join(f"{have.get(kind, 0.0):g} {kind}s, {free.get(kind, 0.0):g} of them free" for kind in kinds)
        _log.warning(
            "%s: no worker could start for %g s; the cluster has %s. It goes on once there is room (Ctrl-C stops it, "
            "the same command resumes)",
            self._title,
            self._waits * PATIENCE_S,
            room,
        )
        return True

    def _grow(self, stream: Stream) -> None:
        import ray

        if not stream.fill(1):
            return  # what has no rows for anybody is carried out without Ray
        if (now := time.monotonic()) - self._sized_s >= RESIZE_EVERY_S:
            self._sized_s = now
            have = ray.cluster_resources()
            most = [have.get("CPU", 1.0)] + ([have.get("GPU", 0.0) * self._per_gpu] if self._per_gpu else [])
            self._size = max(1, int(min(most)))
        busy = sum(1 for actor in self._actors if actor.calls)
        wanted = min(self._size, busy + stream.fill(self._size))
        for _ in range(wanted - len(self._actors)):
            # Ray calls a process after its class.
            host: Any = ray.remote(type(f"Rows({self._title})", (Host,), {}))
            handle = host.options(num_cpus=1, num_gpus=1 / self._per_gpu if self._per_gpu else 0).remote()
            actor = _Actor(handle)
            self._begun = True
            self._actors.append(actor)
            self._starting[handle.ready.remote()] = actor

    def _hand_out(self, stream: Stream, stop: str) -> None:
        """Give every actor a call, and a second one to begin with at once where calls are short."""
        import ray

        for calls in (0, 1):
            for actor in [a for a in self._actors if a.ready and a.calls == calls]:
                if calls and (actor.job is None or self._pace_s.get(actor.job.phase.worker, CALL_S) >= CALL_S):
                    continue
                taken = stream.take(actor.job, self._most, self._size)
                if taken is None:
                    return
                job, rows = taken
                if job is not actor.job:
                    if actor.job is not None:
                        actor.job.users -= 1
                    job.users += 1
                    actor.job = job
                if job.shared is None:
                    job.shared = ray.put((job.phase.worker, job.phase.arguments))
                ref = actor.handle.carry_out.remote(job.number, (job.shared,), rows, stop)
                actor.calls += 1
                self._calls[ref] = (actor, job, rows)

    def _most(self, phase: Phase) -> int:
        pace_s = self._pace_s.get(phase.worker)
        if pace_s is None:
            return 1
        return max(1, min(MOST_ROWS, int(CALL_S / max(pace_s, 1e-9))))

    def _started(self, ref: Any, stream: Stream) -> None:
        import ray
        from ray.exceptions import RayError

        actor = self._starting.pop(ref)
        try:
            actor.ready = ray.get(ref)
        except RayError as error:
            self._drop(actor)
            self._broken += 1
            if self._broken > 2 * self._size + MOST_LOSSES:
                raise DeepfereError(f"workers do not start: {last_line(error).partition('. ')[0]}") from error

    def _answered(self, ref: Any, stream: Stream) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        actor, job, rows = self._calls.pop(ref)
        actor.calls -= 1
        try:
            records, seconds = ray.get(ref)
        except RayTaskError as error:
            raise DeepfereError(f"{job.phase.what}: {last_line(error)}") from error
        except RayError:
            self._drop(actor)
            stream.lost(job, rows)
            return
        self._broken = 0
        worker, pace_s = job.phase.worker, seconds / len(rows)
        self._pace_s[worker] = (self._pace_s.get(worker, pace_s) + pace_s) / 2
        stream.done(job, rows, records)

    def _drop(self, actor: _Actor) -> None:
        """Forget an actor; its other calls fail by themselves."""
        import ray

        if actor in self._actors:
            self._actors.remove(actor)
            ray.kill(actor.handle)
            if actor.job is not None:
                actor.job.users -= 1


_pool: Pool | None = None


@contextmanager
def pool(title: str) -> Iterator[None]:
    """Keep one pool for everything that is carried out inside: its actors start once, with the first row."""
    global _pool
    outer, _pool = _pool, Pool(title)
    try:
        yield
    finally:
        _pool.close()
        _pool = outer


def run_jobs(
    jobs: Iterable[tuple[str, Phases]],
    *,
    title: str,
    here: bool = False,
    per_gpu: int | None = None,
    few: int = 0,
    failed: Callable[[str, Exception], None] | None = None,
) -> None:
    """Carry out jobs, many at once, on the actors of the `pool` around the call or of one of its own.

    Args:
        jobs: (name, phases) of each; asked for when an actor is free for it.
        title: Names the pool's processes.
        here: In this process instead, one after another.
        per_gpu: So many actors share a GPU (not with a `pool` around); None = they use none.
        few: Phases of a job alone with so few rows are carried out right here, until one has more, or is slow: starting
            actors would cost more (not with a `pool` around).
        failed: Called with name and error of a job that failed, the others go on; without it the first error is raised.

    Raises:
        DeepfereError: See ``failed``.
        Stopped: The run was asked to stop; rows that had been begun are done and recorded.
    """
    stream = Stream(jobs, failed)
    with saving():
        own = None if here or _pool is not None else Pool(title, per_gpu, few)
        workers: Workers = Here() if here else own or _pool  # type: ignore[assignment]
        try:
            workers.run(stream, str(current() or ""))
        finally:
            stream.close()
            if own is not None:
                own.close()


def run_phase(phase: Phase, inline_up_to: int = 0) -> None:
    """Carry out rows of one kind: pixels stay in the workers, rows and records are small.

    Args:
        phase: The rows and who carries them out.
        inline_up_to: So few rows are carried out right here: starting actors would cost more.

    Raises:
        InputError: Some rows failed, all of them because of the input; the others are done.
        DeepfereError: Some rows failed for another reason.
        Stopped: The run was asked to stop; rows that had been begun are done.
    """
    jobs = [(phase.what, (one for one in [phase]))]
    run_jobs(jobs, title=phase.worker.__name__, here=phase.count <= inline_up_to)
