"""Tears and folds: found by their look, and believed only where the measurement contradicts the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from deepfere.alignment.likelihood import StainRegression, correlation
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.witness import Earlier, Verdict, _bears, decide, expected_tissue, judge, masked_areas
from deepfere.frame import Alignment, SectionGrid
from deepfere.measured.operator import cell_means, expand, pad_edge
from deepfere.model.damage import find_candidates, finer, with_small
from deepfere.model.detail import expand_seen
from deepfere.model.features import StainReference, base_planes

PITCH_UM, SIDE, BLOCK = 50.0, 36, 8
WHITE = (245.0, 243.0, 246.0)
HUES = np.array([[0.65, 0.70, 0.29], [0.22, 0.80, 0.56]])
REFERENCE = StainReference(WHITE, 0.08, 0.35)
SPACING_UM = (PITCH_UM / BLOCK, PITCH_UM / BLOCK)
KINDS = ("tear", "fold", "ink")


def amounts(seed=0):
    """Two stains (2, h, w) of round tissue with a round lumen and a dense straight layer."""
    rng = np.random.default_rng(seed)
    size = SIDE * BLOCK
    fields = [gaussian_filter(rng.standard_normal((size, size)), s) for s in (6, 14)]
    haematoxylin, eosin = (0.35 * (1 + 0.25 * f / f.std()) for f in fields)
    y, x = np.indices((size, size)) / BLOCK - SIDE / 2
    layer = (np.abs(y + 8) < 0.8) & (np.abs(x) < 7)
    tissue = (np.hypot(y, x) < 15) & (np.hypot(y - 3, x + 6) > 2.2)
    out = np.clip([haematoxylin, eosin], 0.1, None) * tissue
    out[:, layer] *= 2
    return out


def overview(stains, seed=1):
    density = np.einsum("syx,sc->yxc", stains, HUES)
    rgb = (np.array(WHITE) + 1) * 10**-density - 1 + np.random.default_rng(seed).normal(0, 1.5, (*density.shape[:2], 3))
    planes = base_planes(np.clip(np.rint(rgb), 0, 255).astype(np.uint8), np.ones(rgb.shape[:2]), 1, REFERENCE)
    return StainOverview(planes, SPACING_UM, REFERENCE)


def measurement(stains, noise=0.01, seed=2):
    """Three factors (3, ny, nx): both stains and where there is tissue, as footprint means."""
    images = cell_means(np.stack([*stains, 0.5 * (stains[0] > 0)]), BLOCK)
    images += noise * np.random.default_rng(seed).standard_normal(images.shape)
    grid = SectionGrid((SIDE, SIDE), (PITCH_UM, PITCH_UM))
    return MeasuredOverview.build(images, np.ones((SIDE, SIDE), bool), np.ones(3), grid)


def stripe(angle, length, width):
    """A straight band (h, w) bool, 5.5 measured pixels beside the lumen."""
    offset = 3 * np.cos(angle) + 6 * np.sin(angle) - 5.5
    y, x = np.indices((SIDE * BLOCK, SIDE * BLOCK)) / BLOCK - SIDE / 2
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (np.abs(along) < length / 2) & (np.abs(across - offset) < width / 2)


def masked(stain, measured):
    expected = expected_tissue(measured, stain, Alignment.identity())
    candidates = find_candidates(stain.planes, stain.reference, stain.spacing_um, PITCH_UM, expected)
    candidates, verdicts = judge(measured, stain, Alignment.identity(), candidates)
    assert len(verdicts) == len(candidates.kinds)
    found = np.array([0, *[KINDS.index(v.kind) + 1 if v.masked else 0 for v in verdicts]])
    return found[candidates.labels], candidates, verdicts


@pytest.fixture(scope="module")
def clean():
    return amounts()


def test_anatomy_that_the_measurement_shows_too_stays(clean):
    found, candidates, verdicts = masked(overview(clean), measurement(clean))
    assert {"tear", "fold"} <= set(candidates.kinds), "the lumen and the layer look like damage"
    assert not found.any()
    judged = [v.evidence for v in verdicts if v.evidence is not None]
    assert len(judged) > 10 and max(judged) < 5


@pytest.mark.parametrize(("angle", "width"), [(0.3, 1.3), (1.2, 2.5), (2.4, 1.0)])
def test_a_tear_is_masked_and_the_lumen_is_not(clean, angle, width):
    tear = stripe(angle, 11, width) & (clean[0] > 0)
    found, candidates, verdicts = masked(overview(np.where(tear, 0, clean)), measurement(clean))
    assert (found[tear] == 1).mean() > 0.95
    assert found[~tear].astype(bool).sum() < 0.8 * tear.sum(), "its rim, no more"
    y, x = np.indices(tear.shape) / BLOCK - SIDE / 2
    assert not found[np.hypot(y - 3, x + 6) < 2.2].any()
    told = masked_areas(verdicts, np.where(found > 0, candidates.labels, 0), SPACING_UM)
    assert [entry["kind"] for entry in told] == ["tear"]
    assert told[0]["area_um2"] == pytest.approx((found > 0).sum() * np.prod(SPACING_UM))


@pytest.mark.parametrize("angle", [0.5, 1.0, 1.6])
def test_a_tear_is_masked_up_to_the_lumen_that_it_runs_into(clean, angle):
    """Its last bit shares a part with some of the lumen; smaller parts tell them apart."""
    y, x = np.indices(clean[0].shape) / BLOCK - SIDE / 2
    along, across = (x + 6) * np.cos(angle) + (y - 3) * np.sin(angle), (y - 3) * np.cos(angle) - (x + 6) * np.sin(angle)
    tear = (along > 0) & (along < 9.2) & (np.abs(across) < 0.75) & (clean[0] > 0)
    stain, measured = overview(np.where(tear, 0, clean)), measurement(clean)
    found, _, _ = masked(stain, measured)
    assert (found[tear] == 1).mean() > 0.98
    assert (found[np.hypot(y - 3, x + 6) < 2.2] > 0).mean() < 0.08


def test_parts_are_divided_as_asked(clean):
    stain = overview(clean)
    coarse = find_candidates(stain.planes, REFERENCE, SPACING_UM, PITCH_UM)
    divided = np.arange(len(coarse.kinds)) % 2 == 0
    closer, was = finer(coarse, divided, SPACING_UM, PITCH_UM)
    assert len(closer.kinds) == len(closer.whole) == len(was) > len(coarse.kinds)
    assert (np.array([0, *was + 1])[closer.labels] == coarse.labels).all()
    assert closer.kinds == [coarse.kinds[n] for n in was] and closer.whole == [coarse.whole[n] for n in was]
    assert (np.bincount(was)[~divided] == 1).all() and (np.bincount(was)[divided] > 1).any()
    assert set(np.unique(closer.labels)) == set(range(len(was) + 1)), "no part is empty"


def test_a_pixel_speaks_of_the_candidate_that_covers_most_of_it():
    pixel = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    whole = np.array([0, 0, 1, 0, 0, 0, 1, 0, 1])
    share = np.array([0.3, 0.3, 0.4, 0.15, 0.15, 0.15, 0.3, 0.1, 0.15])
    # Of the second pixel, candidate 0 covers more, but no part of it enough to be judged by; of the third, none does.
    assert _bears(pixel, whole, share).tolist() == [True, True, False, False, False, False, True, False, False]
    assert _bears(pixel[:0], whole[:0], share[:0]).size == 0


def looks(*evidence, kind="tear", first, was=None, divided=()):
    """Parts side by side that are masked after a second look; `first` and `divided` are of the parts before."""
    was = np.arange(len(evidence)) if was is None else np.array(was)
    before = [Verdict(kind, 0, 4, e, False) for e in first]
    masked_first = decide(before, row(len(first)))
    before = [replace(v, masked=bool(m)) for v, m in zip(before, masked_first, strict=True)]
    earlier = Earlier.of(before, was, np.isin(np.arange(len(first)), divided))
    return decide([Verdict(kind, 0, 4, e, False) for e in evidence], row(len(evidence)), earlier).astype(int).tolist()


def row(count):
    return np.array([(n, n + 1) for n in range(count - 1)], int).reshape(-1, 2)


def test_what_is_proven_stays_so_at_a_closer_look():
    # Smaller parts that speak against a fold, all of them, do not undo it.
    fold = looks(
        10.5, -3, 10.5, -3, -3, -3, kind="fold", first=(10.5, -3, 10.5, -4.5), was=(0, 1, 2, 3, 3, 3), divided=[3]
    )
    assert fold == [1, 1, 1, 0, 0, 0]
    assert looks(3.0, 1.0, 1.0, first=(20.0, 1.0, -9.0)) == [1, 1, 0], "evidence that is weaker now"


def test_what_joined_at_the_first_look_proves_nothing_at_the_second():
    assert looks(20, -1, 3, -3.9, first=(20, -1, 3, -3.9)) == [1, 1, 0, 0]
    assert looks(20, -1, 2.1, 2.1, 2.1, -3, first=(20, -1, 2.1, 2.1, 2.1, -3)) == [1, 1, 0, 0, 0, 0]
    # A fold that was not proven as a whole is not now: one part of it is.
    evidence = (15, -12, 4, -3, -50, 3, -50)
    assert looks(*evidence, kind="fold", first=evidence) == [1, 0, 0, 0, 0, 0, 0]


def test_smaller_parts_of_what_was_spoken_against_speak_for_themselves():
    first = (20.0, -15.0)
    assert looks(20, -3.8, -3.8, -3.7, -3.7, first=first, was=(0, 1, 1, 1, 1), divided=[1]) == [1, 0, 0, 0, 0]
    assert looks(20, 1.0, -3.8, -12.0, first=first, was=(0, 1, 1, 1), divided=[1]) == [1, 1, 0, 0]
    assert looks(20, None, -12.0, first=first, was=(0, 1, 1), divided=[1]) == [1, 0, 0], "a crumb says nothing"


@pytest.mark.parametrize(("angle", "layers"), [(0.2, 2.0), (1.4, 1.7), (2.6, 2.4)])
def test_a_fold_is_masked_and_the_dense_layer_is_not(clean, angle, layers):
    fold = stripe(angle, 10, 1.5) & (clean[0] > 0)
    found, _, _ = masked(overview(np.where(fold, layers * clean, clean)), measurement(clean))
    assert (found[fold] > 0).mean() > 0.85
    y, x = np.indices(fold.shape) / BLOCK - SIDE / 2
    layer = (np.abs(y + 8) < 0.8) & (np.abs(x) < 7) & ~stripe(angle, 13, 4.5)
    assert not found[layer].any()


def test_the_end_of_a_fold_behind_a_lumen_goes_with_the_fold(clean):
    """Too small to be judged by itself; the same picture without a proven fold, and what lies far from it, stays."""
    y, x = np.indices(clean[0].shape) / BLOCK - SIDE / 2
    lumen = (np.abs(x - 3.5) < 0.25) & (np.abs(y - 2) < 3)
    tissue = np.where(lumen, 0, clean)
    fold = (np.abs(y - 2) < 0.75) & (x > -4) & (x < 4.8) & (tissue[0] > 0)
    far = (np.abs(y - 10) < 0.4) & (np.abs(x - 3) < 0.4)
    end = fold & (x > 3.9)
    stain = overview(np.where(fold | far, 2.2 * tissue, tissue))
    found, candidates, verdicts = masked(stain, measurement(tissue))
    assert (found[fold & ~end] == 2).mean() > 0.85 and (found[end] == 2).mean() < 0.5
    proven = np.where(found == 2, candidates.labels, 0)
    assert (candidates.small[far] > 0).any()
    more = with_small(proven, candidates, SPACING_UM, PITCH_UM)
    assert (more[end] > 0).mean() > 0.95
    assert (more == proven)[proven > 0].all() and not more[far].any()
    rows, columns = distance_transform_edt(proven == 0, return_indices=True)[1]
    added = (more > 0) & (proven == 0)
    assert added.any() and (more == proven[rows, columns])[added].all(), "what is small goes with the nearest part"
    told = masked_areas(verdicts, more, SPACING_UM)
    assert sum(entry["area_um2"] for entry in told) == pytest.approx((more > 0).sum() * np.prod(SPACING_UM))
    assert not with_small(np.zeros_like(proven), candidates, SPACING_UM, PITCH_UM).any()


def test_where_a_fold_ends_at_a_lumen_it_is_a_fold(clean):
    """A lumen's rim, which is as wide as what is blurred there, does not take the end of the fold."""
    y, x = np.indices(clean[0].shape) / BLOCK - SIDE / 2
    from_lumen = np.hypot(y - 3, x + 6) - 2.2
    fold = (np.abs(y - 3) < 0.75) & (x > -6) & (x < 6) & (clean[0] > 0)
    stain = overview(np.where(fold, 2.2 * clean, clean))
    candidates = find_candidates(stain.planes, REFERENCE, SPACING_UM, PITCH_UM)
    kinds = np.array(["none", *candidates.kinds])[candidates.labels]
    assert (kinds[fold] == "fold").mean() > 0.95
    rim = (from_lumen > 0) & (from_lumen < 0.2)
    assert (kinds[fold & rim] == "fold").mean() > 0.8
    assert (kinds[rim & (np.abs(y - 3) > 1.2)] == "tear").mean() > 0.9


def test_a_measurement_that_says_nothing_masks_nothing(clean):
    tear = stripe(0.3, 11, 1.5)
    measured = measurement(clean)
    noise = np.random.default_rng(5).standard_normal(measured.images.shape)
    found, candidates, _ = masked(overview(np.where(tear, 0, clean)), replace(measured, images=noise))
    assert candidates.kinds and not found.any()


def test_what_lies_beyond_the_slide_is_no_witness(clean):
    """Sampling repeats the slide's edge there."""
    stains = clean.copy()
    stains[:, stripe(0.5, 18, 1.4)] = 0
    whole, measured = overview(stains), measurement(clean)
    cut = replace(whole, planes=np.ascontiguousarray(whole.planes[:, 9 * BLOCK :]))
    moved = Alignment(np.eye(2), np.array([-9.0 * PITCH_UM, 0.0]))

    def largest(stain, alignment):
        candidates = find_candidates(stain.planes, stain.reference, stain.spacing_um, PITCH_UM)
        return max(v.evidence or 0.0 for v in judge(measured, stain, alignment, candidates)[1] if v.kind == "tear")

    full, part = largest(whole, Alignment.identity()), largest(cut, moved)
    assert full > 30 and part > 0.7 * full


def test_a_feature_that_is_the_same_everywhere_else_is_no_error():
    """As the share of nuclei in pale tissue, beside a fold that is as dense as nuclei."""
    rng = np.random.default_rng(0)
    varies, rest = rng.standard_normal((12, 12)), np.zeros((12, 12))
    rest[5, 3:9] = 1.0
    images = (varies + 0.1 * rng.standard_normal((12, 12)))[None]
    regression = StainRegression(images, np.stack([varies.ravel(), rest.ravel()]))
    rows = rest.ravel() == 0
    regression.fit(rows)
    pixels = np.flatnonzero(~rows)
    other = np.stack([varies.ravel() + 3.0, rest.ravel()])
    evidence = regression.without(pixels).log_ratio(pixels, other)
    assert np.isfinite(evidence) and evidence < -5
    regression = StainRegression(images, varies.ravel()[None])
    regression.fit(rows)
    assert evidence == pytest.approx(regression.without(pixels).log_ratio(pixels, other[:1]), rel=1e-2)


def test_too_coarse_an_overview_shows_no_candidates(clean):
    stain = overview(clean)
    assert find_candidates(stain.planes, REFERENCE, SPACING_UM, PITCH_UM).kinds
    coarse = find_candidates(stain.planes, REFERENCE, SPACING_UM, 2 * SPACING_UM[0])
    assert not coarse.kinds and not coarse.labels.any()
    assert judge(measurement(clean), stain, Alignment.identity(), coarse) == (coarse, [])


def chain(*evidence, kind="tear"):
    """Whether parts side by side, with this evidence, are damage."""
    found = [Verdict(kind, 0, 4, e, False) for e in evidence]
    return decide(found, np.array([(n, n + 1) for n in range(len(found) - 1)], int).reshape(-1, 2)).tolist()


def test_parts_that_touch_are_decided_together():
    # 9 + 9 nats are enough together, and take in what lies beside them and is too small to judge, or has little
    # against it; what is real beside them stays, and so does what touches nothing but what was taken in.
    assert chain(9.0, 9.0, None, None, 9.0) == [True, True, True, False, False]
    assert chain(-3.0, 9.0, 9.0, -5.0) == [True, True, True, False]
    assert chain(9.0, None, 9.0) == [False, False, False], "what cannot be judged joins nothing"
    assert chain(9.0, 2.5, 9.0) == [True, True, True]
    assert chain(9.0) == [False]
    assert chain(40.0, -50.0, 40.0) == [True, False, True]


def test_many_parts_that_say_next_to_nothing_are_no_damage():
    assert not any(chain(*[1.9] * 500))
    assert not any(chain(*[1.9] * 500, kind="fold"))


@pytest.mark.parametrize("kind", ["ink", "fold"])
def test_ink_and_folds_are_damage_as_a_whole(kind):
    """A tear may run into a lumen; what a mark or a fold runs into has to speak against it."""
    assert chain(9.0, -3.0, 9.0, kind=kind) == [True, True, True]
    assert chain(9.0, None, 9.0, kind=kind) == [True, True, True]
    assert chain(9.0, -3.0, None, 9.0) == [False] * 4
    assert chain(9.0, -10.0, 9.0, kind=kind) == [False] * 3, "in all there is too little"
    assert chain(30.0, -50.0, 45.0, kind=kind) == [True, False, True]


def test_most_of_a_section_is_not_damaged(clean):
    """Strips of tissue alone, on a slide that lost two thirds of it: the rest is no judge."""
    x = np.indices(clean[0].shape)[1] / BLOCK
    lost = overview(np.where(x % 6 < 4, 0, clean))
    found, candidates, verdicts = masked(lost, measurement(clean))
    assert candidates.kinds and any((v.evidence or 0) > 20 for v in verdicts)
    assert not found.any()


def test_red_ink_on_eosin_is_masked_where_the_measurement_shows_tissue(clean):
    stain = overview(clean)
    mark = stripe(0.3, 11, 1.5) & (clean[0] > 0)
    planes = stain.planes.copy()
    planes[:3, mark] = np.array([200, 40, 60])[:, None]
    found, candidates, _ = masked(replace(stain, planes=planes), measurement(clean))
    assert "ink" in candidates.kinds
    assert (found[mark] > 0).mean() > 0.9
    assert found[~mark].astype(bool).sum() < 0.8 * mark.sum()


def test_ink_of_the_stains_own_colour_has_no_texture(clean):
    """Its colour is that of dense tissue; only that it is the same everywhere tells it from tissue."""
    stain = overview(clean)
    mark = stripe(0.3, 11, 1.5) & (clean[0] > 0)
    planes = stain.planes.copy()
    planes[:3, mark] = np.rint((np.array(WHITE) + 1) * 10 ** -(0.5 * HUES.sum(0)) - 1).astype(np.uint8)[:, None]
    found, candidates, _ = masked(replace(stain, planes=planes), measurement(clean))
    assert "ink" in candidates.kinds
    assert (found[mark] > 0).mean() > 0.9
    assert found[~mark].astype(bool).sum() < 0.8 * mark.sum()


def test_what_has_broken_off_the_outline_is_a_gap(clean):
    """No hole, and nothing that a closing reaches: only the measurement shows that tissue was there."""
    x = np.indices(clean[0].shape)[1] / BLOCK - SIDE / 2
    lost = (x > 11.5) & (clean[0] > 0)
    stain, measured = overview(np.where(lost, 0, clean)), measurement(clean)
    found, _, _ = masked(stain, measured)
    assert (found[lost] == 1).mean() > 0.8
    alone = find_candidates(stain.planes, REFERENCE, SPACING_UM, PITCH_UM)
    assert (alone.labels[lost] > 0).mean() < 0.5


def test_a_picture_without_glass_has_tears_only_where_it_is_as_light_as_glass(clean):
    """Its lightest tissue is taken for glass in its stain constants: that is no gap."""
    pale = np.clip(clean, 0.12, None)
    pale[:, clean[0] == 0] = [[0.02], [0.3]]
    white = tuple((np.array(WHITE) * 10 ** -(np.array([0.02, 0.3]) @ HUES)).tolist())
    stain = overview(pale)
    stain = replace(stain, reference=replace(REFERENCE, white=white))
    found = find_candidates(stain.planes, stain.reference, SPACING_UM, PITCH_UM)
    assert min(white) < 0.8 * max(white)
    assert "tear" not in found.kinds


def test_the_correlation_of_residuals_is_found():
    rng = np.random.default_rng(0)
    y, x = np.indices((40, 40)).reshape(2, -1)
    apart = np.hypot(y[:, None] - y, x[:, None] - x)
    root = np.linalg.cholesky(np.exp(-apart / 3) + 1e-9 * np.eye(len(y)))
    smooth = root @ rng.standard_normal((len(y), 4))
    images = np.sqrt(0.7) * smooth + np.sqrt(0.3) * rng.standard_normal(smooth.shape)
    images[:, 3] = rng.standard_normal(len(y))
    images[rng.random(len(y)) < 0.1] = np.nan
    share, reach = correlation(images.reshape(40, 40, 4))
    assert np.median(share[:3]) == pytest.approx(0.7, abs=0.15)
    assert np.median(reach[:3]) == pytest.approx(3, abs=1.5)
    assert share[3] < 0.1
    nothing = correlation(np.full((3, 3, 2), np.nan))
    assert not nothing[0].any()


def test_unseen_neighbours_do_not_reach_the_detail_of_a_pixel():
    rng = np.random.default_rng(0)
    means, seen = rng.standard_normal((2, 7, 6)), rng.random((7, 6)) > 0.3
    out = expand_seen(means, seen, 4)
    np.testing.assert_allclose(cell_means(out, 4), means[:, 1:-1, 1:-1], atol=1e-12)
    other = np.where(seen, means, 1e6)
    inner = np.repeat(np.repeat(seen[1:-1, 1:-1], 4, 0), 4, 1)
    np.testing.assert_array_equal(expand_seen(other, seen, 4)[:, inner], out[:, inner])
    padded = pad_edge(means)
    np.testing.assert_allclose(expand_seen(padded, np.ones((9, 8), bool), 4), expand(padded, 4, "keys"))
    # Without the shortcut, all neighbours seen: the same.
    almost = np.ones((7, 6), bool)
    almost[0, 0] = False
    np.testing.assert_allclose(expand_seen(means, almost, 4)[:, 4:, 4:], expand(means, 4, "keys")[:, 4:, 4:])
