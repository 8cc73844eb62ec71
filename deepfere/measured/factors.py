"""Noise-weighted factors: a few images that stand for all ions.

``Y ~ mean + Y_z W^T`` with K columns, from the truncated SVD of the ions divided by their noise. Space
and spectrum commute, so whatever agrees with the measurement for the factors does so for the ions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Factors:
    """K factor images of one measured section.

    Attributes:
        images: (K, ny, nx) float64, unit variance over the measured pixels, 0 where not measured.
        basis: (M, K) float64: W, in intensity per unit factor.
        noise_sd: (M,) float64: noise s.d. of each ion used for weighting.
        explained: (M,) share of each ion's variance that the factors carry, in [0, 1].
    """

    images: NDArray[np.float64]
    basis: NDArray[np.float64]
    noise_sd: NDArray[np.float64]
    explained: NDArray[np.float64]


def noise_sd(cube: NDArray[np.floating], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Noise s.d. (M,) of each ion, from differences of neighbouring measured pixels.

    The median absolute second difference along rows and columns sees little of smooth signal; its s.d.
    is sqrt(6) of the noise's (Immerkaer, Comput. Vis. Image Underst. 1996, in one dimension).
    """
    out = np.zeros(len(cube))
    for m, ion in enumerate(cube):
        parts = []
        for axis in (0, 1):
            a, ok = np.moveaxis(np.asarray(ion, np.float64), axis, 0), np.moveaxis(mask, axis, 0)
            if len(a) < 3:
                continue
            second = a[2:] - 2 * a[1:-1] + a[:-2]
            parts.append(second[ok[2:] & ok[1:-1] & ok[:-2]])
        values = np.abs(np.concatenate(parts)) if parts else np.zeros(0)
        if values.size:
            # Sparse ions have a zero median: fall back on the mean (E|x| = 0.798 s.d.).
            out[m] = (np.median(values) / 0.6745 or values.mean() / 0.798) / np.sqrt(6.0)
    return out


def factorise(
    cubes: Sequence[NDArray[np.floating]], masks: Sequence[NDArray[np.bool_]], max_factors: int = 32
) -> list[Factors]:
    """Noise-weighted truncated SVD of the ions of one or more sections that share their m/z axis.

    Args:
        cubes: (M, ny, nx) intensities per section, values outside the mask ignored.
        masks: (ny, nx) per section, True where measured.
        max_factors: Upper bound of K; also bounded by M and a tenth of the measured pixels.

    Returns:
        One `Factors` per section, with one basis for all. Signs are fixed (largest loading positive).
    """
    tables = [np.asarray(cube[:, mask], np.float64).T for cube, mask in zip(cubes, masks, strict=True)]
    table = np.concatenate(tables)
    pixels, ions = table.shape
    centred = table - table.mean(0)
    variance = centred.var(0)
    counts = np.array([mask.sum() for mask in masks], np.float64)
    per_section = np.stack([noise_sd(cube, mask) for cube, mask in zip(cubes, masks, strict=True)])
    sd = np.sqrt((counts[:, None] * per_section**2).sum(0) / counts.sum())
    floor = 1e-3 * np.sqrt(variance)
    weight = 1.0 / np.where(variance > 0, np.maximum(sd, np.maximum(floor, 1e-30)), np.inf)
    count = max(1, min(max_factors, ions, pixels // 10))
    gram = (centred * weight).T @ (centred * weight)
    values, vectors = np.linalg.eigh(gram)
    order = np.argsort(values)[::-1][:count]
    keep = order[values[order] > 1e-12 * max(values.max(), 1e-300)]
    if len(keep) == 0:
        keep = order[:1]
    vectors = vectors[:, keep]
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(0), np.arange(len(keep))] < 0, -1.0, 1.0)
    scores = (centred * weight) @ vectors
    scale = scores.std(0)
    scale[scale == 0] = 1.0
    scores = scores / scale
    # Loadings by least squares on the (uncorrelated) scores.
    basis = centred.T @ scores / np.maximum((scores**2).sum(0), 1e-300)
    residual = (centred - scores @ basis.T).var(0)
    explained = np.where(variance > 0, 1.0 - residual / np.where(variance > 0, variance, 1.0), 0.0)
    out, start = [], 0
    for mask in masks:
        images = np.zeros((len(keep), *mask.shape))
        images[:, mask] = scores[start : start + int(mask.sum())].T
        start += int(mask.sum())
        out.append(Factors(images, basis, sd, np.clip(explained, 0.0, 1.0)))
    return out


def factor_weight(factors: Factors) -> NDArray[np.float64]:
    """(K,) signal of each factor in units of the noise: root of its summed squared loadings over noise."""
    noise = np.where(factors.noise_sd > 0, factors.noise_sd, np.inf)
    return np.sqrt(((factors.basis / noise[:, None]) ** 2).sum(0)) + 1e-12
