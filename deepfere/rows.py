"""Rows of planned work, and in which order they are carried out: jobs of phases of rows. Nothing here knows of Ray.

A *row* is a small dict: one shard, one window. A *phase* is rows that may be done in any order by one kind of worker. A
*job* (a section) is phases one after another: a generator, whose code between two phases runs in the driver when the
first one is done, and at whose ``yield`` the failures of a phase are raised. Many jobs are carried out at once, so that
the end of one is no idle time: an actor keeps to the job that it has, and only where nothing is left there takes over
another one. Jobs and rows are made when an actor is free to take them, and are forgotten when they are done: the driver
holds a few jobs for each actor, however many there are.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from deepfere.cluster import Journal
from deepfere.errors import DeepfereError, InputError, system_text
from deepfere.stopping import Stopped, following, requested

Row = dict[str, Any]
Record = dict[str, Any]

_numbers = count()  # never the same twice: actors outlive a stream

MOST_LOSSES = 10
"""So often a row may be lost with its actor before it is taken for the reason."""


class RowWorker(ABC):
    """Base of what carries out rows: one row in, a small record out.

    Subclasses implement `work`; an exception becomes an ``error`` in the row's record, other rows go on.

    Attributes:
        journal: Where finished rows are recorded, if they are.
    """

    journal: Journal | None = None

    @abstractmethod
    def work(self, row: Row) -> Record:
        """Carry out one row; returns plain values, which the journal keeps."""

    def carry_out(self, rows: Iterable[Row], stop: str = "") -> list[Record]:
        """Carry out the rows of one call; those that are done are in the journal when this returns.

        Args:
            rows: The rows, each with a key ``unit``.
            stop: The file that says to begin no more.

        Returns:
            A record for every row: ``unit`` and what `work` gave, or ``error``, or ``stopped``.
        """
        out: list[Record] = []
        done: dict[str, Record] = {}
        for row in rows:
            if requested(stop):
                out.append({"unit": row["unit"], "stopped": True})
                continue
            try:
                with following(stop):
                    done[row["unit"]] = self.work(row)
            except Stopped:
                out.append({"unit": row["unit"], "stopped": True})
            except Exception as error:
                out.append({"unit": row["unit"], **told(error)})
        if self.journal is not None and done:
            try:
                self.journal.record(done)
            except Exception as error:
                failure = told(error)
                return out + [{"unit": unit, **failure} for unit in done]
        return out + [{"unit": unit, "error": None, **record} for unit, record in done.items()]


def told(error: Exception) -> Record:
    """An exception as plain values."""
    if isinstance(error, InputError):
        parts = {"what": error.what, "where": error.where and str(error.where), "remedy": error.remedy}
        return {"error": str(error), "input": parts}
    if isinstance(error, OSError) and error.errno is not None:
        text = system_text(error)
    elif isinstance(error, MemoryError):
        text = "the memory does not suffice"
    else:
        text = str(error) if isinstance(error, DeepfereError) else f"{type(error).__name__}: {error}"
    return {"error": text, "trace": "".join(traceback.format_exception(error))}


@dataclass(frozen=True)
class Phase:
    """Rows that one kind of worker carries out, in any order.

    Attributes:
        what: Name of the work for messages; nothing where its only row needs none.
        worker: Built with ``arguments`` in every actor that takes part.
        arguments: Plain, small values and paths.
        rows: Taken when there is an actor for them.
        count: How many they are.
        on_done: Called in the driver with each record as it arrives.
    """

    what: str
    worker: type[RowWorker]
    arguments: tuple[Any, ...]
    rows: Iterable[Row]
    count: int
    on_done: Callable[[Record], None] | None = None


Phases = Generator[Phase, None, None]


@dataclass(eq=False)
class Open:
    """A job that has begun.

    Attributes:
        name: Its name.
        phases: What it still has to do.
        users: Actors that keep to it.
        number: Distinguishes its phase from all others of this process.
        left: Rows of the phase that nobody has taken.
        out: Rows of the phase that somebody has.
    """

    name: str
    phases: Phases
    users: int = 0
    number: int = -1
    left: int = 0
    out: int = 0
    phase: Any = None
    rows: Iterator[Row] = field(default_factory=lambda: iter(()))
    again: deque[Row] = field(default_factory=deque)
    losses: dict[str, int] = field(default_factory=dict)
    failed: list[Record] = field(default_factory=list)
    shared: Any = None

    def take(self, most: int) -> list[Row]:
        """The next rows of the phase."""
        taken = [self.again.popleft() for _ in range(min(most, len(self.again)))]
        taken += islice(self.rows, most - len(taken))
        if not taken:
            raise DeepfereError(f"{self.phase.what}: fewer rows than were announced")
        self.left -= len(taken)
        self.out += len(taken)
        return taken


class Stream:
    """Which row comes next; what is done with the records. Knows nothing of actors.

    Args:
        jobs: (name, phases) of each job; one is asked for when its turn has come.
        failed: Called with name and error of a job that failed; the others go on. Without it the first error ends all.
    """

    def __init__(
        self, jobs: Iterable[tuple[str, Phases]], failed: Callable[[str, Exception], None] | None = None
    ) -> None:
        self._jobs, self._failed = iter(jobs), failed
        self.open: list[Open] = []
        self._all_open = False

    def fill(self, actors: int) -> int:
        """Open jobs until there is a row for each of so many actors; how many rows there are."""
        while (left := sum(job.left for job in self.open)) < actors and self._open_next():
            pass
        return left

    def take(self, mine: Open | None, most: Callable[[Phase], int], actors: int) -> tuple[Open, list[Row]] | None:
        """Rows for an actor: of the job that it keeps to, else of one that nobody does, else of a new one.

        Args:
            mine: The job that the actor keeps to.
            most: How many rows of a phase it may be.
            actors: How many actors there are at most: so many jobs have rows left at a time.
        """
        job = mine if mine is not None and mine.left else next((j for j in self.open if j.left and not j.users), None)
        while job is None and sum(1 for j in self.open if j.left) < actors and self._open_next():
            job = next((j for j in self.open if j.left and not j.users), None)
        if job is None:
            job = max((j for j in self.open if j.left), key=lambda j: j.left / (1 + j.users), default=None)
        if job is None:
            return None
        users = job.users + (job is not mine)
        return job, job.take(min(most(job.phase), -(-job.left // max(1, users))))

    def done(self, job: Open, rows: list[Row], records: list[Record]) -> None:
        """Take the records of a call; the next phase begins when all rows of this one are done."""
        job.out -= len(rows)
        for record in records:
            if record.get("stopped"):
                job.out += 1  # never done: the phase does not end in this run
                continue
            if record["error"]:
                job.failed.append(record)
            if job.phase.on_done:
                job.phase.on_done(record)
        self._go_on(job)

    def lost(self, job: Open, rows: list[Row]) -> None:
        """Take back rows whose actor is gone."""
        job.out -= len(rows)
        for row in rows:
            losses = job.losses[row["unit"]] = job.losses.get(row["unit"], 0) + 1
            if losses < MOST_LOSSES:
                job.again.append(row)
                job.left += 1
            else:
                lost = {"unit": row["unit"], "error": f"its worker was lost {losses} times (memory?)"}
                job.failed.append(lost)
        self._go_on(job)

    def close(self) -> None:
        """Leave what is not done."""
        for job in self.open:
            job.phases.close()

    def _open_next(self) -> bool:
        if self._all_open:
            return False
        found = next(self._jobs, None)
        if found is None:
            self._all_open = True
            return False
        job = Open(*found)
        self.open.append(job)
        self._go_on(job)
        return True

    def _go_on(self, job: Open) -> None:
        """Begin the next phase if this one is done; phases without rows are passed over."""
        while not job.left and not job.out:
            try:
                if job.failed:
                    phase = job.phases.throw(_failure(job.phase, job.failed))
                else:
                    phase = next(job.phases)
            except StopIteration:
                self.open.remove(job)
                return
            except Exception as error:
                self.open.remove(job)
                if self._failed is None:
                    raise
                self._failed(job.name, error)
                return
            job.number, job.phase, job.rows, job.left = next(_numbers), phase, iter(phase.rows), phase.count
            job.losses, job.failed, job.shared = {}, [], None


def _failure(phase: Phase, failed: list[Record]) -> DeepfereError:
    """What the failures of a phase's rows amount to."""
    first = failed[0]
    pieces = f"{phase.what}: {len(failed)} of {phase.count} pieces failed"
    if all("input" in record for record in failed):
        parts = first["input"]
        what = f"{parts['what']} ({pieces})" if phase.what else parts["what"]
        return InputError(what, where=parts["where"], remedy=parts["remedy"])
    failure = DeepfereError(f"{pieces}; first {first['unit']}: {first['error']}" if phase.what else first["error"])
    if "trace" in first:
        failure.add_note(f"In the worker:\n{first['trace']}")  # for the failure's log
    return failure
