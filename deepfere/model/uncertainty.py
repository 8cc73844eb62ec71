"""How far a reconstructed pixel may be off: learned between two and one measured pixels, carried to finer ones.

The errors at reduced scale hold two things that grow differently on the way to smaller pixels. Structure: images of
natural things carry about the same variance in every octave (D. J. Field, J. Opt. Soc. Am. A 4, 2379 (1987)), so each
halving of the pixel adds once what was seen. Counting noise: a pixel of a quarter of the area counts a quarter of the
ions, so that per unit of intensity its variance is four times as large. Last, all are multiplied so that intervals
hold at reduced scale what they promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.operator import cell_means, fill_missing

Array = NDArray[np.float64]

NORMAL_80 = 1.2815515655446004
"""Half the width of a normal distribution's central 80 %, in standard deviations."""
PRESENT = 0.3
"""Ions in a smaller share of the pixels do not count when all are judged together: most of what they hold is zero."""
MOST_SCALE = 2.0
"""Largest factor on standard deviations: what needs more has no intervals of this kind."""
ROUNDING = 1e-6
"""Errors up to this share of an ion's largest intensity are of the numbers, not of the tissue."""
_CALIBRATED_BY = 50_000  # pixels of an ion that are looked at
_LEVELS = 8
_LEAST_PER_LEVEL = 50
_AROUND_PX = 2.0
_QUARTILE = 0.1015  # the lower quartile of a chi-square with one degree of freedom
_COUNTING = 0.02  # share of zeros from which single ions are counted: few values, no quartile
_LEAST_TELLING = 8  # ions that show what one detected ion is worth, at least, before they speak for others
PULSE = 2.0
"""Noise quantum over the intensity of one detected ion, at most.

Pulses of single ions vary like an exponential distribution at most, for which the variance of a sum per unit of its
mean, E[x^2] / E[x], is twice the mean pulse.
"""


def without_centre(image: Array, mask: NDArray[np.bool_], scale_px: float) -> Array:
    """Gaussian average over the measured pixels around each pixel, itself left out; 0 where there are none."""
    from scipy.ndimage import gaussian_filter

    radius = int(4.0 * scale_px + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / scale_px) ** 2)
    centre = float(kernel[radius] / kernel.sum()) ** 2
    weight = mask.astype(np.float64)
    filled = np.where(mask, image, 0.0)
    total = gaussian_filter(filled, scale_px, mode="constant", radius=radius) - centre * filled
    count = gaussian_filter(weight, scale_px, mode="constant", radius=radius) - centre * weight
    return np.where(count > 1e-6, total / np.maximum(count, 1e-6), 0.0)


def local_variance(cells: Array) -> Array:
    """Variance over 3 x 3 neighbours of (..., ny, nx), edges repeated."""
    padded = np.pad(cells, [(0, 0)] * (cells.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    stack = [padded[..., a : a + cells.shape[-2], b : b + cells.shape[-1]] for a in range(3) for b in range(3)]
    return np.stack(stack).var(0)


def variance_model(image: Array, truth: Array, spread: Array) -> Array:
    """Non-negative least squares of squared errors on 1, the level and the local variance.

    Args:
        image: (N,) reconstructed pixels.
        truth: (N,) what was measured there.
        spread: (N,) local variance of the coarse pixels around.

    Returns:
        (c0, c1, c2): variance = c0 + c1 max(image, 0) + c2 spread.
    """
    from scipy.optimize import nnls

    design = np.stack([np.ones_like(image), np.maximum(image, 0), spread], -1)
    scale = design.mean(0)
    scale[scale <= 0] = 1.0
    squared = (image - truth) ** 2
    level = squared.mean()
    if level <= 0:
        return np.zeros(3)
    # Weighted towards relative errors: squared errors are as uncertain as they are large.
    # In units of the mean square: the solver's tolerances know no unit.
    weight = 1.0 / (0.1 + (design / scale).mean(1))
    solution, _ = nnls(design / scale * weight[:, None], squared / level * weight)
    return solution * level / scale


def scale_needed(image: Array, truth: Array, variance: Array) -> float:
    """By how much standard deviations have to be multiplied for 80 % intervals to hold 80 % of what was measured.

    Intervals end at 0, and zeros on that end count half (conformal calibration: Vovk et al. 2005).

    Args:
        image: (N,) reconstructed pixels.
        truth: (N,) what was measured there.
        variance: (N,) of their difference, as it is expected.

    Returns:
        Infinite where half of the zeros is more than a fifth; not a number where there is no error but rounding.
    """
    if not len(image) or (variance <= (ROUNDING * np.abs(truth).max()) ** 2).all():
        return math.nan
    step = -(-len(image) // _CALIBRATED_BY)
    image, truth, variance = image[::step], truth[::step], variance[::step]
    away = np.abs(truth - image) / (NORMAL_80 * np.sqrt(np.maximum(variance, np.finfo(float).tiny)))
    order = np.argsort(away, kind="stable")
    held = np.cumsum(np.where(truth > 0, 1.0, 0.5)[order]) / len(truth)
    last = int(np.searchsorted(held, 0.8))
    return float(away[order[last]]) if last < len(held) else math.inf


def common_scale(needed: Array, present: Array) -> float:
    """`scale_needed` of the ions together: at least 1, as no error is to be made small, and at most `MOST_SCALE`.

    Args:
        needed: (M,) of each ion.
        present: (M,) share of the pixels in which it is.
    """
    counting = needed[(present > PRESENT) & ~np.isnan(needed)]
    if not len(counting):
        return 1.0
    return float(np.clip(np.quantile(counting, 0.5, method="lower"), 1.0, MOST_SCALE))


def noise_quantum(cell: Array, mask: NDArray[np.bool_]) -> float:
    """Counting noise of one ion: variance per unit of intensity in a measured pixel.

    The least of two kinds of estimates, both too large where there is structure; where there is none, the least of
    several is somewhat small (pure counting noise: 0.6 to 0.9 of it). Second differences along rows and columns hold
    the noise and some structure; pixels of some level, wherever they lie, hold the least of that. Where an ion is
    absent in places and several pixels hold nearly its least intensity, that is what one detected ion is worth (a
    count, or a threshold).

    Args:
        cell: (ny, nx) intensities.
        mask: (ny, nx) True where measured.

    Returns:
        Intensity units; 0 where nothing was seen.
    """
    if not (cell[mask] > 0).any():
        return 0.0
    bounds = _difference_bounds(fill_missing(np.asarray(cell, np.float64), mask), mask)
    least = min([*bounds, single_pulse(cell, mask)])
    return least if math.isfinite(least) else 0.0


def averaged_ratio(cell: Array, mask: NDArray[np.bool_]) -> float:
    """What is left of the variance at the scale of a pixel when 2 x 2 pixels are averaged.

    A quarter of noise that is independent from pixel to pixel; of structure about all, or more.

    Args:
        cell: (ny, nx) intensities.
        mask: (ny, nx) True where measured.

    Returns:
        Ratio of the bounds of `noise_quantum` by second differences, mean over the four ways to pair pixels; NaN where
        there is nothing to compare.
    """
    coarse, levels = [], _LEVELS
    for y, x in ((0, 0), (1, 0), (0, 1), (1, 1)):
        ny, nx = ((n - skip) // 2 * 2 for n, skip in zip(mask.shape, (y, x), strict=True))
        part = np.s_[y : y + ny, x : x + nx]
        whole = cell_means(mask[part].astype(np.float64), 2) == 1
        if whole.any():
            means = cell_means(np.asarray(cell, np.float64)[part], 2)
            bounds = _difference_bounds(fill_missing(means, whole), whole)
            coarse.append(min(bounds, default=math.nan))
            levels = min(levels, max(1, len(bounds)))
    # The least of as many: of more it would be less.
    fine = _difference_bounds(fill_missing(np.asarray(cell, np.float64), mask), mask, levels)
    if not coarse or not min(fine, default=0.0) > 0:
        return math.nan
    return float(np.mean(coarse)) / min(fine)


def single_pulse(cell: Array, mask: NDArray[np.bool_]) -> float:
    """The noise quantum by what one detected ion is worth, as for `noise_quantum`; infinite where that is not seen."""
    values = cell[mask]
    positive = np.sort(values[values > 0])
    if (values <= 0).sum() < 3 or not len(positive):
        return math.inf
    alike = int((positive <= 2 * positive[0]).sum())
    return PULSE * float(positive[0]) if alike >= max(4, 0.005 * len(positive)) else math.inf


def detectors_pulse(pulses: Array) -> float:
    """The noise quantum that an instrument gives to all ions alike; infinite where they do not say that it does.

    What one detected ion is worth is a property of the detector. Where many ions show it and agree (half of them within
    a factor of two), the others have it as well, however much their own structure looks like noise.

    Args:
        pulses: (M,) `single_pulse` of every ion.

    Returns:
        Intensity units: nine tenths of those that were seen are below.
    """
    seen = pulses[np.isfinite(pulses)]
    if len(seen) < _LEAST_TELLING:
        return math.inf
    low, high, most = np.quantile(seen, (0.25, 0.75, 0.9))
    return float(most) if high <= 2 * low else math.inf


def _difference_bounds(image: Array, mask: NDArray[np.bool_], most: int = _LEVELS) -> list[float]:
    """Variance of second differences over intensity, for pixels of similar surroundings, at so many levels at most."""
    # Sorted by what lies around and not by their own level, which would sort the noise as well.
    around = without_centre(image, mask, _AROUND_PX)
    columns: list[list[NDArray[Any]]] = [[], [], [], []]
    for axis in (0, 1):
        a, ok, near = np.moveaxis(image, axis, 0), np.moveaxis(mask, axis, 0), np.moveaxis(around, axis, 0)
        whole = ok[2:] & ok[1:-1] & ok[:-2]
        # The s.d. of a second difference is sqrt(6) of the noise's.
        squared = (a[2:] - 2 * a[1:-1] + a[:-2]) ** 2 / 6
        level = (a[2:] + a[1:-1] + a[:-2]) / 3
        empty = np.minimum(np.minimum(a[2:], a[1:-1]), a[:-2]) <= 0
        for column, x in zip(columns, (squared, level, empty, near[1:-1]), strict=True):
            column.append(x[whole])
    every: list[NDArray[Any]] = [np.concatenate(column) for column in columns]
    out: list[float] = []
    squares, levels, empties, nears = every
    if len(levels):
        count = int(np.clip(len(levels) // _LEAST_PER_LEVEL, 1, most))
        for part in np.array_split(np.argsort(nears, kind="stable"), count):
            mean = float(levels[part].mean())
            if mean <= 0:
                continue
            # The quartile sees little of edges, but needs values that are not all the same few.
            counting = empties[part].mean() > _COUNTING
            found = squares[part].mean() if counting else np.quantile(squares[part], 0.25) / _QUARTILE
            out.append(float(found) / mean)
    return out


@dataclass(frozen=True)
class NoiseModel:
    """What the variance of one ion's pixels of any size follows from.

    Attributes:
        structure: (c0, c1, c2) variance per octave: c0 + c1 level + c2 local variance.
        quantum: Counting noise, variance per unit of intensity in a measured pixel.
        rare: Variance in a measured pixel from what was never seen near it.
    """

    structure: tuple[float, float, float]
    quantum: float
    rare: float

    @classmethod
    def of(cls, coefficients: Array, cell: Array, mask: NDArray[np.bool_]) -> NoiseModel:
        """From an ion's `variance_model` at ratio 2 and its intensities (ny, nx)."""
        c0, c1, c2 = (float(c) for c in coefficients)
        quantum = noise_quantum(cell, mask)
        values = cell[mask]
        seen, absent = values[values > 0], int((values <= 0).sum())
        # Where an ion was never seen nearby it may still turn up: once in all such pixels, at its least intensity
        # (Laplace's rule of succession).
        rare = float(seen.min()) ** 2 / (absent + 2) if absent and len(seen) else 0.0
        return cls((c0, max(c1 - quantum, 0.0), c2), quantum, rare)

    @classmethod
    def of_row(cls, row: Array) -> NoiseModel:
        """From the five numbers of `row`."""
        c0, c1, c2, quantum, rare = (float(v) for v in row)
        return cls((c0, c1, c2), quantum, rare)

    def row(self) -> Array:
        """(5,) as stored."""
        return np.array([*self.structure, self.quantum, self.rare])

    def variance(self, level: Array, spread: Array, factor: float) -> Array:
        """Variance of pixels ``factor`` times finer than the measured ones (below 1: coarser).

        Args:
            level: Intensity, at least 0.
            spread: Local variance of the measured pixels around.
            factor: Measured pixel size over pixel size.
        """
        octaves = max(math.log2(factor), 0.0)
        c0, c1, c2 = self.structure
        # What turns up lies in one fine pixel, whole: its mean square goes with the pixel's area, inverted.
        constant = max(c0 * octaves, self.rare * factor**2)
        return constant + (c1 * octaves + self.quantum * factor**2) * level + c2 * octaves * spread
