"""Tiled JPEG TIFFs read directly: byte ranges of native tiles, decoded by libjpeg-turbo into the wanted place.

What OpenSlide does is followed to the pixel (colour space by the photometric tag alone, smooth upsampling of
chroma, the integer transform); what it composes or converts on the way is left out. Taken are the files that it
calls ``aperio`` and ``generic-tiff`` whose levels are all 8-bit RGB or YCbCr JPEG tiles, upright.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DamagedPixels, InputError
from deepfere.readers.jpeg import jpeg_damage, pixel_memory
from deepfere.readers.kept_tiles import KeptTiles
from deepfere.readers.ranges import Ranges, open_ranges
from deepfere.readers.slide import Backend, Icc, Level, Slide, open_slide, whole_downsample
from deepfere.readers.slide_mpp import trusted_mpp
from deepfere.readers.slide_native import NativeTile, Straight, read_native
from deepfere.readers.slide_tiff_levels import TiledLevel, aperio_or_stated_mpp, tiled_levels

WHITE = np.array([255, 255, 255], dtype=np.uint8)
CACHE_BYTES = 8 << 20


class TiffSlide:
    """A slide of JPEG tiles (thread-safe; opened again where it is unpickled).

    Native tiles that a window used in part are kept, up to 8 MiB per slide: its neighbours need them. Those that
    it used whole are not, so that memory does not grow with the slide.

    Args:
        path: File or URL.
        mpp_um: Micrometres per level-0 pixel (y, x).
        tiled: The pyramid, level 0 first.
        ranges: The file's bytes.
        profile: Embedded ICC profile.
    """

    backend: Backend = "tiff"
    icc: Icc = "none"

    def __init__(
        self,
        path: str,
        mpp_um: tuple[float, float],
        tiled: list[TiledLevel],
        ranges: Ranges,
        profile: bytes | None = None,
    ) -> None:
        self.profile = profile
        self.path, self.mpp_um, self.background = path, mpp_um, WHITE
        self.tiled, self._ranges = tuple(tiled), ranges
        self.shape_px = tiled[0].shape_px
        h0, w0 = self.shape_px
        self.levels = tuple(
            Level(t.shape_px, (whole_downsample(h0, t.shape_px[0]), whole_downsample(w0, t.shape_px[1])), t.tile_px)
            for t in tiled
        )
        self.decoded = 0
        """Native tiles decoded so far."""
        self._kept = KeptTiles(CACHE_BYTES)
        self._local = threading.local()

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `deepfere.readers.slide.Slide.read`.

        Raises:
            InputError: A native tile is damaged or lies beyond the end of the file; names it.
        """
        return read_native(self, level, row, col, height, width)

    def native_tiles(
        self, level: int, first_row: int, first_col: int, use: NDArray[np.uint8], straight: Straight
    ) -> Iterator[NativeTile]:
        """See `deepfere.readers.slide_native.NativeTiles`."""
        th, tw = self.tiled[level].tile_px
        flags = {(first_row + int(r), first_col + int(c)): int(use[r, c]) for r, c in np.argwhere(use)}
        found = dict(zip(flags, self._kept.find((level, *p) for p in flags), strict=True))
        data = self._fetch(level, [p for p, tile in found.items() if tile is None])
        for (r, c), flag in flags.items():
            tile = found[r, c]
            if tile is None and flag == 1:
                into = straight(r, c)
                if into is not None and into.shape == (th, tw, 3) and into.flags.c_contiguous:
                    self._decode(level, r, c, data[r, c], into)
                    yield r, c, None
                    continue
            if tile is None:
                tile = self._decode(level, r, c, data[r, c], self._buffer(th, tw, fresh=flag > 1))
            self._kept.used((level, r, c), tile, flag > 1)
            yield r, c, tile

    def _fetch(self, level: int, places: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        plane = self.tiled[level]
        offsets, counts = [int(plane.offsets[p]) for p in places], [int(plane.counts[p]) for p in places]
        for (r, c), start, count in zip(places, offsets, counts, strict=True):
            if start + count > self._ranges.size:
                raise self._damaged(level, r, c, "the file ends before it")
        return dict(zip(places, self._ranges.fetch(offsets, counts), strict=True)) if places else {}

    def _decode(self, level: int, r: int, c: int, data: bytes, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import imagecodecs

        plane = self.tiled[level]
        if not data:
            out[:] = self.background
            return out
        problem = jpeg_damage(data)
        if problem is None:
            try:
                imagecodecs.jpeg8_decode(
                    data, tables=plane.tables, colorspace=plane.colour, outcolorspace="rgb", out=out
                )
            except Exception as error:  # the codec's own class, or ValueError where the size is another
                problem = " ".join(str(error).split())
        if problem is not None:
            raise self._damaged(level, r, c, problem)
        self.decoded += 1
        return out

    def _damaged(self, level: int, r: int, c: int, why: str) -> DamagedPixels:
        th, tw = self.tiled[level].tile_px
        return DamagedPixels(
            f"level {level} cannot be decoded at row {r * th}, column {c * tw}: its tile {r}, {c} (row, column) is "
            f"damaged ({why})",
            where=self.path,
            remedy="copy or scan the slide again",
        )

    def _buffer(self, height: int, width: int, fresh: bool) -> NDArray[np.uint8]:
        """A tile's worth of memory: new to be kept, else the thread's own (new memory is as slow as decoding)."""
        held = getattr(self._local, "buffer", None)
        if fresh or held is None or held.shape[:2] != (height, width):
            made = pixel_memory(height, width)
            if fresh:
                return made
            self._local.buffer = held = made
        return held

    def close(self) -> None:
        """See `deepfere.readers.slide.Slide.close`."""
        self._ranges.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.mpp_um, "tiff")


def open_tiff(path: str | Path, given_mpp_um: tuple[float, float] | None) -> TiffSlide:
    """Open a tiled JPEG TIFF.

    Args:
        path: File, or URL of one.
        given_mpp_um: Micrometres per level-0 pixel (y, x); None takes the file's own.

    Raises:
        NotTaken: It is a plain TIFF, but not such a one (says what it is).
        InputError: It is no TIFF, or one of its vendor's own kind, or see `deepfere.readers.slide.open_slide`.
    """
    import tifffile

    from deepfere.readers.slide_flat import embedded_profile

    where = str(path)
    ranges = open_ranges(path)
    try:
        with ranges.open() as stream, tifffile.TiffFile(stream) as file:
            levels = tiled_levels(file, where)
            mpp = given_mpp_um or trusted_mpp(aperio_or_stated_mpp(file), path)
            profile = embedded_profile(file.pages.first)
    except InputError:
        ranges.close()
        raise
    except Exception as error:  # a damaged directory makes tifffile raise many things
        ranges.close()
        raise InputError(
            f"cannot be read as TIFF ({' '.join(str(error).split())})", where=where, remedy="copy it again"
        ) from error
    return TiffSlide(where, mpp, levels, ranges, profile)


def in_place_of(other: Slide) -> Slide:
    """The same slide read directly where that is proven equal on this very file, else the slide as it was given.

    Equal means: the same levels, and the same pixels in one native tile of each level, the one of most bytes
    (the first one where the other reader cannot place pixels of the level exactly).
    """
    try:
        slide = open_tiff(other.path, other.mpp_um)
    except InputError:
        return other
    if slide.levels == other.levels and all(_same_tile(slide, other, k) for k in range(len(slide.levels))):
        other.close()
        return slide
    slide.close()
    return other


def _same_tile(slide: TiffSlide, other: Slide, level: int) -> bool:
    plane = slide.tiled[level]
    exact = all(float(d).is_integer() for d in slide.levels[level].downsample) and all(
        full == d * part
        for full, d, part in zip(slide.shape_px, slide.levels[level].downsample, plane.shape_px, strict=True)
    )
    r, c = np.unravel_index(int(plane.counts.argmax()) if exact else 0, plane.counts.shape)
    (h, w), (th, tw) = plane.shape_px, plane.tile_px
    y, x = int(r) * th, int(c) * tw
    window = (level, y, x, min(th, h - y), min(tw, w - x))
    try:
        return bool(np.array_equal(slide.read(*window), other.read(*window)))
    except InputError:
        return False
