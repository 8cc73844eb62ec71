"""The denoised mode: what a measured pixel would hold without its counting noise, as far as others tell.

Each pixel of each ion is predicted without looking at it: from the pixels around it, from the other ions there, and
from the stain. Where such a prediction is as good as the noise lets one see, it is taken; where it is not (a hot spot
that nothing else shows), the measurement stands. Between the two the weight is that of the best linear estimate
(Wiener), with the counting noise of the pixel and the prediction's own error there. A prediction that never saw the
pixel's noise makes the residual's reduced chi-square, per degree of freedom given up, one where the noise is right.
How much noise there is follows from how much neighbouring pixels differ, and from what even the best prediction leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.alignment.score import spatial_blocks
from deepfere.measured.factors import noise_sd
from deepfere.measured.operator import fill_missing
from deepfere.model.uncertainty import (
    averaged_ratio,
    detectors_pulse,
    local_variance,
    noise_quantum,
    single_pulse,
    without_centre,
)

Array = NDArray[np.float64]

SCALES_PX = (0.6, 0.8, 1.0, 1.4, 2.0, 3.0, 4.5)
PENALTIES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
CAUTION = 0.7
"""Share of the noise quantum that is believed: structure makes it too large, and too much smoothing costs more."""
SURPRISE_SD = 3.5
"""Standard deviations beyond which a pixel refutes its prediction."""
LEAST_PX = 200
"""Measured pixels below which nothing is taken away: noise and structure cannot be told apart by the pixels alone."""
LEAST_TOLD_PX = 60
"""The same where the ions say what the detector's pulse is: predictions need this many."""
LIKE_NOISE, LIKE_STRUCTURE = 0.75, 1.0
"""What is left of the variance between pixels when 2 x 2 are averaged: up to the one all of it may be noise (a quarter,
if nothing else is there), from the other on none."""
UNSEEN = 0.5
"""Structure of single pixels that predictions miss, as a share of what they find of it."""
LEAST_NOISE = 0.25
"""Share of the residuals that may be noise, however much is found."""
_GROUPS = 4
_LEVELS, _LEAST_LEVEL_PX = 8, 60
_THERE = 0.25  # of the mean level: below it an ion is absent
_MOST_ASKED = 64
_MOST_SCORES = 16
_MOST_IONS = 512
_FLOOR = 0.02  # of the mean intensity: below it the noise is not less


@dataclass(frozen=True)
class Denoised:
    """Denoised ions of one section.

    Attributes:
        images: (M, ny, nx) float32, 0 where not measured.
        chi_square: (M,) reduced chi-square of what was taken away; NaN where nothing was.
        noise_share: (M,) weight of the prediction, mean over the pixels, in [0, 1].
    """

    images: NDArray[np.float32]
    chi_square: Array
    noise_share: Array

    def save(self, path: Any) -> None:
        """Write all arrays to one .npz."""
        np.savez(path, images=self.images, chi_square=self.chi_square, noise_share=self.noise_share)

    @classmethod
    def load(cls, path: Any) -> Denoised:
        """Read what `save` wrote."""
        with np.load(path) as data:
            return cls(data["images"], data["chi_square"], data["noise_share"])


def denoise(cube: NDArray[np.floating], mask: NDArray[np.bool_], features: Array | None, seed: int) -> Denoised:
    """Denoise every ion of a section.

    Args:
        cube: (M, ny, nx) intensities, not negative.
        mask: (ny, nx) True where measured.
        features: (F, ny, nx) stain features averaged over measured pixels, or None.
        seed: For the groups of ions that predict each other.
    """
    out = np.where(mask, cube, 0).astype(np.float32)
    chi_square, share = np.full(len(cube), np.nan), np.zeros(len(cube))
    most = detectors_pulse(np.array([single_pulse(image, mask) for image in cube]))
    if mask.sum() < (LEAST_TOLD_PX if math.isfinite(most) else LEAST_PX):
        return Denoised(out, chi_square, share)
    stain = np.zeros((0, int(mask.sum()))) if features is None else features[:, mask]
    caution = CAUTION if math.isfinite(most) else CAUTION * noisiness(cube, mask)
    # One predictor serves a group of ions, pixels in its order: block after block.
    block = spatial_blocks(mask, 4)[mask]
    group, scores = _scores(cube, mask, seed)
    for g in range(_GROUPS):
        predictor = Predictor(np.concatenate([scores[g], stain]).T, block)
        for m in np.flatnonzero(group == g):
            image = np.asarray(cube[m], np.float64)
            quantum = caution * min(noise_quantum(image, mask), most)
            if quantum <= 0 or (image[mask] < 0).any() or not np.ptp(image[mask]) > 0:
                continue
            estimate, chi_square[m], share[m] = _estimate(image, mask, quantum, predictor, math.isfinite(most))
            out[m][mask] = np.maximum(estimate, 0.0)
    return Denoised(out, chi_square, share)


def noisiness(cube: NDArray[np.floating], mask: NDArray[np.bool_]) -> float:
    """How far what varies between neighbouring pixels of a section behaves as noise, in [0, 1].

    Where ions do not say what one detected ion is worth, the noise is known by nothing but its variance, and the
    structure of a few hundred pixels looks the same at one scale. At two it does not (`averaged_ratio`).

    Args:
        cube: (M, ny, nx) intensities.
        mask: (ny, nx) True where measured.
    """
    asked = cube[:: -(-len(cube) // _MOST_ASKED)]
    ratios = np.array([averaged_ratio(image, mask) for image in asked])
    if not np.isfinite(ratios).any():
        return 0.0
    middle = float(np.nanmedian(ratios))
    return float(np.clip((LIKE_STRUCTURE - middle) / (LIKE_STRUCTURE - LIKE_NOISE), 0.0, 1.0))


def _estimate(
    image: Array, mask: NDArray[np.bool_], quantum: float, predictor: Predictor, told: bool
) -> tuple[Array, float, float]:
    """One ion's measured pixels denoised (N,), its chi-square (NaN if nothing was taken) and noise share.

    Args:
        image: (ny, nx) the ion.
        mask: (ny, nx) measured pixels.
        quantum: Its counting noise, variance per unit of intensity.
        predictor: Of its group.
        told: The detector's pulse bounds the quantum already.
    """
    values = image[mask]
    around = np.stack([without_centre(image, mask, s)[mask] for s in SCALES_PX], axis=1)
    predicted = predictor(around, values)
    level = np.maximum(predicted, _FLOOR * values.mean())
    if not told:
        local = ((values[:, None] - around) ** 2).mean(0).min()
        quantum = min(quantum, most_noise((values - predicted) ** 2, level, float(local)))
        if quantum <= 0:
            return values, math.nan, 0.0
    seen = np.zeros(mask.shape)
    seen[mask] = level
    spread = local_variance(fill_missing(seen, mask))[mask]
    noise = quantum * level
    error = prediction_error((values - predicted) ** 2, noise, level, spread)
    # What is far outside both noise and error refutes the prediction: the measurement stands.
    refuted = (values - predicted) ** 2 > SURPRISE_SD**2 * (error + noise)
    kept = np.where(refuted, 1.0, error / (error + noise))
    estimate = predicted + kept * (values - predicted)
    given_up = float((1 - kept).mean())
    chi_square = float(((values - estimate) ** 2 / noise).mean()) / given_up if given_up > 0 else math.nan
    return estimate, chi_square, given_up


def _scores(cube: NDArray[np.floating], mask: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.int64], list[Array]]:
    """The group of each ion, and for each group what the ions outside it show: (S, N) noise-weighted scores."""
    table = np.asarray(cube[:, mask], np.float64)
    sd = noise_sd(cube, mask)
    if not sd.any():
        sd = table.std(1)  # no pixels side by side, whose differences would show the noise
    floor = 1e-9 * max(float(sd.max()), 1e-300)
    scaled = (table - table.mean(1, keepdims=True)) / np.maximum(sd, floor)[:, None]
    group = np.random.default_rng([seed, 5]).permutation(len(cube)) % _GROUPS
    count = min(_MOST_SCORES, int(mask.sum()) // 12)
    clearest = np.argsort(-scaled.var(1), kind="stable")
    scores = []
    for g in range(_GROUPS):
        # The clearest ions tell what there is to tell; the cost is with the square of their number.
        others = scaled[np.sort(clearest[group[clearest] != g][:_MOST_IONS])]
        values, vectors = np.linalg.eigh(others @ others.T)
        leading = np.argsort(values)[::-1][:count]
        scores.append(vectors[:, leading].T @ others if len(others) else np.zeros((0, table.shape[1])))
    return group, scores


class Predictor:
    """Ridge predictions by fits that left each value's spatial block out; the best of `PENALTIES`.

    Many targets share most of their columns: what those cost is paid once.

    Args:
        shared: (N, S) columns of all targets.
        block: (N,) block numbers.
    """

    def __init__(self, shared: Array, block: NDArray[np.int64]) -> None:
        self._order = np.argsort(block, kind="stable")
        starts = np.flatnonzero(np.diff(block[self._order], prepend=-1))
        self._inside = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(block)], strict=True)]
        # The last column is the intercept.
        self._shared = np.column_stack([_standardised(shared[self._order]), np.ones(len(block))])
        self._grams = np.stack([self._shared[rows].T @ self._shared[rows] for rows in self._inside])

    def __call__(self, own: Array, values: Array) -> Array:
        """Predictions (N,) of ``values`` (N,) from the shared columns and ``own`` (N, C)."""
        x, t = _standardised(own[self._order]), values[self._order]
        # Of [own, shared, 1] with [own, shared, 1, target], one block at a time.
        count, width = x.shape[1], x.shape[1] + self._shared.shape[1]
        products = np.empty((len(self._inside), width, width + 1))
        for rows, gram, part in zip(self._inside, self._grams, products, strict=True):
            both = np.column_stack([x[rows], t[rows]])
            cross = self._shared[rows].T @ both
            part[:count, :count] = (near := both[:, :-1].T @ both)[:, :-1]
            part[:count, -1] = near[:, -1]
            part[count:, :count], part[:count, count:-1] = cross[:, :-1], cross[:, :-1].T
            part[count:, count:-1], part[count:, -1] = gram, cross[:, -1]
        left = products.sum(0) - products
        ridge = np.diag([1.0] * (width - 1) + [0.0]) * len(t)  # the intercept is free
        weights = np.concatenate(
            [np.linalg.solve(left[..., :-1] + penalty * ridge, left[..., -1:]) for penalty in PENALTIES], axis=2
        )
        found = np.empty((len(t), len(PENALTIES)))
        for rows, weight in zip(self._inside, weights, strict=True):
            found[rows] = x[rows] @ weight[:count] + self._shared[rows] @ weight[count:]
        best = np.empty_like(t)
        best[self._order] = found[:, np.argmin(((found - t[:, None]) ** 2).mean(0))]
        return best


def _standardised(columns: Array) -> Array:
    """Columns (N, C) with mean 0 and variance 1; those without any spread are 0."""
    spread = columns.std(0)
    most = np.abs(columns).max(0, initial=0.0)
    return (columns - columns.mean(0)) / np.where(spread > 1e-12 * (most + 1e-300), spread, np.inf)


def most_noise(squared: Array, level: Array, local: float) -> float:
    """The noise quantum that residuals leave room for.

    Structure of single pixels looks like noise: differences of neighbours count it as such. What the other ions and the
    stain predict of a pixel beyond what its neighbours do is no noise. Where they find much, there is some that they
    do not find, and the residuals are not all noise.

    Args:
        squared: (N,) squared residuals of the predictions.
        level: (N,) predicted intensity.
        local: Mean squared residual of the best prediction by the neighbours alone.

    Returns:
        Variance per unit of intensity.
    """
    # Where an ion is absent nothing varies, and nothing follows from that.
    there = np.flatnonzero(level >= _THERE * level.mean())
    order = there[np.argsort(level[there], kind="stable")]
    parts = np.array_split(order, max(1, min(_LEVELS, len(order) // _LEAST_LEVEL_PX)))
    least = min(float(squared[p].mean() / level[p].mean()) for p in parts)
    found = max(0.0, 1.0 - float(squared.mean()) / local) if local > 0 else 0.0
    return least * max(LEAST_NOISE, 1.0 - UNSEEN * found / (1.0 - found) if found < 1 else 0.0)


def prediction_error(squared: Array, noise: Array, level: Array, spread: Array) -> Array:
    """Variance (N,) of the predictions' own errors: non-negative least squares of what the noise leaves.

    Args:
        squared: (N,) squared residuals.
        noise: (N,) variance of the counting noise.
        level: (N,) predicted intensity.
        spread: (N,) its local variance.
    """
    from scipy.optimize import nnls

    design = np.stack([np.ones_like(level), level**2, spread], axis=1)
    scale = design.mean(0)
    scale[scale <= 0] = 1.0
    total = squared.mean()
    if total <= 0:
        return np.zeros_like(level)
    # In units of the mean square: the solver's tolerances know no unit.
    noise, squared = noise / total, squared / total
    weight = 1.0 / (noise + (design / scale).sum(1) * 0.5 + 0.1)
    solution, _ = nnls(design / scale * weight[:, None], (squared - noise) * weight)
    return (design / scale) @ solution * total
