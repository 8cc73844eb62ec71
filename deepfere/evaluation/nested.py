"""Held-out R² with nothing fitted on what is left out: not the regression, nor the alignment, nor the factors.

The held-out R² of a result leaves blocks out of the regression, while alignment and factors have seen all pixels. Here
a quarter of the blocks is hidden, four times: factors come from the others, the alignment is refined on them anew
(affine, and a displacement where the result has one), the closed form is fitted on them with its gains, and the hidden
pixels judge. Beside it the same with the result's own alignment and factors: the difference is what those two leak.

The stain is read at an eighth of the measured pixel, which is coarser than in a fit; scores differ a little from those
of the result, but not between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.alignment.bend import plan_knots
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.refine import AFFINE_STAGES, BEND_STAGES, refine
from deepfere.alignment.score import spatial_blocks
from deepfere.config import Config
from deepfere.frame import Alignment, apart_px
from deepfere.measured.factors import Factors, factor_weight, factorise
from deepfere.measured.operator import fill_missing
from deepfere.model import gate as gates
from deepfere.model.detail import COVERED, pooled_window
from deepfere.model.fit import Evidence, evidence
from deepfere.model.guide import GuideSpec
from deepfere.model.ridge import fit_own
from deepfere.model.stain_types import StainTypes
from deepfere.model.transfer import DEFAULT_SMOOTHING_PITCH, SmoothingChoice, choose_smoothing
from deepfere.model.transfer import LEAST_PX as LEAST_CHOICE_PX
from deepfere.pipeline.overview import section_overview
from deepfere.pipeline.workspace import Progress
from deepfere.reconstruction.result import Result
from deepfere.section import Section
from deepfere.tiling.plan import plan_windows

Array = NDArray[np.float64]

FOLDS = 4
LEAST_PX, MOST_PX = 200, 60_000
"""Measured pixels between which it is done: fewer leave nothing to judge by, more take long."""
COARSEST_PITCH = 0.25
"""Pixel size of the overview, in measured pixels, up to which scores are those of a fit to a hundredth."""
POOL_FACTOR = 4
POOL_PX = 64


@dataclass(frozen=True)
class Scene:
    """What all folds share.

    Attributes:
        cube: (M, ny, nx) as measured, 0 where not.
        mask: (ny, nx) measured pixels.
        fold: (ny, nx) fold number of every pixel.
        stain: The slide, small.
        choice: Smoothings of the stain's features, as the result has them.
        types: Its stain types; they were found on the stain alone.
    """

    cube: NDArray[np.float32]
    mask: NDArray[np.bool_]
    fold: NDArray[np.int64]
    stain: StainOverview
    choice: SmoothingChoice
    types: StainTypes | None


def folds_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Fold (ny, nx) of every pixel: 16 blocks, those of a fold never touch."""
    blocks = spatial_blocks(mask, 4)
    return (blocks // 4 + 2 * (blocks % 4)) % FOLDS


def nested_scores(result: Result, config: Config, progress: Progress) -> dict[str, Any] | None:
    """Nested held-out R² of every ion.

    Args:
        result: A finished result; its slide must still be where it was.
        config: Settings of the pipeline.
        progress: Called with ("nested", share).

    Returns:
        ``folds``, ``alignment`` ("refitted", or "given" where it never was found), ``moved_px`` of every fold's
        alignment from the result's, and per ion ``nested_r2`` and ``left_out_r2`` (alignment and factors as they are).
        None without a stain, where there are too few or too many pixels, or where the slide is so large that its
        overview does not show what the fit has seen.
    """
    found, section = result.alignment, result.provenance["section"]
    if found is None or not LEAST_PX <= int(result.mask.sum()) <= MOST_PX:
        return None
    pitch = float(np.mean(result.grid.pitch_um))
    stain, _, mpp_um = section_overview(Section.model_validate(section), config, pitch)
    if max(stain.spacing_um) > max(COARSEST_PITCH * pitch, 2 * max(mpp_um)):
        return None
    unused = result.artefacts()
    if unused is not None:
        stain = stain.without(unused > 0)
    cube = np.nan_to_num(np.stack([result.measured(float(mz)) for mz in result.ions["mz"]]), nan=0.0)
    notes = result.provenance["model"]["notes"]
    common, own = notes.get("smoothing_pitch", DEFAULT_SMOOTHING_PITCH), notes.get("own_smoothing_pitch", [])
    choice = SmoothingChoice(common, float("nan"), float("nan"), own)
    types = StainTypes.from_dict(result.provenance["model"].get("stain_types"))
    scene = Scene(cube, result.mask, folds_of(result.mask), stain, choice, types)
    free = not (section.get("alignment") or section.get("landmarks"))
    (whole,) = factorise([cube], [result.mask], config.model.max_factors)
    plain = problem_at(scene, found, whole, result, result.mask)
    errors, total, moved = np.zeros((2, len(cube))), np.zeros((2, len(cube))), []
    for number in range(FOLDS):
        visible = result.mask & (scene.fold != number)
        (factors,) = factorise([cube], [visible], config.model.max_factors)
        alignment = found
        if free:
            alignment = refitted(scene, found, factors, visible, result)
            moved.append(apart_px(alignment, found, result.grid, result.mask))
        everywhere = projected(factors, cube, result.mask, visible)
        fitted = problem_at(scene, alignment, everywhere, result, visible)
        for side, (problem, basis) in enumerate(((fitted, factors.basis), (plain, whole.basis))):
            left, of = hidden_errors(problem, basis, scene.fold, number)
            errors[side] += left
            total[side] += of  # another alignment may cover other pixels
        progress("nested", (number + 1) / FOLDS)
    r2 = np.where(total > 0, 1.0 - errors / np.where(total > 0, total, 1.0), np.nan)
    return {
        "folds": FOLDS,
        "alignment": "refitted" if free else "given",
        "moved_px": moved,
        "ions": [
            {"mz": float(mz), "nested_r2": float(r2[0, m]), "left_out_r2": float(r2[1, m])}
            for m, mz in enumerate(result.ions["mz"])
        ],
    }


def refitted(scene: Scene, found: Alignment, factors: Factors, visible: NDArray[np.bool_], result: Result) -> Alignment:
    """The alignment as the visible pixels alone have it; it begins at the affine part of the one found."""
    view = MeasuredOverview.build(factors.images, visible, factor_weight(factors), result.grid)
    start = replace(found, displacement=None)
    alignment = refine(view, scene.stain, start, AFFINE_STAGES)
    if found.displacement is None:
        return alignment
    supersample = 4 if visible.sum() <= 4000 else 2
    return refine(view, scene.stain, alignment, BEND_STAGES, supersample, plan_knots(result.grid.shape_px))


def projected(
    factors: Factors, cube: NDArray[np.float32], mask: NDArray[np.bool_], visible: NDArray[np.bool_]
) -> Factors:
    """Factors of some pixels with images of all: noise-weighted least squares on their basis."""
    table = np.asarray(cube[:, mask], np.float64)
    seen = np.asarray(cube[:, visible], np.float64)
    sd = np.maximum(factors.noise_sd, 1e-3 * seen.std(1))
    weight = np.where(sd > 0, 1.0 / np.where(sd > 0, sd, 1.0), 0.0)
    scaled, basis = (table - seen.mean(1)[:, None]) * weight[:, None], factors.basis * weight[:, None]
    images = np.zeros(factors.images.shape)
    images[:, mask] = np.linalg.lstsq(basis, scaled, rcond=None)[0]
    return replace(factors, images=images)


def problem_at(
    scene: Scene, alignment: Alignment, factors: Factors, result: Result, visible: NDArray[np.bool_]
) -> Evidence:
    """The reduced-scale problem of the section at an alignment; visible pixels say which factor has which smoothing."""
    stain, grid, smoothings = scene.stain, result.grid, tuple(sorted(scene.choice.distinct))
    shape, white = stain.planes.shape[1:], stain.reference.white
    spec = GuideSpec(
        grid, POOL_FACTOR, stain.spacing_um, (shape[0], shape[1]), white, scene.choice.smoothing_pitch, scene.types
    )

    def planes_at(r0: int, r1: int, c0: int, c1: int) -> NDArray[np.uint8]:
        return stain.planes[:, r0:r1, c0:c1]

    pooled, cover = np.zeros((0, 0, 0, 0)), np.zeros(grid.shape_px)
    for cells in plan_windows(grid, scene.mask, POOL_PX):
        features, seen = pooled_window(spec, alignment, planes_at, cells, smoothings)
        if not pooled.size:
            pooled = np.zeros((*features.shape[:2], *grid.shape_px))
        at = (slice(cells.i0, cells.i1), slice(cells.j0, cells.j1))
        pooled[(slice(None), slice(None), *at)], cover[at] = features, seen
    covered = cover >= COVERED
    inside = visible & covered
    images, weight = fill_missing(factors.images, scene.mask), factor_weight(factors) ** 2
    if inside.sum() < LEAST_CHOICE_PX:  # of fewer the choice would be a default, not the result's
        choice = replace(scene.choice, own_pitch=())
    else:
        choice = choose_smoothing(pooled, smoothings, inside, spatial_blocks(inside), images, weight)
    return evidence(pooled, smoothings, scene.mask, covered, scene.cube, factors, choice)


def hidden_errors(problem: Evidence, basis: Array, fold: NDArray[np.int64], number: int) -> tuple[Array, Array]:
    """Squared errors (M,) of the ions' detail on one fold's pixels, by a fit on the others; and its squares (M,)."""
    rows = problem.rows
    hidden = fold.ravel()[rows.index] == number
    seen = ~hidden
    part = replace(rows, stain=rows.stain[seen], block=rows.block[seen], index=rows.index[seen], phase=rows.phase[seen])
    fit = fit_own(part, problem.factor_rows[seen], problem.group)
    factor = gates.gains(gates.moments(problem.factor_rows[seen], fit.predicted, part.block), np.eye(basis.shape[1]))
    loadings = basis * np.where(factor.r2 > gates.LEAST_FACTOR_R2, factor.gain, 0.0)
    ion = gates.gains(gates.moments(problem.ion_rows[seen], fit.predicted, part.block), loadings)
    truth = problem.ion_rows[hidden]
    error = truth - (rows.stain[hidden] @ fit.weights) @ (loadings * ion.gain[:, None]).T
    return (error**2).sum(0), (truth**2).sum(0)
