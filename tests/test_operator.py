"""A and P: exactness is what the whole method stands on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline

from deepfere.measured.operator import (
    cell_means,
    expand,
    fill_missing,
    null_space,
    pad_edge,
    phase_weights,
    spline_coefficients,
    take,
    upsample,
)

quick = settings(max_examples=30, deadline=None)
shapes = st.tuples(st.integers(1, 13), st.integers(1, 13))
factors = st.integers(1, 16)
seeds = st.integers(0, 10_000)


def cells_of(shape, seed, lead=()):
    return np.random.default_rng(seed).standard_normal((*lead, *shape)) * 100 + 20


@quick
@given(shape=shapes, factor=factors, seed=seeds)
def test_a_p_is_the_identity(shape, factor, seed):
    cells = cells_of(shape, seed, (2,))
    fine = upsample(cells, factor)
    assert fine.shape == (2, shape[0] * factor, shape[1] * factor)
    np.testing.assert_allclose(cell_means(fine, factor), cells, atol=1e-10)
    # The local P (3 taps on the values themselves) is exact too.
    np.testing.assert_allclose(cell_means(expand(pad_edge(cells), factor, "keys"), factor), cells, atol=1e-10)


@quick
@given(shape=shapes, factor=factors, seed=seeds, share=st.floats(0.05, 0.9))
def test_a_p_is_the_identity_on_measured_pixels(shape, factor, seed, share):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < share
    mask[rng.integers(shape[0]), rng.integers(shape[1])] = True
    cells = np.where(mask, cells_of(shape, seed), np.nan)
    fine = upsample(cells, factor, mask)
    assert np.isfinite(fine).all()
    np.testing.assert_allclose(cell_means(fine, factor)[mask], cells[mask], atol=1e-10)


@pytest.mark.parametrize("kernel", ["spline", "keys", "linear"])
@pytest.mark.parametrize("factor", range(1, 17))
def test_weights_sum_to_one_and_are_mirrored(kernel, factor):
    weights = phase_weights(factor, kernel)
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-13)
    np.testing.assert_allclose(weights[::-1, ::-1], weights, atol=1e-13)
    if kernel == "keys":
        np.testing.assert_allclose(weights.mean(0), [0, 1, 0], atol=1e-13)
    if kernel == "spline":
        np.testing.assert_allclose(weights.mean(0), [1 / 6, 4 / 6, 1 / 6], atol=1e-13)


def test_returned_weights_can_be_changed_without_harm():
    phase_weights(4)[:] = 0
    assert phase_weights(4).sum() == pytest.approx(4)


@quick
@given(shape=shapes, factor=factors, value=st.floats(-1e6, 1e6))
def test_constants_are_reproduced(shape, factor, value):
    fine = upsample(np.full(shape, value), factor)
    np.testing.assert_allclose(fine, value, rtol=1e-12, atol=1e-9)


@quick
@given(factor=factors, seed=seeds)
def test_p_is_linear_and_commutes_with_mixing_ions(factor, seed):
    ions = cells_of((7, 5), seed, (3,))
    mix = np.random.default_rng(seed + 1).standard_normal((4, 3))
    mixed = np.tensordot(mix, ions, axes=1)
    np.testing.assert_allclose(upsample(mixed, factor), np.tensordot(mix, upsample(ions, factor), axes=1), atol=1e-9)
    turned = upsample(ions.swapaxes(1, 2), factor).swapaxes(1, 2)
    np.testing.assert_allclose(turned, upsample(ions, factor), atol=1e-9)
    flipped = upsample(ions[:, ::-1], factor)[:, ::-1]
    np.testing.assert_allclose(flipped, upsample(ions, factor), atol=1e-9)


def test_p_differences_the_cubic_spline_through_the_running_integral():
    # Histopolation in one dimension; repeated edge coefficients clamp the second derivative to zero.
    cells = cells_of((1, 9), 4)[0]
    integral = CubicSpline(np.arange(10), np.concatenate([[0], np.cumsum(cells)]), bc_type="natural")
    expected = 6 * np.diff(integral(np.arange(9 * 6 + 1) / 6))
    np.testing.assert_allclose(upsample(cells[None], 6)[0], expected, atol=1e-10)


def test_p_reproduces_a_smooth_image():
    y, x = np.meshgrid((np.arange(160) + 0.5) / 8, (np.arange(160) + 0.5) / 8, indexing="ij")
    image = np.sin(0.5 * y) * np.cos(0.4 * x)
    error = np.abs(upsample(cell_means(image, 8), 8) - image)[48:-48, 48:-48]
    assert error.max() < 2e-3


@quick
@given(shape=shapes, factor=factors, seed=seeds, kernel=st.sampled_from(["spline", "keys", "linear"]))
def test_torch_and_numpy_agree(shape, factor, seed, kernel):
    cells = pad_edge(cells_of(shape, seed, (2,)))
    fine = expand(cells, factor, kernel)
    np.testing.assert_allclose(expand(torch.from_numpy(cells), factor, kernel).numpy(), fine, atol=1e-10)
    np.testing.assert_allclose(cell_means(torch.from_numpy(fine), factor).numpy(), cell_means(fine, factor), atol=1e-10)
    assert expand(cells.astype(np.float32), factor, kernel).dtype == np.float32
    assert expand(torch.from_numpy(cells).float(), factor, kernel).dtype == torch.float32


@quick
@given(shape=shapes, factor=factors, seed=seeds)
def test_null_space_has_no_cell_means_and_is_a_projection(shape, factor, seed):
    image = cells_of((shape[0] * factor, shape[1] * factor), seed)
    detail = null_space(image, factor)
    np.testing.assert_allclose(cell_means(detail, factor), 0.0, atol=1e-10)
    np.testing.assert_allclose(null_space(detail, factor), detail, atol=1e-9)


def test_cell_means_by_hand():
    image = np.arange(24.0).reshape(4, 6)
    np.testing.assert_array_equal(cell_means(image, 2), [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]])


def test_linear_kernel_interpolates_between_centres():
    row = expand(pad_edge(np.array([[0.0, 4.0, 8.0]])), 4, "linear")[0]
    np.testing.assert_allclose(row, [0, 0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8, 8])


@quick
@given(shape=shapes, seed=seeds)
def test_coefficients_solve_the_spline_equations(shape, seed):
    cells = cells_of(shape, seed)
    b = pad_edge(spline_coefficients(cells))
    taps = np.array([1.0, 4.0, 1.0]) / 6
    rows = sum(t * b[a : a + shape[0]] for a, t in enumerate(taps))
    back = sum(t * rows[:, a : a + shape[1]] for a, t in enumerate(taps))
    np.testing.assert_allclose(back, cells, atol=1e-10)


def test_take_repeats_the_edge_and_pad_is_its_special_case():
    cells = np.arange(12.0).reshape(1, 3, 4)
    np.testing.assert_array_equal(take(cells, 1, 3, 0, 2), cells[:, 1:3, 0:2])
    np.testing.assert_array_equal(take(cells, -1, 4, -1, 5), pad_edge(cells))
    np.testing.assert_array_equal(take(cells, -3, -1, 2, 7)[0], [[2, 3, 3, 3, 3]] * 2)


def test_a_window_of_p_equals_the_whole():
    b = spline_coefficients(cells_of((9, 11), 3))
    whole = expand(pad_edge(b), 5)
    for i0, i1, j0, j1 in [(0, 9, 0, 11), (0, 1, 10, 11), (3, 7, 2, 5), (8, 9, 0, 4)]:
        part = expand(take(b, i0 - 1, i1 + 1, j0 - 1, j1 + 1), 5)
        np.testing.assert_array_equal(part, whole[i0 * 5 : i1 * 5, j0 * 5 : j1 * 5])


def test_holes_take_their_nearest_measured_neighbour():
    mask = np.array([[1, 0, 0, 0, 1]], bool)
    filled = fill_missing(np.array([[3.0, np.nan, np.nan, np.nan, 7.0]]), mask)
    assert filled[0, [0, 1, 3, 4]].tolist() == [3.0, 3.0, 7.0, 7.0]
    assert filled[0, 2] in (3.0, 7.0)
    cells = cells_of((2, 2), 0)
    copy = fill_missing(cells, np.ones((2, 2), bool))
    copy[:] = 0
    assert cells.any(), "the input must not be changed through the output"
