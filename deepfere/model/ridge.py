"""T1, the closed-form tier: ridge regression of the measurement's detail on the stain's detail.

Everything happens on the measured grid, at reduced scale (Wald's protocol): the measurement and the
footprint-averaged stain features are degraded by a ratio r, and what the exact upsampler cannot restore
of the one is regressed on the same of the other. Linear maps commute with averaging, so the weights
apply unchanged at the fine scale. Scores and gates come from spatial blocks left out of the regression
and are compared with null guides: the same features mirrored, turned or shifted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.operator import cell_means, fill_missing, null_space, pad_edge, spline_coefficients
from deepfere.measured.operator import expand as expand_cells
from deepfere.model.features import FEATURES

Array = NDArray[np.float64]


def _names(*names: str) -> tuple[int, ...]:
    return tuple(FEATURES.index(name) for name in names)


DENSITIES = _names("od_red", "od_green", "od_blue")
FEATURE_SETS: dict[str, tuple[int, ...]] = {
    "densities": DENSITIES,
    "and tissue": DENSITIES + _names("tissue"),
    "and nuclei, texture": DENSITIES + _names("nuclear", "texture", "tissue"),
    "all": tuple(range(len(FEATURES))),
}
"""From few to many, each holding the one before it. Their fits are averaged: few features miss relations, many find
some that hold at the measured scale alone, and the mean is near the best of them on every section that was looked at.
"""
RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
MANY_PX = 100_000
"""Measured pixels above which one phase has rows enough; rows take memory, each as much as there are ions."""
LEADING = 4
"""Factors whose level may change the weights of the optical densities."""


@dataclass(frozen=True)
class Chemistry:
    """What lets the weights of the stain follow the measurement.

    Attributes:
        images: (J, ny, nx) leading factors, holes filled.
        centre: (3,) optical densities that the products are taken from: their mean over the covered tissue.
        groups: Smoothings of the features.
    """

    images: Array
    centre: Array
    groups: int = 1


def with_products(features: Any, levels: Any, centre: Any, groups: int = 1) -> Any:
    """Features (S F, H, W), and behind those of each smoothing their densities times each of the levels (J, H, W).

    The densities' weights then depend on the chemistry around: a dark pixel may mean one thing where one factor is
    high and another where it is low. NumPy or torch.

    Args:
        features: Smoothing after smoothing.
        levels: Leading factors.
        centre: (3,) see `Chemistry`.
        groups: S.

    Returns:
        (S (F + 3 J), H, W).
    """
    if len(levels) == 0:
        return features
    out, each = [], len(features) // groups
    for start in range(0, len(features), each):
        one = features[start : start + each]
        densities = one[list(DENSITIES)] - centre[:, None, None]
        out += [one, (levels[:, None] * densities[None]).reshape(-1, *features.shape[1:])]
    if hasattr(features, "new_tensor"):
        import torch

        return torch.cat(out)
    return np.concatenate(out)


def regressor_sets(features: int, products: int) -> list[tuple[int, ...]]:
    """Which regressors each of the averaged fits has.

    Args:
        features: Stain features, types included.
        products: Products of densities and factors behind them.
    """
    types = tuple(range(len(FEATURES), features))
    added = tuple(range(features, features + products))
    families = {(), added, types, types + added}
    return [tuple(used) + more for more in sorted(families) for used in FEATURE_SETS.values()]


@dataclass(frozen=True)
class DetailRows:
    """Reduced-scale pairs: one row per measured pixel and phase.

    Attributes:
        stain: (R, S F) detail of the regressors, those of one smoothing after those of another.
        block: (R,) spatial block number.
        index: (R,) flat index of the measured pixel.
        phase: (R,) phase number of the degradation.
        ratio: Ratio r of the degradation.
        products: How many of the regressors of a smoothing are products with factors: its last.
        groups: S.
    """

    stain: Array
    block: NDArray[np.int64]
    index: NDArray[np.int64]
    phase: NDArray[np.int64]
    ratio: int
    products: int = 0
    groups: int = 1

    @property
    def each(self) -> int:
        """Regressors of a smoothing."""
        return self.stain.shape[1] // self.groups

    def columns(self, group: int) -> slice:
        """Where the regressors of a smoothing are."""
        return slice(group * self.each, (group + 1) * self.each)

    def at(self, group: int) -> DetailRows:
        """With the regressors of one smoothing alone."""
        return replace(self, stain=self.stain[:, self.columns(group)], groups=1)


def phases(ratio: int, pixels: int = 0) -> list[tuple[int, int]]:
    """Offsets of the degradation grid that are used: at most four, spread evenly; fewer of a large section.

    Args:
        ratio: Degradation.
        pixels: Measured pixels. Every phase gives a row for each of them.
    """
    half = ratio // 2
    if ratio == 1 or pixels > MANY_PX:
        return [(0, 0)]
    if pixels > MANY_PX // 2:
        return [(0, 0), (half, half)]
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


def stain_detail(features: Array, ratio: int, phase: tuple[int, int], chemistry: Chemistry | None = None) -> Array:
    """``(I - P A)`` of the regressors, by the local P of the reconstruction.

    Args:
        features: (S F, ny, nx) footprint-averaged.
        ratio: Degradation; the factors of ``chemistry`` are seen as it leaves them.
        phase: Its offset.
        chemistry: Adds products.
    """
    rows, cols = _crop(features.shape[-2:], ratio, phase)
    regressors = features[:, rows, cols]
    if chemistry is not None:
        coarse = spline_coefficients(cell_means(chemistry.images[:, rows, cols], ratio))
        levels = expand_cells(pad_edge(coarse), ratio)
        regressors = with_products(regressors, levels, chemistry.centre, chemistry.groups)
    return null_space(regressors, ratio)


def usable(mask: NDArray[np.bool_], ratio: int, phase: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels (ny', nx') whose coarse cell is measured completely."""
    rows, cols = _crop(mask.shape, ratio, phase)
    whole = cell_means(mask[rows, cols].astype(np.float64), ratio) > 0.999
    return np.repeat(np.repeat(whole, ratio, 0), ratio, 1)


def detail_rows(
    features: Array,
    mask: NDArray[np.bool_],
    blocks: NDArray[np.int64],
    ratio: int,
    chemistry: Chemistry | None = None,
) -> DetailRows:
    """Stain detail of all phases at one ratio, as regression rows.

    Args:
        features: (S F, ny, nx) footprint-averaged stain features, holes filled.
        mask: (ny, nx) measured pixels that the slide covers.
        blocks: (ny, nx) spatial block numbers.
        ratio: Degradation.
        chemistry: Adds products, and tells of how many smoothings the features are.
    """
    products = 0 if chemistry is None else len(DENSITIES) * len(chemistry.images)
    groups = 1 if chemistry is None else chemistry.groups
    stain, block, index, phase_no = [], [], [], []
    numbers = np.arange(mask.size).reshape(mask.shape)
    for n, phase in enumerate(phases(ratio, int(mask.sum()))):
        rows, cols = _crop(mask.shape, ratio, phase)
        if rows.stop - rows.start < 2 * ratio or cols.stop - cols.start < 2 * ratio:
            continue
        inside = usable(mask, ratio, phase)
        stain.append(stain_detail(features, ratio, phase, chemistry)[:, inside].T)
        block.append(blocks[rows, cols][inside])
        index.append(numbers[rows, cols][inside])
        phase_no.append(np.full(int(inside.sum()), n))
    if not stain:
        empty = np.zeros(0, np.int64)
        none = np.zeros((0, len(features) + groups * products))
        return DetailRows(none, empty, empty, empty, ratio, products, groups)
    numbered = [np.concatenate(part) for part in (block, index, phase_no)]
    return DetailRows(np.concatenate(stain), numbered[0], numbered[1], numbered[2], ratio, products, groups)


def target_rows(images: Array, mask: NDArray[np.bool_], ratio: int) -> Array:
    """Measured detail (R, C) in the row order of `detail_rows`.

    Args:
        images: (C, ny, nx), holes filled.
        mask: The same mask as for the rows.
        ratio: Degradation.
    """
    out = []
    for phase in phases(ratio, int(mask.sum())):
        rows, cols = _crop(mask.shape, ratio, phase)
        if rows.stop - rows.start < 2 * ratio or cols.stop - cols.start < 2 * ratio:
            continue
        out.append(detail(images, ratio, phase)[:, usable(mask, ratio, phase)].T)
    return np.concatenate(out) if out else np.zeros((0, len(images)))


@dataclass(frozen=True)
class RidgeFit:
    """Ridge weights and their held-out predictions.

    Attributes:
        weights: (F, K): detail = regressors @ weights.
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
        used: Regressors that may have a weight; None takes all.
        ridges: Penalties tried, as shares of the number of rows, on regressors of unit variance.
    """
    return fit_average(rows, targets, [tuple(range(rows.stain.shape[1])) if used is None else used], ridges)


def fit_average(
    rows: DetailRows,
    targets: Array,
    sets: Sequence[tuple[int, ...]] | None = None,
    ridges: tuple[float, ...] = RIDGES,
) -> RidgeFit:
    """The mean of ridges on several sets of regressors, each with its own penalty for each factor.

    Args:
        rows: Stain detail.
        targets: (R, K) measured detail of the factors.
        sets: Regressors of each fit; all of `regressor_sets` by default.
        ridges: Penalties tried, as shares of the number of rows, on regressors of unit variance.
    """
    count, factors = rows.stain.shape[1], targets.shape[1]
    sets = regressor_sets(count - rows.products, rows.products) if sets is None else sets
    names = np.unique(rows.block)
    if len(names) < 2:
        return RidgeFit(np.zeros((count, factors)), np.full(factors, np.inf), np.zeros_like(targets))
    scale = np.sqrt((rows.stain**2).mean(0))
    scale = np.where(scale > 1e-9, scale, np.inf)  # constant regressors get no weight
    x = rows.stain / scale
    # Everything but the predictions follows from second moments per block: all sets and penalties share one pass.
    members = [np.flatnonzero(rows.block == b) for b in names]
    grams = np.stack([x[m].T @ x[m] for m in members])
    crosses = np.stack([x[m].T @ targets[m] for m in members])
    weights, logs, predicted = np.zeros((count, factors)), np.zeros(factors), np.zeros_like(targets)
    for used in sets:
        columns = list(used)
        one = _penalised(grams[:, columns][:, :, columns], crosses[:, columns], len(x), ridges)
        weights[columns] += one.weights / len(sets)
        logs += np.log(one.ridge) / len(sets)
        for m, beta in zip(members, one.left_out, strict=True):
            predicted[m] += x[m][:, columns] @ beta / len(sets)
    return RidgeFit(weights / scale[:, None], np.exp(logs), predicted)


def fit_own(rows: DetailRows, targets: Array, group: NDArray[np.int64], more: Array | None = None) -> RidgeFit:
    """`fit_average` of every factor on the regressors at its own smoothing.

    Args:
        rows: Stain detail.
        targets: (R, K) measured detail of the factors.
        group: (K,) number of each factor's smoothing.
        more: (R, C) detail of regressors that every fit has besides: behind the others.

    Returns:
        Weights (S F + C, K), 0 at other smoothings than the factor's own.
    """
    count, extra = rows.stain.shape[1], 0 if more is None else more.shape[1]
    ridge = np.full(targets.shape[1], RIDGES[-1])
    weights, predicted = np.zeros((count + extra, targets.shape[1])), np.zeros_like(targets)
    for number in np.unique(group):
        own, part = group == number, rows.at(int(number))
        sets = regressor_sets(rows.each - rows.products, rows.products)
        if more is not None:
            sets = [used + tuple(range(rows.each, rows.each + extra)) for used in sets]
            part = replace(part, stain=np.concatenate([part.stain, more], axis=1))
        fit = fit_average(part, targets[:, own], sets)
        weights[rows.columns(int(number)), own] = fit.weights[: rows.each]
        weights[count:, own] = fit.weights[rows.each :]
        ridge[own], predicted[:, own] = fit.ridge, fit.predicted
    return RidgeFit(weights, ridge, predicted)


@dataclass(frozen=True)
class _Penalised:
    weights: Array
    ridge: Array
    left_out: Array


def _penalised(grams: Array, crosses: Array, rows: int, ridges: tuple[float, ...]) -> _Penalised:
    """Ridge from second moments (B, F, F) and (B, F, K) of blocks, every block left out once: (B, F, K) weights."""
    gram, cross, eye = grams.sum(0), crosses.sum(0), np.eye(grams.shape[1])
    factors = crosses.shape[2]
    best_error, best_ridge = np.full(factors, np.inf), np.full(factors, ridges[-1])
    best, weights = np.zeros(crosses.shape), np.zeros(cross.shape)
    for ridge in ridges:
        betas = np.linalg.solve(gram - grams + ridge * rows * eye, cross - crosses)
        # |t - x b|^2 of a left-out block, less |t|^2, which no penalty changes.
        error = (betas * (grams @ betas - 2 * crosses)).sum((0, 1))
        better = error < best_error
        best_error, best_ridge = np.where(better, error, best_error), np.where(better, ridge, best_ridge)
        best[:, :, better] = betas[:, :, better]
        weights[:, better] = np.linalg.solve(gram + ridge * rows * eye, cross[:, better])
    return _Penalised(weights, best_ridge, best)


def null_guides(features: Array, count: int = 20, seed: int = 0) -> Iterator[Array]:
    """Features (F, ny, nx) that must not help: mirrored, turned by 180 degrees, shifted around; one after another.

    Each keeps the guide's own texture and loses its place. Shifts are by a quarter to three quarters of
    the grid in both axes, wrapped.
    """
    rng = np.random.default_rng(seed)
    ny, nx = features.shape[-2:]
    flips = [(1, 1), (-1, 1), (1, -1), (-1, -1)]
    for n in range(count):
        sy, sx = flips[n % 4]
        moved = features[:, ::sy, ::sx]
        lo, hi = (0.25, 0.75) if n % 4 == 0 or n >= 4 else (0.0, 1e-9)
        shift = (int(ny * rng.uniform(lo, hi)), int(nx * rng.uniform(lo, hi)))
        yield np.roll(moved, shift, axis=(-2, -1))


def fill(images: NDArray[np.floating], mask: NDArray[np.bool_]) -> Array:
    """Float64 images with holes filled from the nearest measured pixel."""
    return fill_missing(np.asarray(images, np.float64), mask)
