"""Plain pictures as slides: tiled or striped TIFF (pyramidal or not), PNG and JPEG."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DamagedPixels, DeepfereError, InputError
from deepfere.readers.ranges import first_bytes, open_ranges
from deepfere.readers.slide import (
    Backend,
    Icc,
    Level,
    on_background,
    open_slide,
    whole_downsample,
)
from deepfere.readers.slide_mpp import GIVE_MPP, trusted_mpp
from deepfere.readers.slide_segments import WHITE, Segments, Window
from deepfere.remote import is_url

CONVERT = "convert it to an 8-bit RGB TIFF"
# EXIF and TIFF orientation -> (swap rows and columns, flip rows, flip columns), applied in that order to turn
# what is stored into what is shown. Source: TIFF 6.0, tag 274.
ORIENTATIONS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class FlatSlide:
    """A slide made of windows into stored images, shown the right way up.

    Args:
        path: File or URL.
        mpp_um: Micrometres per level-0 pixel (y, x), as shown.
        stored: Per level: stored shape (h, w) and a function that reads a window of it as RGB.
        orientation: TIFF orientation 1-8.
        close: Called once at the end.
        tiles: Per level: stored shape (h, w) of its tiles, None where it has none.
        profile: Embedded ICC profile.
    """

    backend: Backend = "flat"
    icc: Icc = "none"
    decoded = None

    def __init__(
        self,
        path: str | Path,
        mpp_um: tuple[float, float],
        stored: list[tuple[tuple[int, int], Window]],
        orientation: int,
        close: Callable[[], None],
        tiles: list[tuple[int, int] | None] | None = None,
        profile: bytes | None = None,
    ) -> None:
        self.path, self.mpp_um, self.background = str(path), mpp_um, WHITE
        self._stored, self._close, self.profile = stored, close, profile
        self._swap, self._flip_rows, self._flip_cols = ORIENTATIONS[orientation]
        shapes = [shape[::-1] if self._swap else shape for shape, _ in stored]
        self.shape_px = (shapes[0][0], shapes[0][1])
        turned = -1 if self._swap else 1
        natives = [(256, 256) if tile is None else tile[::turned] for tile in tiles or [None] * len(shapes)]
        self.levels = tuple(
            Level((h, w), (whole_downsample(shapes[0][0], h), whole_downsample(shapes[0][1], w)), (tile[0], tile[1]))
            for (h, w), tile in zip(shapes, natives, strict=True)
        )

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `deepfere.readers.slide.Slide.read`."""
        out = np.empty((height, width, 3), dtype=np.uint8)
        out[:] = self.background
        h, w = self.levels[level].shape_px
        top, left, bottom, right = max(row, 0), max(col, 0), min(row + height, h), min(col + width, w)
        if top >= bottom or left >= right:
            return out
        rows = (h - bottom, h - top) if self._flip_rows else (top, bottom)
        cols = (w - right, w - left) if self._flip_cols else (left, right)
        if self._swap:
            rows, cols = cols, rows
        try:
            image = self._stored[level][1](rows[0], cols[0], rows[1], cols[1])
        except DeepfereError:
            raise
        except Exception as error:  # codecs raise whatever they like
            raise DamagedPixels(
                f"level {level} cannot be decoded at row {top}, column {left} ({error})",
                where=self.path,
                remedy="copy or export the picture again",
            ) from error
        if self._swap:
            image = image.transpose(1, 0, 2)
        image = image[:: -1 if self._flip_rows else 1, :: -1 if self._flip_cols else 1]
        out[top - row : bottom - row, left - col : right - col] = image
        return out

    def close(self) -> None:
        """See `deepfere.readers.slide.Slide.close`."""
        self._close()

    # Its stream is in a cycle with the pages that it describes, and would stay open for long.
    __del__ = close

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.mpp_um, "flat")


def prefer_flat_tiff(path: Path) -> bool:
    """Whether a plain or OME-TIFF is better read directly than through OpenSlide (see `open_slide`)."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            # OpenSlide takes values of more than 8 bits for 8-bit ones; they are refused here.
            if _orientation(page) != 1 or file.is_ome or page.dtype not in (np.uint8, np.bool_):
                return True
            h0, w0 = page.shape[:2]
            sizes = [level.shape[:2] for level in file.series[0].levels]
    except Exception:  # whatever is wrong with it, OpenSlide will say
        return False
    # OpenSlide's downsample is the mean of both axes' ratios; it addresses a level exactly where that is whole.
    return not all(((h0 / h + w0 / w) / 2).is_integer() for h, w in sizes)


def refuse_deep(path: Path) -> None:
    """Refuse a TIFF of values that are not 8-bit ones: OpenSlide would show it, wrong.

    Raises:
        InputError: It is one.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            depth = file.pages.first.dtype
    except Exception:  # whatever is wrong with it, OpenSlide will say
        return
    if depth not in (np.uint8, np.bool_):
        raise InputError(f"holds {depth} values, not 8-bit ones", where=path, remedy=CONVERT)


def is_ome_tiff(path: str | Path) -> bool:
    """Whether a TIFF (file or URL) carries OME-XML."""
    import tifffile

    with closing(open_ranges(path)) as ranges, ranges.open() as stream, tifffile.TiffFile(stream) as file:
        return bool(file.is_ome)


def open_flat(path: str | Path, given_mpp_um: tuple[float, float] | None) -> FlatSlide:
    """Open a TIFF, PNG or JPEG, or the URL of one, that is not (or not best) read through OpenSlide.

    Raises:
        InputError: See `deepfere.readers.slide.open_slide`.
    """
    magic = first_bytes(path, 4)
    if magic[:2] in (b"II", b"MM"):
        return _open_tiff(path, given_mpp_um)
    if magic == b"\x89PNG" or magic[:3] == b"\xff\xd8\xff":
        return _open_picture(path, given_mpp_um)
    known = "TIFF, PNG or JPEG, or copy the slide to a local disk" if is_url(path) else "OpenSlide, TIFF, PNG or JPEG"
    raise InputError("is not a slide that can be read", where=path, remedy=f"give a format of {known}")


def _open_picture(path: str | Path, given: tuple[float, float] | None) -> FlatSlide:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_ranges(path).open() as stream, Image.open(stream) as picture:
                mode, orientation = picture.mode, int(picture.getexif().get(0x0112, 1))
                profile = picture.info.get("icc_profile") or None
                if mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                    raise InputError(f"is a {mode} picture, not 8-bit RGB or grey", where=path, remedy=CONVERT)
                rgba = np.asarray(picture.convert("RGBA"))
    except Image.DecompressionBombError as error:
        raise InputError(
            "is too large for a PNG or JPEG", where=path, remedy="convert it to a pyramidal TIFF"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot be decoded ({error})", where=path, remedy="copy or export it again") from error
    if given is None:  # the density of a PNG or JPEG is the screen's or printer's, never the microscope's
        raise InputError("does not say how large its pixels are", where=path, remedy=GIVE_MPP)
    image = on_background(rgba, WHITE)

    def window(top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
        return image[top:bottom, left:right]

    stored: list[tuple[tuple[int, int], Window]] = [((image.shape[0], image.shape[1]), window)]
    upright = orientation if orientation in ORIENTATIONS else 1
    return FlatSlide(path, given, stored, upright, lambda: None, profile=profile)


def embedded_profile(page: Any) -> bytes | None:
    """The ICC profile of a TIFF page."""
    tag = page.tags.get(34675)
    return None if tag is None or not tag.value else bytes(tag.value)


def _orientation(page: Any) -> int:
    tag = page.tags.get(274)
    value = 1 if tag is None else int(tag.value)
    return value if value in ORIENTATIONS else 1


def _open_tiff(path: str | Path, given: tuple[float, float] | None) -> FlatSlide:
    import tifffile

    ranges = open_ranges(path)
    stream = ranges.open()

    def close() -> None:
        stream.close()
        ranges.close()

    try:
        file = tifffile.TiffFile(stream)
    except InputError:
        close()
        raise
    except (OSError, ValueError) as error:
        close()
        raise InputError(f"cannot be opened ({error})", where=path, remedy=CONVERT) from error
    try:
        if not len(file.pages):
            raise InputError("holds no page, as one that was cut off", where=path, remedy="copy it again")
        series = file.series[0]
        pages = [level.keyframe for level in series.levels]
        channels = "x".join(str(n) for n in series.shape)
        if series.axes not in ("YX", "YXS", "SYX"):
            raise InputError(
                f"is not an RGB picture (axes {series.axes}, {channels}; fluorescence or a stack?)",
                where=path,
                remedy="give the brightfield slide as RGB",
            )
        for page in pages:
            _refuse_unread(page, path)
        orientation, profile = _orientation(pages[0]), embedded_profile(pages[0])
        if given is None:
            y, x = stated_mpp(file, pages[0])
            given = trusted_mpp((x, y) if ORIENTATIONS[orientation][0] else (y, x), path)
    except InputError:
        close()
        raise
    except Exception as error:  # a damaged directory makes tifffile raise many things
        close()
        raise InputError(
            f"cannot be read as TIFF ({error})", where=path, remedy=f"copy it again, or {CONVERT}"
        ) from error
    cache = Segments(ranges)
    stored = [((p.imagelength, p.imagewidth), cache.window(k, p)) for k, p in enumerate(pages)]
    tiles = [(p.tilelength, p.tilewidth) if p.is_tiled else None for p in pages]
    return FlatSlide(path, given, stored, orientation, close, tiles, profile)


def _refuse_unread(page: Any, path: str | Path) -> None:
    import tifffile

    photometric, depth = page.photometric, page.dtype
    samples = page.samplesperpixel
    if depth == np.uint16 or depth is None or depth not in (np.uint8, np.bool_):
        raise InputError(f"holds {depth} values, not 8-bit ones", where=path, remedy=CONVERT)
    wanted = {
        tifffile.PHOTOMETRIC.RGB: (3, 4),
        tifffile.PHOTOMETRIC.YCBCR: (3,),
        tifffile.PHOTOMETRIC.MINISBLACK: (1, 2),
        tifffile.PHOTOMETRIC.MINISWHITE: (1,),
        tifffile.PHOTOMETRIC.PALETTE: (1,),
    }
    if samples not in wanted.get(photometric, ()):
        raise InputError(
            f"is a {photometric.name} picture of {samples} channels, not RGB or grey", where=path, remedy=CONVERT
        )
    jpeg = (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.OJPEG)
    if photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression not in jpeg:
        raise InputError("holds YCbCr values that are not JPEG", where=path, remedy=CONVERT)


def stated_mpp(file: Any, page: Any) -> tuple[float | None, float | None]:
    """Micrometres per stored pixel (y, x) from OME-XML, else from the resolution tags."""
    if file.is_ome:
        from xml.etree import ElementTree

        units = {"m": 1e6, "mm": 1e3, "cm": 1e4, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3}
        for element in ElementTree.fromstring(file.ome_metadata).iter():
            if element.tag.rpartition("}")[2] == "Pixels":
                sizes: list[float | None] = []
                for axis in "YX":
                    scale = units.get(element.get(f"PhysicalSize{axis}Unit", "µm"))
                    text = element.get(f"PhysicalSize{axis}")
                    sizes.append(None if text is None or scale is None else float(text) * scale)
                return sizes[0], sizes[1]
    unit = page.tags.get(296)
    per_um = {2: 25400.0, 3: 10000.0}.get(2 if unit is None else int(unit.value))
    tags = [page.tags.get(code) for code in (283, 282)]
    if per_um is None or any(tag is None for tag in tags):
        return None, None
    values = [tag.value[0] / tag.value[1] if tag.value[1] else 0.0 for tag in tags]
    if min(values) <= 0:
        return None, None
    return per_um / values[0], per_um / values[1]
