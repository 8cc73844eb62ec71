"""The record of every run in MLflow: parameters, inputs, losses, figures.

Built on ``mlflow.MlflowClient`` and never on the fluent API (``mlflow.log_metric`` ...), whose active
run belongs to one thread of one process: here the driver creates the run, and any process that knows
its store and its id writes to it. Every call may be repeated: a step that is already recorded is not
recorded twice, so that a training resumed from a checkpoint leaves one clean curve.

Stores are in :mod:`deepfere.training.mlflow_store` and models in :mod:`deepfere.training.registry`; what
callers need of both is also here.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from deepfere.errors import InputError
from deepfere.training.mlflow_store import (
    OFF,
    connect,
    default_uri,
    experiment_id,
    mlflow_errors,
    plain,
    resolve_uri,
)
from deepfere.training.registry import LoadedModel, ModelInfo, load_registered, promote, register_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

__all__ = [
    "LoadedModel",
    "ModelInfo",
    "NullTracker",
    "Tracker",
    "connect",
    "default_uri",
    "load_registered",
    "log_history",
    "promote",
    "register_model",
    "resolve_uri",
]

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits (mlflow/utils/validation.py, 3.17), with the same or a smaller number here.
_MAX_KEY, _MAX_PARAM, _MAX_TAG, _MAX_DIGEST, _MAX_INPUT_TAG = 250, 6000, 8000, 36, 500
_PARAMS_PER_BATCH, _METRICS_PER_BATCH, _RUNS_PER_PAGE = 100, 1000, 1000

_PARENT_TAG = "mlflow.parentRunId"


class Tracker:
    """One MLflow run, written from any process.

    Attributes:
        uri: The absolute tracking URI; ``none`` for a :class:`NullTracker`.
        run_id: The run's id, empty for a :class:`NullTracker`.
        tags: The run's tags as this tracker has found or set them.
        status: What it was when it was found below another; else nothing.
    """

    def __init__(
        self,
        client: MlflowClient,
        uri: str,
        run_id: str,
        experiment_id: str,
        tags: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        self.client, self.uri, self.run_id, self.experiment_id = client, uri, run_id, experiment_id
        self.tags = dict(tags or {})
        # Nobody has recorded anything in a run that was made just now: the store need not be asked what it has.
        self._fresh = fresh
        self._steps: dict[str, set[int]] = {}
        self._finished = False
        self.status = ""

    @staticmethod
    def start(
        uri: str | None = None,
        experiment: str = "deepfere",
        run_name: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        on_new: Callable[[str], None] = lambda run_id: None,
    ) -> Tracker:
        """Create a run, or resume the run ``run_id``.

        Args:
            uri: See :func:`resolve_uri`; ``none`` gives a :class:`NullTracker`.
            experiment: Name of the MLflow experiment, made if there is none.
            run_name: Shown in MLflow; it makes one up by default.
            params: The resolved configuration, nested; recorded flat under dotted keys, and whole as
                ``config.json``, since MLflow cuts values at 6000 characters.
            tags: Recorded as they are.
            run_id: Resume this run: its parameters must be the same as far as both name them;
                ``experiment`` and ``run_name`` are not used.
            on_new: Called with the id of a run that was made, before anything is recorded in it.

        Raises:
            InputError: The store does not answer, has no such run, or the run has other parameters.
        """
        uri = resolve_uri(uri)
        if uri == OFF:
            return NullTracker()
        client = connect(uri)
        flat = flatten(params or {})
        with mlflow_errors(uri, InputError):
            if run_id is not None:
                tracker = _resume(client, uri, run_id, flat)
                for key, value in _texts(tags).items():
                    client.set_tag(run_id, key, value)
                return tracker
            found = experiment_id(client, uri, experiment)
            tracker = _new(client, uri, found, run_name, {**_own_tags(), **_texts(tags)})
        on_new(tracker.run_id)  # what it raises is not the store's
        with mlflow_errors(uri, InputError):
            tracker._write_params(flat)
            if flat:
                tracker.log_dict(dict(params or {}), "config.json")
        return tracker

    def nested(self, run_name: str, tags: Mapping[str, Any]) -> Tracker:
        """Create a run that MLflow shows under this one.

        Args:
            run_name: Shown in MLflow.
            tags: What it is found again by, see `children`.
        """
        own = {**_own_tags(), _PARENT_TAG: self.run_id, **_texts(tags)}
        with mlflow_errors(self.uri):
            return _new(self.client, self.uri, self.experiment_id, run_name, own)

    def children(self) -> list[Tracker]:
        """The runs under this one, those that were deleted left out."""
        found: list[Tracker] = []
        token = None
        with mlflow_errors(self.uri):
            while True:
                page = self.client.search_runs(
                    [self.experiment_id],
                    f"tags.`{_PARENT_TAG}` = '{self.run_id}'",
                    max_results=_RUNS_PER_PAGE,
                    page_token=token,
                )
                for run in page:
                    tracker = Tracker(self.client, self.uri, run.info.run_id, self.experiment_id, run.data.tags)
                    tracker.status = run.info.status
                    found.append(tracker)
                token = page.token
                if not token:
                    return found

    def _write_params(self, flat: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(k, v) for k, v in flat.items()]
        for i in range(0, len(items), _PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=items[i : i + _PARAMS_PER_BATCH])

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0, tags: Mapping[str, Any] | None = None) -> None:
        """Record numbers at a step; those that are not finite, and steps already recorded, are left out.

        Args:
            metrics: Name to anything that ``float()`` takes (numpy scalars, one-element tensors).
            step: The step or epoch that they belong to.
            tags: Set with them; they are there only if the numbers are.
        """
        self._log_points([(step, metrics)], refresh=False, tags=_texts(tags))

    def _log_points(
        self,
        points: Sequence[tuple[int, Mapping[str, Any]]],
        *,
        refresh: bool,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Record the points that the store does not have; ``refresh`` asks it again what it has."""
        from mlflow.entities import Metric, RunTag

        now, batch, asked = int(time.time() * 1000), [], set()
        try:
            with mlflow_errors(self.uri):
                for step, metrics in points:
                    for name, raw in metrics.items():
                        # None: JSON's and Ray's form of a NaN
                        key, value = _key(name), math.nan if raw is None else float(raw)
                        if not math.isfinite(value):
                            continue
                        if self._fresh and not refresh:
                            self._steps.setdefault(key, set())
                        elif key not in self._steps or (refresh and key not in asked):
                            history = self.client.get_metric_history(self.run_id, key)
                            self._steps[key] = {point.step for point in history}
                            asked.add(key)
                        if step not in self._steps[key]:
                            self._steps[key].add(step)
                            batch.append(Metric(key, value, now, step))
                told = [RunTag(key, value) for key, value in (tags or {}).items()]
                for i in range(0, max(len(batch), min(len(told), 1)), _METRICS_PER_BATCH):
                    last = i + _METRICS_PER_BATCH >= len(batch)
                    self.client.log_batch(
                        self.run_id, metrics=batch[i : i + _METRICS_PER_BATCH], tags=told if last else ()
                    )
                self.tags |= tags or {}
        except BaseException:
            self._steps.clear()  # how much arrived is unknown: the next call asks the store
            self._fresh = False
            raise

    def log_figure(self, figure: Figure | bytes, artifact_file: str) -> None:
        """Store a matplotlib figure, or the bytes of a PNG, as the run's ``artifact_file``."""
        if isinstance(figure, bytes):
            self._store(figure, artifact_file)
            return
        import io

        buffer = io.BytesIO()
        figure.savefig(buffer, format=PurePosixPath(artifact_file).suffix.lstrip(".") or "png", dpi=150)
        self._store(buffer.getvalue(), artifact_file)

    def log_dict(self, values: Mapping[str, Any] | Sequence[Any], artifact_file: str) -> None:
        """Store JSON-like values (numpy and paths included) as the run's ``artifact_file``, replacing it."""
        self._store(json.dumps(plain(values), indent=1).encode(), artifact_file)

    def _store(self, content: bytes, artifact_file: str) -> None:
        target = PurePosixPath(artifact_file)
        folder = None if target.parent == PurePosixPath(".") else str(target.parent)
        with tempfile.TemporaryDirectory() as scratch, mlflow_errors(self.uri):
            local = Path(scratch, target.name)
            local.write_bytes(content)
            self.client.log_artifact(self.run_id, str(local), folder)

    def log_dataset(self, name: str, digest: str, source: str | Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Record an input of the run: what it is called, its digest and where it is, never its pixels.

        Args:
            name: Name of the dataset.
            digest: Digest of its content; MLflow keeps 36 characters, a tag of the input all of it.
            source: Path or URL.
            rows: A small manifest, for instance one row per section; stored as ``datasets/NAME.json``.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.types import ColSpec, Schema

        table = [plain(row) for row in rows]
        columns = {key: value for row in table for key, value in row.items()}
        schema = Schema([ColSpec(_column_type(value), key) for key, value in columns.items()])
        location = str(source)
        kind = location.partition("://")[0] if "://" in location else "local"
        entity = Dataset(
            name=name,
            digest=digest[:_MAX_DIGEST],
            source_type=kind,
            source=json.dumps({"uri": location}),
            schema=json.dumps({"mlflow_colspec": schema.to_dict()}),
            profile=json.dumps({"num_rows": len(table)}),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("digest", digest[:_MAX_INPUT_TAG])]
        with mlflow_errors(self.uri):
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(entity, tags)])
        if table:
            self.log_dict(table, f"datasets/{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json")

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run; the first call counts, so that a ``finally`` cannot overwrite it."""
        if not self._finished:
            with mlflow_errors(self.uri):
                self.client.set_terminated(self.run_id, status)
            self._finished = True


class NullTracker(Tracker):
    """Records nothing: tracking is off."""

    def __init__(self) -> None:
        self.uri, self.run_id, self.experiment_id, self.tags = OFF, "", "", {}

    def nested(self, run_name: str, tags: Mapping[str, Any]) -> Tracker:
        """Another one that records nothing."""
        return NullTracker()

    def children(self) -> list[Tracker]:
        """None."""
        return []

    def _log_points(self, *_: Any, **__: Any) -> None:
        pass

    def _store(self, content: bytes, artifact_file: str) -> None:
        pass

    def log_figure(self, figure: Figure | bytes, artifact_file: str) -> None:
        """Do nothing."""

    def log_dataset(self, name: str, digest: str, source: str | Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Do nothing."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Do nothing."""


def log_history(tracker: Tracker, history: Sequence[Mapping[str, Any]], *, refresh: bool = True) -> None:
    """Record a whole history, leaving out what the store already has, whoever wrote it.

    Args:
        tracker: The run.
        history: One ``{"step": int, name: float, ...}`` per step.
        refresh: Ask the store again what it has; False where nobody else writes what this tracker does.

    Raises:
        InputError: An entry has no whole-numbered ``step``.
    """
    points = []
    for i, entry in enumerate(history):
        step = entry.get("step")
        if step is None or int(step) != step:
            raise InputError("no whole-numbered `step`", where=f"history entry {i}", remedy="give its step")
        points.append((int(step), {k: v for k, v in entry.items() if k != "step"}))
    tracker._log_points(points, refresh=refresh)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as MLflow takes them: dotted keys, text values cut to its limits."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            value = plain(value)
            text = value if isinstance(value, str) else json.dumps(value)
            flat[_key(name)] = text if len(text) <= _MAX_PARAM else text[: _MAX_PARAM - 3] + "..."
    return flat


def _key(name: str) -> str:
    """A name in the characters that every MLflow store takes, cut to its limit."""
    return re.sub(r"[^\w\-. /]", "_", str(name), flags=re.ASCII)[:_MAX_KEY]


def _column_type(value: Any) -> str:
    names = {bool: "boolean", int: "long", float: "double"}
    return names.get(type(value), "string")


def _texts(tags: Mapping[str, Any] | None) -> dict[str, str]:
    return {_key(k): str(v)[:_MAX_TAG] for k, v in (tags or {}).items()}


def _new(client: MlflowClient, uri: str, experiment_id: str, run_name: str | None, tags: dict[str, str]) -> Tracker:
    run = client.create_run(experiment_id, tags=tags, run_name=run_name)
    return Tracker(client, uri, run.info.run_id, experiment_id, tags, fresh=True)


def _own_tags() -> dict[str, str]:
    tags = {"mlflow.source.name": "deepfere", "mlflow.source.type": "JOB"}
    with contextlib.suppress(KeyError, OSError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def has_run(uri: str | None, run_id: str | None) -> bool:
    """Whether a store has a run that nobody has deleted; true of tracking that is off, which has none to lose.

    Raises:
        InputError: The store does not answer.
    """
    from mlflow.exceptions import MlflowException

    uri = resolve_uri(uri)
    if uri == OFF or not run_id:
        return True
    client = connect(uri)
    with mlflow_errors(uri, InputError):
        try:
            return bool(client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False


def _resume(client: MlflowClient, uri: str, run_id: str, flat: dict[str, str]) -> Tracker:
    """The tracker of an existing run, reopened, with the new parameters added."""
    run = client.get_run(run_id)
    known = run.data.params
    changed = sorted(k for k in flat.keys() & known.keys() if known[k] != flat[k])
    if changed:
        k = changed[0]
        raise InputError(
            f"the run has {k} = {known[k]}, this configuration has {flat[k]}",
            where=f"run {run_id}",
            remedy="start a new run for another configuration",
        )
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    tracker = Tracker(client, uri, run_id, run.info.experiment_id, run.data.tags)
    tracker._write_params({k: v for k, v in flat.items() if k not in known})
    return tracker
