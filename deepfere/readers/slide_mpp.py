"""How large a slide's pixels are: what was given, or what a file says and can be meant."""

from __future__ import annotations

import math
from pathlib import Path

from deepfere.errors import InputError

MPP_RANGE_UM = (0.05, 100.0)
# Dots per inch that programs write for screens and printers when they know nothing of the microscope. No scanner
# has them to within a thousandth (which covers dots per centimetre that were rounded to a whole number).
PRINT_DPI = (72, 96, 100, 150, 200, 300, 600)
PRINT_DPI_TOLERANCE = 1e-3
GIVE_MPP = "give --slide-mpp-um (in a study slide_mpp_um)"


def number(text: str | None) -> float | None:
    """What a property says, if it is a number."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def given_mpp(mpp_um: float | tuple[float, float]) -> tuple[float, float]:
    """A pixel size (y, x) that was given, as one or two values.

    Raises:
        InputError: It is none.
    """
    pair = mpp_um if isinstance(mpp_um, tuple | list) else (mpp_um, mpp_um)
    try:
        values = tuple(float(v) for v in pair)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 2 or not all(math.isfinite(v) and v > 0 for v in values):
        raise InputError(
            f"{mpp_um} is not a pixel size", where="--slide-mpp-um", remedy="give one or two positive numbers"
        )
    return values[0], values[1]


def trusted_mpp(stated: tuple[float | None, float | None], path: str | Path) -> tuple[float, float]:
    """The file's own mpp (y, x), refused where it is absent or cannot be meant.

    Raises:
        InputError: See `deepfere.readers.slide.open_slide`.
    """
    y, x = stated
    if y is None or x is None:
        raise InputError("does not say how large its pixels are", where=path, remedy=GIVE_MPP)
    for value in (y, x):
        for dpi in PRINT_DPI:
            if abs(value * dpi / 25400 - 1) <= PRINT_DPI_TOLERANCE:
                raise InputError(
                    f"its pixel size, {value:.2f} um, is only the {dpi}-dpi default", where=path, remedy=GIVE_MPP
                )
        if not MPP_RANGE_UM[0] <= value <= MPP_RANGE_UM[1]:  # false for NaN too
            raise InputError(f"its pixel size, {value:g} um, is not plausible for a slide", where=path, remedy=GIVE_MPP)
    return y, x
