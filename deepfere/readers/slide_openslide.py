"""Slides of every format that OpenSlide knows."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DamagedPixels, InputError
from deepfere.readers.slide import Backend, Icc, Level, on_background, open_slide, whole_downsample
from deepfere.readers.slide_mpp import number, trusted_mpp

CACHE_BYTES = 256 << 20
ANCHOR_SEARCH_PX = 64
CELL_PX = 1024


def open_openslide(path: Path, given: tuple[float, float] | None) -> OpenSlideSlide:
    """Open a slide through OpenSlide.

    Args:
        path: The slide.
        given: Micrometres per level-0 pixel (y, x); None takes the file's own.

    Raises:
        InputError: See `deepfere.readers.slide.open_slide`.
    """
    import openslide

    try:
        handle = openslide.OpenSlide(str(path))
    except openslide.OpenSlideError as error:
        raise InputError(f"cannot be opened ({error})", where=path, remedy="convert it to a pyramidal TIFF") from error
    try:
        keys = (openslide.PROPERTY_NAME_MPP_Y, openslide.PROPERTY_NAME_MPP_X)
        stated = tuple(number(handle.properties.get(key)) for key in keys)
        mpp = given or trusted_mpp((stated[0], stated[1]), path)
    except InputError:
        handle.close()
        raise
    return OpenSlideSlide(path, handle, mpp)


class OpenSlideSlide:
    """A slide read through OpenSlide (thread-safe; opened again where it is unpickled)."""

    backend: Backend = "openslide"
    icc: Icc = "none"
    decoded = None

    def __init__(self, path: Path, handle: Any, mpp_um: tuple[float, float]) -> None:
        import openslide

        self.path = str(path)
        self.mpp_um = mpp_um
        self._handle = handle
        # The default cache of 32 MiB does not hold one row of tiles of a large slide.
        self._cache = openslide.OpenSlideCache(CACHE_BYTES)
        handle.set_cache(self._cache)
        w0, h0 = handle.dimensions
        self.shape_px = (h0, w0)
        stored = [
            tuple(int(handle.properties.get(f"openslide.level[{k}].tile-{side}", 256)) for side in ("height", "width"))
            for k in range(handle.level_count)
        ]
        self.levels = tuple(
            Level((h, w), (whole_downsample(h0, h), whole_downsample(w0, w)), (tile[0], tile[1]))
            for (w, h), tile in zip(handle.level_dimensions, stored, strict=True)
        )
        # The public property parses the bytes: it fails on a damaged profile, and gives others back.
        self.profile: bytes | None = getattr(handle, "_profile", None)
        colour = handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self.background = np.array([int(colour[k : k + 2], 16) for k in (0, 2, 4)], dtype=np.uint8)

    @cached_property
    def _exact(self) -> tuple[bool, ...]:
        """Which levels OpenSlide can address without a fractional shift."""
        return tuple(float(d).is_integer() for d in self._handle.level_downsamples)

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `deepfere.readers.slide.Slide.read`."""
        out = np.empty((height, width, 3), dtype=np.uint8)
        out[:] = self.background
        h, w = self.levels[level].shape_px
        top, left, bottom, right = max(row, 0), max(col, 0), min(row + height, h), min(col + width, w)
        if top >= bottom or left >= right:
            return out
        # A location is given in whole level-0 pixels. Where the downsample is not whole, every fixed cell of
        # the level is read from one anchor of its own whose location is almost whole: the shift stays
        # negligible, and a pixel is the same whatever window it is read in.
        cell = 4096 if self._exact[level] else CELL_PX
        for r0 in range(top - top % cell, bottom, cell):
            for c0 in range(left - left % cell, right, cell):
                a, b = max(r0, top), min(r0 + cell, bottom)
                c, d = max(c0, left), min(c0 + cell, right)
                piece = self._piece(level, r0, c0, a, b, c, d)
                out[a - row : b - row, c - col : d - col] = piece
        return out

    def _piece(
        self, level: int, cell_row: int, cell_col: int, top: int, bottom: int, left: int, right: int
    ) -> NDArray[np.uint8]:
        import openslide

        downsample = float(self._handle.level_downsamples[level])
        if self._exact[level]:
            row, col = top, left
        else:
            row, col = _anchor(cell_row, downsample), _anchor(cell_col, downsample)
        location = (round(col * downsample), round(row * downsample))
        try:
            region = self._handle.read_region(location, level, (right - col, bottom - row))
        except openslide.OpenSlideError as error:
            # After an error OpenSlide refuses everything: what else the slide holds is read through a new handle.
            self._handle = openslide.OpenSlide(self.path)
            self._handle.set_cache(self._cache)
            raise DamagedPixels(
                f"level {level} cannot be decoded at row {top}, column {left} ({error})",
                where=self.path,
                remedy="copy or scan the slide again",
            ) from error
        rgba = np.asarray(region)[top - row :, left - col :]
        return on_background(rgba, self.background)

    def close(self) -> None:
        """See `deepfere.readers.slide.Slide.close`."""
        self._handle.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.mpp_um, "openslide")


def _anchor(start: int, downsample: float) -> int:
    """The pixel at or shortly before ``start`` whose level-0 position is nearest to whole."""
    candidates = np.arange(max(0, start - ANCHOR_SEARCH_PX + 1), start + 1)
    position = candidates * downsample
    distance = np.abs(position - np.rint(position))
    return int(candidates[::-1][np.argmin(distance[::-1])])
