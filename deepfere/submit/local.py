"""Jobs on this machine: a process of their own, which outlives the terminal that it was started from."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from deepfere.errors import DeepfereError
from deepfere.locking import is_held
from deepfere.submit.records import jobs_folder
from deepfere.submit.submission import Submission, write_private
from deepfere.submit.target import Ended, Job, Tail, Target

LOCK, LOG, CODE, CONFIG, PROCESS = "lock", "log", "code", "config.yaml", "pid"
RUNNER = """
import os, signal, subprocess, sys
from pathlib import Path

folder = Path(sys.argv[1])
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: child.send_signal(number))
(folder / "pid").write_text(str(child.pid))
code = child.wait()
partial = folder / ".code"
partial.write_text(str(code if code >= 0 else 128 - code))
partial.replace(folder / "code")
"""
"""Runs a command, hands signals on to it and writes down its exit code; it has inherited the job's lock."""


class LocalJob(Job):
    """A job that has a folder here.

    Args:
        name: Its id.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, jobs_folder() / name
        self._log = Tail(self.folder / LOG)

    def ended(self) -> Ended | None:
        """Its exit code is a file; without one it runs for as long as its lock is held."""
        running = is_held(self.folder / LOCK)
        # In this order: it writes the code before it lets go of the lock.
        code = self.folder / CODE
        if code.exists():
            return Ended(int(code.read_text()))
        return None if running else Ended(1, f"{self.name}: its process is gone; the same command again resumes")

    def read(self) -> str:
        """From its log."""
        return self._log.read()

    def stop(self) -> None:
        """SIGTERM, as soon as it has begun."""
        process = self.folder / PROCESS
        while not (process.exists() and process.read_text()) and self.ended() is None:
            time.sleep(0.1)
        if self.ended() is None:
            with suppress(ProcessLookupError):  # it has ended in between
                os.kill(int(process.read_text()), signal.SIGTERM)

    def record(self) -> dict[str, Any]:
        """The name suffices."""
        return {"to": "local", "name": self.name}


class Local(Target):
    """This machine; the job starts a Ray session of its own."""

    def payload(self, submission: Submission, name: str) -> str:
        """The command, and the settings file that it reads."""
        config = jobs_folder() / name / CONFIG
        variables = [f"{key}={shlex.quote(value)}" for key, value in submission.environment(name).items()]
        command = shlex.join([sys.executable, "-m", "deepfere"])
        return (
            f"{' '.join([*variables, command])} {submission.command(shlex.quote(str(config)))}\n"
            f"\n# {config}\n{submission.config_text}"
        )

    def attempts(self, submission: Submission) -> dict[int, Job]:
        """Those that have a folder."""
        folder = jobs_folder()
        names = [path.parent.name for path in folder.glob(f"{submission.base}*/{LOCK}")] if folder.exists() else []
        return {number: LocalJob(name) for name in sorted(names) if (number := submission.number(name)) is not None}

    def start(self, submission: Submission, name: str) -> Job:
        """In a session of its own, with the job's lock in its hands."""
        folder = jobs_folder() / name
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return LocalJob(name)  # somebody else was first, with the same
            write_private(folder / CONFIG, submission.config_text)
            for file in (CODE, PROCESS):
                (folder / file).unlink(missing_ok=True)
            command = [
                sys.executable,
                "-m",
                "deepfere",
                *shlex.split(submission.command(shlex.quote(str(folder / CONFIG)))),
            ]
            with (folder / LOG).open("wb") as log:
                subprocess.Popen(
                    [sys.executable, "-c", RUNNER, str(folder), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **submission.environment(name), "PYTHONUNBUFFERED": "1"},
                    pass_fds=[lock],
                    start_new_session=True,
                )
        except OSError as error:
            raise DeepfereError(f"{folder}: {error.strerror or error}") from error
        finally:
            os.close(lock)
        return LocalJob(name)
