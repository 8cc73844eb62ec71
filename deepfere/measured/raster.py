"""The measured grid, from the coordinates in the file alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.places import Place
from deepfere.readers.columns import Column, block, blocks, reach

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
    def x(self) -> Column | NDArray[np.int64]:
        """(N,) position x."""
        ...

    @property
    def y(self) -> Column | NDArray[np.int64]:
        """(N,) position y."""
        ...


@dataclass(frozen=True, eq=False)
class Raster:
    """Which grid pixel each of N spectra is.

    Attributes:
        source: The spectra.
        shape_px: (ny, nx).
        origin_px: Smallest (y, x) in the file.
        counts: (ny, nx), spectra per pixel; the smallest unsigned type that holds them.
    """

    source: Placed
    shape_px: tuple[int, int]
    origin_px: tuple[int, int]
    counts: NDArray[np.unsignedinteger]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(ny, nx) bool, True where measured."""
        return self.counts > 0

    def at(self, spectra: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and column (n,) of some spectra."""
        return self.source.y[spectra] - self.origin_px[0], self.source.x[spectra] - self.origin_px[1]

    def pixels(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Spectra in the order of the file, some at a time: the first one's position, and their pixels, row by row."""
        done = 0
        for y, x in zip(blocks(self.source.y), blocks(self.source.x), strict=True):
            yield done, (y - self.origin_px[0]) * self.shape_px[1] + x - self.origin_px[1]
            done += len(y)


def plan_raster(source: Placed, duplicates: str = "error") -> Raster:
    """The measured grid from the coordinates alone: their smallest is its origin, their largest its end.

    Raises:
        InputError: Fewer than four pixels, duplicates that are not allowed, or coordinates that lie so far
            apart that they cannot be pixel numbers.
    """
    if duplicates not in DUPLICATES:
        raise InputError(f"unknown policy {duplicates!r} for duplicates", remedy=f"give {', '.join(DUPLICATES)}")
    (top, bottom), (left, right) = reach(source.y), reach(source.x)
    ny, nx = bottom - top + 1, right - left + 1
    if ny * nx > MAX_GRID_PER_PIXEL * max(len(source.x), 1000):
        raise InputError(
            f"its coordinates span {ny} x {nx} pixels but only {len(source.x)} spectra exist",
            where=source.path,
            remedy="export it with pixel numbers as coordinates",
        )
    raster = Raster(source, (ny, nx), (top, left), np.zeros((ny, nx), np.uint32))
    for _, places in raster.pixels():
        first, last = int(places.min()), int(places.max()) + 1
        raster.counts.reshape(-1)[first:last] += np.bincount(places - first).astype(np.uint32)
    counts = raster.counts.astype(np.min_scalar_type(int(raster.counts.max())))
    pixels = int((counts > 0).sum())
    if pixels < MIN_PIXELS:
        number = "one measured pixel" if pixels == 1 else f"only {pixels} measured pixels"
        raise InputError(f"has {number}", where=source.path, remedy=f"at least {MIN_PIXELS} make an image")
    steps = [_step(source.y, top)] * (ny > 1) + [_step(source.x, left)] * (nx > 1)
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
            f"has {int((counts > 1).sum())} pixels with several spectra, first x {int(x) + left}, y {int(y) + top}",
            where=source.path,
            remedy="give --duplicates sum or mean (in a study ingest.duplicates)",
        )
    return Raster(source, (ny, nx), (top, left), counts)


def _step(places: Column | NDArray[np.int64], least: int) -> int:
    """The largest number of which all distances of coordinates are multiples."""
    return int(np.gcd.reduce([int(np.gcd.reduce(values - least)) for values in blocks(places)]))


def in_image_order(raster: Raster, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which spectra (n,) are those at some places in the order of the image, not of the acquisition.

    A part of them is spread over the image. Those of one pixel are in the order of the file.

    Args:
        raster: Of all spectra.
        numbers: (n,) places, rising, each once.
    """
    ends = np.cumsum(raster.counts.sum(1, dtype=np.int64))
    rows = np.searchsorted(ends, numbers, side="right")
    wanted, within = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
    for row in np.unique(rows).tolist():
        here = rows == row
        line = np.cumsum(raster.counts[row], dtype=np.int64)
        rank = numbers[here] - (ends[row] - line[-1])
        col = np.searchsorted(line, rank, side="right")
        wanted[here], within[here] = row * raster.shape_px[1] + col, rank - (line[col] - raster.counts[row, col])
    return _of_pixels(raster, wanted, within)


def first_of_pixels(raster: Raster, pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first spectrum (n,) of each of some measured pixels, which are counted row by row, rising."""
    return _of_pixels(raster, pixels, np.zeros(len(pixels), np.int64))


def _of_pixels(raster: Raster, pixels: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
    """The spectrum that is the so-manieth one, from 0, of each of some pixels (n,), which do not fall."""
    out = np.empty(len(pixels), np.int64)
    if not len(pixels):
        return out
    distinct = np.unique(pixels)
    seen = np.zeros(len(distinct), np.int64)
    for begin, places in raster.pixels():
        k = np.minimum(np.searchsorted(distinct, places), len(distinct) - 1)
        for n in np.flatnonzero(distinct[k] == places).tolist():
            same = slice(*np.searchsorted(pixels, [places[n], places[n] + 1]).tolist())
            out[same][within[same] == seen[k[n]]] = begin + n
            seen[k[n]] += 1
    return out


def by_band(raster: Raster, band_rows: int) -> Iterator[NDArray[np.int64]]:
    """The spectra (n,) of each band of so many image rows, rising."""
    top = raster.origin_px[0]
    ends = [(int(y.min() - top) // band_rows, int(y.max() - top) // band_rows) for y in blocks(raster.source.y)]
    for band in range(-(-raster.shape_px[0] // band_rows)):
        found = [np.empty(0, np.int64)]
        for k, (first, last) in enumerate(ends):
            if first <= band <= last:
                begin, y = block(raster.source.y, k)
                found.append(begin + np.flatnonzero((y - top) // band_rows == band))
        yield np.concatenate(found)


def batches(
    lengths: Column | NDArray[np.int64], rows: NDArray[np.int64], per_spectrum: int
) -> Iterator[NDArray[np.int64]]:
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
