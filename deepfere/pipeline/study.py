"""The stages as commands on a study: each does what comes before it where that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from deepfere.cluster import one_thread
from deepfere.config import Config, digest, load_config
from deepfere.errors import DeepfereError, InputError, SectionFailures
from deepfere.measured.peaks import SharedIons
from deepfere.measured.raster import plan_raster
from deepfere.measured.regions import find_regions
from deepfere.model.network import network_from_config
from deepfere.pipeline.claim import claim_result
from deepfere.pipeline.deep import check_patches
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.fuse import (
    check_files,
    check_output,
    check_resources,
    identity_of,
    input_digests,
    output,
    with_teaching_points,
)
from deepfere.pipeline.given import GivenModel
from deepfere.pipeline.ions import shared_ions
from deepfere.pipeline.learn import learn_stage, same_ions
from deepfere.pipeline.prepare import Prepared, align_stage, ingest_stage, is_ingested, load_alignment, prepared
from deepfere.pipeline.tile import tile_stage
from deepfere.pipeline.track import Run, tracked
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.pipeline.write import Outcome, reconstruct_stage
from deepfere.places import Place
from deepfere.readers.imzml import read_index
from deepfere.readers.table import is_table, open_table
from deepfere.reconstruction.result import open
from deepfere.section import EACH, Section, Study, load_study, validated
from deepfere.stopping import looking, watched
from deepfere.tiling.plan import check_range

STAGES = ("ingest", "align", "tile", "train", "reconstruct")


def given_model(uri: str, config: Config) -> tuple[GivenModel, dict[str, str]]:
    """Load a registered model (``models:/NAME@ALIAS``, ``models:/NAME/VERSION``).

    Returns:
        The model, and its name and version for the provenance.

    Raises:
        InputError: There is no such model.
    """
    if config.model.tier == "paper":
        raise InputError(
            "a registered model takes the place of training, and the published model is trained anew",
            where="model.tier=paper",
            remedy="leave one of them out",
        )
    from safetensors.torch import load_file

    from deepfere.training.tracking import load_registered

    loaded = load_registered(uri, config.tracking.uri)
    settings = loaded.config
    network = network_from_config(settings["network"])
    network.load_state_dict(load_file(str(loaded.weights_path)))
    network.eval()
    trained = settings["config"]
    model = GivenModel(
        network,
        np.asarray(settings["mz"], np.float64),
        np.asarray(settings["basis"], np.float64),
        np.asarray(settings["noise_sd"], np.float64),
        list(settings["seen"]),
        int(trained["seed"]),
        float(trained["train"]["held_out"]),
        loaded.weights_sha256,
    )
    return model, {"name": loaded.name, "version": str(loaded.version)}


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
    sections = each_region(study_sections(stage, study, settings), study)
    target = output(out)
    check_output(target)
    sections = [with_teaching_points(s) for s in sections]
    inputs = _all_digests(sections, settings)
    given, named = given_model(model, settings) if model else (None, {})
    job = Job(stage, settings, sections, inputs, target, given, named, overwrite)
    finished = stage == "reconstruct" and [job.finished(n) for n in range(len(sections))]
    if finished and all(finished):
        return [f"{s.name}: {open(str(job.result(n)))!r}, finished already" for n, s in enumerate(sections)]
    work = Workspace(target)
    # The folder belongs to these inputs; settings may change from stage to stage (each stage knows its own).
    parts = {s.name: digest([s.model_dump(mode="json"), told]) for s, told in zip(sections, inputs, strict=True)}
    whose = digest(parts)
    work.check(whose, overwrite, parts)
    with work.locked() as check, watched(work.root, settings.run.time_limit_s, check):
        if job.depth >= 2:
            check_resources(settings, settings.guide)
        resumed = work.claim(whose, overwrite, parts=parts)
        failures = Failures(len(sections), work)
        try:
            with work.failures(), one_thread():
                lines = _prepare_all(job, work, failures, progress)
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


@dataclass(frozen=True)
class Job:
    """One stage of a study, with everything that it depends on.

    Attributes:
        stage: One of `STAGES`.
        config: Settings.
        sections: The manifest's sections.
        inputs: Digests of what the user gave, per section.
        target: Working folder.
        given: A registered model in the place of training.
        named: Its name and version.
        overwrite: Replace results of other inputs or settings.
    """

    stage: str
    config: Config
    sections: list[Section]
    inputs: list[dict[str, str]]
    target: Place
    given: GivenModel | None
    named: dict[str, str]
    overwrite: bool

    @property
    def depth(self) -> int:
        """How many stages come before."""
        return STAGES.index(self.stage)

    @cached_property
    def identity(self) -> str:
        """Hash of all inputs and settings."""
        return identity_of(self.sections, self.inputs, self.config)

    def own(self, n: int) -> str:
        """Identity of one section's result: it depends on the whole study."""
        told = [self.inputs[n], {"study": self.identity, "model": str(self.named)}]
        return identity_of([self.sections[n]], told, self.config)

    def result(self, n: int) -> Place:
        """Where one section's result goes."""
        return self.target / "results" / f"{self.sections[n].name}.zarr"

    def finished(self, n: int) -> bool:
        """Whether one section's result stands there and is to stay; refuses another one."""
        return claim_result(self.result(n), self.own(n), self.overwrite)


def _prepare_all(job: Job, work: Workspace, failures: Failures, progress: Progress) -> list[str]:
    """Ingest, align and tile what the stage needs, section by section; memory is that of one."""
    shared = shared_ions(job.sections, job.inputs, work, job.config, progress, failures)
    lines: list[str] = []
    first: Prepared | None = None
    differ = False
    broken = set(failures.names)
    for section, digests in zip(job.sections, job.inputs, strict=True):
        if section.name in broken:
            continue
        prep = _prepare(job, section, digests, shared, work, failures, progress)
        if prep is not None:
            first = first or prep
            differ = differ or not same_ions(first, prep)
            lines.append(_line(job.stage, prep))
    if job.depth >= 3:
        failures.stop("the others are prepared, but learning takes all of them: mend or remove these")
    if differ:
        lines.append("note: the sections have different ions; train needs one list for all (ingest.mz)")
    return lines


def _prepare(
    job: Job,
    section: Section,
    digests: dict[str, str],
    shared: SharedIons | None,
    work: Workspace,
    failures: Failures,
    progress: Progress,
) -> Prepared | None:
    """One section up to the job's stage; None where it failed."""
    config, name = job.config, section.name
    tell = _labelled(progress, name if len(job.sections) > 1 else "")
    made: list[Prepared] = []

    def ingested() -> None:
        check_files(section, config)
        ingest_stage(section, digests, work, config, tell, shared)
        made.append(prepared(section, work, config))

    if not failures.of(name, "ingest", ingested):
        return None
    (prep,) = made
    todo: dict[str, Callable[[], None]] = {}
    if config.guide and job.depth >= 1:
        todo["align"] = partial(align_stage, prep, digests, work, config, tell)
    if config.guide and job.depth >= 2:
        reach = job.given.network.settings["depth"] if job.given else None
        todo["tile"] = partial(tile_stage, prep, digests, work, config, tell, reach)
    return prep if all(failures.of(name, stage, do) for stage, do in todo.items()) else None


def _learn_and_write(job: Job, work: Workspace, failures: Failures, progress: Progress) -> list[str]:
    inputs, config, given = job.inputs, job.config, job.given
    preps = [prepared(section, work, config) for section in job.sections]
    lines: list[str] = []
    with tracked(work, job.sections, inputs, config, job.target.name) as run:
        history = learn_stage(preps, inputs, work, config, progress, f"run-{job.identity[:12]}", given)
        registered = job.named or run.log_learning(preps, inputs, history, work.facts("learn").get("timing", {}))
        if job.stage == "train":
            where = f" (registered as {registered['name']} {registered['version']})" if registered else ""
            return [f"{p.section.name}: fitted{where}" for p in preps]
        for n, prep in enumerate(preps):
            out = job.result(n)
            if not job.finished(n):
                outcome = Outcome(job.own(n), inputs[n], run.describe(), registered, [])
                tell = _labelled(progress, prep.section.name if len(preps) > 1 else "")
                depends = [inputs[n], config.digest(), given.digest if given else None]
                if not failures.of(
                    prep.section.name,
                    "reconstruct",
                    partial(_write, run, prep, out, depends, outcome, work, config, tell),
                ):
                    continue
            lines.append(f"{prep.section.name}: {open(str(out))!r}")
    return lines


def _write(run: Run, *to_write: Any) -> None:
    run.log_result(reconstruct_stage(*to_write))


def _labelled(progress: Progress, name: str) -> Progress:
    return (lambda stage, share: progress(f"{stage} {name}", share)) if name else progress


def _line(stage: str, prep: Prepared) -> str:
    ny, nx = prep.measured.grid.shape_px
    text = f"{prep.section.name}: {len(prep.measured.mz)} ions, {ny} x {nx} pixels"
    if stage == "align":
        evidence = load_alignment(prep.folder).evidence
        text += f"; flip {evidence['flip']}, rotation {evidence['rotation_deg']} degrees, from {evidence['source']}"
    return text
