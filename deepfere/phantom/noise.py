"""Procedural noise as a pure function of position and seed.

Every value comes from an integer hash of lattice coordinates, so that a window of a field does not
depend on which other windows were evaluated, nor in which order: slides can be painted tile by tile.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Hashes = NDArray[np.uint32]

# Standard deviation of `gradient_noise` before scaling (gradients uniform in a square): measured once.
_GRADIENT_SD = 0.178


def salt_of(seed: int, name: str) -> int:
    """A 32-bit salt for one named field of one seed, the same on every machine."""
    return zlib.crc32(f"{seed}/{name}".encode())


def hash_lattice(iy: NDArray[np.integer], ix: NDArray[np.integer], salt: int) -> Hashes:
    """Well-mixed 32-bit hashes of integer lattice points.

    Source: the finaliser "lowbias32" of C. Wellons' hash prospector.
    """
    h = iy.astype(np.uint32) * np.uint32(0x9E3779B1)
    h ^= ix.astype(np.uint32) * np.uint32(0x85EBCA77) + np.uint32(salt)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return h


def uniform(hashes: Hashes, stream: int = 0) -> Floats:
    """Uniform numbers in [0, 1) from hashes; streams of one hash are independent."""
    h = hashes + np.uint32((stream * 0x9E3779B9) & 0xFFFFFFFF)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def gradient_noise(
    y: NDArray[np.floating], x: NDArray[np.floating], cell: float, salt: int, nodes_per_cell: float = 24.0
) -> Floats:
    """Smooth noise of mean 0 and standard deviation about 1.

    A large window (two-dimensional positions that run smoothly over it) is evaluated on nodes and
    interpolated linearly where that is precise enough; at 24 nodes per cell the error is below half a
    percent of a standard deviation. Nodes lie on every 2nd, 4th, 8th or 16th pixel from the first, so
    that windows whose sides are multiples of 16 continue one another.

    Args:
        y: Positions, any shape.
        x: Positions, same shape and unit.
        cell: Size of a lattice cell, same unit; features are about this large.
        salt: Which field.
        nodes_per_cell: Fewest nodes to interpolate from; 6 is enough for a texture.

    Source: K. Perlin, Improving Noise (2002), with hashed gradients instead of a permutation table.
    """
    if y.ndim == 2 and min(y.shape) >= 64:
        pixel = max(abs(float(a[1, 1] - a[0, 0])) + abs(float(a[1, 0] - a[0, 1])) for a in (y, x))
        stride = 16
        while stride > 1 and stride * pixel * nodes_per_cell > cell:
            stride //= 2
        if stride > 1:
            coarse = _gradient_noise(_nodes(y, stride), _nodes(x, stride), cell, salt)
            return spread(spread(coarse, stride, y.shape[0]).T, stride, y.shape[1]).T
    return _gradient_noise(y, x, cell, salt)


def _nodes(values: NDArray[np.floating], stride: int) -> NDArray[np.floating]:
    """Every stride-th value in both directions and one beyond the end, continued as a straight line."""
    for _ in range(2):
        beyond = -values.shape[1] % stride
        # The node after the last pixel lies `stride - last % stride` pixels further on.
        step = beyond + 1
        end = values[:, -1:] + step * (values[:, -1:] - values[:, -2:-1])
        values = np.concatenate([values[:, ::stride], end], axis=1).T
    return values


def spread(nodes: NDArray[Any], stride: int, size: int, first: float = 0.0) -> NDArray[Any]:
    """Linear interpolation along the first axis to `size` values, `stride` of them per node.

    Args:
        nodes: (n, ...) values at positions 0, stride, 2 stride, ... .
        stride: Distance between nodes.
        size: How many values, at positions first, first + 1, ... .
        first: Position of the first value, below 1.
    """
    t = ((np.arange(stride) + first) / stride).astype(nodes.dtype)[None, :, None]
    left = nodes[:-1, None]
    filled = left + t * (nodes[1:, None] - left)
    return np.ascontiguousarray(filled.reshape(-1, nodes.shape[1])[:size])


def _gradient_noise(y: NDArray[np.floating], x: NDArray[np.floating], cell: float, salt: int) -> Floats:
    v, u = (y * (1.0 / cell)).astype(np.float32), (x * (1.0 / cell)).astype(np.float32)
    fy, fx = np.floor(v), np.floor(u)
    iy, ix = fy.astype(np.int32), fx.astype(np.int32)
    ty, tx = v - fy, u - fx
    scale, one = np.float32(2.0**-15), np.float32(1)
    corners = []
    for dy in (0, 1):
        for dx in (0, 1):
            h = hash_lattice(iy + dy, ix + dx, salt)
            gy = (h & np.uint32(0xFFFF)).astype(np.float32)
            h >>= np.uint32(16)
            gx = h.astype(np.float32)
            for g, t, d in ((gy, ty, dy), (gx, tx, dx)):
                g *= scale
                g -= one
                g *= t if d == 0 else t - one
            gy += gx
            corners.append(gy)
    sy = ty * ty * ty * (ty * (ty * 6 - 15) + 10)
    sx = tx * tx * tx * (tx * (tx * 6 - 15) + 10)
    top = corners[0] + sx * (corners[1] - corners[0])
    bottom = corners[2] + sx * (corners[3] - corners[2])
    return (top + sy * (bottom - top)) * np.float32(1.0 / _GRADIENT_SD)


def fractal_noise(
    y: NDArray[np.floating],
    x: NDArray[np.floating],
    cell: float,
    salt: int,
    octaves: int = 2,
    nodes_per_cell: float = 6.0,
) -> Floats:
    """Octaves of gradient noise, each half as large and half as strong; standard deviation about 1."""
    total = gradient_noise(y, x, cell, salt, nodes_per_cell)
    power = 1.0
    for k in range(1, octaves):
        total += np.float32(0.5**k) * gradient_noise(y, x, cell / 2**k, salt + 7919 * k, nodes_per_cell)
        power += 0.25**k
    return total / np.float32(np.sqrt(power))


def cells(y: NDArray[np.floating], x: NDArray[np.floating], salt: int) -> tuple[Floats, Floats, Hashes]:
    """Distances to the nearest and second nearest point of a jittered unit lattice.

    Args:
        y: Positions in units of the cell.
        x: Positions in units of the cell.
        salt: Which lattice.

    Returns:
        The two distances (cell units) and the hash that names the nearest point.

    Source: S. Worley, A Cellular Texture Basis Function (1996).
    """
    fy, fx = np.floor(y), np.floor(x)
    iy, ix = fy.astype(np.int32), fx.astype(np.int32)
    ty, tx = (y - fy).astype(np.float32), (x - fx).astype(np.float32)
    first = np.full(ty.shape, np.float32(9))
    second = first.copy()
    name = np.zeros(ty.shape, np.uint32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            h = hash_lattice(iy + dy, ix + dx, salt)
            oy = (h & np.uint32(0xFFFF)).astype(np.float32) * np.float32(0.8 * 2.0**-16) + np.float32(0.1 + dy)
            ox = (h >> np.uint32(16)).astype(np.float32) * np.float32(0.8 * 2.0**-16) + np.float32(0.1 + dx)
            d = (oy - ty) ** 2 + (ox - tx) ** 2
            closer = d < first
            second = np.where(closer, first, np.minimum(second, d))
            name = np.where(closer, h, name)
            first = np.minimum(first, d)
    return np.sqrt(first), np.sqrt(second), name


def ramp(value: NDArray[np.floating], low: float, high: float) -> Floats:
    """Smooth step from 0 at `low` to 1 at `high` (3t^2 - 2t^3)."""
    t = np.clip((value - np.float32(low)) * np.float32(1.0 / (high - low)), 0, 1).astype(np.float32)
    return t * t * (3 - 2 * t)
