"""Features and their smoothing: what one octave teaches has to hold in the next."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from deepfere import cores
from deepfere.alignment.score import spatial_blocks
from deepfere.measured.operator import cell_means
from deepfere.model.features import FEATURES
from deepfere.model.ridge import (
    FEATURE_SETS,
    Chemistry,
    detail_rows,
    fit_average,
    fit_own,
    fit_ridge,
    target_rows,
)
from deepfere.model.transfer import (
    LEAST_PX,
    LEAST_R2,
    MOST_SMOOTHINGS,
    OWN_ERRORS,
    SMOOTHINGS_PITCH,
    SmoothingChoice,
    ahead,
    choose_smoothing,
    common_gain,
    common_smoothing,
    gain_and_r2,
    moments,
    octave_rows,
    own_smoothings,
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


def sums_of(product, power, total):
    return np.array([product, power, total, np.subtract(np.add(total, power), np.multiply(2, product))])


def test_the_common_gain_is_of_what_the_stain_explains():
    sums = sums_of([0.5, 0.0, 0.9], [0.5, 0.1, 1.0], [1.0, 1.0, 1.0])
    gain, r2 = common_gain(sums, np.array([1.0, 1.0, 2.0]))
    told = np.array([0.5, 0.0, 2 * 0.8])
    assert gain == pytest.approx((np.array([1.0, 0.0, 0.9]) * told).sum() / told.sum())
    assert r2 == pytest.approx((0.5 - 0.1 + 2 * 0.8) / 4)
    assert common_gain(sums_of([0.0], [0.0], [1.0]), np.ones(1)) == (0.0, 0.0)


def both(blurs, noise=0.05, seed=0):
    """Factors that follow the same stain, each blurred by its own number of measured pixels."""
    parts = [section(blur, seed=seed, noise=noise) for blur in blurs]
    return parts[0][0], np.stack([images[k] for k, (_, images) in enumerate(parts)])


@pytest.mark.parametrize("blurs", [(0.2, 0.6), (0.6, 0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_factor_has_its_own_smoothing(blurs, seed):
    choice = choose(*both(blurs, seed=seed))
    steps = np.array(SMOOTHINGS_PITCH)
    for own, blur in zip(choice.own_pitch, blurs, strict=True):
        assert abs(np.argmin(abs(steps - own)) - np.argmin(abs(steps - blur))) <= 1


def test_a_factor_that_the_stain_says_nothing_of_takes_the_common_one():
    pooled, images = section(0.4)
    noise = np.random.default_rng(3).standard_normal((1, *SHAPE))
    mask = np.ones(SHAPE, bool)
    weight = np.array([1.0, 1.0, 100.0])
    choice = choose_smoothing(
        pooled, SMOOTHINGS_PITCH, mask, spatial_blocks(mask), np.concatenate([images, noise]), weight
    )
    assert choice.groups(3)[2] == 0


def left_of(r2, spread=0.0, blocks=8):
    """What is left in each of some blocks, that add up to the R2 (S, K) of factors with a total of 1."""
    wave = spread * np.where(np.arange(blocks) % 2, 1.0, -1.0)
    return ((1 - r2)[:, None] + wave[:, None] * np.arange(len(r2))[:, None, None]) / blocks


def test_few_smoothings_are_used_and_those_that_lose_least():
    r2 = np.full((7, 9), 0.3)
    r2[[0, 1, 2, 3, 4, 5, 6, 6, 6], range(9)] += [0.01, 0.02, 0.03, 0.2, 0.02, 0.01, 0.1, 0.1, 0.1]
    own = own_smoothings(left_of(r2), np.ones(9), 0)
    assert set(own) == {0, 3, 6} and len(set(own)) == MOST_SMOOTHINGS
    assert own[3] == 3 and (own[6:] == 6).all()
    # What none of them is better for than the common one keeps that.
    assert (own[[0, 1, 2, 4, 5]] == 0).all()
    # Nor is it taken where blocks do not agree, or where hardly anything is explained.
    assert (own_smoothings(left_of(r2, spread=0.5), np.ones(9), 0) == 0).all()
    r2[:, 8] = LEAST_R2 / 2
    r2[6, 8] = LEAST_R2 * 0.9
    assert own_smoothings(left_of(r2), np.ones(9), 0)[8] == 0
    assert (own_smoothings(left_of(np.full((3, 4), 0.5)), np.ones(4), 1) == 1).all()


def test_no_smoothing_is_taken_that_is_not_ahead_of_the_common_one():
    """Where the best for a factor is not kept, it takes none that is only better by chance."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        left = rng.uniform(0.3, 0.7, (6, 1, 5)) / 8 + 0.03 * rng.standard_normal((6, 8, 5))
        for k, s in enumerate(own_smoothings(left, np.ones(5), 2)):
            assert s == 2 or ahead(left[s, :, k], left[2, :, k], OWN_ERRORS)


def test_of_smoothings_that_cannot_be_told_apart_the_least_is_taken():
    r2 = np.array([0.30, 0.38, 0.40, 0.39])[:, None]
    assert common_smoothing(left_of(r2)[..., 0]) == 2
    assert common_smoothing(left_of(r2, spread=0.06)[..., 0]) == 1
    assert common_smoothing(left_of(r2, spread=0.5)[..., 0]) == 0
    assert common_smoothing(left_of(r2, blocks=1)[..., 0]) == 0


def test_ahead_is_by_the_error_of_the_sum_over_blocks():
    rng = np.random.default_rng(6)
    found = [ahead(np.zeros(16), 0.25 + rng.standard_normal(16)) for _ in range(4000)]
    # The sum is 4 with an error of 4: ahead in every second case.
    assert np.mean(found) == pytest.approx(0.5, abs=0.04)
    found = [ahead(np.zeros(16), 0.25 + rng.standard_normal(16), 2.0) for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.16, abs=0.04)
    assert not ahead(np.zeros((1, 3)), np.ones((1, 3))).any()
    assert ahead(np.zeros((4, 2)), np.ones((4, 2)) * [1.0, -1.0]).tolist() == [True, False]


def test_a_choice_tells_which_factor_takes_what_and_survives_json():
    choice = SmoothingChoice(0.3, 0.5, 1.0, (0.2, 0.3, 0.5, 0.2))
    assert choice.distinct == (0.3, 0.2, 0.5)
    assert choice.groups(4).tolist() == [1, 0, 2, 1]
    assert SmoothingChoice(**json.loads(json.dumps(asdict(choice)))) == choice
    alone = SmoothingChoice(0.3, 0.5, 1.0)
    assert alone.distinct == (0.3,) and alone.groups(3).tolist() == [0, 0, 0]


def test_a_fit_at_own_smoothings_is_that_of_each_group():
    pooled, images = both((0.2, 0.6))
    mask = np.ones(SHAPE, bool)
    blocks, targets = spatial_blocks(mask), target_rows(images, mask, 2)
    chemistry = Chemistry(images[:1], np.zeros(3), 2)
    together = detail_rows(np.concatenate([pooled[0], pooled[5]]), mask, blocks, 2, chemistry)
    fit = fit_own(together, targets, np.array([0, 1]))
    for k, features in enumerate((pooled[0], pooled[5])):
        rows = detail_rows(features, mask, blocks, 2, replace(chemistry, groups=1))
        one = fit_average(rows, targets[:, [k]])
        np.testing.assert_allclose(fit.weights[together.columns(k), k], one.weights[:, 0], rtol=1e-9)
        np.testing.assert_allclose(fit.predicted[:, k], one.predicted[:, 0], rtol=1e-7, atol=1e-12)
        assert not fit.weights[together.columns(1 - k), k].any()
