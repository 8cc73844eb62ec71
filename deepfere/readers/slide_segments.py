"""Tiles and strips of a plain TIFF, decoded to RGB as windows ask for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.readers.ranges import Ranges
from deepfere.readers.slide import on_background

CACHE_BYTES = 256 << 20
STRIP_BYTES = 1 << 20
"""A larger strip is read in parts where that can be."""
WHITE = np.array([255, 255, 255], dtype=np.uint8)

Window = Callable[[int, int, int, int], NDArray[np.uint8]]  # top, left, bottom, right, inside the image


class _Cut:
    """A page of one uncompressed strip (programs write pictures of any size so) as strips of `STRIP_BYTES`."""

    def __init__(self, page: Any) -> None:
        self._page, height, row = page, page.imagelength, page.imagewidth * page.samplesperpixel
        self.rowsperstrip = max(1, STRIP_BYTES // row)
        first = np.arange(0, height, self.rowsperstrip)
        self.dataoffsets = (page.dataoffsets[0] + first * row).tolist()
        self.databytecounts = ((np.minimum(first + self.rowsperstrip, height) - first) * row).tolist()

    @classmethod
    def where_it_can_be(cls, page: Any) -> Any:
        """The page, cut where that spares memory."""
        plain = page.compression == 1 and page.predictor == 1 and page.dtype == np.uint8 and page.bitspersample == 8
        together = page.planarconfig == 1 or page.samplesperpixel == 1
        whole = page.imagelength * page.imagewidth * page.samplesperpixel
        alone = not page.is_tiled and list(page.databytecounts) == [whole]
        return cls(page) if plain and together and alone and whole > STRIP_BYTES else page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._page, name)

    def decode(self, data: bytes, _: int, **__: Any) -> tuple[NDArray[np.uint8]]:
        """As tifffile's: (1, h, w, samples)."""
        return (np.frombuffer(data, np.uint8).reshape(1, -1, self._page.imagewidth, self._page.samplesperpixel),)


class Segments:
    """Decoded tiles and strips of a TIFF, the recently used ones kept (by bytes)."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._kept: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def window(self, level: int, page: Any) -> Window:
        """A function that reads windows of this page."""
        page = _Cut.where_it_can_be(page)
        height, width = page.imagelength, page.imagewidth
        rows, cols = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
        rows = min(rows, height) if not page.is_tiled else rows
        across = -(-width // cols)

        def read(top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
            out = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
            span = range(left // cols, -(-right // cols))
            for r in range(top // rows, -(-bottom // rows)):
                # What one row of segments lacks is asked for at once: a store answers slowly, but all of it together.
                tiles = self._segments(level, page, [r * across + c for c in span], (rows, cols))
                for c, tile in zip(span, tiles, strict=True):
                    y, x = r * rows, c * cols
                    a, b = max(top, y), min(bottom, y + rows)
                    d, e = max(left, x), min(right, x + cols)
                    out[a - top : b - top, d - left : e - left] = tile[a - y : b - y, d - x : e - x]
            return out

        return read

    def _segments(self, level: int, page: Any, numbers: list[int], shape: tuple[int, int]) -> list[NDArray[np.uint8]]:
        """Decoded RGB of some tiles or strips; channels that are stored apart are put together."""
        found = [self._get(level, number) for number in numbers]
        missing = [number for number, tile in zip(numbers, found, strict=True) if tile is None]
        planes = page.samplesperpixel if page.samplesperpixel > 1 and page.planarconfig == 2 else 1
        each = len(page.dataoffsets) // planes
        stored = [number + plane * each for number in missing for plane in range(planes)]
        offsets, counts = ([int(values[k]) for k in stored] for values in (page.dataoffsets, page.databytecounts))
        data = self._ranges.fetch(offsets, counts) if stored else []
        made = {}
        for n, number in enumerate(missing):
            parts: list[NDArray[Any]] = []
            for k in range(n * planes, (n + 1) * planes):
                if len(data[k]) < counts[k]:
                    raise ValueError("the file ends before it")
                # A sparse file leaves empty tiles out.
                decoded = page.decode(data[k], stored[k], jpegtables=page.jpegtables)[0] if data[k] else None
                parts += [] if decoded is None else [decoded[0]]
            if len(parts) < planes:
                rgb: NDArray[np.uint8] = np.broadcast_to(WHITE, (*shape, 3))
            else:
                rgb = _to_rgb(page, np.concatenate([part[..., :1] for part in parts], 2) if planes > 1 else parts[0])
            made[number] = self._put(level, number, rgb)
        return [made[number] if tile is None else tile for number, tile in zip(numbers, found, strict=True)]

    def _get(self, level: int, number: int) -> NDArray[np.uint8] | None:
        with self._lock:
            found = self._kept.get((level, number))
            if found is not None:
                self._kept.move_to_end((level, number))
            return found

    def _put(self, level: int, number: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with self._lock:
            if (level, number) not in self._kept:
                self._kept[level, number] = image
                self._bytes += image.nbytes
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return image


def _to_rgb(page: Any, image: NDArray[Any]) -> NDArray[np.uint8]:
    """RGB (h, w, 3) of a decoded segment (h, w, samples) or (h, w)."""
    import tifffile

    if image.ndim == 2:
        image = image[..., None]
    if image.dtype == np.bool_ or page.bitspersample == 1:
        image = (image > 0).astype(np.uint8) * 255
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        return np.asarray(page.colormap >> 8, dtype=np.uint8).T[image[..., 0]]
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        image = 255 - image
    if image.shape[2] in (1, 2):
        image = np.concatenate([np.repeat(image[..., :1], 3, axis=2), image[..., 1:]], axis=2)
    if image.shape[2] != 4:
        return image
    # What the fourth sample is, the file says: nothing of the kind, colours that are weighted with it already, or not.
    kind = int(page.extrasamples[0]) if page.extrasamples else int(tifffile.EXTRASAMPLE.UNASSALPHA)
    if kind == tifffile.EXTRASAMPLE.UNSPECIFIED:
        return image[..., :3]
    if kind == tifffile.EXTRASAMPLE.ASSOCALPHA:
        return np.minimum(image[..., :3].astype(np.uint16) + (255 - image[..., 3:]), 255).astype(np.uint8)
    return on_background(image, WHITE)
