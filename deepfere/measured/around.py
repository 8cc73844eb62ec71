"""Images with pixels that are not known: filled by what is around them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR_PX, LEAST_NEAR = 2, 3
"""The median of pixels up to so many away, if so many of them are known; else that of all."""


def fill(image: NDArray[np.float64], wanted: NDArray[np.bool_], median: float | None = None) -> NDArray[np.float64]:
    """An image (ny, nx), NaN where not known, with a value wherever it is wanted; at least one is known.

    Args:
        image: All of it, or rows of it, whose first and last `NEAR_PX` are then only there for the others.
        wanted: (ny, nx).
        median: Of the whole image; None takes this one's.
    """
    rows, cols = np.nonzero(wanted & np.isnan(image))
    out = image.copy()
    if not len(rows):
        return out
    padded, width = np.pad(image, NEAR_PX, constant_values=np.nan), 2 * NEAR_PX + 1
    out[rows, cols] = np.nanmedian(image) if median is None else median
    for begin in range(0, len(rows), 100_000):
        row, col = rows[begin : begin + 100_000], cols[begin : begin + 100_000]
        near = np.stack([padded[row + k // width, col + k % width] for k in range(width * width)])
        enough = np.isfinite(near).sum(axis=0) >= LEAST_NEAR
        out[row[enough], col[enough]] = np.nanmedian(near[:, enough], axis=0)
    return out
