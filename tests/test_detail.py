"""The detail planes: the same numbers whatever the tiles, nothing where nothing was seen or measured."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, minimum_filter

from deepfere.frame import Alignment, Displacement, SectionGrid
from deepfere.measured.operator import cell_means, expand, fill_missing, null_space, pad_edge, spline_coefficients
from deepfere.model.detail import COVERED, DetailModel, expand_seen
from deepfere.model.features import FEATURES, PLANES
from deepfere.model.guide import Cells, GuideSpec, features_of, stain_of
from deepfere.model.network import FusionNetwork
from deepfere.model.stain_types import StainTypes

WHITE = (240.0, 238.0, 242.0)
K = 3
TYPES, PRODUCTS = 4, 6
EACH = len(FEATURES) + TYPES + PRODUCTS
"""Regressors of a smoothing."""
CENTRE = np.array([0.2, 0.25, 0.3])


def smooth_planes(shape=(110, 120), seed=0):
    rng = np.random.default_rng(seed)
    planes = gaussian_filter(rng.standard_normal((len(PLANES), *shape)), (0, 1.5, 1.5))
    planes = 130 + 60 * planes / planes.std((1, 2), keepdims=True)
    planes[6] = 255
    return np.rint(np.clip(planes, 0, 255)).astype(np.uint8)


PLANES_OF_SLIDE = smooth_planes()


def read(r0, r1, c0, c1):
    assert 0 <= r0 < r1 <= PLANES_OF_SLIDE.shape[1]
    assert 0 <= c0 < c1 <= PLANES_OF_SLIDE.shape[2]
    return PLANES_OF_SLIDE[:, r0:r1, c0:c1]


def random_network(seed=0):
    torch.manual_seed(seed)
    network = FusionNetwork(len(FEATURES), K, width=8, depth=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    network.set_feature_scale(torch.full((len(FEATURES),), 0.3), torch.full((len(FEATURES),), 0.5))
    return network.eval()


def make(shape=(11, 9), factor=3, tier="T1", bent=False, seed=0, more_pitch=()):
    """A section that is turned by 25 degrees, a little larger than life, and hangs over the slide's edge."""
    rng = np.random.default_rng(seed)
    angle, scale = np.deg2rad(25), 1.07
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    grid = SectionGrid(shape, (30.0, 33.0))
    displacement = None
    if bent:
        displacement = Displacement((-110.0, -100.0), (110.0, 100.0), rng.uniform(-12, 12, (6, 6, 2)))
    alignment = Alignment(matrix, np.array([90.0, -20.0]), displacement)
    spacing = (30.0 / factor / 2.2, 33.0 / factor / 2.2)
    types = StainTypes(3 * rng.standard_normal((TYPES, len(FEATURES))), rng.standard_normal(TYPES))
    spec = GuideSpec(grid, factor, spacing, PLANES_OF_SLIDE.shape[1:], WHITE, 0.15, types, more_pitch)
    mask = rng.random(shape) < 0.9
    factors = fill_missing(rng.standard_normal((K, *shape)), mask)
    network = random_network(seed) if tier == "T2" else None
    return DetailModel(
        spec,
        alignment,
        rng.standard_normal((EACH * len(spec.smoothings_pitch) + (network.regressors if network else 0), K)),
        CENTRE,
        network,
        np.array([1.0, 0.4, 0.0]),
        spline_coefficients(factors),
        mask,
    )


def whole_of(model):
    ny, nx = model.spec.grid.shape_px
    return model.window(read, Cells(0, ny, 0, nx))


@pytest.mark.parametrize("more_pitch", [(), (0.0, 0.6)])
@pytest.mark.parametrize("tier", ["T1", "T2"])
@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize(("shape", "factor"), [((11, 9), 3), ((7, 10), 4)])
def test_tiles_equal_the_whole(tier, bent, shape, factor, more_pitch):
    model = make(shape, factor, tier, bent, more_pitch=more_pitch)
    whole, cover = whole_of(model)
    sd = whole[:2].std()
    assert sd > 0.05
    for side in (1, 2, 3, 5, 8):
        tiled, tiled_cover = np.full_like(whole, np.nan), np.full_like(cover, np.nan)
        for i0 in range(0, shape[0], side):
            for j0 in range(0, shape[1], side):
                cells = Cells(i0, min(i0 + side, shape[0]), j0, min(j0 + side, shape[1]))
                rows, cols = slice(i0 * factor, cells.i1 * factor), slice(j0 * factor, cells.j1 * factor)
                tiled[:, rows, cols], tiled_cover[rows, cols] = model.window(read, cells)
        assert np.abs(tiled - whole).max() <= 1e-6 * max(1.0, sd), side
        np.testing.assert_allclose(tiled_cover, cover, atol=1e-6)


def test_smoothings_are_those_of_models_that_have_one_each():
    """Each factor's weights lie on one smoothing: its plane is that of the model with this one alone."""
    both = make(more_pitch=(0.6,))
    own = np.array([0, 1, 1])
    weights = both.weights.copy()
    for k, group in enumerate(own):
        weights[(1 - group) * EACH : (2 - group) * EACH, k] = 0
    together, _ = whole_of(replace(both, weights=weights))
    for group, smoothing in enumerate((0.15, 0.6)):
        spec = replace(both.spec, smoothing_pitch=smoothing, more_pitch=())
        alone, _ = whole_of(replace(both, spec=spec, weights=both.weights[group * EACH : (group + 1) * EACH]))
        np.testing.assert_allclose(together[own == group], alone[own == group], atol=2e-6)
        assert np.abs(together[:2][own[:2] != group] - alone[:2][own[:2] != group]).max() > 0.01
    kept = both.spec.to_dict()
    assert GuideSpec.from_dict(json.loads(json.dumps(kept))).to_dict() == kept and kept["more_pitch"] == [0.6]


@pytest.mark.parametrize("tier", ["T1", "T2"])
@pytest.mark.parametrize("more_pitch", [(), (0.6,)])
def test_the_stain_comes_from_the_same_look(tier, more_pitch):
    """As it is alone, whatever context the model needs."""
    model = make(tier=tier, more_pitch=more_pitch)
    for cells in (Cells(0, 11, 0, 9), Cells(3, 7, 4, 9)):
        detail, cover, stain = model.with_stain(read, cells)
        np.testing.assert_array_equal(detail, model.window(read, cells)[0])
        alone, shown = stain_of(model.spec, read, model.alignment, cells)
        assert stain.dtype == np.uint8 and stain.shape == (3, *cover.shape) and np.ptp(stain) > 100
        assert np.abs(stain - alone.numpy()).max() <= 0.501
        np.testing.assert_allclose(cover, shown, atol=1e-6)


@pytest.mark.parametrize("tier", ["T1", "T2"])
def test_detail_has_no_cell_means(tier):
    whole, _ = whole_of(make(tier=tier))
    assert np.abs(cell_means(whole.astype(np.float64), 3)).max() < 1e-6


def test_detail_is_zero_where_not_covered_or_not_measured():
    model = make()
    whole, cover = whole_of(model)
    seen = cell_means(cover.astype(np.float64), 3) >= COVERED
    assert 0.3 < seen.mean() < 0.95, "the case must leave part of the section uncovered"
    usable = seen & model.mask
    power = cell_means(whole[0].astype(np.float64) ** 2, 3)
    assert (power[usable] > 0).all()
    assert not power[~usable].any()
    # The factor whose gate is closed has no detail at all; nothing is undefined.
    assert not whole[2].any()
    assert np.isfinite(whole).all()


def test_cover_follows_the_geometry():
    model = make()
    _, cover = whole_of(model)
    slide = model.alignment.map(model.spec.grid.refine(3).centres_um())
    high = np.array(model.spec.planes_shape) * np.array(model.spec.spacing_um)
    inside = ((slide > 0) & (slide < high)).all(-1)
    # Pixels whose centre is farther from the edge than their own size are all or nothing.
    distance = np.minimum(slide, high - slide).min(-1)
    clear = np.abs(distance) > 12
    np.testing.assert_allclose(cover[clear], inside[clear], atol=1e-6)


@pytest.mark.parametrize("tier", ["T1", "T2"])
def test_against_the_definition(tier):
    """``(I - P A) G d`` computed plainly on the whole section."""
    model = make(tier=tier)
    spec, f = model.spec, 3
    ny, nx = spec.grid.shape_px
    context = model.network.radius_px if model.network else 0
    features, cover = features_of(spec, read, model.alignment, Cells(0, ny, 0, nx), context)
    inner = slice(context, features.shape[1] - context), slice(context, features.shape[2] - context)
    stain = features.double().numpy()
    np.testing.assert_allclose(stain[len(FEATURES) :].sum(0), 1, atol=1e-6)
    levels = expand(pad_edge(model.coefficients), f)[: PRODUCTS // 3]
    regressors = list(stain[:, *inner])
    regressors += [level * (stain[n, *inner] - CENTRE[n]) for level in levels for n in range(3)]
    if model.network is not None:
        far = -(-context // f)
        b = np.pad(model.coefficients, [(0, 0), (far + 1, far + 1), (far + 1, far + 1)], mode="edge")
        up = expand(b, f)
        cut = far * f - context
        up = torch.from_numpy(up[:, cut : up.shape[1] - cut, cut : up.shape[2] - cut]).double()
        with torch.no_grad():
            stained = features.double()[None, : len(FEATURES)]
            more = model.network.double().regress(stained, up[None])[0]
            np.testing.assert_array_equal(more[:K], model.network(stained, up[None])[0])
        regressors += list(more.numpy())
        cover = cover[context:-context, context:-context]
        model.network.float()
    d = np.einsum("fyx,fk->kyx", np.stack(regressors), model.weights)
    gated = d * model.gate[:, None, None]
    seen = cell_means(cover.double().numpy(), f) >= COVERED
    expected = gated - expand_seen(pad_edge(cell_means(gated, f)), pad_edge(seen), f)
    inner = np.repeat(np.repeat(minimum_filter(seen, 3, mode="nearest"), f, 0), f, 1)
    assert inner.mean() > 0.2 and not seen.all()
    np.testing.assert_allclose(expected[:, inner], null_space(gated, f)[:, inner], atol=1e-6)
    usable = seen & model.mask
    expected *= np.repeat(np.repeat(usable, f, 0), f, 1)
    found, _ = whole_of(model)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


def test_upsampled_context_matches_p():
    model = make(tier="T2")
    cells = Cells(2, 6, 3, 7)
    for context in (0, 1, 3, 7):
        wide = model.upsampled(cells, context).numpy()
        whole = expand(pad_edge(model.coefficients), 3)
        assert wide.shape == (K, 12 + 2 * context, 12 + 2 * context)
        inner = wide[:, context : context + 12, context : context + 12]
        np.testing.assert_allclose(inner, whole[:, 6:18, 9:21], atol=1e-5)
    beyond = model.upsampled(Cells(0, 2, 0, 2), 4).numpy()
    assert np.isfinite(beyond).all()


def test_scaling_the_gate_scales_the_detail():
    model = make()
    half = DetailModel(**{**model.__dict__, "gate": model.gate / 2})
    np.testing.assert_allclose(whole_of(half)[0], whole_of(model)[0] / 2, atol=1e-6)
