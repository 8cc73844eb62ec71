"""What a registry holds: every registered model, its versions, aliases and the scores of the runs that made them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deepfere.errors import InputError
from deepfere.training.mlflow_store import connect, mlflow_errors, redact, resolve_uri
from deepfere.training.registry import SHA256_TAG


@dataclass(frozen=True)
class Version:
    """One registered version.

    Attributes:
        name: Registered name.
        version: Its number.
        aliases: Aliases that point at it, sorted.
        made: When it was registered, ``2026-01-31 12:00`` (UTC).
        run_id: The run that made it.
        status: How that run ended (``FINISHED``, ``KILLED`` ...); empty if it is gone.
        held_out_r2: Median held-out R2 over ions as that run found it, mean over its sections; None if it has none.
        weights_sha256: Digest of the weights; empty if deepfere did not register it.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    made: str
    run_id: str
    status: str
    held_out_r2: float | None
    weights_sha256: str

    @property
    def uri(self) -> str:
        """``models:/NAME/VERSION``."""
        return f"models:/{self.name}/{self.version}"


def registered_versions(name: str | None = None, uri: str | None = None) -> list[Version]:
    """All registered versions, by name and number.

    Args:
        name: Those of one model only.
        uri: The tracking store, see :func:`deepfere.training.mlflow_store.resolve_uri`.

    Raises:
        InputError: There is no such store, or no such model in it.
    """
    from mlflow.exceptions import MlflowException

    where = resolve_uri(uri)
    client = connect(where, create=False)
    out: list[Version] = []
    with mlflow_errors(where):
        page = client.search_registered_models()
        models = list(page)
        while page.token:
            page = client.search_registered_models(page_token=page.token)
            models += page
        if name is not None and name not in {m.name for m in models}:
            known = ", ".join(sorted(m.name for m in models)) or "none"
            raise InputError(f"there is no model '{name}'", where=redact(where), remedy=f"its models are: {known}")
        for model in models:
            if name not in (None, model.name):
                continue
            aliases = client.get_registered_model(model.name).aliases
            quoted = model.name.replace("'", "\\'")
            for version in client.search_model_versions(f"name = '{quoted}'"):
                status, score = "", None
                try:
                    run = client.get_run(version.run_id or "")
                    status = run.info.status
                    score = run.data.metrics.get("held_out_r2_median")
                except MlflowException:
                    pass  # the run was deleted; the model is there
                number = int(version.version)
                out.append(
                    Version(
                        model.name,
                        number,
                        tuple(sorted(a for a, v in aliases.items() if int(v) == number)),
                        time.strftime("%Y-%m-%d %H:%M", time.gmtime(version.creation_timestamp / 1000)),
                        version.run_id or "",
                        status,
                        score,
                        version.tags.get(SHA256_TAG, ""),
                    )
                )
    return sorted(out, key=lambda v: (v.name, v.version))
