"""Scores of a reconstruction against a truth, and the plain baselines they are set against.

Everything is computed in float64. Images are (ny, nx); a mask is boolean, True where a pixel counts;
without a mask the pixels where both images are finite count. A score that is undefined (no pixel, no
variance) is NaN, never a guess.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from deepfere.errors import InputError

Image = NDArray[np.float64]
Mask = NDArray[np.bool_]

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def _pair(truth: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None) -> tuple[Image, Image, Mask]:
    """Both images in float64 and the pixels that count.

    Raises:
        InputError: Shapes differ, or the truth is not finite inside the mask.
    """
    t, e = np.asarray(truth, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    if t.shape != e.shape:
        raise InputError(f"truth {t.shape} and estimate {e.shape} differ in shape", remedy="crop to one grid")
    if mask is None:
        return t, e, np.isfinite(t) & np.isfinite(e)
    inside = np.asarray(mask, dtype=bool)
    if inside.shape != t.shape:
        raise InputError(f"mask {inside.shape} and images {t.shape} differ in shape", remedy="crop to one grid")
    if not np.isfinite(t[inside]).all():
        raise InputError("the truth is not finite inside the mask", remedy="leave unmeasured pixels out of the mask")
    return t, e, inside


def rmse(truth: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Root of the mean squared error over the mask; NaN where the estimate has a hole in it."""
    t, e, inside = _pair(truth, estimate, mask)
    if not inside.any():
        return float("nan")
    return float(np.sqrt(np.mean((t[inside] - e[inside]) ** 2)))


def psnr(truth: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None = None, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio, ``10 log10(peak^2 / MSE)``, dB; infinite for equal images.

    Args:
        truth: (ny, nx) or any shape.
        estimate: Same shape.
        mask: Same shape, True where a pixel counts.
        peak: The range of values; by default the truth's own, maximum minus minimum over the mask.
    """
    t, _, inside = _pair(truth, estimate, mask)
    error = rmse(truth, estimate, inside)
    if not inside.any() or np.isnan(error):
        return float("nan")
    top = float(np.ptp(t[inside])) if peak is None else float(peak)
    if top <= 0:
        return float("nan")
    return float("inf") if error == 0 else float(20.0 * np.log10(top / error))


def pearson(truth: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Pearson correlation over the mask; NaN if either image is constant there."""
    t, e, inside = _pair(truth, estimate, mask)
    if np.count_nonzero(inside) < 2:
        return float("nan")
    a, b = t[inside] - t[inside].mean(), e[inside] - e[inside].mean()
    # Rounding alone gives a constant image a variance of about (eps * level)^2.
    eps = 1e-13 * max(np.abs(t[inside]).max(), 1e-300), 1e-13 * max(np.abs(e[inside]).max(), 1e-300)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not norms[0] > eps[0] * np.sqrt(a.size) or not norms[1] > eps[1] * np.sqrt(b.size):
        return float("nan")
    return float(np.clip((a / norms[0]) @ (b / norms[1]), -1.0, 1.0))


def ssim(truth: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None = None, peak: float | None = None) -> float:
    """Structural similarity, averaged over the mask.

    Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang, Bovik, Sheikh and
    Simoncelli, IEEE Trans. Image Process. 13, 2004, 600). Pixels outside the mask or the image take no
    part: the window's weights are renormalised over those inside.

    Args:
        truth: (ny, nx).
        estimate: (ny, nx).
        mask: (ny, nx), True where a pixel counts.
        peak: The range of values; by default the truth's own, maximum minus minimum over the mask.
    """
    t, e, inside = _pair(truth, estimate, mask)
    if t.ndim != 2:
        raise InputError(f"SSIM is defined on 2-D images, not {t.ndim}-D", remedy="pass one ion at a time")
    if not inside.any() or not np.isfinite(e[inside]).all():
        return float("nan")
    top = float(np.ptp(t[inside])) if peak is None else float(peak)
    if top <= 0:
        return float("nan")

    def window(values: Image) -> Image:
        return ndimage.gaussian_filter(values, SSIM_SIGMA, mode="constant", radius=SSIM_WINDOW // 2)

    weight = np.where(inside, window(inside.astype(np.float64)), 1.0)
    # Variances are taken about the global mean, so that a large offset does not cancel them.
    shift = float(t[inside].mean())
    a, b = np.where(inside, t - shift, 0.0), np.where(inside, e - shift, 0.0)
    mean_a, mean_b = window(a) / weight, window(b) / weight
    var_a = window(a * a) / weight - mean_a**2
    var_b = window(b * b) / weight - mean_b**2
    cov = window(a * b) / weight - mean_a * mean_b
    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    mean_a, mean_b = mean_a + shift, mean_b + shift
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    score /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float(score[inside].mean())


def _spectra(
    truth: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The (M, N) spectra of the N pixels that count, of two (M, ...) cubes."""
    t, e = np.asarray(truth, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    if t.shape != e.shape or t.ndim < 2:
        raise InputError(
            f"truth {t.shape} and estimate {e.shape} are not two cubes of one shape",
            remedy="pass (ions, y, x) cubes on one grid",
        )
    flat_t, flat_e = t.reshape(len(t), -1), e.reshape(len(e), -1)
    if mask is None:
        inside = (np.isfinite(flat_t) & np.isfinite(flat_e)).all(axis=0)
    else:
        inside = np.asarray(mask, dtype=bool).reshape(-1)
        if inside.size != flat_t.shape[1]:
            raise InputError(f"mask of {inside.size} pixels for cubes of {flat_t.shape[1]}", remedy="crop to one grid")
    return flat_t[:, inside], flat_e[:, inside]


def sam_deg(truth: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Spectral angle, degrees: the mean over pixels of ``arccos(<s, t> / |s| |t|)``.

    Pixels whose spectrum is all zero in either cube have no angle and are left out.

    Args:
        truth: (M, ...) cube, ions first.
        estimate: Same shape.
        mask: The cube's shape without its first axis, True where a pixel counts.
    """
    t, e = _spectra(truth, estimate, mask)
    norm_t, norm_e = np.linalg.norm(t, axis=0), np.linalg.norm(e, axis=0)
    valid = (norm_t > 0) & (norm_e > 0)
    if not valid.any():
        return float("nan")
    u, v = t[:, valid] / norm_t[valid], e[:, valid] / norm_e[valid]
    # 2 atan2(|u - v|, |u + v|) is the same angle as arccos(u . v), exact near zero where arccos is not.
    angle = 2.0 * np.arctan2(np.linalg.norm(u - v, axis=0), np.linalg.norm(u + v, axis=0))
    return float(np.degrees(angle).mean())


def ergas(truth: ArrayLike, estimate: ArrayLike, ratio: float, mask: ArrayLike | None = None) -> float:
    """ERGAS, ``(100 / ratio) sqrt(mean_m (RMSE_m / mean_m)^2)`` (Wald 2000); 0 is perfect.

    Ions whose true mean is zero have no relative error and are left out.

    Args:
        truth: (M, ...) cube, ions first.
        estimate: Same shape.
        ratio: Coarse pixel over fine pixel, 4 for a fourfold reconstruction.
        mask: The cube's shape without its first axis, True where a pixel counts.
    """
    t, e = _spectra(truth, estimate, mask)
    if not t.shape[1]:
        return float("nan")
    errors, means = np.sqrt(np.mean((t - e) ** 2, axis=1)), t.mean(axis=1)
    valid = means != 0
    if not valid.any():
        return float("nan")
    return float(100.0 / ratio * np.sqrt(np.mean((errors[valid] / means[valid]) ** 2)))


def _block_means(values: NDArray, ratio: int) -> Image:
    """Float64 means over ratio x ratio blocks of the last two axes; sides are multiples of ratio."""
    *lead, h, w = values.shape
    blocks = values.reshape(*lead, h // ratio, ratio, w // ratio, ratio)
    return blocks.mean(axis=(-3, -1), dtype=np.float64)


def consistency(estimate: ArrayLike, measured: ArrayLike, factor: int, mask: ArrayLike | None = None) -> float:
    """How far an ion's reconstruction contradicts its measurement: ``max |A s - y| / max |y|``.

    A averages over the footprint of each measured pixel, in float64.

    Args:
        estimate: s, (ny * factor, nx * factor).
        measured: y, (ny, nx).
        factor: High-resolution pixels along a measured pixel.
        mask: (ny, nx), True where measured; by default where y is finite.

    Returns:
        0 for exact agreement; infinite if s has a hole inside a measured pixel, or is not zero where y
        is zero everywhere; NaN if nothing was measured.

    Raises:
        InputError: The shapes do not belong together.
    """
    s, y = np.asarray(estimate), np.asarray(measured, dtype=np.float64)
    if s.ndim != 2 or s.shape != (y.shape[0] * factor, y.shape[1] * factor):
        raise InputError(
            f"a reconstruction of {s.shape} pixels does not refine {y.shape} by {factor}",
            remedy="pass the full level 0 image and its factor",
        )
    inside = np.isfinite(y) if mask is None else np.asarray(mask, dtype=bool)
    if not inside.any():
        return float("nan")
    error = np.abs(_block_means(s, factor)[inside] - y[inside])
    if not np.isfinite(error).all():
        return float("inf")
    largest, scale = float(error.max()), float(np.abs(y[inside]).max())
    if scale == 0:
        return 0.0 if largest == 0 else float("inf")
    return largest / scale


def degrade(
    cube: ArrayLike, mask: ArrayLike | None = None, ratio: int = 2
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What an instrument with pixels ``ratio`` times larger would have measured (Wald's protocol).

    A coarse pixel is measured only if all its ratio x ratio fine pixels are; the others are NaN. Rows and
    columns beyond the last complete block are cropped.

    Args:
        cube: (..., ny, nx).
        mask: (ny, nx), True where measured; by default where every image is finite.
        ratio: Integer of at least 1.

    Returns:
        The coarse cube, (..., ny // ratio, nx // ratio) float64, and its mask.

    Raises:
        InputError: The grid is smaller than one coarse pixel, or the ratio is not a positive integer.
    """
    values = np.asarray(cube)
    *lead, ny, nx = values.shape
    if int(ratio) != ratio or ratio < 1:
        raise InputError(f"cannot degrade by {ratio}", remedy="give a whole number of at least 1")
    if ny < ratio or nx < ratio:
        raise InputError(f"{ny} x {nx} pixels cannot be degraded by {ratio}", remedy="give a smaller ratio")
    inside = np.isfinite(values).all(axis=tuple(range(len(lead)))) if mask is None else np.asarray(mask, bool)
    if inside.shape != (ny, nx):
        raise InputError(f"mask {inside.shape} does not fit {ny} x {nx} pixels", remedy="pass one grid")
    ratio = int(ratio)
    h, w = ny // ratio * ratio, nx // ratio * ratio
    blocks = inside[:h, :w].reshape(h // ratio, ratio, w // ratio, ratio)
    kept = np.asarray(blocks.all(axis=(1, 3)), dtype=np.bool_)
    coarse = _block_means(values[..., :h, :w], ratio)
    return np.where(kept, coarse, np.nan), kept


def keys_weights(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (..., 4) of the samples at -1, 0, 1 and 2 for a point at fraction u in [0, 1).

    Source: Keys, IEEE Trans. Acoust. Speech Signal Process. 29, 1981, 1153, with a = -1/2.
    """
    a = -0.5

    def near(d: NDArray[np.float64]) -> NDArray[np.float64]:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1

    def far(d: NDArray[np.float64]) -> NDArray[np.float64]:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    return np.stack([far(1 + u), near(u), near(1 - u), far(2 - u)], axis=-1)


def _keys_rows(image: Image, factor: int) -> Image:
    """The rows of an image interpolated to ``factor`` times as many."""
    n = image.shape[0]
    at = (np.arange(n * factor, dtype=np.float64) + 0.5) / factor - 0.5
    base = np.floor(at).astype(np.int64)
    weights = keys_weights(at - base)
    out = np.zeros((n * factor, image.shape[1]))
    for tap in range(4):
        out += weights[:, tap, None] * image[np.clip(base + tap - 1, 0, n - 1)]
    return out


def fill_nearest(image: ArrayLike, mask: ArrayLike | None = None) -> Image:
    """The image with unmeasured pixels (NaN, or outside the mask) set to their nearest measured one.

    Raises:
        InputError: Nothing was measured.
    """
    values = np.asarray(image, dtype=np.float64)
    hole = ~np.isfinite(values) if mask is None else ~np.asarray(mask, dtype=bool)
    if not hole.any():
        return values
    if hole.all():
        raise InputError("the image has no measured pixel", remedy="leave this ion out")
    nearest = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    return values[tuple(nearest)]


def keys_bicubic(image: ArrayLike, factor: int, mask: ArrayLike | None = None) -> Image:
    """Bicubic upsampling by an integer factor: Keys a = -0.5, half-pixel centres, edge replicated.

    Unmeasured pixels are filled from their nearest measured one first, and are NaN in the output.

    Args:
        image: (ny, nx), NaN = not measured.
        factor: Integer of at least 1.
        mask: (ny, nx), True where measured; by default where the image is finite.

    Returns:
        (ny * factor, nx * factor) float64.

    Raises:
        InputError: The factor is not a positive integer, or nothing was measured.
    """
    if int(factor) != factor or factor < 1:
        raise InputError(f"cannot upsample by {factor}", remedy="give a whole number of at least 1")
    values, factor = np.asarray(image, dtype=np.float64), int(factor)
    inside = np.isfinite(values) if mask is None else np.asarray(mask, dtype=bool)
    filled = fill_nearest(values, inside)
    out = _keys_rows(_keys_rows(filled, factor).T, factor).T
    if not inside.all():
        out[~np.repeat(np.repeat(inside, factor, axis=0), factor, axis=1)] = np.nan
    return np.ascontiguousarray(out)
