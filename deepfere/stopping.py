"""Stopping a run so that it saves its work first: a file ``stop`` in its folder, which all of its processes see.

Whoever wants a run to stop writes the file: ``deepfere stop``, a time limit (``run.time_limit_s``), or the run itself
when it is told so by SIGTERM while its workers are at work. It is looked for between the steps of training, which saves
a checkpoint; between shards, of which those that are begun are finished; and between the parts of all other stages,
which are begun again.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from deepfere.errors import DeepfereError
from deepfere.places import Place, UrlPath, place

STOP = "stop"
LOOK_EVERY_S, ASK_EVERY_S = 0.2, 5.0
"""How often a run looks for the file on a disk, and asks a store at a URL."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has put its work in order; the same command resumes.

    Like an interruption in all but its manners, so that nothing which is meant for failures takes it for one.
    """


class _Watch:
    """What a run looks at while it works.

    Args:
        file: The file that asks it to stop.
        guard: Raises if the run may not go on for another reason.
    """

    def __init__(self, file: Place, guard: Callable[[], None]) -> None:
        self.file, self.guard, self.saving, self._looked_s = file, guard, False, 0.0

    def look(self) -> None:
        """Raise if the file is there; the disk is asked a few times a second at most."""
        now = time.monotonic()
        if now - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now
            if requested(self.file):
                check(self.file)


_current: _Watch | None = None
_answers: dict[str, tuple[float, bool]] = {}
"""Of files at URLs: when their store was asked last, and what it answered."""


def request(file: Place, why: str) -> None:
    """Ask a run to stop.

    Args:
        file: The file ``stop`` of its folder.
        why: For the message that it ends with.
    """
    if isinstance(file, UrlPath):
        file.write_text(why)
        _answers[str(file)] = time.monotonic(), True
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(why)
    partial.replace(file)


def requested(file: str | Place) -> bool:
    """Whether a run is asked to stop; never, if the file has no name.

    As cheap as a loop with short turns needs it: a store at a URL is asked every few seconds only, and its last answer
    holds meanwhile.
    """
    if file == "":
        return False
    asked = place(file)
    if not isinstance(asked, UrlPath):
        return asked.exists()
    now = time.monotonic()
    when, answer = _answers.get(str(asked), (-math.inf, False))
    if now - when >= ASK_EVERY_S:
        answer = asked.exists()
        _answers[str(asked)] = now, answer
    return answer


def check(file: Place) -> None:
    """Stop here if that is asked for.

    Raises:
        Stopped: It is.
    """
    if file.exists():
        try:
            why = file.read_text()
        except (OSError, DeepfereError):
            why = ""
        raise Stopped(why or "on request")


def current() -> Place | None:
    """The file that asks the run in this process to stop; None outside of one."""
    return _current.file if _current else None


def look() -> None:
    """Stop here if that is asked for, unless workers are still finishing what they have begun.

    Raises:
        Stopped: It is, or another run has taken the place of this one.
    """
    if _current is None:
        return
    _current.guard()
    if not _current.saving:
        _current.look()


def looking(progress: Callable[[str, float], None]) -> Callable[[str, float], None]:
    """Progress that looks whether to stop."""

    def tell(stage: str, share: float) -> None:
        progress(stage, share)
        look()

    return tell


@contextmanager
def watched(
    folder: Place, time_limit_s: float | None = None, guard: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Let a run be stopped.

    Args:
        folder: Its folder, which exists; a request that an earlier run has not taken is dropped.
        time_limit_s: It stops itself after so many seconds.
        guard: Raises if the run may not go on for another reason (see `deepfere.locking.held`).
    """
    global _current
    outer, file = _current, folder / STOP
    file.unlink(missing_ok=True)
    _answers.pop(str(file), None)
    timer = None
    if time_limit_s is not None:
        timer = threading.Timer(time_limit_s, _out_of_time, [file, time_limit_s])
        timer.daemon = True
        timer.start()
    _current = _Watch(file, guard)
    try:
        yield
    finally:
        _current = outer
        if timer is not None:
            timer.cancel()
        # Where the store fails, the next run drops it.
        with suppress(DeepfereError):
            file.unlink(missing_ok=True)


@contextmanager
def following(file: str) -> Iterator[None]:
    """Be stopped by another process's file, as one of its workers is; in the driver also by what guards its run.

    Args:
        file: Of its run; nothing, if it has none.
    """
    global _current
    outer = _current
    _current = _Watch(place(file), outer.guard if outer is not None else lambda: None) if file else None
    try:
        yield
    finally:
        _current = outer


def _out_of_time(file: Place, seconds: float) -> None:
    try:
        request(file, f"its time limit of {seconds:g} s is over")
    except (OSError, DeepfereError):
        pass  # the folder has just been removed: the run is over


@contextmanager
def saving() -> Iterator[None]:
    """Workers are at work that they can put in order: SIGTERM asks them to, and only a second one interrupts.

    Raises:
        Stopped: On leaving, if it was asked for meanwhile; what the workers have finished is saved.
    """
    watch = _current
    if watch is None or watch.saving:
        yield
        return
    watch.saving = True
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGTERM)

        def terminated(number: int, frame: object) -> None:
            if requested(watch.file):
                raise KeyboardInterrupt
            request(watch.file, "by SIGTERM")

        # Only where SIGTERM would unwind: who has other plans for it keeps them.
        if before is signal.default_int_handler:
            signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        watch.saving = False
        if before is signal.default_int_handler:
            signal.signal(signal.SIGTERM, before)
    check(watch.file)
