"""Automatic ions: which m/z a set of sampled spectra shares.

Centroids: sampled centroids are counted on a fine logarithmic axis and smoothed by half the tolerance; each
maximum whose window is filled often enough, and significantly more often than its surroundings, is an ion.
Profiles: maxima of the mean spectrum, smoothed alike, that stand out of its noise. Deterministic: no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal, stats

from deepfere.measured.windows import _gaps

Spectra = Callable[[], Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]]
BINS_PER_TOLERANCE = 6
MAX_BINS = 1 << 25


@dataclass(frozen=True)
class PeakSpec:
    """How ions are found.

    Attributes:
        tolerance_ppm: Half-width of an ion's window.
        min_fraction: An ion is in at least this fraction of the sampled spectra...
        strong_fraction: ...or its mean intensity is at least this fraction of the strongest ion's (profiles:
            always required).
        min_spectra: And in at least so many of them in any case.
        false_ions: Centroids: ions that chance alone may add over the whole range (Poisson, at the rate of
            centroids in each ion's surroundings).
        snr: Profiles: prominence of a maximum over the noise of the mean spectrum.
        sample: Spectra that are looked at, at most.
    """

    tolerance_ppm: float = 5.0
    min_fraction: float = 0.01
    strong_fraction: float = 1e-3
    min_spectra: int = 3
    false_ions: float = 0.05
    snr: float = 5.0
    sample: int = 2000

    def to_dict(self, kind: str) -> dict[str, Any]:
        """What mattered for this kind of spectra, "centroid" or "profile", as the store states it."""
        unused = {"snr"} if kind == "centroid" else {"min_fraction", "min_spectra", "false_ions"}
        return {name: value for name, value in asdict(self).items() if name not in unused}


def sample_rows(n: int, spec: PeakSpec) -> NDArray[np.int64]:
    """Evenly spaced spectra, (<= spec.sample,) int64."""
    count = min(n, spec.sample)
    return np.unique((np.arange(count) + 0.5) * n / count).astype(np.int64)


def centroid_peaks(spectra: Spectra, count: int, spec: PeakSpec) -> NDArray[np.float64]:
    """Ions (M,) ascending of centroid spectra.

    Args:
        spectra: Gives the sampled spectra (m/z, intensity) each time it is called; it is called twice.
        count: How many spectra that is.
        spec: How.
    """
    low, high = np.inf, -np.inf
    for mz, value in spectra():
        present = mz[value > 0]
        if len(present):
            low, high = min(low, float(present.min())), max(high, float(present.max()))
    if not 0 < low <= high:
        return np.empty(0)
    step = spec.tolerance_ppm * 1e-6 / BINS_PER_TOLERANCE
    step = max(step, np.log(high / low) / MAX_BINS)
    bins = int(np.log(high / low) / step) + 1
    hits, total, moment = np.zeros(bins, np.int32), np.zeros(bins), np.zeros(bins)
    for mz, value in spectra():
        used = value > 0
        at = np.minimum((np.log(mz[used] / low) / step).astype(np.int64), bins - 1)
        hits[np.unique(at)] += 1
        np.add.at(total, at, value[used])
        np.add.at(moment, at, value[used] * mz[used])

    half = max(1, round(spec.tolerance_ppm * 1e-6 / step))
    window = 2 * half + 1
    filled = _box(hits, half)
    smooth = ndimage.gaussian_filter1d(hits.astype(np.float32), half / 2, mode="constant")
    top = np.flatnonzero(
        (smooth > 0) & (smooth >= _shifted(smooth, 1)) & (smooth > _shifted(smooth, -1)) & (filled > 0)
    )
    rate = _background(filled, window * 500)
    intensity = _around(total, top, half)
    often = filled[top] >= spec.min_fraction * count
    strong = intensity >= spec.strong_fraction * intensity.max(initial=0.0)
    chance = stats.poisson.sf(filled[top] - 1, rate[top])
    clear = chance * (bins / half) <= spec.false_ions
    enough = filled[top] >= min(spec.min_spectra, count)
    top = top[(often | strong) & clear & enough]
    top = _separate(top, smooth, half)
    if not len(top):
        return np.empty(0)
    centre = _around(moment, top, half) / _around(total, top, half)
    return _merge(centre, smooth[top], spec.tolerance_ppm)


def profile_peaks(spectra: Spectra, count: int, spec: PeakSpec) -> NDArray[np.float64]:
    """Ions (M,) ascending of profile spectra: maxima of the mean spectrum, at their centroid.

    Args:
        spectra: Gives the sampled spectra (m/z, intensity) each time it is called; it is called twice.
        count: How many spectra that is.
        spec: How.
    """
    axis = np.empty(0)
    for mz, _ in spectra():
        if len(mz) > len(axis):
            axis = mz
    if len(axis) < 3:
        return np.empty(0)
    # The longest spectrum's own points, filled up where it left points out: fine enough for the instrument.
    axis = _filled(np.unique(axis))
    mean = np.zeros(len(axis))
    for mz, value in spectra():
        if len(mz) < 2:
            continue
        here = np.interp(axis, mz, value, left=0.0, right=0.0)
        gap = np.flatnonzero(_gaps(np.diff(mz)))
        if len(gap):
            segment = np.clip(np.searchsorted(mz, axis, side="right") - 1, 0, len(mz) - 2)
            here[np.isin(segment, gap) & ~np.isin(axis, mz)] = 0.0
        mean += here
    mean /= count
    # Smoothed by half the tolerance, where points are that dense, as the centroids are.
    points = 0.5 * spec.tolerance_ppm * 1e-6 / float(np.median(np.diff(axis) / axis[1:]))
    if points > 0.5:
        mean = ndimage.gaussian_filter1d(mean, points, mode="nearest")
    above = mean - ndimage.median_filter(mean, size=min(len(mean) | 1, 2001), mode="nearest")
    noise = 1.4826 * float(np.median(np.abs(above)))
    if noise == 0:  # more than half of the axis is flat: what is left over is signal
        noise = 1e-6 * float(mean.max())
    limit = max(spec.snr * noise, spec.strong_fraction * float(above.max()), 1e-12)
    tops, _ = signal.find_peaks(mean, prominence=limit)
    tops = tops[above[tops] >= limit]
    centres = np.empty(len(tops))
    for k, top in enumerate(tops):
        # The centroid of what lies above half height, and no further than a few points.
        left, right = top, top
        while left > 0 and top - left < 8 and 0.5 * mean[top] < mean[left - 1] <= mean[left]:
            left -= 1
        while right < len(mean) - 1 and right - top < 8 and 0.5 * mean[top] < mean[right + 1] <= mean[right]:
            right += 1
        part = slice(left, right + 1)
        centres[k] = np.average(axis[part], weights=mean[part])
    return _merge(centres, mean[tops], spec.tolerance_ppm)


def _box(values: NDArray[Any], half: int) -> NDArray[Any]:
    """Sums over +- half bins."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.float64)])
    k = np.arange(len(values))
    return total[np.minimum(k + half + 1, len(values))] - total[np.maximum(k - half, 0)]


def _around(values: NDArray[np.float64], top: NDArray[np.int64], half: int) -> NDArray[np.float64]:
    """`_box` at some bins: added up there, since differences of running sums lose what is weak."""
    return np.pad(values, half)[top[:, None] + np.arange(2 * half + 1)].sum(axis=1)


def _shifted(values: NDArray[Any], by: int) -> NDArray[Any]:
    """``values[k - by]``, zero beyond the ends."""
    out = np.zeros_like(values)
    if by > 0:
        out[by:] = values[:-by]
    else:
        out[:by] = values[-by:]
    return out


def _background(filled: NDArray[Any], block: int) -> NDArray[np.float64]:
    """Centroids per window that the surroundings of each bin hold, ions left out (clipped block means)."""
    out = np.empty(len(filled))
    for begin in range(0, len(filled), block):
        part = filled[begin : begin + block]
        mean = float(part.mean())
        for _ in range(4):
            mean = float(part[part <= mean + 3 * np.sqrt(mean) + 1].mean())
        out[begin : begin + block] = mean
    return out


def _separate(top: NDArray[np.int64], smooth: NDArray[Any], half: int) -> NDArray[np.int64]:
    """Maxima, the higher first, that are neither within the tolerance of one kept nor in its flank."""
    kept = np.zeros(len(top), dtype=bool)
    dropped = np.zeros(len(top), dtype=bool)
    for k in np.lexsort((top, -smooth[top])):
        if dropped[k]:
            continue
        kept[k] = True
        begin, end = np.searchsorted(top, [top[k] - 3 * half, top[k] + 3 * half + 1])
        near = np.arange(begin, end)
        distance = np.abs(top[near] - top[k])
        weak = smooth[top[near]] < 0.15 * smooth[top[k]]
        dropped[near[((distance <= half) | weak) & (near != k)]] = True
    return top[kept]


def _merge(mz: NDArray[np.float64], weight: NDArray[Any], tolerance_ppm: float) -> NDArray[np.float64]:
    """Ascending m/z; those within the tolerance of one another become their weighted mean."""
    order = np.argsort(mz, kind="stable")
    out: list[list[float]] = []
    for m, w in zip(mz[order].tolist(), np.asarray(weight, float)[order].tolist(), strict=True):
        if out and m - out[-1][0] <= tolerance_ppm * 1e-6 * m:
            last, heavy = out[-1]
            out[-1] = [(last * heavy + m * w) / (heavy + w), heavy + w]
        else:
            out.append([m, w])
    return np.array([m for m, _ in out])


def _filled(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """An axis with one zero-crossing point put on either side of each gap, so that maxima stay separate."""
    step = np.diff(axis)
    gap = np.flatnonzero(_gaps(step))
    if not len(gap):
        return axis
    inner = np.minimum(step[np.maximum(gap - 1, 0)], step[np.minimum(gap + 1, len(step) - 1)])
    return np.unique(np.concatenate([axis, axis[gap] + inner, axis[gap + 1] - inner]))
