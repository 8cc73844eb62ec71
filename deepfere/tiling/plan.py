"""What is read, in which pieces: pure, deterministic, without Ray.

The plane grid lies in the slide frame and is tied to level 0: its pixels are whole blocks of a fine grid
whose pixels are whole multiples of level 0's. It does not depend on the alignment beyond *which* of its
shards are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.guide import Cells

FINE_UM = 1.0
"""Fine pixels (for nuclei and texture) are the largest multiple of level 0's up to this, or level 0."""

SHARD_PX = 512
CHUNK_PX = 128
GROUP_SHARDS = 8
"""Shards a side of the largest group that one worker makes, one after the other: native tiles on the borders between
its shards are kept from one to the next, and those on its own outer border are decoded by its neighbour again."""
MAX_FACTOR = 64


@dataclass(frozen=True)
class PlaneGrid:
    """The grid of the stain's base planes on one slide.

    Attributes:
        fine_mpp_um: Pixel size (y, x) that the slide is read at.
        block: Fine pixels per plane pixel and axis.
        shape_px: Plane pixels (h, w) over the whole slide.
    """

    fine_mpp_um: tuple[float, float]
    block: int
    shape_px: tuple[int, int]

    @property
    def spacing_um(self) -> tuple[float, float]:
        """Plane pixel size (y, x), slide micrometres."""
        return self.fine_mpp_um[0] * self.block, self.fine_mpp_um[1] * self.block

    @property
    def shards(self) -> tuple[int, int]:
        """Shards (rows, columns) that cover the grid."""
        return -(-self.shape_px[0] // SHARD_PX), -(-self.shape_px[1] // SHARD_PX)

    def shard_window(self, row: int, col: int) -> tuple[int, int, int, int]:
        """Plane rows and columns (r0, r1, c0, c1) of one shard, clipped to the grid."""
        r0, c0 = row * SHARD_PX, col * SHARD_PX
        return r0, min(r0 + SHARD_PX, self.shape_px[0]), c0, min(c0 + SHARD_PX, self.shape_px[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the plan."""
        return {"fine_mpp_um": list(self.fine_mpp_um), "block": self.block, "shape_px": list(self.shape_px)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PlaneGrid:
        """Read what `to_dict` wrote."""
        mpp, shape = values["fine_mpp_um"], values["shape_px"]
        return cls((mpp[0], mpp[1]), values["block"], (shape[0], shape[1]))


def plan_planes(slide_shape_px: tuple[int, int], mpp_um: tuple[float, float], hr_um: tuple[float, float]) -> PlaneGrid:
    """Plane pixels of at most half a high-resolution pixel.

    Args:
        slide_shape_px: Level 0 (h, w).
        mpp_um: Level 0 pixel size (y, x).
        hr_um: High-resolution pixel size (y, x).
    """
    coarse = max(mpp_um)
    multiple = max(1, int(FINE_UM / coarse + 1e-9))
    fine = (mpp_um[0] * multiple, mpp_um[1] * multiple)
    block = max(1, int(min(hr_um) / 2 / max(fine) + 1e-9))
    step = multiple * block
    return PlaneGrid(fine, block, (-(-slide_shape_px[0] // step), -(-slide_shape_px[1] // step)))


def check_range(factor: int | None) -> None:
    """Refuse a factor that no section can have.

    Raises:
        InputError: Not a whole number from 2 to 64.
    """
    if factor is not None and not 2 <= factor <= MAX_FACTOR:
        raise InputError(f"factor {factor}", where="--factor", remedy=f"give a whole number from 2 to {MAX_FACTOR}")


def check_factor(factor: int | None, grid: SectionGrid, mpp_um: tuple[float, float] | None) -> int:
    """The factor, or a default that the slide supports.

    Args:
        factor: What the user asked for; None chooses a power of two from 2 to 16 whose pixels are not
            finer than 5 um (about a cell) nor than the slide's.
        grid: Measured grid.
        mpp_um: Level 0 pixel size of the slide; None without a slide.

    Raises:
        InputError: Not a whole number from 2 to 64, or finer than the slide itself.
    """
    pitch = min(grid.pitch_um)
    floor_um = max(mpp_um) if mpp_um else 0.0
    if factor is None:
        factor = next((n for n in (16, 8, 4) if pitch / n >= max(5.0, floor_um)), 2)
    check_range(factor)
    if pitch / factor < 0.999 * floor_um:
        most = int(pitch / floor_um)
        raise InputError(
            f"factor {factor} asks for pixels of {pitch / factor:.2f} um, finer than the slide's {floor_um:.2f} um",
            where="--factor",
            remedy=f"give at most {most}" if most >= 2 else "give a slide of higher resolution, or --no-guide",
        )
    return factor


def needed_shards(
    planes: PlaneGrid, alignment: Alignment, grid: SectionGrid, mask: NDArray[np.bool_], margin_um: float
) -> NDArray[np.int64]:
    """Shards (n, 2) of the plane grid that measured pixels reach, in row order.

    Args:
        planes: The plane grid.
        alignment: Section to slide.
        grid: Measured grid.
        mask: (ny, nx) measured pixels.
        margin_um: Context wanted around every measured pixel, slide micrometres.
    """
    # The box around each pixel's mapped corners, grown by the margin, needs every shard it overlaps.
    half = np.asarray(grid.pitch_um) / 2
    corners = grid.centres_um()[mask][:, None] + np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * half
    slide = alignment.map(corners)
    size = SHARD_PX * np.asarray(planes.spacing_um)
    last = np.array(planes.shards) - 1
    low = np.floor((slide.min(1) - margin_um) / size).astype(np.int64)
    high = np.floor((slide.max(1) + margin_um) / size).astype(np.int64)
    reached = (high >= 0).all(1) & (low <= last).all(1)
    (r0, c0), (r1, c1) = np.maximum(low[reached], 0).T, np.minimum(high[reached], last).T + 1
    # Sum of rectangles by their corners: +1 where one begins, -1 where it has ended.
    steps = np.zeros((last[0] + 2, last[1] + 2), np.int64)
    for rows, cols, sign in ((r0, c0, 1), (r1, c0, -1), (r0, c1, -1), (r1, c1, 1)):
        np.add.at(steps, (rows, cols), sign)
    needed = steps.cumsum(0).cumsum(1)[:-1, :-1] > 0
    return np.argwhere(needed)


def group_shards(shards: NDArray[np.int64], least: int = 8) -> list[NDArray[np.int64]]:
    """Neighbouring shards that one worker makes, in row order: squares of at most `GROUP_SHARDS` a side.

    Args:
        shards: (n, 2) in row order, as from `needed_shards`.
        least: Groups that there have to be, so that all workers have something to do; else they are smaller.
    """
    side = GROUP_SHARDS
    while True:
        places, number = np.unique(shards // side, axis=0, return_inverse=True)
        if len(places) >= min(least, len(shards)) or side == 1:
            return [shards[number == k] for k in range(len(places))]
        side //= 2


def plan_windows(grid: SectionGrid, mask: NDArray[np.bool_], side: int) -> list[Cells]:
    """Disjoint windows of measured pixels, ``side`` a side, that hold at least one measured pixel."""
    ny, nx = grid.shape_px
    out = []
    for i0 in range(0, ny, side):
        for j0 in range(0, nx, side):
            cells = Cells(i0, min(i0 + side, ny), j0, min(j0 + side, nx))
            if mask[cells.i0 : cells.i1, cells.j0 : cells.j1].any():
                out.append(cells)
    return out


def plan_patches(grid: SectionGrid, mask: NDArray[np.bool_], patch_px: int, context_px: int) -> NDArray[np.int64]:
    """First row and column (n, 2) of training patches whose cores tile the section.

    A patch of ``patch_px`` measured pixels has ``context_px`` of context on every side; patches may leave
    the grid. Patches without a measured pixel in their core are left out.
    """
    core = patch_px - 2 * context_px
    out = [
        (i0 - context_px, j0 - context_px)
        for i0 in range(0, grid.shape_px[0], core)
        for j0 in range(0, grid.shape_px[1], core)
        if mask[i0 : i0 + core, j0 : j0 + core].any()
    ]
    return np.array(out, np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class ShardGrid:
    """Output shards of the high-resolution images; sides are multiples of the factor.

    Attributes:
        grid: Measured grid.
        factor: f.
        chunk_px: Chunk side, a multiple of f.
        shard_px: Shard side, a multiple of the chunk's.
    """

    grid: SectionGrid
    factor: int
    chunk_px: int
    shard_px: int

    @classmethod
    def plan(cls, grid: SectionGrid, factor: int, chunk_px: int, shard_px: int) -> ShardGrid:
        """Round the wanted sides to multiples; no larger than the image needs."""
        largest = max(grid.shape_px) * factor
        chunk = max(1, min(chunk_px, largest) // factor) * factor
        shard = max(1, min(shard_px, largest + chunk - 1) // chunk) * chunk
        return cls(grid, factor, chunk, shard)

    @property
    def shape_px(self) -> tuple[int, int]:
        """High-resolution pixels (H, W)."""
        return self.grid.shape_px[0] * self.factor, self.grid.shape_px[1] * self.factor

    @property
    def shards(self) -> tuple[int, int]:
        """Shards (rows, columns)."""
        return -(-self.shape_px[0] // self.shard_px), -(-self.shape_px[1] // self.shard_px)

    def cells(self, row: int, col: int) -> Cells:
        """Measured pixels of one shard, clipped to the grid."""
        side = self.shard_px // self.factor
        ny, nx = self.grid.shape_px
        return Cells(row * side, min((row + 1) * side, ny), col * side, min((col + 1) * side, nx))
