"""What the report says of inference and of noise, and of registering jointly."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.evaluation.report_alignment import joint_words
from deepfere.evaluation.report_modes import (
    denoised_section,
    inferred_section,
    load_denoised,
    load_inferred,
    noisy_ions,
    percent,
)
from deepfere.evaluation.report_pictures import pick_ions
from tests.reports import FakeResult, assert_self_contained, pictures, report


@pytest.fixture
def small(monkeypatch):
    """Small pictures: quicker where only the text matters."""
    monkeypatch.setattr("deepfere.evaluation.report.PANEL_SIDES_PX", (160,))


def test_what_was_inferred_is_shown_in_numbers_and_pictures(small, tmp_path):
    result = FakeResult(ions=6)
    text, page = report(result, tmp_path)
    assert_self_contained(text, page)
    assert "10 % of the contrast of all ions" in page.text and "in 2 of 6 ions nothing was" in page.text
    for words in ("all ions · 10 %", "m/z 700.0000 · 25 %", "m/z 710.1235 · 5 %"):
        assert words in page.text, words
    maps = load_inferred(result, [], (80, 100))
    assert maps is not None
    section = inferred_section(maps, (40, 50))
    assert len(section["pictures"]) == 1


def test_the_maps_share_one_range(tmp_path):
    result = FakeResult(ions=3)
    rows = result.ions.to_dict("records")
    maps = load_inferred(result, rows, (80, 100))
    assert maps is not None
    section = inferred_section(maps, (40, 50))
    ranges = {picture["range"] for picture in section["pictures"]}
    assert len(section["pictures"]) == 3 and len(ranges) == 1
    (top, name), share = next(iter(ranges)), float(result.ions["inferred_share"].max())
    assert name == "share" and abs(int(top.split()[0]) - 200 * share) < 3


def test_nothing_inferred_is_no_section(small, tmp_path):
    result = FakeResult(ions=3, kinds=["smooth"] * 3)
    assert load_inferred(result, result.ions.to_dict("records"), (40, 50)) is None
    _, page = report(result, tmp_path)
    assert "inferred from the stain" not in page.text.lower().replace("comes from the stain", "")


def test_exact_beside_denoised_where_there_is_noise(small, tmp_path):
    result = FakeResult(ions=6)
    text, page = report(result, tmp_path)
    assert_self_contained(text, page)
    for words in ("60 % of the noise taken out, reduced chi-square 1.02", "denoised=True", "4 of 6 ions lose 20 %"):
        assert words in page.text, words
    section = denoised_section(result, load_denoised(result, (80, 100)), (40, 50))
    assert [[p["label"] for p in row["pictures"]] for row in section["ions"]] == [["measured", "exact", "denoised"]] * 3
    # One range for the three pictures of an ion.
    assert all(len({p["range"] for p in row["pictures"]}) == 1 for row in section["ions"])
    (tmp_path / "report.html").unlink()
    result.ions["noise_share"] = 0.05
    _, without = report(result, tmp_path)
    assert "counting noise" not in without.text and len(pictures(page)) == len(pictures(without)) + 9


def test_the_noisiest_of_every_class_come_first():
    ions = FakeResult(ions=6, kinds=["smooth", "smooth", "partly", "stain-informed", "smooth", "partly"]).ions
    ions["noise_share"] = [0.9, 0.8, 0.3, 0.4, 0.95, 0.19]
    ions["chi_square"] = [1.0, 1.0, 1.0, 1.0, np.nan, 1.0]
    assert noisy_ions(ions) == [0, 3, 2]
    assert noisy_ions(ions, 1) == [0]
    ions["informed"] = "smooth"
    assert noisy_ions(ions) == [0, 1, 3]
    ions["noise_share"] = np.nan
    assert noisy_ions(ions) == []


def test_frozen_and_joint_in_words():
    notes = {"t1_left": 0.41, "t1_left_joint": 0.4, "joint_moved_px": 0.123, "joint_kept": True}
    words = joint_words({"notes": notes})
    assert "0.6000 with it against 0.5900 with the registration frozen" in words
    assert "moved by 0.12 measured pixels" in words and words.endswith("It is kept.")
    assert "not kept" in joint_words({"notes": {**notes, "joint_kept": False}})
    assert joint_words({"notes": {"t1_left": 0.4}}) == joint_words({}) == ""


def test_percent():
    assert [percent(v) for v in (0.0, 0.126, 1, None, np.nan)] == ["0 %", "13 %", "100 %", "–", "–"]
    assert pick_ions(FakeResult(ions=1).ions) == ([0], [])
