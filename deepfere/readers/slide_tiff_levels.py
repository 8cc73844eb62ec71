"""Which levels a tiled JPEG TIFF has, and where their native tiles are; what is no such file says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.remote import is_url

COLOURS = {2: "rgb", 6: "ycbcr"}
FOREIGN = ("SCN", "Philips", "iScan", "Trestle", "DICOM")


@dataclass(frozen=True)
class TiledLevel:
    """Where the native tiles of one level are.

    Attributes:
        shape_px: Pixels (h, w).
        tile_px: Pixels of a native tile (h, w); those at the lower and right edge reach beyond the level.
        offsets: (rows, columns) int64, bytes from the start of the file.
        counts: (rows, columns) int64, bytes; 0 where a sparse file leaves a tile out.
        tables: JPEG tables that the tiles share, None where each has its own.
        colour: "rgb" or "ycbcr": how the JPEG's components are to be understood.
    """

    shape_px: tuple[int, int]
    tile_px: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    tables: bytes | None
    colour: str


class NotTaken(InputError):
    """A TIFF that is not of JPEG tiles as they are read here; another reader may take it."""


def tiled_levels(file: Any, where: str) -> list[TiledLevel]:
    """Levels as OpenSlide finds them: tiled pages; beyond the first of a plain TIFF, those marked as reduced.

    Of an OME-TIFF, of which OpenSlide sees no more than the first, those below its first image.

    Raises:
        InputError: One of them is not of JPEG tiles that are read here.
    """
    first = file.pages.first
    foreign = next((name for name in FOREIGN if name in (first.description + first.software)[:4096]), None)
    if foreign or file.is_ndpi:
        raise _vendors_own(foreign or "NDPI", "it is not read as a tiled JPEG TIFF", where)
    aperio = first.description.startswith("Aperio")
    try:
        return _levels(file, aperio, where)
    except NotTaken as error:
        if aperio:
            raise _vendors_own("Aperio", error.what, where) from error
        raise


def _vendors_own(vendor: str, why: str, where: str) -> InputError:
    return InputError(f"is a slide of its vendor's own kind ({vendor}): {why}", where=where, remedy=_elsewhere(where))


def _levels(file: Any, aperio: bool, where: str) -> list[TiledLevel]:
    if file.is_ome:
        # The pyramid hangs below the first image; further images are labels and overviews.
        series = file.series[0]
        if series.axes != "YXS":
            raise _not_taken(f"is not RGB, pixel by pixel (axes {series.axes})", where)
        first = series.levels[0].keyframe
        pages = [level.keyframe for level in series.levels if level.keyframe.is_tiled]
    else:
        first = file.pages[0].aspage()
        pages = [p for n, p in enumerate(file.pages) if p.is_tiled and (n == 0 or aperio or p.subfiletype & 1)]
    if not pages or not first.is_tiled:  # its scale is that of its first image
        raise _not_taken("is not tiled", where)
    out = []
    for number, page in enumerate(sorted(pages, key=lambda p: -p.imagewidth)):
        page = page.aspage()
        if page.compression != 7 or page.photometric not in COLOURS:
            kind = f"{page.compression.name} {page.photometric.name}"
            raise _not_taken(f"level {number} is {kind}, not JPEG in RGB or YCbCr", where)
        if page.samplesperpixel != 3 or page.planarconfig != 1 or page.dtype != np.uint8:
            raise _not_taken(f"level {number} is not 8-bit RGB, pixel by pixel", where)
        orientation = page.tags.get(274)
        if orientation is not None and orientation.value != 1:
            raise _not_taken("does not lie upright (orientation tag)", where)
        shape = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
        offsets, counts = (np.array(v, np.int64) for v in (page.dataoffsets, page.databytecounts))
        if offsets.size != shape[0] * shape[1] or counts.size != offsets.size:
            raise _not_taken(f"level {number} has {offsets.size} tiles, not {shape[0] * shape[1]}", where)
        if aperio and not counts.all():
            raise _not_taken(f"level {number} leaves tiles out, to be filled from other levels", where)
        out.append(
            TiledLevel(
                (page.imagelength, page.imagewidth),
                (page.tilelength, page.tilewidth),
                offsets.reshape(shape),
                counts.reshape(shape),
                page.jpegtables or None,
                COLOURS[int(page.photometric)],
            )
        )
    return out


def _not_taken(why: str, where: str) -> NotTaken:
    return NotTaken(f"{why}: it is not read as a tiled JPEG TIFF", where=where, remedy=_elsewhere(where))


def _elsewhere(where: str) -> str:
    return "copy it to a local disk" if is_url(where) else "leave slide.backend at auto"


def aperio_or_stated_mpp(file: Any) -> tuple[float | None, float | None]:
    """Micrometres per level-0 pixel (y, x) as OpenSlide states them."""
    from deepfere.readers.slide_flat import stated_mpp

    page = file.pages.first
    if not page.description.startswith("Aperio"):
        return stated_mpp(file, page)
    found = re.search(r"\|\s*MPP\s*=\s*([0-9.eE+-]+)", page.description)
    value = float(found[1]) if found else None
    return value, value
