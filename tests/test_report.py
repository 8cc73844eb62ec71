"""The report of a made-up result: it holds what it should, fetches nothing and survives odd input."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.evaluation.report import report_identity, write_report
from deepfere.frame import Alignment
from tests.reports import FakeResult, Page, assert_self_contained, label_block, pictures, report


@pytest.fixture
def small(monkeypatch):
    """Small pictures: quicker where only the text matters."""
    monkeypatch.setattr("deepfere.evaluation.report.PANEL_SIDES_PX", (160,))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[str, Page]:
    rows = [
        {
            "what": "all ions",
            "bicubic_db": 19.2,
            "no_guide_db": 19.4,
            "ours_db": 21.3,
            "bicubic_r": 0.842,
            "ours_r": 0.9,
        },
        {"what": "smooth", "bicubic_db": 0.0, "no_guide_db": 30.1, "ours_db": float("nan")},
    ]
    evaluation = {
        "wald": [
            {"ratio": 2, "rows": rows, "alignment": "found", "note": "720 pixels"},
            {"ratio": 4, "rows": rows[:1], "alignment": "refused", "note": ""},
        ],
        "truth": [{"kind": "piecewise", "ions": 4, "no_guide_db": 17.0, "ours_db": 18.5, "gain_db": 1.5}],
        "consistency": 3.0e-8,
    }
    return report(FakeResult(), tmp_path_factory.mktemp("full"), evaluation=evaluation)


def test_report_says_what_was_found(full):
    text, page = full
    assert_self_contained(text, page)
    assert "2 of 5 ions are informed by the stain (held-out), 2 partly, 1 is plain interpolation." in page.text
    for words in (
        "12 negative intensities were set to zero",
        "turned by 20.0° clockwise",
        "held-out R² of random placements (highest) 0.24",
        "not kept: no better on held-out blocks",
        "A tear of 0.072 mm² on the slide is not used: 9 measured pixels do not show",
        "2 more places look like a tear, a fold or ink and are used",
        "1 h 07 min",
        "1 min 15 s",
        "0123abcd",
        "napari --plugin napari-ome-zarr sample.zarr/stain",
        "deepfere.open('sample.zarr')",
        "the largest difference is 2.0e-08 of the ion's maximum",
        "12.5 × 10 µm",
        "× 4, 76 × 92 pixels",
    ):
        assert words in page.text, words
    assert '"factor": 4' in page.text


def test_every_ion_has_its_pictures_and_a_row(full):
    text, page = full
    found = pictures(page)
    # 5 ions x (measured, reconstructed, uncertainty), zoom with its stain, 4 overlays, histogram, maps of what was
    # inferred (all ions, 3 ions), 3 ions x (measured, exact, denoised).
    assert len(found) == 15 + 4 + 4 + 1 + 4 + 9
    assert text.count('<tr><td class="n">7') == 5
    for mz in FakeResult().ions["mz"]:
        assert f"m/z {mz:.4f}" in page.text
    assert max(max(picture.size) for picture in found) <= 900
    for picture in found:
        low, high = np.asarray(picture.convert("L"), dtype=float).min(), np.asarray(picture.convert("L")).max()
        assert high > low, "a picture without content"


def test_scores_are_shown_when_evaluated(full, small, tmp_path):
    _, page = full
    for words in (
        "19.20 dB · r 0.842",
        "21.30 dB · r 0.900",
        "+2.10 dB",
        "+1.90 dB",
        "alignment refused",
        "+1.50 dB",
        "0.00 dB",
    ):
        assert words in page.text, words
    assert "3.0e-08 of an ion's maximum" in page.text
    _, without = report(FakeResult(ions=1), tmp_path)
    assert "Wald" not in without.text and "known truth" not in without.text


@pytest.mark.parametrize("shape, factor", [((1, 1), 8), ((2, 37), 3), ((41, 3), 1), ((7, 9), 5)])
def test_odd_sizes(shape, factor, small, tmp_path):
    result = FakeResult(shape=shape, factor=factor, ions=2, levels=1)
    result._measured = [np.nan_to_num(image, nan=1.0) for image in result._measured]
    text, page = report(result, tmp_path)
    assert_self_contained(text, page)


def test_one_ion_and_all_smooth(small, tmp_path):
    _, page = report(FakeResult(ions=1, kinds=["smooth"]), tmp_path)
    assert "The one ion is not informed by the stain (held-out)" in page.text
    assert "informs least" not in page.text
    result = FakeResult(ions=4, kinds=["smooth"] * 4)
    result.alignment_start = None
    result.ions["held_out_r2"] = [np.nan, -3.0, 0.0, np.nan]
    result.ions["null_r2"] = np.nan
    result.provenance = {}
    result.alignment = Alignment(
        np.eye(2), np.zeros(2), evidence={"source": "landmarks", "pairs": 7, "residual_um": 3.21}
    )
    _, page = report(result, tmp_path)
    assert "how it was obtained landmarks landmark pairs 7 median landmark residual, µm 3.21" in page.text
    assert "None of the 4 ions is informed by the stain" in page.text
    assert "on the slide, as given" in page.text and "before" not in page.text


def test_nothing_measured_or_all_zero(small, tmp_path):
    result = FakeResult(ions=2)
    result._fine = [np.full_like(result._fine[0], np.nan), np.zeros_like(result._fine[0])]
    result._measured = [np.full((19, 23), np.nan), np.zeros((19, 23))]
    result.ions["consistency"] = [np.nan, 0.0]
    text, page = report(result, tmp_path)
    assert_self_contained(text, page)
    result.ions["consistency"] = np.nan
    _, page = report(result, tmp_path)
    assert "was not recorded" in page.text


def test_names_cannot_inject_html(small, tmp_path):
    evil = '</script><img src="http://evil.example/x" onerror=alert(1)>&"\''
    result = FakeResult(ions=3, path=f"/data/{evil}.zarr")
    for key, value in {
        "identity": evil,
        "versions": {evil: evil},
        "model": {"tier": evil, "name": evil},
        "run": {evil: [evil]},
        "timings_s": {evil: 1.0},
        "config": {evil: evil},
        "warnings": [evil],
    }.items():
        result.provenance[key] = value
    stages = [{"stage": evil, "r2": 0.1, "kept": True}]
    result.alignment = result.alignment.with_evidence(source=evil, stages=stages)
    rows = [{"what": evil, "ours_db": 1.0}]
    evaluation = {
        "wald": [{"ratio": 2, "rows": rows, "alignment": evil, "note": evil}],
        "truth": [{"kind": evil}],
        "boundaries": [label_block(labels=evil, notes=[evil], picture="https://x.org/a.png", colours=[evil, evil])],
    }
    evaluation["boundaries"][0]["rows"][0]["method"] = evil
    text, page = report(result, tmp_path, evaluation=evaluation)
    assert_self_contained(text, page)
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert evil in " ".join(page.words)


def test_truth_is_shown_beside_the_ions(small, tmp_path):
    result = FakeResult(ions=2)
    mz = float(result.ions["mz"].iloc[0])
    _, page = report(result, tmp_path, truth={mz: result._fine[0]})
    assert page.text.count("r = 1.000 against the truth") == 1


def test_long_tables_are_short_at_first(small, tmp_path):
    _, few = report(FakeResult(shape=(6, 6), ions=40), tmp_path)
    assert not any(a.get("id") == "every" for _, a in few.tags)
    text, many = report(FakeResult(shape=(6, 6), ions=41), tmp_path)
    assert any(a.get("id") == "every" for _, a in many.tags)
    assert "tr:nth-child(n+41)" in text


def test_noisy_sections_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfere.evaluation.report.MAX_BYTES", 700_000)
    result = FakeResult(shape=(40, 40), factor=8, ions=6)
    rng = np.random.default_rng(0)
    result._fine = [rng.random(image.shape, dtype=np.float32) for image in result._fine]
    _, page = report(result, tmp_path)
    sides = [max(picture.size) for picture in pictures(page) if picture.format == "PNG" and picture.mode == "P"]
    assert max(sides) <= 480 and sides[0] == 300


def test_same_result_same_bytes(small, tmp_path):
    first, _ = report(FakeResult(ions=2), tmp_path)
    assert first == report(FakeResult(ions=2), tmp_path)[0]


def test_refuses_what_it_cannot_write(tmp_path):
    result = FakeResult(ions=1)
    with pytest.raises(InputError, match="is a folder"):
        write_report(result, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(result, tmp_path / "file" / "report.html")
    # What is not a report stays, and nothing is written into a store.
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    with pytest.raises(InputError, match="is no report of deepfere"):
        write_report(result, tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"
    (tmp_path / "store.zarr" / "basis").mkdir(parents=True)
    (tmp_path / "store.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(InputError, match="lies inside the store"):
        write_report(result, tmp_path / "store.zarr" / "basis" / "report.html")
    assert write_report(result, write_report(result, tmp_path / "r.html")).exists()
    result.ions = result.ions.iloc[:0]
    with pytest.raises(InputError, match="no ions"):
        write_report(result, tmp_path / "report.html")


def test_reports_say_whose_they_are(tmp_path):
    assert report_identity(tmp_path / "none.html") is None
    (tmp_path / "old.html").write_text("<html><title>of an earlier version</title>")
    assert report_identity(tmp_path / "old.html") is None
    assert report_identity(write_report(FakeResult(), tmp_path / "r.html")) == "0123abcd"


def test_settings_are_valid_json(full):
    text, _ = full
    shown = re.search(r"<summary>Settings</summary><pre>(.*?)</pre>", text, re.S)
    assert shown is not None and json.loads(shown[1].replace("&#34;", '"')) == {"factor": 4}
