"""The report's choices and words: levels, which ions, orientation, numbers, verdict."""

from __future__ import annotations

import dask.array as da
import numpy as np

from deepfere.evaluation.report_alignment import describe
from deepfere.evaluation.report_pictures import page_level, pick_ions, thin
from deepfere.evaluation.report_tables import duration_text, exactness, nonnegative, number, verdict
from deepfere.frame import Alignment, SectionGrid
from tests.reports import FakeResult


def test_large_results_are_read_at_the_level_of_the_page():
    assert page_level((1200, 800), 9) == 0
    assert page_level((1201, 800), 9) == 1
    assert page_level((40_000, 100), 9) == 6
    assert page_level((40_000, 100), 3) == 2
    image = da.zeros((3, 50_000, 70_000), chunks=(3, 1000, 1000))
    assert max(thin(image).shape) <= 2400
    assert thin(image[:, :2400, :2400]).shape == (3, 2400, 2400)


def test_pick_ions_ranks_class_first_and_never_twice():
    ions = FakeResult(ions=7, kinds=["smooth", "partly", "stain-informed", "smooth", "partly", "smooth", "smooth"]).ions
    ions["held_out_r2"] = [0.9, 0.1, 0.05, np.nan, 0.3, -1.0, -0.2]
    assert pick_ions(ions) == ([2, 4, 1], [3, 5, 6])
    assert pick_ions(ions.iloc[:1]) == ([0], [])
    assert pick_ions(ions.iloc[:2].reset_index(drop=True)) == ([1], [0])


def test_orientation_in_words():
    grid = SectionGrid((10, 10), (50.0, 50.0))
    right = np.array([[0.0, 1.0], [-1.0, 0.0]])  # +x goes to +y: clockwise as displayed
    flip_x, flip_y = np.diag([1.0, -1.0]), np.diag([-1.0, 1.0])
    words = {
        "is not turned.": np.eye(2),
        "is turned by 90.0° clockwise.": right,
        "is turned by 90.0° counter-clockwise.": right.T,
        "is mirrored left to right and not turned.": flip_x,
        "is mirrored top to bottom and not turned.": flip_y,
        "is mirrored top to bottom and turned by 90.0° clockwise.": right @ flip_y,
    }
    for text, matrix in words.items():
        assert text in describe(Alignment(matrix, np.zeros(2)), grid)[0], text
    sentences = describe(Alignment(1.05 * np.eye(2), np.zeros(2)), grid)
    assert "105.0 %" in sentences[1] and len(sentences) == 2
    moved = describe(Alignment(np.eye(2), np.array([30.0, 40.0])), grid, Alignment.identity())
    assert "moved by 50 µm (median; 1.0 measured pixels)" in moved[2]


def test_words_and_numbers():
    assert number(None) == number("x") == number(float("nan")) == "–"
    assert number(float("inf")) == "∞" and number(-0.5) == "-0.50"
    assert number(-0.001) == "0.00" and number(-0.001, "+.2f") == "+0.00"
    assert [duration_text(s) for s in (4.21, 59.9, 125, 4320)] == ["4.2 s", "59.9 s", "2 min 05 s", "1 h 12 min"]
    one = FakeResult(ions=1, kinds=["stain-informed"]).ions
    assert verdict(one) == "1 of 1 ion is informed by the stain (held-out), 0 partly, 0 are plain interpolation."
    ions = FakeResult(ions=3).ions
    ions["consistency"] = [1e-8, 5e-3, np.nan]
    assert not exactness(ions)["ok"] and "differs" in exactness(ions)["text"]
    assert "for 1 of 3 ions" in nonnegative(ions)
    ions["nonneg_steps"] = 0
    assert "off for all ions: it would have cost" in nonnegative(ions)
