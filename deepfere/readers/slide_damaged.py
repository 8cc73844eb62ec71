"""What can be read of a slide that is damaged in places."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DamagedPixels
from deepfere.readers.slide import Slide, read_area

NAMED = 8
"""Damaged tiles that are listed."""
TilePlace = tuple[int, int, int]
"""Level, row and column of a native tile."""


@dataclass(frozen=True)
class DamagedTiles:
    """Native tiles of a slide that cannot be decoded.

    Attributes:
        places: Level, row and column of each, in order.
        tile_um: Size (y, x) of a native tile of level 0, slide micrometres.
    """

    places: tuple[TilePlace, ...] = ()
    tile_um: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, slide: Slide, places: Iterable[Any]) -> DamagedTiles:
        """Some of a slide's tiles: level, row and column of each."""
        h, w = slide.levels[0].tile_px
        tile_um = h * slide.mpp_um[0], w * slide.mpp_um[1]
        return cls(tuple(sorted({(int(n), int(r), int(c)) for n, r, c in places})), tile_um)

    def __len__(self) -> int:
        return len(self.places)

    def hide(self, points_um: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which points (..., 2), slide micrometres, lie in what cannot be read: other levels are made from level 0."""
        row, col = np.floor(points_um / np.asarray(self.tile_um)).astype(np.int64).T
        own = np.array([r * 2**32 + c for level, r, c in self.places if level == 0], np.int64)
        return np.isin(row * 2**32 + col, own).T

    def text(self) -> str:
        """How many there are, and the first of them."""
        listed = [f"level {n}, row {r}, column {c}" for n, r, c in self.places[:NAMED]]
        more = [f"and {len(self) - NAMED} more"] if len(self) > NAMED else []
        return f"{len(self)} native tile{'' if len(self) == 1 else 's'} ({'; '.join(listed + more)})"

    def warning(self) -> str:
        """What a user should know of them."""
        lost, instead = "count as not shown by it", "are read from finer levels"
        levels = {n > 0 for n, _, _ in self.places}
        both = f"those of level 0 {lost}, the others {instead}"
        what = both if len(levels) == 2 else f"their pixels {instead if True in levels else lost}"
        return f"the slide is damaged in {self.text()}: {what}; copy or scan it again"


NO_DAMAGE = DamagedTiles()


class ReadAround:
    """A slide whose damaged native tiles do not keep the rest of it from being read, and are known.

    Such a tile of level 0 is background; one of another level is made from finer levels.

    Args:
        slide: An opened slide.

    Attributes:
        first: What the first damaged tile said; None where there was none.
    """

    def __init__(self, slide: Slide) -> None:
        self.shape_px, self.mpp_um, self.levels = slide.shape_px, slide.mpp_um, slide.levels
        self.background = slide.background
        self.first: DamagedPixels | None = None
        self._slide = slide
        self._places: set[TilePlace] = set()

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `deepfere.readers.slide.Slide.read`; a window that cannot be read is read native tile by native tile."""
        try:
            return self._slide.read(level, row, col, height, width)
        except DamagedPixels as error:
            self.first = self.first or error
        out = np.empty((height, width, 3), np.uint8)
        out[:] = self.background
        (h, w), (th, tw) = self.levels[level].shape_px, self.levels[level].tile_px
        top, left, bottom, right = max(row, 0), max(col, 0), min(row + height, h), min(col + width, w)
        for y in range(top - top % th, bottom, th):
            for x in range(left - left % tw, right, tw):
                a, b, c, d = max(y, top), min(y + th, bottom), max(x, left), min(x + tw, right)
                window = (level, a, c, b - a, d - c)
                try:
                    pixels = self._slide.read(*window)
                except DamagedPixels:
                    self._places.add((level, y // th, x // tw))
                    if level == 0:
                        continue
                    pixels = self._from_finer(*window)
                out[a - row : b - row, c - col : d - col] = pixels
        return out

    def _from_finer(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        finer = copy.copy(self)  # what it finds damaged is known here, too
        finer.levels = self.levels[:level]
        y, x = (mpp * down for mpp, down in zip(self.mpp_um, self.levels[level].downsample, strict=True))
        return read_area(finer, (row * y, col * x), (height, width), (y, x))[0]

    @property
    def damaged(self) -> DamagedTiles:
        """What was found damaged so far."""
        return DamagedTiles.of(self._slide, self._places)

    def hidden(
        self, origin_um: tuple[float, float], spacing_um: tuple[float, float], shape_px: tuple[int, int]
    ) -> NDArray[np.bool_]:
        """Pixels (h, w) of a grid that a damaged tile of level 0 reaches into.

        Args:
            origin_um: Outer corner of the first pixel (y, x), slide micrometres.
            spacing_um: Pixel size (y, x).
            shape_px: Rows and columns.
        """
        out = np.zeros(shape_px, bool)
        for level, *place in self._places:
            if level > 0:
                continue
            part = []
            for k in (0, 1):
                side, own = self.levels[0].tile_px[k], self.mpp_um[k]
                begin, end = place[k] * side, min((place[k] + 1) * side, self.shape_px[k])
                low, high = ((edge * own - origin_um[k]) / spacing_um[k] for edge in (begin, end))
                part.append(slice(max(0, int(np.floor(low + 1e-6))), max(0, int(np.ceil(high - 1e-6)))))
            out[tuple(part)] = True
        return out
