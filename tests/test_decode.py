"""From the stored result to one ion: exact, not negative, the same whatever the window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfere.measured.operator import cell_means, upsample
from deepfere.model.decode import IonDecoder, positive
from deepfere.model.guide import Cells

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10_000)
step_counts = st.sampled_from([0, 1, 2, 3, 5, 8])


def sparse_cells(shape, seed):
    """Not negative, several decades, a third of them zero."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.35, 0.0, rng.lognormal(0, 2, shape))


@quick
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    factor=st.integers(1, 9),
    steps=st.integers(1, 6),
    seed=seeds,
)
def test_positivity_keeps_every_mean(shape, factor, steps, seed):
    cells = sparse_cells(shape, seed)
    rng = np.random.default_rng(seed + 1)
    image = upsample(cells, factor) + rng.standard_normal((shape[0] * factor, shape[1] * factor)) * cells.max()
    out = positive(image, cells, factor, steps)
    assert (out >= 0).all()
    np.testing.assert_allclose(cell_means(out, factor), cells, rtol=1e-12, atol=1e-12 * cells.max())
    assert not out[np.repeat(np.repeat(cells == 0, factor, 0), factor, 1)].any(), "a zero cell stays zero"


def test_a_cell_whose_estimate_vanished_is_filled_evenly():
    cells = np.array([[4.0, 0.0], [2.0, 1.0]])
    image = np.full((4, 4), -1.0)
    np.testing.assert_array_equal(positive(image, cells, 2, 1), np.repeat(np.repeat(cells, 2, 0), 2, 1))
    # Two steps: what is missing is first added with a slope towards the neighbours.
    assert np.ptp(positive(image, cells, 2, 2)[:2, :2]) > 1


def test_what_a_cell_lacks_is_added_smoothly_before_its_ratio_is_applied():
    # One row of two cells; the first has a negative pixel, so that its mean is 1 too high once that is 0.
    image, cells = np.array([[4.0, -2.0, 3.0, 3.0]] * 2), np.array([[1.0, 3.0]])
    added = np.maximum(np.array([[4.0, 0.0, 3.0, 3.0]] * 2) + [-1.0, -0.75, -0.25, 0.0], 0)
    by_ratio = added * np.repeat([1.0 / 1.5, 3.0 / 2.875], 2)
    np.testing.assert_allclose(positive(image, cells, 2, 2), by_ratio)


def test_no_steps_changes_nothing_and_positive_images_with_right_means_stay():
    image = np.array([[1.0, -3.0], [2.0, 0.0]])
    np.testing.assert_array_equal(positive(image, np.zeros((1, 1)), 2, 0), image)
    good = np.random.default_rng(0).random((6, 6))
    np.testing.assert_allclose(positive(good, cell_means(good, 3), 3, 4), good, rtol=1e-12)


def test_positive_does_not_change_its_input():
    image = np.random.default_rng(0).standard_normal((6, 6))
    before = image.copy()
    positive(image, np.ones((2, 2)), 3, 3)
    np.testing.assert_array_equal(image, before)


def build(shape, factor, steps, seed, factors=3):
    rng = np.random.default_rng(seed)
    cells = sparse_cells(shape, seed)
    loadings = rng.standard_normal(factors) * cells.max()
    if factors > 1:
        loadings[0] = 0.0
    decoder = IonDecoder.build(cells, loadings, factor, steps)
    # Detail as stored: rounded to float16, so its cell means are not zero.
    planes = rng.standard_normal((factors, shape[0] * factor, shape[1] * factor)).astype(np.float16)

    def detail(c: Cells):
        assert 0 <= c.i0 < c.i1 <= shape[0]
        assert 0 <= c.j0 < c.j1 <= shape[1]
        return planes[:, c.i0 * factor : c.i1 * factor, c.j0 * factor : c.j1 * factor]

    return decoder, planes, detail


@quick
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), factor=st.integers(1, 8), steps=step_counts, seed=seeds)
def test_every_ion_agrees_with_its_measurement(shape, factor, steps, seed):
    decoder, _, detail = build(shape, factor, steps, seed)
    image = decoder.window(Cells(0, shape[0], 0, shape[1]), detail)
    error = np.abs(cell_means(image, factor) - decoder.cells).max()
    assert error <= 1e-12 * max(decoder.cells.max(), np.abs(decoder.loadings).max(), 1e-300)
    if steps:
        assert (image >= 0).all()


@quick
@given(
    shape=st.tuples(st.integers(2, 11), st.integers(2, 11)),
    factor=st.integers(1, 6),
    steps=step_counts,
    seed=seeds,
    data=st.data(),
)
def test_a_window_equals_the_whole(shape, factor, steps, seed, data):
    decoder, _, detail = build(shape, factor, steps, seed)
    whole = decoder.window(Cells(0, shape[0], 0, shape[1]), detail)
    i0, j0 = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    i1, j1 = data.draw(st.integers(i0 + 1, shape[0])), data.draw(st.integers(j0 + 1, shape[1]))
    part = decoder.window(Cells(i0, i1, j0, j1), detail)
    expected = whole[i0 * factor : i1 * factor, j0 * factor : j1 * factor]
    np.testing.assert_allclose(part, expected, rtol=1e-11, atol=1e-12 * decoder.cells.max())


def test_the_formula_term_by_term():
    decoder, planes, detail = build((5, 6), 4, 0, 3)
    added = np.tensordot(decoder.loadings, planes.astype(np.float64), axes=1)
    added -= np.repeat(np.repeat(cell_means(added, 4), 4, 0), 4, 1)
    expected = upsample(decoder.cells, 4) + added
    np.testing.assert_allclose(decoder.window(Cells(0, 5, 0, 6), detail), expected, atol=1e-10)


def test_without_loadings_or_detail_it_is_plain_interpolation():
    decoder, _, _ = build((4, 4), 3, 0, 1)
    whole = Cells(0, 4, 0, 4)
    plain = upsample(decoder.cells, 3)
    np.testing.assert_allclose(decoder.window(whole, None), plain, atol=1e-12)
    silent = IonDecoder.build(decoder.cells, np.zeros(3), 3, 0)

    def never(_: Cells):
        pytest.fail("detail must not be read for an ion that does not use it")

    np.testing.assert_allclose(silent.window(whole, never), plain, atol=1e-12)
