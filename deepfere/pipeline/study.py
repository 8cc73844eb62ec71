"""The stages as commands on a study: each does what comes before it where that is missing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

from deepfere.cluster import connect, one_thread
from deepfere.config import Config, digest, load_config
from deepfere.errors import DeepfereError, InputError, SectionFailures
from deepfere.measured.raster import plan_raster
from deepfere.measured.regions import find_regions
from deepfere.pipeline.deep import check_patches
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.fuse import (
    check_apart,
    check_output,
    check_resources,
    input_digests,
    output,
    per_gpu,
    with_teaching_points,
)
from deepfere.pipeline.given import given_model
from deepfere.pipeline.job import Job
from deepfere.pipeline.learn import learn_stage
from deepfere.pipeline.overview import section_slide
from deepfere.pipeline.prepare import is_ingested, prepared
from deepfere.pipeline.seal import Outcome
from deepfere.pipeline.sections import prepare_sections
from deepfere.pipeline.side_by_side import Together
from deepfere.pipeline.track import Run, is_open, tracked
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.pipeline.write import reconstruct_phases
from deepfere.readers.imzml import read_index
from deepfere.readers.table import is_table, open_table
from deepfere.reconstruction.result import Result, open
from deepfere.rows import Phases
from deepfere.schedule import pool, run_jobs
from deepfere.section import EACH, PLACED, Section, Study, load_study, validated
from deepfere.stopping import looking, watched
from deepfere.tiling.pieces import find_pieces
from deepfere.tiling.plan import check_range


def each_region(sections: list[Section], study: str | Path) -> list[Section]:
    """The sections, those of ``region: each`` replaced by one for every region of their measurement.

    Raises:
        InputError: A measurement cannot be read, or is ingested already; a name comes twice.
    """
    out: list[Section] = []
    for section in sections:
        if section.region != EACH:
            out.append(section)
            continue
        if is_ingested(section.msi):
            raise InputError(
                f"section {section.name}: {section.msi} is ingested: its region was settled then",
                where=study,
                remedy="leave region out, or give what it was ingested from",
            )
        source = open_table(section.msi) if is_table(section.msi) else read_index(section.msi)
        raster = plan_raster(source, "sum")
        _, regions = find_regions(raster.mask)
        if len(regions) == 1:
            out.append(section.model_copy(update={"region": None}))
        else:
            out += [
                section.model_copy(update={"name": f"{section.name}-{r.number}", "region": r.number}) for r in regions
            ]
    return validated(Study, {"sections": out}, study).sections


def each_piece(sections: list[Section], study: str | Path, config: Config) -> list[Section]:
    """The sections, those of ``slide_region: each`` replaced by one for every piece of tissue on their slide.

    Without the stain they are one section each.

    Raises:
        InputError: A slide cannot be read, or shows no tissue; teaching points place the section; a name comes twice.
    """
    out: list[Section] = []
    for section in sections:
        if section.slide_region != EACH:
            out.append(section)
            continue
        numbers: list[int] = []
        if section.slide is not None:
            if with_teaching_points(section).landmarks is not None:
                raise InputError(
                    f"section {section.name}: {PLACED}", where=study, remedy="leave slide_region out, or give a number"
                )
            with closing(section_slide(section, config)) as slide:
                numbers = [piece.number for piece in find_pieces(slide).pieces]
            if not numbers:
                raise InputError(
                    "shows no piece of tissue", where=section.slide, remedy="give the slide of this section"
                )
        if len(numbers) < 2:
            out.append(section.model_copy(update={"slide_region": None}))
        else:
            out += [section.model_copy(update={"name": f"{section.name}-{n}", "slide_region": n}) for n in numbers]
    return validated(Study, {"sections": out}, study).sections


def study_sections(stage: str, study: str | Path, config: Config) -> list[Section]:
    """The sections of a manifest as a stage needs them, each with a slide or none; no file of theirs is read.

    Raises:
        InputError: The manifest is wrong, a slide is missing, or the stage needs one.
    """
    if stage in ("align", "tile") and not config.guide:
        raise InputError(f"{stage} needs the stain", where="--no-guide", remedy="leave it out")
    sections = load_study(study).sections
    if not config.guide:
        return [s.model_copy(update={"slide": None}) for s in sections]
    bare = [s.name for s in sections if s.slide is None]
    if bare:
        raise InputError(f"no slide for {', '.join(bare)}", where=study, remedy="give slide, or --no-guide")
    return sections


def run_stage(
    stage: str,
    study: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    factor: int | None = None,
    guide: bool | None = None,
    model: str | None = None,
    overwrite: bool = False,
    progress: Progress,
) -> list[str]:
    """Run a study up to and including one stage; what is done already is not done again.

    Args:
        stage: One of `STAGES`.
        study: Manifest, YAML or CSV.
        out: Working folder or its URL (``s3://BUCKET/NAME``); results go to ``OUT/results/NAME.zarr``.
        config: Settings file.
        overrides: ``section.key=value`` strings.
        factor: High-resolution pixels per measured pixel and axis.
        guide: False works without the stain.
        model: Registered model instead of training.
        overwrite: Replace results of other inputs or settings.
        progress: Called with (stage and section, share).

    Returns:
        One line per section on what there is now.

    Raises:
        InputError: The input is wrong.
        SectionFailures: Sections failed; the others are done, as far as they can be without these.
    """
    settings = load_config(config, overrides, factor=factor, guide=guide)
    progress = looking(progress)
    check_range(settings.factor)
    check_patches(settings)
    sections = each_piece(each_region(study_sections(stage, study, settings), study), study, settings)
    target = output(out)
    check_apart(target, sections)
    check_output(target)
    sections = [with_teaching_points(s) for s in sections]
    inputs = _all_digests(sections, settings)
    given, named = given_model(model, settings) if model else (None, {})
    job = Job(stage, settings, sections, inputs, target, given, named, overwrite)
    work = Workspace(target)
    finished = stage == "reconstruct" and [job.finished(n) for n in range(len(sections))]
    # Where its run in MLflow has not been told of all results, that is still to do.
    if finished and all(finished) and not is_open(work, inputs, settings):
        return [f"{s.name}: {open(str(job.result(n)))!r}, finished already" for n, s in enumerate(sections)]
    # The folder belongs to these inputs; settings may change from stage to stage (each stage knows its own).
    parts = {s.name: digest([s.model_dump(mode="json"), told]) for s, told in zip(sections, inputs, strict=True)}
    whose = digest(parts)
    work.check(whose, overwrite, parts)
    with work.locked() as check, watched(work.root, settings.run.time_limit_s, check):
        if job.depth >= 2:
            check_resources(settings, settings.guide, stage == "reconstruct")
        elif settings.guide and len(sections) > 1:
            connect(settings.ray)
        resumed = work.claim(whose, overwrite, parts=parts)
        failures = Failures([s.name for s in sections], work)
        try:
            with work.failures(), one_thread(settings.ray):
                with pool("prepare"):
                    lines = prepare_sections(job, work, failures, progress)
                if job.depth >= 3:
                    lines = _learn_and_write(job, work, failures, progress)
                failures.stop()
                work.note_failed([])
                return lines
        except (InputError, SectionFailures) as error:
            # Refused, and nothing was done: leave nothing behind that this call made.
            if not resumed and (isinstance(error, InputError) or error.all_input) and not work.has_begun():
                work.remove()
            elif isinstance(error, SectionFailures) or len(sections) == 1:
                # What the manifest says of them may change now.
                work.note_failed(failures.names or [sections[0].name])
            raise


def _all_digests(sections: list[Section], config: Config) -> list[dict[str, str]]:
    """Digests of what the user gave for every section; all that is missing is told at once.

    Raises:
        InputError: A file of the only section is missing or cannot be read.
        SectionFailures: Files of some of several are.
    """
    out: list[dict[str, str]] = []
    missing: list[tuple[str, str, DeepfereError]] = []
    for section in sections:
        try:
            out.append(input_digests(section, config))
        except InputError as error:
            if len(sections) == 1:
                raise
            missing.append((section.name, "input", error))
    if missing:
        raise SectionFailures(missing, len(sections), "nothing was begun")
    return out


def _learn_and_write(job: Job, work: Workspace, failures: Failures, progress: Progress) -> list[str]:
    with tracked(work, job.sections, job.inputs, job.config, job.target.name) as run:
        registered = _learn(job, work, run, failures, progress)
        if job.stage == "train":
            where = f" (registered as {registered['name']} {registered['version']})" if registered else ""
            return [f"{section.name}: fitted{where}" for section in job.sections]
        tell = Together(progress, len(job.sections))
        sections = ((s.name, _write(job, n, work, run, registered, tell)) for n, s in enumerate(job.sections))
        run_jobs(
            sections,
            title="reconstruct",
            here=not job.config.guide,
            per_gpu=per_gpu(job.config),
            failed=partial(_failed, failures, run),
        )
    broken = set(failures.names)
    return [f"{s.name}: {open(str(job.result(n)))!r}" for n, s in enumerate(job.sections) if s.name not in broken]


def _learn(job: Job, work: Workspace, run: Run, failures: Failures, progress: Progress) -> dict[str, str]:
    """All sections together; name and version of the model that is registered, or was given."""
    name = f"run-{job.identity[:12]}"
    history = learn_stage(
        job.sections, job.inputs, work, job.config, progress, name, failures, job.given, run.recording
    )
    return job.named or run.log_learning(history)


def _write(job: Job, n: int, work: Workspace, run: Run, registered: dict[str, str], tell: Together) -> Phases:
    """One section, from level 0 to the result in its place."""
    section, out = job.sections[n], job.result(n)
    if job.finished(n):
        if run.lacks_result(section.name):
            run.log_result(Result(str(out)), section.name)
    else:
        outcome = Outcome(job.own(n), job.inputs[n], run.describe(), registered, [])
        depends = [job.inputs[n], job.config.digest(), job.given.digest if job.given else None]
        prep = prepared(section, work, job.config)
        yield from reconstruct_phases(prep, out, depends, outcome, work, job.config, tell.of(section.name))
        run.log_result(Result(str(out)), section.name)
    tell.end(section.name)


def _failed(failures: Failures, run: Run, name: str, error: Exception) -> None:
    def fail() -> None:
        raise error

    failures.of(name, "reconstruct", fail)
    run.section_failed(name)
