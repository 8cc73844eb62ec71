"""The measured grid, from the coordinates in the file alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.readers.imzml import ImzmlIndex

MIN_PIXELS = 4
MAX_GRID_PER_PIXEL = 1000
DUPLICATES = ("error", "sum", "mean")


@dataclass(frozen=True)
class Raster:
    """Which grid pixel each spectrum is.

    Attributes:
        row: (N,) int64.
        col: (N,) int64.
        shape_px: (ny, nx).
        origin_px: Smallest (y, x) in the file.
        counts: (ny, nx) int32, spectra per pixel.
    """

    row: NDArray[np.int64]
    col: NDArray[np.int64]
    shape_px: tuple[int, int]
    origin_px: tuple[int, int]
    counts: NDArray[np.int32]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(ny, nx) bool, True where measured."""
        return self.counts > 0


def plan_raster(index: ImzmlIndex, duplicates: str = "error") -> Raster:
    """The measured grid from the coordinates alone: their smallest is its origin, their largest its end.

    Raises:
        InputError: Fewer than four pixels, duplicates that are not allowed, or coordinates that lie so far
            apart that they cannot be pixel numbers.
    """
    if duplicates not in DUPLICATES:
        raise InputError(f"unknown policy {duplicates!r} for duplicates", remedy=f"give {', '.join(DUPLICATES)}")
    origin = (int(index.y.min()), int(index.x.min()))
    row, col = index.y - origin[0], index.x - origin[1]
    ny, nx = int(row.max()) + 1, int(col.max()) + 1
    if ny * nx > MAX_GRID_PER_PIXEL * max(len(index), 1000):
        raise InputError(
            f"its coordinates span {ny} x {nx} pixels but only {len(index)} spectra exist",
            where=index.path,
            remedy="export it with pixel numbers as coordinates",
        )
    counts = np.bincount(row * nx + col, minlength=ny * nx).reshape(ny, nx).astype(np.int32)
    pixels = int((counts > 0).sum())
    if pixels < MIN_PIXELS:
        number = "one measured pixel" if pixels == 1 else f"only {pixels} measured pixels"
        raise InputError(f"has {number}", where=index.path, remedy=f"at least {MIN_PIXELS} make an image")
    if duplicates == "error" and counts.max() > 1:
        y, x = np.unravel_index(int(counts.argmax()), counts.shape)
        raise InputError(
            f"has {int((counts > 1).sum())} pixels with several spectra, first x {int(x) + origin[1]}, "
            f"y {int(y) + origin[0]}",
            where=index.path,
            remedy="give --duplicates sum or mean",
        )
    return Raster(row, col, (ny, nx), origin, counts)
