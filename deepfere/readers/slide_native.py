"""Slides that decode the native tiles that are wanted, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deepfere.readers.slide import Readable

Straight = Callable[[int, int], NDArray[np.uint8] | None]
NativeTile = tuple[int, int, NDArray[np.uint8] | None]


@runtime_checkable
class NativeTiles(Readable, Protocol):
    """A slide that gives its native tiles one by one."""

    def native_tiles(
        self, level: int, first_row: int, first_col: int, use: NDArray[np.uint8], straight: Straight
    ) -> Iterator[NativeTile]:
        """Decoded native tiles, one after the other, still in the processor's cache.

        Args:
            level: Level.
            first_row: Row of native tiles that ``use`` begins with.
            first_col: Column of native tiles that it begins with.
            use: For each native tile (rows, columns): 0 leaves it out, 1 wants it, 2 wants it now and again later.
            straight: Where a tile (row, column) is wanted; decoded there at once if that is one whole tile in
                one piece.

        Yields:
            Row and column of a native tile, and its pixels, valid until the next one; None if they are where they
            are wanted already.

        Raises:
            InputError: A native tile is damaged or lies beyond the end of the file; names it.
        """
        ...


def read_native(
    slide: NativeTiles,
    level: int,
    row: int,
    col: int,
    height: int,
    width: int,
    out: NDArray[np.uint8] | None = None,
    use: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """`deepfere.readers.slide.Slide.read` of such a slide.

    Args:
        slide: The slide.
        level: Level.
        row: First row, pixels of the level; may lie outside.
        col: First column.
        height: Rows.
        width: Columns.
        out: (height, width, 3) to write into; None makes one.
        use: As for `NativeTiles.native_tiles`, of the native tiles of the window; pixels in ``out`` of those that are
            left out stay as they are. None wants all, and again those that the window uses in part.

    Raises:
        InputError: See `NativeTiles.native_tiles`.
    """
    if out is None:
        out = np.empty((height, width, 3), dtype=np.uint8)
    (h, w), (th, tw) = slide.levels[level].shape_px, slide.levels[level].tile_px
    top, left, bottom, right = max(row, 0), max(col, 0), min(row + height, h), min(col + width, w)
    if (bottom - top, right - left) != (height, width):
        out[:] = slide.background
    if top >= bottom or left >= right:
        return out
    r0, r1, c0, c1 = top // th, -(-bottom // th), left // tw, -(-right // tw)
    if use is None:
        whole = [
            (np.arange(a, b) * n >= first) & (np.minimum(np.arange(a + 1, b + 1) * n, size) <= last)
            for a, b, n, first, last, size in ((r0, r1, th, top, bottom, h), (c0, c1, tw, left, right, w))
        ]
        use = np.where(np.logical_and.outer(*whole), 1, 2).astype(np.uint8)

    def place(r: int, c: int) -> tuple[NDArray[np.uint8], tuple[slice, slice]]:
        y, x = r * th, c * tw
        a, b, d, e = max(top, y), min(bottom, y + th), max(left, x), min(right, x + tw)
        return out[a - row : b - row, d - col : e - col], (slice(a - y, b - y), slice(d - x, e - x))

    for r, c, tile in slide.native_tiles(level, r0, c0, use, lambda r, c: place(r, c)[0]):
        into, part = place(r, c)
        if tile is not None:
            into[:] = tile[part]
    return out
