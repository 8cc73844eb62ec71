"""The oracles: the closed form's own regressors, and its stain features alone, regressed on the truth.

They say how much of what the measurement lost these could give back if their weights were known: a
ceiling for a closed form at this alignment (in-sample, so slightly too high), not for every method.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from cases import Case, repeat
from numpy.typing import NDArray

from deepfere.frame import Alignment
from deepfere.measured.factors import factorise
from deepfere.measured.operator import cell_means, expand, fill_missing, null_space, pad_edge, spline_coefficients
from deepfere.model.decode import IonDecoder
from deepfere.model.detail import COVERED
from deepfere.model.features import FEATURES
from deepfere.model.guide import Cells, GuideSpec, features_of
from deepfere.model.ridge import DENSITIES, LEADING, with_products
from deepfere.model.stain_types import StainTypes
from deepfere.model.transfer import SmoothingChoice
from deepfere.pipeline.overview import stain_overview
from deepfere.pipeline.tile import reach_um
from deepfere.readers.slide import Reading, open_slide
from deepfere.reconstruction.result import Result
from deepfere.tiling.cache import CacheSpec, compute_shard
from deepfere.tiling.plan import needed_shards, plan_planes

PENALTY = 1e-6
"""Ridge penalty as a share of the rows, on features of unit variance: only against exact collinearity."""


def smoothings(result: Result) -> tuple[float, ...]:
    """Of the result's features, in measured pixels, the common one first."""
    notes = result.provenance["model"]["notes"]
    return SmoothingChoice(float(notes["smoothing_pitch"]), 0.0, 0.0, notes["own_smoothing_pitch"]).distinct


def stain_features(case: Case, result: Result, alignment: Alignment) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features (S F, H, W) at the result's smoothings, its types' shares among them, and cover (H, W)."""
    slide = open_slide(str(case.slide), None if case.slide_mpp_um is None else (case.slide_mpp_um,) * 2)
    grid, f = result.grid, result.factor
    overview, _ = stain_overview(slide, float(np.mean(grid.pitch_um)))
    planes = plan_planes(slide.shape_px, slide.mpp_um, grid.refine(f).pitch_um)
    first, *more = smoothings(result)
    types = StainTypes.from_dict(result.provenance["model"]["stain_types"])
    spec = GuideSpec(grid, f, planes.spacing_um, planes.shape_px, overview.reference.white, first, types, tuple(more))
    reading = Reading.of(slide, planes.fine_mpp_um)
    cache = CacheSpec("", str(case.slide), "", slide.mpp_um, planes, overview.reference, overview.artefacts, reading)
    whole = np.zeros((7, *planes.shape_px), np.uint8)
    for row, col in needed_shards(planes, alignment, grid, result.mask, reach_um(spec, alignment, 0)):
        r0, r1, c0, c1 = planes.shard_window(int(row), int(col))
        whole[:, r0:r1, c0:c1] = compute_shard(cache, int(row), int(col))[0]

    def planes_at(r0: int, r1: int, c0: int, c1: int) -> NDArray[Any]:
        return whole[:, r0:r1, c0:c1]

    with torch.inference_mode():
        features, cover = features_of(spec, planes_at, alignment, Cells(0, grid.shape_px[0], 0, grid.shape_px[1]))
    return features.double().numpy(), cover.double().numpy()


def covered_cells(cover: NDArray[np.float64], result: Result) -> NDArray[np.bool_]:
    """Measured pixels (ny, nx) that the slide shows completely."""
    return (cell_means(cover, result.factor) >= COVERED) & result.mask


def oracle_images(
    case: Case,
    plain: Result,
    guided: Result,
    features: NDArray[np.float64],
    cover: NDArray[np.float64],
    linear: bool = False,
) -> NDArray[np.float64]:
    """What the features could give, (M, H, W), for the images of a case that the results hold.

    Per ion: ridge of ``(I - P A) truth`` on ``(I - P A) regressors`` over covered measured pixels, then the
    decoding of every result, with the positivity steps that the guided run selected: it differs from that
    run by its weights (and by a network's freedom) alone.

    Args:
        case: Truth.
        plain: The run without the stain: the measurement.
        guided: A run with it: its positivity steps.
        features: (S F, H, W) from `stain_features`.
        cover: (H, W) from the same.
        linear: Only what is linear in the stain's own features: no types, no products with factors.
    """
    f = plain.factor
    cells = covered_cells(cover, plain)
    covered = repeat(cells, f)
    regressors = features[: len(FEATURES)]
    if not linear:
        mz = plain.ions["mz"].to_numpy()
        cube = np.stack([np.nan_to_num(plain.measured(float(value))) for value in mz])
        (factors,) = factorise([cube], [plain.mask], int(guided.provenance["config"]["model"]["max_factors"]))
        filled = fill_missing(factors.images[:LEADING], plain.mask)
        centre = cell_means(features[list(DENSITIES)], f)[:, cells].mean(1)
        levels = expand(pad_edge(spline_coefficients(filled)), f)
        regressors = with_products(features, levels, centre, len(smoothings(guided)))
    x = null_space(regressors, f)
    rows = x[:, covered].T
    scale = np.sqrt((rows**2).mean(0))
    rows = rows / np.where(scale > 1e-9, scale, np.inf)
    gram = rows.T @ rows + PENALTY * len(rows) * np.eye(rows.shape[1])
    chosen = guided.ions["nonneg_steps"].to_numpy()
    out = np.full(case.truth.shape, np.nan)
    for m, truth in enumerate(case.truth):
        near = nearest(plain, case.mz[m])
        if near is None:
            continue
        target = truth - expand(pad_edge(spline_coefficients(cell_means(truth, f))), f)
        weights = np.linalg.solve(gram, rows.T @ target[covered]) / np.where(scale > 1e-9, scale, np.inf)
        detail = np.tensordot(weights, x, axes=1) * covered
        cells = fill_missing(np.asarray(plain.measured(near), np.float64), plain.mask)
        steps = int(chosen[guided.index(near)])
        decoder = IonDecoder.build(cells, np.ones(1), f, steps)
        # The window is the whole grid: the planes are asked for as they are.
        out[m] = decoder.window(Cells(0, cells.shape[0], 0, cells.shape[1]), partial(_as_planes, detail))
    return out


def _as_planes(detail: NDArray[np.float64], cells: Cells) -> NDArray[np.float64]:
    return detail[None]


def nearest(result: Result, mz: float, ppm: float = 10.0) -> float | None:
    """The result's ion at an m/z of the truth; None where peak picking did not find it."""
    axis = result.ions["mz"].to_numpy()
    found = float(axis[int(np.abs(axis - mz).argmin())])
    return found if abs(found - mz) / mz * 1e6 <= ppm else None
