"""What the alignment sees: the measurement's factors and a stain overview, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from torch import Tensor
from torch.nn import functional

from deepfere.frame import SectionGrid
from deepfere.measured.operator import fill_missing
from deepfere.model.artefacts import Artefacts
from deepfere.model.features import StainReference, otsu, smooth_axis, smoothing_radius
from deepfere.readers.slide_damaged import NO_DAMAGE, DamagedTiles

NO_ARTEFACTS = Artefacts(np.zeros((0, 0), bool), (1.0, 1.0))


@dataclass(frozen=True)
class StainOverview:
    """Base planes of the whole slide at low resolution, in the slide frame.

    Attributes:
        planes: (7, h, w) uint8, `deepfere.model.features.PLANES`.
        spacing_um: Plane pixel size (y, x), slide micrometres.
        reference: The slide's stain constants.
        artefacts: What on the slide is no stain; painted over with glass in the planes.
        elsewhere: (h, w) other pieces of tissue than the one that is searched, painted over too; None where all of
            the slide is.
        damaged: Native tiles that could not be decoded: not covered, and painted over too.
    """

    planes: NDArray[np.uint8]
    spacing_um: tuple[float, float]
    reference: StainReference
    artefacts: Artefacts = NO_ARTEFACTS
    elsewhere: NDArray[np.bool_] | None = None
    damaged: DamagedTiles = NO_DAMAGE

    @property
    def extent_um(self) -> tuple[float, float]:
        """Outer size (y, x) of the overview, micrometres."""
        return self.planes.shape[1] * self.spacing_um[0], self.planes.shape[2] * self.spacing_um[1]

    def without(self, mask: NDArray[np.bool_]) -> StainOverview:
        """The same with pixels (h, w) that are not covered."""
        planes = self.planes.copy()
        planes[6, mask] = 0
        return replace(self, planes=planes)

    def coarsen(self, spacing_um: float) -> StainOverview:
        """Block means, as many as fit into pixels of ``spacing_um``."""
        b = max(1, int(spacing_um / max(self.spacing_um) + 1e-6))
        if b == 1:
            return self
        h, w = self.planes.shape[1] // b, self.planes.shape[2] // b
        blocks = self.planes[:, : h * b, : w * b].reshape(-1, h, b, w, b)
        means = np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)
        return StainOverview(means, (self.spacing_um[0] * b, self.spacing_um[1] * b), self.reference)

    def features(self, sigma_um: float = 0.0) -> Tensor:
        """Alignment features (h, w, 9) float32: densities, squares, one product, nuclei, tissue; smoothed."""
        planes = torch.from_numpy(self.planes.astype(np.float32))
        glass = torch.tensor(self.reference.white).view(3, 1, 1)
        od = torch.clamp(-torch.log10((planes[:3] + 1) / (glass + 1)), min=0.0)
        raw = torch.cat([od, od**2, od[:1] * od[2:3], planes[4:6] / 255])[None]
        for axis, spacing in ((2, self.spacing_um[0]), (3, self.spacing_um[1])):
            sigma_px = sigma_um / spacing
            radius = smoothing_radius(sigma_px)
            if radius == 0:
                continue
            # One axis at a time: plane pixels may not be square.
            pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
            raw = smooth_axis(functional.pad(raw, pad, mode="replicate"), sigma_px, axis)
        return raw[0].permute(1, 2, 0).contiguous()


@dataclass(frozen=True)
class MeasuredOverview:
    """Factor images of the measurement on its own (or a coarser) grid.

    Attributes:
        images: (K, ny, nx) float64, unmeasured cells filled from their nearest neighbour.
        mask: (ny, nx) True where measured.
        weight: (K,) share of the signal that each factor carries, sums to 1.
        grid: The grid of the images.
    """

    images: NDArray[np.float64]
    mask: NDArray[np.bool_]
    weight: NDArray[np.float64]
    grid: SectionGrid

    @cached_property
    def tissue(self) -> NDArray[np.bool_]:
        """Measured pixels (ny, nx) that are tissue, as far as the measurement itself tells.

        Two clusters of the leading factors; the one with the smaller share of the raster's rim is the tissue.
        Where the rim does not tell them apart, the tissue fills the raster: all pixels.
        """
        mask = self.mask
        values = (self.images * np.sqrt(self.weight)[:, None, None])[:, mask].T
        direction = np.linalg.svd(values - values.mean(0), full_matrices=False)[2][0]
        axis = (values - values.mean(0)) @ direction
        label = axis > otsu(axis)
        rim = (mask & ~binary_erosion(mask, np.ones((3, 3), bool)))[mask]
        share = [float(rim[label == side].mean()) if (label == side).any() else 1.0 for side in (False, True)]
        out = mask.copy()
        if min(share) < 0.3 * max(share):
            out[mask] = label == bool(np.argmin(share))
        return out

    @classmethod
    def build(
        cls,
        images: NDArray[np.float64],
        mask: NDArray[np.bool_],
        weight: NDArray[np.float64],
        grid: SectionGrid,
    ) -> MeasuredOverview:
        """Fill holes and normalise the weights."""
        return cls(fill_missing(images, mask), mask, weight / weight.sum(), grid)

    def coarsen(self, block: int) -> MeasuredOverview:
        """Means over ``block x block`` measured pixels; a coarse pixel needs half of them."""
        if block == 1:
            return self
        ny, nx = (n // block for n in self.grid.shape_px)
        crop = (slice(0, ny * block), slice(0, nx * block))
        inside = self.mask[crop].reshape(ny, block, nx, block)
        count = inside.sum((1, 3))
        values = np.where(self.mask[crop], self.images[:, crop[0], crop[1]], 0.0)
        sums = values.reshape(-1, ny, block, nx, block).sum((2, 4))
        mask = count >= block * block / 2
        if not mask.any():
            mask = count == count.max()
        grid = SectionGrid((ny, nx), (self.grid.pitch_um[0] * block, self.grid.pitch_um[1] * block))
        means = np.where(mask, sums / np.maximum(count, 1), 0.0)
        return MeasuredOverview.build(means, mask, self.weight, grid)
