"""Lock mass: how far the m/z of each spectrum are off, from peaks whose m/z is known.

A shift is one number in ppm per spectrum: ``m/z as read = true m/z (1 + shift 1e-6)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.around import NEAR_PX, fill
from deepfere.measured.peaks import peak_centre
from deepfere.measured.raster import Raster, batches, by_band
from deepfere.measured.store import FOUND, SHIFT
from deepfere.readers.imzml import ImzmlIndex
from deepfere.readers.imzml_arrays import read_flat
from deepfere.scratch import ScratchFile

LEAST_FOUND = 0.1
"""Share of the spectra that must show a lock mass."""
PROFILE_SNR = 3.0
READ_PIXELS = 1 << 18
"""Pixels whose shifts are looked at together."""
BINS = 1 << 16
"""Of shifts, to find percentiles in."""


@dataclass(frozen=True)
class LockMass:
    """Peaks of known m/z.

    Attributes:
        mz: Their true m/z.
        tolerance_ppm: How far off they are looked for.
    """

    mz: tuple[float, ...]
    tolerance_ppm: float = 20.0

    def text(self) -> str:
        """As an error or a report names it."""
        return f"lock mass {', '.join(f'{m:.6g}' for m in self.mz)}"


def found_shifts(
    index: ImzmlIndex, ibd: IO[bytes], rows: NDArray[np.int64], kind: str, lock: LockMass
) -> NDArray[np.float64]:
    """Shift (n,) in ppm of some spectra, NaN where none of the lock masses is found.

    Of centroids it is that of the strongest one in the window; of a profile that of the centroid, above half height, of
    the highest point in it, if that is a maximum three times as high as is usual around. Of several lock masses it is
    the median.
    """
    out = np.full(len(rows), np.nan)
    done = 0
    find = _of_centroids if kind == "centroid" else _of_profiles
    for batch in batches(index.length, rows, 1):
        mz, values = read_flat(index, ibd, batch)
        mz64, lengths = mz.astype(np.float64, copy=False), index.length[batch]
        found = np.stack([find(mz64, values, lengths, m, lock.tolerance_ppm) for m in lock.mz])
        some = np.isfinite(found).any(axis=0)
        out[done : done + len(batch)][some] = np.nanmedian(found[:, some], axis=0)
        done += len(batch)
    return out


def check_share(share: float, lock: LockMass, where: object) -> None:
    """Refuse a lock mass that hardly any spectrum shows.

    Raises:
        InputError: It is in less than a tenth of them.
    """
    if share < LEAST_FOUND:
        raise InputError(
            f"{lock.text()} is within {lock.tolerance_ppm:g} ppm in {share:.1%} of its spectra; at least "
            f"{LEAST_FOUND:.0%} are needed",
            where=where,
            remedy="correct --lock-mass, or widen ingest.lock_mass_tolerance_ppm",
        )


class SectionShifts:
    """The shifts of a section: in a temporary file, as many as it has pixels; in memory those of a band.

    Args:
        index: Of the file.
        ibd: Its arrays.
        raster: Its pixels.
        kind: "centroid" or "profile".
        lock: The lock mass.
        band_rows: Image rows that are looked at together.

    Raises:
        InputError: Hardly any spectrum shows the lock mass.
        DeepfereError: There is no room for the temporary file.
    """

    def __init__(
        self, index: ImzmlIndex, ibd: IO[bytes], raster: Raster, kind: str, lock: LockMass, band_rows: int
    ) -> None:
        self._index, self._ibd, self._raster, self._kind, self._lock = index, ibd, raster, kind, lock
        self._repeated = bool(raster.counts.max() > 1)
        self._file, found, nx = ScratchFile(np.float64), 0, raster.shape_px[1]
        for begin, spectra in zip(range(0, raster.shape_px[0], band_rows), by_band(raster, band_rows), strict=True):
            shifts = self._find(spectra)
            found += int(np.isfinite(shifts).sum())
            rows = min(band_rows, raster.shape_px[0] - begin)
            self._file.write(begin * nx, _mean_image(shifts, raster, spectra, begin, rows).reshape(-1))
        self.found = found / len(index)
        check_share(self.found, lock, index.path)
        self._low, self._median, self._high = percentiles(self._known, [5, 50, 95])

    def of_band(
        self, begin: int, end: int, spectra: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[Any]]]:
        """Those of some image rows, where there is none filled by the median around the pixel, else of the section.

        Args:
            begin: First image row.
            end: Behind the last one.
            spectra: All of these rows.

        Returns:
            The shift (n,) of each spectrum, ppm, and images (rows, nx): the shift, and where one was found.
        """
        first, last = max(0, begin - NEAR_PX), min(end + NEAR_PX, self._raster.shape_px[0])
        known, mask = self._rows(first, last), self._raster.counts[first:last] > 0
        own = slice(begin - first, end - first)
        mask[: own.start] = mask[own.stop :] = False
        filled = fill(known, mask, self._median)[own]
        row, col = self._raster.at(spectra)
        shifts = filled[row - begin, col]
        if self._repeated:
            each = self._find(spectra)
            shifts = np.where(np.isnan(each), shifts, each)
        return shifts, {SHIFT: filled.astype(np.float32), FOUND: np.isfinite(known[own])}

    def _find(self, spectra: NDArray[np.int64]) -> NDArray[np.float64]:
        # Those of a band alone: in another order than the image's they are all over the index.
        part = self._index.only(spectra)
        return found_shifts(part, self._ibd, np.arange(len(part)), self._kind, self._lock)

    def facts(self) -> dict[str, Any]:
        """What the store states: the lock mass, the share of spectra that show it, median and spread over pixels."""
        return {
            "mz": list(self._lock.mz),
            "tolerance_ppm": self._lock.tolerance_ppm,
            "found": self.found,
            "median_ppm": self._median,
            "range_ppm": [self._low, self._high],
        }

    def _rows(self, first: int, last: int) -> NDArray[np.float64]:
        nx = self._raster.shape_px[1]
        return self._file.read(first * nx, (last - first) * nx).reshape(last - first, nx)

    def _known(self) -> Iterator[NDArray[np.float64]]:
        """The shifts that were found, some rows at a time."""
        ny, nx = self._raster.shape_px
        step = max(1, READ_PIXELS // nx)
        for first in range(0, ny, step):
            image = self._rows(first, min(first + step, ny))
            yield image[np.isfinite(image)]


def percentiles(parts: Callable[[], Iterator[NDArray[np.float64]]], wanted: Sequence[float]) -> list[float]:
    """As ``np.percentile``, exactly, of more values than are held: only those near the wanted ones are sorted.

    Args:
        parts: Gives the values, some at a time and whenever it is called; there is one at least.
        wanted: Percentiles, 0 to 100.
    """
    low, high, count = np.inf, -np.inf, 0
    for values in parts():
        low, high = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
        count += len(values)
    edges = np.linspace(low, high, BINS + 1)[1:-1]
    held = np.zeros(BINS, np.int64)
    for values in parts():
        held += np.bincount(np.searchsorted(edges, values, side="right"), minlength=BINS)
    at = np.asarray(wanted) / 100 * (count - 1)
    ranks = np.stack([np.floor(at), np.ceil(at)]).astype(np.int64)
    below = np.concatenate([[0], np.cumsum(held)])
    bins = np.searchsorted(below, ranks, side="right") - 1
    near = np.zeros(BINS, bool)
    near[bins] = True
    # Values that are the same, as those of a coarse axis are, are held once with their number.
    kept = [np.unique(v[near[np.searchsorted(edges, v, side="right")]], return_counts=True) for v in parts()]
    found, count_of = (np.concatenate(part) for part in zip(*kept, strict=True))
    order = np.argsort(found, kind="stable")
    # How many of the values that were kept lie below each bin.
    before = np.concatenate([[0], np.cumsum(np.where(near, held, 0))])
    place = np.searchsorted(np.cumsum(count_of[order]), before[bins] + ranks - below[bins], side="right")
    left, right = found[order][place]
    return [float(v) for v in left + (at - ranks[0]) * (right - left)]


def _mean_image(
    shifts: NDArray[np.float64], raster: Raster, spectra: NDArray[np.int64], begin: int, rows: int
) -> NDArray[np.float64]:
    """(rows, nx) mean shift of each pixel's spectra that have one; NaN elsewhere."""
    nx, known = raster.shape_px[1], np.isfinite(shifts)
    row, col = raster.at(spectra[known])
    at = (row - begin) * nx + col
    total, count = (np.bincount(at, w, rows * nx) for w in (shifts[known], None))
    return np.divide(total, count, out=np.full(rows * nx, np.nan), where=count > 0).reshape(rows, nx)


def told(facts: dict[str, Any]) -> str:
    """What `SectionShifts.facts` states, in one line."""
    names = ", ".join(f"{m:.6g}" for m in facts["mz"])
    low, high = facts["range_ppm"]
    return (
        f"lock mass {names} found in {facts['found']:.1%} of the spectra; m/z shifted by {facts['median_ppm']:.2f} ppm "
        f"(median; 5 to 95 %: {low:.2f} to {high:.2f})"
    )


def _of_centroids(
    mz: NDArray[np.float64], values: NDArray[Any], lengths: NDArray[np.int64], lock: float, tolerance_ppm: float
) -> NDArray[np.float64]:
    off = (mz / lock - 1) * 1e6
    near = np.flatnonzero((np.abs(off) <= tolerance_ppm) & (values > 0))
    owner = np.searchsorted(np.cumsum(lengths), near, side="right")
    order = np.lexsort((np.abs(off[near]), -values[near].astype(np.float64), owner))
    first = order[np.unique(owner[order], return_index=True)[1]]
    out = np.full(len(lengths), np.nan)
    out[owner[first]] = off[near[first]]
    return out


def _of_profiles(
    mz: NDArray[np.float64], values: NDArray[Any], lengths: NDArray[np.int64], lock: float, tolerance_ppm: float
) -> NDArray[np.float64]:
    out, ends = np.full(len(lengths), np.nan), np.cumsum(lengths)
    low, high = (lock * (1 + sign * tolerance_ppm * 1e-6) for sign in (-1, 1))
    around = [lock * (1 + sign * tolerance_ppm * 1e-5) for sign in (-1, 1)]
    for n, (first, last) in enumerate(zip(ends - lengths, ends, strict=True)):
        m, v = mz[first:last], values[first:last]
        if len(m) < 3:
            continue
        if (np.diff(m) < 0).any():
            order = np.argsort(m, kind="stable")
            m, v = m[order], v[order]
        begin, end = int(np.searchsorted(m, low)), int(np.searchsorted(m, high, side="right"))
        if begin == end:
            continue
        top = begin + int(np.argmax(v[begin:end]))
        wide = v[slice(*np.searchsorted(m, around))]
        if not 0 < top < len(m) - 1 or v[top] < max(v[top - 1], v[top + 1]):
            continue
        if v[top] > 0 and v[top] >= PROFILE_SNR * float(np.median(np.maximum(wide, 0))):
            out[n] = (peak_centre(m, v.astype(np.float64), top) / lock - 1) * 1e6
    return out
