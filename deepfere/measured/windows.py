"""What an ion's m/z window holds of a spectrum: the sum of centroids, or the area under a profile."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from deepfere.measured.tolerance import Tolerance

GAP_RATIO = 8.0
TABLE_BINS = 1 << 15


class Windows:
    """Windows around m/z, edges included; they may overlap, and one may lie in another.

    Args:
        mz: (M,) ascending.
        tolerance: Half-width.
    """

    def __init__(self, mz: NDArray[np.float64], tolerance: Tolerance) -> None:
        self.mz = mz
        self.low, self.high = tolerance.low(mz), tolerance.high(mz)
        # The edges cut the axis into pieces, each wholly inside or outside of every window: where windows do not
        # overlap, a piece is a window. A window is some neighbouring pieces, ``first`` and the next ``count - 1``.
        above = np.nextafter(self.high, np.inf)
        edges = np.unique(np.concatenate([self.low, above]))
        begin, end = np.searchsorted(edges, self.low), np.searchsorted(edges, above)
        depth = np.zeros(len(edges) + 1, dtype=np.int64)
        np.add.at(depth, begin, 1)
        np.add.at(depth, end, -1)
        covered = np.cumsum(depth)[: len(edges)] > 0
        number = np.cumsum(covered) - 1
        self.pieces = _Pieces(edges[:-1][covered[:-1]], edges[1:][covered[:-1]])
        self.first, self.count = number[begin], end - begin

    def sum_ragged(self, mz: NDArray[Any], values: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Sums (n, M) of n centroid spectra, one behind the other; the order of their centroids does not matter.

        Args:
            mz: (P,) m/z of all of them, positive.
            values: (P,) intensities.
            lengths: (n,) how many are whose.
        """
        sums = self.pieces.sums(mz.astype(np.float64, copy=False), values, lengths)
        if sums.shape[1] == len(self.mz) and (self.count == 1).all():  # the windows are the pieces
            return sums.astype(np.float32)
        out = sums[:, self.first]
        for k in range(1, int(self.count.max())):
            more = np.flatnonzero(self.count > k)
            out[:, more] += sums[:, self.first[more] + k]
        return out.astype(np.float32)

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
        joined = (step > 0) & ~gaps(step)
        first, last = values[:, :-1].astype(np.float64), values[:, 1:].astype(np.float64)
        total = np.zeros((n, a))
        np.cumsum(np.where(joined, 0.5 * step * (first + last), 0.0), axis=1, out=total[:, 1:])

        def upto(edge: NDArray[np.float64]) -> NDArray[np.float64]:
            k = np.clip(np.searchsorted(axis, edge, side="right") - 1, 0, a - 2)
            part = np.where(joined[k], np.clip(edge - axis[k], 0.0, step[k]), 0.0)
            slope = np.divide(part, step[k], out=np.zeros_like(part), where=step[k] > 0)
            return total[:, k] + part * (first[:, k] + 0.5 * slope * (last[:, k] - first[:, k]))

        return np.maximum(upto(self.high) - upto(self.low), 0.0).astype(np.float32)


class _Pieces:
    """Disjoint pieces ``low <= m/z < end`` of the axis, ascending, and in which of them an m/z lies.

    A table over equal bins of m/z says where to look: the first piece that may reach up to the m/z of a bin, or that
    there is none. It only spares comparisons; the edges decide.

    Args:
        low: (S,) lower edges.
        end: (S,) upper edges.
    """

    def __init__(self, low: NDArray[np.float64], end: NDArray[np.float64]) -> None:
        # The last piece is none: nothing is as large as its lower edge, and it is where a search ends.
        self.low, self.end = np.append(low, np.inf), np.append(end, np.inf)
        self.scale = (TABLE_BINS - 2) / max(float(end[-1] - low[0]), 1e-9)
        self.origin = float(low[0]) - 1.0 / self.scale
        first, last = self._bin(low), self._bin(end)
        self.table = np.full(TABLE_BINS + 2, len(low), dtype=np.int32)
        for k in range(len(low) - 1, -1, -1):
            self.table[first[k] : last[k] + 1] = k

    def _bin(self, mz: NDArray[np.float64]) -> NDArray[np.int32]:
        """Bins that never fall as m/z rises, up to where m/z lies beyond all pieces; negative before all."""
        at = mz - self.origin
        at *= self.scale
        np.clip(at, -1, TABLE_BINS, out=at)
        return at.astype(np.int32)

    def sums(self, mz: NDArray[np.float64], values: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sums (n, S) of the values in each piece, of n spectra that lie one behind the other."""
        none = len(self.low) - 1
        piece = self.table.take(self._bin(mz), mode="clip")
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        near = piece < none
        if 2 * np.count_nonzero(near) < len(mz):
            few = np.flatnonzero(near)
            piece, mz, values, ends = piece[few], mz[few], values[few], np.searchsorted(few, ends).astype(np.int32)
        late = np.flatnonzero(mz >= self.end.take(piece, mode="clip"))
        while len(late):
            piece[late] += 1
            late = late[mz[late] >= self.end.take(piece[late])]
        early = mz < self.low.take(piece, mode="clip")
        np.maximum(piece, np.multiply(early, none, dtype=np.int32), out=piece)  # sets those to none, without a branch
        # A sparse matrix with a row per spectrum adds up what a cell has several of, in fewer passes than a bincount.
        rows = csr_array((values.astype(np.float64), piece, ends), shape=(len(lengths), none + 1))
        return rows.toarray()[:, :none]


def gaps(step: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Intervals where a writer left points out, judged by the neighbouring intervals."""
    if len(step) < 3:
        return np.zeros(len(step), dtype=bool)
    # Of an m/z that stands twice, the step between says nothing of its neighbours.
    wide = np.where(step > 0, step, np.inf)
    before = np.concatenate([wide[1:2], wide[:-1]])
    after = np.concatenate([wide[1:], wide[-2:-1]])
    return step > GAP_RATIO * np.minimum(before, after)
