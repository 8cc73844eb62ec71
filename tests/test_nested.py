"""The held-out R² with nothing fitted on what is left out: what is hidden is hidden, and chance gains nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from deepfere.alignment.score import spatial_blocks
from deepfere.config import Config
from deepfere.evaluation import nested
from deepfere.evaluation.nested import folds_of, hidden_errors, nested_scores, projected
from deepfere.measured.factors import factorise
from deepfere.model.fit import evidence
from deepfere.model.transfer import SmoothingChoice
from deepfere.pipeline.fit import held_out_blocks

SHAPE = (24, 26)
CHOICE = SmoothingChoice(0.25, float("nan"), float("nan"))


def test_folds_never_touch():
    fold = folds_of(np.ones((40, 36), bool))
    blocks = spatial_blocks(np.ones((40, 36), bool), 4)
    assert sorted(np.unique(fold)) == [0, 1, 2, 3]
    for number in range(4):
        inside = fold == number
        assert 0.15 < inside.mean() < 0.35
        for dy, dx in ((1, 0), (0, 1)):
            moved = np.roll(blocks, (dy, dx), (0, 1))
            both = (inside & np.roll(inside, (dy, dx), (0, 1)))[1:, 1:]
            assert (moved == blocks)[1:, 1:][both].all()


def section(seed: int, related: bool):
    """Features, and ions that follow the first feature or none of them."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    features = np.stack([gaussian_filter(rng.normal(size=SHAPE), 0.7) for _ in range(11)])
    mask = np.ones(SHAPE, bool)
    mask[:3, :4] = False
    source = features[0] if related else gaussian_filter(rng.normal(size=SHAPE), 0.7)
    cube = np.stack([50 + 30 * s * source + rng.normal(0, 1, SHAPE) for s in (1.0, -1.0, 0.7)])
    return features, mask, cube.astype(np.float32)


def problem_of(seed: int, related: bool):
    features, mask, cube = section(seed, related)
    (factors,) = factorise([cube], [mask], 2)
    return evidence(features[None], (0.25,), mask, mask, cube, factors, CHOICE), factors.basis, folds_of(mask)


def share(problem, basis, fold):
    sums = [hidden_errors(problem, basis, fold, number) for number in range(4)]
    return 1 - sum(error for error, _ in sums) / sum(total for _, total in sums)


def test_a_relation_is_found_and_chance_is_not():
    assert (share(*problem_of(0, True)) > 0.8).all()
    unrelated = [share(*problem_of(seed, False)) for seed in range(4)]
    assert np.max(unrelated) < 0.05 and np.min(unrelated) > -0.5


def test_the_hidden_pixels_take_no_part():
    problem, basis, fold = problem_of(0, True)
    hidden = fold.ravel()[problem.rows.index] == 2
    error, total = hidden_errors(problem, basis, fold, 2)
    # What is hidden changes: predictions do not, only what they are compared with.
    spoilt = replace(problem, ion_rows=np.where(hidden[:, None], 0.0, problem.ion_rows))
    spoilt = replace(spoilt, factor_rows=np.where(hidden[:, None], 1e3, problem.factor_rows))
    energy, nothing = hidden_errors(spoilt, basis, fold, 2)
    assert (nothing == 0).all() and (total > 0).all()
    # |t - p|^2 with t = 0 is |p|^2; a good prediction has nearly the energy of the truth.
    assert (energy > 0.6 * total).all() and (energy < 1.2 * total).all() and (error < 0.3 * total).all()


def test_factors_of_hidden_pixels_follow_from_the_basis_of_the_others():
    _, mask, cube = section(1, True)
    fold = folds_of(mask)
    visible = mask & (fold != 0)
    (part,) = factorise([cube], [visible], 2)
    assert (part.images[:, fold == 0] == 0).all()
    every = projected(part, cube, mask, visible)
    (whole,) = factorise([cube], [mask], 2)
    hidden = mask & (fold == 0)
    r = np.corrcoef(every.images[0][hidden], whole.images[0][hidden])[0, 1]
    assert abs(r) > 0.99
    r = np.corrcoef(every.images[0][visible], part.images[0][visible])[0, 1]
    assert r > 0.999


def test_blocks_are_held_out_where_something_was_measured():
    """Of a diagonal strip most blocks of the grid are empty."""
    y, x = np.indices((40, 40))
    mask = abs(y - x) < 4
    problem = SimpleNamespace(mask=mask, blocks=spatial_blocks(mask, 6))
    empty = np.setdiff1d(problem.blocks, problem.blocks[mask])
    assert len(empty) > 5
    for seed in range(40):
        held = held_out_blocks(problem, 0.2, seed)[problem.blocks]
        there = [len(np.unique(problem.blocks[part])) for part in (mask, mask & held)]
        assert there[1] == round(0.2 * there[0])


def test_it_is_left_out_where_there_is_nothing_to_judge_by(monkeypatch):
    small = SimpleNamespace(alignment=object(), mask=np.ones((10, 10), bool), provenance={"section": {}})
    assert nested_scores(small, Config(), lambda *_: None) is None
    small.alignment = None
    monkeypatch.setattr(nested, "LEAST_PX", 10)
    assert nested_scores(small, Config(), lambda *_: None) is None


def test_the_shared_run_is_judged_without_what_is_left_out(fused, place):
    """On a real run: near the scores of the fit, no better, and the same for unrelated ions."""
    told: list[float] = []
    scores = nested_scores(fused, place.config(), lambda stage, share: told.append(share))
    assert scores is not None and told == [0.25, 0.5, 0.75, 1.0]
    assert scores["alignment"] == "refitted" and len(scores["moved_px"]) == 4 and 0 < max(scores["moved_px"]) < 1.0
    found = np.array([[ion["nested_r2"], ion["left_out_r2"]] for ion in scores["ions"]])
    r2 = fused.ions["held_out_r2"].to_numpy()
    informed = r2 > 0.3
    assert informed.sum() >= 3
    assert np.median(found[informed, 1]) == pytest.approx(np.median(r2[informed]), abs=0.15)
    assert np.median(found[informed, 0]) <= np.median(found[informed, 1]) + 0.03
    assert np.median(found[informed, 0]) > 0.2 and found[r2 <= 0.05].max(initial=-1) < 0.15
