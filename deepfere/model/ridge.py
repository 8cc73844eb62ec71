"""T1, the closed-form tier: ridge regression of the measurement's detail on the stain's detail.

Everything happens on the measured grid, at reduced scale (Wald's protocol): the measurement and the
footprint-averaged stain features are degraded by a ratio r, and what the exact upsampler cannot restore
of the one is regressed on the same of the other. Linear maps commute with averaging, so the weights
apply unchanged at the fine scale. Scores and gates come from spatial blocks left out of the regression
and are compared with null guides: the same features mirrored, turned or shifted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.operator import cell_means, fill_missing, null_space, pad_edge, spline_coefficients
from deepfere.measured.operator import expand as expand_cells
from deepfere.model.features import FEATURES

Array = NDArray[np.float64]


def _names(*names: str) -> tuple[int, ...]:
    return tuple(FEATURES.index(name) for name in names)


_DENSITIES = _names("od_red", "od_green", "od_blue")
FEATURE_SETS: dict[str, tuple[int, ...]] = {
    "densities": _DENSITIES,
    "and tissue": _DENSITIES + _names("tissue"),
    "and nuclei, texture": _DENSITIES + _names("nuclear", "texture", "tissue"),
    "all": tuple(range(len(FEATURES))),
}
"""From few to many, each holding the one before it. Their fits are averaged: few features miss relations, many find
some that hold at the measured scale alone, and the mean is near the best of them on every section that was looked at.
"""
RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


@dataclass(frozen=True)
class DetailRows:
    """Reduced-scale pairs: one row per measured pixel and phase.

    Attributes:
        stain: (R, F) stain detail.
        block: (R,) spatial block number.
        index: (R,) flat index of the measured pixel.
        phase: (R,) phase number of the degradation.
        ratio: Ratio r of the degradation.
    """

    stain: Array
    block: NDArray[np.int64]
    index: NDArray[np.int64]
    phase: NDArray[np.int64]
    ratio: int


def phases(ratio: int) -> list[tuple[int, int]]:
    """Offsets of the degradation grid that are used (at most four, spread evenly)."""
    if ratio == 1:
        return [(0, 0)]
    half = ratio // 2
    return [(0, 0), (half, 0), (0, half), (half, half)]


def _crop(shape: tuple[int, int], ratio: int, phase: tuple[int, int]) -> tuple[slice, slice]:
    n = [(shape[d] - phase[d]) // ratio * ratio for d in (0, 1)]
    return slice(phase[0], phase[0] + n[0]), slice(phase[1], phase[1] + n[1])


def detail(images: Array, ratio: int, phase: tuple[int, int]) -> Array:
    """What P cannot restore of filled images (C, ny, nx) degraded by ``ratio``: (C, ny', nx')."""
    rows, cols = _crop(images.shape[-2:], ratio, phase)
    fine = images[:, rows, cols]
    coarse = spline_coefficients(cell_means(fine, ratio))
    return fine - expand_cells(pad_edge(coarse), ratio)


def stain_detail(features: Array, ratio: int, phase: tuple[int, int]) -> Array:
    """``(I - P A)`` of footprint-averaged features (F, ny, nx), by the local P of the reconstruction."""
    rows, cols = _crop(features.shape[-2:], ratio, phase)
    return null_space(features[:, rows, cols], ratio)


def usable(mask: NDArray[np.bool_], ratio: int, phase: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels (ny', nx') whose coarse cell is measured completely."""
    rows, cols = _crop(mask.shape, ratio, phase)
    whole = cell_means(mask[rows, cols].astype(np.float64), ratio) > 0.999
    return np.repeat(np.repeat(whole, ratio, 0), ratio, 1)


def detail_rows(features: Array, mask: NDArray[np.bool_], blocks: NDArray[np.int64], ratio: int) -> DetailRows:
    """Stain detail of all phases at one ratio, as regression rows.

    Args:
        features: (F, ny, nx) footprint-averaged stain features, holes filled.
        mask: (ny, nx) measured pixels that the slide covers.
        blocks: (ny, nx) spatial block numbers.
        ratio: Degradation.
    """
    stain, block, index, phase_no = [], [], [], []
    numbers = np.arange(mask.size).reshape(mask.shape)
    for n, phase in enumerate(phases(ratio)):
        rows, cols = _crop(mask.shape, ratio, phase)
        if rows.stop - rows.start < 2 * ratio or cols.stop - cols.start < 2 * ratio:
            continue
        inside = usable(mask, ratio, phase)
        stain.append(stain_detail(features, ratio, phase)[:, inside].T)
        block.append(blocks[rows, cols][inside])
        index.append(numbers[rows, cols][inside])
        phase_no.append(np.full(int(inside.sum()), n))
    if not stain:
        empty = np.zeros(0, np.int64)
        return DetailRows(np.zeros((0, len(features))), empty, empty, empty, ratio)
    return DetailRows(
        np.concatenate(stain), np.concatenate(block), np.concatenate(index), np.concatenate(phase_no), ratio
    )


def target_rows(images: Array, mask: NDArray[np.bool_], ratio: int) -> Array:
    """Measured detail (R, C) in the row order of `detail_rows`.

    Args:
        images: (C, ny, nx), holes filled.
        mask: The same mask as for the rows.
        ratio: Degradation.
    """
    out = []
    for phase in phases(ratio):
        rows, cols = _crop(mask.shape, ratio, phase)
        if rows.stop - rows.start < 2 * ratio or cols.stop - cols.start < 2 * ratio:
            continue
        out.append(detail(images, ratio, phase)[:, usable(mask, ratio, phase)].T)
    return np.concatenate(out) if out else np.zeros((0, len(images)))


@dataclass(frozen=True)
class RidgeFit:
    """Ridge weights and their held-out predictions.

    Attributes:
        weights: (F, K): detail = features @ weights.
        ridge: (K,) chosen penalty per factor (of an average: their geometric mean).
        predicted: (R, K) predictions of every row from blocks that exclude it.
    """

    weights: Array
    ridge: Array
    predicted: Array


def fit_ridge(
    rows: DetailRows, targets: Array, used: tuple[int, ...] | None = None, ridges: tuple[float, ...] = RIDGES
) -> RidgeFit:
    """Ridge of measured on stain detail; the penalty of each factor by blocks left out.

    Args:
        rows: Stain detail.
        targets: (R, K) measured detail of the factors.
        used: Features that may have a weight; None takes all.
        ridges: Penalties tried, as shares of the number of rows, on features of unit variance.
    """
    scale = np.sqrt((rows.stain**2).mean(0)) if len(rows.stain) else np.ones(rows.stain.shape[1])
    scale = np.where(scale > 1e-9, scale, np.inf)  # constant features get no weight
    if used is not None:
        scale[np.setdiff1d(np.arange(len(scale)), used)] = np.inf
    x = rows.stain / scale
    names = np.unique(rows.block)
    members = [np.flatnonzero(rows.block == b) for b in names]
    n, count = len(x), targets.shape[1]
    if len(names) < 2:
        zeros = np.zeros((x.shape[1], count))
        return RidgeFit(zeros, np.full(count, np.inf), np.zeros_like(targets))
    grams = np.stack([x[m].T @ x[m] for m in members])
    crosses = np.stack([x[m].T @ targets[m] for m in members])
    gram, cross, eye = grams.sum(0), crosses.sum(0), np.eye(x.shape[1])
    best_error, best_ridge = np.full(count, np.inf), np.full(count, ridges[-1])
    predicted = np.zeros_like(targets)
    for ridge in ridges:
        betas = np.linalg.solve(gram - grams + ridge * n * eye, cross - crosses)
        trial = np.empty_like(targets)
        for m, beta in zip(members, betas, strict=True):
            trial[m] = x[m] @ beta
        error = ((targets - trial) ** 2).sum(0)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_ridge = np.where(better, ridge, best_ridge)
        predicted[:, better] = trial[:, better]
    weights = np.empty((x.shape[1], count))
    for ridge in np.unique(best_ridge):
        chosen = best_ridge == ridge
        weights[:, chosen] = np.linalg.solve(gram + ridge * n * eye, cross[:, chosen])
    return RidgeFit(weights / scale[:, None], best_ridge, predicted)


def fit_average(rows: DetailRows, targets: Array, sets: Iterable[tuple[int, ...]] = FEATURE_SETS.values()) -> RidgeFit:
    """The mean of ridges on growing sets of features.

    Args:
        rows: Stain detail.
        targets: (R, K) measured detail of the factors.
        sets: Features of each fit.
    """
    fits = [fit_ridge(rows, targets, used) for used in sets]
    return RidgeFit(
        np.mean([f.weights for f in fits], axis=0),
        np.exp(np.mean([np.log(f.ridge) for f in fits], axis=0)),
        np.mean([f.predicted for f in fits], axis=0),
    )


def null_guides(features: Array, count: int = 20, seed: int = 0) -> list[Array]:
    """Features (F, ny, nx) that must not help: mirrored, turned by 180 degrees, shifted around.

    Each keeps the guide's own texture and loses its place. Shifts are by a quarter to three quarters of
    the grid in both axes, wrapped.
    """
    rng = np.random.default_rng(seed)
    ny, nx = features.shape[-2:]
    flips = [(1, 1), (-1, 1), (1, -1), (-1, -1)]
    out = []
    for n in range(count):
        sy, sx = flips[n % 4]
        moved = features[:, ::sy, ::sx]
        lo, hi = (0.25, 0.75) if n % 4 == 0 or n >= 4 else (0.0, 1e-9)
        shift = (int(ny * rng.uniform(lo, hi)), int(nx * rng.uniform(lo, hi)))
        out.append(np.roll(moved, shift, axis=(-2, -1)))
    return out


def fill(images: NDArray[np.floating], mask: NDArray[np.bool_]) -> Array:
    """Float64 images with holes filled from the nearest measured pixel."""
    return fill_missing(np.asarray(images, np.float64), mask)
