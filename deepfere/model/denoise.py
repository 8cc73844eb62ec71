"""The denoised mode: what a measured pixel would hold without its counting noise, as far as others tell.

Each pixel of each ion is predicted without looking at it: from the pixels around it, from the other ions there, and
from the stain. Where such a prediction is as good as the noise lets one see, it is taken; where it is not (a hot spot
that nothing else shows), the measurement stands. Between the two the weight is that of the best linear estimate
(Wiener), with the counting noise of the pixel and the prediction's own error there. A prediction that never saw the
pixel's noise makes the residual's reduced chi-square, per degree of freedom given up, one where the noise is right.
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
from deepfere.model.uncertainty import local_variance, noise_quantum, without_centre

Array = NDArray[np.float64]

SCALES_PX = (0.6, 0.8, 1.0, 1.4, 2.0, 3.0, 4.5)
PENALTIES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
CAUTION = 0.7
"""Share of the noise quantum that is believed: structure makes it too large, and too much smoothing costs more."""
SURPRISE_SD = 3.5
"""Standard deviations beyond which a pixel refutes its prediction."""
LEAST_PX = 200
"""Measured pixels below which nothing is taken away: noise and structure cannot be told apart."""
_GROUPS = 4
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
    if mask.sum() < LEAST_PX:
        return Denoised(out, chi_square, share)
    group, scores = _scores(cube, mask, seed)
    stain = np.zeros((0, int(mask.sum()))) if features is None else features[:, mask]
    block = spatial_blocks(mask, 4)[mask]
    for m in range(len(cube)):
        image = np.asarray(cube[m], np.float64)
        quantum = CAUTION * noise_quantum(image, mask)
        values = image[mask]
        if quantum <= 0 or (values < 0).any() or not np.ptp(values) > 0:
            continue
        around = np.stack([without_centre(image, mask, s)[mask] for s in SCALES_PX])
        predicted = predict(np.concatenate([around, scores[group[m]], stain]).T, values, block)
        level = np.maximum(predicted, _FLOOR * values.mean())
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
        if given_up > 0:
            chi_square[m] = float(((values - estimate) ** 2 / noise).mean()) / given_up
        share[m] = given_up
        out[m][mask] = np.maximum(estimate, 0.0)
    return Denoised(out, chi_square, share)


def _scores(cube: NDArray[np.floating], mask: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.int64], list[Array]]:
    """The group of each ion, and for each group what the ions outside it show: (S, N) noise-weighted scores."""
    table = np.asarray(cube[:, mask], np.float64)
    sd = noise_sd(cube, mask)
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


def predict(columns: Array, values: Array, block: NDArray[np.int64]) -> Array:
    """Ridge prediction of each value by a fit that left its spatial block out; the best of `PENALTIES`.

    Args:
        columns: (N, F).
        values: (N,).
        block: (N,) block numbers.
    """
    spread = columns.std(0)
    x = (columns - columns.mean(0)) / np.where(spread > 1e-12 * (np.abs(columns).max(0) + 1e-300), spread, np.inf)
    x, t = np.column_stack([x, np.ones(len(x))]), values
    ridge = np.diag([1.0] * columns.shape[1] + [0.0]) * len(t)  # the intercept is free
    inside = [np.flatnonzero(block == b) for b in np.unique(block)]
    gram, cross = x.T @ x, x.T @ t
    grams = np.stack([gram - x[rows].T @ x[rows] for rows in inside])
    crosses = np.stack([cross - x[rows].T @ t[rows] for rows in inside])
    best, least = np.zeros_like(t), math.inf
    for penalty in PENALTIES:
        weights = np.linalg.solve(grams + penalty * ridge, crosses[..., None])[..., 0]
        predicted = np.zeros_like(t)
        for rows, weight in zip(inside, weights, strict=True):
            predicted[rows] = x[rows] @ weight
        error = float(((predicted - t) ** 2).mean())
        if error < least:
            best, least = predicted, error
    return best


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
