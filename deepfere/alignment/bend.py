"""The non-rigid part of the alignment: a cubic B-spline that is kept only where left-out blocks ask for it.

Sections are cut, floated and mounted: they bend. An affine leaves that error, and 0.1 of a measured pixel is
worth having. But a spline has many parameters, and on small grids it bends to fit noise while in-sample scores
rise. Its degrees of freedom follow the data twice: knots lie `KNOT_PX` measured pixels apart and are tied by a
bending prior; and the spline is judged on blocks that neither it nor the regression has seen (nested). The affine
it competes with has seen them, which makes the test harder, not easier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.alignment.looks import high_pass
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.refine import BEND_STAGES, footprint_points, refine, refine_each
from deepfere.alignment.score import spatial_blocks
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.registration import sample_window

KNOT_PX = 7.0
MOST_KNOTS = 24
LEAST_PX = 150
"""Measured pixels below which a displacement is not tried: nothing would be left to judge it by."""
FOLDS = 4
EVIDENCE = 1.0
"""Standard errors over blocks by which the spline must be ahead of an affine that has seen them."""
JUDGED_BLUR_PITCH = 0.25
RIDGE = 1e-2
LEAST_JACOBIAN = 0.2


def plan_knots(shape_px: tuple[int, int]) -> tuple[int, int]:
    """Knots (ny, nx) over a grid of measured pixels: about one per `KNOT_PX`, at least 3, at most `MOST_KNOTS`."""
    ny, nx = (int(np.clip(round(n / KNOT_PX) + 1, 3, MOST_KNOTS)) for n in shape_px)
    return ny, nx


def least_jacobian(alignment: Alignment, grid: SectionGrid) -> float:
    """Smallest area ratio of the mapping over the section, relative to its affine part; below 0 it folds."""
    centres = grid.centres_um()
    step = 1e-3 * min(grid.pitch_um)
    columns = [(alignment.map(centres + step * e) - alignment.map(centres - step * e)) / (2 * step) for e in np.eye(2)]
    area = np.linalg.det(np.stack(columns, axis=-1))
    return float((area / np.linalg.det(alignment.matrix)).min())


def block_gains(
    measured: MeasuredOverview,
    stain: StainOverview,
    lower: Alignment,
    upper: list[Alignment],
    folds: NDArray[np.int64],
    blocks: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Log likelihood per block that the upper alignments win over the lower on pixels that they have not seen.

    Args:
        measured: Factor images.
        stain: Slide overview.
        lower: One alignment.
        upper: One alignment per fold, fitted without it.
        folds: (ny, nx) fold number of every pixel.
        blocks: (ny, nx) block number of every pixel.

    Returns:
        Gains of the blocks that hold measured pixels, summed over factors: fine structure (minus the 3 x 3 mean),
        each factor with its own noise.
    """
    pitch = float(np.mean(measured.grid.pitch_um))
    scene = stain.coarsen(0.5 * JUDGED_BLUR_PITCH * pitch)
    features = scene.features(JUDGED_BLUR_PITCH * pitch)
    points = footprint_points(measured, 3).numpy()
    inside = measured.mask
    target = high_pass(torch.from_numpy(measured.images)).numpy()[:, inside].T
    fold, block = folds[inside], blocks[inside]

    def design(alignment: Alignment) -> NDArray[np.float64]:
        slide = torch.from_numpy(alignment.map(points))
        pooled = sample_window(features, (0, 0), scene.spacing_um, slide, 3).double()
        return high_pass(pooled).numpy()[:, inside].T

    plain = design(lower)
    errors = np.zeros((2, *target.shape))
    for number, alignment in enumerate(upper):
        train, test = fold != number, fold == number
        for side, x in enumerate((plain, design(alignment))):
            sd = x[train].std(0) + 1e-9
            z = (x - x[train].mean(0)) / sd
            gram = z[train].T @ z[train] + RIDGE * train.sum() * np.eye(z.shape[1])
            centre = target[train].mean(0)
            beta = np.linalg.solve(gram, z[train].T @ (target[train] - centre))
            errors[side, test] = (target[test] - centre - z[test] @ beta) ** 2
    noise = np.maximum(errors[0].mean(0), 1e-300)
    gain = 0.5 * ((errors[0] - errors[1]) / noise).sum(1)
    return np.asarray(np.bincount(block, gain)[np.unique(block)], np.float64)


def bend(
    measured: MeasuredOverview,
    stain: StainOverview,
    affine: Alignment,
    progress: Callable[[float], None] | None = None,
) -> Alignment:
    """Add a displacement to an affine alignment if left-out blocks say so.

    Args:
        measured: Factor images.
        stain: Slide overview.
        affine: The refined affine; one with a displacement comes back as it is.
        progress: Called with the share done.

    Returns:
        The alignment, with what was decided and why in its evidence under "bend".
    """
    grid = measured.grid
    if affine.displacement is not None:
        return affine
    pixels = int(measured.mask.sum())
    if pixels < LEAST_PX:
        return affine.with_evidence(bend={"kept": False, "reason": f"{pixels} measured pixels are too few to judge it"})
    knots = plan_knots(grid.shape_px)
    blocks = spatial_blocks(measured.mask, 4)
    # Blocks of a fold never touch: what is left out is surrounded by what is seen.
    folds = (blocks // 4 + 2 * (blocks % 4)) % FOLDS
    supersample = 4 if pixels <= 4000 else 2
    seen = [folds != number for number in range(FOLDS)]
    tell = progress or (lambda share: None)
    held = refine_each(
        measured,
        stain,
        [affine] * FOLDS,
        BEND_STAGES,
        supersample,
        knots,
        seen,
        lambda share: tell(share * FOLDS / (FOLDS + 1)),
    )
    gains = block_gains(measured, stain, affine, held, folds, blocks)
    error = float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else np.inf
    evidence = float(gains.mean() / error) if error > 0 else 0.0
    notes: dict[str, Any] = {"kept": False, "knots": list(knots), "evidence": evidence}
    notes["gain_per_pixel"] = float(gains.sum() / pixels)
    if evidence < EVIDENCE:
        return affine.with_evidence(bend={**notes, "reason": "left-out blocks do not ask for it"})
    bent = refine(measured, stain, affine, BEND_STAGES, supersample, knots)
    area = notes["least_jacobian"] = least_jacobian(bent, grid)
    if area < LEAST_JACOBIAN:
        return affine.with_evidence(bend={**notes, "reason": "it would fold or crush the tissue"})
    return bent.with_evidence(bend={**notes, "kept": True, "reason": "ahead on left-out blocks"})
