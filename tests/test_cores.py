"""Work that is shared between the threads of a process."""

from __future__ import annotations

import threading
import time

import pytest

from deepfere import cores


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    yield cores.limit
    cores.limit(None)


@pytest.mark.parametrize(("most", "seen"), [(None, 3), (2, 2), (1, 1), (99, 3)])
def test_as_many_threads_as_may_be_and_answers_in_order(threads, most, seen):
    threads(most)
    at_once, most_at_once, lock, told = 0, 0, threading.Lock(), []

    def square(n):
        nonlocal at_once, most_at_once
        with lock:
            at_once += 1
            most_at_once = max(most_at_once, at_once)
        time.sleep(0.02 * (5 - n))
        with lock:
            at_once -= 1
        return n * n

    assert cores.side_by_side(square, range(5), told.append) == [0, 1, 4, 9, 16]
    assert told == [1, 2, 3, 4, 5] and most_at_once == seen
    assert cores.side_by_side(square, []) == []


@pytest.mark.parametrize("most", [1, 2])
def test_the_first_failure_ends_it(threads, most):
    threads(most)
    begun = []

    def work(n):
        begun.append(n)
        time.sleep(0.01)
        if n == 1:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cores.side_by_side(work, range(100))
    assert len(begun) < 10


def test_whoever_tells_may_stop_it(threads):
    begun = []

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cores.side_by_side(lambda n: begun.append(n) or time.sleep(0.01), range(100), stop)
    assert len(begun) < 10
