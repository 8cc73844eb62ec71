"""What of a result was inferred from the stain: blocks of the map, and the share of every ion over the section."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.operator import fill_missing
from deepfere.model.guide import Cells
from deepfere.model.inferred import contrast, detail_energy, energy_root, inferred_share
from deepfere.reconstruction.blocks import at, hide, measured_images, same, stamp_of, window
from deepfere.reconstruction.result import Result

Array = NDArray[np.float64]

MOST_BLOCKS = 512
"""Blocks of detail that the shares over the section are taken from; beyond that, so many spread over it."""

READ_BYTES = 2**25
"""Of measured images that are read at a time, in float64; several copies of them are made."""

_one_at_a_time = Lock()


@lru_cache(maxsize=16)
def _parts(path: str, stamp: object, ion: int | None) -> tuple[Array, Array]:
    """Measured contrast (ny, nx) and `energy_root` of one ion, or summed over all."""
    result = at(path)
    rows = range(len(result.ions)) if ion is None else range(ion, ion + 1)
    around, variance = np.zeros(result.grid.shape_px), np.zeros(len(rows))
    for n, (local, spread) in enumerate(_contrasts(result, rows)):
        variance[n] = spread
        if spread > 0:
            around += local / spread
    return around, energy_root(_loadings(result)[rows.start : rows.stop], variance)


def _contrasts(result: Result, rows: range) -> Iterator[tuple[Array, float]]:
    """`contrast` of some ions. As many are read at a time as there is memory for: their chunks hold several."""
    at_once = max(1, READ_BYTES // (8 * result.mask.size))
    for first in range(rows.start, rows.stop, at_once):
        images = measured_images(result.path, slice(first, min(first + at_once, rows.stop)))
        for cells in fill_missing(images.astype(np.float64), result.mask):
            yield contrast(cells, result.mask)


def _loadings(result: Result) -> Array:
    basis = result._basis
    return np.asarray(basis["gate"][:, None] * basis["loadings"] * basis["detail_scale"], np.float64)


def inferred_block(*, path: str, identity: object, ion: int | None, block_info: Any = None) -> NDArray[np.float32]:
    """One block of `Result.inferred`."""
    result = same(path, identity)
    cells, f = window(block_info, result.factor), result.factor
    # All blocks need the same sums over all ions: the first makes them, the others wait.
    with _one_at_a_time:
        around, root = _parts(path, stamp_of(path), ion)
    if len(root):
        ny, nx = result.grid.shape_px
        wide = cells.grow(1)
        wide = Cells(max(wide.i0, 0), min(wide.i1, ny), max(wide.j0, 0), min(wide.j1, nx))
        inside = result.mask[wide.i0 : wide.i1, wide.j0 : wide.j1]
        energy = detail_energy(result.detail(wide), root, inside, f)
        top, left = (cells.i0 - wide.i0) * f, (cells.j0 - wide.j0) * f
        energy = energy[top : top + cells.shape[0] * f, left : left + cells.shape[1] * f]
    else:
        energy = np.zeros((cells.shape[0] * f, cells.shape[1] * f))
    return hide(inferred_share(energy, around, cells, f), result, cells).astype(np.float32)


def detail_power(result: Result, chunk_px: int) -> Array:
    """(K, K) mean over measured fine pixels of the products of the detail planes."""
    f, (ny, nx) = result.factor, result.grid.shape_px
    side = max(1, chunk_px // f)
    blocks = [(i, j) for i in range(0, ny, side) for j in range(0, nx, side)]
    blocks = [b for b in blocks if result.mask[b[0] : b[0] + side, b[1] : b[1] + side].any()]
    chosen = np.unique(np.linspace(0, len(blocks) - 1, min(len(blocks), MOST_BLOCKS)).round().astype(int))
    power, count = np.zeros((0, 0)), 0
    for i, j in (blocks[n] for n in chosen):
        cells = Cells(i, min(i + side, ny), j, min(j + side, nx))
        inside = result.mask[cells.i0 : cells.i1, cells.j0 : cells.j1]
        planes = np.asarray(result.detail(cells), np.float64)[:, np.repeat(np.repeat(inside, f, 0), f, 1)]
        power = planes @ planes.T + (power if power.size else 0.0)
        count += planes.shape[1]
    return power / max(count, 1)


def section_shares(result: Result, chunk_px: int) -> tuple[Array, float]:
    """Share inferred of every ion's contrast over the section (M,), and that of all ions together.

    Energies are averaged over the measured pixels before they are divided.

    Args:
        result: The result.
        chunk_px: Side of the blocks in which its detail is stored.
    """
    loadings = _loadings(result)
    energy = np.zeros(len(loadings))
    if loadings.any():
        power = detail_power(result, chunk_px)
        energy = np.maximum(np.einsum("mk,kl,ml->m", loadings, power, loadings), 0.0)
    around, variance = np.zeros(len(loadings)), np.zeros(len(loadings))
    for m, (local, spread) in enumerate(_contrasts(result, range(len(loadings)))):
        variance[m] = spread
        around[m] = local[result.mask].mean()
    total, scale = energy + around, np.where(variance > 0, variance, np.inf)
    shares = np.where(total > 0, energy / np.where(total > 0, total, 1.0), 0.0)
    whole = float((total / scale).sum())
    return shares, float((energy / scale).sum() / whole) if whole > 0 else 0.0
