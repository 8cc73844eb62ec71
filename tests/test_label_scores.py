"""Tissue labels against the images of a small result that is written by hand: its detail is the truth's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.evaluation import label_scores as module
from deepfere.evaluation import segmentation
from deepfere.evaluation.evaluate import evaluate_labels, load_evaluation, render, save_scores, scores_file
from deepfere.evaluation.label_scores import label_scores
from deepfere.evaluation.labels import majority
from deepfere.evaluation.metrics import keys_bicubic
from deepfere.evaluation.segmentation import learn, segment, signal_to_noise
from deepfere.measured.operator import cell_means, upsample
from deepfere.measured.writer import write_measured
from deepfere.model.guide import Cells
from deepfere.reconstruction.result import FORMAT, FORMAT_VERSION, Result
from deepfere.store import open_group

SHAPE, F, IONS = (22, 20), 4, 5
MZ = 700.0 + np.arange(IONS)


def tissue() -> np.ndarray:
    """Three classes, all of it labelled: two islands, and a border with teeth that a measured pixel does not resolve.

    A smooth border is where interpolated images put it.
    """
    y, x = np.mgrid[: SHAPE[0] * F, : SHAPE[1] * F] / F
    out = np.where(x + 1.5 * np.sin(y / 2.5) + 0.75 * (np.floor(2 * y) % 2) > 9.6, 2, 1)
    out[(y - 15) ** 2 + (x - 4.5) ** 2 < 9.3] = 5
    out[(y - 6) ** 2 + (x - 14.5) ** 2 < 9.3] = 5
    return out.astype(np.uint8)


def images(labels: np.ndarray) -> np.ndarray:
    """(M, H, W): every class its own mean spectrum."""
    spectra = np.random.default_rng(4).uniform(1.0, 9.0, (6, IONS))
    return np.moveaxis(spectra[labels], -1, 0)


def write_result(path: Path, *, gate: float = 1.0, guide: bool = True, mz=MZ, scale: float = 1.0) -> Result:
    """A finished result whose detail is all that interpolation does not restore, times the gate."""
    truth = scale * images(tissue())
    noise = np.random.default_rng(5).normal(0, 0.1, (IONS, *SHAPE))
    mask = np.ones(SHAPE, bool)
    mask[:2, :2] = False
    measured = cell_means(truth, F) + noise
    group = open_group(path, "w")
    write_measured(path / "measured", measured, mask, mz, 50.0, {"tolerance_ppm": 5.0})
    values = {"gate": np.full(IONS, gate), "loadings": np.eye(IONS), "detail_scale": np.ones(IONS)}
    values |= {"positivity": np.arange(IONS) % 3, "held_out_r2": np.full(IONS, 0.5), "null_r2": np.zeros(IONS)}
    values |= {"consistency": np.full(IONS, 1e-8), "noise_share": np.zeros(IONS)}
    values |= {"chi_square": np.ones(IONS), "null_mean_r2": np.zeros(IONS), "inferred_share": np.zeros(IONS)}
    for name, value in values.items():
        group.require_group("basis").create_array(name, data=value)
    detail = (truth - upsample(cell_means(truth, F), F)).astype(np.float16)
    group.require_group("detail").create_array("0", data=detail, chunks=(IONS, 16, 16))
    group.require_group("uncertainty").create_array("noise_model", data=np.full((IONS, 5), 0.1))
    attrs: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "factor": F,
        "levels": 2,
        "chunk_px": 16,
    }
    attrs |= {"normalisation": "none", "informed": ["stain-informed"] * IONS, "complete": True}
    group.attrs.update(attrs)
    (path / "provenance.json").write_text(
        json.dumps({"identity": f"id-{gate}", "config": {"guide": guide}, "warnings": [], "timings_s": {}})
    )
    return Result(path)


@dataclass
class Place:
    result: Result
    labels: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("labels")
    np.save(folder / "tissue.npy", tissue())
    return Place(write_result(folder / "ours.zarr"), folder / "tissue.npy")


@pytest.fixture(scope="module")
def block(place) -> dict[str, Any]:
    return label_scores(place.result, place.labels)


def by_name(block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in block["rows"]}


def test_true_detail_gives_true_borders(block):
    assert block["classes"] == [1, 2, 5] and block["ions"] == IONS and not block["notes"]
    assert block["labelled_px"] == (SHAPE[0] * SHAPE[1] - 4) * F * F and 30 < block["border_px"] < 120
    rows = by_name(block)
    assert list(rows) == ["bicubic", "no_guide", "ours"]
    assert rows["ours"]["f1"][0] > 0.97 and rows["ours"]["dice"] > 0.99 and rows["ours"]["hausdorff95_px"] < 0.3
    for name in ("bicubic", "no_guide"):
        assert rows[name]["f1"][0] < rows["ours"]["f1"][0] - 0.05
        assert 0.8 < rows[name]["dice"] < rows["ours"]["dice"] - 0.01
        # A wider tolerance forgives more, and a whole measured pixel forgives interpolation nearly all.
        assert rows[name]["f1"] == sorted(rows[name]["f1"]) and rows[name]["f1"][-1] > 0.95


def test_without_the_stain_is_the_same_with_closed_gates(place, block, tmp_path):
    plain = write_result(tmp_path / "plain.zarr", gate=0.0, guide=False)
    rows = by_name(label_scores(place.result, place.labels, [f"plain={plain.path}"]))
    assert list(rows) == ["bicubic", "no_guide", "ours", "plain"]
    assert {**rows["plain"], "method": ""} == {**rows["no_guide"], "method": ""}
    assert rows["ours"] == by_name(block)["ours"]  # what it is compared with changes nothing
    # Its own table has no row that would be there twice.
    assert list(by_name(label_scores(plain, place.labels))) == ["bicubic", "no_guide"]


def test_decoding_is_the_results_own(place):
    chosen = module._choose(place.result, [])
    decode = module._decoded(place.result, chosen.rows)
    window = decode(Cells(3, 9, 5, 20))
    for n, mz in enumerate(MZ):
        whole = place.result.ion(mz).compute()
        np.testing.assert_allclose(window[n], whole[3 * F : 9 * F, 5 * F : 20 * F], rtol=1e-5)
    bicubic = module._bicubic(chosen.cube, F)(Cells(0, 7, 12, 20))
    whole = keys_bicubic(place.result.measured(MZ[1]), F, place.result.mask)
    seen = np.isfinite(whole[: 7 * F, 12 * F :])
    np.testing.assert_allclose(bicubic[1][seen], whole[: 7 * F, 12 * F :][seen], rtol=1e-6)


def test_segmentations_do_not_depend_on_windows(place, block, monkeypatch):
    monkeypatch.setattr(segmentation, "WINDOW_PX", 12)
    assert label_scores(place.result, place.labels)["rows"] == block["rows"]


def test_a_block_is_not_learned_from():
    """Other labels in a block, and in the ring around it, leave its discriminant as it is."""
    truth = tissue()
    cube = cell_means(images(truth), F) + np.random.default_rng(6).normal(0, 0.1, (IONS, *SHAPE))
    mask, coarse = np.ones(SHAPE, bool), majority(truth, F)
    rule = learn(cube, mask, coarse)
    block = int(rule.blocks[8, 9])
    rows, columns = (np.flatnonzero((rule.blocks == block).any(axis)) for axis in (1, 0))
    other = coarse.copy()
    ring = (slice(rows[0] - 1, rows[-1] + 2), slice(columns[0] - 1, columns[-1] + 2))
    other[ring] = np.where(coarse[ring] == 1, 2, 1)
    again = learn(cube, mask, other)
    np.testing.assert_array_equal(again.blocks, rule.blocks)
    np.testing.assert_array_equal(again.weights[block], rule.weights[block])
    far = int(rule.blocks[-1, -1])
    assert not np.array_equal(again.weights[far], rule.weights[far])


def test_the_border_lies_where_two_classes_mix_in_equal_parts():
    """However unequal their areas: a rule with other priors would move it."""
    labels = np.ones((20, 30), np.uint8)
    labels[:, 24:] = 2
    levels = np.where(labels == 2, 3.0, 1.0)
    cube = np.stack([levels, 4 - levels]) + np.random.default_rng(0).normal(0, 0.05, (2, 20, 30))
    rule = learn(cube, np.ones(labels.shape, bool), labels)
    share = np.linspace(0, 1, 201)
    mixed = np.stack([1 + 2 * share, 3 - 2 * share])[:, None]
    turned = np.argmax(rule.classes(mixed, np.zeros((1, 201), int))[0] == 2)
    assert share[turned] == pytest.approx(0.5, abs=0.03)


def test_only_what_is_wanted_is_segmented(place):
    chosen = module._choose(place.result, [])
    rule = learn(chosen.cube, place.result.mask, majority(tissue(), F))
    wanted = np.zeros(SHAPE, bool)
    wanted[4, 7] = True
    found = segment(rule, module._bicubic(chosen.cube, F), wanted, F)
    assert (found[16:20, 28:32] > 0).all() and np.count_nonzero(found) == F * F


def test_few_ions_those_that_stand_out(place, monkeypatch):
    rng = np.random.default_rng(0)
    ramp, noise = np.tile(np.linspace(0, 9, 30), (25, 1)), rng.normal(0, 1, (25, 30))
    cube = np.stack([noise, 0.1 * (ramp + noise), ramp + 0.1 * noise, np.full((25, 30), 4.0), 1000 * noise])
    strength, used = signal_to_noise(cube, np.ones((25, 30), bool))
    assert list(np.argsort(-strength)[:2]) == [2, 1] and strength[3] == 0  # whatever the unit; constants last
    assert strength[[0, 4]] == pytest.approx(1.0, abs=0.15) and used[2] == pytest.approx(0.1, rel=0.15)
    monkeypatch.setattr(module, "MOST_IONS", 2)
    chosen = module._choose(place.result, [])
    strength = signal_to_noise(np.stack([place.result.measured(mz) for mz in MZ]), place.result.mask)[0]
    assert chosen.rows == sorted(np.argsort(-strength)[:2]) and chosen.cube.shape == (2, *SHAPE)


def changed(tmp_path: Path, change) -> Path:
    image = tissue()
    change(image)
    np.save(tmp_path / "changed.npy", image)
    return tmp_path / "changed.npy"


def test_rare_classes_are_left_out_and_told(place, tmp_path):
    def island(image):
        image[40:48, 40:52] = 9  # six measured pixels

    block = label_scores(place.result, changed(tmp_path, island))
    assert block["classes"] == [1, 2, 5]
    assert block["notes"][0].startswith("class 9 is left out: in 6 measured pixels only")


def test_classes_that_nowhere_touch_have_dice_only(place, tmp_path):
    def gap(image):
        image[image == 5] = 0
        image[:, 24:56] = 0

    block = label_scores(place.result, changed(tmp_path, gap))
    assert any("no border to score" in note for note in block["notes"])
    ours = by_name(block)["ours"]
    assert ours["f1"] == [None] * 4 and ours["hausdorff95_px"] is None and ours["dice"] > 0.99
    assert "-" in render({"boundaries": [block], "consistency": 0.0})


def one_class(image):
    image[:] = 3


def nothing(image):
    image[:] = 0


def outside(image):
    image[:] = 0
    image[:4, :4] = 1
    image[4:8, :8] = 2


def one_inside(image):
    image[:] = 1
    image[:8, :8] = 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_class, "only one class (3)"),
        (nothing, "every pixel is 0"),
        (outside, "no labelled pixel was measured"),
        (one_inside, "only one class (1)"),
    ],
)
def test_labels_that_say_nothing_are_refused(place, tmp_path, change, told):
    path = changed(tmp_path, change)
    with pytest.raises(InputError) as error:
        label_scores(place.result, path)
    assert told in str(error.value) and str(error.value).startswith(f"{path}: ")


def test_other_results_that_do_not_fit_are_refused(place, tmp_path):
    other = write_result(tmp_path / "other.zarr", scale=2.0)
    foreign = write_result(tmp_path / "foreign.zarr", mz=MZ + 100.0)
    for text, told in (
        ("other.zarr", "is no NAME=RESULT"),
        ("=other.zarr", "is no NAME=RESULT"),
        (f"ours={other.path}", "'ours' is taken"),
        (f"scaled={other.path}", "other measured values"),
        (f"foreign={foreign.path}", "no ion in common"),
        (f"gone={tmp_path / 'gone.zarr'}", "gone.zarr"),
    ):
        with pytest.raises(InputError) as error:
            label_scores(place.result, place.labels, [text])
        assert told in str(error.value), text
    with pytest.raises(InputError, match="is taken"):
        label_scores(place.result, place.labels, [f"a={place.result.path}", f"a={place.result.path}"])


def test_parts_of_the_scores_stay_until_measured_again(place, tmp_path):
    result = write_result(tmp_path / "kept.zarr")
    wald = [{"ratio": 2, "alignment": "found", "note": "", "rows": [], "ions": []}]
    save_scores(result, wald=wald)
    np.save(tmp_path / "second.npy", tissue())
    for path in (place.labels, tmp_path / "second.npy", place.labels):
        found = evaluate_labels(result, path)
        assert [b["labels"] for b in found["boundaries"]] == [str(path)] and "wald" not in found
    known = load_evaluation(result.path)
    assert known is not None and known["wald"] == wald
    assert [Path(b["labels"]).name for b in known["boundaries"]] == ["second.npy", "tissue.npy"]
    assert "HD95 px" in render(found) and "no_guide" in render(found) and "x2" not in render(found)
    # Those of another result are not carried on.
    scores_file(result.path).write_text(json.dumps({**known, "identity": "another"}))
    assert set(save_scores(result, wald=[])) == {"identity", "consistency", "wald"}
