"""Jobs of a Ray cluster, through its dashboard: the only place that talks to Ray's job client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from deepfere.errors import DeepfereError, InputError
from deepfere.submit.submission import Submission
from deepfere.submit.target import Ended, Job, Target

CONFIG = "deepfere-settings.yaml"
DASHBOARD = "http://127.0.0.1:8265"
MOST_FAILURES = 20
"""So often the connection to a job's log is made again."""
STOP_WAIT_S = 300
"""How long a job may take to save its work after it was told to stop. Ray's own three seconds are for nothing."""


class RayJob(Job):
    """A job of a Ray cluster.

    Args:
        name: Its submission id.
        client: Ray's client of the cluster.
        address: The dashboard's address.
    """

    poll_s = 1.0

    def __init__(self, name: str, client: Any, address: str) -> None:
        self.name, self._client, self._address = name, client, address
        self._log: _Log | None = None

    def ended(self) -> Ended | None:
        """Ray's status, and the exit code of the driver."""
        try:
            info = self._client.get_job_info(self.name)
        except (OSError, RuntimeError) as error:
            # requests' errors are OSErrors. The job goes on without whoever watches it.
            if "does not exist" in str(error):
                raise DeepfereError(f"{self._address} has no job {self.name}") from error
            return None
        if not info.status.is_terminal() or not self._all_read():
            return None
        if info.status == "SUCCEEDED":
            return Ended(0)
        if info.status == "STOPPED":
            return Ended(info.driver_exit_code or 1, f"{self.name} was stopped; the same command again resumes")
        told = info.driver_exit_code is None or info.error_type not in (None, "JOB_ENTRYPOINT_COMMAND_ERROR")
        message = " ".join((info.message or "").split())
        return Ended(info.driver_exit_code or 1, f"{self.name}: {message}" if told else "")

    def _all_read(self) -> bool:
        return self._log is None or self._log.ended.is_set()

    def read(self) -> str:
        """From Ray's log of the driver."""
        if self._log is None:
            self._log = _Log(self._client, self.name)
        return self._log.read()

    def close(self) -> None:
        """Let go of the log."""
        if self._log is not None:
            self._log.closed = True

    def stop(self) -> None:
        """SIGTERM to the driver, which has five minutes."""
        try:
            self._client.stop_job(self.name)
        except (OSError, RuntimeError) as error:
            raise DeepfereError(f"{self._address}: {error}") from error

    def record(self) -> dict[str, Any]:
        """The dashboard's address."""
        return {"to": "ray", "name": self.name, "address": self._address}


class _Log:
    """The log of a job, as it grows, by a thread of its own; a connection that breaks is made again."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name
        self._texts: deque[str] = deque()
        self._shown = 0
        self.ended, self.closed = threading.Event(), False
        threading.Thread(target=self._run, daemon=True).start()

    def read(self) -> str:
        texts = []
        while self._texts:
            texts.append(self._texts.popleft())
        return "".join(texts)

    def _run(self) -> None:
        failures = 0
        while not self.closed and failures < MOST_FAILURES:
            try:
                asyncio.run(self._tail())
                break
            except Exception as error:
                # aiohttp and Ray raise many kinds; whether the job is lost is for its status to say.
                failures += 1
                if failures == MOST_FAILURES:
                    told = f"{type(error).__name__}: {error}".splitlines()[0]
                    self._texts.append(f"the output of {self._name} cannot be followed any more ({told})\n")
                threading.Event().wait(min(0.5 * failures, 5))
        self.ended.set()

    async def _tail(self) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(self._name):
            # Every connection begins at the log's beginning.
            new = text[max(0, self._shown - seen) :]
            seen += len(text)
            if new:
                self._texts.append(new)
                self._shown = max(self._shown, seen)
            if self.closed:
                return


class Ray(Target):
    """A Ray cluster that is up.

    Args:
        address: Its dashboard; None takes ``RAY_API_SERVER_ADDRESS``, ``RAY_ADDRESS`` or this machine's.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or _from_environment() or DASHBOARD
        if "://" not in self.address:
            raise InputError(
                f"{self.address!r} is no dashboard", where="--address", remedy="give http://HOST:8265 of the head"
            )
        self._made: Any = None

    @property
    def client(self) -> Any:
        """Ray's client, connected.

        Raises:
            InputError: Nothing answers, or there is no permission.
        """
        if self._made is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            from ray.job_submission import JobSubmissionClient

            for module in (
                "dashboard.modules.dashboard_sdk",
                "dashboard.modules.job.sdk",
                "_private.runtime_env.packaging",
            ):
                logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)
            # Ray prefers the environment to what it is given.
            with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
                try:
                    self._made = JobSubmissionClient(self.address)
                except (OSError, RuntimeError, ValueError) as error:
                    raise InputError(
                        f"no Ray dashboard answers ({' '.join(str(error).split())[:200]})",
                        where=self.address,
                        remedy="give --address http://HOST:8265; a head needs ray[default] for it",
                    ) from error
        return self._made

    def request(self, submission: Submission, name: str) -> dict[str, Any]:
        """What is sent, but for the folder with the settings."""
        return {
            "entrypoint": f"python -m deepfere {submission.command(CONFIG)}",
            "submission_id": name,
            "metadata": submission.metadata,
            "runtime_env": {
                "env_vars": {
                    **submission.environment(name),
                    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
                }
            },
        }

    def payload(self, submission: Submission, name: str) -> str:
        """The request as YAML, and the settings file in its working folder."""
        import yaml

        request = yaml.safe_dump(self.request(submission, name), sort_keys=False, width=10_000)
        return f"# POST {self.address}/api/jobs/\n{request}\n# {CONFIG} in runtime_env.working_dir\n" + (
            submission.config_text
        )

    def attempts(self, submission: Submission) -> dict[int, Job]:
        """Those that the cluster remembers."""
        try:
            known = [job.submission_id for job in self.client.list_jobs() if job.submission_id]
        except (OSError, RuntimeError) as error:
            raise DeepfereError(f"{self.address}: {error}") from error
        numbers = {number: name for name in known if (number := submission.number(name)) is not None}
        return {number: self.job(name) for number, name in numbers.items()}

    def job(self, name: str) -> RayJob:
        """A job by its id."""
        return RayJob(name, self.client, self.address)

    def start(self, submission: Submission, name: str) -> Job:
        """A folder with nothing but the settings goes to the cluster, and the request."""
        request = self.request(submission, name)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, CONFIG).write_text(submission.config_text)
            request["runtime_env"]["working_dir"] = folder
            try:
                self.client.submit_job(**request)
            except (OSError, RuntimeError, ValueError) as error:
                if "already exists" not in str(error):  # else somebody else was first, with the same
                    raise DeepfereError(f"{self.address}: {' '.join(str(error).split())[:300]}") from error
        return self.job(name)


def _from_environment() -> str | None:
    given = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return given if given and given.startswith("http") else None


@contextlib.contextmanager
def _without(*names: str) -> Any:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
