"""Properties of the benchmark's baselines: what each must do whatever the data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from deepfere.measured.operator import cell_means, upsample

from .test_benchmarks import load

baselines = load("baselines")
FACTOR, SHAPE = 4, (12, 10)
FINE = (SHAPE[0] * FACTOR, SHAPE[1] * FACTOR)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def seen(rng: np.random.Generator, noise: float = 0.0, covered: np.ndarray | None = None):
    """A section whose ions are a linear map of its stain, and the truth at high resolution."""
    features = np.cumsum(rng.normal(size=(5, *FINE)), axis=1) + 3.0
    weights, offset = rng.normal(size=(3, 5)), np.array([1.0, 20.0, -4.0])
    truth = np.tensordot(weights, features, axes=1) + offset[:, None, None]
    cells = cell_means(truth, FACTOR)
    cells = cells + noise * cells.std() * rng.normal(size=cells.shape)
    whole = np.ones(SHAPE, bool) if covered is None else covered
    return baselines.Seen(cells, FACTOR, features, whole), truth


@pytest.mark.parametrize("method", [baselines.nearest, baselines.exact])
def test_nearest_and_p_average_back(method, rng):
    cells = rng.normal(size=(2, *SHAPE))
    assert np.abs(cell_means(method(cells, FACTOR), FACTOR) - cells).max() < 1e-12


@pytest.mark.parametrize("method", [baselines.bicubic, baselines.opencv_cubic])
def test_cubic_interpolation_keeps_a_constant_and_does_not_average_back(method, rng):
    assert np.allclose(method(np.full((1, *SHAPE), 2.5), FACTOR), 2.5)
    cells = rng.normal(size=(1, *SHAPE))
    # Else nothing would be left for back-projection to do.
    assert np.abs(cell_means(method(cells, FACTOR), FACTOR) - cells).max() > 0.05


@pytest.mark.parametrize("factor", [2, 8])
def test_back_projection_agrees_with_the_measurement(factor, rng):
    cells = rng.normal(size=(3, *SHAPE)) * np.array([1.0, 1e6, 1e-6])[:, None, None]
    off = np.abs(cell_means(baselines.back_projected(cells, factor), factor) - cells).max((1, 2))
    assert (off <= 1e-6 * np.abs(cells).max((1, 2))).all()
    short = np.abs(cell_means(baselines.back_projected(cells, factor, most=2), factor) - cells).max((1, 2))
    assert (short > 1e-6 * np.abs(cells).max((1, 2))).all()


def test_back_projection_of_nothing_is_nothing():
    assert not baselines.back_projected(np.zeros((1, *SHAPE)), FACTOR).any()


def windows(image: np.ndarray, side: int) -> np.ndarray:
    """Box means of what lies inside the image."""
    inside = uniform_filter(np.ones_like(image), side, mode="constant")
    return uniform_filter(image, side, mode="constant") / inside


def test_guided_filter_with_a_constant_guide_is_the_box_mean_of_box_means(rng):
    image = rng.normal(size=FINE)
    found = baselines.guided_filter(image[None], np.full((2, *FINE), 0.7), 3, 0.01)[0]
    assert np.allclose(found, windows(windows(image, 7), 7), atol=1e-9)


def test_guided_filter_returns_what_is_linear_in_the_guides(rng):
    guides = rng.normal(size=(3, *FINE))
    image = 2.0 + np.tensordot([1.0, -2.0, 0.5], guides, axes=1)
    assert np.allclose(baselines.guided_filter(image[None], guides, 4, 1e-9)[0], image, atol=1e-5)
    # A penalty far above the guides' variance leaves no more than the box mean.
    flat = baselines.guided_filter(image[None], guides, 4, 1e6)[0]
    assert np.allclose(flat, windows(windows(image, 9), 9), atol=1e-3)


def test_guided_filter_is_the_mean_of_window_regressions(rng):
    """Against the definition, window by window."""
    image, guides, radius, eps = rng.normal(size=(6, 7)), rng.normal(size=(2, 6, 7)), 2, 0.1
    total, count = np.zeros(image.shape), np.zeros(image.shape)
    for i in range(6):
        for j in range(7):
            at = slice(max(i - radius, 0), i + radius + 1), slice(max(j - radius, 0), j + radius + 1)
            x, y = guides[:, *at].reshape(2, -1), image[at].ravel()
            dx, dy = x - x.mean(1, keepdims=True), y - y.mean()
            slopes = np.linalg.solve(dx @ dx.T / y.size + eps * np.eye(2), dx @ dy / y.size)
            total[at] += (slopes @ dx + y.mean()).reshape(image[at].shape)
            count[at] += 1
    assert np.allclose(baselines.guided_filter(image[None], guides, radius, eps)[0], total / count, atol=1e-10)


def test_guided_filter_never_looks_where_nothing_counts(rng):
    image, guides = rng.normal(size=FINE), rng.normal(size=(2, *FINE))
    weight = np.ones(FINE)
    weight[:, 20:] = 0
    found = baselines.guided_filter(image[None], guides, 3, 0.01, weight)[0]
    image2, guides2 = image.copy(), guides.copy()
    image2[:, 20:], guides2[:, :, 20:] = 1e3, -1e3
    other = baselines.guided_filter(image2[None], guides2, 3, 0.01, weight)[0]
    assert np.allclose(found[:, :20], other[:, :20], atol=1e-6)
    assert (found[:, 20:] == image[:, 20:]).all()


@pytest.mark.parametrize("method", [baselines.ridge, baselines.pls])
def test_regression_recovers_a_planted_linear_map(method, rng):
    section, truth = seen(rng)
    found = method(section)
    off = np.sqrt(((found - truth) ** 2).mean((1, 2))) / truth.std((1, 2))
    assert (off < 0.03).all()
    # The map is what is recovered: the same features elsewhere.
    plain = np.sqrt(((upsample(section.cells, FACTOR) - truth) ** 2).mean((1, 2))) / truth.std((1, 2))
    assert (off < 0.2 * plain).all()


@pytest.mark.parametrize("method", [baselines.ridge, baselines.pls])
def test_what_the_stain_does_not_show_is_predicted_by_its_mean(method, rng):
    section, _ = seen(rng)
    noise = baselines.Seen(rng.normal(size=(1, *SHAPE)) + 7.0, FACTOR, section.features, section.covered)
    assert np.abs(method(noise) - 7.0).max() < 1.0
    constant = baselines.Seen(np.full((1, *SHAPE), 7.0), FACTOR, section.features, section.covered)
    assert np.allclose(method(constant), 7.0)


@pytest.mark.parametrize(
    ("method", "plain"),
    [
        (baselines.consistent_ridge, baselines.ridge),
        (baselines.consistent_pls, baselines.pls),
        (baselines.consistent_guided, baselines.guided),
    ],
)
def test_with_consistency_the_prediction_averages_back(method, plain, rng):
    covered = np.ones(SHAPE, bool)
    covered[:3] = False
    section, _ = seen(rng, noise=0.5, covered=covered)
    size = np.abs(section.cells).max()
    assert np.abs(cell_means(method(section), FACTOR) - section.cells).max() < 1e-6 * size
    assert np.abs(cell_means(plain(section), FACTOR) - section.cells).max() > 0.05 * size


@pytest.mark.parametrize("method", [baselines.ridge, baselines.pls])
def test_beside_the_slide_p_is_left(method, rng):
    covered = np.ones(SHAPE, bool)
    covered[:3] = False
    section, truth = seen(rng, covered=covered)
    section.features[:, : 3 * FACTOR] = 1e3  # what the slide does not show means nothing
    found, edge = method(section), 3 * FACTOR
    assert (found[:, :edge] == upsample(section.cells, FACTOR)[:, :edge]).all()
    assert (np.abs(found - truth)[:, edge:].mean((1, 2)) < 0.03 * truth.std((1, 2))).all()


@pytest.mark.parametrize("method", [baselines.ridge, baselines.pls])
def test_without_a_slide_p_is_left(method, rng):
    section, _ = seen(rng, noise=0.5, covered=np.zeros(SHAPE, bool))
    assert (method(section) == upsample(section.cells, FACTOR)).all()
    assert (baselines.guided(section) == baselines.bicubic(section.cells, FACTOR)).all()


def test_pls_with_all_components_is_least_squares_and_with_none_the_mean(rng):
    x, y = rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(60, 4))
    x, y = x - x.mean(0), y - y.mean(0)
    path = baselines.pls_path(x, y)
    assert np.allclose(path[-1], np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-9)
    assert not path[0].any()
    left = [((y - x @ weights) ** 2).sum() for weights in path]
    assert (np.diff(left) < -1e-6).all()


def test_pls_of_one_component_is_the_direction_of_largest_covariance(rng):
    x, y = rng.normal(size=(60, 6)), rng.normal(size=(60, 1))
    x, y = x - x.mean(0), y - y.mean(0)
    direction = x.T @ y
    score = x @ direction
    assert np.allclose(baselines.pls_path(x, y)[1], direction * ((score.T @ y) / (score.T @ score)), atol=1e-12)


def test_pls_stops_where_features_repeat_each_other(rng):
    x = rng.normal(size=(60, 2))
    x = np.column_stack([x, x @ rng.normal(size=(2, 3)), np.zeros(60)])
    x = x - x.mean(0)
    y = rng.normal(size=(60, 2))
    path = baselines.pls_path(x, y - y.mean(0))
    assert np.isfinite(path).all()
    assert np.allclose(x @ path[-1], x @ np.linalg.lstsq(x, y - y.mean(0), rcond=None)[0], atol=1e-8)


def test_ridge_shrinks_more_with_a_larger_penalty(rng):
    x, y = rng.normal(size=(60, 6)), rng.normal(size=(60, 1))
    norms = np.linalg.norm(baselines.ridge_path(x, y), axis=(1, 2))
    assert (np.diff(norms) > 0).all()
    assert norms[0] < 0.05 * norms[-1]


def test_the_setting_is_chosen_on_blocks_left_out(rng):
    """Features that name the block fit every block, and predict none: the simplest setting wins."""
    blocks = np.repeat(np.arange(8), 10)
    x = np.eye(8)[blocks] + 1e-3 * rng.normal(size=(80, 8))
    y = rng.normal(size=(8, 1))[blocks] * 5
    inside = np.linalg.lstsq(np.column_stack([x, np.ones(80)]), y, rcond=None)[0]
    assert ((np.column_stack([x, np.ones(80)]) @ inside - y) ** 2).mean() < 0.01 * y.var()
    for path in (baselines.ridge_path, baselines.pls_path):
        fit = baselines.fit_linear(path, x, y, blocks)
        assert (x @ fit.weights + fit.offset).std() < 0.2 * y.std()
