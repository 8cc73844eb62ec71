"""Features and their smoothing: what one octave teaches has to hold in the next."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from deepfere import cores
from deepfere.alignment.score import spatial_blocks
from deepfere.measured.operator import cell_means
from deepfere.model import transfer
from deepfere.model.features import FEATURES
from deepfere.model.ridge import FEATURE_SETS, detail_rows, fit_average, fit_ridge, target_rows
from deepfere.model.transfer import (
    LEAST_PX,
    SMOOTHINGS_PITCH,
    choose_smoothing,
    common_gain,
    crossing,
    gain_and_r2,
    moments,
    octave_rows,
    transferred,
)

FACTOR = 8
SHAPE = (40, 36)


def section(blur_pitch, shape=SHAPE, seed=0, noise=0.05, shift_pitch=0.0):
    """Sharp stain features, and two factors that follow them blurred (and misplaced) by so many measured pixels."""
    rng = np.random.default_rng(seed)
    fine = [n * FACTOR for n in shape]
    raw = sum(gaussian_filter(rng.standard_normal((len(FEATURES), *fine)), (0, s, s)) * s for s in (2, 6, 16))
    blurred = gaussian_filter(raw, (0, blur_pitch * FACTOR, blur_pitch * FACTOR))
    blurred = np.roll(blurred, round(shift_pitch * FACTOR), axis=1)
    images = np.stack([blurred[0] - 0.5 * blurred[1], blurred[2] + blurred[8]])
    images = cell_means(images, FACTOR)
    images /= images.std((1, 2), keepdims=True)
    images += noise * rng.standard_normal(images.shape)
    pooled = np.stack([cell_means(gaussian_filter(raw, (0, s * FACTOR, s * FACTOR)), FACTOR) for s in SMOOTHINGS_PITCH])
    return pooled, images


def choose(pooled, images, mask=None):
    mask = np.ones(images.shape[1:], bool) if mask is None else mask
    return choose_smoothing(pooled, SMOOTHINGS_PITCH, mask, spatial_blocks(mask), images, np.ones(len(images)))


@pytest.mark.parametrize("blur", [0.25, 0.4, 0.6])
def test_the_smoothing_is_that_of_the_relation(blur):
    choice = choose(*section(blur))
    steps = np.array(SMOOTHINGS_PITCH)
    assert abs(np.argmin(abs(steps - choice.smoothing_pitch)) - np.argmin(abs(steps - blur))) <= 1
    assert choice.gain == pytest.approx(1.0, abs=0.15)
    assert choice.transferred_r2 > 0.3


def test_a_misplaced_stain_is_smoothed_more():
    right, wrong = choose(*section(0.2)), choose(*section(0.2, shift_pitch=0.5))
    assert wrong.smoothing_pitch > right.smoothing_pitch
    assert wrong.transferred_r2 < right.transferred_r2


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_do_not_change_the_choice(monkeypatch, threads):
    pooled, images = section(0.4)
    with cores.limited(1):
        one = choose(pooled, images)
    monkeypatch.setattr(cores, "usable_cores", lambda: threads)
    assert choose(pooled, images) == one


def test_few_pixels_get_the_default():
    pooled, images = section(0.4)
    mask = np.zeros(SHAPE, bool)
    mask[:14, :14] = True
    assert mask.sum() < LEAST_PX
    choice = choose(pooled, images, mask)
    assert choice.smoothing_pitch == 0.25
    assert np.isnan(choice.gain)


def test_the_average_is_the_mean_of_its_fits():
    pooled, images = section(0.25)
    mask = np.ones(SHAPE, bool)
    rows, targets = detail_rows(pooled[1], mask, spatial_blocks(mask), 2), target_rows(images, mask, 2)
    average = fit_average(rows, targets)
    fits = [fit_ridge(rows, targets, used) for used in FEATURE_SETS.values()]
    np.testing.assert_allclose(average.weights, np.mean([f.weights for f in fits], axis=0))
    np.testing.assert_allclose(average.predicted, np.mean([f.predicted for f in fits], axis=0))
    # A feature that only the larger sets hold counts, but less.
    nuclear = FEATURES.index("nuclear")
    assert not fits[0].weights[nuclear].any()
    assert abs(average.weights[nuclear, 1]) > 0.2 * abs(fits[-1].weights[nuclear, 1])


def test_sets_grow():
    sets = list(FEATURE_SETS.values())
    for few, many in itertools.pairwise(sets):
        assert set(few) < set(many)
    assert sets[-1] == tuple(range(len(FEATURES)))


@pytest.mark.parametrize("block", [1, 2])
def test_octaves_are_average_then_detail(block):
    rng = np.random.default_rng(1)
    features, images = rng.standard_normal((3, 17, 19)), rng.standard_normal((2, 17, 19))
    mask = np.ones((17, 19), bool)
    stain, target, blocks = octave_rows(features, images, mask, spatial_blocks(mask), block)
    assert len(stain) == len(target) == len(blocks)
    # Detail has no mean over the pixels that were averaged, in any phase.
    groups = stain.reshape(-1, 3)
    assert abs(groups.mean(0)).max() < 0.05
    assert len(stain) >= 0.6 * block**2 * 4 * (17 // block) * (19 // block)


def test_a_linear_relation_transfers_whole():
    rng = np.random.default_rng(2)
    x, fine = rng.standard_normal((400, 3)), rng.standard_normal((300, 3))
    weights = np.array([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])
    coarse, finer = (x, x @ weights, np.arange(400) % 8), (fine, 0.5 * fine @ weights, np.arange(300) % 8)
    gain, r2 = gain_and_r2(moments(finer[1], transferred(coarse, finer, (0, 1, 2))))
    np.testing.assert_allclose(gain, 0.5, rtol=1e-2)
    # Predicting twice the truth leaves as much as there was.
    np.testing.assert_allclose(r2, 0.0, atol=0.02)
    # A feature that may not be used predicts nothing.
    assert gain_and_r2(moments(finer[1], transferred(coarse, finer, (0,))))[1][1] < 0.05


@pytest.mark.parametrize(
    ("gains", "expected"),
    [([1.2, 1.3, 1.4], 0.2), ([0.5, 0.6, 0.7], 0.4), ([0.8, 1.2, 1.1], 0.25), ([0.8, 0.7, 1.0], 0.4)],
)
def test_crossing(gains, expected):
    assert crossing(np.array([0.2, 0.3, 0.4]), np.array(gains)) == pytest.approx(expected)


def test_the_error_of_a_gain_is_that_of_many_draws():
    """Blocks whose gain differs, as where the alignment is not everywhere as good."""
    rng = np.random.default_rng(4)

    def drawn():
        predicted = rng.standard_normal((16, 40, 3))
        truth = predicted * rng.normal(0.9, 0.2, (16, 1, 1)) + 0.5 * rng.standard_normal((16, 40, 3))
        return common_gain(truth.reshape(-1, 3), predicted.reshape(-1, 3), np.repeat(np.arange(16), 40), np.ones(3))

    gains, errors, r2 = zip(*[drawn() for _ in range(300)], strict=True)
    assert np.mean(gains) == pytest.approx(0.9, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.15)
    assert 0.5 < np.mean(r2) < 0.9


def test_a_single_block_and_a_silent_stain_have_no_error():
    truth = np.random.default_rng(5).standard_normal((50, 2))
    gain, error, _ = common_gain(truth, 0.5 * truth, np.zeros(50, int), np.ones(2))
    assert gain == pytest.approx(2.0) and error == 0.0
    assert common_gain(truth, np.zeros_like(truth), np.arange(50) // 5, np.ones(2)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("error", "expected"), [(0.0, 0.4), (0.06, 0.25), (0.015, 0.3), (5.0, 0.2)])
def test_a_gain_is_held_against_the_stain_beyond_its_error_alone(monkeypatch, error, expected):
    gains = dict(zip(SMOOTHINGS_PITCH, (0.91, 0.945, 0.98, 1.0, 1.1, 1.2, 1.3), strict=True))
    asked = iter(SMOOTHINGS_PITCH)
    monkeypatch.setattr(transfer, "common_gain", lambda *_: (gains[next(asked)], error, 0.4))
    with cores.limited(1):
        assert choose(*section(0.4)).smoothing_pitch == expected
