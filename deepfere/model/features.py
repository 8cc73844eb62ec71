"""Stain features: from RGB to the cached base planes, and from planes to the model's inputs.

Base planes live in the slide frame, on a grid tied to level 0, and never depend on the alignment: they
are what is cached (uint8). The model's features are computed from planes sampled on the section grid:
non-linear first, smoothed second, so that a footprint mean of features is the feature of the footprint.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

PLANES = ("red", "green", "blue", "texture", "nuclear", "tissue", "coverage")
FEATURES = (
    "od_red",
    "od_green",
    "od_blue",
    "od_red^2",
    "od_green^2",
    "od_blue^2",
    "od_red*od_green",
    "od_red*od_blue",
    "nuclear",
    "texture",
    "tissue",
)
TEXTURE_SCALE = 400.0
"""Optical-density s.d. to uint8: 0.64 saturates."""


@dataclass(frozen=True)
class StainReference:
    """What is global about one slide's stain, found once on its overview.

    Attributes:
        white: RGB of empty glass.
        tissue_od: Mean optical density above which a pixel is tissue.
        nuclear_od: Red optical density above which a tissue pixel is nucleus (haematoxylin absorbs
            red, eosin does not).
    """

    white: tuple[float, float, float]
    tissue_od: float
    nuclear_od: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the plan."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StainReference:
        """Read what `to_dict` wrote."""
        white = values["white"]
        return cls((white[0], white[1], white[2]), values["tissue_od"], values["nuclear_od"])


def otsu(values: NDArray[np.floating], bins: int = 256) -> float:
    """Otsu's threshold of a sample (IEEE Trans. SMC 9, 62, 1979)."""
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    mass = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    if not np.isfinite(between[:-1]).any():
        return float(centres[0])
    return float(edges[1 + int(np.nanargmax(between[:-1]))])


def optical_density(rgb: NDArray[Any], white: tuple[float, float, float]) -> NDArray[np.float32]:
    """Optical density (..., 3) of RGB (..., 3): ``-log10((I + 1) / (white + 1))``, not below 0."""
    intensity = np.asarray(rgb, np.float32) + 1.0
    glass = np.asarray(white, np.float32) + 1.0
    return np.maximum(-np.log10(intensity / glass), 0.0)


def stain_reference(overview: NDArray[np.uint8], coverage: NDArray[np.floating]) -> StainReference:
    """Glass colour, tissue and nuclear thresholds of a slide, from its overview.

    Args:
        overview: (h, w, 3) RGB of the whole slide.
        coverage: (h, w) share of each pixel inside the slide.
    """
    pixels = overview[coverage > 0.99].reshape(-1, 3).astype(np.float32)
    if len(pixels) == 0:
        pixels = overview.reshape(-1, 3).astype(np.float32)
    luminance = pixels.mean(1)
    bright = pixels[luminance >= np.percentile(luminance, 95)]
    white = np.maximum(np.median(bright, axis=0), 128.0)
    glass = (float(white[0]), float(white[1]), float(white[2]))
    od = optical_density(pixels, glass)
    mean_od = od.mean(1)
    tissue_od = float(np.clip(otsu(mean_od[mean_od < 1.5]) * 0.6, 0.03, 0.25))
    tissue = od[mean_od > tissue_od]
    nuclear_od = otsu(tissue[:, 0]) if len(tissue) > 50 else 0.5
    return StainReference(glass, tissue_od, float(max(nuclear_od, 1.5 * tissue_od)))


def base_planes(
    rgb: NDArray[np.uint8], coverage: NDArray[np.floating], block: int, reference: StainReference
) -> NDArray[np.uint8]:
    """Planes (7, h, w) uint8 of `PLANES` from fine RGB (h b, w b, 3), b = ``block``.

    Colours are block means; texture is the s.d. of the mean optical density inside the block; nuclear,
    tissue and coverage are shares of the block.
    """
    height, width = rgb.shape[0] // block, rgb.shape[1] // block
    shape = (height, block, width, block)

    def mean(values: NDArray[np.floating]) -> NDArray[np.float32]:
        return values.reshape(shape).mean(axis=(1, 3), dtype=np.float32)

    colours = rgb.reshape(height, block, width, block, 3).mean(axis=(1, 3), dtype=np.float32)
    od = optical_density(rgb, reference.white)
    mean_od = od.mean(2)
    spread = np.sqrt(np.maximum(mean(mean_od**2) - mean(mean_od) ** 2, 0.0))
    soft = 0.1 * reference.nuclear_od
    nuclear = 1.0 / (1.0 + np.exp(-np.clip((od[..., 0] - reference.nuclear_od) / soft, -30, 30)))
    out = np.empty((len(PLANES), height, width), np.uint8)
    out[:3] = np.rint(colours).transpose(2, 0, 1)
    out[3] = np.rint(np.clip(spread * TEXTURE_SCALE, 0, 255))
    out[4] = np.rint(255 * mean(nuclear.astype(np.float32)))
    out[5] = np.rint(255 * mean((mean_od > reference.tissue_od).astype(np.float32)))
    out[6] = np.rint(255 * mean(np.asarray(coverage, np.float32)))
    return out


def smoothing_radius(sigma_px: float) -> int:
    """Half-width in pixels of the Gaussian that `smooth` uses."""
    return math.ceil(3.0 * sigma_px) if sigma_px > 0 else 0


def smooth_axis(images: Tensor, sigma_px: float, axis: int) -> Tensor:
    """Gaussian along axis 2 or 3 of (N, C, H, W), truncated at 3 s.d., "valid": shorter by 2 radii."""
    radius = smoothing_radius(sigma_px)
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    channels = images.shape[1]
    kernel = (taps / taps.sum()).to(images).view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
    return functional.conv2d(images, kernel.expand(channels, -1, -1, -1), groups=channels)


def smooth(images: Tensor, sigma_px: float) -> Tensor:
    """Separable Gaussian on (N, C, H, W), "valid" in both axes."""
    return smooth_axis(smooth_axis(images, sigma_px, 2), sigma_px, 3)


def raw_features(planes: Tensor, white: tuple[float, float, float]) -> Tensor:
    """Features (N, F, H, W) of `FEATURES`, not smoothed, from planes (N, 7, H, W) in 0..255.

    Args:
        planes: Base planes sampled on the section's high-resolution grid.
        white: RGB of glass.
    """
    glass = planes.new_tensor(white).view(1, 3, 1, 1)
    od = torch.clamp(-torch.log10((planes[:, :3] + 1.0) / (glass + 1.0)), min=0.0)
    red, green, blue = od[:, 0:1], od[:, 1:2], od[:, 2:3]
    return torch.cat(
        [od, od**2, red * green, red * blue] + [planes[:, 4:5] / 255, planes[:, 3:4] / 100, planes[:, 5:6] / 255],
        dim=1,
    )


def smooth_covered(raw: Tensor, cover: Tensor, sigma_px: float) -> Tensor:
    """Normalised convolution of (N, C, H, W) with weights (N, 1, H, W), "valid"; 0 where nothing is covered.

    Source: Knutsson and Westin, CVPR 1993, normalised convolution.
    """
    if smoothing_radius(sigma_px) == 0:
        return raw
    weight = smooth(cover, sigma_px)
    return smooth(raw * cover, sigma_px) / weight.clamp(min=1e-3)
