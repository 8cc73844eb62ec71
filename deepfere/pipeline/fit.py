"""One section's share of learning: its ions' moments, its closed form, and what training takes of both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.config import Config
from deepfere.errors import InputError
from deepfere.measured.factors import Factoring, Factors, Moments
from deepfere.measured.operator import fill_missing
from deepfere.measured.tolerance import Tolerance
from deepfere.model.features import FEATURES
from deepfere.model.fit import RATIO, fit_t1, gate_ions
from deepfere.model.fit import Evidence as Problem
from deepfere.model.guide import GuideSpec
from deepfere.model.ridge import RidgeFit, detail_rows, fit_average
from deepfere.model.transfer import SmoothingChoice
from deepfere.pipeline.choose import section_problem
from deepfere.pipeline.given import GivenModel, given_factoring
from deepfere.pipeline.ions import same_axis
from deepfere.pipeline.prepare import Prepared, load_alignment, prepared
from deepfere.pipeline.side_by_side import SectionWorker
from deepfere.pipeline.tile import FEW, load_plan, pool, smoothings_pitch
from deepfere.pipeline.types import typed_spec
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.places import reading, writing
from deepfere.schedule import run_phase
from deepfere.section import Section
from deepfere.tiling.patches import PatchSource
from deepfere.tiling.plan import plan_patches
from deepfere.training.loop import SectionTask


@dataclass(frozen=True)
class Fitted:
    """A section with its closed form.

    Attributes:
        prep: The section.
        cube: (M, ny, nx) ions.
        factors: Its factors.
        problem: Its reduced-scale problem, at the smoothing that was chosen, stain types among the features.
        guide: The stain as the model sees it.
        closed: The closed form, and its null guides' held-out predictions.
    """

    prep: Prepared
    cube: NDArray[np.float32]
    factors: Factors
    problem: Problem
    guide: GuideSpec
    closed: tuple[RidgeFit, list[NDArray[np.float32]]]


class MomentsWorker(SectionWorker):
    """What the study's factors need to know of a section -> ``moments.npz``."""

    stage = "learn"

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        made = self.folder.facts("ingest", section.name).get("fingerprint")
        with self.folder.stage("moments", [made, self.config.ingest.normalisation], section.name) as facts:
            if facts is None:
                return
            prep = prepared(section, self.folder, self.config)
            found, measured = Moments.of(prep.cube(self.config), prep.measured.mask), prep.measured
            with writing(prep.folder.moments) as path:
                width = measured.tolerance
                np.savez(path, **vars(found), mz=measured.mz, tolerance_ppm=width.ppm, tolerance_da=width.da)


def study_factoring(sections: list[Section], work: Workspace, most: int) -> Factoring:
    """How the ions of all sections become their factors; one section's moments are held at a time.

    Args:
        sections: Of the study, their moments taken.
        work: Unfinished work.
        most: Factors at most.

    Raises:
        InputError: The sections do not share their ions.
    """
    first: NDArray[np.float64] | None = None

    def moments(section: Section) -> Moments:
        nonlocal first
        found, mz, tolerance = load_moments(work, section)
        first = mz if first is None else first
        if not same_axis(first, mz, tolerance):
            raise InputError(
                f"section {section.name} has other ions than {sections[0].name}",
                where=section.msi,
                remedy="ingest the study with one target list (ingest.mz, or --mz)",
            )
        return found

    return Factoring.of(Moments.sum(moments(section) for section in sections), most)


def load_moments(work: Workspace, section: Section) -> tuple[Moments, NDArray[np.float64], Tolerance]:
    """A section's moments, its m/z and their tolerance."""
    with reading(work.section(section.name).moments) as path, np.load(path) as data:
        found = Moments(int(data["pixels"]), data["mean"], data["products"], data["noise_sd"])
        return found, data["mz"], Tolerance(data["tolerance_ppm"], data["tolerance_da"])


def section_factors(prep: Prepared, cube: NDArray[np.float32], work: Workspace, given: GivenModel | None) -> Factors:
    """A section's images of the study's factors, or of a registered model's."""
    if given is not None:
        found, mz, tolerance = load_moments(work, prep.section)
        factoring = given_factoring(given, found, mz, tolerance, prep.section.msi)
    else:
        with reading(work.factoring) as path:
            factoring = Factoring.load(path)
    return factoring.factors(cube, prep.measured.mask)


def fitted(
    prep: Prepared,
    work: Workspace,
    config: Config,
    given: GivenModel | None,
    spread: bool,
    choice: SmoothingChoice | None = None,
) -> Fitted:
    """The closed form of a section.

    Args:
        prep: The section, tiled.
        work: Unfinished work, the factors in it.
        config: Settings.
        given: A registered model in the place of training.
        spread: The workers of a pool may be asked for help: this is none of them.
        choice: Smoothing; None lets the data choose.
    """
    cube = prep.cube(config)
    factors = section_factors(prep, cube, work, given)
    problem = section_problem(prep, cube, factors, prep.folder.pooled, smoothings_pitch(config), choice)
    alignment = load_alignment(prep.folder)
    guide = typed_spec(prep, problem, alignment, config.seed)
    if guide.types is not None:
        kept = problem.choice.distinct
        averages = pool(prep, guide, alignment, lambda *_: None, prep.folder.pooled_typed, kept)
        run_phase(averages, inline_up_to=FEW if spread else averages.count)
        problem = section_problem(prep, cube, factors, prep.folder.pooled_typed, kept, problem.choice)
    return Fitted(prep, cube, factors, problem, guide, fit_t1(problem, config.model.null_guides, config.seed))


class FitWorker(SectionWorker):
    """The closed form, and what training needs of the section: ``training.npz``, the rest as facts of the stage.

    Args:
        root: The study's folder or URL.
        config: Settings.
        study: What all of the study's learning depends on.
        kept: Of the only section of a study: keeps its closed form for the next stage.
    """

    stage = "learn"

    def __init__(self, root: str, config: Config, study: str, kept: dict[str, Fitted] | None) -> None:
        super().__init__(root, config)
        self.study, self.kept = study, kept

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        with self.folder.stage("fit", self.study, section.name) as facts:
            if facts is None:
                return
            prep = prepared(section, self.folder, self.config)
            fit = fitted(prep, self.folder, self.config, None, spread=self.kept is not None)
            facts |= _for_training(fit, self.config)
            if self.kept is not None:
                self.kept[section.name] = fit
        progress("learn", 0.1)


def context_px(depth: int) -> int:
    """Measured pixels around a patch's core: Wald at ratio 4 loses as many.

    The network's receptive field, the alignment to coarse cells and one cell of projection.
    """
    return 2**depth - 1 + 4


def held_out_blocks(problem: Problem, share: float, seed: int) -> NDArray[np.bool_]:
    """Spatial blocks (by number) that training never sees, spread over the section."""
    names = np.unique(problem.blocks[problem.mask])
    count = min(len(names), max(2, round(share * len(names))))
    rng = np.random.default_rng([seed, 2])
    return np.isin(np.arange(problem.blocks.max() + 1), rng.choice(names, count, replace=False))


def _for_training(fit: Fitted, config: Config) -> dict[str, Any]:
    """What the driver needs to know of a section, as plain values; its images go to ``training.npz``."""
    prep, problem, train = fit.prep, fit.problem, config.train
    alignment = load_alignment(prep.folder)
    spec = replace(load_plan(prep.folder), smoothing_pitch=problem.choice.smoothing_pitch)
    features = problem.features[: len(FEATURES)]
    gate, _ = gate_ions(problem, fit.factors.basis, fit.closed[0].predicted, fit.closed[1])
    # The network starts from what is linear in the stain alone, and finds its own way to bend.
    plain = detail_rows(features, problem.mask, problem.blocks, RATIO)
    start = fit_average(plain, problem.factor_rows).weights
    weight = problem.mask & ~held_out_blocks(problem, train.held_out, config.seed)[problem.blocks]
    arrays = prep.folder.root / "training.npz"
    with writing(arrays) as path:
        np.savez(
            path,
            factors=fill_missing(fit.factors.images, prep.measured.mask).astype(np.float32),
            pooled=features.astype(np.float32),
            weight=weight.astype(np.float32),
        )
    context = context_px(config.model.depth)
    source = PatchSource(
        str(prep.folder.planes),
        str(arrays),
        spec.to_dict(),
        alignment.to_dict(),
        plan_patches(prep.measured.grid, problem.mask, train.patch_px, context).tolist(),
        context,
        2**config.model.depth - 1,
        2 + int(0.5 * max(prep.measured.grid.pitch_um) / min(spec.spacing_um)),
    )
    # Factors that are not used at the network's smoothing teach it nothing.
    taught = gate.gate * (problem.group == 0)
    task = SectionTask(spec.to_dict(), alignment.to_dict(), taught.tolist(), start.tolist())
    rows = features[:, problem.mask].T
    return {
        "choice": asdict(problem.choice),
        "covered_px": int(problem.mask.sum()),
        "feature_mean": rows.mean(0).tolist(),
        "feature_sd": rows.std(0).tolist(),
        "task": asdict(task),
        "source": asdict(source),
    }
