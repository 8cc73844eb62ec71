"""How far from an ion's m/z a signal still is the ion's: a relative and an absolute part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OWN = "own_tolerances"
"""Attribute of a store: the windows of ions that have their own."""


@dataclass(frozen=True, eq=False)
class Tolerance:
    """Half-width of m/z windows: ``ppm 1e-6 m/z + da``.

    Attributes:
        ppm: The relative part, one for all ions or (M,), one each.
        da: The absolute part, alike.
    """

    ppm: float | NDArray[np.float64] = 5.0
    da: float | NDArray[np.float64] = 0.0

    @property
    def own(self) -> bool:
        """Whether every ion has its own."""
        return np.ndim(self.ppm) > 0 or np.ndim(self.da) > 0

    def half_da(self, mz: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Half-widths at some m/z; where ions have their own, one m/z for each, or one for all."""
        return np.asarray(self.ppm * 1e-6 * np.asarray(mz) + self.da, np.float64)

    def low(self, mz: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lower edges."""
        return mz * (1 - self.ppm * 1e-6) - self.da

    def high(self, mz: NDArray[np.float64]) -> NDArray[np.float64]:
        """Upper edges."""
        return mz * (1 + self.ppm * 1e-6) + self.da

    def of(self, k: int) -> Tolerance:
        """That of one ion."""
        if not self.own:
            return self
        return Tolerance(*(float(part if np.ndim(part) == 0 else np.asarray(part)[k]) for part in (self.ppm, self.da)))

    def to_attrs(self, general: Tolerance) -> dict[str, Any]:
        """Plain values, as a store states them; an absolute part only where there is one.

        Args:
            general: What holds where ions have their own.
        """
        values: dict[str, Any] = {"tolerance_ppm": float(general.ppm)}
        if general.da:
            values["tolerance_da"] = float(general.da)
        if self.own:
            values[OWN] = {"ppm": np.asarray(self.ppm).tolist(), "da": np.asarray(self.da).tolist()}
        return values

    @staticmethod
    def of_attrs(attrs: Mapping[str, Any]) -> Tolerance:
        """What `to_attrs` stated."""
        if OWN in attrs:
            return Tolerance(np.array(attrs[OWN]["ppm"], float), np.array(attrs[OWN]["da"], float))
        return Tolerance(float(attrs["tolerance_ppm"]), float(attrs.get("tolerance_da", 0.0)))

    def __str__(self) -> str:
        if self.own:
            return "their own tolerances"
        absolute = f"{self.da:g} Da"
        return f"{self.ppm:g} ppm" + (f" + {absolute}" if self.da else "")


@dataclass(frozen=True, eq=False)
class Targets:
    """A target list, some of whose ions have windows of their own.

    Attributes:
        mz: (M,) ascending.
        tolerance: Of each.
    """

    mz: NDArray[np.float64]
    tolerance: Tolerance


def nearest_ion(axis: NDArray[np.float64], mz: float, tolerance: Tolerance) -> tuple[int, bool]:
    """The ion nearest to an m/z among those in whose window it lies, else of all; and whether it lies in one.

    Of ions with one m/z, or equally near, the first. An m/z that is no number lies in none.
    """
    distance = np.abs(axis - mz)
    inside = distance <= tolerance.half_da(mz)
    k = int((np.where(inside, distance, np.inf) if inside.any() else distance).argmin())
    return k, bool(inside[k])
