"""Where jobs go: the interface of the four kinds of places, and how a job is followed to its end."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfere.submit.submission import Submission

SECOND_CTRL_C_S = 3.0


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: Exit code for whoever waited: the job's own, and never 0 unless it finished its work.
        what: In words; empty where there is nothing to add.
    """

    code: int
    what: str = ""


class Job(ABC):
    """A job that has been submitted.

    Attributes:
        name: Its id.
        poll_s: Seconds between two questions about it; a cluster's control service has others to answer, too.
    """

    name: str
    poll_s: float = 0.5

    @abstractmethod
    def ended(self) -> Ended | None:
        """How it ended; None while it waits or runs."""

    @abstractmethod
    def read(self) -> str:
        """What it has printed since the last call; returns at once."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to save and stop; returns when it has been told."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What finds it again from another process (plain values)."""

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Stop reading; the job is not touched."""


class Target(ABC):
    """A kind of place for jobs."""

    @abstractmethod
    def payload(self, submission: Submission, name: str) -> str:
        """Exactly what would be sent, as text."""

    @abstractmethod
    def attempts(self, submission: Submission) -> dict[int, Job]:
        """The attempts at this work that the place knows, by number."""

    @abstractmethod
    def start(self, submission: Submission, name: str) -> Job:
        """Send it."""

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """Attach to the job that does this work, or start one.

        Returns:
            The job, and whether it was started now.
        """
        known = self.attempts(submission)
        for job in known.values():
            if job.ended() is None:
                return job, False
        return self.start(submission, submission.name(max(known, default=0) + 1)), True


class Tail:
    """Reads what is added to a file, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> str:
        """Text since the last call, without a character that is written in part."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return ""
        self._offset += len(data)
        return self._decoder.decode(data)


def follow(
    job: Job, out: Callable[[str], None], tell: Callable[[str], None], attach: str, sleep: Callable[[float], None]
) -> int:
    """Print what a job prints until it ends.

    Ctrl-C lets go of the job, which runs on; a second one within three seconds asks it to save and stop, and waits.

    Args:
        job: The job.
        out: Takes what the job prints.
        tell: Takes messages for the user.
        attach: The command that attaches again, for the message.
        sleep: ``time.sleep``.

    Returns:
        The exit code: the job's own; 1 if it was let go of.
    """
    try:
        stopping = False
        while True:
            try:
                text = job.read()
                ended = job.ended()
                if ended is not None:
                    text += job.read()
                if text:
                    out(text)
                if ended is not None:
                    if ended.what:
                        tell(ended.what)
                    return ended.code
                sleep(job.poll_s)
            except KeyboardInterrupt:
                if stopping:
                    return _let_go(job, tell, attach)
                tell(f"Ctrl-C again within {SECOND_CTRL_C_S:.0f} s stops {job.name}; otherwise it is left running")
                try:
                    sleep(SECOND_CTRL_C_S)
                except KeyboardInterrupt:
                    tell(f"stopping {job.name}; it saves its work first")
                    job.stop()
                    stopping = True
                else:
                    return _let_go(job, tell, attach)
    finally:
        job.close()


def _let_go(job: Job, tell: Callable[[str], None], attach: str) -> int:
    tell(f"{job.name} runs on; to attach again: {attach}; to stop it: deepfere stop {job.name}")
    return 1
