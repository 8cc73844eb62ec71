"""The detail planes of a window: ``D = (I - P A) G d``, the same numbers whatever the window.

Context needed around a window: one measured pixel for the projection, the network's receptive field and
the features' smoothing. Beyond the grid's edge the stain is still there; the measurement's edge repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepfere.frame import Alignment
from deepfere.measured.operator import cell_means, expand, pad_edge, phase_weights, take
from deepfere.model.features import FEATURES, smoothing_radius
from deepfere.model.guide import Cells, GuideSpec, colours_at, features_of, sampled_of, stain_of
from deepfere.model.network import FusionNetwork
from deepfere.model.ridge import DENSITIES, with_products

COVERED = 0.99
"""A measured pixel gets detail only where the slide shows at least this share of its footprint."""


@dataclass(frozen=True)
class DetailModel:
    """Everything that turns stain and factors into detail planes.

    Attributes:
        spec: Geometry of the section's guide.
        alignment: Section to slide.
        weights: (R, K) weights on the regressors of `deepfere.model.ridge`, and behind them on the network's.
        centre: (3,) optical densities that products with the factors are taken from.
        network: The deep model (T2), or None.
        gate: (K,) factor gates.
        coefficients: (K, ny, nx) spline coefficients of the factor images, holes filled (T2's input).
        mask: (ny, nx) measured pixels.
        device: Where windows are computed; the network is there.
    """

    spec: GuideSpec
    alignment: Alignment
    weights: NDArray[np.float64]
    centre: NDArray[np.float64]
    network: FusionNetwork | None
    gate: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    mask: NDArray[np.bool_]
    device: str = "cpu"

    def upsampled(self, cells: Cells, context_px: int, count: int | None = None) -> Tensor:
        """P y_z of the first ``count`` factors over a window with high-resolution context, (K, H, W) float32."""
        f = self.spec.factor
        extra = -(-context_px // f)
        wide = cells.grow(extra)
        padded = take(self.coefficients[:count], wide.i0 - 1, wide.i1 + 1, wide.j0 - 1, wide.j1 + 1)
        image = expand(self._tensor(padded), f)
        crop = extra * f - context_px
        return image[:, crop : image.shape[1] - crop, crop : image.shape[2] - crop].float()

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def window(self, planes_at: Any, cells: Cells) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Detail (K, h f, w f) and cover (h f, w f) over a window of measured pixels inside the grid.

        Args:
            planes_at: Called with (r0, r1, c0, c1), returns base planes (7, h, w) uint8.
            cells: Window.
        """
        return self.with_stain(planes_at, cells)[:2]

    @torch.inference_mode()
    def with_stain(
        self, planes_at: Any, cells: Cells
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
        """`window`, and the stain (3, h f, w f) that it came from, white where the slide ends."""
        f, (ny, nx) = self.spec.factor, self.spec.grid.shape_px
        wide = cells.grow(1)
        wide = Cells(max(wide.i0, 0), min(wide.i1, ny), max(wide.j0, 0), min(wide.j1, nx))
        context = self.network.radius_px if self.network is not None else 0
        sampled, shown = sampled_of(self.spec, planes_at, self.alignment, wide, context, self.device)
        features, cover = self.spec.features_at(sampled, shown)
        inner = slice(context, cover.shape[0] - context), slice(context, cover.shape[1] - context)
        cover = cover[inner]
        deep = self.network.regressors if self.network is not None else 0
        groups = len(self.spec.smoothings_pitch)
        products = ((len(self.weights) - deep) // groups - self.spec.count) // len(DENSITIES)
        centre = self._tensor(self.centre).float()
        regressors = with_products(features[:, *inner], self.upsampled(wide, 0, products), centre, groups)
        if self.network is not None:
            stain = features[: len(FEATURES)]
            more = self.network.regress(stain[None], self.upsampled(wide, context)[None])[0]
            regressors = torch.cat([regressors, more])
        raw = torch.einsum("fyx,fk->kyx", regressors, self._tensor(self.weights).float())
        d = raw.double() * self._tensor(self.gate)[:, None, None]
        top, left = cells.i0 - wide.i0, cells.j0 - wide.j0
        h, w = cells.shape
        # One cell of context: from the wide window where it has one, repeated at the grid's edge.
        ring = slice(top, top + h + 2), slice(left, left + w + 2)
        around = pad_edge(cell_means(d, f))[:, *ring]
        seen = pad_edge(cell_means(cover.double(), f))[ring] >= COVERED
        rows, cols = slice(top * f, (top + h) * f), slice(left * f, (left + w) * f)
        detail = d[:, rows, cols] - expand_seen(around, seen, f)
        usable = seen[1:-1, 1:-1] & self._tensor(self.mask[cells.i0 : cells.i1, cells.j0 : cells.j1])
        detail *= usable.repeat_interleave(f, 0).repeat_interleave(f, 1)
        around_px = context + self.spec.radius_px
        inside = tuple(slice(s.start + around_px, s.stop + around_px) for s in (rows, cols))
        colours = as_bytes(colours_at(sampled[:, *inside], shown[inside]))
        return detail.float().cpu().numpy(), cover[rows, cols].cpu().numpy(), colours


def as_bytes(colours: Tensor) -> NDArray[np.uint8]:
    """Colours from 0 to 255 as they are stored."""
    return colours.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def expand_seen(means: Any, seen: Any, factor: int) -> Any:
    """The local P of cell means, a neighbour that the slide does not show replaced by the cell itself.

    What stands in an unseen cell says nothing: it must not reach its neighbours. The mean over a cell remains its own,
    since over a cell the weights of its neighbours sum to zero.

    Args:
        means: (K, h + 2, w + 2), one cell of context on every side.
        seen: (h + 2, w + 2) cells that the slide shows.
        factor: High-resolution pixels per cell.

    Returns:
        (K, h factor, w factor).

    NumPy or torch.
    """
    if seen.all():
        return expand(means, factor, "keys")
    torched = isinstance(means, Tensor)
    weights: Any = means.new_tensor(phase_weights(factor, "keys")) if torched else phase_weights(factor, "keys")
    where: Any = torch.where if torched else np.where
    (h, w), own = (seen.shape[0] - 2, seen.shape[1] - 2), means[:, 1:-1, 1:-1]
    out: Any = 0
    for i in range(3):
        for j in range(3):
            value = where(seen[i : i + h, j : j + w], means[:, i : i + h, j : j + w], own)
            out += value[:, :, None, :, None] * weights[:, i][:, None, None] * weights[:, j]
    return out.reshape(len(means), h * factor, w * factor)


@dataclass(frozen=True)
class KnownDetail:
    """Detail planes that are computed already, for the whole section: neither projected nor gated any more.

    Attributes:
        spec: Geometry of the section's guide.
        alignment: Section to slide.
        gate: (K,) factor gates; they are in the detail.
        mask: (ny, nx) measured pixels.
        detail: (K, H, W).
        cover: (H, W) share of each pixel that the slide shows.
    """

    spec: GuideSpec
    alignment: Alignment
    gate: NDArray[np.float64]
    mask: NDArray[np.bool_]
    detail: NDArray[np.float32]
    cover: NDArray[np.float32]

    def window(self, planes_at: Any, cells: Cells) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Detail (K, h f, w f) and cover (h f, w f) over a window, as `DetailModel.window` gives them."""
        f = self.spec.factor
        at = (slice(cells.i0 * f, cells.i1 * f), slice(cells.j0 * f, cells.j1 * f))
        return self.detail[:, *at], self.cover[at]

    def with_stain(
        self, planes_at: Any, cells: Cells
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
        """As `DetailModel.with_stain` gives it."""
        return *self.window(planes_at, cells), as_bytes(stain_of(self.spec, planes_at, self.alignment, cells)[0])


def pooled_window(
    spec: GuideSpec, alignment: Alignment, planes_at: Any, cells: Cells, smoothings_pitch: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Footprint means of the features over a window of measured pixels, at several smoothings.

    Args:
        spec: The section's geometry; its own smoothing does not matter.
        alignment: Section to slide.
        planes_at: Called with (r0, r1, c0, c1), returns base planes (7, h, w) uint8.
        cells: Window.
        smoothings_pitch: (S,) s.d. in measured pixels.

    Returns:
        Features (S, F, h, w), with the shares of the types if the geometry has some, and cover (h, w).
    """
    bare, f = replace(spec, smoothing_pitch=0.0, types=None, more_pitch=()), spec.factor
    most = max(smoothing_radius(s * f) for s in smoothings_pitch)
    with torch.inference_mode():
        raw, cover = features_of(bare, planes_at, alignment, cells, most)
        smoothed = spec.smoothed(raw[None], cover[None, None], smoothings_pitch)
        pooled = np.stack([cell_means(one.double().numpy(), f) for one in smoothed])
    cover = cover[most : cover.shape[0] - most, most : cover.shape[1] - most]
    return pooled, cell_means(cover.double().numpy(), f)
