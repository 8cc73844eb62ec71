"""``deepfere fuse`` and ``deepfere demo``: one section, from files to a result."""

from __future__ import annotations

import os
from typing import Any

import click

from deepfere.cli.options import CONFIG, OVERRIDES, OVERWRITE, plain_targets, region, targets
from deepfere.cli.progress import progress_bar
from deepfere.cli.root import main


@main.command()
@click.argument("msi", type=click.Path())
@click.argument("slide", type=click.Path(), required=False)
@OVERRIDES
@click.option("-o", "--out", required=True, type=click.Path(), help="Result store to write (a folder, .zarr).")
@click.option("--factor", type=int, help="High-resolution pixels per measured pixel and axis [default: by the data].")
@click.option("--mz", callback=targets, help="Target m/z: a list 798.54,826.57 or a file (one a line, or a CSV).")
@click.option("--tolerance-ppm", type=float, help="Half-width of an ion's m/z window [default: 5].")
@click.option("--representation", type=click.Choice(["centroid", "profile"]), help="Where the file does not say.")
@click.option(
    "--lock-mass", callback=plain_targets, help="True m/z of peaks that correct each spectrum's m/z: 798.5410,..."
)
@click.option(
    "--normalisation",
    type=click.Choice(["none", "tic", "rms", "median", "reference"]),
    help="Of every pixel [default: none].",
)
@click.option("--reference-mz", type=float, help="An ion that is everywhere: normalise every pixel by it.")
@click.option("--duplicates", type=click.Choice(["error", "sum", "mean"]), help="Several spectra for one pixel.")
@click.option("--pitch-um", help="Measured pixel size, micrometres: 50 or 50,40 (y,x).")
@click.option("--slide-mpp-um", help="Slide pixel size, micrometres per pixel: 0.25 or 0.25,0.25 (y,x).")
@click.option("--slide-backend", type=click.Choice(["auto", "openslide", "tiff"]), help="Reader of the slide.")
@click.option("--slide-icc", type=click.Choice(["none", "srgb"]), help="srgb: convert colours by the slide's profile.")
@click.option("--alignment", type=click.Path(), help="Alignment JSON to use as it is.")
@click.option(
    "--landmarks",
    type=click.Path(),
    help="CSV: section_y_um,section_x_um,slide_y_um,slide_x_um; or a flexImaging .mis.",
)
@click.option("--region", callback=region, help="Of several measured regions: its number (see info), or all.")
@click.option("--slide-region", callback=region, help="Of several pieces on the slide: its number (see info), or all.")
@click.option("--no-guide", is_flag=True, help="Without the stain: the baseline of everything.")
@click.option("--model", help="Registered model instead of training: models:/NAME@ALIAS (with its m/z).")
@CONFIG
@OVERWRITE
def fuse(msi: str, slide: str | None, overrides: tuple[str, ...], out: str, no_guide: bool, **given: Any) -> None:
    """Register and fuse one section: all stages, from files to a result.

    The same command again resumes unfinished work and leaves a finished result as it is.

    \b
    Example:
      deepfere fuse sample.imzML slide.svs -o result.zarr --factor 8
      deepfere fuse sample.imzML -o plain.zarr --no-guide
    """
    from deepfere.evaluation.evaluate import load_evaluation
    from deepfere.evaluation.report import check_page, report_identity, write_report
    from deepfere.pipeline import fuse as run
    from deepfere.pipeline.fuse import check_output, output
    from deepfere.places import beside

    # Of any length: Path.exists may raise. A URL may hold a "=", but none before its "://".
    if slide is not None and "=" in slide.partition("://")[0] and not os.path.exists(slide):  # noqa: PTH110
        overrides, slide = (slide, *overrides), None
    if slide is not None and no_guide:
        click.echo("fuse: --no-guide leaves the slide out", err=True)
    check_output(output(out))
    page = beside(output(out), ".html")
    if page.exists():
        check_page(page)
    worked = False
    with progress_bar("fuse") as bar:

        def progress(stage: str, share: float) -> None:
            nonlocal worked
            worked = True
            bar(stage, share)

        result = run(
            msi, slide, out, guide=False if no_guide else None, overrides=overrides, progress=progress, **given
        )
    if not worked:
        click.echo(f"{out} is finished already: nothing was done")
    report = beside(out, ".html")
    # One may be there that another result, since removed, has left.
    if worked or report_identity(report) != result.provenance["identity"]:
        write_report(result, report, evaluation=load_evaluation(out))
    counts = result.ions["informed"].value_counts().to_dict()
    click.echo(repr(result))
    click.echo(
        f"{counts.get('stain-informed', 0)} ions are informed by the stain, {counts.get('partly', 0)} partly, "
        f"{counts.get('smooth', 0)} are plain interpolation"
        + (f", {counts['not judged']} were not judged" if "not judged" in counts else "")
    )
    for warning in result.provenance["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"report: {report}")


@main.command()
@click.option("-o", "--out", default="demo", type=click.Path(), show_default=True, help="Folder of the demo.")
@CONFIG
@OVERWRITE
@OVERRIDES
def demo(out: str, config: str | None, overwrite: bool, overrides: tuple[str, ...]) -> None:
    """The whole pipeline on a generated section with known truth, with a report; minutes on 2 cores.

    \b
    Example:
      deepfere demo -o demo
    """
    from deepfere.demo import run_demo

    with progress_bar("demo") as progress:
        summary, page = run_demo(out, config=config, overrides=overrides, overwrite=overwrite, progress=progress)
    click.echo(summary)
    click.echo(f"report: {page}")
