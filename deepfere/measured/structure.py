"""Whether an ion differs from pixel to pixel in an orderly way: the correlation of neighbouring pixels of a sample.

Moran's I (Biometrika 1950) with its mean and variance over all permutations of the pixels (Cliff & Ord, Spatial
Processes, 1981): no random numbers. An ion is given up only where the sample could have shown structure and shows none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.raster import Raster, first_of_pixels

LEAST = 0.15
"""Correlation of neighbours that an ion without structure has to be proven to stay below."""
PROOF, SEEN = 3.0, 2.0
"""Certainty of that proof, and of structure where it is seen, in standard deviations: what is doubtful stays."""
MOST_KURTOSIS = 20.0
"""Beyond it a few pixels decide what the correlation is (one in twenty of a spot and nothing): it proves nothing."""
IONS = 256
"""Ions that are looked at together."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the sample of one section says of M ions.

    Attributes:
        pairs: (M,) pairs of neighbours; 0 where an ion is the same in all pixels.
        correlation: (M,) of neighbours, the larger one of intensities and of their ranks.
        sigmas: (M,) the largest of intensities and ranks, along and across, over chance.
        peaked: (M,) whether a few pixels decide.
    """

    pairs: NDArray[np.int64]
    correlation: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    peaked: NDArray[np.bool_]


def neighbours(raster: Raster, most: int) -> tuple[NDArray[np.int64], Pairs, Pairs]:
    """A sample of spectra that holds neighbours: all, or blocks of 2 x 2 pixels, evenly over the image.

    Args:
        raster: Of all spectra; of several of a pixel the first is taken.
        most: Spectra at most.

    Returns:
        Spectra (n,) ascending, and which of these are neighbours, along and across the rows; none of a large image in
        which no four pixels are.
    """
    chosen = raster.mask
    if chosen.sum() > most:
        whole = chosen[:-1, :-1] & chosen[1:, :-1] & chosen[:-1, 1:] & chosen[1:, 1:]
        corners = np.flatnonzero(whole)
        count = min(len(corners), most // 4)
        evenly = ((np.arange(count) + 0.5) * len(corners) / max(count, 1)).astype(np.int64)
        y, x = np.divmod(corners[evenly], max(whole.shape[1], 1))
        chosen = np.zeros_like(chosen)
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            chosen[y + dy, x + dx] = True
    first = first_of_pixels(raster, np.flatnonzero(chosen))
    rows = np.sort(first)
    place = np.full(raster.shape_px, -1, np.int32)
    place[chosen] = np.searchsorted(rows, first)

    def pairs(one: NDArray[np.int32], other: NDArray[np.int32]) -> Pairs:
        both = (one >= 0) & (other >= 0)
        return one[both].astype(np.int64), other[both].astype(np.int64)

    return rows, pairs(place[:, :-1], place[:, 1:]), pairs(place[:-1], place[1:])


def evidence(values: NDArray[np.float32], along: Pairs, across: Pairs) -> Evidence:
    """What sampled images say.

    Args:
        values: (n, M) intensities.
        along: Neighbours in rows of the image, places in ``values``.
        across: Neighbours in its columns.
    """
    starts = range(0, values.shape[1], IONS)
    parts = [_evidence(values[:, k : k + IONS].astype(np.float64), along, across) for k in starts]
    return Evidence(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def nothing_seen(ions: int) -> Evidence:
    """That of an image without neighbours."""
    nothing = np.zeros(ions)
    return Evidence(nothing.astype(np.int64), nothing, nothing, nothing.astype(bool))


def structured(sections: Iterable[Evidence], count: int) -> NDArray[np.bool_]:
    """Which ions (M,) are kept: all but those whose neighbours are proven not to correlate, in no section.

    Args:
        sections: Evidence of each, all of the same ions.
        count: Number of sections.
    """
    from scipy.stats import norm

    limit = float(norm.isf(norm.sf(SEEN) / count))
    seen: NDArray[np.bool_] | bool = False
    pairs: NDArray[np.int64] | int = 0
    total: NDArray[np.float64] | float = 0.0
    for one in sections:
        seen = seen | (one.sigmas >= limit) | one.peaked
        pairs, total = pairs + one.pairs, total + one.pairs * one.correlation
    known = np.maximum(pairs, 1)
    absent = (np.asarray(pairs) > 0) & (np.maximum(total / known, 0) + PROOF / np.sqrt(known) < LEAST)
    return np.asarray(seen | ~absent)


def _evidence(x: NDArray[np.float64], along: Pairs, across: Pairs) -> tuple[NDArray[np.generic], ...]:
    from scipy.stats import rankdata

    number, m = len(along[0]) + len(across[0]), x.shape[1]
    centred = x - x.mean(0)
    second = (centred**2).mean(0)
    varies = np.ptp(x, axis=0) > 0
    correlation, sigmas = np.full(m, -1.0), np.full(m, -np.inf)
    for values in (x, rankdata(x, axis=0)):
        found = np.zeros(m)
        for pairs in (along, across):
            if len(pairs[0]):
                here, over = _moran(values, pairs)
                found += here * len(pairs[0]) / number
                sigmas = np.maximum(sigmas, np.where(varies, over, 0))
        correlation = np.maximum(correlation, np.where(varies, found, 0))
    fourth = (centred**4).mean(0)
    peaked = varies & (fourth > MOST_KURTOSIS * second**2)
    return np.where(varies, number, 0), correlation, sigmas, peaked


def _moran(x: NDArray[np.float64], pairs: Pairs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Correlation (M,) of pairs of pixels, and how many s.d. of its permutations it lies above their mean."""
    n, (i, j) = len(x), pairs
    z = x - x.mean(0)
    scale = np.sqrt((z**2).mean(0))
    z /= np.where(scale > 0, scale, 1)
    total, fourth, p = (z[i] * z[j]).sum(0), (z**4).sum(0), len(i)
    degree = np.bincount(np.concatenate([i, j]), minlength=n)
    touching = float((degree * (degree - 1)).sum())  # ordered pairs of pairs that share a pixel
    # Means over permutations of z1 z2, (z1 z2)^2, z1^2 z2 z3 and z1 z2 z3 z4, all of different pixels; sum z^2 = n.
    one = -1 / (n - 1)
    same = (n**2 - fourth) / (n * (n - 1))
    shared = (2 * fourth - n**2) / (n * (n - 1) * max(n - 2, 1))
    apart = (3 * n**2 - 6 * fourth) / (n * (n - 1) * max(n - 2, 1) * max(n - 3, 1))
    variance = p * same + touching * shared + (p**2 - p - touching) * apart - (p * one) ** 2
    return total / p, (total - p * one) / np.sqrt(np.maximum(variance, 1e-12))
