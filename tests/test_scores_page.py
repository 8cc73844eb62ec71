"""The scores in the report, and the page with every ion's scores beside it."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from deepfere.errors import InputError
from deepfere.evaluation.evaluate import check_json, plain, save_scores, write_scores
from deepfere.evaluation.report import write_report
from deepfere.evaluation.report_tables import wald_words
from deepfere.evaluation.score_figures import promised_and_measured, right_and_wrong
from deepfere.evaluation.scores_page import page_file, verdict, write_scores_page
from deepfere.evaluation.trust import evidence_of, gain_db
from tests.reports import FakeResult, Page, assert_self_contained, label_block, pictures, report


@pytest.fixture
def small(monkeypatch):
    """Small pictures: quicker where only the text matters."""
    monkeypatch.setattr("deepfere.evaluation.report.PANEL_SIDES_PX", (160,))


def test_borders_are_shown_with_their_pictures(small, tmp_path):
    text, page = report(FakeResult(ions=1), tmp_path, evaluation={"boundaries": [label_block()]})
    assert_self_contained(text, page)
    (tmp_path / "report.html").unlink()
    _, without = report(FakeResult(ions=1), tmp_path)
    assert len(pictures(page)) == len(pictures(without)) + 4
    for words in ("annotation.png", "F1, 0.5 px", "Dice, class 4", "class 9 is rare", "no stain (--no-guide) 0.620"):
        assert words in page.text, words
    # The best of each column, of those that have a value; the smallest distance is the best.
    assert re.findall(r'<td class="n best">([0-9.]+)', text) == ["0.700", "0.750", "0.950"]
    assert "Borders of the tissue labels" not in without.text and "Wald" not in page.text


def fake(folder: Any, ions: int = 5, name: str = "liver") -> FakeResult:
    result = FakeResult(ions=ions, path=str(folder / f"{name}.zarr"))
    result.provenance["config"] = {"model": {"null_guides": 20}}
    notes = {"t1_left": 0.41, "t1_left_joint": 0.4, "joint_moved_px": 0.12, "joint_kept": False}
    result.provenance["model"] = {"tier": "T1", "notes": notes}
    return result


def scored(result: FakeResult) -> dict[str, Any]:
    """Scores as `evaluate` writes them: a ratio that was placed, and one with too few pixels."""
    ions = [
        {"mz": float(mz), "coverage_80": 0.75 + 0.01 * k}
        | {f"{name}_psnr": 20.0 + k + gain for name, gain in (("bicubic", -0.5), ("no_guide", 0.0), ("ours", 1.25))}
        | {f"{name}_{key}": 0.5 for name in ("bicubic", "no_guide", "ours") for key in ("pearson", "ssim", "rmse")}
        for k, mz in enumerate(result.ions["mz"])
    ]
    ions[1]["ours_psnr"] = float("nan")
    row = {"bicubic_db": 19.0, "no_guide_db": 19.5, "ours_db": 21.0}
    first = row | {f"{n}_sam_deg": 9.0 for n in ("bicubic", "ours")} | {"bicubic_ergas": 20.0, "ours_ergas": 16.0}
    note = "blind: no place was found; scored with the full-scale alignment"
    two = {"ratio": 2, "alignment": "refused", "note": note, "coverage_80": 0.8, "coverage_80_present": 0.77}
    two |= {"rows": [first | {"what": "all ions (5)"}, row | {"what": "stain-informed (2)"}], "ions": ions}
    four = {"ratio": 4, "alignment": "none", "note": "x4 leaves 9 measured pixels: too few", "rows": [], "ions": []}
    return {"identity": "0123abcd", "wald": [two, four], "evidence": evidence_of(result), "consistency": 2e-8}


def test_the_page_holds_every_ion_and_says_what_was_gained(tmp_path):
    result = fake(tmp_path)
    path = write_scores_page(result, scored(result))
    assert path == tmp_path / "liver.evaluation.html" == page_file(result.path)
    text = path.read_text()
    page = Page(text)
    assert_self_contained(text, page)
    for words in (
        "coarser by 2: +2.00 dB against bicubic and +1.50 dB against no stain (median of the 2 stain-informed ions)",
        "blind: no place was found; scored with the full-scale alignment",
        "x4 leaves 9 measured pixels",
        "bicubic 9.00° and 20.00; deepfere 9.00° and 16.00",
        "in ions present in over 30 % of the pixels 77 %",
        "with 20 wrong stains",
        "the right stain gains more than 95 % of the wrong ones in 4 of 5 ions",
        "how it was obtained search",
    ):
        assert words.lower() in page.text.lower(), words
    # Every ion once at x2 and once beside the wrong stains.
    assert text.count('<tr><td class="n">7') == 10
    assert re.search(r"20\.00<td class=\"n\">21\.25", text) and "–<td" in text
    assert len(pictures(page)) == 2  # the light ones; the dark ones are sources
    assert sum(tag == "source" for tag, _ in page.tags) == 2


@pytest.mark.parametrize("name", ["liver", "kidney#2", "a b?%c", "s1:2"])
def test_report_and_page_link_each_other_where_both_stand(small, tmp_path, name):
    result = fake(tmp_path, name=name)
    scores, beside = scored(result), tmp_path / f"{name}.html"
    alone = write_report(result, beside, evaluation=scores).read_text()
    assert_self_contained(alone, Page(alone))
    page = write_scores_page(result, scores)
    text = page.read_text()
    assert_self_contained(text, Page(text), (f"{name}.html",))
    both = write_report(result, beside, evaluation=scores).read_text()
    assert_self_contained(both, Page(both), (f"{name}.evaluation.html",))
    elsewhere = write_report(result, tmp_path / "other" / f"{name}.html", evaluation=scores).read_text()
    assert_self_contained(elsewhere, Page(elsewhere))
    # Pages of another result are not linked.
    result.provenance["identity"] = "ffff"
    other = write_report(result, beside, evaluation=scores).read_text()
    assert_self_contained(other, Page(other))
    result.provenance["identity"] = "eeee"
    write_scores_page(result, scores)
    assert_self_contained(page.read_text(), Page(page.read_text()))


def test_the_page_survives_odd_scores_and_injects_nothing(tmp_path):
    result, evil = fake(tmp_path), '</script><img src="http://evil.example/x" onerror=alert(1)>'
    scores = scored(result)
    scores["wald"][0] |= {"note": evil, "alignment": evil, "alignment_evidence": {"null_r2": [0.1, 0.2]}}
    scores["wald"][0]["rows"][0]["what"] = evil
    scores["evidence"]["ions"][0]["informed"] = evil
    text = write_scores_page(result, scores).read_text()
    page = Page(text)
    assert_self_contained(text, page)
    assert not any("onerror" in attributes for _, attributes in page.tags) and evil in " ".join(page.words)
    assert "– / – / 0.20" in page.text
    result.alignment = None
    bare = evidence_of(result)
    assert "null_guides" not in bare and "alignment" not in bare
    text = write_scores_page(result, {"wald": [], "evidence": bare, "consistency": 0.0}).read_text()
    assert "too few measured pixels remain" in text and "wrong stains" not in text


def test_verdicts():
    row = {"what": "all ions (3)", "bicubic_db": 19.0, "no_guide_db": 20.0}
    assert "without the stain" in verdict([{"ratio": 2, "rows": [row]}])
    words = verdict([{"ratio": 8, "rows": []}, {"ratio": 4, "rows": [row | {"ours_db": 19.5}]}])
    assert "coarser by 4: +0.50 dB against bicubic and -0.50 dB against no stain (median of the 3 ions)" in words
    assert wald_words({"rows": []}) == [] and wald_words({}) == []


def test_wrong_stains_in_decibels():
    np.testing.assert_allclose(gain_db([0.0, 0.9, -1.0]), [0.0, 10.0, -10 * np.log10(2)])
    assert np.isinf(gain_db([1.0, 1.2])).all()
    result = SimpleNamespace(**{n: getattr(fake_here(), n) for n in ("ions", "alignment", "provenance")})
    result.inferred_share = 0.1
    result.ions["null_r2"] = [0.0, 0.5, -0.1, 0.2, 0.1]
    found = evidence_of(result)
    assert found["null_guides"]["count"] == 20 and found["null_guides"]["informed_ions"] == 4
    assert found["null_guides"]["null_p95_most_db"] == pytest.approx(10 * np.log10(2))
    assert found["null_guides"]["null_mean_db"] == pytest.approx(-10 * np.log10(1.1))
    # Of the informed ions: 0.6, 0.199, 0.597, 0.196.
    middle = -10 * np.log10(1 - np.array([0.199, 0.597]))
    assert found["null_guides"]["gain_db"] == pytest.approx(middle.mean())
    assert found["alignment"]["joint"] == {
        "frozen_r2": pytest.approx(0.59),
        "joint_r2": pytest.approx(0.6),
        "moved_px": 0.12,
        "kept": False,
    }
    assert [ion["mz"] for ion in found["ions"]] == list(result.ions["mz"])
    assert found["ions"][1]["null_p95_db"] == pytest.approx(10 * np.log10(2))


def fake_here() -> FakeResult:
    from pathlib import Path

    return fake(Path())


def test_figures_draw_what_they_are_given(tmp_path):
    result = fake(tmp_path)
    scores = scored(result)
    evidence, block = scores["evidence"], scores["wald"][0]
    figure = promised_and_measured(block, evidence)
    assert figure is not None
    points = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    # One ion has no score. Gains over the run without the stain; those promised from the held-out R2.
    assert len(points) == 4 and np.allclose(points[:, 1], 1.25)
    assert points[:, 0].max() == pytest.approx(float(gain_db(0.6)))
    right = right_and_wrong(evidence, dark=True)
    assert right is not None
    dots = [c.get_offsets() for c in right.axes[0].collections if isinstance(c, PathCollection)]
    heights = sorted(np.concatenate(dots)[:, 1], reverse=True)
    np.testing.assert_allclose(heights, np.clip(sorted((i["gain_db"] for i in evidence["ions"]), reverse=True), -1, 30))
    assert promised_and_measured({"ratio": 2, "ions": []}, evidence) is None and right_and_wrong({}) is None


def test_json_is_strict_and_refused_early(tmp_path, capsys):
    scores = {"a": [float("nan"), 1.5, {"b": float("inf")}], "c": (1, "x")}
    assert plain(scores) == {"a": [None, 1.5, {"b": None}], "c": [1, "x"]}
    write_scores(str(tmp_path / "s.json"), scores)
    assert json.loads((tmp_path / "s.json").read_text())["a"][0] is None
    write_scores("-", scores)
    assert json.loads(capsys.readouterr().out)["c"] == [1, "x"]
    for wrong in (tmp_path, tmp_path / "gone" / "s.json"):
        with pytest.raises(InputError, match="cannot be written"):
            check_json(str(wrong))
    (tmp_path / "mine.json").write_text('{"ions": [1, 2]}')
    with pytest.raises(InputError, match="holds no scores, and stays"):
        check_json(str(tmp_path / "mine.json"))
    (tmp_path / "scores.json").write_text('{"wald": [], "consistency": 0.0}')
    for right in (None, "-", str(tmp_path / "new.json"), str(tmp_path / "scores.json")):
        check_json(right)


def test_ratios_of_the_same_settings_stay(tmp_path, monkeypatch):
    result = fake(tmp_path)
    file = tmp_path / "liver.evaluation.json"
    monkeypatch.setattr(
        "deepfere.evaluation.evaluate.load_evaluation",
        lambda _: json.loads(file.read_text()) if file.exists() else None,
    )

    def save(*blocks: tuple[int, str, float]) -> list[tuple[int, float]]:
        parts = [{"ratio": ratio, "settings": settings, "x": x} for ratio, settings, x in blocks]
        known = save_scores(result, wald=copy.deepcopy(parts))
        return [(block["ratio"], block["x"]) for block in known["wald"]]

    assert save((4, "a", 1.0)) == [(4, 1.0)]
    assert save((2, "a", 2.0)) == [(2, 2.0), (4, 1.0)]
    assert save((4, "a", 3.0)) == [(2, 2.0), (4, 3.0)]
    # Other settings: another pipeline. Its scores do not stand beside those of this one.
    assert save((2, "b", 4.0)) == [(2, 4.0)]
