"""What is sent: a command with absolute paths, the resolved settings, and an id that the same work gets again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import deepfere
from deepfere.config import Config, digest
from deepfere.errors import InputError
from deepfere.readers.digest import content_digest

VARIABLE = "DEEPFERE_SUBMISSION"
"""Environment variable that tells a job which submission it is (JSON); its MLflow run is tagged with it."""
TAGS = ("deepfere.submission", "deepfere.git")


@dataclass(frozen=True)
class Submission:
    """One job, ready to be sent.

    Attributes:
        job: The command: ``train``, ``fuse`` ...
        arguments: Its words without settings, paths absolute.
        config: The resolved settings.
        study: What it works on: a manifest or a measurement.
        out: Where it writes: the study's working folder or the result.
        base: Id of this work; attempts after the first are called ``BASE-2``, ``BASE-3`` ...
        metadata: Config hash, git revision, tracking store and the like, as text.
    """

    job: str
    arguments: tuple[str, ...]
    config: Config
    study: str
    out: str
    base: str
    metadata: dict[str, str]

    @property
    def work(self) -> str:
        """The folder of unfinished work."""
        return f"{self.out}.work" if self.job == "fuse" else self.out

    @property
    def config_text(self) -> str:
        """The settings, all of them, as the YAML that ``--config`` takes."""
        return yaml.safe_dump(self.config.resolved(), sort_keys=False)

    def command(self, config: str) -> str:
        """The shell command without the program's name.

        Args:
            config: Where the settings will lie, as the shell is to read it (quoted by the caller where need be).
        """
        return f"{shlex.join([self.job, *self.arguments])} --config {config}"

    def environment(self, name: str) -> dict[str, str]:
        """Environment of the job.

        Args:
            name: The attempt's id.
        """
        told = {"deepfere.submission": name, **self.metadata}
        # No more than that: what carries it may read it as a shell does, and a path may hold anything.
        return {VARIABLE: json.dumps({key: told[key] for key in TAGS if key in told}, sort_keys=True)}

    def name(self, number: int) -> str:
        """Id of an attempt, counted from 1."""
        return self.base if number == 1 else f"{self.base}-{number}"

    def number(self, name: str) -> int | None:
        """Which attempt an id is; None if it is another work's."""
        if name == self.base:
            return 1
        head, _, tail = name.rpartition("-")
        return int(tail) if head == self.base and tail.isdecimal() and int(tail) > 1 else None


def make_submission(job: str, arguments: Sequence[str], study: str, out: str, config: Config) -> Submission:
    """A job with its id: the same for the same command, study, output and settings.

    Args:
        job: The command.
        arguments: Its words without settings, paths absolute.
        study: Absolute path of the manifest or measurement.
        out: Absolute path of the output.
        config: Resolved settings.
    """
    manifest = content_digest(study) if job != "fuse" and Path(study).is_file() else ""
    values = {key: value for key, value in config.resolved().items() if key != "run"}
    name = digest([job, list(arguments), manifest, values])[:12]
    metadata = {
        "deepfere.version": deepfere.__version__,
        "deepfere.config": config.digest(),
        "deepfere.study": study,
        "deepfere.out": out,
        **git_revision(),
        **_tracking(config, out, job),
    }
    return Submission(job, tuple(arguments), config, study, out, f"deepfere-{job}-{name}", metadata)


def git_revision() -> dict[str, str]:
    """Revision of the checkout that this program runs from, ``-dirty`` where it was changed; empty without one."""
    root = Path(deepfere.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {}
    git = ["git", "-C", str(root)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if revision.returncode or changes.returncode:
        return {}
    return {"deepfere.git": revision.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")}


def _tracking(config: Config, out: str, job: str) -> dict[str, str]:
    """Where the run is recorded; its id if the folder has begun one, which the job then goes on with."""
    from deepfere.pipeline.workspace import read_json
    from deepfere.training.mlflow_store import redact

    told = {"mlflow.experiment": config.tracking.experiment}
    if config.tracking.uri is not None:
        told["mlflow.uri"] = redact(config.tracking.uri)
    folder = Path(f"{out}.work" if job == "fuse" else out)
    run = (read_json(folder / "done" / "track.json") or {}).get("run_id") if folder.is_dir() else None
    return told | ({"mlflow.run": str(run)} if run else {})


def tags_from_environment() -> dict[str, str]:
    """What a job's environment says of its submission, as tags for its MLflow run."""
    try:
        values = json.loads(os.environ.get(VARIABLE, "{}"))
    except ValueError:
        return {}
    return {name: str(values[name]) for name in TAGS if isinstance(values, dict) and name in values}


def write_private(file: Path, text: str) -> None:
    """Write a file that nobody else may read: settings may hold the password of an MLflow server."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as out:
        os.fchmod(handle, 0o600)  # one that was there keeps its mode
        out.write(text)


def shipped(config: Config, to: str) -> Config:
    """The settings as the job gets them: what depends on where they are read is settled here.

    Args:
        config: The user's settings.
        to: The kind of place that they are sent to.

    Raises:
        InputError: The settings name a cluster, and the job goes to another one.
    """
    from deepfere.training.mlflow_store import redact, resolve_uri

    values = config.resolved()
    if to != "local" and config.ray.address is not None:
        raise InputError(
            f"the job runs in the cluster that it is sent to, and the settings name {config.ray.address}",
            where="ray.address",
            remedy="leave it out",
        )
    if config.tracking.uri is not None or os.environ.get("MLFLOW_TRACKING_URI") or to in ("local", "slurm"):
        uri = values["tracking"]["uri"] = resolve_uri(config.tracking.uri)
        if to == "kuberay" and redact(uri) != uri:
            raise InputError(
                "holds a password, and settings travel in a ConfigMap, which is no secret",
                where="tracking.uri",
                remedy="leave it out; the pods get MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from a Secret",
            )
    return Config.model_validate(values)
