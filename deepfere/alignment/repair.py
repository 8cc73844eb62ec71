"""Footprint means of a slide's stain as it is, and repaired: gaps and ink filled, folds undone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.model.damage import Candidates
from deepfere.model.features import base_planes
from deepfere.model.registration import sample_window

SUPERSAMPLE = 4
"""Sample points per measured pixel and axis."""
INPAINTING_PITCH = (0.75, 2.0, 6.0)
"""S.d. of the normalised convolutions, in measured pixels: a wider one where the narrower see nothing."""
LINEAR = (0, 1, 2, 7, 8)
"""Features that are used: densities, nuclei, tissue. Squares would have to be extrapolated into a fold."""


def pool(image: NDArray[Any], spacing_um: tuple[float, float], slide: torch.Tensor) -> NDArray[np.float64]:
    """Footprint means (ny, nx) of one image (h, w) on the overview's grid."""
    values = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[..., None]
    return sample_window(values, (0, 0), spacing_um, slide, SUPERSAMPLE)[0].double().numpy()


def pooled_both(
    measured: MeasuredOverview, stain: StainOverview, slide: torch.Tensor, candidates: Candidates
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Footprint means (F, ny nx) of the features as they are, and with the candidates repaired."""
    pitch, spacing = float(np.mean(measured.grid.pitch_um)), stain.spacing_um
    candidate = candidates.labels > 0
    hides = [n + 1 for n, kind in enumerate(candidates.kinds) if kind != "fold"]
    gap = np.isin(candidates.labels, hides)
    clear = (stain.planes[6] > 250) & ~candidate
    block = max(1, int(pitch / 4 / max(spacing) + 1e-6))
    sigmas = [[s * pitch / (block * u) for u in spacing] for s in INPAINTING_PITCH]

    def convolved(image: NDArray[np.float32]) -> NDArray[np.float32]:
        coarse = _blocks(image * clear, block)
        return np.sum([1e-4**k * gaussian_filter(coarse, s, truncate=3) for k, s in enumerate(sigmas)], 0)

    total = np.maximum(convolved(np.ones(clear.shape, np.float32)), 1e-14)
    unfolded = _unfolded(stain, candidates.denser)
    features = stain.features().numpy()
    kept, repaired = [], []
    for c in LINEAR:
        feature = features[..., c]
        guess = np.repeat(np.repeat(convolved(feature) / total, block, 0), block, 1)[: clear.shape[0], : clear.shape[1]]
        kept.append(pool(feature, spacing, slide).ravel())
        repaired.append(pool(np.where(gap, guess, unfolded[..., c]), spacing, slide).ravel())
    return np.stack(kept), np.stack(repaired)


def _unfolded(stain: StainOverview, denser: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features (h, w, F) of the overview with the density of its bands divided by so much."""
    white = np.asarray(stain.reference.white, np.float32) + 1
    rgb = np.moveaxis(stain.planes[:3], 0, -1).astype(np.float32) + 1
    rgb = white * np.minimum(rgb / white, 1) ** (1 / denser[..., None]) - 1
    planes = base_planes(rgb, stain.planes[6] / 255, 1, stain.reference)
    return replace(stain, planes=planes).features().numpy()


def _blocks(image: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    h, w = (-(-n // block) * block for n in image.shape)
    padded = np.pad(image, ((0, h - image.shape[0]), (0, w - image.shape[1])))
    return padded.reshape(h // block, block, w // block, block).mean((1, 3))


def touched(
    labels: NDArray[np.int32], spacing_um: tuple[float, float], slide: torch.Tensor, mask: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Measured pixel (flat), number of the part on it, and the share that it covers: one row for each such pair."""
    ny, nx, s = *mask.shape, SUPERSAMPLE
    at = np.floor(slide.numpy() / np.asarray(spacing_um)).astype(np.int64)
    on = ((at >= 0) & (at < labels.shape)).all(-1)
    at = np.clip(at, 0, np.array(labels.shape) - 1)
    seen = np.where(on, labels[at[..., 0], at[..., 1]], 0).astype(np.int64)
    pixel = np.arange(ny * nx).reshape(ny, nx).repeat(s, 0).repeat(s, 1)
    some = (seen > 0) & mask.repeat(s, 0).repeat(s, 1)
    most = int(labels.max()) + 1
    pairs, counts = np.unique(pixel[some] * most + seen[some], return_counts=True)
    return pairs // most, pairs % most - 1, counts / s**2
