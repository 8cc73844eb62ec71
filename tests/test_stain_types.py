"""Stain types and products with factors: what one linear relation for the whole section cannot say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from deepfere.alignment.score import spatial_blocks
from deepfere.measured.operator import null_space
from deepfere.model.features import FEATURES
from deepfere.model.ridge import (
    DENSITIES,
    FEATURE_SETS,
    Chemistry,
    detail_rows,
    fit_average,
    regressor_sets,
    target_rows,
    with_products,
)
from deepfere.model.stain_types import LEAST_PX, MOST_TYPES, PX_PER_TYPE, USED, WIDTH, StainTypes, type_count

SHAPE = (48, 44)


def samples(count=600, seed=0):
    """Three kinds of tissue, well apart."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 1, (3, len(FEATURES)))
    return centres[np.arange(count) % 3] + 0.02 * rng.standard_normal((count, len(FEATURES)))


def test_the_number_of_types_follows_the_section():
    assert type_count(LEAST_PX - 1) == 0
    assert type_count(300) == 300 // PX_PER_TYPE
    assert type_count(10**6) == MOST_TYPES


def test_kinds_of_tissue_become_types():
    found = StainTypes.find(samples(), 3, seed=0)
    shares = found.shares(torch.from_numpy(samples().T[:, None].copy()))[:, 0].numpy()
    np.testing.assert_allclose(shares.sum(0), 1)
    kind = np.arange(shares.shape[1]) % 3
    assert all(len(set(shares.argmax(0)[kind == k])) == 1 for k in range(3))
    assert len(set(shares.argmax(0))) == 3


def test_shares_are_gaussians_around_the_centres():
    points = samples(90)
    found = StainTypes.find(points, 5, seed=1)
    from scipy.cluster.vq import kmeans2

    used = points[:, USED]
    scaled = (used - used.mean(0)) / used.std(0)
    centres, _ = kmeans2(scaled, 5, iter=30, minit="++", seed=np.random.default_rng([1, 11]))
    gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + np.where(np.eye(5) > 0, np.inf, 0)
    h = WIDTH * np.median(gaps.min(1))
    weight = np.exp(-((scaled[None] - centres[:, None]) ** 2).sum(-1) / (2 * h * h))
    shares = found.shares(torch.from_numpy(points.T[:, None].copy()))[:, 0].numpy()
    np.testing.assert_allclose(shares, weight / weight.sum(0), atol=1e-9)


def test_far_from_every_type_shares_stay_finite():
    found = StainTypes.find(samples(), 3, seed=0)
    far = torch.full((len(FEATURES), 1, 1), 1e4)
    shares = found.shares(far)
    assert torch.isfinite(shares).all()
    assert shares.sum().item() == pytest.approx(1)


def test_the_same_seed_gives_the_same_types_and_they_survive_plain_values():
    one, two, other = (StainTypes.find(samples(), 8, seed) for seed in (4, 4, 5))
    np.testing.assert_array_equal(one.weights, two.weights)
    assert not np.array_equal(one.weights, other.weights)
    again = StainTypes.from_dict(one.to_dict())
    np.testing.assert_array_equal(again.weights, one.weights)
    np.testing.assert_array_equal(again.bias, one.bias)
    assert StainTypes.from_dict(None) is None


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_blank_stain_has_no_types(count):
    assert StainTypes.find(np.full((500, len(FEATURES)), 0.3), count, 0) is None


def problem(seed=0):
    """Features of a section with some texture, and its leading factor."""
    rng = np.random.default_rng(seed)
    features = gaussian_filter(rng.standard_normal((len(FEATURES), *SHAPE)), (0, 0.7, 0.7))
    factor = gaussian_filter(rng.standard_normal((1, *SHAPE)), (0, 6, 6))
    return features / features.std((1, 2), keepdims=True), factor / factor.std()


def explained(rows, targets):
    left = ((targets - fit_average(rows, targets).predicted) ** 2).sum()
    return 1 - left / (targets**2).sum()


def test_products_find_weights_that_follow_the_chemistry():
    features, factor = problem()
    mask = np.ones(SHAPE, bool)
    blocks = spatial_blocks(mask)
    # The stain's meaning turns round where the factor changes its sign.
    targets = target_rows(factor * features[:1], mask, 2)
    plain = detail_rows(features, mask, blocks, 2)
    chemistry = Chemistry(factor, np.zeros(3))
    assert explained(plain, targets) < 0.3
    assert explained(detail_rows(features, mask, blocks, 2, chemistry), targets) > 0.35
    assert explained(detail_rows(features, mask, blocks, 2, chemistry), targets) > explained(plain, targets) + 0.2


def test_types_find_relations_that_bend():
    features, _ = problem(1)
    mask = np.ones(SHAPE, bool)
    blocks = spatial_blocks(mask)
    # Only one look of the stain carries the ion.
    targets = target_rows(np.exp(-2 * ((features[:1] - 0.8) ** 2 + features[1:2] ** 2)), mask, 2)
    types = StainTypes.find(features.reshape(len(FEATURES), -1).T, 24, 0)
    typed = np.concatenate([features, types.shares(torch.from_numpy(features)).numpy()])
    plain, more = (detail_rows(f, mask, blocks, 2) for f in (features, typed))
    assert explained(more, targets) > explained(plain, targets) + 0.05


def test_products_are_taken_from_what_the_degradation_leaves():
    features, factor = problem(2)
    mask = np.ones(SHAPE, bool)
    changed = factor.copy()
    # Moving intensity inside a coarse pixel changes nothing that is seen at reduced scale (phase 0).
    changed[0, 10, 10] += 3
    changed[0, 10, 11] -= 3
    rows = [
        detail_rows(features, mask, np.zeros(SHAPE, int), 2, Chemistry(image, np.zeros(3)))
        for image in (factor, changed)
    ]
    first = rows[0].phase == 0
    np.testing.assert_allclose(rows[0].stain[first], rows[1].stain[first], atol=1e-12)
    assert not np.allclose(rows[0].stain[~first], rows[1].stain[~first])


def test_products_in_numpy_and_torch_are_the_same():
    features, factor = problem(3)
    centre = np.array([0.1, 0.2, 0.3])
    levels = np.concatenate([factor, -2 * factor])
    found = with_products(features, levels, centre)
    assert len(found) == len(FEATURES) + 2 * len(DENSITIES)
    np.testing.assert_array_equal(found[: len(FEATURES)], features)
    np.testing.assert_allclose(found[-1], -2 * factor[0] * (features[DENSITIES[2]] - 0.3))
    tensors = [torch.from_numpy(v) for v in (features, levels, centre)]
    np.testing.assert_allclose(with_products(*tensors).numpy(), found)
    assert with_products(features, levels[:0], centre) is features


def test_sets_hold_every_regressor_and_no_other():
    plain = regressor_sets(len(FEATURES), 0)
    assert plain == list(FEATURE_SETS.values())
    both = regressor_sets(len(FEATURES) + 5, 6)
    assert len(both) == 4 * len(plain)
    assert set().union(*both) == set(range(len(FEATURES) + 5 + 6))
    assert len(regressor_sets(len(FEATURES), 6)) == 2 * len(plain)


def test_detail_of_a_regressor_averages_to_nothing():
    features, factor = problem(4)
    mask = np.ones(SHAPE, bool)
    rows = detail_rows(features, mask, np.zeros(SHAPE, int), 2, Chemistry(factor, np.zeros(3)))
    first = rows.stain[rows.phase == 0].T.reshape(-1, *SHAPE)
    np.testing.assert_allclose(null_space(first, 2), first, atol=1e-9)


@pytest.mark.parametrize("shape", [(64, 256), (40, 36), (5, 4)])
def test_samples_come_from_all_over_the_section(monkeypatch, shape):
    from deepfere.frame import Alignment, SectionGrid
    from deepfere.model.guide import GuideSpec
    from deepfere.pipeline import types

    looked = []

    def features_of(spec, planes, alignment, cells):
        looked.append((cells.i0, cells.j0))
        return torch.rand(len(FEATURES), spec.factor, spec.factor), None

    monkeypatch.setattr(types, "features_of", features_of)
    spec = GuideSpec(SectionGrid(shape, (50.0, 50.0)), 4, (6.0, 6.0), (100, 100), (240.0, 240.0, 240.0), 0.25)
    mask = np.ones(shape, bool)
    mask[0, 0] = False
    found = types._samples(spec, Alignment.identity(), None, mask, 0)
    assert found.shape[1] == len(FEATURES)
    assert len(looked) == len(set(looked)) == min(types.SAMPLED_CELLS, mask.sum())
    assert (0, 0) not in looked
    rows, cols = np.array(looked).T
    # A stride would see two columns of the first shape.
    assert len(set(cols)) > 0.5 * shape[1] and len(set(rows)) > 0.9 * shape[0]
