"""From RGB to planes to features, and the geometry of a feature window."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from deepfere.frame import Alignment, SectionGrid
from deepfere.measured.operator import cell_means
from deepfere.model.detail import pooled_window
from deepfere.model.features import (
    FEATURES,
    PLANES,
    StainReference,
    base_planes,
    optical_density,
    otsu,
    raw_features,
    smooth,
    smoothing_radius,
    stain_reference,
)
from deepfere.model.guide import SUPERSAMPLE, Cells, GuideSpec, features_of

WHITE = (240.0, 238.0, 242.0)
REFERENCE = StainReference(WHITE, 0.1, 0.2)
quick = settings(max_examples=20, deadline=None)


def test_optical_density_by_hand():
    rgb = np.array([[240, 238, 242], [23, 22, 23], [255, 255, 255]], np.uint8)
    od = optical_density(rgb, WHITE)
    np.testing.assert_allclose(od[0], 0.0, atol=1e-6)
    np.testing.assert_allclose(od[1], np.log10([241 / 24, 239 / 23, 243 / 24]), rtol=1e-5)
    np.testing.assert_array_equal(od[2], 0.0)  # brighter than glass is glass


def test_otsu_splits_two_heaps():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.1, 0.02, 3000), rng.normal(0.6, 0.05, 1000)])
    assert 0.16 < otsu(values) < 0.5
    assert np.isfinite(otsu(np.full(10, 0.3)))


def two_colour_slide(seed=0, shape=(64, 80)):
    """Glass, eosin-like tissue in the middle, and dark blue nuclei in it."""
    rng = np.random.default_rng(seed)
    rgb = np.broadcast_to(np.array(WHITE), (*shape, 3)).copy()
    tissue = np.zeros(shape, bool)
    tissue[12:52, 14:66] = True
    nuclei = tissue & (rng.random(shape) < 0.15)
    rgb[tissue] = [215, 140, 180]
    rgb[nuclei] = [90, 60, 140]
    return np.clip(rgb + rng.normal(0, 2, rgb.shape), 0, 255).astype(np.uint8), tissue, nuclei


def test_reference_finds_glass_tissue_and_nuclei():
    rgb, tissue, nuclei = two_colour_slide()
    reference = stain_reference(rgb, np.ones(tissue.shape))
    np.testing.assert_allclose(reference.white, WHITE, atol=4)
    od = optical_density(rgb, reference.white)
    np.testing.assert_array_equal(od.mean(2) > reference.tissue_od, tissue)
    np.testing.assert_array_equal((od[..., 0] > reference.nuclear_od) & tissue, nuclei)
    again = StainReference.from_dict(reference.to_dict())
    assert again == reference
    # What lies beyond the slide (black padding) does not move the thresholds.
    padded = np.concatenate([rgb, np.zeros_like(rgb)])
    cover = np.concatenate([np.ones(tissue.shape), np.zeros(tissue.shape)])
    assert stain_reference(padded, cover) == reference


def test_reference_of_blank_glass_is_finite():
    reference = stain_reference(np.full((20, 20, 3), 240, np.uint8), np.ones((20, 20)))
    assert np.isfinite([*reference.white, reference.tissue_od, reference.nuclear_od]).all()
    assert reference.tissue_od > 0
    planes = base_planes(np.full((4, 4, 3), 240, np.uint8), np.ones((4, 4)), 2, reference)
    assert not planes[3:6].any()


def test_base_planes_by_hand():
    rgb = np.full((4, 8, 3), np.array(WHITE), np.uint8)
    rgb[:, 4:] = [90, 60, 140]
    rgb[:2, 4:6] = np.array(WHITE)
    coverage = np.ones((4, 8))
    coverage[:, :2] = 0.0
    planes = base_planes(rgb, coverage, 4, REFERENCE)
    assert planes.shape == (len(PLANES), 1, 2)
    assert planes.dtype == np.uint8
    np.testing.assert_array_equal(planes[:3, 0, 0], np.array(WHITE))
    assert planes[3, 0, 0] == 0  # no texture on glass
    assert planes[5, 0].tolist() == [0, round(255 * 0.75)]
    assert planes[6, 0].tolist() == [round(255 * 0.5), 255]
    dark = optical_density(np.array([90, 60, 140]), WHITE)
    share = 0.75
    spread = dark.mean() * np.sqrt(share * (1 - share))
    assert abs(int(planes[3, 0, 1]) - spread * 400) <= 1
    assert abs(int(planes[4, 0, 1]) - 255 * share) <= 1
    colour = share * np.array([90, 60, 140]) + (1 - share) * np.array(WHITE)
    np.testing.assert_allclose(planes[:3, 0, 1], colour, atol=0.51)


def test_base_planes_do_not_depend_on_where_the_reading_starts():
    rgb, tissue, _ = two_colour_slide()
    whole = base_planes(rgb, tissue.astype(float), 4, REFERENCE)
    part = base_planes(rgb[16:48, 8:40], tissue[16:48, 8:40].astype(float), 4, REFERENCE)
    np.testing.assert_array_equal(part, whole[:, 4:12, 2:10])


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 2.4])
def test_smoothing_equals_scipy(sigma):
    image = np.random.default_rng(1).standard_normal((1, 3, 40, 44))
    radius = smoothing_radius(sigma)
    assert radius == int(np.ceil(3 * sigma))
    out = smooth(torch.from_numpy(image), sigma).numpy()
    expected = image
    if sigma:
        for axis in (2, 3):
            expected = gaussian_filter1d(expected, sigma, axis=axis, radius=radius)
    np.testing.assert_allclose(out, expected[..., radius : 40 - radius, radius : 44 - radius], atol=1e-12)


def random_planes(seed=0, shape=(60, 70)):
    planes = np.random.default_rng(seed).integers(20, 240, (len(PLANES), *shape)).astype(np.uint8)
    planes[6] = 255
    return planes


def test_features_by_hand():
    planes = random_planes(3, (5, 6))
    features = raw_features(torch.from_numpy(planes[None].astype(np.float32)), WHITE)[0].numpy()
    assert len(features) == len(FEATURES)
    od = optical_density(planes[:3].transpose(1, 2, 0), WHITE)
    by_name = dict(zip(FEATURES, features, strict=True))
    np.testing.assert_allclose(by_name["od_green"], od[..., 1], atol=1e-6)
    np.testing.assert_allclose(by_name["od_blue^2"], od[..., 2] ** 2, atol=1e-6)
    np.testing.assert_allclose(by_name["od_red*od_green"], od[..., 0] * od[..., 1], atol=1e-6)
    np.testing.assert_allclose(by_name["od_red*od_blue"], od[..., 0] * od[..., 2], atol=1e-6)
    np.testing.assert_allclose(by_name["texture"], planes[3] / 100, atol=1e-6)
    np.testing.assert_allclose(by_name["nuclear"], planes[4] / 255, atol=1e-6)
    np.testing.assert_allclose(by_name["tissue"], planes[5] / 255, atol=1e-6)


SPEC = GuideSpec(SectionGrid((7, 5), (30.0, 24.0)), 3, (4.0, 4.0), (60, 70), WHITE, 0.15)
TURNED = Alignment(np.array([[0.9, -0.25], [0.3, 1.0]]), np.array([40.0, 30.0]))


def test_spec_survives_plain_values():
    assert GuideSpec.from_dict(SPEC.to_dict()) == SPEC


@pytest.mark.parametrize("context", [0, 4])
def test_sample_points_of_a_window_are_those_of_the_whole(context):
    r, s, f = SPEC.radius_px, SUPERSAMPLE, SPEC.factor
    whole = SPEC.points_um(Cells(0, 7, 0, 5), context)
    assert whole.shape == ((21 + 2 * (context + r)) * s, (15 + 2 * (context + r)) * s, 2)
    # The middle of the s x s points of HR pixel (0, 0) is its centre.
    first = whole[(context + r) * s :, (context + r) * s :][:s, :s].mean((0, 1))
    np.testing.assert_allclose(first, [5.0, 4.0], atol=1e-12)
    part = SPEC.points_um(Cells(2, 4, 1, 3), context)
    start = (2 * f * s, 1 * f * s)
    expected = whole[start[0] : start[0] + part.shape[0], start[1] : start[1] + part.shape[1]]
    np.testing.assert_array_equal(part, expected)


@quick
@given(
    i0=st.integers(-2, 6), j0=st.integers(-2, 4), h=st.integers(1, 4), w=st.integers(1, 4), context=st.integers(0, 5)
)
def test_features_of_a_window_equal_the_whole(i0, j0, h, w, context):
    planes = random_planes()

    def read(r0, r1, c0, c1):
        return planes[:, r0:r1, c0:c1]

    whole, cover = features_of(SPEC, read, TURNED, Cells(-4, 12, -4, 10), 5)
    part, part_cover = features_of(SPEC, read, TURNED, Cells(i0, i0 + h, j0, j0 + w), context)
    r, c = (i0 + 4) * 3 + 5 - context, (j0 + 4) * 3 + 5 - context
    rows, cols = slice(r, r + h * 3 + 2 * context), slice(c, c + w * 3 + 2 * context)
    assert part.shape[1:] == (h * 3 + 2 * context, w * 3 + 2 * context)
    np.testing.assert_allclose(part.numpy(), whole[:, rows, cols].numpy(), atol=2e-6)
    np.testing.assert_allclose(part_cover.numpy(), cover[rows, cols].numpy(), atol=1e-6)


@pytest.mark.parametrize("pitch", [(30.0, 30.0), (90.0, 30.0), (25.0, 100.0)])
def test_long_pixels_are_sampled_as_densely_as_short_ones(pitch):
    """Line scans: the mean over a footprint is that of the picture."""
    spacing, ny, nx = min(pitch) / 8, 6, 6
    h, w = (round(n * p / spacing) for n, p in zip((ny, nx), pitch, strict=True))
    texture = gaussian_filter(np.random.default_rng(0).standard_normal((h, w)), 0.8, mode="wrap")
    planes = torch.zeros(7, h, w)
    planes[:] = torch.from_numpy(128 + 40 * texture / texture.std())
    spec = GuideSpec(SectionGrid((ny, nx), pitch), 4, (spacing, spacing), (h, w), WHITE, 0.0)
    cells = Cells(1, ny - 1, 1, nx - 1)
    slide_um = spec.slide_points_um(Alignment.identity(), cells, 0)
    sampled, _ = spec.sample(planes.permute(1, 2, 0).contiguous(), (0, 0), slide_um)
    r = spec.radius_px
    inner = sampled[0, r : sampled.shape[1] - r, r : sampled.shape[2] - r].double().numpy()
    means = inner.reshape(ny - 2, 4, nx - 2, 4).mean((1, 3))
    truth = planes[0].double().numpy().reshape(ny, h // ny, nx, w // nx).mean((1, 3))[1:-1, 1:-1]
    assert np.corrcoef(means.ravel(), truth.ravel())[0, 1] > 0.97


def test_cover_is_the_share_that_the_slide_shows():
    spec = GuideSpec(SectionGrid((4, 4), (20.0, 20.0)), 2, (5.0, 5.0), (16, 8), WHITE, 0.0)
    planes = random_planes(0, (16, 8))  # the slide is 80 x 40 um: columns 0 and 1 of the section
    planes[6, :4] = 0  # the first row of the section is not covered on the slide itself
    _, cover = features_of(spec, lambda a, b, c, d: planes[:, a:b, c:d], Alignment.identity(), Cells(0, 4, 0, 4))
    expected = np.zeros((8, 8))
    expected[2:, :4] = 1
    # Bilinear sampling blurs the border by less than one plane pixel.
    np.testing.assert_allclose(cover.numpy()[3:], expected[3:], atol=1e-6)
    assert (cover.numpy()[:2, :4] < 0.3).all()
    assert not cover.numpy()[:, 4:].any()
    read = lambda a, b, c, d: planes[:, a:b, c:d]  # noqa: E731
    _, pooled = pooled_window(spec, Alignment.identity(), read, Cells(0, 4, 0, 4), (0.0,))
    np.testing.assert_allclose(pooled, cell_means(cover.double().numpy(), 2))


def test_footprint_means_are_plain_means_of_the_features():
    planes = random_planes(5)

    def read(r0, r1, c0, c1):
        return planes[:, r0:r1, c0:c1]

    cells = Cells(1, 5, 0, 3)
    smoothings = (0.2, 0.5)
    pooled, pooled_cover = pooled_window(SPEC, TURNED, read, cells, smoothings)
    assert pooled.shape == (2, len(FEATURES), 4, 3)
    for smoothing, means in zip(smoothings, pooled, strict=True):
        # Each is what the reconstruction will see at that smoothing.
        features, cover = features_of(replace(SPEC, smoothing_pitch=smoothing), read, TURNED, cells)
        np.testing.assert_allclose(means, cell_means(features.double().numpy(), 3), atol=1e-6)
        np.testing.assert_allclose(pooled_cover, cell_means(cover.double().numpy(), 3), atol=1e-6)


def test_what_is_not_covered_does_not_count():
    """Whatever lies where the slide shows nothing (ink, say), features elsewhere are the same."""
    planes = random_planes(9)
    planes[6] = 255
    planes[6, 20:26, 30:44] = 0
    inked = planes.copy()
    inked[:6, 20:26, 30:44] = np.array([20, 30, 90, 250, 255, 255], np.uint8)[:, None, None]
    cells = Cells(1, 6, 0, 5)
    features = [features_of(SPEC, lambda a, b, c, d, p=p: p[:, a:b, c:d], TURNED, cells)[0] for p in (planes, inked)]
    cover = features_of(SPEC, lambda a, b, c, d: planes[:, a:b, c:d], TURNED, cells)[1]
    # Sampling mixes the pixels on a border; beyond it nothing of the ink is left.
    seen = cover > 0.99
    assert 0.2 < seen.float().mean() < 1.0
    torch.testing.assert_close(features[0][:, seen], features[1][:, seen], atol=5e-2, rtol=0)
