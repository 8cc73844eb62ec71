"""What can be read of a slide that is damaged in places."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DamagedPixels
from deepfere.readers.slide import Slide


class ReadAround:
    """A slide whose damaged native tiles are background, and known.

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
        self._damaged: list[tuple[int, int, int, int, int]] = []

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
                try:
                    out[a - row : b - row, c - col : d - col] = self._slide.read(level, a, c, b - a, d - c)
                except DamagedPixels:
                    self._damaged.append((level, a, b, c, d))
        return out

    def damaged(self, shape_px: tuple[int, int], spacing_um: tuple[float, float]) -> NDArray[np.bool_]:
        """Pixels (h, w) of a grid from the slide's origin that a damaged tile reaches into."""
        out = np.zeros(shape_px, bool)
        for level, *window in self._damaged:
            own = [self.mpp_um[k] * self.levels[level].downsample[k] / spacing_um[k] for k in (0, 0, 1, 1)]
            a, b, c, d = (edge * scale for edge, scale in zip(window, own, strict=True))
            out[int(a + 1e-6) : int(np.ceil(b - 1e-6)), int(c + 1e-6) : int(np.ceil(d - 1e-6))] = True
        return out
