"""Training patches: which are drawn when, and what one holds. Pure NumPy, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.frame import Alignment
from deepfere.measured.operator import take
from deepfere.model.guide import Cells, GuideSpec
from deepfere.places import reading
from deepfere.readers.kept_tiles import KeptTiles
from deepfere.tiling.cache import PlaneReader, PlaneWindows


@dataclass(frozen=True)
class PatchSource:
    """One section's patches (plain values: it travels to the workers).

    Attributes:
        cache: URL of the plane cache.
        arrays: Path or URL of an .npz with ``factors`` (K, ny, nx) filled, ``pooled`` (F, ny, nx) features and
            ``weight`` (ny, nx).
        spec: `GuideSpec.to_dict`.
        alignment: `Alignment.to_dict` at the start of training.
        cells: First row and column of each patch.
        context_px: Measured pixels around a patch's core.
        radius_px: High-resolution pixels around the core that the network sees.
        margin_px: Plane pixels around a patch, for the registration to move in.
    """

    cache: str
    arrays: str
    spec: dict[str, Any]
    alignment: dict[str, Any]
    cells: list[list[int]]
    context_px: int
    radius_px: int
    margin_px: int


GROUP_PATCHES = 64
"""Neighbouring patches of one section that are drawn at about the same time: they share shards of its cache."""
MIXED_GROUPS = 8
"""Groups whose patches are drawn in one order: what is open at a time does not grow with the study."""
KEPT_BYTES = 256 << 20
"""Decoded chunks that a loader keeps: patches overlap, and those of a few groups come mixed."""


def order_of(patches: list[tuple[int, int]], rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of all patches in an order for one pass: groups shuffled, then locally the patches of a few groups.

    A study of up to `MIXED_GROUPS` groups is shuffled as a whole.
    """
    section = np.array([s for s, _ in patches])
    starts = np.flatnonzero(np.diff(section, prepend=-1))
    ends = [*starts[1:].tolist(), len(patches)]
    groups = [
        np.arange(k, min(k + GROUP_PATCHES, end))
        for start, end in zip(starts.tolist(), ends, strict=True)
        for k in range(start, end, GROUP_PATCHES)
    ]
    shuffled = rng.permutation(len(groups))
    some = (shuffled[k : k + MIXED_GROUPS] for k in range(0, len(groups), MIXED_GROUPS))
    return np.concatenate([rng.permutation(np.concatenate([groups[n] for n in mixed])) for mixed in some])


def draw(patches: list[tuple[int, int]], steps: int, batch: int, seed: int) -> dict[str, NDArray[Any]]:
    """Rows (step, section, patch, flips) of a whole training, keyed by the seed alone.

    Every patch is drawn once before any is drawn again.

    Args:
        patches: (section, patch) pairs, section by section.
        steps: Optimiser steps.
        batch: Patches per step.
        seed: Of the order and the flips.

    Returns:
        Columns (steps x batch,), a few bytes a row: a long training has tens of millions.
    """
    rng, count = np.random.default_rng([seed, 1]), steps * batch
    passes = [order_of(patches, rng).astype(np.int32) for _ in range(-(-count // len(patches)))]
    order = np.concatenate(passes)[:count]
    flips = rng.integers(0, 2, (count, 2)).astype(np.uint8)
    section, patch = np.array(patches, np.int32).T
    return {
        "step": np.repeat(np.arange(steps, dtype=np.int32), batch),
        "section": section[order],
        "patch": patch[order],
        "flip_y": flips[:, 0],
        "flip_x": flips[:, 1],
    }


class PatchReader:
    """Loads patches of one section from its cache.

    Args:
        source: The section.
        patch_px: Side in measured pixels.
        kept: Decoded chunks of planes; readers of several sections may share it.
        number: This section's among those that share.
    """

    def __init__(self, source: PatchSource, patch_px: int, kept: KeptTiles | None = None, number: int = 0) -> None:
        self.source, self.side = source, patch_px
        self.spec = GuideSpec.from_dict(source.spec)
        self.alignment = Alignment.from_dict(source.alignment)
        kept = KeptTiles(KEPT_BYTES) if kept is None else kept
        self._planes = PlaneWindows(PlaneReader(source.cache, self.spec), kept, number)
        with reading(source.arrays) as path, np.load(path) as arrays:
            self._factors, self._pooled, self._weight = arrays["factors"], arrays["pooled"], arrays["weight"]
        self._windows: dict[int, tuple[int, int, int, int]] = {}

    def window(self, patch: int) -> tuple[int, int, int, int]:
        """Plane rows and columns (r0, r1, c0, c1) of a patch, margin included."""
        if patch not in self._windows:  # of every epoch the same
            self._windows[patch] = core_window(self.source, self.spec, self.alignment, patch, self.side)
        return self._windows[patch]

    def load(self, patch: int, shape_px: tuple[int, int]) -> dict[str, NDArray[Any]]:
        """One patch with fixed shapes.

        Args:
            patch: Its number.
            shape_px: Rows and columns of the plane window; smaller windows are padded with their edge.

        Returns:
            ``planes`` (h, w, 7) uint8 of the core, ``origin`` (2,), ``cell`` (2,), ``pooled`` (F, p, p) and
            ``target`` (K, p, p) float32, ``weight`` (p, p) float32 (0 outside the grid, where not measured,
            and in held-out blocks).
        """
        i0, j0 = self.source.cells[patch]
        where = self.window(patch)
        ny, nx = self._weight.shape
        rows, cols = np.arange(i0, i0 + self.side), np.arange(j0, j0 + self.side)
        inside = ((rows >= 0) & (rows < ny))[:, None] & ((cols >= 0) & (cols < nx))[None]
        window = (i0, i0 + self.side, j0, j0 + self.side)
        return {
            "planes": self._planes(where, shape_px),
            "origin": np.array([where[0], where[2]], np.int64),
            "cell": np.array([i0, j0], np.int64),
            "pooled": take(self._pooled, *window).astype(np.float32),
            "target": take(self._factors, *window).astype(np.float32),
            "weight": (take(self._weight, *window) * inside).astype(np.float32),
        }


def core_window(
    source: PatchSource, spec: GuideSpec, alignment: Alignment, patch: int, patch_px: int
) -> tuple[int, int, int, int]:
    """Plane rows and columns (r0, r1, c0, c1) that a patch's core needs, with room for the registration."""
    (i0, j0), c = source.cells[patch], source.context_px
    core = Cells(i0 + c, i0 + patch_px - c, j0 + c, j0 + patch_px - c)
    return spec.window(alignment, core, source.radius_px, source.margin_px)


def plane_shape(sources: list[PatchSource], patch_px: int) -> tuple[int, int]:
    """Largest plane window over all patches of all sections: the fixed shape of the dataset."""
    shape = (1, 1)
    for source in sources:
        spec, alignment = GuideSpec.from_dict(source.spec), Alignment.from_dict(source.alignment)
        for patch in range(len(source.cells)):
            r0, r1, c0, c1 = core_window(source, spec, alignment, patch, patch_px)
            shape = (max(shape[0], r1 - r0), max(shape[1], c1 - c0))
    return shape
