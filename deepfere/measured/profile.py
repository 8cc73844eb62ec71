"""Profiles: smoothing, and the baseline that is taken away.

Widths of the baseline are in ppm of m/z, whatever the spacing of the points; widths of the smoothing are in points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepfere.measured.windows import gaps

Baseline = Literal["none", "tophat", "snip"]
Smoothing = Literal["none", "savgol", "gaussian"]
SAVGOL_ORDER = 2
SNIP_STEPS = 24


@dataclass(frozen=True)
class ProfileSpec:
    """What is done to profiles before anything is measured in them: smoothing first, then the baseline.

    Attributes:
        baseline: "tophat" takes the morphological opening away; "snip" what iterated clipping against the mean of two
            neighbours leaves, from half of ``baseline_width_ppm`` away down to the nearest.
        baseline_width_ppm: Wider than any peak, narrower than the baseline's own features.
        smoothing: "savgol" fits a parabola to ``smoothing_points`` points; "gaussian" has a s.d. of a quarter of them.
        smoothing_points: Odd.
    """

    baseline: Baseline = "none"
    baseline_width_ppm: float = 3000.0
    smoothing: Smoothing = "none"
    smoothing_points: int = 9

    @property
    def active(self) -> bool:
        """Whether anything is done."""
        return self.baseline != "none" or self.smoothing != "none"

    def to_dict(self) -> dict[str, Any]:
        """What is done, as the store states it."""
        out: dict[str, Any] = {"baseline": self.baseline, "smoothing": self.smoothing}
        if self.baseline != "none":
            out["baseline_width_ppm"] = self.baseline_width_ppm
        if self.smoothing != "none":
            out["smoothing_points"] = self.smoothing_points
        return out

    def applied(self, axis: NDArray[np.float64], values: NDArray[Any]) -> NDArray[np.float32]:
        """Profiles (n, A) on one ascending axis (A,), smoothed and without their baseline, nowhere below zero.

        Where points were left out the profile is zero (writers leave out what is zero): neither smoothing nor
        baseline reaches across.
        """
        if values.shape[1] < 3:
            return values
        full, kept = padded_axis(axis, self.smoothing_points // 2 + 1)
        out = np.zeros((len(values), len(full)))
        out[:, kept] = values
        if self.smoothing == "savgol" and len(full) >= self.smoothing_points:
            from scipy.signal import savgol_filter

            out = savgol_filter(out, self.smoothing_points, SAVGOL_ORDER, axis=1, mode="nearest")
        elif self.smoothing == "gaussian":
            out = ndimage.gaussian_filter1d(out, self.smoothing_points / 4, axis=1, mode="nearest", truncate=4.0)
        # A parabola swings below zero beside a peak; a baseline there would raise what it is taken from.
        np.maximum(out, 0.0, out=out)
        if self.baseline != "none":
            find = opening if self.baseline == "tophat" else snip
            out -= find(full, out, self.baseline_width_ppm)
        return np.maximum(out[:, kept], 0.0).astype(np.float32)


UNCHANGED = ProfileSpec()


def padded_axis(axis: NDArray[np.float64], points: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """An ascending axis with points put into both ends of its gaps, and where its own points are in it."""
    step = np.diff(axis)
    gap = np.flatnonzero(gaps(step))
    if not len(gap):
        return axis, np.arange(len(axis))
    inner = np.minimum(step[np.maximum(gap - 1, 0)], step[np.minimum(gap + 1, len(step) - 1)])
    number = np.minimum(points, (step[gap] / inner / 2 - 0.5).astype(np.int64))
    k = np.arange(1, points + 1)
    wanted = k <= number[:, None]
    behind, ahead = axis[gap, None] + inner[:, None] * k, axis[gap + 1, None] - inner[:, None] * k
    full = np.concatenate([axis, behind[wanted], ahead[wanted]])
    order = np.argsort(full, kind="stable")
    place = np.empty(len(full), np.int64)
    place[order] = np.arange(len(full))
    return full[order], place[: len(axis)]


def opening(axis: NDArray[np.float64], values: NDArray[np.float64], width_ppm: float) -> NDArray[np.float64]:
    """Morphological opening (n, A) of profiles (n, A): nowhere above them, and flat over ``width_ppm`` everywhere."""
    reach = 0.5e-6 * width_ppm
    least = _sliding(values, *_window(axis, axis * (1 - reach), axis * (1 + reach)), np.minimum)
    # What lies in the window of which points: the other way round, or the result could rise above the profile.
    return _sliding(least, *_window(axis, axis / (1 + reach), axis / (1 - reach)), np.maximum)


def _window(
    axis: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # A hair is added, so that rounding does not drop an end that belongs to it.
    return np.searchsorted(axis, low * (1 - 1e-12)), np.searchsorted(axis, high * (1 + 1e-12), side="right")


def _sliding(
    values: NDArray[np.float64], begin: NDArray[np.int64], end: NDArray[np.int64], best: np.ufunc
) -> NDArray[np.float64]:
    """Least or greatest value (n, A) in windows [begin, end) that are as wide as one likes.

    Each window is two overlapping runs of a power of two points, whose best are built up by doubling.
    """
    out = np.empty_like(values)
    level = np.floor(np.log2(end - begin)).astype(np.int64)
    run = values
    for k in range(int(level.max()) + 1):
        here = np.flatnonzero(level == k)
        if len(here):
            out[:, here] = best(run[:, begin[here]], run[:, end[here] - (1 << k)])
        half = 1 << k
        if run.shape[1] > half:
            run = best(run[:, :-half], run[:, half:])
    return out


def snip(axis: NDArray[np.float64], values: NDArray[np.float64], width_ppm: float) -> NDArray[np.float64]:
    """Baseline (n, A) of profiles (n, A) by iterated clipping, the widest neighbours first.

    Sources: Ryan et al., Nucl. Instrum. Methods B 1988, 34, 396; in falling order, Morhac et al., Nucl. Instrum.
    Methods A 1997, 401, 113. Neighbours lie at a distance in ppm, between points on a straight line.
    """
    out = np.array(values, dtype=np.float64)
    for step in range(SNIP_STEPS, 0, -1):
        reach = 0.5e-6 * width_ppm * step / SNIP_STEPS
        inside = np.flatnonzero((axis * (1 - reach) >= axis[0]) & (axis * (1 + reach) <= axis[-1]))
        if not len(inside):
            continue
        mean = np.zeros((len(out), len(inside)))
        for sign in (-1, 1):
            at = np.clip(axis[inside] * (1 + sign * reach), axis[0], axis[-1])
            k = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(axis) - 2)
            share = (at - axis[k]) / (axis[k + 1] - axis[k])
            mean += 0.5 * (out[:, k] * (1 - share) + out[:, k + 1] * share)
        out[:, inside] = np.minimum(out[:, inside], mean)
    return out
