"""Which tiles of a slide are wanted: a grid at an exact pixel size, those that hold tissue. Pure, without Ray.

The grid lies in output pixels from the slide's origin, so that a tile is the same whichever others are read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.places import Place
from deepfere.readers.slide import Reading, Slide, read_area, slide_digest
from deepfere.readers.slide_area import snapped, source_per_output
from deepfere.readers.slide_damaged import ReadAround
from deepfere.remote import is_url

TISSUE_UM = 8.0
"""Pixel size of the tissue mask."""


@dataclass(frozen=True)
class TileSpec:
    """What a tile is.

    Attributes:
        tile_px: Side in output pixels.
        mpp_um: Micrometres per output pixel, exactly; may not be finer than the slide.
        stride_px: Output pixels from one tile to the next; None is the tile's side.
        offset_px: First row and column of the grid, output pixels.
        tissue: Least share of a tile that is tissue, 0 to 1; 0 takes all tiles.
    """

    tile_px: int
    mpp_um: float
    stride_px: int | None = None
    offset_px: tuple[int, int] = (0, 0)
    tissue: float = 0.0

    def __post_init__(self) -> None:
        whole = all(isinstance(n, Integral) for n in (self.tile_px, self.stride, *self.offset_px))
        numbers = all(isinstance(n, Real) for n in (self.mpp_um, self.tissue))
        if (
            not (whole and numbers)
            or not (min(self.tile_px, self.stride) > 0 and 0 < self.mpp_um < np.inf)
            or min(self.offset_px) < 0
            or not 0 <= self.tissue <= 1
        ):
            raise InputError(
                f"{self} is no tiling",
                remedy="give a positive side, pixel size and stride, an offset from 0 on, and a share from 0 to 1 "
                "(side, stride and offset in whole pixels)",
            )

    @property
    def stride(self) -> int:
        """Output pixels from one tile to the next."""
        return self.tile_px if self.stride_px is None else self.stride_px


@dataclass(frozen=True)
class TissueMask:
    """Where tissue is, over the whole slide.

    Attributes:
        mask: (h, w) bool.
        spacing_um: Size (y, x) of its pixels, slide micrometres.
    """

    mask: NDArray[np.bool_]
    spacing_um: tuple[float, float]

    @classmethod
    def of(cls, slide: Slide, mpp_um: float = TISSUE_UM) -> TissueMask:
        """Tissue by colour, as the fusion finds it (`deepfere.model.features`), from the pyramid.

        What is damaged there counts as tissue, so that its tiles are planned: reading them tells, or succeeds.

        Raises:
            InputError: Nothing of it can be read.
        """
        from deepfere.model.features import base_planes, stain_reference

        rgb, coverage, hidden, spacing = tissue_overview(slide, mpp_um)
        planes = base_planes(rgb, coverage, 1, stain_reference(rgb, coverage))
        return cls((planes[5] > 127) | hidden, spacing)

    def shares(self, corner_um: NDArray[np.float64], side_um: float) -> NDArray[np.float32]:
        """Share of each square (n corners (y, x), one side) that is tissue: exact, all at once.

        The integral image is read between its pixels, linearly in each axis: a square's edge may cut a pixel.
        """
        h, w = self.mask.shape
        total = np.zeros((h + 1, w + 1), np.int64)
        np.cumsum(self.mask, axis=0, out=total[1:, 1:])
        np.cumsum(total[1:, 1:], axis=1, out=total[1:, 1:])
        spacing = np.asarray(self.spacing_um)
        low, high = (np.clip(edge / spacing, 0, (h, w)) for edge in (corner_um, corner_um + side_um))

        def up_to(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
            i, j = np.minimum(y.astype(int), h - 1), np.minimum(x.astype(int), w - 1)
            v, u = y - i, x - j
            near = total[i, j] * (1 - u) + total[i, j + 1] * u
            return near * (1 - v) + (total[i + 1, j] * (1 - u) + total[i + 1, j + 1] * u) * v

        (y0, x0), (y1, x1) = low.T, high.T
        area = up_to(y1, x1) - up_to(y0, x1) - up_to(y1, x0) + up_to(y0, x0)
        return (area * spacing.prod() / side_um**2).astype(np.float32)


def tissue_overview(
    slide: Slide, mpp_um: float = TISSUE_UM
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.bool_], tuple[float, float]]:
    """All of a slide, small: RGB (h, w, 3), coverage (h, w), what is damaged of it (h, w), and pixel size (y, x).

    Its pixels are not finer than the slide's; what is damaged is not covered.

    Raises:
        InputError: Nothing of it can be read.
    """
    around = ReadAround(slide)
    spacing = (max(mpp_um, slide.mpp_um[0]), max(mpp_um, slide.mpp_um[1]))
    shape = [max(1, int(n * own / s)) for n, own, s in zip(slide.shape_px, slide.mpp_um, spacing, strict=True)]
    rgb, coverage = read_area(around, (0.0, 0.0), (shape[0], shape[1]), spacing)
    hidden = around.hidden((0.0, 0.0), spacing, coverage.shape)
    coverage[hidden] = 0.0
    if around.first is not None and not coverage.any():
        raise around.first
    return rgb, coverage, hidden, spacing


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one slide, n of them, in row order.

    Attributes:
        spec: What a tile is.
        path: The slide: an absolute path, or a URL.
        slide_sha256: Its content (`deepfere.readers.slide.slide_digest`).
        slide_mpp_um: Its level-0 pixel size (y, x).
        reading: From which level they are read, by which reader, and how much they are reduced.
        level_px: Pixels (h, w) of that level.
        native_px: Pixels (h, w) of its native tiles.
        corner_px: (n, 2) first row and column, output pixels.
        window_px: (n, 4) rows and columns (r0, r1, c0, c1) of the level that they use, inside it.
        valid_px: (n, 2) rows and columns of each tile that the slide reaches; the rest is background.
        tissue: (n,) share that is tissue; NaN where no mask was given.
        candidates: Tiles of the whole grid.
    """

    spec: TileSpec
    path: str
    slide_sha256: str
    slide_mpp_um: tuple[float, float]
    reading: Reading
    level_px: tuple[int, int]
    native_px: tuple[int, int]
    corner_px: NDArray[np.int64] = field(repr=False)
    window_px: NDArray[np.int64] = field(repr=False)
    valid_px: NDArray[np.int64] = field(repr=False)
    tissue: NDArray[np.float32] = field(repr=False)
    candidates: int

    def __len__(self) -> int:
        return len(self.corner_px)

    @property
    def native(self) -> NDArray[np.int64]:
        """(n, 4) rows and columns [r0, r1), [c0, c1) of the native tiles that each tile touches."""
        th, tw = self.native_px
        r0, r1, c0, c1 = self.window_px.T
        return np.stack([r0 // th, -(-r1 // th), c0 // tw, -(-c1 // tw)], axis=1)

    @property
    def key(self) -> str:
        """16 hexadecimal digits that it is known by: of its tiles, and of its slide's content, wherever that lies."""
        what = asdict(self.spec), self.slide_sha256, self.slide_mpp_um, asdict(self.reading), self.level_px
        sha = hashlib.sha256(json.dumps([*what, self.native_px]).encode())
        for numbers in (self.corner_px, self.window_px, self.valid_px):
            sha.update(np.ascontiguousarray(numbers, "<i8").tobytes())
        return sha.hexdigest()[:16]

    def to_parquet(self, path: str | Path | Place) -> None:
        """Write the plan to a Parquet file or ``s3://`` URL: a row for each tile, everything else in its metadata.

        Equal plans give equal bytes.
        """
        from deepfere.tiling.tile_files import save_plan

        save_plan(self, path)

    @classmethod
    def from_parquet(cls, path: str | Path | Place, slide: str | Path | None = None) -> TilePlan:
        """The plan that `to_parquet` wrote.

        Args:
            path: The file, or the URL of one.
            slide: Where the slide lies now; None is where it lay.

        Raises:
            InputError: It is no plan; its slide cannot be read, or has changed since.
        """
        from deepfere.tiling.tile_files import load_plan

        return load_plan(path, slide)

    def take(self, tiles: NDArray[np.int64]) -> TilePlan:
        """Some of the tiles, for one of several readers."""
        names = ("corner_px", "window_px", "valid_px", "tissue")
        return replace(self, **{name: getattr(self, name)[tiles] for name in names})

    def distinct(self) -> int:
        """Native tiles that the tiles touch, each counted once."""
        th, tw = self.native_px
        touched = np.zeros((-(-self.level_px[0] // th), -(-self.level_px[1] // tw)), bool)
        for r0, r1, c0, c1 in self.native:
            touched[r0:r1, c0:c1] = True
        return int(touched.sum())


def plan_tiles(slide: Slide, spec: TileSpec, tissue: TissueMask | None = None) -> TilePlan:
    """The tiles of a slide that hold enough tissue.

    Args:
        slide: An opened slide; only its geometry and digest are used, and the mask is made from it where none is given.
        spec: What a tile is.
        tissue: Where tissue is; None makes it if ``spec.tissue`` asks for any.

    Raises:
        InputError: The tiles are finer than the slide.
    """
    wanted = (spec.mpp_um, spec.mpp_um)
    if spec.mpp_um < max(slide.mpp_um) * (1 - 1e-6):
        raise InputError(
            f"its pixels are {max(slide.mpp_um):g} um, tiles of {spec.mpp_um:g} um are asked for",
            where=slide.path,
            remedy=f"ask for {max(slide.mpp_um):g} um or more",
        )
    if tissue is None and spec.tissue > 0:
        tissue = TissueMask.of(slide)
    starts, windows, valid = [], [], []
    reading = Reading.of(slide, wanted)
    level = slide.levels[reading.level]
    for axis in (0, 1):
        own, down, size = slide.mpp_um[axis], level.downsample[axis], level.shape_px[axis]
        ratio, full = source_per_output(spec.mpp_um, own * down), slide.shape_px[axis] * own / spec.mpp_um
        start = np.arange(spec.offset_px[axis], max(full - 1e-6, 1), spec.stride, dtype=np.int64)
        low, high = snapped(start, ratio), snapped(start + spec.tile_px, ratio)
        first = np.clip(np.floor(low), 0, size - 1).astype(np.int64)
        windows.append((first, np.clip(np.ceil(high), first + 1, size).astype(np.int64)))
        starts.append(start)
        valid.append(np.clip(np.ceil(full - 1e-6) - start, 0, spec.tile_px).astype(np.int64))
    rows, cols = (k.ravel() for k in np.indices((len(starts[0]), len(starts[1]))))
    corner = np.stack([starts[0][rows], starts[1][cols]], axis=1)
    share = np.full(len(corner), np.nan, np.float32)
    kept: Any = slice(None)
    if tissue is not None:
        share = tissue.shares(corner.astype(np.float64) * spec.mpp_um, spec.tile_px * spec.mpp_um)
        # A share of 0 takes all; above it, what is asked for less rounding.
        kept = np.flatnonzero(share >= spec.tissue - 1e-6)
    (r0, r1), (c0, c1) = windows
    window = np.stack([r0[rows], r1[rows], c0[cols], c1[cols]], axis=1)
    return TilePlan(
        spec,
        # Absolute: workers may stand in another folder.
        slide.path if is_url(slide.path) else str(Path(slide.path).resolve()),
        slide_digest(slide.path),
        slide.mpp_um,
        reading,
        level.shape_px,
        level.tile_px,
        corner[kept],
        window[kept],
        np.stack([valid[0][rows], valid[1][cols]], axis=1)[kept],
        share[kept],
        len(corner),
    )
