"""The report of a made-up result: it holds what it should, fetches nothing and survives odd input."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from deepfere.errors import InputError
from deepfere.evaluation import figures
from deepfere.evaluation.report import MAX_BYTES, report_identity, write_report
from deepfere.evaluation.report_alignment import describe
from deepfere.evaluation.report_pictures import page_level, pick_ions, thin
from deepfere.evaluation.report_tables import duration_text, exactness, nonnegative, number, verdict
from deepfere.frame import Alignment, Displacement, SectionGrid


class FakeResult:
    """Exactly what a result offers to the report, from a smooth random tissue."""

    def __init__(self, shape=(19, 23), factor=4, ions=5, kinds=None, seed=0, levels=None, path="sample.zarr"):
        rng = np.random.default_rng(seed)
        self.path, self.factor = path, factor
        self.grid = SectionGrid(shape, (50.0, 40.0))
        h, w = shape[0] * factor, shape[1] * factor
        y, x = np.mgrid[:h, :w]
        tissue = ((y / h - 0.5) ** 2 + (x / w - 0.5) ** 2) < 0.2
        self._fine = []
        for k in range(ions):
            image = ndimage.gaussian_filter(rng.random((h, w)), 1.5 + k % 4)
            image = (image - image.min()) / (image.max() - image.min()) * tissue * 10.0 ** (k % 6)
            self._fine.append(image.astype(np.float32))
        means = [image.reshape(shape[0], factor, shape[1], factor).mean((1, 3)) for image in self._fine]
        hole = np.zeros(shape, bool)
        hole[:2], hole[:, -1] = True, True
        fine_hole = np.repeat(np.repeat(hole, factor, 0), factor, 1)
        self._measured = [np.where(hole, np.nan, mean) for mean in means]
        self._fine = [np.where(fine_hole, np.float32(np.nan), image) for image in self._fine]
        self._stain = np.stack([np.where(tissue, c, 240).astype(np.uint8) for c in (200, 120, 170)])
        self.levels = levels or 3
        kinds = kinds or [["stain-informed", "partly", "smooth"][k % 3] for k in range(ions)]
        score = {"stain-informed": 0.6, "partly": 0.2, "smooth": -0.1}
        self.ions = pd.DataFrame(
            {
                "mz": 700.0 + 10.123456 * np.arange(ions),
                "held_out_r2": [score[kind] - 0.001 * k for k, kind in enumerate(kinds)],
                "gate": [{"stain-informed": 0.8, "partly": 0.3, "smooth": 0.0}[kind] for kind in kinds],
                "informed": kinds,
                "null_r2": np.full(ions, -0.05),
                "consistency": np.full(ions, 2e-8),
                "nonneg_steps": [5 * (k % 2) for k in range(ions)],
            }
        )
        turn = np.deg2rad(20.0)
        matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        spline = Displacement((0.0, 0.0), (300.0, 300.0), np.full((5, 5, 2), 8.0))
        evidence = {
            "source": "search",
            "held_out_r2": 0.61,
            "runner_up_r2": 0.33,
            "null_r2": [0.1, 0.24],
            "stages": [{"stage": "affine", "r2": 0.61, "kept": True}, {"stage": "spline", "r2": 0.6, "kept": False}],
        }
        self.alignment = Alignment(matrix, np.array([250.0, 300.0]), spline, evidence)
        self.alignment_start: Alignment | None = Alignment(np.eye(2), np.array([150.0, 180.0]))
        self.provenance: dict[str, Any] = {
            "identity": "0123abcd",
            "versions": {"deepfere": "0.1.0", "torch": "2.9"},
            "model": {"tier": "T1", "name": "ridge", "version": "3"},
            "run": {"command": "deepfere fuse"},
            "timings_s": {"ingest": 3.25, "align": 75.0, "reconstruct": 4000.0},
            "config": {"factor": factor},
            "warnings": ["12 negative intensities were set to zero"],
        }

    def _at(self, mz: float) -> int:
        return int(np.argmin(np.abs(self.ions["mz"].to_numpy() - mz)))

    def ion(self, mz: float, level: int = 0) -> da.Array:
        assert level < self.levels
        return da.from_array(self._fine[self._at(mz)][:: 2**level, :: 2**level], chunks=(32, 32))

    def uncertainty(self, mz: float, level: int = 0) -> da.Array:
        assert level < self.levels
        fine = self._fine[self._at(mz)][:: 2**level, :: 2**level]
        return da.from_array(0.1 * fine + np.float32(0.01), chunks=(32, 32))

    def measured(self, mz: float) -> np.ndarray:
        return self._measured[self._at(mz)]

    def stain(self, level: int = 0) -> da.Array:
        return da.from_array(self._stain[:, :: 2**level, :: 2**level], chunks=(3, 32, 32))

    def overview(self) -> tuple[np.ndarray, tuple[float, float]]:
        picture = np.full((60, 70, 3), 235, np.uint8)
        picture[15:45, 15:50] = (190, 110, 160)
        return picture, (25.0, 24.0)


class Page(HTMLParser):
    """Collects what a browser would act on."""

    VOID = frozenset({"meta", "img", "br", "input", "source", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(result: Any, folder: Path, **kwargs: Any) -> tuple[str, Page]:
    path = write_report(result, folder / "report.html", **kwargs)
    assert path == folder / "report.html"
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_self_contained(text: str, page: Page) -> None:
    assert len(text.encode()) < MAX_BYTES
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/"), (tag, name, value)
        if tag == "img":
            assert attributes.get("alt")
    assert tuple(tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed")) == ()
    assert set(re.findall(r"url\((\w+:)", text)) == {"data:"}
    assert "@import" not in text and "fetch(" not in text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy


def pictures(page: Page) -> list[Image.Image]:
    found: list[Image.Image] = []
    for tag, attributes in page.tags:
        if tag == "img":
            head, data = str(attributes["src"]).split(",", 1)
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            picture.load()
            assert picture.format is not None and picture.format.lower() in head
            found.append(picture)
    return found


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
    # 5 ions x (measured, reconstructed, uncertainty), zoom with its stain, 4 overlays, histogram.
    assert len(found) == 15 + 4 + 4 + 1
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


def label_block(**changes: Any) -> dict[str, Any]:
    """Scores against a label image, as `evaluate --labels` writes them."""
    picture = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    scores = {"bicubic": (0.61, 0.8, 0.9), "no_guide": (0.62, 0.7, 0.7), "ours": (0.75, None, 0.95)}
    rows = [
        {"method": name, "f1": [f1], "hausdorff95_px": off, "dice": dice, "class_dice": [dice, None], "picture": source}
        for name, (f1, off, dice) in scores.items()
    ]
    return {
        "labels": "/somewhere/annotation.png",
        "classes": [1, 4],
        "colours": ["#4477aa", "#ee6677"],
        "tolerances_px": [0.5],
        "notes": ["class 9 is rare"],
        "picture": source,
        "rows": rows,
    } | changes


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
    with pytest.raises(InputError, match="not a local file name"):
        write_report(result, tmp_path)
    with pytest.raises(InputError, match="not a local file name"):
        write_report(result, "s3://bucket/report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(result, tmp_path / "file" / "report.html")
    result.ions = result.ions.iloc[:0]
    with pytest.raises(InputError, match="no ions"):
        write_report(result, tmp_path / "report.html")


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


def test_reports_say_whose_they_are(tmp_path):
    assert report_identity(tmp_path / "none.html") is None
    (tmp_path / "old.html").write_text("<html><title>of an earlier version</title>")
    assert report_identity(tmp_path / "old.html") is None
    assert report_identity(write_report(FakeResult(), tmp_path / "r.html")) == "0123abcd"


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


def test_area_resample_is_an_average_and_knows_holes():
    image = np.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(figures.area_resample(image, (1, 1)), [[image.mean()]])
    np.testing.assert_array_equal(figures.area_resample(image, (6, 8)), image.repeat(2, 0).repeat(2, 1))
    np.testing.assert_allclose(figures.area_resample(image, (3, 2)), image.reshape(3, 2, 2).mean(2))
    holed = image.copy()
    holed[:, 0], holed[1, 1] = np.nan, np.nan
    out = figures.area_resample(holed, (3, 2))
    np.testing.assert_array_equal(out[:, 0], [1.0, np.nan, 9.0])
    colours = figures.area_resample(np.stack([image, 2 * image], -1), (5, 7))
    np.testing.assert_allclose(colours[..., 1], 2 * colours[..., 0])
    np.testing.assert_allclose(colours.mean((0, 1)), [image.mean(), 2 * image.mean()])


def test_ranges_bars_and_thresholds():
    assert figures.robust_top(np.arange(1001.0), np.array([np.nan])) == pytest.approx(995.0)
    rare = np.zeros(10_000)
    rare[7] = 3.0
    assert figures.robust_top(rare) == 3.0
    assert figures.robust_top(np.zeros(3)) == 1.0
    assert [figures.scale_bar_um(w) for w in (40, 79, 2000, 4000, 9e4)] == [10, 10, 500, 1000, 20000]
    assert figures.length_text(200.0) == "200 µm" and figures.length_text(2000.0) == "2 mm"
    two = np.concatenate([np.full(50, 1.0), np.full(30, 9.0), [np.nan]])
    assert 4 < figures.otsu_threshold(two) < 6
    assert np.isnan(figures.otsu_threshold(np.ones(4)))


def test_contours_lie_where_the_tissue_ends():
    image = np.zeros((20, 30))
    image[5:15, 10:20] = 1.0
    image[0, 29] = np.nan
    (line,) = figures.contours_um(image, 0.5, SectionGrid((20, 30), (50.0, 20.0)))
    # Half-way between the centres of the last pixel in and the first out: the pixels' border.
    np.testing.assert_allclose([line.min(0), line.max(0)], [[250.0, 200.0], [750.0, 400.0]])


def test_overlay_draws_where_it_is_told():
    picture = np.full((50, 100, 3), 255, np.uint8)
    line = figures.Line(np.array([[0.0, 500.0], [500.0, 500.0]]), "#00ff00")
    drawn = figures.overlay(picture, (10.0, 10.0), [line], (0.0, 0.0, 500.0, 1000.0), 200)
    assert drawn.shape == (100, 200, 3)
    green = (drawn[..., 1] > 200) & (drawn[..., 0] < 100)
    assert green.any() and set(np.nonzero(green)[1]) <= {98, 99, 100, 101}
    beyond = figures.overlay(picture, (10.0, 10.0), [], (-250.0, 0.0, 250.0, 1000.0), 200)
    assert (beyond[10, 100] == figures.NOT_MEASURED).all() and (beyond[90, 100] == 255).all()


def test_ion_png_marks_unmeasured_as_transparent():
    png = figures.ion_png(np.array([[0.0, 1.0], [2.0, np.nan]]), 1.0)
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert rgba[1, 1, 3] == 0 and (rgba[..., 3] == 255).sum() == 3
    assert (rgba[0, 1] == rgba[1, 0]).all() and (rgba[0, 0] != rgba[0, 1]).any()
    assert (figures.colourise(np.array([[np.nan]]), 1.0)[0, 0] == figures.NOT_MEASURED).all()


def test_complete_figures_are_png():
    result = FakeResult(ions=1)
    mz = float(result.ions["mz"].iloc[0])
    images = [("measured", result.measured(mz)), ("reconstructed", np.asarray(result.ion(mz)))]
    stain = np.moveaxis(result._stain, 0, -1)
    figure = figures.ion_panel(
        images, result.grid.extent_um, stain=stain, uncertainty=np.asarray(result.uncertainty(mz)), title="<m/z>"
    )
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["stain", "measured", "reconstructed", "uncertainty (1 s.d.)"]
    limits = {ax.images[0].get_clim() for ax in figure.axes if ax.get_title() in ("measured", "reconstructed")}
    assert len(limits) == 1
    assert Image.open(io.BytesIO(figures.figure_png(figure, dpi=60))).format == "PNG"
    bare = figures.ion_panel(images[:1], result.grid.extent_um)
    assert figures.figure_png(bare, dpi=40).startswith(b"\x89PNG")


def test_settings_are_valid_json(full):
    text, _ = full
    shown = re.search(r"<summary>Settings</summary><pre>(.*?)</pre>", text, re.S)
    assert shown is not None and json.loads(shown[1].replace("&#34;", '"')) == {"factor": 4}
