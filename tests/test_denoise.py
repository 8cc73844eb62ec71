"""The denoised mode: predictions that never see a pixel's own noise, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from deepfere.alignment.score import spatial_blocks
from deepfere.model.denoise import (
    LEAST_NOISE,
    LEAST_PX,
    LEAST_TOLD_PX,
    UNSEEN,
    Denoised,
    Predictor,
    denoise,
    most_noise,
    noisiness,
)
from deepfere.model.uncertainty import averaged_ratio, without_centre

SHAPE = (36, 33)


def section(seed: int, counts: float = 60.0):
    """Twelve ions of three maps (one of them sharp, which the stain shows), counted; a hot spot in the last."""
    rng = np.random.default_rng(seed)
    smooth = [gaussian_filter(rng.standard_normal(SHAPE), 5) for _ in range(2)]
    sharp = gaussian_filter(rng.standard_normal(SHAPE), 0.7)
    maps = np.stack([(m - m.min()) / np.ptp(m) for m in (*smooth, sharp)])
    truth = np.einsum("mk,kyx->myx", rng.uniform(0.1, 1, (12, 3)), maps)
    truth[-1] = 0.02
    truth[-1, 20, 14] = 1.0
    truth *= 50.0
    noisy = rng.poisson(truth * counts / 50) * 50 / counts
    mask = np.ones(SHAPE, bool)
    mask[:6, :9] = False
    features = np.stack([sharp + 0.1 * rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)])
    return truth, noisy, mask, features


def errors(image, truth, mask):
    return ((image - truth) ** 2)[:, mask].mean(1)


@pytest.mark.parametrize("counts", [10.0, 60.0, 400.0])
@pytest.mark.parametrize("seed", range(2))
def test_less_noise_in_every_ion(seed, counts):
    truth, noisy, mask, features = section(seed, counts)
    out = denoise(noisy, mask, features, 0)
    before, after = errors(noisy, truth, mask), errors(out.images, truth, mask)
    assert (after[:-1] < before[:-1]).all()
    assert np.median(after[:-1] / before[:-1]) < 0.75
    assert (out.images >= 0).all() and out.images.dtype == np.float32
    assert not out.images[:, ~mask].any()
    assert 0.85 < np.median(out.chi_square[:-1]) < 1.15


def test_structure_without_noise_is_not_taken_for_noise():
    """Nothing counted, no ion that says what one count is worth, and as rough as the pixels allow."""
    rng = np.random.default_rng(6)
    rough = np.stack([gaussian_filter(rng.standard_normal(SHAPE), 1.2) for _ in range(6)])
    cube = 1.0 + 0.2 * rough / rough.std((1, 2), keepdims=True)
    mask = np.ones(SHAPE, bool)
    assert noisiness(cube, mask) == 0
    np.testing.assert_array_equal(denoise(cube, mask, None, 0).images, cube.astype(np.float32))


def test_noise_falls_to_a_quarter_where_pixels_are_averaged():
    rng = np.random.default_rng(7)
    mask = np.ones((80, 70), bool)
    mask[:9, :20] = False
    noise = rng.poisson(100.0, (5, *mask.shape)).astype(np.float64)
    assert np.median([averaged_ratio(image, mask) for image in noise]) == pytest.approx(0.25, abs=0.06)
    assert noisiness(noise, mask) == 1
    assert np.isnan(averaged_ratio(noise[0], np.zeros_like(mask)))
    assert noisiness(noise, np.zeros_like(mask)) == 0


def test_a_hot_spot_that_nothing_else_shows_stands():
    _, noisy, mask, features = section(3)
    out = denoise(noisy, mask, features, 0)
    assert out.images[-1, 20, 14] == pytest.approx(noisy[-1, 20, 14], rel=0.02)


def test_it_works_without_the_stain_and_knows_no_order_of_units():
    truth, noisy, mask, _ = section(4)
    out = denoise(noisy, mask, None, 0)
    assert (errors(out.images, truth, mask) < errors(noisy, truth, mask))[:-1].all()
    # As in real files, where intensities are counts times anything.
    # (A power of two: counts that are equal stay equal.)
    scaled = denoise(noisy * 2**17, mask, None, 0)
    np.testing.assert_allclose(scaled.images, out.images * 2**17, rtol=1e-4, atol=1e-2)


def test_what_has_no_noise_is_left_alone():
    smooth = 5 + gaussian_filter(np.random.default_rng(0).standard_normal((3, *SHAPE)), (0, 8, 8))
    mask = np.ones(SHAPE, bool)
    flat = np.stack([np.zeros(SHAPE), np.full(SHAPE, 7.0)])
    out = denoise(np.concatenate([smooth, flat]), mask, None, 0)
    np.testing.assert_allclose(out.images[:3], smooth, rtol=2e-3)
    np.testing.assert_array_equal(out.images[3:], flat.astype(np.float32))
    assert np.isnan(out.chi_square[3:]).all()


def test_too_few_pixels_are_left_alone():
    cube = np.random.default_rng(0).poisson(9.0, (4, 18, 19)).astype(float)
    mask = np.zeros((18, 19), bool)
    mask.ravel()[: LEAST_PX - 1] = True
    out = denoise(cube, mask, None, 0)
    np.testing.assert_array_equal(out.images, np.where(mask, cube, 0).astype(np.float32))
    assert np.isnan(out.chi_square).all() and not out.noise_share.any()


def test_pixels_that_never_touch_are_no_reason_to_fail():
    cube = np.random.default_rng(1).poisson(9.0, (6, 70, 60)).astype(float)
    mask = np.zeros((70, 60), bool)
    mask[::2, ::2] = True
    out = denoise(cube, mask, None, 0)
    assert np.isfinite(out.images[:, mask]).all() and np.isfinite(out.noise_share).all()


def told(counts: float, side: int = 30):
    """Nine sparse ions that show the detector's pulse, and one of many counts that is all fine structure."""
    rng = np.random.default_rng(8)
    edges = np.where(rng.random((10, side, side)) < 0.5, 0.3, 6.0)
    edges[-1] = 1000.0 * rng.uniform(0.7, 1.3, (side, side))
    return edges, rng.poisson(edges * counts) / counts, np.ones((side, side), bool)


def test_structure_is_not_taken_for_noise_where_other_ions_tell_the_noise():
    truth, noisy, mask = told(1.0)
    out = denoise(noisy, mask, None, 0)
    alone = denoise(noisy[-1:], mask, None, 0)
    assert errors(out.images[-1:], truth[-1:], mask) < 1.1 * errors(noisy[-1:], truth[-1:], mask)
    assert errors(alone.images, truth[-1:], mask) > 2 * errors(noisy[-1:], truth[-1:], mask)


def test_fewer_pixels_suffice_where_the_ions_tell_the_noise():
    _, noisy, _ = told(1.0)
    mask = np.zeros(noisy.shape[1:], bool)
    mask[:10, :10] = True
    assert LEAST_TOLD_PX < mask.sum() < LEAST_PX
    assert denoise(noisy, mask, None, 0).noise_share[:-1].all()
    assert not denoise(noisy[:4], mask, None, 0).noise_share.any(), "too few ions to tell it"
    mask[5:] = False
    assert not denoise(noisy, mask, None, 0).noise_share.any()


def test_unmeasured_pixels_do_not_matter():
    _, noisy, mask, features = section(5)
    spoilt = np.where(mask, noisy, 1e9)
    a, b = denoise(noisy, mask, features, 0), denoise(spoilt, mask, features, 0)
    np.testing.assert_array_equal(a.images, b.images)


@pytest.mark.parametrize("scale", [0.6, 1.4, 4.5])
def test_the_average_around_a_pixel_never_sees_it(scale):
    rng = np.random.default_rng(1)
    image, mask = rng.random(SHAPE), rng.random(SHAPE) < 0.8
    mask[10, 11] = True
    other = image.copy()
    other[10, 11] = 50.0
    assert without_centre(other, mask, scale)[10, 11] == pytest.approx(
        without_centre(image, mask, scale)[10, 11], abs=1e-6
    )
    np.testing.assert_allclose(without_centre(np.full(SHAPE, 3.0), mask, scale)[mask], 3.0)
    lonely = np.zeros(SHAPE, bool)
    lonely[4, 4] = True
    assert without_centre(image, lonely, scale)[4, 4] == 0


def test_a_block_is_predicted_without_itself(monkeypatch):
    monkeypatch.setattr("deepfere.model.denoise.PENALTIES", (1e-3,))
    rng = np.random.default_rng(2)
    block = spatial_blocks(np.ones(SHAPE, bool), 4).ravel()
    x = rng.standard_normal((block.size, 5))
    y = x @ rng.standard_normal(5) + 0.1 * rng.standard_normal(block.size)
    other = y.copy()
    other[block == 3] += 100.0
    predictor = Predictor(x[:, 1:], block)
    a, b = predictor(x[:, :1], y), predictor(x[:, :1], other)
    np.testing.assert_allclose(a[block == 3], b[block == 3], atol=1e-9)
    assert np.abs(a - b)[block != 3].max() > 1
    assert np.corrcoef(a, y)[0, 1] > 0.99
    # A column that says nothing, or is the same everywhere, does no harm.
    wide = np.column_stack([x, np.full(block.size, 3.0)])
    assert np.corrcoef(Predictor(wide[:, 3:], block)(wide[:, :3], y), y)[0, 1] > 0.99


def test_it_survives_its_file_and_repeats(tmp_path):
    _, noisy, mask, features = section(6)
    out = denoise(noisy, mask, features, 1)
    out.save(tmp_path / "d.npz")
    back = Denoised.load(tmp_path / "d.npz")
    again = denoise(noisy, mask, features, 1)
    for name in ("images", "chi_square", "noise_share"):
        np.testing.assert_array_equal(getattr(back, name), getattr(out, name))
        np.testing.assert_array_equal(getattr(again, name), getattr(out, name))


def test_structure_of_single_pixels_is_not_taken_for_noise(monkeypatch):
    """Nuclei by the pixel: neighbours know nothing of it, the stain and other ions nearly all."""
    rng = np.random.default_rng(8)
    nuclei = rng.gamma(4.0, 0.25, SHAPE)
    truth = np.stack([nuclei * (1 + 0.1 * rng.standard_normal(SHAPE)) for _ in range(4)])
    smooth = np.stack([1.5 + 0.2 * gaussian_filter(rng.standard_normal(SHAPE), 4) for _ in range(8)])
    truth = np.concatenate([truth, smooth])
    # Scaled to their own intensities, so that no ion says what one count of another is worth.
    noisy = rng.poisson(np.maximum(truth, 0) * 400) / 400
    mask, features = np.ones(SHAPE, bool), np.stack([nuclei, rng.standard_normal(SHAPE)])
    out = denoise(noisy, mask, features, 0)
    change = errors(out.images, truth, mask) / errors(noisy, truth, mask)
    assert (change[:4] < 1.0).all() and (change[4:] < 0.6).all()
    monkeypatch.setattr("deepfere.model.denoise.most_noise", lambda *_: np.inf)
    assert (
        errors(denoise(noisy, mask, features, 0).images, truth, mask)[:4] > 1.5 * errors(noisy, truth, mask)[:4]
    ).all()


def test_residuals_bound_the_noise():
    level = np.linspace(1.0, 3.0, 600)
    # Residuals of counting noise of 0.2 an intensity: all of it may be noise where neighbours predict as well.
    assert most_noise(0.2 * level, level, 0.4) == pytest.approx(0.2, rel=1e-6)
    assert most_noise(0.2 * level, level, 0.2) == pytest.approx(0.2, rel=1e-6)
    # Half of what neighbours leave is found elsewhere.
    assert most_noise(0.2 * level, level, 0.8) == pytest.approx(0.2 * (1 - UNSEEN), rel=1e-6)
    assert most_noise(0.2 * level, level, 80.0) == pytest.approx(0.2 * LEAST_NOISE, rel=1e-6)
    # Structure at some level does not hide that there is little at another.
    assert most_noise(np.where(level > 2, 5.0, 0.1) * level, level, 1.0) < 0.11
    assert most_noise(np.zeros(600), level, 0.0) == most_noise(np.zeros(600), level, 1.0) == 0.0
    assert most_noise(np.ones(3), np.ones(3), 1.0) == 1.0


@pytest.mark.parametrize("counts", [10, 30, 100])
def test_an_ion_that_is_absent_in_places_is_denoised_where_it_is(counts):
    """Nothing varies where it is absent, which says nothing about the noise elsewhere."""
    rng = np.random.default_rng(0)
    maps = np.stack([gaussian_filter(rng.standard_normal(SHAPE), 4) for _ in range(6)])
    maps = (maps - maps.min((1, 2), keepdims=True)) / np.ptp(maps, axis=(1, 2))[:, None, None] + 0.2
    maps[:3, :, 11:] = 0
    truth = np.concatenate([maps, 0.7 * maps[3:]])
    # In units of each ion's own, so that none tells what one count of another is worth.
    unit = rng.permutation(np.geomspace(0.1, 1000, len(truth)))[:, None, None] / counts
    noisy, mask = rng.poisson(truth * counts) * unit, np.ones(SHAPE, bool)
    out = denoise(noisy, mask, None, 0)
    change = errors(out.images, truth * unit * counts, mask) / errors(noisy, truth * unit * counts, mask)
    assert (change[:3] < 0.7).all()
