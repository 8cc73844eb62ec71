"""The patch cache: base planes of one slide in Zarr shards, decoded once, read by every epoch.

A shard is written whole by one writer (`write_shard`); the slide is read at the exact fine pixel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DeepfereError, InputError
from deepfere.model.artefacts import Artefacts
from deepfere.model.features import PLANES, StainReference, base_planes
from deepfere.model.guide import GuideSpec
from deepfere.readers.slide import Reading, Slide, area_axes, opened, read_area
from deepfere.store import create_array, open_group, shard_object, sync_shard
from deepfere.tiling.plan import CHUNK_PX, SHARD_PX, PlaneGrid


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
    """Whether the cache that stands there was made for this very slide and plan."""
    try:
        return open_group(spec.url, "r").attrs.get("fingerprint") == spec.fingerprint
    except (InputError, ValueError):
        return False


def slide_of(spec: CacheSpec) -> Slide:
    """The cache's slide, opened once per process."""
    return opened(spec.slide, spec.mpp_um, spec.reading.backend, spec.reading.icc)


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


def compute_shard(spec: CacheSpec, row: int, col: int) -> NDArray[np.uint8]:
    """Planes (7, h, w) of one shard, read from the slide."""
    r0, r1, c0, c1 = spec.planes.shard_window(row, col)
    block, spacing = spec.planes.block, spec.planes.spacing_um
    rgb, coverage = read_area(
        slide_of(spec),
        (r0 * spacing[0], c0 * spacing[1]),
        ((r1 - r0) * block, (c1 - c0) * block),
        spec.planes.fine_mpp_um,
    )
    corner = (r0 * spacing[0], c0 * spacing[1])
    marks = spec.artefacts.at(corner, spec.planes.fine_mpp_um, coverage.shape)
    return base_planes(rgb, np.where(marks, 0.0, coverage), block, spec.reference)


def write_shard(spec: CacheSpec, row: int, col: int) -> None:
    """Compute and write one whole shard; nothing of a torn or older one is left, and it is on disk afterwards."""
    r0, r1, c0, c1 = spec.planes.shard_window(row, col)
    array: Any = open_group(spec.url, "r+")["planes"]
    values = compute_shard(spec, row, col)
    shard_object(spec.url, "planes", row, col).unlink(missing_ok=True)
    array[:, r0:r1, c0:c1] = values
    sync_shard(spec.url, "planes", row, col)


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
        self._array = group["planes"]
        shape, spacing = tuple(self._array.shape[1:]), tuple(group.attrs["spacing_um"])
        if shape != tuple(spec.planes_shape) or spacing != tuple(spec.spacing_um):
            raise DeepfereError(
                f"{url} holds {shape} planes of {spacing} um; {spec.planes_shape} of {spec.spacing_um} um are wanted"
            )

    def __call__(self, r0: int, r1: int, c0: int, c1: int) -> NDArray[np.uint8]:
        """Planes (7, r1 - r0, c1 - c0) uint8."""
        return np.asarray(self._array[:, r0:r1, c0:c1])
