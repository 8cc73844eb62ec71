"""Scores at reduced scale: what is compared, what is left out, and where it is shown."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from deepfere.evaluation.evaluate import coverage, load_evaluation, scores_file
from deepfere.evaluation.metrics import keys_bicubic
from deepfere.frame import apart_px

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def copied(fused, place, tmp_path_factory):
    """The shared result elsewhere: scores and report lie beside it."""
    import shutil

    target = tmp_path_factory.mktemp("evaluate") / "copy.zarr"
    shutil.copytree(place.result, target)
    return target


def test_evaluate_scores_and_shows_them(copied, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("deepfere.evaluation.evaluate.LEAST_PX", 60)  # the shared section has 70 at half its scale
    (tmp_path / "closed.yaml").write_text("model:\n  tier: T1\n")
    written = tmp_path / "scores.json"
    given = ("--ratio", 4, "--ratio", 2, "--ratio", 40, "--config", tmp_path / "closed.yaml", "--json", written)
    done = cli("evaluate", copied, *given)
    assert done.code == 0, done
    (tmp_path / "wrong.yaml").write_text("model:\n  tier: T9\n")
    wrong = cli("evaluate", copied, "--config", tmp_path / "wrong.yaml")
    assert wrong.code == 2 and "wrong.yaml" in wrong.errors[0] and "model.tier" in wrong.errors[0]
    assert "x2: alignment" in done.out and "bicubic" in done.out and "no_guide" in done.out
    assert "too few" in done.out
    scores = load_evaluation(copied)
    two, four, forty = scores["wald"]
    assert (two["ratio"], four["ratio"], forty["ratio"]) == (2, 4, 40)
    assert four["rows"] == forty["rows"] == [] and "too few" in four["note"] and "leaves 0" in forty["note"]
    assert two["alignment"] in ("found", "refused")
    # Blind at half the scale, or told: the slide is the right one, so that a placement of its own is near.
    assert ("alignment_apart_px" in two) == (two["alignment"] == "found")
    if two["alignment"] == "found":
        assert 0 <= two["alignment_apart_px"] < 1.5 and "from the one at full scale" in done.out
    assert 0.2 < two["coverage_80"] <= 1.0 and "80 % intervals hold" in done.out
    assert two["coverage_80"] == pytest.approx(np.median([ion["coverage_80"] for ion in two["ions"]]))
    assert two["consistency"] < 1e-5 and two["pixels"] == 70
    everything = two["rows"][0]
    assert everything["what"] == "all ions (24)" and len(two["ions"]) == 24
    for name in ("bicubic", "no_guide", "ours"):
        assert 5 < everything[f"{name}_db"] < 60
        assert -1 <= everything[f"{name}_r"] <= 1
    # Detail that the stain proves must help the ions that it informs.
    informed = next(row for row in two["rows"] if row["what"].startswith("stain-informed"))
    assert informed["ours_db"] > informed["no_guide_db"] + 1.0
    assert informed["ours_r"] > informed["no_guide_r"] + 0.01
    # And leave the others as they are.
    smooth = next(row for row in two["rows"] if row["what"].startswith("smooth"))
    assert smooth["ours_db"] == pytest.approx(smooth["no_guide_db"], abs=0.1)
    page = copied.with_suffix(".html").read_text()
    assert "× 2" in page and "too few" in page and 'href="./copy.evaluation.html"' in page
    every = copied.with_name("copy.evaluation.html").read_text()
    assert 'href="./copy.html"' in every and every.count('<tr><td class="n">') == 48
    for name in ("bicubic", "no_guide", "ours"):
        assert 0 < everything[f"{name}_sam_deg"] < 60 and 0 < everything[f"{name}_ergas"] < 200
    assert "ERGAS" in done.out and "wrong stains" in done.out and "nested" in done.out
    known = scores["evidence"]
    assert known["null_guides"]["count"] == 8 and len(known["ions"]) == len(known["nested"]["ions"]) == 24
    best = max(known["ions"], key=lambda ion: ion["gain_db"])
    assert best["gain_db"] > best["null_p95_db"] + 0.5 and best["null_p95_db"] >= best["null_mean_db"]
    assert json.loads(written.read_text())["wald"][0]["rows"] == two["rows"]
    assert json.loads(scores_file(copied).read_text())["identity"] == scores["identity"]


def test_how_far_two_alignments_are_apart(fused):
    grid, mask = fused.grid, fused.mask
    assert apart_px(fused.alignment, fused.alignment, grid, mask) == 0
    found, pitch = fused.alignment, float(np.mean(fused.grid.pitch_um))
    size = np.sqrt(abs(np.linalg.det(found.matrix)))
    moved = replace(found, offset_um=found.offset_um + np.array([0.6, 0.8]) * size * pitch)
    assert apart_px(moved, found, grid, mask) == pytest.approx(1.0)


def test_the_bicubic_of_the_table_is_recomputed(copied, fused):
    """One number of the table, from scratch."""
    scores = load_evaluation(copied)
    mz = scores["wald"][0]["ions"][0]["mz"]
    y, mask = np.asarray(fused.measured(mz), np.float64), fused.mask
    pairs = (y.shape[0] // 2, 2, y.shape[1] // 2, 2)
    cut = (slice(0, pairs[0] * 2), slice(0, pairs[2] * 2))
    coarse_mask = mask[cut].reshape(pairs).all((1, 3))
    coarse = np.where(coarse_mask, y[cut].reshape(pairs).mean((1, 3)), 0.0)
    image = keys_bicubic(coarse, 2, coarse_mask)
    inside = np.repeat(np.repeat(coarse_mask, 2, 0), 2, 1) & mask[cut]
    error = np.sqrt(((image - y[cut])[inside] ** 2).mean())
    assert scores["wald"][0]["ions"][0]["bicubic_rmse"] == pytest.approx(error, rel=1e-4)


def test_labels_are_compared_without_running_again(copied, cli, phantom):
    before = load_evaluation(copied)
    began = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    done = cli("evaluate", copied, "--labels", phantom.truth / "labels.npy", "--against", f"itself={copied}")
    assert done.code == 0, done
    assert "HD95 px" in done.out and "x2: alignment" not in done.out
    after = load_evaluation(copied)
    assert {k: v for k, v in after.items() if k != "boundaries"} == before
    (block,) = after["boundaries"]
    names = phantom.class_names()
    assert "cortex" in [names[value] for value in block["classes"]] and len(block["classes"]) >= 3
    rows = {row["method"]: row for row in block["rows"]}
    assert list(rows) == ["bicubic", "no_guide", "ours", "itself"]
    assert {**rows["itself"], "method": "ours"} == rows["ours"]
    for row in rows.values():
        assert 0.3 < row["f1"][2] <= 1 and 0.3 < row["dice"] <= 1 and 0 < row["hausdorff95_px"] < 20
    page = copied.with_suffix(".html").read_text()
    assert "Borders of the tissue labels" in page and "× 2" in page
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == began
    wrong = cli("evaluate", copied, "--labels", phantom.truth / "gone.npy")
    assert wrong.code == 2 and len(wrong.errors) == 1 and "no such file" in wrong.errors[0]


def test_scores_of_another_result_are_not_shown(copied):
    file = scores_file(copied)
    scores = json.loads(file.read_text())
    file.write_text(json.dumps({**scores, "identity": "other"}))
    assert load_evaluation(copied) is None


def test_what_cannot_be_done_is_refused_before_work_starts(copied, cli, tmp_path, monkeypatch):
    began = "evaluate: "
    for options, words in (
        (("--ratio", 1), "degrades nothing"),
        (("--json", tmp_path / "gone" / "s.json"), "cannot be written"),
        (("--json", tmp_path), "cannot be written"),
    ):
        done = cli("evaluate", copied, *options)
        assert done.code == 2 and len(done.errors) == 1 and words in done.errors[0] and began not in done.err
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode, **more: mode != os.W_OK and access(path, mode, **more))
    done = cli("evaluate", copied)
    assert done.code == 2 and len(done.errors) == 1 and "beside it" in done.errors[0]


def test_a_slide_that_is_gone_is_told(copied, cli):
    file = copied / "provenance.json"
    told = json.loads(file.read_text())
    told["section"]["slide"] = "/nowhere/slide.svs"
    file.write_text(json.dumps(told))
    done = cli("evaluate", copied, "--ratio", 2)
    assert done.code == 2 and len(done.errors) == 1 and "slide" in done.errors[0]


def test_coverage_by_hand():
    truth, estimate = np.array([[[0.0, 5.0, 9.0, 1.0]]]), np.array([[[0.0, 5.1, 5.0, 0.5]]])
    sd = np.array([[[1.0, 1.0, 1.0, 0.01]]])
    # On the edge (cut at zero): half; inside; outside; outside.
    assert coverage(truth, estimate, sd, np.ones((1, 4), bool)) == pytest.approx(1.5 / 4)


def test_a_placement_of_its_own_is_compared_with_the_results(fused, place, monkeypatch):
    """The run at reduced scale is made in a folder that is gone afterwards: what is known of it must be read before."""
    from deepfere.evaluation import wald as module
    from deepfere.evaluation.metrics import degrade

    moved = replace(fused.alignment, offset_um=fused.alignment.offset_um + 25.0)
    real = module.fuse

    def placed(msi, slide, out, **given):
        """As if the search had found the result's place, half a measured pixel off."""
        if slide is not None:
            moved.save(msi.with_name("place.json"))
            given["alignment"] = msi.with_name("place.json")
        return real(msi, slide, out, **given)

    monkeypatch.setattr(module, "fuse", placed)
    cube = np.stack([fused.measured(float(mz)) for mz in fused.ions["mz"]]).astype(np.float64)
    coarse, mask = degrade(cube, fused.mask, 2)
    config = place.config("model.tier=T1", "tracking.uri=none")
    scores = module.wald(fused, config, cube, coarse, mask, 2, lambda *_: None)
    assert scores["alignment"] == "found"
    assert scores["alignment_apart_px"] == pytest.approx(apart_px(moved, fused.alignment, fused.grid, fused.mask))
    assert scores["alignment_evidence"]["held_out_r2"] == fused.alignment.evidence["held_out_r2"]
