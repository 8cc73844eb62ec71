"""What others do with a measurement, and with a registered stain: the baselines of the fidelity benchmark.

Pure functions from images to images. Those with a stain get the alignment and the features that deepfere found, so
that only the fusion differs, and choose their settings from the measurement alone: no truth comes in here.

Images are (M, ny, nx) measured and (M, ny f, nx f) reconstructed, float64, without holes (unmeasured pixels take
their nearest measured one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from deepfere.alignment.score import spatial_blocks
from deepfere.evaluation.metrics import keys_bicubic
from deepfere.measured.operator import cell_means, upsample

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

AGREES = 1e-6
"""Back-projection ends where every measured pixel is met to this share of the ion's maximum."""
MOST_STEPS = 200
"""Back-projection ends here at the latest."""
EPS = 0.01
"""Guided filter: variance of the guide, as a share of its variance over the section, below which it counts as flat.
Stated beforehand: a tenth of the guide's standard deviation, in the middle of the values that its authors show.
"""
PENALTIES = tuple(float(10.0**n) for n in np.arange(2.0, -5.0, -0.5))
"""Ridge penalties tried, as shares of the number of rows, on features of unit variance; from the strongest on."""


@dataclass(frozen=True)
class Seen:
    """What a method may see of a case.

    Attributes:
        cells: (M, ny, nx) measured ions, holes filled.
        factor: f.
        features: (F, ny f, nx f) stain features at the alignment found; the first three are optical densities.
        covered: (ny, nx) measured pixels that the slide shows completely.
    """

    cells: Array
    factor: int
    features: Array
    covered: Mask


def repeat(cells: NDArray, factor: int) -> NDArray:
    """(..., ny, nx) on the high-resolution grid, every pixel repeated."""
    return np.repeat(np.repeat(cells, factor, -2), factor, -1)


# Without the stain.


def nearest(cells: Array, factor: int) -> Array:
    """The measurement as it is: every high-resolution pixel has the value of its measured one."""
    return repeat(cells, factor)


def bicubic(cells: Array, factor: int) -> Array:
    """Keys, IEEE Trans. Acoust. Speech Signal Process. 29, 1153 (1981): a = -1/2, half-pixel centres."""
    return np.stack([keys_bicubic(image, factor) for image in cells])


def opencv_cubic(cells: Array, factor: int) -> Array:
    """OpenCV's INTER_CUBIC (a = -3/4, half-pixel centres, edge replicated)."""
    import cv2

    size = (cells.shape[2] * factor, cells.shape[1] * factor)
    return np.stack([np.asarray(cv2.resize(c, size, interpolation=cv2.INTER_CUBIC), np.float64) for c in cells])


def exact(cells: Array, factor: int) -> Array:
    """P: the quadratic spline whose means over the measured pixels are the measurement.

    Histopolation: de Boor, A Practical Guide to Splines, 1978, ch. VIII. "No-guide" is the same, kept positive.
    """
    return upsample(cells, factor)


def back_projected(cells: Array, factor: int, tolerance: float = AGREES, most: int = MOST_STEPS) -> Array:
    """Bicubic interpolation, corrected by the interpolated residual until it agrees with the measurement.

    Irani and Peleg, CVGIP: Graphical Models and Image Processing 53, 231 (1991), with the footprint mean as the
    imaging process and bicubic interpolation as the back-projection.

    Args:
        cells: Measured ions.
        factor: f.
        tolerance: Largest residual left, as a share of the ion's largest value.
        most: Steps at most.
    """
    out = bicubic(cells, factor)
    largest = np.abs(cells).max((-2, -1))
    for _ in range(most):
        residual = cells - cell_means(out, factor)
        off = np.abs(residual).max((-2, -1)) > tolerance * largest
        if not off.any():
            break
        out[off] += bicubic(residual[off], factor)
    return out


# With the stain.


def guided_filter(images: Array, guides: Array, radius: int, eps: float, weight: Array | None = None) -> Array:
    """He, Sun and Tang, IEEE Trans. Pattern Anal. Mach. Intell. 35, 1397 (2013), with a guide of several channels.

    In every window each image is regressed on the guides; a pixel takes the mean of the predictions of all windows
    that hold it.

    Args:
        images: (M, H, W).
        guides: (C, H, W).
        radius: Windows are 2 radius + 1 wide; at the edge, what lies inside counts.
        eps: Penalty on the slopes: guides that vary by less than this (squared) count as flat.
        weight: (H, W) 1 where a pixel counts, 0 where not: there the images stay as they are. All by default.
    """
    counts = np.ones(guides.shape[1:]) if weight is None else np.asarray(weight, np.float64)
    side = 2 * radius + 1
    norm = uniform_filter(counts, side, mode="constant")
    # Running sums leave rounding where no pixel counts.
    norm = np.where(norm > 0.5 / side**2, norm, np.inf)

    def means(values: Array) -> Array:
        summed = uniform_filter(values * counts, (0,) * (values.ndim - 2) + (side, side), mode="constant")
        return summed / norm

    guide_mean, image_mean = means(guides), means(images)
    cov = means(guides[:, None] * guides[None]) - guide_mean[:, None] * guide_mean[None]
    cov = np.moveaxis(cov, (0, 1), (-2, -1)) + eps * np.eye(len(guides))
    out = np.empty_like(images)
    for m, image in enumerate(images):
        cross = means(guides * image) - guide_mean * image_mean[m]
        slopes = np.moveaxis(np.linalg.solve(cov, np.moveaxis(cross, 0, -1)[..., None])[..., 0], -1, 0)
        offset = image_mean[m] - (slopes * guide_mean).sum(0)
        out[m] = (means(slopes) * guides).sum(0) + means(offset)
    return np.where(counts > 0, out, images)


def guided(seen: Seen) -> Array:
    """Bicubic interpolation, guided-filtered by the stain's optical densities; windows reach one measured pixel."""
    inside = repeat(seen.covered, seen.factor)
    image = bicubic(seen.cells, seen.factor)
    if not inside.any():
        return image
    densities = seen.features[:3] - seen.features[:3, inside].mean(1)[:, None, None]
    spread = densities[:, inside].std(1)
    scaled = densities / np.where(spread > 0, spread, 1.0)[:, None, None]
    return guided_filter(image, scaled, seen.factor, EPS, inside.astype(np.float64))


def consistent_guided(seen: Seen) -> Array:
    """The guided filter's image, averaging back to the measurement."""
    return consistent(guided(seen), seen.cells, seen.factor)


Regression = Callable[[Array, Array], Array]
"""From centred, scaled features (N, F) and ions (N, M) to weights (S, F, M) for every setting, the simplest first."""


def ridge_path(x: Array, y: Array) -> Array:
    """Ridge weights (S, F, M) for all `PENALTIES` (Hoerl and Kennard, Technometrics 12, 55, 1970)."""
    gram, cross, eye = x.T @ x, x.T @ y, np.eye(x.shape[1])
    return np.stack([np.linalg.solve(gram + penalty * len(x) * eye, cross) for penalty in PENALTIES])


def pls_path(x: Array, y: Array) -> Array:
    """Weights (F + 1, F, M) of partial least squares with 0 to F components, for all ions together.

    SIMPLS: de Jong, Chemometrics and Intelligent Laboratory Systems 18, 251 (1993). Where the features have fewer
    dimensions, or no more is to be explained, the last weights are repeated.
    """
    count = x.shape[1]
    out = np.zeros((count + 1, count, y.shape[1]))
    cross = x.T @ y
    first = np.linalg.norm(cross)
    basis = np.zeros((count, 0))
    for n in range(count):
        out[n + 1] = out[n]
        if np.linalg.norm(cross) <= 1e-10 * first:
            continue
        direction = np.linalg.svd(cross, full_matrices=False)[0][:, 0]
        score = x @ direction
        length = np.linalg.norm(score)
        if length <= 1e-10 * np.linalg.norm(x):
            continue
        score, direction = score / length, direction / length
        loading = x.T @ score
        fresh = loading - basis @ (basis.T @ loading)
        # Once more: rounding would let earlier components back in.
        fresh -= basis @ (basis.T @ fresh)
        fresh /= np.linalg.norm(fresh)
        basis = np.column_stack([basis, fresh])
        cross = cross - np.outer(fresh, fresh @ cross)
        out[n + 1] += np.outer(direction, score @ y)
    return out


@dataclass(frozen=True)
class Linear:
    """``ions = offset + features @ weights``: weights (F, M), offset (M,)."""

    weights: Array
    offset: Array


def _scaled(regression: Regression, x: Array, y: Array) -> tuple[Array, Array]:
    """Weights (S, F, M) and offsets (S, M) in the units of the data: features and ions are scaled by their s.d."""
    means, targets = x.mean(0), y.mean(0)
    # What is constant has no spread: it gets no weight, and no prediction but its mean.
    sd_x = np.where(np.ptp(x, axis=0) > 1e-9 * np.abs(x).max(0), x.std(0), np.inf)
    sd_y = np.where(np.ptp(y, axis=0) > 1e-9 * np.abs(y).max(0), y.std(0), 1.0)
    weights = regression((x - means) / sd_x, (y - targets) / sd_y) * sd_y / sd_x[:, None]
    return weights, targets - means @ weights


def fit_linear(regression: Regression, x: Array, y: Array, blocks: NDArray[np.int64]) -> Linear:
    """The setting of every ion by spatial blocks left out, then the fit on all rows.

    Args:
        regression: `ridge_path` or `pls_path`.
        x: (N, F) features of the measured pixels.
        y: (N, M) ions.
        blocks: (N,) block numbers.
    """
    weights, offsets = _scaled(regression, x, y)
    errors = np.zeros(offsets.shape)
    for block in np.unique(blocks):
        left_out = blocks == block
        if left_out.all():
            break
        w, b = _scaled(regression, x[~left_out], y[~left_out])
        errors += ((y[left_out] - (x[left_out] @ w + b[:, None])) ** 2).sum(1)
    best, ions = errors.argmin(0), np.arange(y.shape[1])
    return Linear(weights[best, :, ions].T, offsets[best, ions])


def predicted(seen: Seen, regression: Regression) -> Array:
    """Regression of the ions on the stain at the measured scale, applied at high resolution as it is.

    What most published regressions of MSI on microscopy return (Van de Plas, Yang, Spraggins and Caprioli, Nat.
    Methods 12, 366, 2015, with PLS). Where the slide shows nothing: P.
    """
    pooled = cell_means(seen.features, seen.factor)
    plain = exact(seen.cells, seen.factor)
    inside = seen.covered
    if inside.sum() < 2:
        return plain
    fit = fit_linear(regression, pooled[:, inside].T, seen.cells[:, inside].T, spatial_blocks(inside)[inside])
    image = np.tensordot(fit.weights.T, seen.features, axes=1) + fit.offset[:, None, None]
    return np.where(repeat(inside, seen.factor), image, plain)


def consistent(image: Array, cells: Array, factor: int) -> Array:
    """An estimate with P of what it leaves of the measurement: ``P y + (I - P A) estimate``."""
    return image + exact(cells - cell_means(image, factor), factor)


def ridge(seen: Seen) -> Array:
    """Ridge, not returned to the measurement."""
    return predicted(seen, ridge_path)


def pls(seen: Seen) -> Array:
    """Partial least squares, not returned to the measurement."""
    return predicted(seen, pls_path)


def consistent_ridge(seen: Seen) -> Array:
    """Ridge that averages back to the measurement."""
    return consistent(ridge(seen), seen.cells, seen.factor)


def consistent_pls(seen: Seen) -> Array:
    """Partial least squares that averages back to the measurement."""
    return consistent(pls(seen), seen.cells, seen.factor)
