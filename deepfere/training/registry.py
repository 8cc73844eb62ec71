"""Trained models in MLflow's registry: register, promote, load.

A model is registered as a pyfunc with a signature (:mod:`deepfere.training.pyfunc`), so that plain
``mlflow.pyfunc.load_model("models:/NAME@champion")`` works wherever deepfere is installed, and is read
here without MLflow's loader, as a weights file and a configuration.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepfere.errors import DeepfereError, InputError
from deepfere.folders import cache_folder
from deepfere.training.mlflow_store import OFF, connect, mlflow_errors, plain, redact, resolve_uri

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

    from deepfere.training.tracking import Tracker

# On the version: MLflow's own registry does not keep which logged model a version is.
MODEL_ID_TAG, SHA256_TAG = "deepfere.model_id", "deepfere.weights_sha256"

_FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID/NAME"
_MAX_LISTED = 10


@dataclass(frozen=True)
class ModelInfo:
    """A registered model version.

    Attributes:
        name: Registered name.
        version: Its version, a whole number as text.
        uri: ``models:/NAME/VERSION``, which names these weights for ever.
        model_id: MLflow's id of the logged model.
        weights_sha256: Digest of ``model.safetensors``, hexadecimal.
    """

    name: str
    version: str
    uri: str
    model_id: str
    weights_sha256: str


@dataclass(frozen=True)
class LoadedModel:
    """A model read from the registry.

    Attributes:
        weights_path: Local ``model.safetensors`` (a store on this machine: the stored file itself).
        config: The resolved configuration that it was registered with.
        name: Registered name.
        version: Registered version; empty for a ``runs:/`` model that was never registered.
        run_id: The run that made it.
        weights_sha256: Digest of the weights, checked on loading.
    """

    weights_path: Path
    config: dict[str, Any]
    name: str
    version: str
    run_id: str
    weights_sha256: str

    @property
    def uri(self) -> str:
        """The URI that names these weights for ever, whatever alias they were found by."""
        return f"models:/{self.name}/{self.version}" if self.version else f"runs:/{self.run_id}/{self.name}"


def register_model(
    tracker: Tracker,
    name: str,
    weights: Mapping[str, torch.Tensor] | str | Path,
    config: Mapping[str, Any],
    alias: str | None = None,
) -> ModelInfo:
    """Register the run's model as a pyfunc with a signature; the same weights of a run only once.

    The signature is ``{"stain": (-1, F, -1, -1), "upsampled": (-1, K, -1, -1)}`` float32 to
    (-1, K, -1, -1) float32, F and K being ``config["network"]["features"]`` and ``["factors"]``.

    Args:
        tracker: The run that trained it.
        name: Registered name: letters, digits, space, ``_ . -``.
        weights: The state dict of the network, or a safetensors file of it.
        config: Resolved configuration and geometry; its section ``network`` builds the network.
        alias: Points this alias at the version, e.g. ``champion``.

    Raises:
        InputError: The name cannot be registered, tracking is off, or weights and configuration do not
            belong together.
        DeepfereError: The store failed.
    """
    check_name(name)
    if alias is not None:
        _check_alias(alias)
    if tracker.uri == OFF:
        raise InputError("tracking is off: no model can be registered", remedy="give tracking.uri")
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    from deepfere.training import pyfunc

    client = tracker.client
    with tempfile.TemporaryDirectory() as scratch, mlflow_errors(tracker.uri):
        weights_path = Path(scratch, pyfunc.WEIGHTS_FILE)
        sha256 = pyfunc.write_weights(weights, weights_path)
        version = _same_version(client, name, tracker.run_id, sha256)
        if version is None:
            tags = {SHA256_TAG: sha256}
            model = client.create_logged_model(
                tracker.experiment_id, name=name, source_run_id=tracker.run_id, tags=tags
            )
            folder = Path(scratch, "model")
            try:
                described = Model(
                    artifact_path=model.artifact_location,
                    model_uuid=model.model_id,
                    model_id=model.model_id,
                    run_id=tracker.run_id,
                )
                pyfunc.save_pyfunc(folder, weights_path, plain(config), described)
                client.log_model_artifacts(model.model_id, str(folder))
            except BaseException:
                client.finalize_logged_model(model.model_id, "FAILED")
                raise
            client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(tracker.run_id, [LoggedModelOutput(model.model_id, step=0)])
            version = _create_version(client, name, model, {MODEL_ID_TAG: model.model_id, **tags})
            # What links a model to its version in MLflow's pages; its fluent API writes it, the client not.
            link = json.dumps([{"name": name, "version": version.version}])
            client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
    number = str(version.version)
    return ModelInfo(name, number, f"models:/{name}/{number}", version.tags[MODEL_ID_TAG], sha256)


def promote(name: str, version: str | int, alias: str = "champion", uri: str | None = None) -> None:
    """Point an alias at a registered version; the alias leaves any other version.

    Raises:
        InputError: There is no such model or version, or the alias is one that MLflow reserves.
    """
    _check_alias(alias)
    where = resolve_uri(uri)
    client = connect(where, create=False)
    found = _version(client, where, name, str(version))
    with mlflow_errors(where):
        client.set_registered_model_alias(name, alias, found.version)


def load_registered(model_uri: str, uri: str | None = None) -> LoadedModel:
    """Weights and configuration of a registered model.

    Args:
        model_uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``runs:/RUN_ID/NAME``.
        uri: The tracking store, see :func:`deepfere.training.mlflow_store.resolve_uri`.

    Returns:
        The model, its files on this machine: those of a remote store are downloaded once, into
        ``XDG_CACHE_HOME/deepfere/models`` (by default ``~/.cache``).

    Raises:
        InputError: The URI has another form, or there is no such model, version, alias or run (the
            message says what there is), or it is not a model of deepfere.
        DeepfereError: The store failed, or the weights are not those that were registered.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))|runs:/([0-9a-f]{32})/([^/@]+)", model_uri)
    if match is None:
        raise InputError(f"'{model_uri}' does not name a model", where="--model", remedy=f"give {_FORMS}")
    name, alias, number, run_id, run_model = match.groups()
    where = resolve_uri(uri)
    client = connect(where, create=False)
    if run_id is not None:
        model = _model_of_run(client, where, run_id, run_model)
        name, number = _registered_as(client, where, model)
    else:
        version = _version(client, where, name, number) if number else _aliased(client, where, name, alias)
        number = str(version.version)
        if MODEL_ID_TAG not in version.tags:
            raise _foreign(model_uri, where)
        with mlflow_errors(where):
            model = client.get_logged_model(version.tags[MODEL_ID_TAG])
    sha256 = model.tags.get(SHA256_TAG)
    if sha256 is None:
        raise _foreign(model_uri, where)
    weights_path, config = _files(model, where, sha256)
    return LoadedModel(weights_path, config, name, number, model.source_run_id or "", sha256)


def _foreign(model_uri: str, where: str) -> InputError:
    return InputError(f"{model_uri} was not registered by deepfere", where=redact(where), remedy="give another model")


def check_name(name: str) -> None:
    """Refuse a name that MLflow would not take.

    Raises:
        InputError: It is one.
    """
    if not re.fullmatch(r"[A-Za-z0-9_. -]+", name):
        raise InputError(f"'{name}' cannot be a model's name", remedy="use letters, digits, spaces and _ . - only")


def _check_alias(alias: str) -> None:
    if not re.fullmatch(r"[\w-]{1,255}", alias, flags=re.ASCII) or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise InputError(
            f"'{alias}' cannot be an alias",
            remedy="use letters, digits, _ and - (MLflow keeps `latest` and `v1`, `v2` ... for itself)",
        )


def _same_version(client: MlflowClient, name: str, run_id: str, sha256: str) -> ModelVersion | None:
    """The version that an earlier attempt of this run registered with these weights, if any."""
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return next((v for v in found if v.tags.get(SHA256_TAG) == sha256), None)


def _create_version(client: MlflowClient, name: str, model: LoggedModel, tags: dict[str, str]) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # The location and not models:/ID: a SQLite registry resolves the latter in the process's global
    # tracking store, which may be another one.
    return client.create_model_version(
        name,
        source=model.artifact_location,
        run_id=model.source_run_id,
        tags=tags,
        model_id=model.model_id,
    )


def _version(client: MlflowClient, where: str, name: str, number: str) -> ModelVersion:
    _check_registered(client, where, name)
    with mlflow_errors(where):
        found = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    if number not in found:
        raise InputError(
            f"the model '{name}' has no version {number}",
            where=redact(where),
            remedy=f"its versions are: {_listed(sorted(found, key=int))}",
        )
    return found[number]


def _aliased(client: MlflowClient, where: str, name: str, alias: str) -> ModelVersion:
    _check_registered(client, where, name)
    with mlflow_errors(where):
        aliases = client.get_registered_model(name).aliases
        if alias in aliases:
            return client.get_model_version(name, aliases[alias])
        versions = client.search_model_versions(f"name = '{name}'")
    known = [f"{a} (version {v})" for a, v in sorted(aliases.items())]
    numbers = sorted((str(v.version) for v in versions), key=int)
    raise InputError(
        f"the model '{name}' has no alias '{alias}'",
        where=redact(where),
        remedy=f"its aliases are: {_listed(known)}; its versions are: {_listed(numbers)}",
    )


def _check_registered(client: MlflowClient, where: str, name: str) -> None:
    with mlflow_errors(where):
        names = sorted(m.name for m in client.search_registered_models())
        # A registry may hold more names than one page: ask for this one, too.
        if name in names or (_is_name(name) and client.search_registered_models(f"name = '{name}'")):
            return
    raise InputError(f"there is no model '{name}'", where=redact(where), remedy=f"its models are: {_listed(names)}")


def _is_name(name: str) -> bool:
    return "'" not in name


def _model_of_run(client: MlflowClient, where: str, run_id: str, name: str) -> LoggedModel:
    """The newest model called ``name`` that the run made."""
    with mlflow_errors(where, InputError, remedy="give a run of this store"):
        run = client.get_run(run_id)
    with mlflow_errors(where):
        outputs = run.outputs.model_outputs if run.outputs else []
        models = [client.get_logged_model(output.model_id) for output in outputs]
    named = [m for m in models if m.name == name]
    if not named:
        raise InputError(
            f"the run {run_id} made no model '{name}'",
            where=redact(where),
            remedy=f"its models are: {_listed(sorted({m.name for m in models}))}",
        )
    return max(named, key=lambda m: m.creation_timestamp)


def _registered_as(client: MlflowClient, where: str, model: LoggedModel) -> tuple[str, str]:
    """Registered name and version of a run's model; its own name and no version if there is none."""
    with mlflow_errors(where):
        versions = client.search_model_versions(f"run_id = '{model.source_run_id}'")
    same = [v for v in versions if v.tags.get(MODEL_ID_TAG) == model.model_id]
    return (same[0].name, str(same[0].version)) if same else (model.name, "")


def _files(model: LoggedModel, where: str, sha256: str) -> tuple[Path, dict[str, Any]]:
    """Local weights file and configuration of a logged model, downloaded if need be, and checked."""
    from mlflow.artifacts import download_artifacts

    from deepfere.training.pyfunc import CONFIG_FILE, WEIGHTS_FILE, file_sha256

    source = f"{model.artifact_location.rstrip('/')}/artifacts"
    with mlflow_errors(where):
        if source.startswith(("file:", "/")):
            folder = Path(download_artifacts(source, tracking_uri=where))
        else:
            folder = _cache_folder() / model.model_id
            if not folder.is_dir():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                    fetched = download_artifacts(source, dst_path=scratch, tracking_uri=where)
                    _rename_into_place(Path(fetched), folder)
    weights_path = folder / WEIGHTS_FILE
    if not weights_path.is_file() or file_sha256(weights_path) != sha256:
        if folder.parent == _cache_folder():
            shutil.rmtree(folder)  # the next attempt downloads again
        raise DeepfereError(f"{weights_path}: the weights are not those that were registered")
    return weights_path, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def _rename_into_place(fetched: Path, folder: Path) -> None:
    try:
        fetched.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same files
            raise


def _cache_folder() -> Path:
    return cache_folder() / "models"


def _listed(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - _MAX_LISTED} more" if len(known) > _MAX_LISTED else ""
    return ", ".join(known[:_MAX_LISTED]) + more if known else "none"
