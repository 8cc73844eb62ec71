"""Automatic ions: which m/z the sampled spectra of one section, or of all sections of a study, share.

Centroids: sampled centroids are counted on a fine logarithmic axis and smoothed by half the tolerance; each
maximum whose window is filled often or strongly enough, significantly more often than its surroundings, and out of
their noise, is an ion. Profiles: maxima of the mean spectrum, smoothed alike, that stand out of its noise, and those of
how high spectra reach (what few pixels show, and strongly). Of several sections, an ion is what is one in all of them
taken together, or in one of them. Deterministic: no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepfere.errors import InputError
from deepfere.measured.sampled import Bins, CentroidSample, PeakSpec, ProfileSample, Sample, interpolated
from deepfere.measured.tolerance import Tolerance

Samples = Callable[[], Iterable[Sample]]


@dataclass(frozen=True)
class SharedIons:
    """Ions that were found over several sections.

    Attributes:
        mz: (M,) ascending.
        peaks: How, as the store states it.
    """

    mz: NDArray[np.float64]
    peaks: dict[str, Any]


def find_ions(samples: Samples, spec: PeakSpec) -> NDArray[np.float64]:
    """Ions (M,) ascending.

    Args:
        samples: Gives the samples of the sections each time it is called, all of centroids or all of profiles and
            always in the same order (sums depend on it in their last digits); one of them is held at a time.
        spec: How.
    """
    profiles = isinstance(next(iter(samples())), ProfileSample)
    ions = _profile_ions(samples, spec) if profiles else _centroid_ions(samples, spec)
    low, high = spec.mz_range or (0.0, np.inf)
    return ions[(ions >= low) & (ions <= high)]


def found_ions(sample: Sample, spec: PeakSpec, where: object) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The ions (M,) that one section's sample shows, ascending, and how they were found.

    Raises:
        InputError: There is none.
    """
    ions = find_ions(lambda: [sample], spec)
    if not len(ions):
        refuse_none(spec, where)
    return ions, {"ions": "automatic", "peaks": {**spec.to_dict(sample.kind), "sampled_spectra": sample.spectra}}


def refuse_none(spec: PeakSpec, where: object) -> None:
    """Say that no ion was found."""
    raise InputError(
        f"no m/z recurs within {spec.tolerance} in {spec.min_fraction:.0%} of its spectra (at least 3)",
        where=where,
        remedy="give --mz or a wider --tolerance-ppm",
    )


def _centroid_ions(samples: Samples, spec: PeakSpec) -> NDArray[np.float64]:
    all_bins, count, sections = Bins(), 0, 0
    for sample in samples():
        assert isinstance(sample, CentroidSample)
        all_bins.add(sample.at, sample.hits, sample.total, sample.moment, sample.high)
        count, sections = count + sample.spectra, sections + 1
    if not len(all_bins.hits):
        return np.empty(0)
    half = spec.half_bins
    smooth = ndimage.gaussian_filter1d(all_bins.hits.astype(np.float32), half / 2, mode="constant")
    top = np.flatnonzero((smooth > 0) & (smooth >= _shifted(smooth, 1)) & (smooth > _shifted(smooth, -1)))
    kept = _evident(all_bins, top, count, spec, spec.false_ions)
    if sections > 1:
        for sample in samples():
            assert isinstance(sample, CentroidSample)
            own = sample.bins()
            at = top + (all_bins.first - own.first)
            inside = np.flatnonzero((at >= 0) & (at < len(own.hits)))
            kept[inside] |= _evident(own, at[inside], sample.spectra, spec, spec.false_ions / sections)
    top = _separate(top[kept], smooth, half)
    if not len(top):
        return np.empty(0)
    centre = _around(all_bins.moment, top, half) / _around(all_bins.total, top, half)
    return _merge(centre, smooth[top], spec.tolerance)


def _evident(bins: Bins, top: NDArray[np.int64], count: int, spec: PeakSpec, false_ions: float) -> NDArray[np.bool_]:
    """Which maxima are filled often enough, or strongly, and more often than chance fills them."""
    from scipy.stats import poisson

    half = spec.half_bins
    filled = _box(bins.hits, half)
    rate, noise = _background(filled, _box(bins.total, half), (2 * half + 1) * 500, spec.snr)
    here, intensity = filled[top], _around(bins.total, top, half)
    high = np.pad(bins.high, half)[top[:, None] + np.arange(2 * half + 1)].max(axis=1)
    often = here >= spec.min_fraction * count
    strong = intensity >= spec.strong_fraction * intensity.max(initial=0.0)
    bright = high >= spec.bright_fraction * high.max(initial=0.0)
    clear = poisson.sf(here - 1, rate[top]) * (len(bins.hits) / half) <= false_ions
    enough = here >= max(1, min(spec.min_spectra, count))
    return (often | strong | bright) & clear & (intensity >= noise[top]) & enough


def _profile_ions(samples: Samples, spec: PeakSpec) -> NDArray[np.float64]:
    axis = _common_axis(samples)
    mean, high, count, alone = np.zeros(len(axis)), np.zeros(len(axis)), 0, []
    for sample in samples():
        assert isinstance(sample, ProfileSample)
        if len(sample.axis) > 2:
            mean += sample.spectra * interpolated(axis, sample.axis, sample.mean)
            high = np.maximum(high, interpolated(axis, sample.axis, sample.high))
            alone.append(_shown(sample.axis, sample.mean, sample.high, spec))
        count += sample.spectra
    if not alone:
        return np.empty(0)
    ions = _shown(axis, mean / count, high, spec)
    if len(alone) > 1:
        # What a single section shows, and all together hide.
        for found in alone:
            ions = _and_others(ions, found, spec)
    return ions


def _shown(
    axis: NDArray[np.float64], mean: NDArray[np.float64], high: NDArray[np.float64], spec: PeakSpec
) -> NDArray[np.float64]:
    """Maxima of a mean spectrum, and of how high spectra reach those that the mean hides: none of its ions is near."""
    ions = _maxima(axis, mean, spec)[0]
    found, reach = _maxima(axis, high, spec, alone=True)
    return _and_others(ions, found[_distance_da(found, ions) > reach], spec)


def _and_others(ions: NDArray[np.float64], found: NDArray[np.float64], spec: PeakSpec) -> NDArray[np.float64]:
    """Ions, and what was found beyond the tolerance of each."""
    return np.sort(np.concatenate([ions, found[_distance_da(found, ions) > spec.tolerance.half_da(found)]]))


def _common_axis(samples: Samples) -> NDArray[np.float64]:
    """The axis of the section with the most points, and points of others beyond its ends."""
    axis = np.empty(0)
    for sample in samples():
        assert isinstance(sample, ProfileSample)
        if len(sample.axis) > len(axis):
            axis = sample.axis
    for sample in samples():
        assert isinstance(sample, ProfileSample)
        if len(axis) and len(sample.axis):
            beyond = sample.axis[(sample.axis < axis[0]) | (sample.axis > axis[-1])]
            axis = np.sort(np.concatenate([axis, beyond]))
    return axis


def _nearest(mz: NDArray[np.float64], ions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of some m/z, none of them if there is no ion, is the nearest to each ion."""
    return np.array([int(np.abs(mz - ion).argmin()) for ion in ions], dtype=np.int64)


def _distance_da(mz: NDArray[np.float64], ions: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each m/z is from the nearest ion; infinite where there is none."""
    if not len(ions):
        return np.full(len(mz), np.inf)
    k = np.clip(np.searchsorted(ions, mz), 1, max(1, len(ions) - 1))
    return np.minimum(np.abs(ions[k - 1] - mz), np.abs(ions[np.minimum(k, len(ions) - 1)] - mz))


def _maxima(
    axis: NDArray[np.float64], mean: NDArray[np.float64], spec: PeakSpec, alone: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Maxima of a mean spectrum, at their centroid, and their width at half height.

    ``alone`` takes bright ones that stand in no other's flank.
    """
    from scipy import signal

    # Smoothed by half the tolerance, where points are that dense, as the centroids are.
    points = 0.5 * spec.tolerance_ppm * 1e-6 / float(np.median(np.diff(axis) / (axis[1:] + spec.offset_da)))
    if points > 0.5:
        mean = ndimage.gaussian_filter1d(mean, points, mode="nearest")
    above = mean - ndimage.median_filter(mean, size=min(len(mean) | 1, 2001), mode="nearest")
    noise = 1.4826 * float(np.median(np.abs(above)))
    if noise == 0:  # more than half of the axis is flat: what is left over is signal
        noise = 1e-6 * float(mean.max())
    fraction = spec.bright_fraction if alone else spec.strong_fraction
    limit = max(spec.snr * noise, fraction * float(above.max()), 1e-12)
    tops, found = signal.find_peaks(mean, prominence=limit)
    tops = tops[(above[tops] >= limit) & (found["prominences"] >= alone * 0.5 * above[tops])]
    centres = np.array([peak_centre(axis, mean, int(top)) for top in tops])
    ions = _merge(centres, mean[tops], spec.tolerance)
    if not alone:
        return ions, np.zeros(len(ions))
    _, _, left, right = signal.peak_widths(mean, tops)
    places = np.arange(len(axis))
    width = np.interp(right, places, axis) - np.interp(left, places, axis)
    return ions, width[_nearest(centres, ions)]


def peak_centre(m: NDArray[np.float64], v: NDArray[np.float64], top: int) -> float:
    """Centre of what lies above half height around a maximum, the profile taken as straight lines."""
    half = 0.5 * v[top]
    left = right = top
    while left > 0 and half < v[left - 1] <= v[left]:
        left -= 1
    while right < len(v) - 1 and half < v[right + 1] <= v[right]:
        right += 1
    x, y = m[left : right + 1], v[left : right + 1] - half
    if left > 0 and v[left - 1] <= half:  # where the line crosses half height
        x = np.insert(x, 0, np.interp(half, v[left - 1 : left + 1], m[left - 1 : left + 1]))
        y = np.insert(y, 0, 0.0)
    if right < len(v) - 1 and v[right + 1] <= half:
        x = np.append(x, np.interp(half, v[right + 1 : right - 1 : -1], m[right + 1 : right - 1 : -1]))
        y = np.append(y, 0.0)
    h, y0, y1 = np.diff(x), y[:-1], y[1:]
    area = (h * (y0 + y1)).sum() / 2
    return float((h * (x[:-1] * (2 * y0 + y1) + x[1:] * (y0 + 2 * y1))).sum() / 6 / area) if area > 0 else float(m[top])


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


def _background(
    filled: NDArray[Any], total: NDArray[np.float64], block: int, snr: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What windows in the surroundings of each bin hold, ions left out (clipped block means).

    Returns:
        Centroids per window, and the intensity that stands out of theirs: ``snr`` robust s.d. above the median. The
        latter is 0 where most windows are empty.
    """
    out, noise = np.empty(len(filled)), np.empty(len(filled))
    for begin in range(0, len(filled), block):
        part = filled[begin : begin + block]
        mean = float(part.mean())
        for _ in range(4):
            quiet = part <= mean + 3 * np.sqrt(mean) + 1
            mean = float(part[quiet].mean())
        held = total[begin : begin + block][quiet]
        level = float(np.median(held))
        noise[begin : begin + block] = level + snr * 1.4826 * float(np.median(np.abs(held - level)))
        out[begin : begin + block] = mean
    return out, noise


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


def _merge(mz: NDArray[np.float64], weight: NDArray[Any], tolerance: Tolerance) -> NDArray[np.float64]:
    """Ascending m/z; those within the tolerance of one another become their weighted mean."""
    order = np.argsort(mz, kind="stable")
    out: list[list[float]] = []
    for m, w in zip(mz[order].tolist(), np.asarray(weight, float)[order].tolist(), strict=True):
        if out and m - out[-1][0] <= tolerance.ppm * 1e-6 * m + tolerance.da:
            last, heavy = out[-1]
            out[-1] = [(last * heavy + m * w) / (heavy + w), heavy + w]
        else:
            out.append([m, w])
    return np.array([m for m, _ in out])
