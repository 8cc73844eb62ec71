"""``deepfere info`` and ``deepfere doctor``: what is this, and is this machine fit."""

from __future__ import annotations

import sys

import click

from deepfere.cli.root import main


@main.command()
@click.argument("path", type=click.Path())
def info(path: str) -> None:
    """What is this file, slide, store or result; which regions does it hold; is it whole.

    \b
    Example:
      deepfere info sample.imzML
    """
    from deepfere.inspect import describe, render

    click.echo(render(describe(path)))


@main.command()
@click.option("--ray-address", help="Check this cluster instead of a local session.")
def doctor(ray_address: str | None) -> None:
    """Is this machine (or cluster) fit: codecs, GPU, storage, versions, Ray, MLflow.

    \b
    Example:
      deepfere doctor
    """
    from deepfere.doctor import diagnose, render

    checks = diagnose(ray_address)
    click.echo(render(checks))
    if any(check.status == "fail" for check in checks):
        sys.exit(1)
