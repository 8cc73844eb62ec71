"""Given tissue labels: read from a file, and brought onto the section's high-resolution grid.

A label image covers the section's field, its outer edges those of the measured raster: row 0 is the top, its
pixels are whole fractions (or multiples) of the measured ones. 0 is unlabelled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError

MOST_CLASSES = 40
"""More different numbers than this are objects that were counted, not classes of tissue."""
BAND_ROWS = 1024
FORMATS = (".npy", ".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Labels:
    """Tissue labels on the high-resolution grid of a section.

    Attributes:
        codes: (H, W) uint8: 0 = unlabelled, c = the class ``values[c - 1]``.
        values: The file's number of every class, ascending.
        how: How the file's pixels became those of the grid.
    """

    codes: NDArray[np.uint8]
    values: list[int]
    how: str

    def inside(self, mask: NDArray[np.bool_], factor: int) -> Labels:
        """The same, unlabelled where nothing was measured.

        Args:
            mask: (ny, nx) True where measured.
            factor: High-resolution pixels per measured pixel and axis.
        """
        fine = np.repeat(np.repeat(mask, factor, 0), factor, 1)
        return replace(self, codes=np.where(fine, self.codes, np.uint8(0)))

    def without(self, codes: set[int]) -> Labels:
        """The same, some classes made unlabelled; their numbers stay."""
        out = self.codes.copy()
        out[np.isin(out, list(codes))] = 0
        return replace(self, codes=out)


def read_labels(path: str | Path, shape_px: tuple[int, int], factor: int) -> Labels:
    """Labels from a file, on the high-resolution grid.

    Args:
        path: ``.npy`` (integers), or ``.png``, ``.tif`` (one channel, grey or palette: the palette's numbers count).
        shape_px: Measured pixels (ny, nx).
        factor: High-resolution pixels per measured pixel and axis.

    Raises:
        InputError: The file cannot be read, holds no label image, or does not fit the section.
    """
    image = _read(Path(path))
    if image.ndim != 2 or not image.size:
        raise InputError(
            f"holds an array of shape {image.shape}, not one plane of labels",
            where=path,
            remedy="export one channel of class numbers",
        )
    if image.dtype.kind not in "iub":
        raise InputError(
            f"holds {image.dtype}, not whole numbers", where=path, remedy="save the class numbers as integers"
        )
    codes, values = _coded(image, path)
    codes, how = _on_grid(codes, shape_px, factor, path)
    return Labels(codes, values, how)


def majority(codes: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The most frequent label of every ``side x side`` block, 0 where more than half of it is unlabelled.

    Of equally frequent labels, the smaller number.

    Args:
        codes: (h side, w side).
        side: Pixels per block and axis.
    """
    if side == 1:
        return codes
    h, w = codes.shape[0] // side, codes.shape[1] // side
    out = np.zeros((h, w), np.uint8)
    rows = max(1, BAND_ROWS // side)
    for top in range(0, h, rows):
        blocks = codes[top * side : (top + rows) * side].reshape(-1, side, w, side)
        most = np.zeros(out[top : top + rows].shape, np.int64)
        labelled = np.zeros_like(most)
        for code in np.unique(blocks[blocks != 0]):
            count = (blocks == code).sum(axis=(1, 3))
            labelled += count
            out[top : top + rows][count > most] = code
            most = np.maximum(most, count)
        out[top : top + rows][2 * labelled < side * side] = 0
    return out


def _read(path: Path) -> NDArray[Any]:
    """The file's array as it is."""
    ending = path.suffix.lower()
    if not path.exists():
        raise InputError("no such file", where=path, remedy="check the path of the labels")
    if path.is_dir() or ending not in FORMATS:
        raise InputError("is no label image", where=path, remedy=f"give one of {', '.join(FORMATS)}")
    try:
        if ending == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if ending == ".png":
            return _read_png(path)
        import tifffile

        with tifffile.TiffFile(path) as file:
            page = file.series[0].levels[0]
            image = page.asarray()
            colour = file.series[0].keyframe.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
        if colour:
            raise _colour(path)
        return image.squeeze() if image.ndim > 2 else image
    except InputError:
        raise
    except Exception as error:
        # Readers of pictures raise whatever they like on a damaged file.
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"cannot be read ({text})", where=path, remedy="write the labels again") from error


def _read_png(path: Path) -> NDArray[Any]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "P", "I", "I;16"):
                raise _colour(path)
            return np.asarray(picture)
    except Image.DecompressionBombError as error:
        raise InputError("is too large for a PNG", where=path, remedy="save it as .tif or .npy") from error


def _colour(path: Path) -> InputError:
    return InputError(
        "is a colour picture, not labels", where=path, remedy="export class numbers, one channel (grey or palette)"
    )


def _coded(image: NDArray[Any], path: str | Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Numbers 1 to C in place of the file's, 0 as it is; the file's numbers."""
    bands = [image[top : top + BAND_ROWS] for top in range(0, image.shape[0], BAND_ROWS)]
    found = functools.reduce(np.union1d, (np.unique(band) for band in bands), np.zeros(0, image.dtype))
    values = [int(value) for value in found if value != 0]
    for value in (min(values, default=1), max(values, default=1)):
        if not 0 < value < 2**53:
            raise InputError(f"holds the label {value}", where=path, remedy="use 0 for unlabelled and 1, 2, ...")
    if len(values) > MOST_CLASSES:
        raise InputError(
            f"holds {len(values)} different labels: objects, not classes of tissue",
            where=path,
            remedy=f"give at most {MOST_CLASSES} classes",
        )
    known = np.array(values, dtype=np.int64)
    codes = np.zeros(image.shape, np.uint8)
    for number, band in enumerate(bands):
        at = np.searchsorted(known, band) + 1
        codes[number * BAND_ROWS : number * BAND_ROWS + len(band)] = np.where(band == 0, 0, at)
    return codes, values


def _on_grid(
    codes: NDArray[np.uint8], shape_px: tuple[int, int], factor: int, path: str | Path
) -> tuple[NDArray[np.uint8], str]:
    """Labels on the high-resolution grid: the majority where they are finer, the nearest where they are coarser."""
    (h, w), (ny, nx) = codes.shape, shape_px
    fine = (ny * factor, nx * factor)
    if (h, w) == fine:
        return codes, "pixel by pixel"
    if h * nx == w * ny:
        if h > fine[0] and h % fine[0] == 0 and w % fine[1] == 0:
            side = h // fine[0]
            return majority(codes, side), f"majority of {side} x {side}"
        # Whole measured pixels per label or whole labels per measured pixel, or whole fine pixels per label.
        if any((h % n == 0 and w % m == 0) or (n % h == 0 and m % w == 0) for n, m in (shape_px, fine)):
            rows, columns = (((np.arange(n) + 0.5) * k / n).astype(np.int64) for n, k in zip(fine, (h, w), strict=True))
            return codes[rows[:, None], columns[None]], f"nearest of {h / ny:g} per measured pixel and axis"
    raise InputError(
        f"has {h} x {w} pixels; the result has {fine[0]} x {fine[1]} ({ny} x {nx} measured, x{factor})",
        where=path,
        remedy="draw on the result's stain, or give a whole multiple or fraction of these sizes",
    )
