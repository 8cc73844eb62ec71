"""Spectra of an imzML to the intensities of its ions, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.normalise import ragged_factors, spectrum_factors
from deepfere.measured.profile import ProfileSpec
from deepfere.measured.tolerance import Tolerance
from deepfere.measured.treatment import true_mz
from deepfere.measured.windows import Windows
from deepfere.readers.imzml import ImzmlIndex
from deepfere.readers.imzml_arrays import read_arrays, read_flat

LARGEST = 1e18
"""No intensity is larger: variances, their squares, are kept as float32, too."""

Reduce = Callable[[NDArray[np.int64]], tuple[NDArray[np.float32], NDArray[np.float64], int]]
"""Some spectra to ions (n, M), factors (3, n), a fourth for a reference, and the number of negative intensities."""


def check_axis(index: ImzmlIndex, axis: NDArray[np.float64], i: int) -> None:
    """Refuse m/z of spectrum ``i`` that are not positive numbers."""
    if len(axis) and not (np.isfinite(axis).all() and axis.min() > 0):
        raise InputError(
            f"spectrum {index.number(i)} (x {index.x[i]}, y {index.y[i]}) has m/z that are not positive numbers",
            where=index.ibd_path,
            remedy="export it again",
        )


def shared_axis(index: ImzmlIndex, ibd: IO[bytes]) -> NDArray[np.float64] | None:
    """The one m/z axis of a continuous file, in its own order; None where spectra have their own.

    A file that says continuous but stores an axis per spectrum is believed once all of them are equal.
    """
    if index.mode != "continuous" and not index.shared_axis:
        return None
    axis = read_arrays(index, ibd, np.arange(1), "mz")[0]
    if not index.shared_axis:
        for begin in range(0, len(index), 256):
            part = np.arange(begin, min(begin + 256, len(index)))
            for i, other in zip(part, read_arrays(index, ibd, part, "mz"), strict=True):
                if not np.array_equal(axis, other):
                    raise InputError(
                        f"says continuous, but spectrum {index.number(int(i))} has other m/z than the first",
                        where=index.path,
                        remedy="export it as processed",
                    )
    if not len(axis):
        raise InputError("its m/z axis is empty", where=index.path, remedy="export it again")
    out = axis.astype(np.float64)
    check_axis(index, out, 0)
    return out


def ascending(mz: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A spectrum in the order of its m/z."""
    if len(mz) < 2 or (mz[1:] >= mz[:-1]).all():
        return mz, values
    order = np.argsort(mz, kind="stable")
    return mz[order], values[order]


def refuse_twice(axis: NDArray[np.float64], where: object) -> None:
    """Refuse an ascending axis (A,) as ions where it holds an m/z twice."""
    twice = np.flatnonzero(np.diff(axis) == 0)
    if len(twice):
        raise InputError(
            f"holds m/z {axis[twice[0]]} twice on its axis", where=where, remedy="say which ions to take (--mz)"
        )


def refuse_range(mz_range: tuple[float, float] | None, where: object) -> None:
    """Refuse a range of automatic ions where the axis of the file is the ions, all of them."""
    if mz_range is not None:
        raise InputError(
            "has an axis of its own, whose m/z are the ions: none is looked for in a range",
            where=where,
            remedy="leave ingest.mz_range out, or say which ions to take (--mz)",
        )


def refuse_values(index: ImzmlIndex, i: int) -> None:
    """Refuse the intensities of spectrum ``i``."""
    raise InputError(
        f"the spectrum at x {index.x[i]}, y {index.y[i]} has intensities that are not finite numbers, or beyond "
        f"{LARGEST:.0e}, whose squares are none",
        where=index.ibd_path,
        remedy="export it again or leave that pixel out",
    )


class Reducer:
    """Spectra to ions and factors, a batch at a time.

    Args:
        index: Of the file.
        axis: What its spectra share, if they do.
        ions: (M,) ascending.
        how: "axis" where the ions are the axis itself.
        kind: "centroid", "profile" or unknown.
        tolerance: Half-width of the ions' windows.
        shifts: (N,) by how many ppm the m/z of each spectrum are off.
        profile: What is done to profiles first; factors are those of what is left.
        reference: Its window is a fourth factor.
    """

    def __init__(
        self,
        index: ImzmlIndex,
        axis: NDArray[np.float64] | None,
        ions: NDArray[np.float64],
        how: str,
        kind: str | None,
        tolerance: Tolerance,
        shifts: NDArray[np.float64] | None = None,
        profile: ProfileSpec | None = None,
        reference: Windows | None = None,
    ) -> None:
        self.index, self.kind, self.ions, self.shifts = index, kind, ions, shifts
        self.profile = profile if profile is not None and profile.active else None
        self.windows = None if how == "axis" else Windows(ions, tolerance)
        self.reference = reference
        self.axis = axis
        self.order: NDArray[np.int64] | None = None
        if axis is not None and (np.diff(axis) < 0).any():
            self.order = np.argsort(axis, kind="stable")
            self.axis = axis[self.order]

    def of(self, rows: NDArray[np.int64], shifts: NDArray[np.float64] | None) -> Reducer:
        """For some spectra (positions, rising; n) and their shifts (n,), which are then counted from 0."""
        other = copy(self)
        other.index, other.shifts = self.index.only(rows), shifts
        return other

    def __call__(self, ibd: IO[bytes], rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float64], int]:
        """Ions (n, M), factors (3, n; 4 with a reference) and the number of negative intensities of some spectra."""
        lengths = self.index.length[rows]
        if self.axis is not None:
            block = read_flat(self.index, ibd, rows, ("int",))[0].astype(np.float32, copy=False)
            block, negatives = self._not_negative(block, rows, lengths)
            block = block.reshape(len(rows), len(self.axis))
            if self.order is not None:
                block = block[:, self.order]
            if self.profile is not None:
                block = self.profile.applied(self.axis, block)
            take = partial(self._of_block, rows, self.axis, block)
            factors = spectrum_factors(block)
            ions = block if self.windows is None else take(self.windows)
        else:
            mz, values = read_flat(self.index, ibd, rows)
            values, negatives = self._not_negative(values.astype(np.float32, copy=False), rows, lengths)
            if len(mz) and not (mz.min() > 0 and mz.max() < np.inf):
                for i, m in zip(rows, np.split(mz, np.cumsum(lengths)[:-1]), strict=True):
                    check_axis(self.index, m, int(i))
            if self.kind == "centroid":
                if self.shifts is not None:
                    mz = true_mz(mz, np.repeat(self.shifts[rows], lengths))
                take = partial(_centroids, mz, values, lengths)
            else:
                spectra = self._profiles(mz, values, lengths)
                if self.profile is not None:
                    values = np.concatenate([v for _, v in spectra])
                take = partial(self._areas, rows, spectra)
            factors = ragged_factors(values, lengths)
            assert self.windows is not None
            ions = take(self.windows)
        if self.reference is not None:
            factors = np.vstack([factors, take(self.reference)[:, 0]])
        return ions, factors, negatives

    def _of_block(
        self, rows: NDArray[np.int64], axis: NDArray[np.float64], block: NDArray[np.float32], windows: Windows
    ) -> NDArray[np.float32]:
        """Windows (n, M) of spectra on one axis."""
        if self.kind == "centroid":
            return windows.sum_shared(axis, block)
        if self.shifts is None:
            return windows.area(axis, block)
        return self._areas(rows, [(axis, values) for values in block], windows)

    def _profiles(
        self, mz: NDArray[Any], values: NDArray[np.float32], lengths: NDArray[np.int64]
    ) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        ends = np.cumsum(lengths)
        parts = [slice(first, last) for first, last in zip(ends - lengths, ends, strict=True)]
        spectra = [ascending(mz[part].astype(np.float64), values[part]) for part in parts]
        if self.profile is None:
            return spectra
        return [(m, self.profile.applied(m, v[None])[0]) for m, v in spectra]

    def _areas(
        self, rows: NDArray[np.int64], spectra: list[tuple[NDArray[Any], NDArray[Any]]], windows: Windows
    ) -> NDArray[np.float32]:
        """Areas (n, M) of profiles with an axis each."""
        areas = np.zeros((len(rows), len(windows.mz)), dtype=np.float32)
        for k, (mz, values) in enumerate(spectra):
            if self.shifts is not None:
                mz = true_mz(mz, self.shifts[rows[k]])
            areas[k] = windows.area(mz, values[None])[0]
        return areas

    def _not_negative(
        self, values: NDArray[np.float32], rows: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], int]:
        """The intensities of some spectra with zero for what is below it, and how many were; all are finite."""
        if not len(values):
            return values, 0
        least, most = values.min(), values.max()  # not a number wherever one of them is none
        if not (least > -LARGEST and most < LARGEST):
            first = int((np.abs(values) < LARGEST).argmin())
            refuse_values(self.index, int(rows[int(np.searchsorted(np.cumsum(lengths), first, side="right"))]))
        if least >= 0:
            return values, 0
        return np.maximum(values, 0), int((values < 0).sum())


def _centroids(
    mz: NDArray[Any], values: NDArray[Any], lengths: NDArray[np.int64], windows: Windows
) -> NDArray[np.float32]:
    return windows.sum_ragged(mz, values, lengths)


def put(images: NDArray[Any], at: NDArray[np.int64], values: NDArray[Any], repeated: bool) -> None:
    """Spectra (n, M) into the pixels (n,) of images (M, pixels), added where a pixel has several."""
    if repeated:
        np.add.at(images.T, at, values)
    else:
        row = bool((np.diff(at) == 1).all())
        where: slice | NDArray[np.int64] = slice(at[0], at[0] + len(at)) if row else at
        for k in range(0, len(images), 16):  # as many values as a line of the cache holds
            images[k : k + 16, where] = values[:, k : k + 16].T
