"""Area averaging by exact overlaps, one axis at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_PIXELS = 1 << 16


@dataclass(frozen=True)
class Axis:
    """Overlaps along one axis: output pixel i takes source pixels [start_i, stop_i) of the level.

    ``edges`` are the output pixels' edges in level pixels; ``last`` is where the slide ends, in level
    pixels; ``size`` is the level's size and ``ratio`` the source pixels per output pixel.
    """

    edges: NDArray[np.float64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    covered: NDArray[np.float64]
    last: float
    size: int
    ratio: float

    @classmethod
    def of(
        cls,
        origin_um: float,
        count: int,
        wanted_um: float,
        mpp_um: float,
        downsample: float,
        size: int,
        full: int,
    ) -> Axis:
        """Overlaps of ``count`` output pixels from ``origin_um`` on with a level of ``size`` pixels.

        Args:
            origin_um: Outer edge of the first output pixel.
            count: Output pixels.
            wanted_um: Size of one.
            mpp_um: Size of a level-0 pixel.
            downsample: Of the level.
            size: Pixels of the level.
            full: Pixels of level 0.
        """
        # The corner is snapped to 2^-24 of an output pixel, so that rounding in the caller's micrometres cannot
        # make neighbours differ.
        ratio = source_per_output(wanted_um, mpp_um * downsample)
        corner = round(origin_um / wanted_um * 2**24) / 2**24
        edges = snapped(corner + np.arange(count + 1), ratio)
        # A level's last pixel is taken to reach the end of level 0, whichever way its size was rounded.
        last = full / downsample
        inner = np.clip(edges, 0.0, last)
        covered = np.diff(inner) / np.diff(edges)
        start = np.minimum(np.floor(inner[:-1]), size - 1).astype(np.int64)
        stop = np.clip(np.ceil(inner[1:]), start + 1, size).astype(np.int64)
        stop = np.where(covered > 0, np.maximum(stop, start + 1), start)
        return cls(edges, start, stop, covered, last, size, ratio)

    def reach(self, begin: int, end: int) -> tuple[int, int]:
        """The source pixels [first, last) of output pixels [begin, end), some of which lie inside."""
        used = self.stop[begin:end] > self.start[begin:end]
        return int(self.start[begin:end][used].min()), int(self.stop[begin:end][used].max())

    def strips(self, begin: int, end: int, sources: int) -> list[tuple[int, int]]:
        """Cut output pixels [begin, end) into runs of about so many source pixels each."""
        step = max(1, int(sources / max(self.ratio, 1.0)))
        return [(k, min(k + step, end)) for k in range(begin, end, step)]

    def weights(self, begin: int, end: int) -> tuple[Any, int, int]:
        """Sparse (outputs, sources) overlaps of output pixels [begin, end), and the sources' range."""
        from scipy import sparse

        indptr, source, overlap = self._overlaps
        first, last = self.reach(begin, end)
        a, b = indptr[begin], indptr[end]
        matrix = sparse.csr_array(
            (overlap[a:b], source[a:b] - np.int32(first), indptr[begin : end + 1] - a),
            shape=(end - begin, last - first),
        )
        return matrix, first, last

    @cached_property
    def _overlaps(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Of all output pixels one after the other: where each begins, source pixels, overlaps with them."""
        counts = self.stop - self.start
        indptr = np.concatenate([[0], np.cumsum(counts)])
        source = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts) + np.repeat(self.start, counts)
        low, high = np.repeat(self.edges[:-1], counts), np.repeat(self.edges[1:], counts)
        right = np.where(source == self.size - 1, self.last, source + 1.0)
        overlap = np.minimum(high, right) - np.maximum(low, source)
        return indptr.astype(np.int32), source.astype(np.int32), overlap.astype(np.float32)


def source_per_output(wanted_um: float, level_um: float) -> float:
    """Pixels of a level per wanted pixel; whole where it is whole but for rounding."""
    ratio = wanted_um / level_um
    return float(round(ratio)) if abs(ratio - round(ratio)) < 1e-9 * ratio else ratio


def snapped(position: Any, ratio: float) -> NDArray[np.float64]:
    """Positions in output pixels as positions in source pixels, to 2^-20 of one: the same in every window."""
    return np.rint(np.asarray(position, np.float64) * ratio * 2**20) / 2**20


def average(
    source: NDArray[np.uint8],
    source_top: int,
    y: Axis,
    span: tuple[int, int],
    cols: Any,
    x: Axis,
    coverage: NDArray[np.float32] | None,
    background: NDArray[np.uint8],
    out: NDArray[np.uint8],
) -> None:
    """Average source rows into some output rows, a few at a time so that they stay in the cache.

    Args:
        source: (h, w, 3) the source rows that these output rows reach.
        source_top: Level row of the first of them.
        y: Overlaps along y.
        span: The output rows [begin, end).
        cols: Overlaps along x, as a sparse matrix.
        x: Overlaps along x.
        coverage: (rows, columns) of the whole output; None where it is 1 everywhere.
        background: Colour that fills what is not covered.
        out: (rows, columns, 3) the whole output, written in place.
    """
    width = source.shape[1]
    area = np.float32(y.ratio * x.ratio)
    whole_cols = _is_copy(cols)
    for top, bottom in y.strips(*span, BLOCK_PIXELS // width):
        if not (y.stop[top:bottom] > y.start[top:bottom]).any():
            continue
        rows, first, last = y.weights(top, bottom)
        block = source[first - source_top : last - source_top]
        if whole_cols and _is_copy(rows):
            inside = [np.flatnonzero(np.diff(weights.indptr)) for weights in (rows, cols)]
            (a, b), (c, d) = ((int(k[0]), int(k[-1]) + 1) for k in inside)
            out[top + a : top + b, c:d] = block
            continue
        # Rows first, then columns; float32 holds whole sums up to 2^24 exactly, so block means are exact. Between
        # the two the channels stand apart: turning triples of values takes five times as long as turning single ones.
        flat = block.reshape(last - first, width * 3).astype(np.float32)
        partial = (rows @ flat).reshape(bottom - top, width, 3)
        turned = np.ascontiguousarray(partial.transpose(1, 2, 0)).reshape(width, -1)
        mean = cols @ turned
        mean /= area
        mean = mean.reshape(len(x.start), 3, bottom - top)
        if coverage is not None:
            mean += (1 - coverage[top:bottom].T[:, None, :]) * background.astype(np.float32)[:, None]
        mean += np.float32(0.5)  # the cast rounds down; weights add up to 1, so that it stays within 0 and 255
        out[top:bottom] = mean.astype(np.uint8).transpose(2, 0, 1)


def _is_copy(weights: Any) -> bool:
    """Whether every output pixel is at most one source pixel, whole, and each source is used once."""
    return bool(weights.nnz == weights.shape[1] and (np.diff(weights.indptr) <= 1).all() and (weights.data == 1).all())
