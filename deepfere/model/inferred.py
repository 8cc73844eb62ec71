"""How much of a picture was inferred from the stain, and how much was measured.

What the stain adds to ion m is ``d_m = g_m W_m D``; it averages to nothing over every measured pixel, so no measurement
ever saw it. It is set against the contrast that was measured around it. With all energies in units of each ion's
variance ``v_m`` over the section, at fine pixel x:

    e(x) = sum over m of <d_m^2>(x) / v_m        < > averages over one measured pixel's size around x
    c(x) = sum over m of var3(y_m)(x) / v_m      the variance of 3 x 3 measured pixels, linear in between
    share(x) = e / (e + c + FLOOR M)

0: all that can be seen here was measured (its noise included), or is interpolated between what was. 1: all of it was
inferred. For one ion the sums have one term. The floor (a tenth of each ion's s.d.) is contrast that nobody sees:
without it a share of next to nothing would be shown where a picture is flat.

``|(I - P A) s|^2 / |s|^2`` has much the same numerator (and in it the corrections that keep s above zero), but its
denominator holds the ion's mean level: it would show where an ion is weak.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.operator import expand, pad_edge
from deepfere.model.guide import Cells
from deepfere.model.uncertainty import local_variance

Array = NDArray[np.float64]

FLOOR = 0.01
"""Measured contrast that is taken to be everywhere, in units of an ion's variance over the section."""


def footprint(factor: int) -> Array:
    """Weights of a moving average over one measured pixel, centred on a fine pixel; their sum is 1.

    Args:
        factor: f; where it is even, the pixels at both ends count half.
    """
    weights = np.ones(factor // 2 * 2 + 1)
    if factor % 2 == 0:
        weights[[0, -1]] = 0.5
    return weights / factor


def energy_root(loadings: Array, variance: Array) -> Array:
    """(R, K): the energy of all ions' detail is the sum of squares of ``root @ D``, however many ions there are.

    Args:
        loadings: (M, K) gates times rows of W, in intensity per unit of detail.
        variance: (M,) of each ion over the section; ions without any do not count.
    """
    scaled = loadings / np.sqrt(np.where(variance > 0, variance, np.inf))[:, None]
    if len(scaled) <= scaled.shape[1]:
        return scaled[np.any(scaled != 0, axis=1)]
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    kept = values > 1e-14 * max(float(values[-1]), 0.0)
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def detail_energy(detail: NDArray[np.floating], root: Array, inside: NDArray[np.bool_], factor: int) -> Array:
    """e(x) over a window, averaged over the measured pixels' footprints alone: (h f, w f).

    Args:
        detail: (K, h f, w f) detail planes.
        root: From `energy_root`.
        inside: (h, w) measured pixels.
        factor: f.
    """
    from scipy.ndimage import convolve1d

    weight = np.repeat(np.repeat(inside.astype(np.float64), factor, 0), factor, 1)
    planes = np.tensordot(root, np.asarray(detail, np.float64), axes=1)
    total, kernel = (planes**2).sum(0) * weight, footprint(factor)
    for axis in (0, 1):
        total = convolve1d(total, kernel, axis, mode="constant")
        weight = convolve1d(weight, kernel, axis, mode="constant")
    return total / np.maximum(weight, 1e-12)


def contrast(cells: Array, mask: NDArray[np.bool_]) -> tuple[Array, float]:
    """Variance (ny, nx) of 3 x 3 measured pixels around each, floor included, and that of the whole section.

    Args:
        cells: (ny, nx) one ion as measured, filled where it was not (`deepfere.measured.operator.fill_missing`).
        mask: (ny, nx) True where measured.
    """
    variance = float(cells[mask].var())
    return local_variance(cells) + FLOOR * variance, variance


def inferred_share(energy: Array, around: Array, cells: Cells, factor: int) -> Array:
    """``e / (e + c)`` over a window (h f, w f); 0 where there is neither.

    Args:
        energy: (h f, w f) e.
        around: (ny, nx) c at the measured pixels of the whole section, floor included.
        cells: The window.
        factor: f.
    """
    near = pad_edge(around)[cells.i0 : cells.i1 + 2, cells.j0 : cells.j1 + 2]
    total = energy + np.maximum(expand(near, factor, "linear"), 0.0)
    return np.where(total > 0, energy / np.where(total > 0, total, 1.0), 0.0)
