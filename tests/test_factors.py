"""Noise-weighted factors."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.measured.factors import Moments, factor_weight, factorise, noise_sd
from deepfere.measured.tolerance import Tolerance
from deepfere.pipeline.given import GivenModel, given_factoring


def section(seed, ions=6, shape=(14, 15), rank=3, noise=0.0):
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
    maps = np.stack([np.sin(3 * y + x), np.cos(4 * x - y), y * x, x**2][:rank])
    loadings = np.random.default_rng(99).uniform(0.2, 2.0, (ions, rank)) * (10.0 ** np.arange(ions))[:, None] ** 0.3
    cube = np.tensordot(loadings, maps, axes=1) + 5.0
    mask = rng.random(shape) < 0.85
    return cube + noise * loadings[:, :1, None] * rng.standard_normal(cube.shape), mask


def test_full_rank_factors_reconstruct_every_ion():
    rng = np.random.default_rng(0)
    cube, mask = rng.gamma(2.0, 3.0, (5, 12, 13)), np.random.default_rng(1).random((12, 13)) < 0.8
    (f,) = factorise([cube], [mask], max_factors=5)
    assert f.images.shape == (5, 12, 13)
    mean = cube[:, mask].mean(1)
    np.testing.assert_allclose(mean[:, None] + f.basis @ f.images[:, mask], cube[:, mask], atol=1e-9)
    np.testing.assert_allclose(f.explained, 1.0, atol=1e-9)
    # Unit variance, uncorrelated, zero outside.
    np.testing.assert_allclose(np.cov(f.images[:, mask], ddof=0), np.eye(5), atol=1e-9)
    assert not f.images[:, ~mask].any()


def test_low_rank_data_need_only_their_rank():
    cube, mask = section(0)
    (f,) = factorise([cube], [mask], max_factors=6)
    assert f.images.shape[0] == 3
    rebuilt = cube[:, mask].mean(1)[:, None] + f.basis @ f.images[:, mask]
    np.testing.assert_allclose(rebuilt, cube[:, mask], rtol=1e-5)


def test_sections_share_one_basis():
    (a, ma), (b, mb) = section(1, noise=0.1), section(2, shape=(9, 20), noise=0.1)
    one, two = factorise([a, b], [ma, mb], max_factors=6)
    assert one.basis is two.basis or np.array_equal(one.basis, two.basis)
    assert one.images.shape[1:] == ma.shape
    assert two.images.shape[1:] == mb.shape
    mean = np.concatenate([a[:, ma], b[:, mb]], 1).mean(1)
    for cube, mask, f in ((a, ma, one), (b, mb, two)):
        np.testing.assert_allclose(mean[:, None] + f.basis @ f.images[:, mask], cube[:, mask], atol=1e-8)
    pooled = np.concatenate([one.images[:, ma], two.images[:, mb]], 1)
    np.testing.assert_allclose(pooled.std(1), 1.0, atol=1e-9)


def test_what_lies_outside_the_mask_does_not_matter():
    cube, mask = section(3, noise=0.1)
    other = np.where(mask, cube, np.nan)
    (a,), (b,) = factorise([cube], [mask], 4), factorise([other], [mask], 4)
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.basis, b.basis)
    np.testing.assert_array_equal(noise_sd(cube, mask), noise_sd(other, mask))


def test_sign_and_order_are_fixed():
    cube, mask = section(4, noise=0.1)
    (a,), (b,) = factorise([cube], [mask], 4), factorise([cube.copy()], [mask.copy()], 4)
    np.testing.assert_array_equal(a.images, b.images)
    weighted = a.basis / a.noise_sd[:, None]
    assert (weighted[np.abs(weighted).argmax(0), np.arange(4)] > 0).all()
    # Leading factors carry more signal to noise.
    assert (np.diff(factor_weight(a)) <= 1e-9).all()


def test_number_of_factors_is_bounded():
    cube, mask = np.random.default_rng(5).random((40, 10, 10)), np.ones((10, 10), bool)
    assert factorise([cube], [mask], 64)[0].images.shape[0] == 10  # a tenth of the pixels
    assert factorise([cube], [mask], 7)[0].images.shape[0] == 7
    assert factorise([cube[:3]], [mask], 64)[0].images.shape[0] == 3  # no more than ions


def test_units_of_an_ion_do_not_matter():
    cube, mask = section(6, noise=0.2)
    scale = np.array([1, 1e-6, 1e3, 1, 1e6, 1.0])
    (a,), (b,) = factorise([cube], [mask], 3), factorise([cube * scale[:, None, None]], [mask], 3)
    np.testing.assert_allclose(b.images, a.images, atol=1e-6)
    np.testing.assert_allclose(b.basis, a.basis * scale[:, None], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(b.explained, a.explained, atol=1e-6)


def test_constant_and_empty_ions_get_no_loading():
    cube, mask = section(7, noise=0.1)
    cube[1], cube[4] = 3.0, 0.0
    (f,) = factorise([cube], [mask], 6)
    np.testing.assert_allclose(f.basis[[1, 4]], 0.0, atol=1e-12)
    assert (f.explained[[1, 4]] == 0).all()
    assert np.isfinite(f.images).all()
    (nothing,) = factorise([np.zeros((3, 8, 8))], [np.ones((8, 8), bool)], 3)
    assert np.isfinite(nothing.images).all()
    assert not nothing.basis.any()


def test_noise_is_measured_on_top_of_smooth_signal():
    rng = np.random.default_rng(8)
    y, x = np.meshgrid(np.linspace(0, 3, 60), np.linspace(0, 3, 70), indexing="ij")
    signal = 50 * np.sin(y) * np.cos(x)
    cube = np.stack([signal + sd * rng.standard_normal(signal.shape) for sd in (1.0, 0.3, 5.0)])
    mask = rng.random(signal.shape) < 0.9
    np.testing.assert_allclose(noise_sd(cube, mask), [1.0, 0.3, 5.0], rtol=0.08)
    assert noise_sd(np.zeros((1, 5, 5)), np.ones((5, 5), bool))[0] == 0


def test_noise_of_a_sparse_ion_is_not_zero():
    cube = np.zeros((1, 30, 30))
    cube[0, ::6, ::6] = 10.0
    assert noise_sd(cube, np.ones((30, 30), bool))[0] > 0
    # Fewer than three rows: only the other axis can tell.
    thin = np.random.default_rng(0).standard_normal((1, 2, 4000))
    assert noise_sd(thin, np.ones((2, 4000), bool))[0] == pytest.approx(1.0, rel=0.06)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    cube, mask = section(9, noise=0.3, shape=(120, 110))
    upper = mask & (np.arange(120)[:, None] < 37)
    whole = Moments.of(cube, mask)
    parts = Moments.sum([Moments.of(cube, upper), Moments.of(cube, mask & ~upper)])
    table = cube[:, mask]
    assert whole.pixels == parts.pixels == mask.sum()
    for found in (whole, parts):
        np.testing.assert_allclose(found.mean, table.mean(1), rtol=1e-12)
        np.testing.assert_allclose(found.products, np.cov(table, ddof=0) * mask.sum(), rtol=1e-9)


def test_factors_of_a_given_basis_are_noise_weighted_least_squares():
    cube, mask = section(10, noise=0.3)
    (own,) = factorise([cube], [mask], 2)
    model = GivenModel(None, np.arange(6.0) + 500, own.basis, own.noise_sd, [], 0, 0.2, "")  # type: ignore[arg-type]
    moments = Moments.of(cube, mask)
    found = given_factoring(model, moments, model.mz, Tolerance(5.0), "here").factors(cube, mask)
    table = (cube[:, mask] - cube[:, mask].mean(1, keepdims=True)) / own.noise_sd[:, None]
    scores = np.linalg.lstsq(own.basis / own.noise_sd[:, None], table, rcond=None)[0]
    np.testing.assert_allclose(found.images[:, mask], scores, atol=1e-9)
    left = (table - own.basis / own.noise_sd[:, None] @ scores).var(1) / table.var(1)
    np.testing.assert_allclose(found.explained, 1 - left, atol=1e-9)
    with pytest.raises(InputError, match="the model knows 6 ions, the section has 6 others"):
        given_factoring(model, moments, model.mz + 0.1, Tolerance(5.0), "here")
