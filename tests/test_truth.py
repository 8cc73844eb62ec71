"""What the demo claims, on a small section: gain where the stain shows an ion, none where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.demo import truth_scores
from deepfere.pipeline import fuse

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def plain(phantom, place, ray_session, tmp_path_factory):
    """The run without the stain."""
    target = tmp_path_factory.mktemp("plain") / "plain.zarr"
    return fuse(phantom.imzml, None, target, config=place.config("tracking.uri=none", guide=False))


@pytest.fixture(scope="module")
def scores(phantom, fused, plain):
    return truth_scores(phantom, fused, plain)


def kinds(scores):
    return {row["kind"]: row for row in scores["rows"]}


def test_every_ion_is_scored_once(scores, phantom):
    counted = {kind: row["ions"] for kind, row in kinds(scores).items()}
    assert counted == {kind: phantom.kinds().count(kind) for kind in phantom.kinds()}


def test_the_stain_helps_where_it_shows_the_ion(scores):
    nuclear, mixed = kinds(scores)["nuclear"], kinds(scores)["mixed"]
    assert nuclear["informed"] and mixed["informed"]
    assert nuclear["gain_db"] > 1.5 and nuclear["worst_gain_db"] > 1.0
    assert mixed["gain_db"] > 0.7 and mixed["worst_gain_db"] > 0.3


def test_the_stain_changes_nothing_where_it_says_nothing(scores):
    smooth = kinds(scores)["smooth"]
    assert not smooth["informed"]
    assert -0.05 < smooth["worst_gain_db"] <= smooth["best_gain_db"] < 0.05


def test_scores_are_signal_to_noise_against_the_truth(scores, phantom, fused, plain):
    """One kind of ion, from scratch; and a run against itself gains nothing."""
    f, wanted = fused.factor, {"no_guide_db": [], "ours_db": []}
    seen = np.kron(fused.mask, np.ones((f, f))) > 0
    for m in (m for m, kind in enumerate(phantom.kinds()) if kind == "nuclear"):
        truth = np.asarray(phantom.ions(m), np.float64)[seen]
        for name, result in (("no_guide_db", plain), ("ours_db", fused)):
            image = result.ion(phantom.mz()[m], ppm=10).compute().astype(np.float64)[seen]
            wanted[name].append(10 * np.log10(truth.max() ** 2 / np.mean((image - truth) ** 2)))
    for name, values in wanted.items():
        assert kinds(scores)["nuclear"][name] == pytest.approx(np.mean(values), abs=1e-3)
    assert {row["gain_db"] for row in truth_scores(phantom, plain, plain)["rows"]} == {0.0}


def test_the_alignment_is_scored_in_measured_pixels(scores, phantom, fused):
    points = fused.grid.centres_um()[fused.mask]
    off = np.linalg.norm(fused.alignment.map(points) - phantom.alignment().map(points), axis=1)
    assert scores["alignment_median_px"] == pytest.approx(np.median(off) / phantom.spec.pitch_um, rel=0.05)
    assert scores["alignment_median_px"] < 0.35 and scores["alignment_p90_px"] < 0.8
