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
from deepfere.model.features import FEATURES, smooth_covered
from deepfere.model.guide import Cells, GuideSpec, features_of
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
    """

    spec: GuideSpec
    alignment: Alignment
    weights: NDArray[np.float64]
    centre: NDArray[np.float64]
    network: FusionNetwork | None
    gate: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    mask: NDArray[np.bool_]

    def upsampled(self, cells: Cells, context_px: int, count: int | None = None) -> Tensor:
        """P y_z of the first ``count`` factors over a window with high-resolution context, (K, H, W) float32."""
        f = self.spec.factor
        extra = -(-context_px // f)
        wide = cells.grow(extra)
        padded = take(self.coefficients[:count], wide.i0 - 1, wide.i1 + 1, wide.j0 - 1, wide.j1 + 1)
        image = expand(padded, f)
        crop = extra * f - context_px
        return torch.from_numpy(image[:, crop : image.shape[1] - crop, crop : image.shape[2] - crop]).float()

    @torch.inference_mode()
    def window(self, planes_at: Any, cells: Cells) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Detail (K, h f, w f) and cover (h f, w f) over a window of measured pixels inside the grid.

        Args:
            planes_at: Called with (r0, r1, c0, c1), returns base planes (7, h, w) uint8.
            cells: Window.
        """
        f, (ny, nx) = self.spec.factor, self.spec.grid.shape_px
        wide = cells.grow(1)
        wide = Cells(max(wide.i0, 0), min(wide.i1, ny), max(wide.j0, 0), min(wide.j1, nx))
        context = self.network.radius_px if self.network is not None else 0
        features, cover = features_of(self.spec, planes_at, self.alignment, wide, context)
        inner = slice(context, cover.shape[0] - context), slice(context, cover.shape[1] - context)
        cover = cover[inner]
        deep = self.network.regressors if self.network is not None else 0
        products = (len(self.weights) - self.spec.count - deep) // len(DENSITIES)
        centre = torch.from_numpy(self.centre).float()
        regressors = with_products(features[:, *inner], self.upsampled(wide, 0, products), centre)
        if self.network is not None:
            stain = features[: len(FEATURES)]
            more = self.network.regress(stain[None], self.upsampled(wide, context)[None])[0]
            regressors = torch.cat([regressors, more])
        raw = torch.einsum("fyx,fk->kyx", regressors, torch.from_numpy(self.weights).float())
        d = raw.double().numpy() * self.gate[:, None, None]
        top, left = cells.i0 - wide.i0, cells.j0 - wide.j0
        h, w = cells.shape
        # One cell of context: from the wide window where it has one, repeated at the grid's edge.
        ring = slice(top, top + h + 2), slice(left, left + w + 2)
        around = pad_edge(cell_means(d, f))[:, *ring]
        seen = pad_edge(cell_means(cover.double().numpy(), f))[ring] >= COVERED
        rows, cols = slice(top * f, (top + h) * f), slice(left * f, (left + w) * f)
        detail = d[:, rows, cols] - expand_seen(around, seen, f)
        usable = seen[1:-1, 1:-1] & self.mask[cells.i0 : cells.i1, cells.j0 : cells.j1]
        detail *= np.repeat(np.repeat(usable, f, 0), f, 1)
        return detail.astype(np.float32), cover[rows, cols].numpy()


def expand_seen(means: NDArray[np.float64], seen: NDArray[np.bool_], factor: int) -> NDArray[np.float64]:
    """The local P of cell means, a neighbour that the slide does not show replaced by the cell itself.

    What stands in an unseen cell says nothing: it must not reach its neighbours. The mean over a cell remains its own,
    since over a cell the weights of its neighbours sum to zero.

    Args:
        means: (K, h + 2, w + 2), one cell of context on every side.
        seen: (h + 2, w + 2) cells that the slide shows.
        factor: High-resolution pixels per cell.

    Returns:
        (K, h factor, w factor).
    """
    if seen.all():
        return expand(means, factor, "keys")
    weights, (h, w) = phase_weights(factor, "keys"), (seen.shape[0] - 2, seen.shape[1] - 2)
    own, out = means[:, 1:-1, 1:-1], np.zeros((len(means), h, factor, w, factor))
    for i in range(3):
        for j in range(3):
            value = np.where(seen[i : i + h, j : j + w], means[:, i : i + h, j : j + w], own)
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
    bare, f = replace(spec, smoothing_pitch=0.0, types=None), spec.factor
    reach = [replace(spec, smoothing_pitch=s).radius_px for s in smoothings_pitch]
    most = max(reach)
    with torch.inference_mode():
        raw, cover = features_of(bare, planes_at, alignment, cells, most)
        out = []
        for smoothing, radius in zip(smoothings_pitch, reach, strict=True):
            spare = most - radius
            rows, cols = slice(spare, raw.shape[1] - spare), slice(spare, raw.shape[2] - spare)
            smoothed = smooth_covered(raw[None, :, rows, cols], cover[None, None, rows, cols], smoothing * f)
            out.append(cell_means(spec.with_types(smoothed[0]).double().numpy(), f))
    cover = cover[most : cover.shape[0] - most, most : cover.shape[1] - most]
    return np.stack(out), cell_means(cover.double().numpy(), f)
