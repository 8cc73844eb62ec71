"""T1: planted weights are found, from blocks left out, and null guides lose the place."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.measured.operator import cell_means, expand, null_space, pad_edge, spline_coefficients
from deepfere.model.ridge import (
    detail,
    detail_rows,
    fit_ridge,
    null_guides,
    phases,
    stain_detail,
    target_rows,
)

from .test_gate import SHAPE, blocks_of, guide_of


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_rows_map_back_to_their_pixels(ratio):
    rng = np.random.default_rng(ratio)
    shape = (19, 22)
    features, targets = rng.standard_normal((3, *shape)), rng.standard_normal((2, *shape))
    mask = rng.random(shape) < 0.95
    blocks = blocks_of(shape)
    rows, wanted = detail_rows(features, mask, blocks, ratio), target_rows(targets, mask, ratio)
    assert len(wanted) == len(rows.stain) == len(rows.index) == len(rows.block) == len(rows.phase)
    np.testing.assert_array_equal(rows.block, blocks.ravel()[rows.index])
    assert mask.ravel()[rows.index].all()
    seen = 0
    for n, (py, px) in enumerate(phases(ratio)):
        cells = (shape[0] - py) // ratio, (shape[1] - px) // ratio
        crop = slice(py, py + cells[0] * ratio), slice(px, px + cells[1] * ratio)
        # By the definition: degrade, upsample, subtract.
        fine = targets[:, crop[0], crop[1]]
        missing = fine - expand(pad_edge(spline_coefficients(cell_means(fine, ratio))), ratio)
        stain = null_space(features[:, crop[0], crop[1]], ratio)
        np.testing.assert_allclose(detail(targets, ratio, (py, px)), missing, atol=1e-12)
        np.testing.assert_allclose(stain_detail(features, ratio, (py, px)), stain, atol=1e-12)
        of_phase = rows.phase == n
        i, j = np.unravel_index(rows.index[of_phase], shape)
        np.testing.assert_allclose(rows.stain[of_phase], stain[:, i - py, j - px].T, atol=1e-12)
        np.testing.assert_allclose(wanted[of_phase], missing[:, i - py, j - px].T, atol=1e-12)
        whole = mask[crop].reshape(cells[0], ratio, cells[1], ratio).all((1, 3))
        assert of_phase.sum() == whole.sum() * ratio**2
        seen += int(of_phase.sum())
    assert seen == len(rows.index)


def test_a_grid_too_small_to_degrade_gives_no_rows():
    features, mask = np.zeros((3, 3, 9)), np.ones((3, 9), bool)
    rows = detail_rows(features, mask, np.zeros((3, 9), np.int64), 2)
    assert rows.stain.shape == (0, 3)
    assert target_rows(np.zeros((2, 3, 9)), mask, 2).shape == (0, 2)
    fit = fit_ridge(rows, np.zeros((0, 2)))
    assert fit.weights.shape == (3, 2)
    assert not fit.weights.any()


def test_planted_weights_are_found():
    features = guide_of(0, count=5) * np.array([1, 0.01, 100, 1, 1])[:, None, None]
    features[4] = 7.0  # constant: must get no weight
    truth = np.array([[1.0, 0.0], [50.0, -20.0], [0.0, 0.02], [-0.5, 0.3], [0.0, 0.0]])
    mask, blocks = np.ones(SHAPE, bool), blocks_of(SHAPE)
    rows = detail_rows(features, mask, blocks, 2)
    fit = fit_ridge(rows, rows.stain @ truth, ridges=(1e-9,))
    np.testing.assert_allclose(fit.weights, truth, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fit.predicted, rows.stain @ truth, rtol=1e-3, atol=1e-6)
    # From the measurement itself, through the spline that real targets go through.
    targets = target_rows(np.einsum("fyx,fk->kyx", features, truth), mask, 2)
    found = fit_ridge(rows, targets)
    contribution, wanted = found.weights * features.std((1, 2))[:, None], truth * features.std((1, 2))[:, None]
    np.testing.assert_allclose(contribution, wanted, atol=0.15)
    assert found.weights[4].tolist() == [0, 0]
    left = ((targets - found.predicted) ** 2).sum(0) / (targets**2).sum(0)
    assert (left < 0.1).all()


def test_predictions_come_from_other_blocks():
    features, mask, blocks = guide_of(1), np.ones(SHAPE, bool), blocks_of(SHAPE)
    rows = detail_rows(features, mask, blocks, 2)
    rng = np.random.default_rng(0)
    targets = rows.stain[:, :1] + rng.standard_normal((len(rows.stain), 1))
    before = fit_ridge(rows, targets, ridges=(0.1,))
    other = targets.copy()
    other[rows.block == 5] += 100.0
    after = fit_ridge(rows, other, ridges=(0.1,))
    np.testing.assert_allclose(after.predicted[rows.block == 5], before.predicted[rows.block == 5], atol=1e-11)
    assert np.abs(after.predicted[rows.block == 6] - before.predicted[rows.block == 6]).max() > 0
    # The same by brute force for one block.
    inside = rows.block == 5
    x, y = rows.stain[~inside], targets[~inside]
    scale = np.sqrt((rows.stain**2).mean(0))
    z = x / scale
    beta = np.linalg.solve(z.T @ z + 0.1 * len(rows.stain) * np.eye(4), z.T @ y)
    np.testing.assert_allclose(before.predicted[inside], rows.stain[inside] / scale @ beta, atol=1e-10)


def test_noise_chooses_a_strong_penalty():
    features, mask = guide_of(2), np.ones(SHAPE, bool)
    rows = detail_rows(features, mask, blocks_of(SHAPE), 2)
    noise = np.random.default_rng(5).standard_normal((len(rows.stain), 1))
    fit = fit_ridge(rows, np.hstack([noise, rows.stain @ np.ones((4, 1))]))
    assert fit.ridge[0] >= 0.3
    assert fit.ridge[1] <= 1e-2


def test_null_guides_keep_the_texture_and_lose_the_place():
    features = guide_of(3)
    nulls = list(null_guides(features, 20, seed=1))
    assert len(nulls) == 20
    for null in nulls:
        assert null.shape == features.shape
        np.testing.assert_allclose(np.sort(null.ravel()), np.sort(features.ravel()))
        assert np.abs(np.corrcoef(null[0].ravel(), features[0].ravel())[0, 1]) < 0.3
    np.testing.assert_array_equal(nulls[1], features[:, ::-1])
    np.testing.assert_array_equal(nulls[3], features[:, ::-1, ::-1])
    for a, b in zip(nulls, null_guides(features, 20, seed=1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_sections_use_fewer_phases():
    assert len(phases(2)) == len(phases(2, 50_000)) == 4
    assert phases(2, 50_001) == [(0, 0), (1, 1)]
    assert phases(2, 100_001) == [(0, 0)]
    mask = np.ones((320, 320), bool)
    features = np.random.default_rng(0).standard_normal((1, *mask.shape))
    rows = detail_rows(features, mask, np.zeros(mask.shape, np.int64), 2)
    assert len(rows.block) == len(target_rows(features, mask, 2)) == mask.size
