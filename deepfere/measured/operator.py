"""The measurement operator A and exact upsamplers P with ``A P = I``.

A averages the high-resolution image over a measured pixel's footprint: on the section grid that is
the mean of ``factor x factor`` pixels, so A is separable, exact and local.

P is histopolation: the quadratic spline whose mean over every measured pixel equals the measured
value, averaged over high-resolution pixels. With B-spline coefficients b on the measured grid, the
mean over pixel k is ``(b[k-1] + 4 b[k] + b[k+1]) / 6``, so b comes from one tridiagonal solve per axis
(`spline_coefficients`, global but on the small grid) and P is a 3-tap evaluation of b (`expand`).
Equivalently, P differences the cubic spline through the running integral of the measurement
(de Boor, A Practical Guide to Splines, 1978, ch. VIII).

`expand` works on NumPy arrays and torch tensors alike: decoding, training and inference share it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kernel = Literal["spline", "keys", "linear"]


@lru_cache(maxsize=128)
def _phase_weights(factor: int, kernel: Kernel) -> NDArray[np.float64]:
    edges = np.arange(factor + 1, dtype=np.float64) / factor
    if kernel == "linear":
        centre = (edges[:-1] + edges[1:]) / 2
        left, right = np.maximum(0.5 - centre, 0.0), np.maximum(centre - 0.5, 0.0)
        return np.stack([left, 1.0 - left - right, right], axis=1)
    if kernel == "spline":
        # Integrals from 0 to t of the three quadratic B-spline pieces alive inside one cell.
        left = (1.0 - (1.0 - edges) ** 3) / 6.0
        right = edges**3 / 6.0
        primitive = np.stack([left, edges - left - right, right], axis=1)
    else:
        # Keys' cubic (a = -1/2) through the running integral F, written in cell means: F[k] = 0,
        # F[k-1] = -y[k-1], F[k+1] = y[k], F[k+2] = y[k] + y[k+1].
        t = edges
        before, after = (-(t**3) + 2 * t**2 - t) / 2, (t**3 - t**2) / 2
        primitive = np.stack([-before, (-3 * t**3 + 4 * t**2 + t) / 2 + after, after], axis=1)
    return factor * np.diff(primitive, axis=0)


def phase_weights(factor: int, kernel: Kernel = "spline") -> NDArray[np.float64]:
    """Weights (factor, 3) of cells k-1, k, k+1 for the sub-pixels q of cell k.

    Args:
        factor: High-resolution pixels per measured pixel and axis.
        kernel: "spline" acts on spline coefficients; "keys" acts on the values themselves (3 taps,
            local, also with ``A P = I``; used where only ``I - P A`` is needed); "linear" interpolates
            between cell centres (not an exact P: for smooth ratios).
    """
    return _phase_weights(int(factor), kernel).copy()


def cell_means(image: Any, factor: int) -> Any:
    """A: means over ``factor x factor`` blocks of (..., H, W); NumPy or torch, same dtype."""
    *lead, height, width = image.shape
    blocks = image.reshape(*lead, height // factor, factor, width // factor, factor)
    return blocks.mean(-1).mean(-2) if hasattr(image, "new_tensor") else blocks.mean(axis=(-3, -1))


def _expand_last(padded: Any, weights: Any) -> Any:
    n = padded.shape[-1] - 2
    taps = [padded[..., t : t + n, None] * weights[:, t] for t in range(3)]
    return (taps[0] + taps[1] + taps[2]).reshape(*padded.shape[:-1], -1)


def expand(padded: Any, factor: int, kernel: Kernel = "spline") -> Any:
    """Evaluate P's 3 taps: (..., ny+2, nx+2) with one cell of context -> (..., ny f, nx f).

    Args:
        padded: Spline coefficients (kernel "spline") or cell means (kernel "keys") with one cell of
            context on every side (the edge cell repeated where the grid ends).
        factor: High-resolution pixels per cell.
        kernel: As in `phase_weights`.
    """
    weights: Any = _phase_weights(int(factor), kernel)
    if hasattr(padded, "new_tensor"):
        weights = padded.new_tensor(weights)
    else:
        weights = weights.astype(padded.dtype)
    rows = _expand_last(padded.swapaxes(-1, -2), weights).swapaxes(-1, -2)
    return _expand_last(rows, weights)


def take(cells: NDArray[Any], i0: int, i1: int, j0: int, j1: int) -> NDArray[Any]:
    """A window of (..., ny, nx) that may leave the grid: the edge cells repeat."""
    rows = np.clip(np.arange(i0, i1), 0, cells.shape[-2] - 1)
    cols = np.clip(np.arange(j0, j1), 0, cells.shape[-1] - 1)
    return cells[..., rows[:, None], cols[None, :]]


def pad_edge(cells: Any) -> Any:
    """Repeat the edge cells once around (..., ny, nx); NumPy or torch."""
    if hasattr(cells, "new_tensor"):
        import torch

        cells = torch.cat([cells[..., :1, :], cells, cells[..., -1:, :]], -2)
        return torch.cat([cells[..., :1], cells, cells[..., -1:]], -1)
    return np.pad(cells, [(0, 0)] * (cells.ndim - 2) + [(1, 1), (1, 1)], mode="edge")


def fill_missing(cells: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Values of (..., ny, nx) with every unmeasured cell replaced by its nearest measured one.

    Args:
        cells: Values; whatever stands in unmeasured cells is ignored.
        mask: (ny, nx), True where measured; at least one True.
    """
    if mask.all():
        return np.array(cells)
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return cells[..., nearest[0], nearest[1]]


def spline_coefficients(cells: NDArray[Any]) -> NDArray[np.float64]:
    """Quadratic-spline coefficients (..., ny, nx) float64 whose cell means are ``cells``.

    Solves ``(b[k-1] + 4 b[k] + b[k+1]) / 6 = y[k]`` along both axes, edge coefficients repeated.
    """
    from scipy.linalg import solve_banded

    out = np.asarray(cells, dtype=np.float64)
    for axis in (-1, -2):
        n = out.shape[axis]
        if n == 1:
            continue
        bands = np.ones((3, n)) / 6.0
        bands[1] = 4.0 / 6.0
        bands[1, 0] = bands[1, -1] = 5.0 / 6.0
        moved = np.moveaxis(out, axis, 0)
        solved = solve_banded((1, 1), bands, moved.reshape(n, -1), overwrite_b=False)
        out = np.moveaxis(solved.reshape(moved.shape), 0, axis)
    return np.ascontiguousarray(out)


def upsample(cells: NDArray[Any], factor: int, mask: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """P: (..., ny, nx) -> (..., ny f, nx f) float64, with ``cell_means(upsample(y), f) == y``.

    Args:
        cells: Measured values.
        factor: High-resolution pixels per measured pixel and axis.
        mask: (ny, nx), True where measured; unmeasured cells take their nearest measured neighbour.
    """
    filled = cells if mask is None else fill_missing(cells, mask)
    return expand(pad_edge(spline_coefficients(filled)), factor)


def null_space(image: Any, factor: int) -> Any:
    """``(I - P A) image`` for a whole (..., ny f, nx f) NumPy image, with the local 3-tap P."""
    return image - expand(pad_edge(cell_means(image, factor)), factor, "keys")
