"""Scores of segmentations by hand, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.evaluation.boundaries import agreement, border, boundary_f1, dice, distances, hausdorff95


def halves(at: int, shape: tuple[int, int] = (12, 40)) -> np.ndarray:
    """Class 1 to the left of a column, class 2 from it on."""
    image = np.full(shape, 2)
    image[:, :at] = 1
    return image


def patches(seed: int, shape: tuple[int, int] = (30, 26)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 4, (shape[0] // 5 + 1, shape[1] // 5 + 1)), np.ones((5, 5), int))[
        : shape[0], : shape[1]
    ]


def test_a_border_lies_between_the_pixels():
    edge = border([[1, 1, 2], [1, 3, 2]])
    found = sorted(zip(map(tuple, edge.points.tolist()), map(sorted, edge.sides.tolist()), strict=True))
    assert found == [((0.0, 1.5), [1, 2]), ((0.5, 1.0), [1, 3]), ((1.0, 0.5), [1, 3]), ((1.0, 1.5), [2, 3])]
    assert len(edge.of(2)) == 2 and len(edge.of(3)) == 3


def test_the_rim_of_the_labelled_region_is_no_border():
    image = np.zeros((6, 6), int)
    image[2:4, 2:4] = 1
    assert len(border(image).points) == 0
    image[2:4, 4] = 2
    assert len(border(image).points) == 2


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_a_shifted_border_agrees_within_its_shift_and_not_below(shift):
    truth, found = border(halves(20)).points, border(halves(20 + shift)).points
    assert boundary_f1(truth, found, [shift - 0.5, shift, shift + 1]) == [0.0, 1.0, 1.0]
    assert hausdorff95(truth, found) == shift


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    truth = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    found = np.array([[0.0, 0.0], [9.0, 0.0]])
    # Precision 1/2; recall at tolerance 1: 2/4, at tolerance 3: 4/4.
    assert boundary_f1(truth, found, [1, 3]) == pytest.approx([0.5, 2 / 3])


def test_borders_that_are_not_there():
    none, some = np.zeros((0, 2)), np.array([[1.0, 1.0]])
    assert boundary_f1(some, none, [1, 2]) == [0.0, 0.0] == boundary_f1(none, some, [1, 2])
    assert math.isnan(boundary_f1(none, none, [1])[0])
    assert hausdorff95(some, none) == math.inf and math.isnan(hausdorff95(none, none))
    assert np.isinf(distances(some, none)).all() and distances(none, some).shape == (0,)


def test_hausdorff_leaves_out_the_last_twentieth():
    line = np.stack([np.zeros(100), np.arange(100.0)], axis=1)
    spur = line.copy()
    spur[:4, 0] = 50.0
    assert hausdorff95(line, spur) <= 4.0
    spur[:8, 0] = 50.0
    assert hausdorff95(line, spur) == 50.0


def test_dice_by_hand():
    truth = np.array([[1, 1, 2, 2], [1, 1, 0, 2]])
    assert dice(truth, truth, 1) == 1.0
    assert dice(truth, np.where(truth == 1, 2, 1), 1) == 0.0  # disjoint
    # Class 2: 3 true, 4 found (the unlabelled pixel does not count), 3 common.
    assert dice(truth, [[1, 2, 2, 2], [1, 1, 2, 2]], 2) == pytest.approx(6 / 7)
    assert math.isnan(dice(truth, truth, 5))
    with pytest.raises(InputError, match="shape"):
        dice(truth, truth[:1], 1)


def test_distances_are_those_of_a_brute_search():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 30, (40, 2)) / 2, rng.integers(0, 30, (50, 2)) / 2
    brute = np.linalg.norm(a[:, None] - b[None], axis=2).min(1)
    np.testing.assert_allclose(distances(a, b), brute, rtol=0, atol=1e-12)


def test_all_scores_of_a_shifted_border():
    factor = 4
    scores = agreement(halves(20), halves(22), [1, 2], factor, (0.25, 0.5, 1.0))
    assert scores.f1 == [0.0, 1.0, 1.0]  # off by half a measured pixel
    assert scores.hausdorff95_px == 0.5
    assert scores.class_dice == pytest.approx([2 * 20 / 42, 2 * 18 / 38])
    assert scores.dice == pytest.approx(np.mean(scores.class_dice))
    perfect = agreement(halves(20), halves(20), [1, 2], factor)
    assert perfect.f1 == [1.0, 1.0] and perfect.dice == 1.0 and perfect.hausdorff95_px == 0.0


@pytest.mark.parametrize("change", ["upside down", "mirrored", "turned", "renumbered", "swapped sides"])
def test_scores_do_not_depend_on_orientation_or_numbers(change):
    truth, found = patches(1), patches(2)
    if change == "swapped sides":
        # Only the border's scores are symmetric, and only where both are labelled.
        truth, found = np.where(truth == 0, 1, truth), np.where(found == 0, 1, found)
    before = agreement(truth, found, [1, 2, 3], 2)
    assert 0 < before.f1[0] < 1 and 0 < before.dice < 1
    turn = {
        "upside down": lambda a: a[::-1],
        "mirrored": lambda a: a[:, ::-1],
        "turned": lambda a: np.rot90(a),
        "renumbered": lambda a: np.array([0, 9, 4, 7])[a],
    }
    if change == "swapped sides":
        after, classes = agreement(found, truth, [1, 2, 3], 2), [1, 2, 3]
    else:
        classes = [9, 4, 7] if change == "renumbered" else [1, 2, 3]
        after = agreement(turn[change](truth), turn[change](found), classes, 2)
    np.testing.assert_allclose(after.class_f1, before.class_f1, atol=1e-12)
    np.testing.assert_allclose(after.class_dice, before.class_dice, atol=1e-12)
    assert after.hausdorff95_px == pytest.approx(before.hausdorff95_px)


def test_nothing_is_scored_where_nothing_is_labelled():
    truth = halves(20)
    truth[6:] = 0
    wrong_below = halves(20)
    wrong_below[6:] = 3 - wrong_below[6:]
    scores = agreement(truth, wrong_below, [1, 2], 2)
    assert scores.f1 == [1.0, 1.0] and scores.dice == 1.0


def test_classes_without_a_border_have_dice_alone():
    truth = np.zeros((8, 8), int)
    truth[:, :3], truth[:, 5:] = 1, 2
    scores = agreement(truth, truth, [1, 2], 2)
    assert scores.dice == 1.0 and all(math.isnan(value) for value in scores.f1) and math.isnan(scores.hausdorff95_px)
