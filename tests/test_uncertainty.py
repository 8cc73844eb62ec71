"""The variance model: noise that grows as pixels shrink, structure that adds once an octave."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from deepfere.measured.operator import cell_means
from deepfere.model.uncertainty import (
    MOST_SCALE,
    NORMAL_80,
    NoiseModel,
    common_scale,
    detectors_pulse,
    local_variance,
    noise_quantum,
    scale_needed,
    single_pulse,
    variance_model,
)

EVERYWHERE = np.ones((64, 60), bool)


def test_local_variance_by_hand():
    image = np.zeros((3, 4))
    image[1, 1] = 9.0
    out = local_variance(image)
    assert out[1, 1] == pytest.approx(8.0)  # mean 1, one at 8, eight at -1
    assert out[1, 3] == 0


def level(seed: int = 0) -> np.ndarray:
    smooth = gaussian_filter(np.random.default_rng(seed).standard_normal((64, 60)), 9)
    return 2.0 + np.clip(smooth / smooth.std(), -1.5, 3.0)


@pytest.mark.parametrize("quantum", [0.01, 4.0])
@pytest.mark.parametrize("counts", [0.3, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("seed", range(2))
def test_the_quantum_of_counting_noise_is_found(quantum, counts, seed):
    """From single ions, of which a pixel holds none, one or two, to hundreds."""
    image = np.random.default_rng(seed).poisson(level(seed) / 2 * counts) * quantum
    assert 0.45 <= noise_quantum(image, EVERYWHERE) / quantum <= 1.6


@pytest.mark.parametrize("counts", [0.3, 1.0, 5.0, 30.0])
def test_the_quantum_of_pulses_that_vary_is_twice_their_mean(counts):
    rng = np.random.default_rng(7)
    number = rng.poisson(level() / 2 * counts)
    image = rng.gamma(np.maximum(number, 1)) * (number > 0)
    assert 0.45 <= noise_quantum(image, EVERYWHERE) / 2.0 <= 1.5


def test_the_quantum_follows_the_unit_and_ignores_what_is_not_measured():
    image, mask = np.random.default_rng(1).poisson(level() * 5).astype(float), EVERYWHERE.copy()
    mask[:20, :20] = False
    spoilt = np.where(mask, image, 1e9)
    found = noise_quantum(spoilt, mask)
    assert found > 0
    assert noise_quantum(spoilt * 1e-7, mask) == pytest.approx(found * 1e-7)
    assert noise_quantum(np.where(mask, image, np.nan), mask) == found


def test_sparse_counts_tell_what_one_ion_is_worth():
    # Edges everywhere: differences of neighbours say much too much, the least intensity does not.
    rng = np.random.default_rng(2)
    edges = np.where(rng.random((64, 60)) < 0.5, 0.2, 9.0)
    image = rng.poisson(edges) * 7.0
    assert 7.0 <= noise_quantum(image, EVERYWHERE) <= 14.0


def test_an_ion_that_is_everywhere_does_not_show_its_pulse():
    image = np.random.default_rng(3).poisson(40.0, (64, 60)) * 7.0
    assert single_pulse(image, EVERYWHERE) == np.inf
    image[0, :3], image[1, :4] = 0.0, 7.0
    assert single_pulse(image, EVERYWHERE) == np.inf  # four pixels of one count among 3837
    image[2, :20] = 7.0
    assert single_pulse(image, EVERYWHERE) == 14.0
    assert single_pulse(np.zeros((64, 60)), EVERYWHERE) == np.inf


def test_ions_that_agree_speak_for_the_detector():
    unseen, alike = np.full(20, np.inf), 3.0 * np.linspace(0.8, 1.2, 9)
    found = detectors_pulse(np.concatenate([unseen, alike]))
    assert found == pytest.approx(np.quantile(alike, 0.9))
    assert detectors_pulse(np.concatenate([unseen, alike[:7]])) == np.inf, "too few"
    # Intensities in units of each ion's own: nothing is said about the others.
    assert detectors_pulse(np.geomspace(1.0, 30.0, 40)) == np.inf
    assert detectors_pulse(unseen) == np.inf


def test_nothing_measured_has_no_noise():
    assert noise_quantum(np.zeros((64, 60)), EVERYWHERE) == 0.0
    assert noise_quantum(np.ones((1, 2)), np.ones((1, 2), bool)) == 0.0


def test_errors_of_a_finer_instrument_are_as_large_as_said():
    """Pure counting noise, in pixels 2, 4 and 8 times as fine: the s.d. is that of the counts."""
    rng, truth = np.random.default_rng(3), np.full((512, 480), 5.0)
    for factor in (2, 4, 8):
        fine = rng.poisson(truth[: 64 * factor, : 60 * factor] * 40 / factor**2) * factor**2 / 40.0
        measured = cell_means(fine, factor)
        coarse = np.repeat(np.repeat(cell_means(measured, 2), 2, 0), 2, 1)
        spread = np.repeat(np.repeat(local_variance(cell_means(measured, 2)), 2, 0), 2, 1)
        model = variance_model(coarse.ravel(), measured.ravel(), spread.ravel())
        noise = NoiseModel.of(model, measured, EVERYWHERE)
        said = noise.variance(5.0, local_variance(measured).mean(), factor)
        assert np.sqrt(said) == pytest.approx(fine.std(), rel=0.25)


def test_structure_adds_once_an_octave_and_noise_goes_with_the_area():
    model = NoiseModel((1.0, 0.5, 2.0), quantum=0.25, rare=0.0)
    for factor, octaves in ((1, 0), (2, 1), (8, 3), (6, np.log2(6)), (0.5, 0)):
        expected = octaves * (1.0 + 0.5 * 4.0 + 2.0 * 3.0) + 0.25 * factor**2 * 4.0
        assert model.variance(4.0, 3.0, factor) == pytest.approx(expected)
    assert NoiseModel.of_row(model.row()) == model


def test_noise_is_not_counted_twice():
    cell = np.full((64, 60), 100.0)
    cell[0] = 0.0  # a quantum of 200 at most: the least intensity; differences say 0
    assert NoiseModel.of(np.array([1.0, 0.5, 2.0]), cell, EVERYWHERE).structure == (1.0, 0.5, 2.0)
    counts = np.random.default_rng(4).poisson(level() * 20) * 0.5
    model = NoiseModel.of(np.array([0.0, 0.75, 0.0]), counts, EVERYWHERE)
    assert model.quantum == pytest.approx(0.5, rel=0.45)
    assert model.structure[1] == pytest.approx(0.75 - model.quantum)


def test_an_ion_that_was_seldom_seen_may_turn_up_in_a_fine_pixel():
    cell = np.zeros((64, 60))
    cell[3, 4] = 6.0
    few = NoiseModel.of(np.zeros(3), cell, EVERYWHERE)
    # One fine pixel of one of the 3839 empty pixels, with all that such a pixel would hold.
    assert few.variance(0.0, 0.0, 4) == pytest.approx(6.0**2 * 16 / 3841)
    assert not NoiseModel.of(np.zeros(3), np.zeros((64, 60)), EVERYWHERE).row().any()


def test_the_scale_is_what_80_percent_of_normal_errors_need():
    rng = np.random.default_rng(3)
    image = np.full(40_000, 50.0)
    truth = image + 3.0 * rng.standard_normal(image.shape)
    assert scale_needed(image, truth, np.full(image.shape, 4.0)) == pytest.approx(1.5, rel=0.02)


def test_zeros_on_the_end_of_their_interval_count_half():
    # Seven of ten are held at once, two zeros for one half each as soon as their interval ends at 0: 80 %.
    truth = np.array([5.0] * 7 + [0.0, 0.0, 99.0])
    image, variance = np.array([5.0] * 7 + [2 * NORMAL_80, NORMAL_80, 1.0]), np.ones(10)
    assert scale_needed(image, truth, variance) == pytest.approx(2.0)
    # With half of the pixels at zero no interval holds more than three quarters.
    assert scale_needed(np.ones(10), np.repeat([0.0, 1.0], 5), variance) == np.inf


def test_the_common_scale_is_of_ions_that_are_there_and_makes_no_error_small():
    present = np.array([0.9, 0.8, 0.7, 0.1])
    assert common_scale(np.array([1.2, 1.4, np.inf, 9.0]), present) == 1.4
    assert common_scale(np.array([0.5, 0.6, 0.7, 9.0]), present) == 1.0
    assert common_scale(np.array([np.inf, np.inf, 1.0, 1.0]), present) == MOST_SCALE
    assert common_scale(np.array([5.0]), np.array([0.2])) == 1.0
    assert common_scale(np.array([np.nan, 1.4, np.nan]), np.full(3, 0.9)) == 1.4
    assert common_scale(np.full(2, np.nan), np.full(2, 0.9)) == 1.0


@pytest.mark.parametrize("unit", [1e-30, 1.0, 5e15])
def test_an_ion_without_error_says_nothing_about_the_scale(unit):
    flat = np.full(100, 5.0 * unit)
    rounding = flat * (1 + 1e-15 * np.random.default_rng(0).standard_normal(100))
    assert np.isnan(scale_needed(rounding, flat, (rounding - flat) ** 2 + 1e-32 * unit**2))
    assert np.isnan(scale_needed(np.empty(0), np.empty(0), np.empty(0)))
