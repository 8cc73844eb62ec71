"""Noise-weighted factors: a few images that stand for all ions.

``Y ~ mean + Y_z W^T`` with K columns, from the truncated SVD of the ions divided by their noise. Space
and spectrum commute, so whatever agrees with the measurement for the factors does so for the ions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_PX = 8192
"""Measured pixels that are looked at together."""


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


@dataclass(frozen=True)
class Moments:
    """What factors need to know of a section's ions; of several sections they add up.

    Attributes:
        pixels: Measured pixels.
        mean: (M,) of each ion over them.
        products: (M, M) sum over the pixels of the products of deviations from the mean.
        noise_sd: (M,) noise s.d. of each ion.
    """

    pixels: int
    mean: NDArray[np.float64]
    products: NDArray[np.float64]
    noise_sd: NDArray[np.float64]

    @classmethod
    def of(cls, cube: NDArray[np.floating], mask: NDArray[np.bool_]) -> Moments:
        """Of one section; memory is that of the cube and of a block of pixels.

        Args:
            cube: (M, ny, nx) intensities, values outside the mask ignored.
            mask: (ny, nx) True where measured.
        """
        mean = sum(part.sum(1) for _, part in _blocks(cube, mask)) / max(1, int(mask.sum()))
        products = np.zeros((len(cube), len(cube)))
        for _, part in _blocks(cube, mask):
            part -= np.reshape(mean, (-1, 1))
            products += part @ part.T
        return cls(int(mask.sum()), np.broadcast_to(mean, len(cube)).copy(), products, noise_sd(cube, mask))

    @classmethod
    def sum(cls, parts: Iterable[Moments]) -> Moments:
        """Of sections together, in the order in which they come (Chan, Golub & LeVeque, Am. Stat. 1983, eq. 2.1)."""
        total: Moments | None = None
        for one in parts:
            if total is None:
                total = one
                continue
            pixels = total.pixels + one.pixels
            apart, share = one.mean - total.mean, one.pixels / pixels
            between = total.pixels * share * np.outer(apart, apart)
            noise = np.sqrt((1 - share) * total.noise_sd**2 + share * one.noise_sd**2)
            total = cls(pixels, total.mean + share * apart, total.products + one.products + between, noise)
        if total is None:
            raise ValueError("no sections")
        return total


@dataclass(frozen=True)
class Factoring:
    """How ions become factors: `images` = projection^T (ions - mean).

    Attributes:
        mean: (M,) of each ion.
        projection: (M, K).
        basis: (M, K): W, in intensity per unit factor.
        noise_sd: (M,) noise s.d. of each ion used for weighting.
        explained: (M,) share of each ion's variance that the factors carry, in [0, 1].
    """

    mean: NDArray[np.float64]
    projection: NDArray[np.float64]
    basis: NDArray[np.float64]
    noise_sd: NDArray[np.float64]
    explained: NDArray[np.float64]

    @classmethod
    def of(cls, moments: Moments, max_factors: int) -> Factoring:
        """Noise-weighted truncated SVD, from the eigenvectors of the weighted products.

        Args:
            moments: Of all sections together.
            max_factors: Upper bound of K; also bounded by M and a tenth of the measured pixels.
        """
        pixels, ions, sd = moments.pixels, len(moments.mean), moments.noise_sd
        variance = np.diag(moments.products) / pixels
        # What a constant ion varies by is rounding.
        varies = variance > (1e-12 * np.abs(moments.mean)) ** 2
        weight = 1.0 / np.where(varies, np.maximum(sd, np.maximum(1e-3 * np.sqrt(variance), 1e-30)), np.inf)
        count = max(1, min(max_factors, ions, pixels // 10))
        values, vectors = np.linalg.eigh(weight[:, None] * moments.products * weight)
        order = np.argsort(values)[::-1][:count]
        keep = order[values[order] > 1e-12 * max(values.max(), 1e-300)]
        if len(keep) == 0:
            keep = order[:1]
        vectors = vectors[:, keep]
        vectors = vectors * np.where(vectors[np.abs(vectors).argmax(0), np.arange(len(keep))] < 0, -1.0, 1.0)
        scale = np.sqrt(np.maximum(values[keep], 0.0) / pixels)
        projection = weight[:, None] * vectors / np.where(scale > 0, scale, 1.0)
        # Factors are uncorrelated and of unit variance: loadings by least squares are covariances with them.
        basis = moments.products @ projection / pixels
        explained = np.where(varies, (basis**2).sum(1) / np.where(varies, variance, 1.0), 0.0)
        return cls(moments.mean, projection, basis, sd, np.clip(explained, 0.0, 1.0))

    def factors(self, cube: NDArray[np.floating], mask: NDArray[np.bool_]) -> Factors:
        """The factors of one section.

        Args:
            cube: (M, ny, nx) intensities, values outside the mask ignored.
            mask: (ny, nx) True where measured.
        """
        images = np.zeros((self.basis.shape[1], *mask.shape))
        flat = images.reshape(len(images), -1)
        for index, part in _blocks(cube, mask):
            flat[:, index] = self.projection.T @ (part - self.mean[:, None])
        return Factors(images, self.basis, self.noise_sd, self.explained)

    def save(self, path: Any) -> None:
        """Write all arrays to one .npz."""
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Any) -> Factoring:
        """Read what `save` wrote."""
        with np.load(path) as data:
            return cls(**{f.name: data[f.name] for f in fields(cls)})


def _blocks(
    cube: NDArray[np.floating], mask: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Measured pixels, some at a time: their flat indices, and a copy of their ions (M, n)."""
    flat, measured = np.reshape(cube, (len(cube), -1)), np.flatnonzero(mask)
    for start in range(0, len(measured), BLOCK_PX):
        index = measured[start : start + BLOCK_PX]
        yield index, np.asarray(flat[:, index], np.float64)


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
    together = Moments.sum(Moments.of(cube, mask) for cube, mask in zip(cubes, masks, strict=True))
    factoring = Factoring.of(together, max_factors)
    return [factoring.factors(cube, mask) for cube, mask in zip(cubes, masks, strict=True)]


def factor_weight(factors: Factors) -> NDArray[np.float64]:
    """(K,) signal of each factor in units of the noise: root of its summed squared loadings over noise."""
    noise = np.where(factors.noise_sd > 0, factors.noise_sd, np.inf)
    return np.sqrt(((factors.basis / noise[:, None]) ** 2).sum(0)) + 1e-12
