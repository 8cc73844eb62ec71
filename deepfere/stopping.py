"""Stopping a run so that it saves its work first: a file ``stop`` in its folder, which all of its processes see.

Whoever wants a run to stop writes the file: ``deepfere stop``, a time limit (``run.time_limit_s``), or the run itself
when it is told so by SIGTERM while its workers are at work. It is looked for between the steps of training, which saves
a checkpoint; between shards, of which those that are begun are finished; and between the parts of all other stages,
which are begun again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STOP = "stop"
LOOK_EVERY_S = 0.2


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has put its work in order; the same command resumes.

    Like an interruption in all but its manners, so that nothing which is meant for failures takes it for one.
    """


class _Watch:
    """What a run looks at while it works.

    Args:
        file: The file that asks it to stop.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.saving, self._looked_s = file, False, 0.0

    def look(self) -> None:
        """Raise if the file is there; the disk is asked a few times a second at most."""
        now = time.monotonic()
        if now - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now
            check(self.file)


_current: _Watch | None = None


def request(file: Path, why: str) -> None:
    """Ask a run to stop.

    Args:
        file: The file ``stop`` of its folder.
        why: For the message that it ends with.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(why)
    partial.replace(file)


def requested(file: str | Path) -> bool:
    """Whether a run is asked to stop; never, if the file has no name."""
    return file != "" and Path(file).exists()


def check(file: Path) -> None:
    """Stop here if that is asked for.

    Raises:
        Stopped: It is.
    """
    if file.exists():
        try:
            why = file.read_text()
        except OSError:
            why = ""
        raise Stopped(why or "on request")


def current() -> Path | None:
    """The file that asks the run in this process to stop; None outside of one."""
    return _current.file if _current else None


def look() -> None:
    """Stop here if that is asked for, unless workers are still finishing what they have begun.

    Raises:
        Stopped: It is.
    """
    if _current is not None and not _current.saving:
        _current.look()


def looking(progress: Callable[[str, float], None]) -> Callable[[str, float], None]:
    """Progress that looks whether to stop."""

    def tell(stage: str, share: float) -> None:
        progress(stage, share)
        look()

    return tell


@contextmanager
def watched(folder: Path, time_limit_s: float | None = None) -> Iterator[None]:
    """Let a run be stopped.

    Args:
        folder: Its folder, which exists; a request that an earlier run has not taken is dropped.
        time_limit_s: It stops itself after so many seconds.
    """
    global _current
    outer, file = _current, folder / STOP
    file.unlink(missing_ok=True)
    timer = None
    if time_limit_s is not None:
        timer = threading.Timer(time_limit_s, _out_of_time, [file, time_limit_s])
        timer.daemon = True
        timer.start()
    _current = _Watch(file)
    try:
        yield
    finally:
        _current = outer
        if timer is not None:
            timer.cancel()
        file.unlink(missing_ok=True)


def _out_of_time(file: Path, seconds: float) -> None:
    try:
        request(file, f"its time limit of {seconds:g} s is over")
    except OSError:
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
