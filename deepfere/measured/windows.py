"""What an ion's m/z window holds of a spectrum: the sum of centroids, or the area under a profile."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GAP_RATIO = 8.0
TABLE_BINS = 1 << 17


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
        self.groups = [_Apart(np.array(group), self.low, self.high) for group in groups]

    def sum_ragged(self, mz: NDArray[Any], values: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Sums (n, M) of n centroid spectra, one behind the other; the order of their centroids does not matter.

        Args:
            mz: (P,) m/z of all of them, positive.
            values: (P,) intensities.
            lengths: (n,) how many are whose.
        """
        n = len(lengths)
        out = np.zeros((n, len(self.mz)), dtype=np.float32)
        mz = mz.astype(np.float64, copy=False)
        owner = np.repeat(np.arange(n), lengths)
        for group in self.groups:
            at, window = group.find(mz)
            width = len(group.members)
            sums = np.bincount(owner[at] * width + window, weights=values[at], minlength=n * width)
            if len(self.groups) == 1:
                return sums.reshape(n, width).astype(np.float32)
            out[:, group.members] = sums.reshape(n, width)
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


class _Apart:
    """Windows that do not overlap, so that an m/z lies in one of them at most.

    A table over equal bins of m/z says where to look: the first window that may reach up to a bin's m/z, or that
    none lies in the bin. It only spares comparisons; which window holds an m/z is decided by the windows' edges.

    Args:
        members: Which windows, ascending.
        low: Lower edges of all windows.
        high: Their upper edges.
    """

    def __init__(self, members: NDArray[np.int64], low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        self.members, self.low, self.high = members, low[members], high[members]
        self.origin = float(self.low[0])
        self.scale = (TABLE_BINS - 1) / max(float(self.high[-1]) - self.origin, 1e-9)
        first, last = self._bin(self.low), self._bin(self.high)
        self.table = np.full(TABLE_BINS + 2, -1, dtype=np.int32)
        for k in range(len(members) - 1, -1, -1):
            self.table[first[k] : last[k] + 1] = k

    def _bin(self, mz: NDArray[np.float64]) -> NDArray[np.int64]:
        """Bins, 0 below all windows; they never fall as m/z rises."""
        at = (mz - self.origin) * self.scale
        np.clip(at, -1.0, TABLE_BINS, out=at)
        at += 1.0
        return at.astype(np.intp)

    def find(self, mz: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of some m/z lie in a window, and in which of the members."""
        window = self.table[self._bin(mz)]
        at = np.flatnonzero(window >= 0)
        window, here = window[at].astype(np.intp), mz[at]
        late = np.flatnonzero(here > self.high[window])
        while len(late):
            window[late] += 1
            late = late[window[late] < len(self.members)]
            late = late[here[late] > self.high[window[late]]]
        inside = window < len(self.members)
        inside[inside] = here[inside] >= self.low[window[inside]]
        if not inside.all():
            at, window = at[inside], window[inside]
        return at, window


def _gaps(step: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Intervals where a writer left points out, judged by the neighbouring intervals."""
    if len(step) < 3:
        return np.zeros(len(step), dtype=bool)
    before = np.concatenate([step[1:2], step[:-1]])
    after = np.concatenate([step[1:], step[-2:-1]])
    return step > GAP_RATIO * np.minimum(before, after)
