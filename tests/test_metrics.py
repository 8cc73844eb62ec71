"""Metrics against closed forms, hand values and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.evaluation import metrics


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    truth = rng.random((14, 17))
    return truth, truth + 0.1 * rng.standard_normal(truth.shape)


def test_psnr_and_rmse_hand_values():
    truth = np.array([[0.0, 4.0], [2.0, 2.0]])
    estimate = truth + np.array([[1.0, -1.0], [1.0, 1.0]])
    assert metrics.rmse(truth, estimate) == pytest.approx(1.0)
    assert metrics.psnr(truth, estimate) == pytest.approx(20 * math.log10(4.0))
    assert metrics.psnr(truth, estimate, peak=10.0) == pytest.approx(20.0)
    assert metrics.psnr(truth, truth) == math.inf


def test_mask_and_nan_decide_which_pixels_count():
    truth = np.array([[0.0, 1.0], [np.nan, 3.0]])
    estimate = np.array([[0.0, 1.0], [7.0, 5.0]])
    assert metrics.rmse(truth, estimate) == pytest.approx(2 / math.sqrt(3))
    mask = np.array([[True, True], [False, False]])
    assert metrics.rmse(truth, estimate, mask) == 0.0
    # A hole in the estimate where it is judged must not be skipped silently.
    assert math.isnan(metrics.rmse(estimate, truth, np.ones((2, 2), bool)))
    with pytest.raises(InputError, match="not finite inside the mask"):
        metrics.rmse(truth, estimate, np.ones((2, 2), bool))
    with pytest.raises(InputError, match="differ"):
        metrics.rmse(truth, estimate[:1])
    assert math.isnan(metrics.psnr(truth, estimate, np.zeros((2, 2), bool)))


def test_pearson_matches_numpy_and_refuses_constants(pair):
    truth, estimate = pair
    mask = np.random.default_rng(0).random(truth.shape) > 0.3
    expected = np.corrcoef(truth[mask], estimate[mask])[0, 1]
    assert metrics.pearson(truth, estimate, mask) == pytest.approx(expected, abs=1e-12)
    assert metrics.pearson(truth, 3 - 2 * truth) == pytest.approx(-1.0)
    assert math.isnan(metrics.pearson(truth, np.full_like(truth, 0.1)))


def brute_ssim(truth: np.ndarray, estimate: np.ndarray, mask: np.ndarray, peak: float) -> float:
    """Wang 2004 written as loops, with weights renormalised over the mask."""
    offsets = np.arange(-5, 6)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    scores = []
    for i, j in zip(*np.nonzero(mask), strict=True):
        taps = [
            (weight, truth[y, x], estimate[y, x])
            for y, row in zip(offsets + i, kernel, strict=True)
            for x, weight in zip(offsets + j, row, strict=True)
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]
        ]
        w, a, b = np.array(taps).T
        w = w / w.sum()
        ma, mb = w @ a, w @ b
        va, vb, cov = w @ (a - ma) ** 2, w @ (b - mb) ** 2, w @ ((a - ma) * (b - mb))
        c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
        scores.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(scores))


@pytest.mark.parametrize("masked", [False, True])
def test_ssim_matches_the_definition(pair, masked):
    truth, estimate = pair
    mask = np.ones(truth.shape, bool)
    if masked:
        mask[:4, 5:] = False
        truth, estimate = np.where(mask, truth, np.nan), np.where(mask, estimate, 1e6)
    expected = brute_ssim(truth, estimate, mask, 1.0)
    assert metrics.ssim(truth, estimate, mask, peak=1.0) == pytest.approx(expected, abs=1e-10)
    assert 0.5 < expected < 0.99
    assert metrics.ssim(truth, truth, mask, peak=1.0) == pytest.approx(1.0)


def test_sam_hand_values():
    truth = np.array([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 2.0, 0.0]])
    estimate = np.array([[5.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    # Angles 0, 90 and 45 degrees; the last pixel has no direction in the truth.
    assert metrics.sam_deg(truth, estimate) == pytest.approx(45.0)
    assert metrics.sam_deg(truth[:, :2], estimate[:, :2], np.array([True, False])) == 0.0
    assert math.isnan(metrics.sam_deg(np.zeros((2, 3)), np.ones((2, 3))))
    # arccos would round this angle to zero.
    tiny = metrics.sam_deg(np.array([[1.0], [0.0]]), np.array([[1.0], [1e-9]]))
    assert tiny == pytest.approx(math.degrees(1e-9), rel=1e-6)


def test_ergas_hand_value():
    truth = np.array([[[2.0, 2.0]], [[4.0, 4.0]], [[0.0, 0.0]]])
    estimate = truth + np.array([1.0, 1.0, 5.0])[:, None, None]
    # Relative errors 1/2 and 1/4; the ion of mean zero is left out.
    assert metrics.ergas(truth, estimate, 4) == pytest.approx(25 * math.sqrt((0.25 + 0.0625) / 2))
    assert metrics.ergas(truth, truth, 2) == 0.0


def test_consistency_of_exact_block_means_is_zero():
    rng = np.random.default_rng(1)
    s = rng.integers(0, 100, (12, 20)).astype(np.float32)
    y = s.reshape(3, 4, 5, 4).mean((1, 3), dtype=np.float64)
    assert metrics.consistency(s, y, 4) == 0.0
    s[0, 0] += 16.0
    assert metrics.consistency(s, y, 4) == pytest.approx(1.0 / y.max())
    y[0, 0] = np.nan  # not measured: nothing to contradict
    assert metrics.consistency(s, y, 4) == 0.0
    s[11, 19] = np.nan
    assert metrics.consistency(s, y, 4) == math.inf
    with pytest.raises(InputError, match="does not refine"):
        metrics.consistency(s[:-1], y, 4)
    assert metrics.consistency(np.ones((2, 2)), np.zeros((1, 1)), 2) == math.inf
    assert metrics.consistency(np.zeros((2, 2)), np.zeros((1, 1)), 2) == 0.0
    assert math.isnan(metrics.consistency(np.zeros((2, 2)), np.full((1, 1), np.nan), 2))


def test_consistency_averages_in_double_precision():
    # In float32 a sum of 65 536 of these drifts far above 1e-6.
    s = np.full((256, 256), 0.1, dtype=np.float32)
    s[::2] = 16777.0
    y = np.array([[s.astype(np.float64).mean()]])
    assert metrics.consistency(s, y, 256) < 1e-13


def test_degrade_keeps_only_complete_blocks_and_crops():
    cube = np.arange(2 * 5 * 7, dtype=np.float32).reshape(2, 5, 7)
    mask = np.ones((5, 7), bool)
    mask[1, 2] = False
    coarse, kept = metrics.degrade(cube, mask, 2)
    assert coarse.shape == (2, 2, 3) and coarse.dtype == np.float64
    assert kept.tolist() == [[True, False, True], [True, True, True]]
    assert coarse[0, 0, 0] == np.mean([0, 1, 7, 8])
    assert np.isnan(coarse[:, 0, 1]).all()
    holed = np.where(mask, cube, np.nan)
    again, found = metrics.degrade(holed, None, 2)
    np.testing.assert_array_equal(again, coarse)
    np.testing.assert_array_equal(found, kept)
    with pytest.raises(InputError):
        metrics.degrade(cube, mask, 6)
    with pytest.raises(InputError):
        metrics.degrade(cube, mask, 0)


def keys(d: float) -> float:
    d = abs(d)
    if d <= 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_bicubic_of_a_delta_is_the_keys_kernel(factor):
    image = np.zeros((9, 9))
    image[4, 4] = 1.0
    out = metrics.keys_bicubic(image, factor)
    line = np.array([keys((a + 0.5) / factor - 0.5 - 4) for a in range(9 * factor)])
    np.testing.assert_allclose(out, np.outer(line, line), atol=1e-14)


def test_bicubic_reproduces_ramps_inside_and_constants_everywhere():
    y, x = np.mgrid[:8, :10]
    out = metrics.keys_bicubic(3 * y - 2 * x + 1.0, 4)
    fine_y, fine_x = (np.arange(32) + 0.5) / 4 - 0.5, (np.arange(40) + 0.5) / 4 - 0.5
    truth = 3 * fine_y[:, None] - 2 * fine_x[None] + 1
    np.testing.assert_allclose(out[8:-8, 8:-8], truth[8:-8, 8:-8], atol=1e-12)
    assert np.abs(out - truth).max() > 0.1  # the replicated edge bends the ramp
    np.testing.assert_allclose(metrics.keys_bicubic(np.full((1, 3), 2.5), 5), 2.5, atol=1e-14)


def test_bicubic_is_symmetric_and_interpolates():
    image = np.random.default_rng(5).random((7, 6))
    out = metrics.keys_bicubic(image, 3)
    np.testing.assert_allclose(out[::-1, ::-1], metrics.keys_bicubic(image[::-1, ::-1], 3), atol=1e-13)
    np.testing.assert_allclose(out.T, metrics.keys_bicubic(image.T, 3), atol=1e-13)
    # An odd factor samples every measured centre, where the kernel interpolates.
    np.testing.assert_allclose(out[1::3, 1::3], image, atol=1e-13)


def test_bicubic_fills_holes_from_the_nearest_and_leaves_them_unmeasured():
    image = np.tile(np.array([1.0, 1.0, 1.0, np.nan, np.nan, 5.0, 5.0]), (5, 1))
    out = metrics.keys_bicubic(image, 2)
    filled = metrics.keys_bicubic(np.tile(np.array([1.0, 1, 1, 1, 5, 5, 5]), (5, 1)), 2)
    hole = np.zeros(14, bool)
    hole[6:10] = True
    assert np.isnan(out[:, hole]).all()
    np.testing.assert_array_equal(out[:, ~hole], filled[:, ~hole])
    with pytest.raises(InputError, match="no measured pixel"):
        metrics.keys_bicubic(np.full((3, 3), np.nan), 2)
    with pytest.raises(InputError):
        metrics.keys_bicubic(image, 0)
