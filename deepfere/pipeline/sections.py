"""The stages of a study before learning, over all of its sections."""

from __future__ import annotations

from collections.abc import Callable

from deepfere.config import Config
from deepfere.measured.peaks import SharedIons
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.fuse import check_files
from deepfere.pipeline.ions import same_axis, shared_ions
from deepfere.pipeline.job import Job
from deepfere.pipeline.prepare import Prepared, align_stage, ingest_stage, load_alignment, prepared
from deepfere.pipeline.side_by_side import SectionWorker, SideBySide, Together
from deepfere.pipeline.tile import tile_phases
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.rows import Phases
from deepfere.section import Section


class IngestWorker(SectionWorker):
    """Files -> ``measured.zarr``; those that come later are looked at, so that nobody waits for a refusal.

    Args:
        root: The study's folder or URL.
        config: Settings.
        shared: Ions that the sections have in common.
    """

    stage = "ingest"

    def __init__(self, root: str, config: Config, shared: SharedIons | None) -> None:
        super().__init__(root, config)
        self.shared = shared

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        check_files(section, self.config)
        ingest_stage(section, inputs, self.folder, self.config, progress, self.shared)


class AlignWorker(SectionWorker):
    """Slide and measurement -> ``alignment.json``."""

    stage = "align"

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        align_stage(prepared(section, self.folder, self.config), inputs, self.folder, self.config, progress)


def prepare_sections(job: Job, work: Workspace, failures: Failures, progress: Progress) -> list[str]:
    """Ingest, align and tile what the stage needs; a line for every section.

    Raises:
        SectionFailures: Sections failed, and learning needs all of them.
    """
    beside = SideBySide(work, job.config, failures)
    shared = shared_ions(job.sections, job.inputs, work, job.config, progress, failures, beside)
    together = Together(progress, len(job.sections))
    lines: dict[str, str] = {}
    first: Prepared | None = None
    differ = False

    def done(prep: Prepared) -> None:
        nonlocal first, differ
        first = first or prep
        differ = differ or not same_axis(first.measured.mz, prep.measured.mz, prep.measured.tolerance)
        lines[prep.section.name] = _line(job.stage, prep)
        together.end(prep.section.name)

    broken = set(failures.names)
    beside.run(
        (section.name, _phases(job, n, shared, work, beside, together.of(section.name), done))
        for n, section in enumerate(job.sections)
        if section.name not in broken
    )
    if job.depth >= 3:
        failures.stop("the others are prepared, but learning takes all of them: mend or remove these")
    told = [lines[section.name] for section in job.sections if section.name in lines]
    if job.stage in ("ingest", "align", "tile"):
        of_each = {name: work.facts(job.stage, name).get("warnings", []) for name in lines}
        told += [f"{name}: warning: {text}" for name, texts in of_each.items() for text in texts]
    if differ:
        told.append("note: the sections have different ions; train needs one list for all (ingest.mz)")
    return told


def _phases(
    job: Job,
    n: int,
    shared: SharedIons | None,
    work: Workspace,
    beside: SideBySide,
    tell: Progress,
    done: Callable[[Prepared], None],
) -> Phases:
    """One section up to the job's stage, as one job of many."""
    section, inputs, config = job.sections[n], job.inputs[n], job.config
    depth = min(job.depth, 2) if config.guide else 0

    def part(number: int) -> Progress:
        """How far one stage is: told as it is of the only section, else as a part of the whole."""
        if len(job.sections) == 1:
            return tell
        return lambda _, share: tell("prepare", (number + share) / (depth + 1))

    yield from beside.stage(IngestWorker, section, inputs, part(0), shared)
    prep = prepared(section, work, config)
    if depth >= 1:
        part(1)("align", 0.0)
        yield from beside.stage(AlignWorker, section, inputs, part(1))
    if depth >= 2:
        beside.begin(section, "tile")
        part(2)("tile", 0.0)
        yield from tile_phases(prep, inputs, work, config, part(2), _reach(job))
    done(prep)


def _reach(job: Job) -> int | None:
    return job.given.network.settings["depth"] if job.given else None


def _line(stage: str, prep: Prepared) -> str:
    ny, nx = prep.measured.grid.shape_px
    text = f"{prep.section.name}: {len(prep.measured.mz)} ions, {ny} x {nx} pixels"
    if stage == "align":
        evidence = load_alignment(prep.folder).evidence
        text += f"; flip {evidence['flip']}, rotation {evidence['rotation_deg']} degrees, from {evidence['source']}"
    return text
