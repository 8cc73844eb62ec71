"""``deepfere ingest``, ``align``, ``tile``, ``train`` and ``reconstruct``: the stages on a study."""

from __future__ import annotations

import click

from deepfere.cli.options import CONFIG, OVERRIDES, OVERWRITE, WORK
from deepfere.cli.progress import progress_bar
from deepfere.cli.root import main


def _stage(name: str, text: str) -> None:
    """One stage of the pipeline on a study, as a command."""

    @main.command(name, help=f"{text}\n\n\b\nExample:\n  deepfere {name} study.yaml -o work")
    @click.argument("study", type=click.Path())
    @OVERRIDES
    @WORK
    @CONFIG
    @OVERWRITE
    @click.option("--factor", type=int, help="High-resolution pixels per measured pixel and axis.")
    @click.option("--no-guide", is_flag=True, help="Without the stain.")
    def command(
        study: str,
        overrides: tuple[str, ...],
        out: str,
        config: str | None,
        overwrite: bool,
        factor: int | None,
        no_guide: bool,
        model: str | None = None,
    ) -> None:
        from deepfere.pipeline.study import run_stage

        with progress_bar(name) as progress:
            lines = run_stage(
                name,
                study,
                out,
                config=config,
                overrides=overrides,
                factor=factor,
                guide=False if no_guide else None,
                model=model,
                overwrite=overwrite,
                progress=progress,
            )
        for line in lines:
            click.echo(line)

    if name == "reconstruct":
        click.option("--model", help="Registered model instead of training: models:/NAME@ALIAS.")(command)


_stage("ingest", "Read every section's measurement into a cube (imzML to Zarr).")
_stage("align", "Find every section on its slide (ingests first where needed).")
_stage("tile", "Decode every slide once into the patch cache (aligns first where needed).")
_stage("train", "Fit every section and train the joint model (tiles first where needed).")
_stage("reconstruct", "Write every section's result (trains first where needed).")
