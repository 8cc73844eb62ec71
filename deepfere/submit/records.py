"""What this machine knows of the jobs that were submitted from it: ``deepfere/jobs`` in the user's data folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from deepfere.folders import data_folder
from deepfere.submit.submission import Submission
from deepfere.submit.target import Job


def jobs_folder() -> Path:
    """Where the records lie, one file per job, and the logs and scripts beside them."""
    return data_folder() / "jobs"


def job_folder(name: str) -> Path:
    """Folder of one job's files, made if it is not there."""
    folder = jobs_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(job: Job, submission: Submission) -> None:
    """Write down where a job is."""
    from deepfere.pipeline.workspace import write_json

    write_json(
        job_folder(job.name) / "record.json", {**job.record(), "work": submission.work, "metadata": submission.metadata}
    )


def recorded(name: str) -> dict[str, Any] | None:
    """Where a job of this id is; None if none was submitted from here."""
    if not re.fullmatch(r"deepfere-[a-z]+-[0-9a-f]{12}(-\d+)?", name):
        return None
    try:
        return json.loads((jobs_folder() / name / "record.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
