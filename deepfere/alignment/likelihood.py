"""How likely a measurement is beside a picture of the stain: a regression whose residuals resemble their neighbours'.

What a regression on the stain leaves of a measured pixel is not independent of what it leaves beside it. So a few
pixels are predicted from the picture and from the residuals around them (kriging), with the covariance of both: an
exponential correlation in space (Cressie, *Statistics for Spatial Data*, 1993, ch. 2), fitted to the residuals, and the
weights' own uncertainty. How well a place is predicted differs over a section; a variance common to the place, with
an inverse gamma prior, makes the likelihood Student's t.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepfere.alignment.refine import RIDGE

TRENDS = 3
"""Cosines per axis that take up what changes smoothly over the section."""
NEAR_PX = 4
"""Neighbours are measured pixels so far away, at most..."""
MOST_NEAR = 120
"""...and the nearest so many."""
DEGREES = 8.0
"""Degrees of freedom of the prior of a place's variance: a handful, so that twice the usual residual is nothing odd."""
LAGS_PX = ((1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (2, 1), (1, 2), (2, -1), (1, -2), (3, 0), (0, 3))
"""Displacements that the correlation of residuals is measured at."""
REACHES_PX = (0.7, 1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 10.0)
"""Lengths that its decay is chosen from."""
MOST_SHARE = 0.98
LEAST_SD = 1e-6
"""Of a feature (optical density, shares), below which it does not vary."""
LEAST_PAIRS = 10


class StainRegression:
    """Ridge of measured images on stain features and slow trends, rows left out at will.

    Args:
        images: (K, ny, nx) what was measured.
        features: (F, ny nx) footprint means of the stain as it is.
    """

    def __init__(self, images: NDArray[np.float64], features: NDArray[np.float64]) -> None:
        ny, nx = self._shape = int(images.shape[1]), int(images.shape[2])
        waves = [[np.cos(np.pi * k * (np.arange(n) + 0.5) / n) for k in range(TRENDS)] for n in (ny, nx)]
        # The first trend is constant: the intercept.
        self._trends = np.stack([np.outer(a, b).ravel() for a in waves[0] for b in waves[1]])
        self._design = np.concatenate([self._trends, features]).T
        self._targets = images.reshape(len(images), -1).T

    def fit(self, rows: NDArray[np.bool_]) -> None:
        """Use these measured pixels (ny nx,)."""
        self._rows = rows
        x = self._design[rows]
        sd = x[:, 1:].std(0)
        # Of what is the same in all rows nothing is known: no weight, whatever other pixels hold.
        self._scale = np.concatenate([[1.0], np.where(sd > LEAST_SD, sd, np.inf)])
        self._gram, self._cross = self._moments(np.flatnonzero(rows))
        weights, _ = self._solve(self._gram, self._cross, int(rows.sum()))
        residual = np.full((rows.size, self._targets.shape[1]), np.nan)
        residual[rows] = self._targets[rows] - x / self._scale @ weights
        covariance = residual[rows].T @ residual[rows] / max(1, rows.sum() - len(weights))
        # Independent components of the residuals, each with its own correlation of neighbours.
        variance, axes = np.linalg.eigh(covariance)
        self._whiten = axes / np.sqrt(np.maximum(variance, 1e-9 * variance[-1] + 1e-300))
        self._share, self._reach = correlation((residual @ self._whiten).reshape(*self._shape, -1))

    def without(self, pixels: NDArray[np.int64]) -> Prediction:
        """What the fit without these pixels (flat) predicts."""
        inside = pixels[self._rows[pixels]]
        gram, cross = self._moments(inside)
        weights, spread = self._solve(self._gram - gram, self._cross - cross, int(self._rows.sum()) - len(inside))
        rows = self._rows.copy()
        rows[inside] = False
        return Prediction(self, weights, spread, rows)

    def _moments(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        x = self._design[rows] / self._scale
        return x.T @ x, x.T @ self._targets[rows]

    def _solve(
        self, gram: NDArray[np.float64], cross: NDArray[np.float64], count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights, and their covariance in units of the residuals'."""
        penalty = RIDGE * count * np.eye(len(gram))
        penalty[0, 0] = 1e-9 * count
        inverse = np.asarray(np.linalg.inv(gram + penalty), np.float64)
        return inverse @ cross, inverse


class Prediction:
    """A fit that has not seen some pixels; made by `StainRegression.without`."""

    def __init__(
        self,
        regression: StainRegression,
        weights: NDArray[np.float64],
        spread: NDArray[np.float64],
        rows: NDArray[np.bool_],
    ) -> None:
        self._of, self._weights, self._spread = regression, weights, spread
        self._rows = rows.reshape(regression._shape)

    def log_ratio(self, pixels: NDArray[np.int64], features: NDArray[np.float64]) -> float:
        """Log likelihood of some pixels (n, flat) beside other features (F, ny nx), less that beside their own.

        Without the normalising determinants: what the regression does not know would count against a picture.
        """
        of, n = self._of, len(pixels)
        near = self._neighbours(pixels)
        y, x = np.divmod(np.concatenate([pixels, near]), of._shape[1])
        apart = np.hypot(y[:, None] - y, x[:, None] - x)
        reaches, which = np.unique(of._reach, return_inverse=True)
        correlated = of._share[:, None, None] * np.exp(-apart / reaches[:, None, None])[which]
        correlated[:, np.arange(len(y)), np.arange(len(y))] = 1.0
        around = of._design[near] / of._scale
        known = (of._targets[near] - around @ self._weights) @ of._whiten
        own = np.concatenate([of._trends[:, pixels], features[:, pixels]]).T / of._scale
        pictures = (of._design[pixels] / of._scale, own)
        # Far from all that it was fitted to, the regression does not know.
        unsure = self._spread @ around.T
        across = [correlated[:, :n, n:] + here @ unsure for here in pictures]
        given = np.concatenate([known.T[..., None], *(np.swapaxes(block, 1, 2) for block in across)], 2)
        # Both pictures have the same neighbours: one solve.
        solved = np.linalg.solve(correlated[:, n:, n:] + around @ unsure, given)
        distance = []
        for number, (here, block) in enumerate(zip(pictures, across, strict=True)):
            left = (of._targets[pixels] - here @ self._weights) @ of._whiten
            rest = left.T[..., None] - block @ solved[..., :1]
            drawn = block @ solved[..., 1 + number * n : 1 + (number + 1) * n]
            conditional = correlated[:, :n, :n] + here @ self._spread @ here.T - drawn
            # Squared Mahalanobis distance, summed over the independent components.
            distance.append(float((rest * np.linalg.solve(conditional, rest)).sum()))
        count = n * len(of._share)
        return (DEGREES + count) / 2 * float(np.log((DEGREES + distance[0]) / (DEGREES + distance[1])))

    def _neighbours(self, pixels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The nearest measured pixels (flat) that the fit has seen."""
        y, x = np.divmod(pixels, self._of._shape[1])
        low = np.maximum([y.min() - NEAR_PX, x.min() - NEAR_PX], 0)
        window = self._rows[low[0] : y.max() + NEAR_PX + 1, low[1] : x.max() + NEAR_PX + 1]
        at = np.argwhere(window) + low
        apart = np.hypot(at[:, :1] - y, at[:, 1:] - x).min(1, initial=np.inf)
        nearest = np.argsort(apart, kind="stable")[:MOST_NEAR]
        nearest = nearest[apart[nearest] <= NEAR_PX]
        return at[nearest, 0] * self._of._shape[1] + at[nearest, 1]


def correlation(residuals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Exponential correlation in space of unit-variance residuals (ny, nx, K), NaN where unknown.

    Returns:
        Correlated share of the variance (K,), the rest is noise; and length of the decay (K,), in pixels. By least
        squares over `LAGS_PX`, the length out of `REACHES_PX`.
    """
    ny, nx, k = residuals.shape
    apart, seen = [], []
    for dy, dx in LAGS_PX:
        first = residuals[dy:, max(dx, 0) : nx + min(dx, 0)]
        second = residuals[: ny - dy, max(-dx, 0) : nx - max(dx, 0)]
        product = (first * second).reshape(-1, k)
        product = product[np.isfinite(product).all(1)]
        if len(product) >= LEAST_PAIRS:
            apart.append(np.hypot(dy, dx))
            seen.append(product.mean(0))
    best, share, reach = np.full(k, np.inf), np.zeros(k), np.ones(k)
    if not seen:
        return share, reach
    lags, means = np.array(apart), np.array(seen)
    for length in REACHES_PX:
        decay = np.exp(-lags / length)
        fitted = np.clip(decay @ means / (decay**2).sum(), 0.0, MOST_SHARE)
        error = ((means - decay[:, None] * fitted) ** 2).sum(0)
        better = error < best
        best[better], share[better], reach[better] = error[better], fitted[better], length
    return share, reach
