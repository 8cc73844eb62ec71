"""The measured grid, from the coordinates in the file alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.places import Place

MIN_PIXELS = 4
MAX_GRID_PER_PIXEL = 1000
MANY_PIXELS = 16
"""As many as do not lie on every second row and column by chance."""
DUPLICATES = ("error", "sum", "mean")
BATCH_VALUES = 1 << 18  # what a batch holds stays in the processor's cache


class Placed(Protocol):
    """Spectra with positions: an imzML's index, or a table."""

    @property
    def path(self) -> Place:
        """Where they are from."""
        ...

    @property
    def x(self) -> NDArray[np.int64]:
        """(N,) position x."""
        ...

    @property
    def y(self) -> NDArray[np.int64]:
        """(N,) position y."""
        ...


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


def plan_raster(source: Placed, duplicates: str = "error") -> Raster:
    """The measured grid from the coordinates alone: their smallest is its origin, their largest its end.

    Raises:
        InputError: Fewer than four pixels, duplicates that are not allowed, or coordinates that lie so far
            apart that they cannot be pixel numbers.
    """
    if duplicates not in DUPLICATES:
        raise InputError(f"unknown policy {duplicates!r} for duplicates", remedy=f"give {', '.join(DUPLICATES)}")
    origin = (int(source.y.min()), int(source.x.min()))
    row, col = source.y - origin[0], source.x - origin[1]
    ny, nx = int(row.max()) + 1, int(col.max()) + 1
    if ny * nx > MAX_GRID_PER_PIXEL * max(len(source.x), 1000):
        raise InputError(
            f"its coordinates span {ny} x {nx} pixels but only {len(source.x)} spectra exist",
            where=source.path,
            remedy="export it with pixel numbers as coordinates",
        )
    counts = np.bincount(row * nx + col, minlength=ny * nx).reshape(ny, nx).astype(np.int32)
    pixels = int((counts > 0).sum())
    if pixels < MIN_PIXELS:
        number = "one measured pixel" if pixels == 1 else f"only {pixels} measured pixels"
        raise InputError(f"has {number}", where=source.path, remedy=f"at least {MIN_PIXELS} make an image")
    steps = [int(np.gcd.reduce(offsets)) for offsets in (row, col) if offsets.any()]
    if pixels >= MANY_PIXELS and min(steps) > 1:
        step = " and ".join(str(step) for step in dict.fromkeys(steps[::-1]))
        raise InputError(
            f"has coordinates in steps of {step} (x, y): lengths, or pixels left out in both directions",
            where=source.path,
            remedy="export it with pixel numbers as coordinates, one apart, and give their distance as --pitch-um",
        )
    if duplicates == "error" and counts.max() > 1:
        y, x = np.unravel_index(int(counts.argmax()), counts.shape)
        raise InputError(
            f"has {int((counts > 1).sum())} pixels with several spectra, first x {int(x) + origin[1]}, "
            f"y {int(y) + origin[0]}",
            where=source.path,
            remedy="give --duplicates sum or mean",
        )
    return Raster(row, col, (ny, nx), origin, counts)


def evenly(raster: Raster) -> NDArray[np.int64]:
    """The spectra in the order of the image, not of the acquisition: a part of them is spread over the image."""
    return np.lexsort((raster.col, raster.row))


def batches(lengths: NDArray[np.int64], rows: NDArray[np.int64], per_spectrum: int) -> Iterator[NDArray[np.int64]]:
    """Cut spectra into runs whose arrays and ions stay within the memory of a batch.

    Args:
        lengths: (N,) values of each spectrum.
        rows: Which spectra.
        per_spectrum: Ions.
    """
    sizes = np.cumsum(np.maximum(lengths[rows], per_spectrum))
    begin = 0
    while begin < len(rows):
        done = int(sizes[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(sizes, done + BATCH_VALUES, side="right")))
        yield rows[begin:end]
        begin = end
