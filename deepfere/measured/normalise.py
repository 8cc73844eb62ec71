"""Factors of normalisation: what they are of a spectrum, and what a pixel is multiplied by.

They are stored with the measurement and applied on reading, so that another one takes no other ingestion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.around import fill

if TYPE_CHECKING:
    from deepfere.measured.store import Measured

Normalisation = Literal["none", "tic", "rms", "median", "reference"]
FACTORS = ("tic", "rms", "median")
REFERENCE = "reference"
LEAST_REFERENCE = 0.9
"""Share of the pixels with signal that must show the reference."""
RAISED = 20.0
"""Multipliers above this are told."""


def multiplier(measured: Measured, normalisation: Normalisation) -> NDArray[np.float64] | None:
    """What an intensity is multiplied by, (ny, nx); see `Measured.factor`."""
    if normalisation == "none":
        return None
    if normalisation not in (*FACTORS, REFERENCE):
        known = ", ".join((*FACTORS, REFERENCE))
        raise InputError(f"unknown normalisation {normalisation!r}", remedy=f"give none, {known}")
    if normalisation == REFERENCE:
        factor = _reference(measured)
    else:
        factor = np.asarray(getattr(measured, normalisation), np.float64)
    inside = factor[measured.mask]
    mean = float(inside.mean())
    if not mean > 0:
        raise InputError(f"the {normalisation} factor is zero everywhere", where=measured.path, remedy="choose another")
    out = np.full(factor.shape, np.nan)
    out[measured.mask] = np.divide(mean, inside, out=np.zeros_like(inside), where=inside > 0)
    return out


def _reference(measured: Measured) -> NDArray[np.float64]:
    """(ny, nx) intensity of the reference; where it is missing, that of the pixels around."""
    if measured.reference is None:
        raise InputError(
            "was ingested without a reference m/z", where=measured.path, remedy="ingest it again with --reference-mz"
        )
    lost, signal = _without_reference(measured)
    if lost.sum() > (1 - LEAST_REFERENCE) * signal.sum():
        raise InputError(
            f"the reference {measured.attrs['reference_mz']:.6g} is missing in {lost.sum() / signal.sum():.1%} of the "
            f"pixels with signal; at most {1 - LEAST_REFERENCE:.0%} may be without",
            where=measured.path,
            remedy="choose another --reference-mz, or another normalisation",
        )
    known = np.where(signal & ~lost, measured.reference.astype(np.float64), np.nan)
    return np.where(measured.mask & ~signal, 0.0, fill(known, lost))


def _without_reference(measured: Measured) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels (ny, nx) with signal that are without it, and pixels with signal."""
    assert measured.reference is not None
    signal = measured.mask & (measured.tic > 0)
    return signal & ~(measured.reference > 0), signal


def notes(measured: Measured, normalisation: Normalisation) -> list[str]:
    """What is to be known about a normalisation; see `Measured.normalisation_notes`."""
    scale = multiplier(measured, normalisation)
    if scale is None:
        return []
    out, inside = [], scale[measured.mask]
    if silent := int((inside == 0).sum()):
        out.append(f"{silent} pixels have no signal to normalise by {normalisation} and stay zero")
    if normalisation == REFERENCE and (lost := int(_without_reference(measured)[0].sum())):
        out.append(f"{lost} pixels without the reference {measured.attrs['reference_mz']:.6g} took it from around them")
    if raised := int((inside > RAISED).sum()):
        out.append(f"{raised} pixels have less than 1/{RAISED:g} of the mean {normalisation}, and noise raised as much")
    return out


def spectrum_factors(values: NDArray[np.float32], lengths: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """TIC, RMS and median of the positive values of each row of (n, M): (3, n) float64.

    Args:
        values: Spectra, not negative.
        lengths: (n,) how many values of a row are the spectrum's, the others being zero; all by default.
    """
    values = np.asarray(values)
    n, m = values.shape
    out = np.zeros((3, n))
    if m == 0:
        return out
    count = np.full(n, m) if lengths is None else np.maximum(lengths, 1)
    wide = values.astype(np.float64)
    out[0] = wide.sum(axis=1)
    out[1] = np.sqrt(np.einsum("ij,ij->i", wide, wide) / count)
    ordered = np.sort(values, axis=1)
    above = values > 0
    # Counting all of them is far cheaper than row by row, and of centroids mostly all are.
    positive = count if np.count_nonzero(above) == count.sum() else np.count_nonzero(above, axis=1)
    rows = np.flatnonzero(positive)
    # The positive values are the last ones of each sorted row.
    low = m - positive[rows] + (positive[rows] - 1) // 2
    high = m - positive[rows] + positive[rows] // 2
    out[2, rows] = 0.5 * (ordered[rows, low].astype(np.float64) + ordered[rows, high])
    return out


def ragged_factors(values: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """`spectrum_factors` of spectra that lie one behind the other."""
    ends = np.cumsum(lengths)
    out = np.zeros((3, len(lengths)))
    longest = int(lengths.max(initial=0))
    # Of similar length they are put side by side, zeros behind the shorter ones; else each is alone.
    step = len(lengths) if longest * len(lengths) <= 4 * len(values) + 4096 else 1
    for k in range(0, len(lengths), step):
        part = lengths[k : k + step]
        block = np.zeros((len(part), int(part.max())), dtype=np.float32)
        block[np.arange(block.shape[1]) < part[:, None]] = values[ends[k] - part[0] : ends[k + len(part) - 1]]
        out[:, k : k + step] = spectrum_factors(block, part)
    return out
