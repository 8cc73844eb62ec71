"""Colours of a slide turned into sRGB by the scanner's own profile, pixel by pixel, as they are read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.readers.slide import Backend, Icc, Slide, open_slide
from deepfere.readers.slide_native import NativeTile, NativeTiles, Straight, read_native

STRIP_PX = 1 << 20
AS_THEY_ARE = "leave out --slide-icc (slide.icc=none)"


class SrgbSlide:
    """A slide whose pixels are converted as they are read (opened again where it is unpickled).

    A pixel's colour depends on that pixel alone, so that windows agree as they did before. What lies outside the
    image stays background.

    Args:
        slide: The opened slide; it has a profile.

    Raises:
        InputError: The profile is damaged, or is not one of RGB colours.
    """

    backend: Backend
    icc: Icc = "srgb"

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self.path, self.backend, self.shape_px = slide.path, slide.backend, slide.shape_px
        self.mpp_um, self.levels, self.background = slide.mpp_um, slide.levels, slide.background
        self.profile = slide.profile
        self._transform = _transform(slide)

    @property
    def decoded(self) -> int | None:
        """See `deepfere.readers.slide.Slide.decoded`."""
        return self._slide.decoded

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `deepfere.readers.slide.Slide.read`."""
        out = self._slide.read(level, row, col, height, width)
        h, w = self.levels[level].shape_px
        top, left, bottom, right = max(row, 0), max(col, 0), min(row + height, h), min(col + width, w)
        if top >= bottom or left >= right:
            return out
        if not out.flags.writeable:
            out = out.copy()
        inside = out[top - row : bottom - row, left - col : right - col]
        step = max(1, STRIP_PX // inside.shape[1])
        for first in range(0, len(inside), step):
            inside[first : first + step] = self._converted(inside[first : first + step])
        return out

    def _converted(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        from PIL import Image, ImageCms

        picture = Image.fromarray(np.ascontiguousarray(pixels))
        ImageCms.applyTransform(picture, self._transform, inPlace=True)
        return np.asarray(picture)

    def close(self) -> None:
        """See `deepfere.readers.slide.Slide.close`."""
        self._slide.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.mpp_um, self.backend, "srgb")


class SrgbTiles(SrgbSlide):
    """The same of a slide that decodes the native tiles that are wanted alone, and here converts no others.

    Args:
        slide: The opened slide; it has a profile.

    Raises:
        InputError: See `SrgbSlide`.
    """

    def __init__(self, slide: Slide) -> None:
        super().__init__(slide)
        assert isinstance(slide, NativeTiles)
        self._tiled: NativeTiles = slide

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `deepfere.readers.slide.Slide.read`."""
        return read_native(self, level, row, col, height, width)

    def native_tiles(
        self, level: int, first_row: int, first_col: int, use: NDArray[np.uint8], straight: Straight
    ) -> Iterator[NativeTile]:
        """See `deepfere.readers.slide_native.NativeTiles`."""
        into: NDArray[np.uint8] | None = None

        def noted(r: int, c: int) -> NDArray[np.uint8] | None:
            nonlocal into
            into = straight(r, c)
            return into

        for r, c, tile in self._tiled.native_tiles(level, first_row, first_col, use, noted):
            if tile is not None:
                # A copy: the slide may keep the tile for a later window.
                yield r, c, self._converted(tile)
                continue
            assert into is not None
            into[:] = self._converted(into)
            yield r, c, None


def in_srgb(slide: Slide) -> Slide:
    """The slide in sRGB; as it is where no profile says what its colours are.

    Raises:
        InputError: See `SrgbSlide`.
    """
    if slide.profile is None:
        return slide
    return SrgbTiles(slide) if isinstance(slide, NativeTiles) else SrgbSlide(slide)


def profile_text(profile: bytes) -> str:
    """What a profile calls itself, and the start of its sha256."""
    from PIL import ImageCms

    try:
        name = " ".join(ImageCms.getProfileDescription(ImageCms.getOpenProfile(io.BytesIO(profile))).split())
    except ImageCms.PyCMSError:
        name = "damaged"
    return f"{name or 'without a name'} (sha256 {hashlib.sha256(profile).hexdigest()[:16]})"


def _transform(slide: Slide) -> Any:
    """From the slide's colours to sRGB, by the intent that the profile asks for."""
    from PIL import ImageCms

    try:
        own = ImageCms.getOpenProfile(io.BytesIO(slide.profile or b""))
        space = own.profile.xcolor_space.strip()
        if space != "RGB":
            raise InputError(f"its colour profile is one of {space} colours", where=slide.path, remedy=AS_THEY_ARE)
        srgb = ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(own))
        return ImageCms.buildTransform(own, srgb, "RGB", "RGB", renderingIntent=intent)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise InputError(
            f"its colour profile cannot be used ({error})", where=slide.path, remedy=AS_THEY_ARE
        ) from error
