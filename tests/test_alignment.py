"""The section is found on the slide, or refused; never guessed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from deepfere import cores
from deepfere.alignment.accept import accept, least_sum
from deepfere.alignment.looks import high_pass
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.placement import Candidate, centred_alignment, describe, null_placements, orientation
from deepfere.alignment.refine import AFFINE_STAGES, refine, refine_each, residual_variance
from deepfere.alignment.score import held_out_r2, placement_r2, slide_cover, spatial_blocks
from deepfere.alignment.search import FINE_STAGES, correlation_maps, search
from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.features import PLANES, StainReference, optical_density

WHITE = (240.0, 240.0, 240.0)
GRID = SectionGrid((26, 22), (50.0, 50.0))
SPACING_UM = 10.0
SLIDE_PX = (210, 200)


def stain_of(seed):
    """A smooth random three-colour stain on a blob of tissue with glass around it."""
    rng = np.random.default_rng(seed)
    texture = sum(
        weight * field / field.std((1, 2), keepdims=True)
        for weight, sigma in ((1.0, 20.0), (1.0, 8.0), (0.7, 4.0))
        for field in [gaussian_filter(rng.standard_normal((5, *SLIDE_PX)), (0, sigma, sigma))]
    )
    planes = np.empty((len(PLANES), *SLIDE_PX))
    planes[:5] = 120 + 30 * texture
    y, x = np.indices(SLIDE_PX) / np.array(SLIDE_PX)[:, None, None] - 0.5
    tissue = (y**2 + x**2 + 0.01 * texture[0]) < 0.23
    planes[:3, ~tissue], planes[3:5, ~tissue] = 240, 0
    planes[5], planes[6] = 255 * tissue, 255
    rounded = np.rint(np.clip(planes, 5, 250)).astype(np.uint8)
    rounded[6] = 255
    return StainOverview(rounded, (SPACING_UM, SPACING_UM), StainReference(WHITE, 0.05, 0.3))


def measure(stain, alignment, seed=0, noise=0.08):
    """Footprint averages of one linear and one quadratic mixture of the stain, with mild noise."""
    rng = np.random.default_rng(seed)
    od = optical_density(stain.planes[:3].transpose(1, 2, 0), WHITE).astype(np.float64)
    images = np.stack([od @ [1.0, -0.5, 0.8], od[..., 0] ** 2 - od[..., 1] * od[..., 2]])
    fine = alignment.map(GRID.refine(6).centres_um()) / SPACING_UM - 0.5
    sampled = np.stack([map_coordinates(i, fine.transpose(2, 0, 1), order=1, mode="nearest") for i in images])
    means = sampled.reshape(2, GRID.shape_px[0], 6, GRID.shape_px[1], 6).mean((2, 4))
    means = (means - means.mean((1, 2), keepdims=True)) / means.std((1, 2), keepdims=True)
    means += noise * rng.standard_normal(means.shape)
    mask = np.ones(GRID.shape_px, bool)
    mask[:3, :4] = mask[-2:, 10:14] = False
    return MeasuredOverview.build(means, mask, np.array([0.7, 0.3]), GRID)


def truth_of(flip, angle, shift_um=(40.0, -30.0), scale=1.01):
    start = centred_alignment(GRID, stain_of(0).extent_um, scale * orientation(flip, angle))
    return Alignment(start.matrix, start.offset_um + np.array(shift_um))


def error_px(found, truth):
    points = GRID.centres_um().reshape(-1, 2)
    return np.linalg.norm(found.map(points) - truth.map(points), axis=1) / GRID.pitch_um[0]


@pytest.fixture(scope="module")
def found_section():
    stain, truth = stain_of(1), truth_of(True, 262.0)
    measured = measure(stain, truth)
    shares: list[float] = []
    found, candidates = search(measured, stain, angle_step_deg=20.0, refined=3, progress=shares.append)
    return stain, measured, truth, found, candidates, shares


def test_search_and_refinement_find_the_section(found_section):
    stain, measured, truth, found, candidates, shares = found_section
    assert np.median(error_px(found, truth)) < 0.3
    assert found.evidence["flip"]
    assert candidates[0].flip
    assert abs((found.evidence["rotation_deg"] - 262.0 + 180) % 360 - 180) < 2
    assert found.evidence["scale"] == pytest.approx(1.01, abs=0.02)
    assert found.evidence["held_out_r2"] > found.evidence["runner_up_r2"] + 0.05
    assert found.evidence["held_out_r2"] > found.evidence["null_r2"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    better = refine(measured, stain, found, supersample=3)
    assert np.median(error_px(better, truth)) < 0.15
    assert np.quantile(error_px(better, truth), 0.9) < 0.3
    assert better.evidence == found.evidence


def test_threads_change_nothing(found_section, monkeypatch):
    stain, measured, truth, *_ = found_section
    starts = [
        Alignment(truth.matrix, truth.offset_um + np.array(shift)) for shift in ((9.0, 4.0), (-5.0, 8.0), (0, 3.0))
    ]
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    both = []
    for threads in (1, None):
        monkeypatch.setattr(cores, "_most", threads)
        both.append(refine_each(measured, stain, starts, FINE_STAGES, 2))
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one.matrix, other.matrix)
        np.testing.assert_array_equal(one.offset_um, other.offset_um)


def test_a_mirrored_slide_gives_the_mirrored_place(found_section):
    stain, measured, _, found, *_ = found_section
    mirrored = StainOverview(np.ascontiguousarray(stain.planes[:, :, ::-1]), stain.spacing_um, stain.reference)
    other, _ = search(measured, mirrored, angle_step_deg=20.0, refined=2)
    width = stain.extent_um[1]
    expected = Alignment(np.diag([1.0, -1.0]) @ found.matrix, np.array([0, width]) + [1, -1] * found.offset_um)
    assert not other.evidence["flip"]
    assert np.median(error_px(other, expected)) < 0.15


def test_a_foreign_slide_is_refused():
    measured = measure(stain_of(3), truth_of(False, 20.0))
    with pytest.raises(InputError, match=r"does not show where the section lies.*--landmarks"):
        search(measured, stain_of(4), angle_step_deg=30.0, refined=2)


@pytest.mark.parametrize("shape", [(3, 200), (70, 1)])
def test_a_narrow_section_is_found_or_refused_in_words(shape):
    rng = np.random.default_rng(0)
    grid = SectionGrid(shape, (10.0, 10.0))
    measured = MeasuredOverview.build(rng.standard_normal((2, *shape)), np.ones(shape, bool), np.ones(2), grid)
    with pytest.raises(InputError, match=r"does not show where the section lies|slide is too small"):
        search(measured, stain_of(3), angle_step_deg=90.0, scales=(1.0,), refined=1)


def test_a_slide_too_small_for_the_section_is_refused():
    stain = stain_of(3)
    measured = measure(stain, truth_of(False, 20.0))
    patch = StainOverview(stain.planes[:, 60:120, 60:120], stain.spacing_um, stain.reference)
    with pytest.raises(InputError, match="70 % of the measured tissue"):
        search(measured, patch, angle_step_deg=45.0, refined=4)


def test_a_slide_of_a_few_pixels_is_refused_in_words():
    stain = stain_of(3)
    patch = StainOverview(stain.planes[:, 90:94, 90:94], stain.spacing_um, stain.reference)
    with pytest.raises(InputError, match="only 16 pixels"):
        search(measure(stain, truth_of(False, 20.0)), patch, angle_step_deg=45.0, refined=4)


def test_margins_without_tissue_need_no_slide():
    """A raster with wide margins around its tissue, and a slide cut close to that tissue."""
    shape = (40, 40)
    images = np.zeros((1, *shape))
    images[0, 12:28, 12:28] = 5.0
    images += 0.1 * np.random.default_rng(0).standard_normal(images.shape)
    grid = SectionGrid(shape, (50.0, 50.0))
    measured = MeasuredOverview.build(images, np.ones(shape, bool), np.ones(1), grid)
    assert measured.tissue.sum() == 16 * 16
    slide = StainOverview(stain_of(0).planes[:, :90, :90], (SPACING_UM, SPACING_UM), stain_of(0).reference)
    close = Alignment(np.eye(2), np.array([-550.0, -550.0]))
    assert slide_cover(measured, slide, close) == 1.0


def test_refinement_mends_a_shift_of_a_pixel():
    stain, truth = stain_of(5), truth_of(True, 77.0)
    measured = measure(stain, truth)
    tilt = orientation(False, 1.5)
    centre = np.array(GRID.extent_um) / 2
    matrix = truth.matrix @ tilt
    start = Alignment(matrix, truth.map(centre[None])[0] + [45.0, -30.0] - matrix @ centre)
    assert np.median(error_px(start, truth)) > 0.9
    found = refine(measured, stain, start, AFFINE_STAGES, supersample=3)
    assert np.median(error_px(found, truth)) < 0.15
    features = stain.features(0.25 * 50)
    scores = [placement_r2(measured, stain, a, features=features, fine=True) for a in (truth, found, start)]
    assert scores[0] > 0.8
    assert scores[1] > scores[0] - 0.03
    assert scores[2] < scores[0] - 0.1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("angle", [-170.0, -90.0, 0.0, 33.0, 179.0])
def test_orientation_and_its_description_agree(flip, angle):
    matrix = 1.2 * orientation(flip, angle)
    assert np.linalg.det(matrix) == pytest.approx(-1.44 if flip else 1.44)
    found = describe(Alignment(matrix, np.zeros(2)))
    assert found[0] is flip
    assert (found[1] - angle + 180) % 360 - 180 == pytest.approx(0, abs=0.01)
    assert found[2] == pytest.approx(1.2)
    placed = centred_alignment(GRID, (3000.0, 2000.0), matrix)
    np.testing.assert_allclose(placed.map([np.array(GRID.extent_um) / 2]), [[1500.0, 1000.0]], atol=1e-9)


def test_null_placements_are_elsewhere():
    truth = truth_of(True, 40.0)
    nulls = null_placements(GRID, truth, 20)
    assert len(nulls) == 20
    assert min(np.median(error_px(n, truth)) for n in nulls) > 3
    for null in nulls:
        scale = np.sqrt(abs(np.linalg.det(null.matrix)))
        assert scale == pytest.approx(1.01, rel=1e-6)


def test_correlation_maps_by_brute_force():
    rng = np.random.default_rng(0)
    images, mask = rng.standard_normal((2, 5, 4)), rng.random((5, 4)) < 0.8
    features = rng.standard_normal((3, 9, 10))
    features[0, 2:7, 3:7] = images[0] * 2 + 1
    score = correlation_maps(images, mask, features)
    assert score.shape == (5, 7)
    for r, c in ((0, 0), (2, 3), (4, 6)):
        expected = 0.0
        for image in images:
            share = image[mask].var()
            for feature in features[:, r : r + 5, c : c + 4]:
                expected += share * np.corrcoef(image[mask], feature[mask])[0, 1] ** 2
        assert score[r, c] == pytest.approx(expected, rel=1e-9)
    assert np.unravel_index(score.argmax(), score.shape) == (2, 3)


def test_blocks_hold_equal_shares():
    mask = np.zeros((50, 60), bool)
    mask[5:45, 20:60] = True
    blocks = spatial_blocks(mask, 4)
    counts = np.bincount(blocks[mask], minlength=16)
    assert (counts == 100).all()
    thin = spatial_blocks(np.ones((2, 3), bool), 4)
    assert thin.min() >= 0
    assert thin.max() < 16


def test_held_out_r2_is_honest():
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(16), 40)
    x = rng.standard_normal((640, 5)) * np.array([1, 10, 0.1, 1, 1]) + 3
    y = np.column_stack([x @ [1, 0.1, 5, 0, 0] + 100, rng.standard_normal(640)])
    r2 = held_out_r2(x, y, blocks)
    assert r2[0] > 0.99
    assert r2[1] < 0.02
    # Blocks that differ in level only cannot be predicted from their number of pixels.
    level = rng.standard_normal(16)[blocks][:, None]
    assert held_out_r2(x, level, blocks)[0] < 0.05


def test_residual_variance_equals_the_regression():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 4)), rng.standard_normal((200, 2))
    residual, total = residual_variance(torch.from_numpy(x), torch.from_numpy(y), ridge=0.05)
    xs = (x - x.mean(0)) / x.std(0, ddof=1)
    z = y - y.mean(0)
    beta = np.linalg.solve(xs.T @ xs / 200 + 0.05 * np.eye(4), xs.T @ z / 200)
    np.testing.assert_allclose(residual.numpy(), ((z - xs @ beta) ** 2).mean(0), rtol=1e-6)
    np.testing.assert_allclose(total.numpy(), y.var(0), rtol=1e-9)


def test_high_pass_removes_lines_and_keeps_points():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    assert high_pass((2 * y - x + 5)[None])[0, 1:-1, 1:-1].abs().max() < 1e-5
    point = torch.zeros(1, 5, 5)
    point[0, 2, 2] = 9
    assert float(high_pass(point)[0, 2, 2]) == pytest.approx(8.0)


def test_coarse_overviews_are_means():
    stain = stain_of(0)
    coarse = stain.coarsen(35.0)
    assert coarse.spacing_um == (30.0, 30.0)
    assert coarse.planes.shape == (7, 70, 66)
    expected = stain.planes[:, 30:33, 60:63].mean((1, 2))
    np.testing.assert_allclose(coarse.planes[:, 10, 20], expected, atol=0.51)
    assert stain.coarsen(10.0) is stain
    measured = measure(stain, truth_of(False, 0.0))
    small = measured.coarsen(4)
    assert small.grid == SectionGrid((6, 5), (200.0, 200.0))
    np.testing.assert_allclose(small.images[:, 3, 2], measured.images[:, 12:16, 8:12].mean((1, 2)))
    assert small.mask.sum() == 29, "only the corner cell is less than half measured"
    assert not small.mask[0, 0]
    assert small.weight.sum() == pytest.approx(1.0)


def test_cover_counts_measured_pixels_on_the_slide():
    stain = stain_of(0)
    measured = measure(stain, truth_of(False, 0.0))
    assert slide_cover(measured, stain, truth_of(False, 0.0)) == 1.0
    half = Alignment(np.eye(2), np.array([100.0, stain.extent_um[1] - GRID.extent_um[1] / 2]))
    columns = np.arange(22) < 11
    expected = measured.mask[:, columns].sum() / measured.mask.sum()
    assert slide_cover(measured, stain, half) == pytest.approx(expected)


def test_features_of_the_overview_in_micrometres():
    stain = stain_of(0)
    wide = StainOverview(stain.planes[:, :, ::2], (10.0, 20.0), stain.reference)
    assert wide.features(0.0).shape == (210, 100, 9)
    od = optical_density(wide.planes[:3].transpose(1, 2, 0), WHITE)
    np.testing.assert_allclose(wide.features(0.0)[..., 1], od[..., 1], atol=1e-6)
    smooth = wide.features(40.0)[..., 1].numpy()
    # 40 um is 4 pixels in y and 2 in x.
    expected = gaussian_filter(od[..., 1], (4, 2), truncate=3.0)
    np.testing.assert_allclose(smooth[15:-15, 10:-10], expected[15:-15, 10:-10], atol=1e-4)


def test_fewer_pixels_need_more():
    assert least_sum(50) == least_sum(250) == pytest.approx(0.32)
    assert least_sum(1000) == least_sum(10**6) == pytest.approx(0.15)
    assert 0.15 < least_sum(500) < 0.32


def test_luck_with_few_pixels_is_refused():
    stain, truth = stain_of(1), truth_of(True, 262.0)
    measured = measure(stain, truth)
    features = stain.features(12.0)
    right, wrong = (Candidate(truth, True, 262.0, 0.3, r2) for r2 in (0.2, 0.19))
    other = Candidate(truth_of(False, 80.0), False, 80.0, 0.1, 0.11)
    assert measured.mask.sum() > 500
    assert accept(measured, stain, [right, other], features).evidence["runner_up_r2"] == 0.11
    few = MeasuredOverview(
        measured.images, measured.mask & (np.indices(measured.mask.shape)[0] < 9), measured.weight, GRID
    )
    with pytest.raises(InputError, match=r"with 1\d\d pixels that may be luck .*0.32 is needed"):
        accept(few, stain, [wrong, other], features)
