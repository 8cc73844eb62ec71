"""How many processor cores there are for this process, and what is done on all of them."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, or the share of them that a container leaves it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or no limit
        quota, period = QUOTA.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


_most: int | None = None


def limit(threads: int | None) -> None:
    """Have `side_by_side` use so many threads in this process, at most; None = a thread per core."""
    global _most
    _most = threads


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """`limit` for a while."""
    before = _most
    limit(threads)
    try:
        yield
    finally:
        limit(before)


def _one_thread_each() -> None:
    # Threads that begin have as many of their own as there are cores, whatever the one that began them has.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def side_by_side(
    do: Callable[[Item], Answer],
    items: Iterable[Item],
    done: Callable[[int], None] = lambda count: None,
    at_once: int | None = None,
) -> list[Answer]:
    """Do something to each of some items, in as many threads as there are cores: for work that releases the GIL.

    Args:
        do: Called with each item, in any order.
        items: The items, taken when there is a thread for them.
        done: Called by this thread with the number of answers that are there, in the order of the items.
        at_once: Threads at most, for the sake of memory.

    Returns:
        What it gave, in the order of the items.
    """
    threads = min(n for n in (usable_cores(), _most, at_once) if n is not None)
    answers: list[Answer] = []
    if threads <= 1:
        for item in items:
            answers.append(do(item))
            done(len(answers))
        return answers
    begun: deque[Future[Answer]] = deque()

    def take() -> None:
        answers.append(begun.popleft().result())
        done(len(answers))

    with ThreadPoolExecutor(threads, initializer=_one_thread_each) as pool:
        try:
            for item in items:
                begun.append(pool.submit(do, item))
                while len(busy := [one for one in begun if not one.done()]) >= threads:
                    wait(busy, return_when=FIRST_COMPLETED)
                while begun and begun[0].done():
                    take()
            while begun:
                take()
        finally:
            for one in begun:
                one.cancel()
    return answers
