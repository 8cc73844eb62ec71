"""How well the stain predicts the measurement at a placement, on blocks left out of the regression."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.alignment.looks import high_pass
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.refine import footprint_points
from deepfere.frame import Alignment
from deepfere.model.registration import sample_window
from deepfere.readers.slide_damaged import DamagedTiles


def spatial_blocks(mask: NDArray[np.bool_], per_side: int = 4) -> NDArray[np.int64]:
    """Block number (ny, nx) of a per_side x per_side partition with equal numbers of measured pixels."""
    ny, nx = mask.shape

    def cuts(profile: NDArray[np.integer]) -> NDArray[np.int64]:
        share = (np.cumsum(profile) - profile / 2) / max(profile.sum(), 1)
        return np.minimum((share * per_side).astype(np.int64), per_side - 1)

    return cuts(mask.sum(1))[:, None].repeat(nx, 1) * per_side + cuts(mask.sum(0))[None].repeat(ny, 0)


def held_out_r2(
    design: NDArray[np.float64],
    targets: NDArray[np.float64],
    blocks: NDArray[np.int64],
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0),
) -> NDArray[np.float64]:
    """R2 (K,) of ridge predictions on blocks left out, at the penalty that is best overall.

    Args:
        design: (N, F) features.
        targets: (N, K) images.
        blocks: (N,) block number of each row.
        ridges: Penalties on standardised features, as shares of N.
    """
    x = np.column_stack([(design - design.mean(0)) / (design.std(0) + 1e-9), np.ones(len(design))])
    names = np.unique(blocks)
    members = [blocks == b for b in names]
    grams = np.stack([x[m].T @ x[m] for m in members])
    crosses = np.stack([x[m].T @ targets[m] for m in members])
    gram, cross, penalty = grams.sum(0), crosses.sum(0), np.eye(x.shape[1])
    penalty[-1, -1] = 0.0
    total = ((targets - targets.mean(0)) ** 2).sum(0)
    best = np.full(targets.shape[1], -np.inf)
    for ridge in ridges:
        lhs = gram - grams + (ridge * len(x)) * penalty + 1e-9 * len(x) * np.eye(x.shape[1])
        beta = np.linalg.solve(lhs, cross - crosses)
        errors = sum(((targets[m] - x[m] @ b) ** 2).sum(0) for m, b in zip(members, beta, strict=True))
        r2 = 1.0 - errors / np.maximum(total, 1e-300)
        if r2.mean() > best.mean():
            best = r2
    return best


def placement_r2(
    measured: MeasuredOverview,
    stain: StainOverview,
    alignment: Alignment,
    *,
    features: torch.Tensor,
    fine: bool,
    supersample: int = 3,
    blocks_per_side: int = 4,
) -> float:
    """Weighted held-out R2 of the factors at one placement.

    Args:
        measured: Factor images.
        stain: The overview that the features come from.
        alignment: The placement.
        features: ``stain.features(sigma)``.
        fine: Compare images minus their 3 x 3 mean: what is finer than a few measured pixels. Smooth
            trends fit almost any slide at almost any placement; fine structure does not.
        supersample: Sample points per measured pixel and axis.
        blocks_per_side: Spatial blocks per axis.
    """
    points = footprint_points(measured, supersample).numpy()
    slide = torch.from_numpy(alignment.map(points))
    pooled = sample_window(features, (0, 0), stain.spacing_um, slide, supersample).double()
    images = torch.from_numpy(measured.images)
    if fine:
        pooled, images = high_pass(pooled), high_pass(images)
    inside = measured.mask
    blocks = spatial_blocks(inside, blocks_per_side)[inside]
    r2 = held_out_r2(pooled.numpy()[:, inside].T, images.numpy()[:, inside].T, blocks)
    return float((np.clip(r2, -1.0, 1.0) * measured.weight).sum())


def slide_cover(measured: MeasuredOverview, stain: StainOverview, alignment: Alignment) -> float:
    """Share of the measured tissue pixels whose centre the slide covers, and shows."""
    return tissue_shown(measured, alignment, stain.extent_um, stain.damaged)


def tissue_shown(
    measured: MeasuredOverview, alignment: Alignment, extent_um: tuple[float, float], damaged: DamagedTiles
) -> float:
    """Share of the measured tissue pixels whose centre lies on a slide of this extent, and in no damaged tile of it."""
    centres = alignment.map(measured.grid.centres_um()[measured.tissue])
    shown = ((centres >= 0) & (centres <= np.asarray(extent_um))).all(-1)
    return float((shown & ~damaged.hide(centres)).mean())
