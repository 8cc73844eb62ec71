"""What is checked of a result before it is called complete: the agreement of every ion with its measurement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepfere.evaluation.metrics import consistency
from deepfere.reconstruction.result import Result

CHECKED_PX = 2_000_000_000
"""Consistency is checked for every ion on all pixels up to this many decoded pixels, else on windows."""


def checked_whole(decoded_px: int) -> bool:
    """Whether a result of so many pixels, over all ions, is checked on all of them."""
    return decoded_px <= CHECKED_PX


def check_ions(
    result: Result, whole: bool, seed: int, ions: Sequence[int] | None = None, scheduler: str = "threads"
) -> NDArray[np.float64]:
    """Consistency of ions: max |A s - y| / max |y|, decoded through the public reader.

    Args:
        result: The result.
        whole: Decode every pixel; else one window per ion, around a pixel where there is signal.
        seed: Of the choice of windows, with the ion's number.
        ions: Which, by their numbers; None for all.
        scheduler: Dask's: "threads", or "synchronous" where other processes have the other cores.

    Returns:
        One value for each ion.
    """
    mz, f = result.ions["mz"].to_numpy(), result.factor
    side = max(1, 256 // f)
    ions = range(len(mz)) if ions is None else ions
    out = np.zeros(len(ions))
    for n, m in enumerate(ions):
        y, image = result.measured(float(mz[m])), result.ion(float(mz[m]))
        highest = float(np.nanmax(np.abs(y)))
        if not whole:
            cells = np.argwhere(y > 0) if highest > 0 else np.argwhere(result.mask)
            i, j = cells[np.random.default_rng([seed, m]).integers(len(cells))]
            i, j = max(0, int(i) - side // 2), max(0, int(j) - side // 2)
            y = y[i : i + side, j : j + side]
            image = image[i * f : (i + y.shape[0]) * f, j * f : (j + y.shape[1]) * f]
        seen = np.isfinite(y)
        found = consistency(image.compute(scheduler=scheduler), y, f, seen)
        # A window is judged against the ion's own maximum, not against what little the window holds.
        out[n] = found if whole or highest == 0 else found * float(np.abs(y[seen]).max()) / highest
    return out
