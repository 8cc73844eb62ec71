"""The stain as the model sees it: features of a window of the section's high-resolution grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepfere.frame import Alignment, Points, SectionGrid
from deepfere.model.features import FEATURES, raw_features, smooth_covered, smoothing_radius
from deepfere.model.registration import mapped_grid, on_slide, plane_window, sample_window
from deepfere.model.stain_types import StainTypes

SUPERSAMPLE = 2
"""Sample points per high-resolution pixel and axis: plane pixels are at most half as large."""


@dataclass(frozen=True)
class Cells:
    """A window of measured pixels: rows i0..i1 and columns j0..j1 (ends excluded; may leave the grid)."""

    i0: int
    i1: int
    j0: int
    j1: int

    def grow(self, by: int) -> Cells:
        """The window with ``by`` more pixels on every side."""
        return Cells(self.i0 - by, self.i1 + by, self.j0 - by, self.j1 + by)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.i1 - self.i0, self.j1 - self.j0


@dataclass(frozen=True)
class GuideSpec:
    """How stain features follow from base planes, for one section.

    Attributes:
        grid: Measured grid.
        factor: High-resolution pixels per measured pixel and axis.
        spacing_um: Plane pixel size (y, x) on the slide.
        planes_shape: Rows and columns of the whole plane grid.
        white: RGB of glass.
        smoothing_pitch: S.d. of the feature smoothing in measured pixels.
        types: Stain types, whose shares are appended to the features; None = none.
        more_pitch: Further smoothings: the features at each of them follow those at the first.
    """

    grid: SectionGrid
    factor: int
    spacing_um: tuple[float, float]
    planes_shape: tuple[int, int]
    white: tuple[float, float, float]
    smoothing_pitch: float
    types: StainTypes | None = None
    more_pitch: tuple[float, ...] = ()

    @property
    def smoothings_pitch(self) -> tuple[float, ...]:
        """All smoothings, the first one first."""
        return (self.smoothing_pitch, *self.more_pitch)

    @property
    def count(self) -> int:
        """Features per pixel at each smoothing, with the shares of the types."""
        return len(FEATURES) + (0 if self.types is None else len(self.types))

    @property
    def radius_px(self) -> int:
        """Context of the smoothings in high-resolution pixels."""
        return max(smoothing_radius(s * self.factor) for s in self.smoothings_pitch)

    def points_um(self, cells: Cells, context_px: int) -> Points:
        """Section positions ((H + 2 r) sy, (W + 2 r) sx, 2) of all sample points of a window, see `supersample`.

        Args:
            cells: Window of measured pixels; H, W = its size times the factor, plus twice the context.
            context_px: High-resolution pixels around the window that features are wanted for.
        """
        return np.stack(np.meshgrid(*self.axes_um(cells, context_px), indexing="ij"), axis=-1)

    def slide_points_um(self, alignment: Alignment, cells: Cells, context_px: int, device: str = "cpu") -> Tensor:
        """Slide positions of `points_um`, computed on a device."""
        y, x = (torch.from_numpy(axis) for axis in self.axes_um(cells, context_px))
        return mapped_grid(alignment, y, x, device)

    def axes_um(self, cells: Cells, context_px: int) -> tuple[Points, Points]:
        """Of `points_um`, the rows' y and the columns' x."""
        margin = context_px + self.radius_px
        origin = (cells.i0 * self.factor - margin, cells.j0 * self.factor - margin)
        shape = tuple(n * self.factor + 2 * margin for n in cells.shape)
        fine = [self.grid.refine(self.factor * s) for s in self.supersample]
        y, x = (
            grid.axes_um((origin[0] * s, origin[1] * s), (shape[0] * s, shape[1] * s))[axis]
            for axis, (grid, s) in enumerate(zip(fine, self.supersample, strict=True))
        )
        return y, x

    @property
    def supersample(self) -> tuple[int, int]:
        """Sample points per high-resolution pixel along y and x.

        Planes are as fine as the shorter side needs; along a longer one there are so many more, about as far apart.
        """
        short = min(self.grid.pitch_um)
        sy, sx = (max(SUPERSAMPLE, math.ceil(SUPERSAMPLE * p / short - 0.5)) for p in self.grid.pitch_um)
        return sy, sx

    def window(
        self, alignment: Alignment, cells: Cells, context_px: int, margin_px: int = 1
    ) -> tuple[int, int, int, int]:
        """Rows and columns of the plane grid that sampling at `slide_points_um` needs, by the edges of the window."""
        y, x = self.axes_um(cells, context_px)
        rows = [np.stack(np.broadcast_arrays(edge, x), axis=-1) for edge in (y[0], y[-1])]
        columns = [np.stack(np.broadcast_arrays(y, edge), axis=-1) for edge in (x[0], x[-1])]
        slide_um = alignment.map(np.concatenate([*rows, *columns]))
        return plane_window(slide_um, self.spacing_um, self.planes_shape, margin_px)

    def features(self, planes: Tensor, origin_px: tuple[int, int], slide_um: Tensor) -> tuple[Tensor, Tensor]:
        """Features and cover of a window.

        Args:
            planes: (h, w, 7) float32 window of the base planes.
            origin_px: Its first row and column in the plane grid.
            slide_um: Mapped `points_um`.

        Returns:
            Features (S F, H, W), smoothing after smoothing, and cover (H, W) in [0, 1]: the share of each pixel that
            the slide shows.
        """
        return self.features_at(*self.sample(planes, origin_px, slide_um))

    def sample(self, planes: Tensor, origin_px: tuple[int, int], slide_um: Tensor) -> tuple[Tensor, Tensor]:
        """Planes (7, H, W) and cover (H, W) at the pixels of a window and the context that features need around it.

        Arguments as for `features`.
        """
        sampled = sample_window(planes, origin_px, self.spacing_um, slide_um, self.supersample)
        return sampled, sampled[-1].detach() / 255 * self.on_slide(slide_um)

    def features_at(self, sampled: Tensor, cover: Tensor) -> tuple[Tensor, Tensor]:
        """`features` of what `sample` gave."""
        r, (h, w) = self.radius_px, sampled.shape[-2:]
        raw = raw_features(sampled[None], self.white)
        features = torch.cat(list(self.smoothed(raw, cover[None, None], self.smoothings_pitch)))
        return features, cover[r : h - r, r : w - r]

    def smoothed(self, raw: Tensor, cover: Tensor, smoothings_pitch: Sequence[float]) -> Iterator[Tensor]:
        """Features at one smoothing after the other, each with the shares of the types.

        Args:
            raw: (1, C, H, W) features that are not smoothed, with the context r of the widest smoothing.
            cover: (1, 1, H, W) weight of every pixel.
            smoothings_pitch: S.d. in measured pixels.

        Yields:
            (F, H - 2 r, W - 2 r) for each of them.
        """
        reach = [smoothing_radius(s * self.factor) for s in smoothings_pitch]
        for smoothing, radius in zip(smoothings_pitch, reach, strict=True):
            spare = max(reach) - radius
            at = (..., slice(spare, raw.shape[2] - spare), slice(spare, raw.shape[3] - spare))
            yield self.with_types(smooth_covered(raw[at], cover[at], smoothing * self.factor)[0])

    def with_types(self, features: Tensor) -> Tensor:
        """Smoothed features (F, H, W) with the shares of the types behind them."""
        return features if self.types is None else torch.cat([features, self.types.shares(features)])

    def on_slide(self, slide_um: Tensor) -> Tensor:
        """Share (H, W) of each pixel's sample points that lie on the slide: beyond it sampling repeats its edge."""
        high = slide_um.new_tensor([n * s for n, s in zip(self.planes_shape, self.spacing_um, strict=True)])
        return on_slide(slide_um, high, self.supersample)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the plan."""
        return {
            "shape_px": list(self.grid.shape_px),
            "pitch_um": list(self.grid.pitch_um),
            "factor": self.factor,
            "spacing_um": list(self.spacing_um),
            "planes_shape": list(self.planes_shape),
            "white": list(self.white),
            "smoothing_pitch": self.smoothing_pitch,
            "types": None if self.types is None else self.types.to_dict(),
            "more_pitch": list(self.more_pitch),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GuideSpec:
        """Read what `to_dict` wrote."""
        shape, pitch, spacing = values["shape_px"], values["pitch_um"], values["spacing_um"]
        return cls(
            SectionGrid((shape[0], shape[1]), (pitch[0], pitch[1])),
            values["factor"],
            (spacing[0], spacing[1]),
            (values["planes_shape"][0], values["planes_shape"][1]),
            (values["white"][0], values["white"][1], values["white"][2]),
            values["smoothing_pitch"],
            StainTypes.from_dict(values.get("types")),
            tuple(values.get("more_pitch", [])),
        )


def features_of(
    spec: GuideSpec, planes_at: Any, alignment: Alignment, cells: Cells, context_px: int = 0
) -> tuple[Tensor, Tensor]:
    """Features (S F, H, W) and cover (H, W) of a window, planes fetched as needed.

    Args:
        spec: The section's geometry.
        planes_at: Called with (r0, r1, c0, c1), returns (7, h, w) uint8.
        alignment: Section to slide.
        cells: Window of measured pixels.
        context_px: High-resolution context around it.
    """
    return spec.features_at(*sampled_of(spec, planes_at, alignment, cells, context_px))


def sampled_of(
    spec: GuideSpec, planes_at: Any, alignment: Alignment, cells: Cells, context_px: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """`GuideSpec.sample` of a window; arguments as for `features_of`, and the device where it is computed and stays."""
    slide_um = spec.slide_points_um(alignment, cells, context_px, device)
    r0, r1, c0, c1 = spec.window(alignment, cells, context_px)
    planes = torch.from_numpy(planes_at(r0, r1, c0, c1)).to(device)
    return spec.sample(planes.permute(1, 2, 0).contiguous().float(), (r0, c0), slide_um)


def colours_at(sampled: Tensor, cover: Tensor) -> Tensor:
    """Colours (3, H, W) from 0 to 255 of what `GuideSpec.sample` gave, white where the slide ends."""
    return sampled[:3] * cover + 255 * (1 - cover)


def stain_of(
    spec: GuideSpec, planes_at: Any, alignment: Alignment, cells: Cells, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Colours (3, H, W) from 0 to 255 of a window, white where the slide ends, and cover (H, W) in [0, 1].

    Args:
        spec: The section's geometry.
        planes_at: Called with (r0, r1, c0, c1), returns (7, h, w) uint8.
        alignment: Section to slide.
        cells: Window of measured pixels.
        device: Where they are computed, and stay.
    """
    with torch.inference_mode():
        sampled, cover = sampled_of(
            replace(spec, smoothing_pitch=0.0, more_pitch=()), planes_at, alignment, cells, 0, device
        )
        return colours_at(sampled, cover), cover
