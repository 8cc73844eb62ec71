"""Slides: one small protocol over OpenSlide and plain images, and area-averaged reading at an exact mpp.

Frame: the origin is the outer corner of level 0's first pixel (OpenSlide's ``bounds-*`` are ignored); level-0
pixel (r, c) has its centre at ``((r + 1/2) mpp_y, (c + 1/2) mpp_x)`` micrometres.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.readers.ranges import first_bytes
from deepfere.readers.slide_area import Axis, average
from deepfere.readers.slide_mpp import given_mpp
from deepfere.remote import is_url

READ_PIXELS = 1 << 24
# Of a damaged file tifffile says in its log what its caller is told anyway: without this, on the user's terminal too.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
Backend = Literal["auto", "openslide", "tiff", "flat", "zarr"]
Icc = Literal["none", "srgb"]


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        shape_px: Pixels (h, w).
        downsample: Level-0 pixels per pixel of this level, (y, x).
        tile_px: Pixels (h, w) that the file stores as one piece.
    """

    shape_px: tuple[int, int]
    downsample: tuple[float, float]
    tile_px: tuple[int, int] = field(default=(256, 256), compare=False)


class Readable(Protocol):
    """Pixels of a pyramid.

    Attributes:
        shape_px: Level-0 pixels (h, w).
        mpp_um: Micrometres per level-0 pixel (y, x).
        levels: The pyramid, level 0 first.
        background: (3,) uint8, the colour where there is no image.
    """

    shape_px: tuple[int, int]
    mpp_um: tuple[float, float]
    levels: tuple[Level, ...]
    background: NDArray[np.uint8]

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """RGB (height, width, 3) of a window in pixels of ``level``; background outside the image."""
        ...


class Slide(Readable, Protocol):
    """An opened slide.

    Attributes:
        path: Where it is.
        backend: "openslide", "tiff", "flat" or "zarr": which reader it is.
        profile: Its embedded ICC profile; None where it has none.
        icc: "srgb" where the profile is applied, "none" where pixels are as stored.
    """

    path: str
    backend: Backend
    icc: Icc
    profile: bytes | None

    @property
    def decoded(self) -> int | None:
        """Native tiles decoded so far by this process; None where the reader does not count."""
        ...

    def close(self) -> None:
        """Give its file and memory back."""
        ...


@dataclass(frozen=True)
class Reading:
    """How pixels of a wanted size are read from a slide, for the provenance.

    Attributes:
        backend: The reader.
        level: Level that they are read from.
        level_mpp_um: Its pixel size (y, x).
        mpp_um: The pixel size (y, x) that is delivered, exactly.
        scale: Pixels of the level per delivered pixel (y, x); (1, 1) is as stored.
        icc: "srgb" where colours are converted by the slide's own profile.
        profile: That profile, in words.
    """

    backend: Backend
    level: int
    level_mpp_um: tuple[float, float]
    mpp_um: tuple[float, float]
    scale: tuple[float, float]
    icc: Icc = "none"
    profile: str | None = None

    @classmethod
    def of(cls, slide: Slide, mpp_um: tuple[float, float]) -> Reading:
        """What `read_area` does for pixels of this size."""
        level = adequate_level(slide, mpp_um)
        down, own = slide.levels[level].downsample, slide.mpp_um
        size = own[0] * down[0], own[1] * down[1]
        scale = mpp_um[0] / size[0], mpp_um[1] / size[1]
        if slide.icc == "none" or slide.profile is None:
            return cls(slide.backend, level, size, mpp_um, scale)
        from deepfere.readers.slide_colour import profile_text

        return cls(slide.backend, level, size, mpp_um, scale, slide.icc, profile_text(slide.profile))


def open_slide(
    path: str | Path,
    mpp_um: float | tuple[float, float] | None = None,
    backend: Backend = "auto",
    icc: Icc = "none",
) -> Slide:
    """Open a slide or a plain picture.

    OpenSlide knows the formats. Plain TIFFs are read directly where it cannot be exact (it ignores the
    orientation tag, and places levels whose size is not a whole fraction of level 0 approximately), and so are
    TIFFs that it does not know, OME-TIFF (of whose pyramid it sees one level), PNG and JPEG. A folder is an
    OME-Zarr slide (`deepfere.readers.slide_zarr`). Tiled JPEG TIFFs, Aperio's among them, are read directly because
    that is faster, where the pixels are the same (`deepfere.readers.slide_tiff.in_place_of`).

    Args:
        path: The slide; a URL is always read directly, by byte ranges: TIFFs that are not of a vendor's own kind,
            Aperio's of JPEG tiles, OME-Zarr, PNG and JPEG.
        mpp_um: Micrometres per level-0 pixel, one value or (y, x); wins over what the file says.
        backend: "auto" as above; "openslide", "tiff", "flat" (plain pictures) or "zarr" takes that reader and no
            other.
        icc: "srgb" converts colours by the embedded profile, where there is one.

    Raises:
        InputError: No reader (not the one asked for) takes the file; it is not an 8-bit RGB or grey picture; or
            nothing trustworthy says how large a pixel is: no mpp, one outside 0.05-100 um, or a default for
            screens and printers (72, 96, 100, 150, 200, 300 or 600 dpi).
    """
    slide = _opened_as_stored(path, None if mpp_um is None else given_mpp(mpp_um), backend)
    if icc == "none":
        return slide
    from deepfere.readers.slide_colour import in_srgb

    try:
        return in_srgb(slide)
    except InputError:
        slide.close()
        raise


def _opened_as_stored(path: str | Path, given: tuple[float, float] | None, backend: Backend) -> Slide:
    import openslide

    from deepfere.readers import slide_flat, slide_openslide, slide_tiff, slide_zarr

    if backend == "zarr" or (backend == "auto" and slide_zarr.is_zarr(path)):
        return slide_zarr.open_zarr(path, given, look=backend == "auto")
    if is_url(path):
        return _open_url(str(path), given, backend)
    path = Path(path)
    if not path.exists():
        raise InputError("does not exist", where=path, remedy="check the path")
    if backend in ("tiff", "flat"):
        return (slide_tiff.open_tiff if backend == "tiff" else slide_flat.open_flat)(path, given)
    detected = openslide.OpenSlide.detect_format(str(path))
    if backend == "openslide":
        if detected == "generic-tiff":
            slide_flat.refuse_deep(path)
        return slide_openslide.open_openslide(path, given)
    if detected is None or (detected == "generic-tiff" and slide_flat.prefer_flat_tiff(path)):
        slide: Slide = slide_flat.open_flat(path, given)
    else:
        slide = slide_openslide.open_openslide(path, given)
    return slide_tiff.in_place_of(slide) if detected in ("aperio", "generic-tiff") else slide


def _open_url(url: str, given: tuple[float, float] | None, backend: Backend) -> Slide:
    from deepfere.readers import slide_flat, slide_tiff
    from deepfere.readers.slide_tiff_levels import NotTaken

    if backend == "openslide":
        raise InputError("OpenSlide reads no URL", where=url, remedy="copy it to a local disk, or leave slide.backend")
    if backend == "flat":
        return slide_flat.open_flat(url, given)
    if backend == "auto" and first_bytes(url, 2) not in (b"II", b"MM"):
        return slide_flat.open_flat(url, given)
    try:
        return slide_tiff.open_tiff(url, given)
    except NotTaken:
        if backend == "tiff":
            raise
        return slide_flat.open_flat(url, given)


@lru_cache(maxsize=4)
def opened(path: str, mpp_um: tuple[float, float], backend: Backend, icc: Icc, content: str) -> Slide:
    """`open_slide`, once per process: workers take up many pieces of the same few slides.

    One that has to make room is closed when the last of those who use it lets go of it.

    Args:
        path: As for `open_slide`, and so are the next three.
        mpp_um: Level 0 pixel size (y, x).
        backend: Who reads it.
        icc: What becomes of its colours.
        content: A digest that its content goes into: another file at the same path is opened anew.
    """
    return open_slide(path, mpp_um, backend, icc)


def slide_digest(path: str | Path) -> str:
    """sha256 (hexadecimal) of a slide's content, wherever it lies.

    Of a slide in several files it is that of the one that is given; of a MIRAX slide, whose pixels lie in the folder
    beside it, also of the names and sizes in there.

    Raises:
        InputError: It cannot be read.
    """
    from deepfere.readers.digest import content_digest, names_and_sizes
    from deepfere.readers.slide_zarr import is_zarr, zarr_digest

    if is_zarr(path):
        return zarr_digest(path)
    own = content_digest(path)
    if is_url(path) or Path(path).suffix.lower() != ".mrxs":
        return own
    return hashlib.sha256(f"{own}\n{names_and_sizes(Path(path).with_suffix(''))}".encode()).hexdigest()


def on_background(rgba: NDArray[np.uint8], background: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB (..., 3) of straight-alpha RGBA (..., 4) laid on a background colour."""
    alpha = rgba[..., 3:]
    if alpha.size == 0 or alpha.min() == 255:
        return rgba[..., :3]
    a = alpha.astype(np.uint32)
    blend = rgba[..., :3] * a + background.astype(np.uint32) * (255 - a)
    return ((blend + 127) // 255).astype(np.uint8)


def whole_downsample(full: int, reduced: int) -> float:
    """Level-0 pixels per reduced pixel along one axis.

    Pyramids are made by whole factors and sizes are then cut or padded: where a whole factor gives the
    reduced size, that is the downsample; the ratio of sizes would stretch the level by up to a pixel.
    """
    ratio = full / reduced
    whole = round(ratio)
    if whole >= 1 and reduced in (full // whole, -(-full // whole)):
        return float(whole)
    return ratio


def read_area(
    slide: Readable,
    origin_um: tuple[float, float],
    shape_px: tuple[int, int],
    mpp_um: float | tuple[float, float],
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A window of the slide, area-averaged at exactly the wanted mpp.

    Output pixel (i, j) is the mean over ``[origin + i mpp, origin + (i + 1) mpp)`` of the coarsest level that
    is at least as fine as wanted, each source pixel weighted by its overlap; a whole ratio, aligned, is the
    plain block mean. Two windows that lie on one grid agree with one large window byte by byte: level and
    weights depend on the grid alone, and every pixel adds up in the same order.

    Args:
        slide: An opened slide.
        origin_um: Outer corner (y, x) of the first output pixel, slide micrometres; may lie outside.
        shape_px: Output pixels (h, w).
        mpp_um: Micrometres per output pixel, one value or (y, x).

    Returns:
        RGB (h, w, 3) uint8, background colour where there is no slide, and coverage (h, w) float32, the
        fraction of each pixel that lies inside the slide.
    """
    level, (y, x) = area_axes(slide, origin_um, shape_px, given_mpp(mpp_um))
    coverage = y.covered.astype(np.float32)[:, None] * x.covered.astype(np.float32)[None, :]
    out = np.empty((*shape_px, 3), dtype=np.uint8)
    whole = bool((y.covered == 1).all() and (x.covered == 1).all())
    if not whole:
        out[:] = slide.background
        if not ((y.covered > 0).any() and (x.covered > 0).any()):
            return out, coverage
    # Strips of output rows bound the memory whatever the ratio; they do not touch each other's pixels.
    cols, left, right = x.weights(0, shape_px[1])
    for top, bottom in y.strips(0, shape_px[0], READ_PIXELS // (right - left)):
        if (y.stop[top:bottom] > y.start[top:bottom]).any():
            first, last = y.reach(top, bottom)
            source = slide.read(level, first, left, last - first, right - left)
            partly = None if whole else coverage
            average(source, first, y, (top, bottom), cols, x, partly, slide.background, out)
    return out, coverage


def area_axes(
    slide: Readable, origin_um: tuple[float, float], shape_px: tuple[int, int], mpp_um: tuple[float, float]
) -> tuple[int, tuple[Axis, Axis]]:
    """The level that `read_area` reads for a window, and the window's overlaps with it along y and x."""
    level = adequate_level(slide, mpp_um)
    y, x = (
        Axis.of(
            origin_um[k],
            shape_px[k],
            mpp_um[k],
            slide.mpp_um[k],
            slide.levels[level].downsample[k],
            slide.levels[level].shape_px[k],
            slide.shape_px[k],
        )
        for k in (0, 1)
    )
    return level, (y, x)


def adequate_level(slide: Readable, mpp_um: tuple[float, float]) -> int:
    """The coarsest level that is no coarser than wanted on either axis; level 0 where none is."""
    best = 0
    for k, level in enumerate(slide.levels):
        finer = all(slide.mpp_um[a] * level.downsample[a] <= mpp_um[a] * (1 + 1e-6) for a in (0, 1))
        if finer and level.downsample[0] > slide.levels[best].downsample[0]:
            best = k
    return best
