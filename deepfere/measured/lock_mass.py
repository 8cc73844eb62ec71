"""Lock mass: how far the m/z of each spectrum are off, from peaks whose m/z is known.

A shift is one number in ppm per spectrum: ``m/z as read = true m/z (1 + shift 1e-6)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.around import fill
from deepfere.measured.peaks import peak_centre
from deepfere.measured.raster import Raster, batches
from deepfere.readers.imzml import ImzmlIndex
from deepfere.readers.imzml_arrays import read_flat

LEAST_FOUND = 0.1
"""Share of the spectra that must show a lock mass."""
PROFILE_SNR = 3.0


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


def check_found(shifts: NDArray[np.float64], lock: LockMass, where: object) -> None:
    """Refuse a lock mass that hardly any spectrum shows.

    Raises:
        InputError: It is in less than a tenth of them.
    """
    share = float(np.isfinite(shifts).mean()) if len(shifts) else 0.0
    if share < LEAST_FOUND:
        raise InputError(
            f"{lock.text()} is within {lock.tolerance_ppm:g} ppm in {share:.1%} of its spectra; at least "
            f"{LEAST_FOUND:.0%} are needed",
            where=where,
            remedy="correct --lock-mass, or widen ingest.lock_mass_tolerance_ppm",
        )


def fill_shifts(shifts: NDArray[np.float64], raster: Raster) -> NDArray[np.float64]:
    """Shifts (N,) of all spectra: where there is none, the median of those around the pixel, else of the section."""
    image = fill(shift_image(shifts, raster), raster.mask)
    return np.where(np.isnan(shifts), image[raster.row, raster.col], shifts)


def shift_image(shifts: NDArray[np.float64], raster: Raster) -> NDArray[np.float64]:
    """(ny, nx) mean shift of each pixel's spectra that have one; NaN elsewhere."""
    ny, nx = raster.shape_px
    known = np.flatnonzero(np.isfinite(shifts))
    row, col = raster.at(known)
    at = row * nx + col
    total, count = (np.bincount(at, w, ny * nx) for w in (shifts[known], None))
    return np.divide(total, count, out=np.full(ny * nx, np.nan), where=count > 0).reshape(ny, nx)


def describe(shifts: NDArray[np.float64], lock: LockMass) -> dict[str, Any]:
    """What the store states: the lock mass, and share found, median and spread (5 to 95 %) of the shifts found."""
    known = shifts[np.isfinite(shifts)]
    low, middle, high = np.percentile(known, [5, 50, 95]).tolist()
    return {
        "mz": list(lock.mz),
        "tolerance_ppm": lock.tolerance_ppm,
        "found": len(known) / len(shifts),
        "median_ppm": middle,
        "range_ppm": [low, high],
    }


def told(facts: dict[str, Any]) -> str:
    """What `describe` found, in one line."""
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
