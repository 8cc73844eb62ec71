"""Read groups: blocks of tiles whose native tiles are each decoded once, and the reader that carries them out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DamagedPixels, InputError
from deepfere.readers.slide import Slide, opened
from deepfere.readers.slide_area import Axis, average
from deepfere.readers.slide_native import NativeTiles, read_native
from deepfere.tiling.tiles import TilePlan

BLOCK_PX = (512, 4096)
"""Rows and columns of a block, level pixels. Low: its tiles stay in the processor's cache. Wide: few native tiles lie
between two strips, where what is kept may have to make room before it is used again."""

DENSE = 0.5
AVERAGED_PX = 1024
_ONE = np.ones((1, 1), np.uint8)


@dataclass(frozen=True)
class Group:
    """Tiles that are read together.

    Attributes:
        tiles: (n,) their numbers in the plan.
        window_px: Rows and columns (r0, r1, c0, c1) of the level around them all.
        use: For each native tile of the window: 0 no tile touches it, 1 this group is the last of its sequence
            that does, 2 a later one does too.
    """

    tiles: NDArray[np.int64]
    window_px: tuple[int, int, int, int]
    use: NDArray[np.uint8]


def group_tiles(
    plan: TilePlan, tiles: NDArray[np.int64] | None = None, block_px: tuple[int, int] = BLOCK_PX
) -> list[Group]:
    """Groups of a plan's tiles, in the order in which one reader is to read them.

    Blocks are whole native tiles. They follow each other down one strip of the slide and up the next, so that
    what neighbours share is soon used again.

    Args:
        plan: The tiles.
        tiles: Their numbers, where one reader takes only some; None takes all.
        block_px: Rows and columns of a block, level pixels; rounded to native tiles.
    """
    numbers = np.arange(len(plan)) if tiles is None else np.asarray(tiles, np.int64)
    if not len(numbers):
        return []
    native = plan.native[numbers]
    blocks = [max(1, wanted // n) for wanted, n in zip(block_px, plan.native_px, strict=True)]
    row, strip = native[:, 0] // blocks[0], native[:, 2] // blocks[1]
    turn = np.where(strip % 2 == 0, row, -row)
    order = np.lexsort((turn, strip))
    cuts = np.flatnonzero(np.diff(row[order]) | np.diff(strip[order])) + 1
    groups, last = [], np.full(native.max(axis=0)[[1, 3]], -1, np.int64)
    for number, members in enumerate(np.split(order, cuts)):
        members = np.sort(members)
        r0, c0 = native[members][:, [0, 2]].min(axis=0)
        r1, c1 = native[members][:, [1, 3]].max(axis=0)
        use = np.zeros((r1 - r0, c1 - c0), np.uint8)
        for a, b, c, d in native[members]:
            use[a - r0 : b - r0, c - c0 : d - c0] = 1
        last[r0:r1, c0:c1][use > 0] = number
        window = plan.window_px[numbers[members]]
        low, high = window.min(axis=0), window.max(axis=0)
        groups.append(Group(numbers[members], (int(low[0]), int(high[1]), int(low[2]), int(high[3])), use))
    th, tw = plan.native_px
    for number, group in enumerate(groups):
        r0, c0 = group.window_px[0] // th, group.window_px[2] // tw
        rows, cols = group.use.shape
        group.use[(group.use > 0) & (last[r0 : r0 + rows, c0 : c0 + cols] > number)] = 2
    return groups


class TileReader:
    """Reads groups of one plan (one per thread: it owns the memory that groups are read into).

    Args:
        plan: The tiles.
        slide: The opened slide; None opens it, once per process.

    Raises:
        InputError: The slide is of another size than the one that was planned.
    """

    def __init__(self, plan: TilePlan, slide: Slide | None = None) -> None:
        self.plan = plan
        how = plan.reading
        self.slide = slide or opened(plan.path, plan.slide_mpp_um, how.backend, how.icc, plan.slide_sha256)
        self._tiled = self.slide if isinstance(self.slide, NativeTiles) else None
        level = self.slide.levels[plan.reading.level :][:1]
        if not level or (level[0].shape_px, level[0].tile_px) != (plan.level_px, plan.native_px):
            raise InputError("has changed since its tiles were planned", where=plan.path, remedy="plan anew")
        self._level = level[0]
        # Where output pixels are pixels of the level, up to its very end, tiles are cut out as they are.
        whole = all(n * d == full for n, d, full in zip(*self._sizes(), strict=True))
        self._copies = whole and all(self._axis(k, 0, 1).ratio == 1 for k in (0, 1))
        self._native = plan.native
        self._band, self._made = np.empty(0, np.uint8), np.empty(0, np.uint8)

    def read(self, group: Group, out: NDArray[np.uint8] | None = None) -> tuple[NDArray[np.uint8], list[str | None]]:
        """The tiles of a group, and per tile what is wrong with it.

        Args:
            group: From `group_tiles` of the same plan.
            out: (n, side, side, 3) to write into; None makes one.

        Returns:
            RGB (n, side, side, 3) uint8, background beyond the slide, and n errors: None, or a line that names
            the damaged native tile. A tile with an error is background.
        """
        side = self.plan.spec.tile_px
        if out is None:
            out = np.empty((len(group.tiles), side, side, 3), np.uint8)
        errors: list[str | None] = [None] * len(group.tiles)
        # Of a group with many gaps, a reader that cannot leave native tiles out is asked tile by tile.
        if self._tiled is not None or _is_dense(group):
            try:
                if self._copies and self._tiled is not None:
                    self._scatter(self._tiled, group, out)
                else:
                    self._cut(group, self._source(group.window_px, group.use), out)
                return out, errors
            except DamagedPixels:
                pass  # which tiles it costs shows when they are read one by one
        for k, number in enumerate(group.tiles):
            r0, r1, c0, c1 = (int(v) for v in self.plan.window_px[number])
            single = Group(group.tiles[k : k + 1], (r0, r1, c0, c1), _ONE)
            try:
                self._cut(single, self._source(single.window_px, None), out[k : k + 1])
            except DamagedPixels as error:
                out[k], errors[k] = self.slide.background, str(error)
        return out, errors

    def _scatter(self, slide: NativeTiles, group: Group, out: NDArray[np.uint8]) -> None:
        """Every native tile into all tiles that it touches, as soon as it is decoded."""
        (th, tw), side = self.plan.native_px, self.plan.spec.tile_px
        corners, valid = (k[group.tiles].tolist() for k in (self.plan.corner_px, self.plan.valid_px))
        touching: dict[tuple[int, int], list[int]] = {}
        for k, (a, b, d, e) in enumerate(self._native[group.tiles].tolist()):
            if valid[k] != [side, side]:
                out[k] = slide.background
            for r in range(a, b):
                for c in range(d, e):
                    touching.setdefault((r, c), []).append(k)

        def straight(r: int, c: int) -> NDArray[np.uint8] | None:
            k, *more = touching[r, c]
            alone = not more and corners[k] == [r * th, c * tw] and valid[k] == [side, side]
            return out[k] if alone and th == tw == side else None

        r0, c0 = group.window_px[0] // th, group.window_px[2] // tw
        for r, c, tile in slide.native_tiles(self.plan.reading.level, r0, c0, group.use, straight):
            if tile is None:
                continue
            y, x = r * th, c * tw
            for k in touching[r, c]:
                (row, col), (h, w) = corners[k], valid[k]
                a, b, d, e = max(y, row), min(y + th, row + h), max(x, col), min(x + tw, col + w)
                out[k, a - row : b - row, d - col : e - col] = tile[a - y : b - y, d - x : e - x]

    def _source(self, window: tuple[int, int, int, int], use: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """Level pixels of a window; what ``use`` leaves out is whatever was there before."""
        r0, r1, c0, c1 = window
        if self._tiled is None:
            return self.slide.read(self.plan.reading.level, r0, c0, r1 - r0, c1 - c0)
        band = self._memory("_band", (r1 - r0, c1 - c0, 3))
        return read_native(self._tiled, self.plan.reading.level, r0, c0, r1 - r0, c1 - c0, band, use)

    def _cut(self, group: Group, source: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        """Tiles out of the level pixels around them: as they are, or averaged, all at once where they lie densely."""
        r0, _, c0, _ = group.window_px
        side, corners = self.plan.spec.tile_px, self.plan.corner_px[group.tiles]
        if self._copies:
            valid = self.plan.valid_px[group.tiles]
            if (valid < side).any():
                out[:] = self.slide.background
            for tile, (row, col), (h, w) in zip(out, corners, valid, strict=True):
                tile[:h, :w] = source[row - r0 : row - r0 + h, col - c0 : col - c0 + w]
        elif len(group.tiles) == 1 or not _is_dense(group):
            for tile, (row, col) in zip(out, corners, strict=True):
                self._average(source, (r0, c0), (row, col), tile)
        else:
            low, high = corners.min(axis=0), corners.max(axis=0) + side
            made = self._memory("_made", (high[0] - low[0], high[1] - low[1], 3))
            self._average(source, (r0, c0), (low[0], low[1]), made)
            for tile, (row, col) in zip(out, corners - low, strict=True):
                tile[:] = made[row : row + side, col : col + side]

    def _average(
        self, source: NDArray[np.uint8], at: tuple[int, int], corner: tuple[int, int], out: NDArray[np.uint8]
    ) -> None:
        """Output pixels from ``corner`` on, of a window of the level that begins ``at`` (see `read_area`)."""
        # Narrow pieces: the rows of a wide one that fit into the processor's cache are few.
        for left in range(0, out.shape[1], AVERAGED_PX):
            part = out[:, left : left + AVERAGED_PX]
            self._average_piece(source, at, (int(corner[0]), int(corner[1]) + left), part)

    def _average_piece(
        self, source: NDArray[np.uint8], at: tuple[int, int], corner: tuple[int, int], out: NDArray[np.uint8]
    ) -> None:
        y, x = (self._axis(k, corner[k], out.shape[k]) for k in (0, 1))
        coverage = None
        if not ((y.covered == 1).all() and (x.covered == 1).all()):
            coverage = y.covered.astype(np.float32)[:, None] * x.covered.astype(np.float32)[None, :]
            out[:] = self.slide.background
            if not coverage.any():
                return
        cols, left, right = x.weights(0, out.shape[1])
        part = source[:, left - at[1] : right - at[1]]
        average(part, at[0], y, (0, len(out)), cols, x, coverage, self.slide.background, out)

    def _axis(self, k: int, first: int, count: int) -> Axis:
        mpp, own = self.plan.spec.mpp_um, self.slide.mpp_um[k]
        size, downsample, full = (pair[k] for pair in self._sizes())
        return Axis.of(first * mpp, count, mpp, own, downsample, int(size), int(full))

    def _sizes(self) -> tuple[tuple[int, int], tuple[float, float], tuple[int, int]]:
        return self._level.shape_px, self._level.downsample, self.slide.shape_px

    def _memory(self, name: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """The same memory for every group: new memory costs as much as decoding into it."""
        size, held = int(np.prod(shape)), getattr(self, name)
        if held.size < size:
            held = np.empty(size, np.uint8)
            setattr(self, name, held)
        return np.asarray(held[:size].reshape(shape))


def _is_dense(group: Group) -> bool:
    """Whether so many native tiles of the window are wanted that reading or averaging all of it costs less."""
    return bool((group.use > 0).mean() >= DENSE)
