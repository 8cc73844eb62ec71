"""What an ion's m/z window holds of a spectrum: the sum of centroids, or the area under a profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAP_RATIO = 8.0


class Windows:
    """Windows ``mz (1 -+ tolerance_ppm 1e-6)``, edges included; they may overlap.

    Args:
        mz: (M,) ascending.
        tolerance_ppm: Half-width.
    """

    def __init__(self, mz: NDArray[np.float64], tolerance_ppm: float) -> None:
        self.mz = mz
        self.low = mz * (1 - tolerance_ppm * 1e-6)
        self.high = mz * (1 + tolerance_ppm * 1e-6)
        # Windows of one group do not overlap, so one search finds the only one that can hold a centroid.
        groups: list[list[int]] = []
        for k in range(len(mz)):
            for group in groups:
                if self.high[group[-1]] < self.low[k]:
                    group.append(k)
                    break
            else:
                groups.append([k])
        self.groups = [np.array(group) for group in groups]

    def sum_ragged(self, mzs: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Sums (n, M) of n centroid spectra, each with its own m/z; their order does not matter."""
        n = len(mzs)
        out = np.zeros((n, len(self.mz)), dtype=np.float32)
        mz = np.concatenate(mzs).astype(np.float64, copy=False)
        value = np.concatenate(values)
        owner = np.repeat(np.arange(n), [len(m) for m in mzs])
        for group in self.groups:
            found = np.searchsorted(self.low[group], mz, side="right") - 1
            inside = (found >= 0) & (mz <= self.high[group][found])
            cell = owner[inside] * len(group) + found[inside]
            sums = np.bincount(cell, weights=value[inside], minlength=n * len(group))
            out[:, group] = sums.reshape(n, len(group))
        return out

    def sum_shared(self, axis: NDArray[np.float64], values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sums (n, M) of n centroid spectra (n, A) on one ascending axis."""
        total = np.zeros((len(values), len(axis) + 1))
        np.cumsum(values, axis=1, dtype=np.float64, out=total[:, 1:])
        begin, end = np.searchsorted(axis, self.low, "left"), np.searchsorted(axis, self.high, "right")
        return (total[:, end] - total[:, begin]).astype(np.float32)

    def area(self, axis: NDArray[np.float64], values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Areas (n, M), intensity x m/z, under n profiles (n, A) on one ascending axis.

        The profile is taken as straight lines between its points, cut at the window's edges (trapezoids).
        Where points were left out (an interval over 8 times both neighbours') there is no line and no area.
        """
        n, a = values.shape
        if a < 2:
            return np.zeros((n, len(self.mz)), dtype=np.float32)
        step = np.diff(axis)
        joined = (step > 0) & ~_gaps(step)
        first, last = values[:, :-1].astype(np.float64), values[:, 1:].astype(np.float64)
        total = np.zeros((n, a))
        np.cumsum(np.where(joined, 0.5 * step * (first + last), 0.0), axis=1, out=total[:, 1:])

        def upto(edge: NDArray[np.float64]) -> NDArray[np.float64]:
            k = np.clip(np.searchsorted(axis, edge, side="right") - 1, 0, a - 2)
            part = np.where(joined[k], np.clip(edge - axis[k], 0.0, step[k]), 0.0)
            slope = np.divide(part, step[k], out=np.zeros_like(part), where=step[k] > 0)
            return total[:, k] + part * (first[:, k] + 0.5 * slope * (last[:, k] - first[:, k]))

        return np.maximum(upto(self.high) - upto(self.low), 0.0).astype(np.float32)


def _gaps(step: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Intervals where a writer left points out, judged by the neighbouring intervals."""
    if len(step) < 3:
        return np.zeros(len(step), dtype=bool)
    before = np.concatenate([step[1:2], step[:-1]])
    after = np.concatenate([step[1:], step[-2:-1]])
    return step > GAP_RATIO * np.minimum(before, after)
