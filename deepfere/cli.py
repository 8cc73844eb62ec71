"""The command ``deepfere``: thin; every command calls the library."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from deepfere import __version__
from deepfere.errors import DeepfereError, InputError, SectionFailures

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
CONFIG = click.option("--config", type=click.Path(), help="Settings (YAML that mirrors configs/default.yaml).")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a result of other inputs or settings.")
WORK = click.option("-o", "--out", "out", required=True, type=click.Path(), help="The study's working folder.")


class _Commands(click.Group):
    """Errors in one line: exit 2 where the input is wrong, 1 where something failed."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            super().main(*args, **kwargs)
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.Abort:
            _stopped()
        except click.UsageError as error:
            click.echo(f"error: {error.format_message()} (see {_program(error.ctx)} --help)", err=True)
            sys.exit(2)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except SectionFailures as error:
            for (_, _, one), line in zip(error.found, error.lines, strict=True):
                click.echo(f"{'error' if isinstance(one, InputError) else 'failed'}: {line}", err=True)
            click.echo(f"{error.summary}; the same command again goes on", err=True)
            sys.exit(2 if error.all_input else 1)
        except DeepfereError as error:
            click.echo(f"failed: {' '.join(str(error).split())}; the same command again resumes", err=True)
            sys.exit(1)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            click.echo(f"error: {str(error.filename)[:60]}...: the name is too long; check the path", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            _stopped()
        sys.exit(0)


def _program(context: click.Context | None) -> str:
    return context.command_path if context else "deepfere"


def _stopped() -> None:
    again = "the same command without --overwrite" if "--overwrite" in sys.argv else "the same command again"
    click.echo(f"\nstopped; {again} resumes", err=True)
    sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="deepfere")
def main() -> None:
    """Fuse a stained slide with a mass spectrometry image: every ion, at high resolution.

    \b
    Example:
      deepfere fuse sample.imzML slide.svs -o result.zarr --factor 8
      deepfere report result.zarr
    """
    # A terminated job should unwind (and leave work that resumes) exactly like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@contextmanager
def progress_bar(total_hint: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar per stage on a terminal, one line per stage elsewhere; on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(stage: str, share: float) -> None:
            if stage not in seen:
                seen.add(stage)
                click.echo(f"{total_hint}: {stage}", err=True)

        yield line
        return
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, share: float) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=1.0)
                tasks[stage] = bar.add_task(stage, total=1.0)
            bar.update(tasks[stage], completed=share)

        yield tell


def _targets(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    from deepfere.config import target_list

    if value is None:
        return None
    flag = parameter.opts[0]
    text, where = value, flag
    if os.path.isfile(value):  # noqa: PTH113 - a long list is no possible file name, at which Path.is_file raises
        where = f"{flag} {value}"
        try:
            text = Path(value).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("cannot be read as text", where=where, remedy="give a file with one m/z a line") from error
    remedy = "give 798.54,826.57 or a file with one a line"
    numbers = []
    for part in filter(None, (part.strip() for part in text.replace("\n", ",").split(","))):
        try:
            numbers.append(float(part))
        except ValueError as error:
            raise InputError(f"{part[:40]!r} is not an m/z", where=where, remedy=remedy) from error
    try:
        return target_list(numbers)
    except ValueError as error:
        raise InputError(str(error), where=where, remedy=remedy) from error


def _region(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "all":
        return value
    if not value.isdecimal():
        raise InputError(f"{value!r} is no region", where="--region", remedy="give a number, or all")
    return int(value)


@main.command()
@click.argument("msi", type=click.Path())
@click.argument("slide", type=click.Path(), required=False)
@OVERRIDES
@click.option("-o", "--out", required=True, type=click.Path(), help="Result store to write (a folder, .zarr).")
@click.option("--factor", type=int, help="High-resolution pixels per measured pixel and axis [default: by the data].")
@click.option("--mz", callback=_targets, help="Target m/z: a list 798.54,826.57 or a file with one a line.")
@click.option("--tolerance-ppm", type=float, help="Half-width of an ion's m/z window [default: 5].")
@click.option("--representation", type=click.Choice(["centroid", "profile"]), help="Where the file does not say.")
@click.option("--lock-mass", callback=_targets, help="True m/z of peaks that correct each spectrum's m/z: 798.5410,...")
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
@click.option("--alignment", type=click.Path(), help="Alignment JSON to use as it is.")
@click.option(
    "--landmarks",
    type=click.Path(),
    help="CSV: section_y_um,section_x_um,slide_y_um,slide_x_um; or a flexImaging .mis.",
)
@click.option("--region", callback=_region, help="Of several measured regions: its number (see info), or all.")
@click.option("--no-guide", is_flag=True, help="Without the stain: the baseline of everything.")
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
    from deepfere.pipeline import fuse as run

    if slide is not None and "=" in slide and not os.path.exists(slide):  # noqa: PTH110 - any text, of any length
        overrides, slide = (slide, *overrides), None
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
    from deepfere.evaluation.evaluate import load_evaluation
    from deepfere.evaluation.report import report_identity, write_report
    from deepfere.reconstruction.result import beside

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
    from deepfere.reconstruction.result import beside
    from deepfere.reconstruction.result import open as open_result

    opened = open_result(result)
    path = Path(out) if out else beside(result, ".html")
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
    from deepfere.evaluation.report import write_report
    from deepfere.evaluation.scores_page import write_scores_page
    from deepfere.reconstruction.result import beside
    from deepfere.reconstruction.result import open as open_result

    opened = open_result(result)
    check_json(json_path)
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
        summary, page = run_demo(Path(out), config=config, overrides=overrides, overwrite=overwrite, progress=progress)
    click.echo(summary)
    click.echo(f"report: {page}")


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


if __name__ == "__main__":
    main()
