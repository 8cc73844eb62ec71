"""A table of pixels by m/z bins, reduced to ions: sums of bins."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.normalise import ragged_factors
from deepfere.measured.peaks import SharedIons, found_ions
from deepfere.measured.raster import Raster, batches, in_image_order
from deepfere.measured.reduce import LARGEST, Reduce, refuse_range, refuse_twice
from deepfere.measured.sampled import (
    Highest,
    PeakSpec,
    Sample,
    interpolated,
    sample_centroids,
    sample_profiles,
    sample_rows,
)
from deepfere.measured.tolerance import Targets, Tolerance
from deepfere.measured.windows import Windows
from deepfere.readers.table import Table
from deepfere.readers.table_rows import RowReader

MAX_VARIABLES = 5000
"""Up to so many variables are ions themselves; of more, peaks are found."""


def choose_ions(
    table: Table, raster: Raster, targets: Targets | SharedIons | None, kind: str | None, spec: PeakSpec
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The ions (M,) ascending, and how they were chosen.

    Args:
        table: Of the store.
        raster: Its pixels.
        targets: Given m/z, or those that a study found.
        kind: "centroid" or "profile".
        spec: How peaks are found.

    Raises:
        InputError: Nothing says how to find ions, none is found, or windows are narrower than the table's bins.

    Warns:
        UserWarning: A target has no variable in its window.
    """
    axis, tolerance = table.sorted_mz()[0], spec.tolerance
    if isinstance(targets, SharedIons):
        # Of a list of features some may be missing; bins that are too wide for the windows lose most ions.
        if 2 * (_held(axis, targets.mz, tolerance) == 0).sum() > len(targets.mz):
            check_bins(table, targets.mz, tolerance)
        _warn_lost(table, axis, targets.mz, tolerance, "ions of the study")
        return targets.mz, {"ions": "automatic", "peaks": targets.peaks}
    if targets is not None:
        _warn_lost(table, axis, targets.mz, targets.tolerance, "targets")
        return targets.mz, {"ions": "list"}
    if len(axis) <= MAX_VARIABLES:
        refuse_range(spec.mz_range, table.path)
        refuse_twice(axis, table.path)
        return axis, {"ions": "axis"}
    if kind is None:
        raise InputError("says neither centroid nor profile", where=table.path, remedy="give --representation")
    ions, how = found_ions(sample_table(table, raster, kind, spec), spec, table.path)
    check_bins(table, ions, tolerance)
    return ions, how


def _warn_lost(
    table: Table, axis: NDArray[np.float64], wanted: NDArray[np.float64], tolerance: Tolerance, name: str
) -> None:
    lost = wanted[_held(axis, wanted, tolerance) == 0]
    if len(lost) == len(wanted):
        raise InputError(
            f"has no variable within {tolerance} of a target; the nearest is {_nearest(axis, lost)}",
            where=table.path,
            remedy="correct --mz or widen --tolerance-ppm",
        )
    if len(lost):
        warnings.warn(
            f"{table.path}: {len(lost)} of {len(wanted)} {name} have no variable "
            f"within {tolerance} and are zero everywhere, first {lost[0]:.6g}",
            UserWarning,
            stacklevel=6,
        )


def check_bins(table: Table, ions: NDArray[np.float64], tolerance: Tolerance) -> None:
    """Refuse found ions in whose windows no variable lies, within the table's range.

    Raises:
        InputError: There is one; names the tolerance that does.
    """
    axis = table.sorted_mz()[0]
    lost = ions[_held(axis, ions, tolerance) == 0]
    if len(lost):
        k = np.clip(np.searchsorted(axis, lost), 1, len(axis) - 1)
        wide = float(((axis[k] - axis[k - 1]) / lost).max() * 1e6)
        raise InputError(
            f"has bins that are up to {wide:.3g} ppm wide, and windows of {tolerance} miss them",
            where=table.path,
            remedy=f"give --tolerance-ppm {math.ceil(wide)}, or convert it with finer bins",
        )


def sample_table(table: Table, raster: Raster, kind: str, spec: PeakSpec) -> Sample:
    """What up to `PeakSpec.sample` pixels, evenly over the image, show; profiles are on one axis, and are read once.

    Raises:
        InputError: A value is not finite.
    """
    axis, rank = table.sorted_mz()
    rows = np.sort(in_image_order(raster, sample_rows(len(table), spec)))
    reader = RowReader(table, rows)
    reach = float(axis[0]), float(axis[-1])

    def spectra() -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        for batch in batches(table.length, rows, 1):
            columns, values, lengths = reader.read(batch)
            check_finite(table, batch, values, lengths)
            ends = np.cumsum(lengths)
            for first, last in zip(ends - lengths, ends, strict=True):
                yield axis[rank[columns[first:last]]], np.maximum(values[first:last].astype(np.float64), 0.0)

    if kind == "centroid":
        return replace(sample_centroids(spectra(), spec), mz_range=reach)
    total, highest = np.zeros(len(axis)), Highest(len(axis), spec.min_spectra)
    for batch in batches(table.length, rows, 1):
        columns, values, lengths = reader.read(batch)
        check_finite(table, batch, values, lengths)
        total += np.bincount(rank[columns], weights=np.maximum(values, 0), minlength=len(axis))
        ends = np.cumsum(lengths)
        for first, last in zip(ends - lengths, ends, strict=True):
            highest.add(np.maximum(values[first:last].astype(np.float64), 0.0), rank[columns[first:last]])
    whole = axis, total / len(rows)
    found = sample_profiles(lambda: [whole], spec)
    if not len(found.axis) or not spec.few(len(rows)):
        return replace(found, spectra=len(rows))
    return replace(found, spectra=len(rows), high=interpolated(found.axis, axis, highest.least()))


def _held(axis: NDArray[np.float64], ions: NDArray[np.float64], tolerance: Tolerance) -> NDArray[np.int64]:
    """How many variables lie in each ion's window."""
    windows = Windows(ions, tolerance)
    return np.searchsorted(axis, windows.high, "right") - np.searchsorted(axis, windows.low, "left")


def _nearest(axis: NDArray[np.float64], mz: NDArray[np.float64]) -> str:
    k = np.clip(np.searchsorted(axis, mz), 1, max(1, len(axis) - 1))
    near = np.concatenate([axis[k - 1], axis[np.minimum(k, len(axis) - 1)]])
    ppm = np.abs(near / np.concatenate([mz, mz]) - 1) * 1e6
    return f"{near[ppm.argmin()]:.6g} ({ppm.min():.3g} ppm)"


def check_finite(
    table: Table, rows: NDArray[np.int64], values: NDArray[np.float32], lengths: NDArray[np.int64]
) -> None:
    """Refuse values that are not finite numbers, or so large that their squares are none.

    Raises:
        InputError: There is one; names the pixel.
    """
    if len(values) and not (values.min() > -LARGEST and values.max() < LARGEST):
        first = int((np.abs(values) < LARGEST).argmin())
        i = int(rows[int(np.searchsorted(np.cumsum(lengths), first, side="right"))])
        raise InputError(
            f"the spectrum at x {table.x[i]}, y {table.y[i]} has intensities that are not finite numbers, or "
            f"beyond {LARGEST:.0e}, whose squares are none",
            where=table.path,
            remedy="convert it again or leave that pixel out",
        )


class TableReducer:
    """Pixels to ions and factors, a batch at a time.

    An ion is the sum of the variables in its window, each of them whole; a table's values are sums already, of
    centroids and of profiles alike, so that windows that share no variable share no signal.

    Args:
        reader: Of the table, in the order in which pixels will be asked for.
        ions: (M,) ascending.
        how: "axis" where the ions are the variables themselves.
        tolerance: Half-width of the ions' windows.
        reference: Its window is a fourth factor.
    """

    def __init__(
        self,
        reader: RowReader,
        ions: NDArray[np.float64],
        how: str,
        tolerance: Tolerance,
        reference: Windows | None = None,
    ) -> None:
        self.reader, self.table, self.ions = reader, reader.table, ions
        self.axis, self.rank = self.table.sorted_mz()
        self.windows = None if how == "axis" else Windows(ions, tolerance)
        self.reference = reference

    def of(self, rows: NDArray[np.int64]) -> Reduce:
        """For some pixels, which are then counted from 0."""
        return lambda some: self(rows[some])

    def __call__(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float64], int]:
        """Ions (n, M), factors (3 or 4, n) and the number of negative intensities of some pixels.

        Raises:
            InputError: An intensity is not finite.
        """
        columns, values, lengths = self.reader.read(rows)
        check_finite(self.table, rows, values, lengths)
        negatives = int((values < 0).sum())
        if negatives:
            values = np.maximum(values, 0)
        factors = ragged_factors(values, lengths)
        # Every variable is a value of every spectrum, stored or not.
        factors[1] *= np.sqrt(lengths / len(self.axis))
        place = self.rank[columns]
        if self.reference is not None:
            factors = np.vstack([factors, self.reference.sum_ragged(self.axis[place], values, lengths)[:, 0]])
        if self.windows is not None:
            return self.windows.sum_ragged(self.axis[place], values, lengths), factors, negatives
        n, a = len(rows), len(self.axis)
        cell = np.repeat(np.arange(n) * a, lengths) + place
        return np.bincount(cell, values, n * a).reshape(n, a).astype(np.float32), factors, negatives
