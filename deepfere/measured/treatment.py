"""What is done to spectra before windows are taken of them: lock mass, smoothing, baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.lock_mass import LockMass, check_share, found_shifts
from deepfere.measured.profile import UNCHANGED, ProfileSpec
from deepfere.readers.imzml import ImzmlIndex
from deepfere.readers.ranges import open_binary
from deepfere.readers.table import Table


@dataclass(frozen=True)
class Treatment:
    """What is done to spectra; nothing by default.

    Attributes:
        lock_mass: Peaks that correct the m/z of each spectrum.
        profile: Smoothing and baseline of profiles.
    """

    lock_mass: LockMass | None = None
    profile: ProfileSpec = UNCHANGED

    def check(self, source: ImzmlIndex | Table, kind: str | None, ions: str, shared_axis: bool) -> None:
        """Refuse what cannot be done to a source.

        Args:
            source: Spectra.
            kind: "centroid", "profile" or unknown.
            ions: How ions are chosen: "axis", "list" or "automatic".
            shared_axis: Whether all spectra have one m/z axis.

        Raises:
            InputError: There is something to be done that it does not allow.
        """
        if self.lock_mass is not None:
            _check_lock_mass(source, kind, ions, shared_axis)
        if self.profile.active:
            _check_profile(source, kind)

    def shifts(self, source: ImzmlIndex | Table, rows: NDArray[np.int64], kind: str) -> NDArray[np.float64] | None:
        """Shift (n,) in ppm of some spectra, NaN where no lock mass is found; None without a lock mass.

        Raises:
            InputError: Hardly any shows one.
        """
        if self.lock_mass is None or isinstance(source, Table):
            return None
        with open_binary(source.ibd_path) as ibd:
            shifts = found_shifts(source, ibd, rows, kind, self.lock_mass)
        check_share(float(np.isfinite(shifts).mean()) if len(shifts) else 0.0, self.lock_mass, source.path)
        return shifts


UNTREATED = Treatment()


def true_mz(mz: NDArray[Any], shift_ppm: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """m/z as they would be without the shift."""
    return np.asarray(mz, np.float64) / (1 + np.asarray(shift_ppm) * 1e-6)


def _check_lock_mass(source: ImzmlIndex | Table, kind: str | None, ions: str, shared_axis: bool) -> None:
    remedy = "leave the lock mass out"
    if isinstance(source, Table):
        what = "holds bins of m/z, which a lock mass cannot shift"
    elif kind is None:
        what, remedy = "says neither centroid nor profile", "give --representation"
    elif kind == "centroid" and shared_axis:
        what = "has one m/z axis for all its centroids: no spectrum has a shift of its own"
    elif ions == "axis":
        what = "has one m/z axis, whose points are its ions: a lock mass would shift them apart"
        remedy = f"say which ions to take (--mz), or {remedy}"
    else:
        return
    raise InputError(what, where=source.path, remedy=remedy)


def _check_profile(source: ImzmlIndex | Table, kind: str | None) -> None:
    remedy = "leave ingest.baseline and ingest.smoothing out"
    if isinstance(source, Table):
        what = "holds sums of bins: baseline and smoothing are for profiles"
    elif kind == "centroid":
        what = "holds centroids: baseline and smoothing are for profiles"
    elif kind is None:
        what, remedy = "says neither centroid nor profile", "give --representation"
    else:
        return
    raise InputError(what, where=source.path, remedy=remedy)
