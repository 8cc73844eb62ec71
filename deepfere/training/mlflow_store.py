"""Where runs and models are recorded: tracking URIs, MLflow clients, and its errors in one line.

MLflow itself is imported inside functions, because that takes seconds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepfere.errors import DeepfereError, InputError
from deepfere.folders import data_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from deepfere.config import Config

OFF = "none"

_DATABASES = ("postgresql", "mysql", "mssql")
_PROBE_TIMEOUT_S = 10


def default_uri() -> str:
    """Where runs are recorded when nothing is said: an absolute URI.

    ``MLFLOW_TRACKING_URI`` if it is set, else a SQLite file ``deepfere/mlflow.db`` in the user's data
    folder (``XDG_DATA_HOME``, by default ``~/.local/share``).

    Raises:
        InputError: ``MLFLOW_TRACKING_URI`` names a store that MLflow no longer supports.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if given:
        return resolve_uri(given, where="MLFLOW_TRACKING_URI")
    return f"sqlite:///{data_folder() / 'mlflow.db'}"


def resolve_uri(uri: str | None = None, *, where: str = "tracking.uri") -> str:
    """An absolute tracking URI: a Ray worker has another working directory than the driver.

    Args:
        uri: ``sqlite:///FILE`` (a relative file is taken from the working directory), ``http(s)://...``,
            an SQLAlchemy database URI, ``none`` (no tracking), or None for :func:`default_uri`.
        where: What the user gave it by, for the message.

    Raises:
        InputError: It is a folder (``file:``, ``./mlruns``), which MLflow no longer supports as a store, or
            nothing known.
    """
    if uri is None:
        return default_uri()
    remedy = "give sqlite:///FILE.db, http://HOST:PORT or none"
    scheme, _, rest = uri.partition(":")
    scheme = scheme.lower()
    if uri.lower() == OFF:
        return OFF
    if scheme in ("http", "https") or scheme.split("+")[0] in _DATABASES:
        return uri
    if scheme == "sqlite":
        path, question, query = rest.removeprefix("///").partition("?")
        if not rest.startswith("///") or not path or path == ":memory:":
            raise InputError(f"'{uri}' does not name a SQLite file", where=where, remedy=remedy)
        return f"sqlite:///{Path(path).expanduser().resolve()}{question}{query}"
    if scheme == "file" or ":" not in uri:
        raise InputError(f"'{uri}' is a folder, and MLflow no longer keeps runs in folders", where=where, remedy=remedy)
    raise InputError(f"'{redact(uri)}' is not a known kind of tracking store", where=where, remedy=remedy)


def connect(uri: str | None = None, *, create: bool = True) -> MlflowClient:
    """A client of the tracking store and model registry at ``uri``, after checking that it answers.

    Args:
        uri: See :func:`resolve_uri`; ``none`` is refused.
        create: Make a SQLite store that does not exist yet (else refuse it).

    Raises:
        InputError: Nothing answers there, or the file is missing or is no MLflow store.
    """
    uri = resolve_uri(uri)
    if uri == OFF:
        raise InputError("tracking is off", where="tracking.uri", remedy="give a tracking store")
    path = sqlite_path(uri)
    if path is not None and not create and not path.is_file():
        raise InputError("there is no tracking store", where=path, remedy="give tracking.uri")
    mlflow = import_mlflow()
    with mlflow_errors(uri, InputError, remedy="check the store, or give another tracking.uri"):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        probe(uri)
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


def probe(uri: str) -> None:
    """Ask a server for any answer at all; of other stores nothing is asked.

    Raises:
        requests.RequestException: It does not, within seconds (MLflow's own client asks a dead address for minutes).
    """
    if uri.startswith("http"):
        import requests

        requests.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_TIMEOUT_S)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment ``name``; a new one in a SQLite store keeps its artifacts beside the file, absolutely.

    Raises:
        InputError: It was deleted.
    """
    from mlflow.exceptions import MlflowException

    path = sqlite_path(uri)
    # MLflow's default is ./mlruns of whatever process happens to come first.
    location = (path.parent / "mlartifacts").as_uri() if path is not None else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # somebody else was first
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise InputError(
            f"the experiment '{name}' is deleted",
            where=redact(uri),
            remedy=f"restore it (mlflow experiments restore --experiment-id {found.experiment_id}) "
            "or give another name",
        )
    return found.experiment_id


def import_mlflow() -> Any:
    """The mlflow module, quiet: no telemetry, no pip calls, no git look-ups, no chatter on first use.

    Whatever the user has set in the environment stays.
    """
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
        "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)  # one line per database migration otherwise
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one per attempt at a server that is away
    return mlflow


@contextlib.contextmanager
def mlflow_errors(uri: str, kind: type[DeepfereError] = DeepfereError, remedy: str = "") -> Iterator[None]:
    """Turn what MLflow, its database and its network raise into one line that names the store."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, requests.RequestException, OSError) as error:
        message = redact(str(error).strip().splitlines()[0] if str(error).strip() else repr(error))
        if issubclass(kind, InputError):
            raise kind(message, where=redact(uri), remedy=remedy) from error
        raise kind(f"{redact(uri)}: {message}") from error


def redact(uri: str) -> str:
    """The text without the user names and passwords of the URIs in it."""
    return re.sub(r"//[^@/\s]+@", "//***@", uri)


def recorded(config: Config) -> dict[str, Any]:
    """Settings as plain values, as they are saved with what was made with them: without passwords."""
    values = config.resolved()
    if values["tracking"]["uri"] is not None:
        values["tracking"]["uri"] = redact(values["tracking"]["uri"])
    return values


def sqlite_path(uri: str) -> Path | None:
    """The file of an absolute SQLite URI, None for any other."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:") else None


def plain(value: Any) -> Any:
    """The value in JSON's types: numpy scalars and arrays unpacked, anything unknown as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
