"""The patch cache: base planes of one slide in Zarr shards, decoded once, read by every epoch.

A shard is written whole by one writer (`write_planes`); the slide is read at the exact fine pixel size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import Damaged, DeepfereError, NoStore
from deepfere.model.artefacts import Artefacts
from deepfere.model.features import PLANES, StainReference, base_planes
from deepfere.model.guide import GuideSpec
from deepfere.places import Place, place
from deepfere.readers.kept_tiles import KeptTiles
from deepfere.readers.slide import Reading, Slide, area_axes, opened, read_area
from deepfere.readers.slide_damaged import DamagedTiles, ReadAround
from deepfere.store import create_array, open_group, reading_again, write_shard
from deepfere.tiling.plan import CHUNK_PX, SHARD_PX, PlaneGrid

BAND_PX = 2**24
"""Fine pixels of a shard that are read at a time; 45 bytes each."""


@dataclass(frozen=True)
class CacheSpec:
    """Where a slide's planes go and how they are made.

    Attributes:
        url: The cache's Zarr group.
        slide: Slide path.
        fingerprint: What the planes depend on: the slide's digest, the grid, the stain constants.
        mpp_um: Level 0 pixel size (y, x) as resolved.
        planes: The plane grid.
        reference: The slide's stain constants.
        artefacts: What on it is no stain.
        reading: How the slide is read.
    """

    url: str
    slide: str
    fingerprint: str
    mpp_um: tuple[float, float]
    planes: PlaneGrid
    reference: StainReference
    artefacts: Artefacts
    reading: Reading


def create_cache(spec: CacheSpec) -> None:
    """Create the (empty) cache array; one writer, before any worker starts."""
    group = open_group(spec.url, "w")
    create_array(
        group,
        "planes",
        (len(PLANES), *spec.planes.shape_px),
        "uint8",
        (len(PLANES), CHUNK_PX, CHUNK_PX),
        (len(PLANES), SHARD_PX, SHARD_PX),
        fill_value=0,
        dimension_names=("plane", "y", "x"),
    )
    values: dict[str, Any] = {
        "planes": list(PLANES),
        "spacing_um": list(spec.planes.spacing_um),
        "fingerprint": spec.fingerprint,
    }
    group.attrs.update(values)


def is_cache(spec: CacheSpec) -> bool:
    """Whether the cache that stands there was made for this very slide and plan.

    Raises:
        InputError: Its place does not answer: what stands there is not to be replaced.
    """
    try:
        return open_group(spec.url, "r").attrs.get("fingerprint") == spec.fingerprint
    except NoStore:
        return False


def doubt_of(url: str) -> Place:
    """The file that says of a cache that a part of it could not be read."""
    return place(url).with_suffix(".doubt")


def slide_of(spec: CacheSpec) -> Slide:
    """The cache's slide, opened once per process."""
    return opened(spec.slide, spec.mpp_um, spec.reading.backend, spec.reading.icc, spec.fingerprint)


def distinct_native_tiles(spec: CacheSpec, shards: NDArray[np.int64]) -> int:
    """How many native tiles of the slide some shards (n, 2) need: what each decoded once would come to."""
    slide, planes = slide_of(spec), spec.planes
    (h, w), (th, tw) = (getattr(slide.levels[spec.reading.level], name) for name in ("shape_px", "tile_px"))
    touched = np.zeros((-(-h // th), -(-w // tw)), bool)
    for row, col in shards.tolist():
        r0, r1, c0, c1 = planes.shard_window(row, col)
        corner = r0 * planes.spacing_um[0], c0 * planes.spacing_um[1]
        shape = (r1 - r0) * planes.block, (c1 - c0) * planes.block
        _, (y, x) = area_axes(slide, corner, shape, planes.fine_mpp_um)
        if (y.stop > y.start).any() and (x.stop > x.start).any():
            (top, bottom), (left, right) = y.reach(0, shape[0]), x.reach(0, shape[1])
            touched[top // th : -(-bottom // th), left // tw : -(-right // tw)] = True
    return int(touched.sum())


def compute_shard(spec: CacheSpec, row: int, col: int) -> tuple[NDArray[np.uint8], DamagedTiles]:
    """Planes (7, h, w) of one shard, read from the slide; its damaged native tiles, which they do not cover."""
    r0, r1, c0, c1 = spec.planes.shard_window(row, col)
    block, spacing, fine_um = spec.planes.block, spec.planes.spacing_um, spec.planes.fine_mpp_um
    around, bands = ReadAround(slide_of(spec)), []
    # Where a plane pixel is many fine ones, a shard of them is more than fits into memory.
    rows = max(1, BAND_PX // ((c1 - c0) * block * block))
    for top in range(r0, r1, rows):
        corner, shape = (top * spacing[0], c0 * spacing[1]), ((min(top + rows, r1) - top) * block, (c1 - c0) * block)
        rgb, coverage = read_area(around, corner, shape, fine_um)
        marks = spec.artefacts.at(corner, fine_um, shape) | around.hidden(corner, fine_um, shape)
        bands.append(base_planes(rgb, np.where(marks, 0.0, coverage), block, spec.reference))
    return np.concatenate(bands, 1), around.damaged


def write_planes(spec: CacheSpec, row: int, col: int) -> tuple[list[int] | None, DamagedTiles]:
    """Compute and write one whole shard.

    Returns:
        What was written (see `write_shard`), and native tiles of the slide that it lacks, as they are damaged.
    """
    values, damaged = compute_shard(spec, row, col)
    return write_shard(spec.url, open_group(spec.url, "r+")["planes"], row, col, values), damaged


class PlaneReader:
    """Reads windows of a cache; unwritten shards read as not covered.

    Args:
        url: The cache.
        spec: The geometry that it has to have.

    Raises:
        DeepfereError: It was made for another geometry.
    """

    def __init__(self, url: str, spec: GuideSpec) -> None:
        group: Any = open_group(url, "r")
        self._url = url
        self._array = group["planes"]
        shape, spacing = tuple(self._array.shape[1:]), tuple(group.attrs["spacing_um"])
        if shape != tuple(spec.planes_shape) or spacing != tuple(spec.spacing_um):
            raise DeepfereError(
                f"{url} holds {shape} planes of {spacing} um; {spec.planes_shape} of {spec.spacing_um} um are wanted"
            )

    def __call__(self, r0: int, r1: int, c0: int, c1: int) -> NDArray[np.uint8]:
        """Planes (7, r1 - r0, c1 - c0) uint8.

        Raises:
            Damaged: They cannot be read; the next run is told to look at all of them.
        """
        try:
            with reading_again(self._url):
                return np.asarray(self._array[:, r0:r1, c0:c1])
        except Damaged:
            doubt_of(self._url).write_text("")
            raise


class PlaneWindows:
    """Windows of a cache for training, which come again and overlap: decoded chunks are kept.

    Args:
        planes: The cache.
        kept: Where chunks are kept, as (rows, columns, 7); caches may share it.
        number: This cache's among those that share.
    """

    def __init__(self, planes: PlaneReader, kept: KeptTiles, number: int = 0) -> None:
        self._planes, self._kept, self._number = planes, kept, number

    def __call__(self, window: tuple[int, int, int, int], shape_px: tuple[int, int]) -> NDArray[np.uint8]:
        """Planes (h, w, 7) uint8 of a window (r0, r1, c0, c1), as large as ``shape_px``: its edge goes on."""
        r0, r1, c0, c1 = window
        height, width = r1 - r0, c1 - c0
        out = np.empty((*shape_px, len(PLANES)), np.uint8)
        for row, col, chunk in self._chunks(r0 // CHUNK_PX, -(-r1 // CHUNK_PX), c0 // CHUNK_PX, -(-c1 // CHUNK_PX)):
            y, x = row * CHUNK_PX, col * CHUNK_PX
            a, b, c, d = max(y, r0), min(y + CHUNK_PX, r1), max(x, c0), min(x + CHUNK_PX, c1)
            out[a - r0 : b - r0, c - c0 : d - c0] = chunk[a - y : b - y, c - x : d - x]
        out[:height, width:] = out[:height, width - 1 : width]
        out[height:] = out[height - 1 : height]
        return out

    def _chunks(self, r0: int, r1: int, c0: int, c1: int) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        places = [(row, col) for row in range(r0, r1) for col in range(c0, c1)]
        found = dict(zip(places, self._kept.find((self._number, *place) for place in places), strict=True))
        missing = np.array([place for place, chunk in found.items() if chunk is None])
        if len(missing):
            # One look at all that is missing: its chunks are decoded side by side.
            (top, left), (bottom, right) = missing.min(0).tolist(), missing.max(0).tolist()
            edges = (top, bottom + 1, left, right + 1)
            block = self._planes(*(CHUNK_PX * edge for edge in edges)).transpose(1, 2, 0)
            for row, col in missing.tolist():
                y, x = (row - top) * CHUNK_PX, (col - left) * CHUNK_PX
                found[row, col] = np.ascontiguousarray(block[y : y + CHUNK_PX, x : x + CHUNK_PX])
        for (row, col), chunk in found.items():
            assert chunk is not None
            self._kept.used((self._number, row, col), chunk, again=True)
            yield row, col, chunk
