"""Several pieces of tissue in one measurement: disconnected parts of the measured raster.

Instruments measure a holder of many pieces as one file. Pixels belong to one region where they are joined by
measured pixels, or by gaps of up to two that were missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepfere.errors import InputError

ALL = "all"
LEAST_PX, LEAST_SHARE = 16, 0.02
"""A region has so many pixels and such a share of the largest one's; anything smaller is a speck, in none."""
NAMED = 6
"""Regions that an error lists."""


@dataclass(frozen=True)
class Region:
    """One piece.

    Attributes:
        number: From 1, in reading order of the upper left corners.
        start_px: First row and column on the whole raster.
        shape_px: Rows and columns.
        pixels: Measured pixels.
    """

    number: int
    start_px: tuple[int, int]
    shape_px: tuple[int, int]
    pixels: int

    def text(self, origin_px: tuple[int, int]) -> str:
        """Size and place, in the file's own coordinates; ``origin_px`` is the raster's smallest (y, x)."""
        (ny, nx), (y, x) = self.shape_px, (self.start_px[k] + origin_px[k] for k in (0, 1))
        return f"{ny} x {nx} pixels ({self.pixels} measured) from x {x}, y {y}"


def find_regions(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], list[Region]]:
    """The regions of a raster.

    Args:
        mask: (ny, nx) measured pixels.

    Returns:
        Region number (ny, nx) of every pixel, 0 where not measured or in a speck, and the regions.
    """
    square = np.ones((3, 3), bool)
    parts, count = ndimage.label(ndimage.binary_dilation(mask, square), square)
    parts *= mask
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    boxes = ndimage.find_objects(parts, max_label=count)
    least = max(LEAST_PX, LEAST_SHARE * int(sizes.max(initial=0)))
    kept = [k for k in range(count) if sizes[k] >= least]
    if len(kept) < 2:
        # One piece and its specks, or nothing but specks: all of it is one.
        rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if not len(rows):
            return np.zeros(mask.shape, np.int32), []
        start, end = (int(rows[0]), int(cols[0])), (int(rows[-1]) + 1, int(cols[-1]) + 1)
        shape = end[0] - start[0], end[1] - start[1]
        return mask.astype(np.int32), [Region(1, start, shape, int(mask.sum()))]
    kept.sort(key=lambda k: (boxes[k][0].start, boxes[k][1].start))
    numbers = np.zeros(count + 1, np.int32)
    regions = []
    for n, k in enumerate(kept, 1):
        numbers[k + 1] = n
        box = boxes[k]
        shape = box[0].stop - box[0].start, box[1].stop - box[1].start
        regions.append(Region(n, (box[0].start, box[1].start), shape, int(sizes[k])))
    return numbers[parts], regions


def choose_region(
    mask: NDArray[np.bool_], region: int | str | None, origin_px: tuple[int, int], where: object
) -> NDArray[np.bool_]:
    """The pixels (ny, nx) of the region that was asked for.

    Args:
        mask: (ny, nx) measured pixels.
        region: A number, "all", or None where nothing was asked for: right where there is one region only.
        origin_px: The raster's smallest (y, x) in the file's coordinates.
        where: For errors.

    Raises:
        InputError: There are several and none is asked for, or there is none of that number.
    """
    if region == ALL:
        return mask
    numbers, regions = find_regions(mask)
    if region is None and len(regions) < 2:
        return mask
    listed = "; ".join(f"{r.number}: {r.text(origin_px)}" for r in regions[:NAMED])
    listed += f"; and {len(regions) - NAMED} more" if len(regions) > NAMED else ""
    if region is None:
        raise InputError(
            f"holds {len(regions)} regions ({listed})",
            where=where,
            remedy="choose one with --region 1 or another number, or take all as one section with --region all (in a "
            "study region)",
        )
    if region not in range(1, len(regions) + 1):
        raise InputError(
            f"has no region {region} (its regions: {listed})",
            where=where,
            remedy="correct --region (in a study region)",
        )
    return numbers == region
