"""What is checked of a result before it is called complete: the agreement of every ion with its measurement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepfere.evaluation.metrics import consistency
from deepfere.pipeline.workspace import Progress
from deepfere.reconstruction.result import Result

CHECKED_PX = 2_000_000_000
"""Consistency is checked for every ion on all pixels up to this many decoded pixels, else on windows."""


def checked_whole(decoded_px: int) -> bool:
    """Whether a result of so many pixels, over all ions, is checked on all of them."""
    return decoded_px <= CHECKED_PX


def check_ions(result: Result, whole: bool, seed: int, progress: Progress) -> NDArray[np.float64]:
    """Consistency (M,) of every ion: max |A s - y| / max |y|, decoded through the public reader.

    Args:
        result: The result.
        whole: Decode every pixel; else one window per ion, around a pixel where there is signal.
        seed: Of the choice of windows.
        progress: Called with ("reconstruct", share).
    """
    mz, f = result.ions["mz"].to_numpy(), result.factor
    side = max(1, 256 // f)
    rng = np.random.default_rng(seed)
    out = np.zeros(len(mz))
    for m, value in enumerate(mz):
        y, image = result.measured(float(value)), result.ion(float(value))
        highest = float(np.nanmax(np.abs(y)))
        if not whole:
            cells = np.argwhere(y > 0) if highest > 0 else np.argwhere(result.mask)
            i, j = cells[rng.integers(len(cells))]
            i, j = max(0, int(i) - side // 2), max(0, int(j) - side // 2)
            y = y[i : i + side, j : j + side]
            image = image[i * f : (i + y.shape[0]) * f, j * f : (j + y.shape[1]) * f]
        seen = np.isfinite(y)
        found = consistency(image.compute(scheduler="threads"), y, f, seen)
        # A window is judged against the ion's own maximum, not against what little the window holds.
        out[m] = found if whole or highest == 0 else found * float(np.abs(y[seen]).max()) / highest
        if m % 16 == 0:
            progress("reconstruct", 0.85 + 0.14 * m / len(mz))
    return out
