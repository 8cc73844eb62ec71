"""``deepfere report`` and ``deepfere evaluate``: what a result says, and how good it is."""

from __future__ import annotations

from typing import Any

import click

from deepfere.cli.options import CONFIG, OVERRIDES
from deepfere.cli.progress import progress_bar
from deepfere.cli.root import main


@main.command()
@click.argument("result", type=click.Path())
@click.option("-o", "--out", type=click.Path(), help="HTML file [default: beside the result].")
def report(result: str, out: str | None) -> None:
    """Write the report of a result: one HTML file with everything in it.

    \b
    Example:
      deepfere report result.zarr -o result.html
    """
    from deepfere.evaluation.evaluate import load_evaluation
    from deepfere.evaluation.report import write_report
    from deepfere.places import beside, place
    from deepfere.reconstruction.result import open as open_result

    opened = open_result(result)
    path = place(out) if out else beside(result, ".html")
    click.echo(f"report: {write_report(opened, path, evaluation=load_evaluation(result))}")


@main.command()
@click.argument("result", type=click.Path())
@OVERRIDES
@click.option(
    "--ratio", "ratios", type=int, multiple=True, help="Reduced-scale ratios [default: 2, 4, 8; none with --labels]."
)
@click.option("--labels", type=click.Path(), help="Tissue labels (.npy, .png, .tif) to compare borders with.")
@click.option("--against", multiple=True, metavar="NAME=RESULT", help="Another result to compare with the labels.")
@click.option("--json", "json_path", type=click.Path(), help="Write all scores as JSON here too; - prints them.")
@CONFIG
def evaluate(
    result: str,
    overrides: tuple[str, ...],
    ratios: tuple[int, ...],
    labels: str | None,
    against: tuple[str, ...],
    json_path: str | None,
    config: str | None,
) -> None:
    """Score a result's pipeline at reduced scale (Wald), and its images against tissue labels.

    At reduced scale the measurement itself is the truth: it is degraded, the whole pipeline runs on it blind, and its
    output is compared with what was measured; beside it bicubic and the run without the stain. Settings are the
    result's own; those that are given here replace theirs.

    With labels, the images of every method are segmented by one rule and their borders are compared; nothing runs
    again. The scores go beside the result (RESULT.evaluation.json, and .evaluation.html for every ion) and into the
    report, and those of an earlier call stay.

    \b
    Example:
      deepfere evaluate result.zarr --ratio 2 --ratio 4
      deepfere evaluate result.zarr --labels labels.png
    """
    from deepfere.evaluation.evaluate import (
        check_json,
        evaluate_labels,
        evaluate_result,
        load_evaluation,
        render,
        write_scores,
    )
    from deepfere.evaluation.report import check_page, write_report
    from deepfere.evaluation.scores_page import write_scores_page
    from deepfere.places import beside
    from deepfere.reconstruction.result import open as open_result

    opened = open_result(result)
    check_json(json_path)
    check_page(beside(result, ".html"))
    if against and labels is None:
        raise click.UsageError("--against compares with labels: give --labels too")
    if labels is not None and not ratios and (config is not None or overrides):
        raise click.UsageError("settings change nothing where only labels are compared: give --ratio too")
    scores: dict[str, Any] = {}
    with progress_bar("evaluate") as progress:
        if labels is not None:
            scores |= evaluate_labels(opened, labels, against=against, progress=progress)
        if ratios or labels is None:
            ratios = ratios or (2, 4, 8)
            scores |= evaluate_result(opened, ratios=ratios, config=config, overrides=overrides, progress=progress)
    known, report = load_evaluation(result) or {}, beside(result, ".html")
    pages = [write_scores_page(opened, known, report)] if "wald" in known else []
    pages.append(write_report(opened, report, evaluation=known))
    if json_path is not None:
        write_scores(json_path, scores)
    if json_path != "-":
        click.echo(render(scores))
        click.echo("\n".join(f"report: {page}" for page in pages))
