"""``deepfere models``: registered models, side by side, and which of them is the one to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from deepfere.cli.options import CONFIG, OVERRIDES, WORK
from deepfere.cli.progress import progress_bar
from deepfere.cli.root import main


@main.group()
def models() -> None:
    """Registered models: list them, compare them on the same held-out blocks, promote one.

    They are looked up in tracking.uri, MLFLOW_TRACKING_URI or your own store.

    \b
    Example:
      deepfere models list
      deepfere models compare models:/deepfere@champion models:/deepfere/7 --study study.yaml -o work
      deepfere models promote deepfere 7
    """


def _store(config: str | None, overrides: tuple[str, ...]) -> str | None:
    from deepfere.config import load_config

    return load_config(config, overrides).tracking.uri


@models.command("list")
@OVERRIDES
@click.option("--name", help="Of one registered model only.")
@CONFIG
def list_(name: str | None, overrides: tuple[str, ...], config: str | None) -> None:
    """Every registered version: its aliases, when it was made, by which run, and that run's held-out score.

    \b
    Example:
      deepfere models list tracking.uri=http://mlflow.example.org:5000
    """
    from deepfere.training.registered import registered_versions

    found = registered_versions(name, _store(config, overrides))
    if not found:
        click.echo("no model is registered")
        return
    rows = [("model", "aliases", "made (UTC)", "held-out R2", "run", "status")]
    for v in found:
        score = "-" if v.held_out_r2 is None else f"{v.held_out_r2:.3f}"
        rows.append((v.uri, ",".join(v.aliases) or "-", v.made, score, v.run_id or "-", v.status or "-"))
    click.echo(_table(rows))


@models.command()
@click.argument("words", nargs=-1, required=True, metavar="MODEL... [KEY=VALUE]...")
@click.option("--study", required=True, type=click.Path(), help="Sections to judge them on.")
@WORK
@CONFIG
@click.option("--factor", type=int, help="As the folder's work was begun.")
def compare(words: tuple[str, ...], study: str, out: str, config: str | None, factor: int | None) -> None:
    """What each model explains of the same held-out blocks of a study's sections.

    Blocks that one of the models was trained on judge none of them. The study is tiled first where needed.

    \b
    Example:
      deepfere models compare models:/deepfere@champion models:/deepfere/7 --study study.yaml -o work
    """
    from deepfere.config import load_config
    from deepfere.pipeline.compare import compare_models
    from deepfere.pipeline.given import given_model
    from deepfere.pipeline.study import run_stage

    uris = [word for word in words if word.startswith(("models:/", "runs:/"))]
    overrides = [word for word in words if word not in uris]
    if not uris:
        raise click.UsageError("no model is named: give models:/NAME@ALIAS or models:/NAME/VERSION")
    settings = load_config(config, overrides, factor=factor)
    for uri in uris:
        given_model(uri, settings)  # before a slide is read for nothing
    with progress_bar("compare") as progress:
        run_stage("tile", study, out, config=config, overrides=overrides, factor=factor, progress=progress)
        scores = compare_models(uris, study, out, settings, progress)
    ions = sum(len(r2) for r2 in scores[0].r2.values())
    rows = [("model", "median R2", f"ions >= 0.10 (of {ions})", *scores[0].r2)]
    for score in scores:
        each = [f"{_median(r2):.3f}" for r2 in score.r2.values()]
        rows.append((score.model, f"{score.median():.3f}", str(score.informed()), *each))
    rows.append(("held-out blocks", "", "", *(str(n) for n in scores[0].blocks.values())))
    click.echo(_table(rows))


def _median(values: Any) -> float:
    import numpy as np

    return float(np.median(values))


@models.command()
@click.argument("name")
@click.argument("version", type=click.IntRange(1))
@OVERRIDES
@click.option("--alias", default="champion", show_default=True, help="The alias to point at it.")
@CONFIG
def promote(name: str, version: int, overrides: tuple[str, ...], alias: str, config: str | None) -> None:
    """Point an alias at a version: models:/NAME@ALIAS is that version from now on.

    \b
    Example:
      deepfere models promote deepfere 7
      deepfere models promote deepfere 7 --alias challenger
    """
    from deepfere.training.registered import registered_versions
    from deepfere.training.registry import promote as point

    store = _store(config, overrides)
    before = [v.version for v in registered_versions(name, store) if alias in v.aliases]
    point(name, version, alias, store)
    was = f" (was version {before[0]})" if before and before[0] != version else ""
    click.echo(f"models:/{name}@{alias} is version {version}{was}")


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
