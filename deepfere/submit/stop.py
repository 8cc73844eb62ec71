"""Stop a run by its folder, its result or the id of its job."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfere.errors import InputError
from deepfere.locking import is_held
from deepfere.pipeline.workspace import IDENTITY, LOCK
from deepfere.places import Place, place
from deepfere.stopping import STOP, request
from deepfere.submit.records import recorded
from deepfere.submit.target import Job

PAUSE_S = 0.3


@dataclass(frozen=True)
class Asked:
    """What became of a request.

    Attributes:
        told: For the user.
        running: Tells whether the run still works; None if there was nothing to stop.
    """

    told: str
    running: Callable[[], bool] | None = None


def ask(run: str) -> Asked:
    """Ask a run to stop.

    Args:
        run: A working folder, a result, or a job's id.

    Raises:
        InputError: There is no such run.
    """
    record = recorded(run)
    if record is not None:
        return _ask_job(run, record)
    if not run.strip("/ "):
        raise InputError("is no run", where=repr(run), remedy="give a working folder, a result or a job's id")
    folder = _folder(place(run.rstrip("/")).resolve(), run)
    if not is_held(folder / LOCK):
        return Asked(f"nothing runs in {folder}")
    request(folder / STOP, "by deepfere stop")
    return Asked(f"{folder}: asked to stop", lambda: is_held(folder / LOCK))


def _ask_job(name: str, record: dict[str, Any]) -> Asked:
    job = find(record)
    if job.ended() is not None:
        return Asked(f"{name} has ended already")
    folder = place(record["work"])
    # Where its folder is seen from here, its processes see the request, whatever runs them.
    if record["to"] != "kuberay" and is_held(folder / LOCK):
        request(folder / STOP, "by deepfere stop")
    else:
        job.stop()
    return Asked(f"{name}: asked to stop", lambda: job.ended() is None)


def wait(asked: Asked) -> None:
    """Until the run has stopped."""
    while asked.running is not None and asked.running():
        time.sleep(PAUSE_S)


def find(record: dict[str, Any]) -> Job:
    """A job by what was written down of it."""
    to, name = record["to"], record["name"]
    if to == "local":
        from deepfere.submit.local import LocalJob

        return LocalJob(name)
    if to == "ray":
        from deepfere.submit.ray_jobs import Ray

        return Ray(record["address"]).job(name)
    if to == "kuberay":
        from deepfere.submit.kuberay import KubeJob

        return KubeJob(name, record["namespace"], record["work"])
    from deepfere.submit.slurm import SlurmJob

    return SlurmJob(name, record["number"], Path(record["log"]))


def _folder(path: Place, run: str) -> Place:
    beside = path.with_name(path.name + ".work")
    for folder in (beside, path):
        if (folder / LOCK).exists() or (folder / IDENTITY).exists():
            return folder
    if re.match(r"deepfere-[a-z]+-[0-9a-f]{12}", run):
        raise InputError(f"no job {run} was submitted from here", remedy="give the id that submit has told")
    raise InputError("is no work of deepfere", where=path, remedy="give a working folder, a result or a job's id")
