"""Jobs of Slurm: the script of ``cluster/slurm``, with the command and its settings written into it."""

from __future__ import annotations

import fcntl
import getpass
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepfere.errors import DeepfereError, InputError
from deepfere.places import place
from deepfere.remote import is_url
from deepfere.submit.submission import Submission, write_private
from deepfere.submit.target import Ended, Job, Tail, Target
from deepfere.submit.templates import template

WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
COMMAND = re.compile(r"^# What runs:.*?^# End of what runs\.\n", re.MULTILINE | re.DOTALL)
CONFIG = '"$config"'
END_OF_CONFIG = "END_OF_DEEPFERE_SETTINGS"


def _slurm(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise InputError(
            "Slurm's programs are not on this machine",
            where=words[0],
            remedy="submit on a login node; --dry-run prints the script without Slurm",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeepfereError(f"{words[0]} does not answer") from error


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", where=folder, remedy="choose another -o") from error


class SlurmJob(Job):
    """A job of Slurm.

    Args:
        name: Its id.
        number: Slurm's number of it.
        log: The file that it prints to.
    """

    poll_s = 3.0

    def __init__(self, name: str, number: str, log: Path) -> None:
        self.name, self.number, self._path = name, number, log
        self._log = Tail(log)

    def ended(self) -> Ended | None:
        """By ``scontrol``, which knows a job for some minutes after its end, then by ``sacct``."""
        state, code = self._state()
        if state in WAITING | RUNNING:
            return None
        if state == "COMPLETED":
            return Ended(0)
        told = f"{self.name}: Slurm says {state} of job {self.number}"
        return Ended(code or 1, told if state != "FAILED" else "")

    def _state(self) -> tuple[str, int]:
        shown = _slurm("scontrol", "--oneliner", "show", "job", self.number)
        if shown.returncode == 0 and shown.stdout.strip():
            words = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
            return words["JobState"], int(words["ExitCode"].split(":")[0])
        if "Invalid job id" not in shown.stderr:
            return "RUNNING", 0  # the controller does not answer now; it will again
        format_ = ("--noheader", "--parsable2", "--allocations", "--format=State,ExitCode")
        kept = _slurm("sacct", f"--jobs={self.number}", *format_)
        if kept.returncode == 0 and (lines := kept.stdout.split("\n")[0].split("|")) and len(lines) == 2:
            return lines[0].split()[0], int(lines[1].split(":")[0])
        raise DeepfereError(
            f"Slurm has forgotten job {self.number} and keeps no accounts; its output is in {self._path}"
        )

    def read(self) -> str:
        """From its output file."""
        return self._log.read()

    def stop(self) -> None:
        """SIGTERM to the script, which hands it on to deepfere; a job that still waits is taken back."""
        state, _ = self._state()
        told = ("--state=PENDING",) if state in WAITING else ("--batch", "--signal=TERM")
        done = _slurm("scancel", *told, self.number)
        if done.returncode:
            raise DeepfereError(f"scancel: {done.stderr.strip()}")

    def record(self) -> dict[str, Any]:
        """Slurm's number, and the output file."""
        return {"to": "slurm", "name": self.name, "number": self.number, "log": str(self._path)}


class Slurm(Target):
    """A Slurm cluster, on one of whose machines this program runs.

    Args:
        options: Options of ``sbatch`` (``--nodes=4``), which win over those of the script.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        for option in options:
            if not re.fullmatch(r"--?[a-z][\w-]*(=.*)?", option):
                raise InputError(
                    f"{option!r} is no option of sbatch", where="--sbatch", remedy="give --sbatch=--nodes=4"
                )
        self.options = list(options)

    def _logs(self, submission: Submission) -> Path:
        if is_url(submission.out):  # Slurm writes its logs to files: here, as sbatch itself does
            return Path(f"{place(submission.out).name}.jobs").resolve()
        # Beside the work and not in it: the nodes see it, and it outlives the work.
        return Path(f"{submission.out}.jobs")

    def script(self, submission: Submission, name: str) -> str:
        """The script: everything that the job needs is in it."""
        folder = self._logs(submission)
        lines = [
            "# What runs. The environment is that of deepfere submit; settings travel in this script.",
            f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            *(f"export {key}={shlex.quote(value)}" for key, value in submission.environment(name).items()),
            "config=$(mktemp)",
            f"cat >\"$config\" <<'{END_OF_CONFIG}'",
            submission.config_text.rstrip("\n"),
            END_OF_CONFIG,
            f"command=(deepfere {submission.command(CONFIG)})",
        ]
        head, found = COMMAND.subn(lambda _: "\n".join(lines) + "\n", template("slurm/reconstruct.sbatch"))
        assert found == 1
        # Of an option that stands twice Slurm takes the last.
        more = [
            f"--job-name={name}",
            f"--output={str(folder).replace('%', '%%')}/{name}-%j.out",
            f"--chdir={folder}",
            # One section is ingested, aligned and fitted in the program: other nodes would wait for that.
            *(["--nodes=1"] if submission.job == "fuse" else []),
            *self.options,
        ]
        directives = "".join(f"#SBATCH {shlex.quote(option)}\n" for option in more)
        start = head.rindex("\n#SBATCH")
        cut = head.index("\n", start + 1) + 1
        return head[:cut] + directives + head[cut:]

    def payload(self, submission: Submission, name: str) -> str:
        """The script."""
        folder = self._logs(submission)
        return (
            f"# sbatch --parsable {shlex.quote(str(folder / name))}.sbatch, which is:\n{self.script(submission, name)}"
        )

    def attempts(self, submission: Submission) -> dict[int, Job]:
        """Those that Slurm's queue still shows."""
        shown = _slurm("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%j")
        if shown.returncode:
            raise DeepfereError(f"squeue: {shown.stderr.strip()}")
        found: dict[int, Job] = {}
        for line in shown.stdout.splitlines():
            number, _, name = line.strip().partition("|")
            attempt = submission.number(name)
            if attempt is not None:
                found[attempt] = SlurmJob(name, number, self._log(submission, name, number))
        # Those that have left the queue keep their number here.
        for path in self._logs(submission).glob(f"{submission.base}*.sbatch"):
            attempt = submission.number(path.stem)
            if attempt is not None and attempt not in found:
                found[attempt] = _Over(path.stem)
        return found

    def _log(self, submission: Submission, name: str, number: str) -> Path:
        return self._logs(submission) / f"{name}-{number}.out"

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """As of any place. Slurm takes two jobs of one name, so whoever submits the same work meanwhile waits."""
        # Asked once before anything is written: without Slurm, or beside a job that runs, nothing is left behind.
        for job in self.attempts(submission).values():
            if job.ended() is None:
                return job, False
        folder = self._logs(submission)
        with _written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / f"{submission.base}.lock").open("w")
        with lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            return super().submit(submission)

    def start(self, submission: Submission, name: str) -> Job:
        """``sbatch``; the script stays beside the output."""
        file = self._logs(submission) / f"{name}.sbatch"
        script = self.script(submission, name)
        with _written(file.parent):
            try:
                write_private(file, script)
            except OSError:
                file.unlink(missing_ok=True)
                raise
        done = _slurm("sbatch", "--parsable", str(file))
        if done.returncode:
            file.unlink()
            raise DeepfereError(f"sbatch: {' '.join(done.stderr.split())}")
        number = done.stdout.strip().split(";")[0]
        return SlurmJob(name, number, self._log(submission, name, number))


class _Over(Job):
    """An attempt that has left the queue."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ended(self) -> Ended | None:
        return Ended(1)

    def read(self) -> str:
        return ""

    def stop(self) -> None:
        pass

    def record(self) -> dict[str, Any]:
        return {"to": "slurm", "name": self.name}
