"""The stages as commands on a study of two sections that share one model; tiles that equal the whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import deepfere
from deepfere.frame import Alignment
from deepfere.model.fit import SectionFit
from deepfere.model.guide import Cells
from deepfere.phantom import PhantomSpec, write_phantom
from deepfere.pipeline import learn
from deepfere.training import tracking as registry
from tests.conftest import FACTOR

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def manifest(phantom, tmp_path_factory):
    """Two sections, both aligned by hand: the search has its own tests."""
    folder = tmp_path_factory.mktemp("study")
    truth = Alignment.load(phantom.truth / "alignment.json")
    truth.save(folder / "right.json")
    Alignment(truth.matrix, truth.offset_um + [8.0, -5.0]).save(folder / "near.json")
    sections = [
        {"name": name, "msi": str(phantom.imzml), "slide": str(phantom.slide), "alignment": f"{file}.json"}
        for name, file in (("one", "right"), ("two", "near"))
    ]
    (folder / "study.yaml").write_text(yaml.safe_dump({"sections": sections}))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


@pytest.fixture
def stage(cli, manifest, place, tracking, ray_session):
    def run(name: str, *more: object):
        settings = [s for s in place.overrides if not s.startswith("tracking")] + [f"tracking.uri={tracking}"]
        return cli(name, manifest, "-o", manifest.parent / "work", "--factor", FACTOR, *settings, *more)

    return run


def markers(manifest) -> dict[str, int]:
    return {p.stem: p.stat().st_mtime_ns for p in (manifest.parent / "work" / "done").glob("*.json")}


def test_stage_by_stage_to_one_model_for_both(stage, manifest, tracking):
    from mlflow import MlflowClient

    for name, word in (("ingest", "24 ions, 24 x 21 pixels"), ("align", "from given"), ("tile", "24 ions")):
        before = markers(manifest)
        done = stage(name)
        assert done.code == 0, done
        assert [line.split(":")[0] for line in done.out.splitlines()] == ["one", "two"] and word in done.out
        after = markers(manifest)
        # What is done is not done again.
        assert {key: after[key] for key in before} == before
        made = {f"{name}-one", f"{name}-two"}
        if name == "ingest":  # their ions are found together
            made |= {f"{step}-{section}" for step in ("look", "sample", "structure") for section in ("one", "two")}
            made |= {"ions"}
        assert made == set(after) - set(before)
    done = stage("train")
    assert done.code == 0, done
    assert "registered as deepfere 1" in done.out and "two: fitted" in done.out
    models = [
        json.loads((manifest.parent / "work" / "sections" / s / "model.json").read_text()) for s in ("one", "two")
    ]
    assert models[0]["network"] == models[1]["network"]
    weights = [(manifest.parent / "work" / "sections" / s / "network.safetensors").read_bytes() for s in ("one", "two")]
    assert weights[0] == weights[1]
    assert len(MlflowClient(tracking).search_model_versions("name='deepfere'")) == 1
    recorded = sections_of(tracking)
    assert set(recorded) == {"one", "two"}
    assert all(run.info.status == "FINISHED" and "ions_informed" in run.data.metrics for run in recorded.values())


def test_workers_of_ray_learn_what_the_run_learns_by_itself(stage, manifest, place, tracking, cli):
    """One the same to the bit; two, which share each step's patches, the same losses, and weights to rounding."""
    work = manifest.parent / "work"
    settings = [s for s in place.overrides if not s.startswith("tracking")] + [f"tracking.uri={tracking}"]

    def learnt(at):
        history = json.loads((at / "done" / "learn.json").read_text())["history"]
        return history, load_file(at / "sections" / "one" / "network.safetensors")

    def train(workers):
        at = manifest.parent / f"by-{workers}"
        shutil.copytree(work, at)
        (at / "done" / "learn.json").unlink()
        shutil.rmtree(at / "training")
        done = cli("train", manifest, "-o", at, "--factor", FACTOR, *settings, f"train.workers={workers}")
        assert done.code == 0, done
        assert list((at / "training").glob("run-*/checkpoint_*/training.pt"))
        return learnt(at)

    assert list((work / "training").glob("run-*/training.pt"))
    history, one = learnt(work)
    same, single = train(1)
    assert same == history
    assert all(np.array_equal(value, single[name]) for name, value in one.items())
    # What was trained to its end and not noted is not trained again, whoever is asked to.
    at = manifest.parent / "ended"
    shutil.copytree(work, at)
    (at / "done" / "learn.json").unlink()
    done = cli("train", manifest, "-o", at, "--factor", FACTOR, *settings, "train.workers=1")
    assert done.code == 0 and learnt(at)[0] == history, done
    assert not list((at / "training").glob("run-*/checkpoint_*"))
    shared, two = train(2)
    for ours, theirs in zip(history, shared, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, value in one.items():
        assert np.abs(value - two[name]).max() <= 1e-3 * max(np.abs(value).max(), 1e-6), name


def test_reconstruct_writes_every_section(stage, manifest, tracking):
    from mlflow import MlflowClient

    before, below = markers(manifest), sections_of(tracking)
    done = stage("reconstruct")
    assert done.code == 0, done
    assert markers(manifest)["learn"] == before["learn"]
    for name in ("one", "two"):
        result = deepfere.open(manifest.parent / "work" / "results" / f"{name}.zarr")
        assert result.ions["consistency"].max() <= 1e-5
        assert result.provenance["model"]["version"] == "1"
        assert result.provenance["section"]["name"] == name
    whole = MlflowClient(tracking).get_run(result.provenance["run"]["run_id"]).data.metrics
    assert {"total", "held_out_r2_median", "training_steps_per_s"} <= whole.keys() and whole["sections"] == 2
    assert 0 <= whole["training_input_wait"] <= 1
    assert whole.keys().isdisjoint({"consistency_worst", "ions_informed"})
    # The runs that training began for the sections.
    own = sections_of(tracking)
    assert {name: run.info.run_id for name, run in own.items()} == {n: r.info.run_id for n, r in below.items()}
    scores = [run.data.metrics["held_out_r2_median"] for run in own.values()]
    assert whole["held_out_r2_median"] == pytest.approx(np.mean(scores))
    for run in own.values():
        assert run.info.status == "FINISHED" and run.data.metrics["consistency_worst"] <= 1e-5
        files = {f.path for f in MlflowClient(tracking).list_artifacts(run.info.run_id)}
        assert {"held_out_r2.png", "result.json", "choice.json"} <= files
    finished, runs = markers(manifest), endings(tracking)
    again = stage("reconstruct")
    assert again.code == 0 and again.out.count("finished already") == 2
    # Nothing was opened again, the MLflow run neither.
    assert markers(manifest) == finished and endings(tracking) == runs


def sections_of(tracking: str) -> dict:
    """The runs of the sections, under that of the first study that was recorded."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time ASC"])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len({run.info.run_name for run in below}) == len(below)
    return {run.info.run_name: run for run in below}


def endings(tracking: str) -> list[tuple[str, int]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return [(run.info.run_id, run.info.end_time) for run in runs]


def test_a_checkpoint_of_another_fit_is_not_gone_on_from(stage, manifest):
    import torch

    work = manifest.parent / "work"
    weights = (work / "sections" / "one" / "network.safetensors").read_bytes()
    (kept,) = (work / "training").glob("run-*/training.pt")
    torch.save({**torch.load(kept, weights_only=True), "digest": "another"}, kept)
    (work / "done" / "learn.json").unlink()
    done = stage("train")
    assert done.code == 0, done
    assert (work / "sections" / "one" / "network.safetensors").read_bytes() == weights


def test_tiles_equal_the_whole(manifest):
    """The same fitted section in one piece and in tiles of several sizes, odd ones too."""
    from dataclasses import replace

    from deepfere.config import load_config
    from deepfere.model.detail import DetailModel
    from deepfere.pipeline.prepare import prepared
    from deepfere.pipeline.workspace import Workspace
    from deepfere.pipeline.write import section_model
    from deepfere.section import load_study
    from deepfere.tiling.cache import PlaneReader

    work = Workspace(manifest.parent / "work")
    prep = prepared(load_study(manifest).sections[0], work, load_config(None, factor=FACTOR))
    model = json.loads(prep.folder.model.read_text())
    assert model["state"] is not None
    # The deep model and the closed form, whichever of them was chosen.
    made = section_model(prep, {**model, "tier": "T2"}).build()
    assert isinstance(made, DetailModel) and made.network is not None and made.gate.any()
    plain = made.weights[: -made.network.regressors] if model["tier"] == "T2" else made.weights
    deep = np.random.default_rng(0).normal(scale=0.1, size=(made.network.regressors, plain.shape[1]))
    for tier, built in (
        ("T1", replace(made, network=None, weights=plain)),
        ("T2", replace(made, weights=np.concatenate([plain, deep]))),
    ):
        planes = PlaneReader(str(prep.folder.planes), built.spec)
        whole, _ = built.window(planes, Cells(0, 24, 0, 21))
        assert whole.std() > 0.01
        for side in (5, 8, 13):
            tiled = np.zeros_like(whole)
            for i in range(0, 24, side):
                for j in range(0, 21, side):
                    cells = Cells(i, min(i + side, 24), j, min(j + side, 21))
                    at = (slice(i * FACTOR, cells.i1 * FACTOR), slice(j * FACTOR, cells.j1 * FACTOR))
                    tiled[(slice(None), *at)] = built.window(planes, cells)[0]
            # Factors have unit s.d.
            assert np.abs(tiled - whole).max() <= 1e-5, (tier, side)


def test_a_promoted_model_takes_the_place_of_training(stage, manifest, tracking):
    from deepfere.training.tracking import promote

    refused = stage("reconstruct", "--model", "models:/deepfere@champion")
    assert refused.code == 2 and len(refused.errors) == 1 and "champion" in refused.errors[0]
    promote("deepfere", 1, uri=tracking)
    training = manifest.parent / "work" / "training"
    before = sorted(p.name for p in training.iterdir())
    # Results of the training that was done here stand there.
    assert stage("reconstruct", "--model", "models:/deepfere@champion").code == 2
    for name in ("one", "two"):
        shutil.rmtree(manifest.parent / "work" / "results" / f"{name}.zarr")
    done = stage("reconstruct", "--model", "models:/deepfere@champion")
    assert done.code == 0, done
    assert sorted(p.name for p in training.iterdir()) == before  # nothing was trained
    result = deepfere.open(manifest.parent / "work" / "results" / "two.zarr")
    assert result.provenance["model"]["name"] == "deepfere" and result.provenance["model"]["version"] == "1"
    assert result.ions["consistency"].max() <= 1e-5


def test_fuse_takes_a_promoted_model_and_its_ions(
    cli, stage, phantom, manifest, place, tracking, tmp_path, monkeypatch
):
    settings = [s for s in place.overrides if not s.startswith("tracking")] + [f"tracking.uri={tracking}"]
    given = ["--alignment", manifest.parent / "right.json", "--factor", FACTOR, *settings, "model.tier=T2"]
    model = ["--model", "models:/deepfere@champion"]
    out = tmp_path / "new.zarr"
    done = cli("fuse", phantom.imzml, phantom.slide, "-o", out, *given, *model)
    assert done.code == 0, done
    result = deepfere.open(out)
    told = result.provenance["model"]
    assert (told["name"], told["version"], told["tier"]) == ("deepfere", "1", "T2")
    study = deepfere.open(manifest.parent / "work" / "results" / "one.zarr")
    np.testing.assert_allclose(result.ions["mz"], study.ions["mz"])
    assert result.ions["consistency"].max() <= 1e-5
    # The same command finds it; without the model, or without the stain, it would be another result.
    again = cli("fuse", phantom.imzml, phantom.slide, "-o", out, *given, *model)
    assert again.code == 0 and "finished already" in again.out
    # Another store's model of this name and version has other weights.
    with monkeypatch.context() as patch:
        theirs = replace(registry.load_registered("models:/deepfere@champion", tracking), weights_sha256="0" * 64)
        patch.setattr(registry, "load_registered", lambda *_: theirs)
        other = cli("fuse", phantom.imzml, phantom.slide, "-o", out, *given, *model)
    assert other.code == 2 and "other inputs or settings" in other.errors[0]
    other = cli("fuse", phantom.imzml, phantom.slide, "-o", out, *given)
    assert other.code == 2 and "other inputs or settings" in other.errors[0]
    plain = cli("fuse", phantom.imzml, "-o", tmp_path / "p.zarr", "--no-guide", "--factor", FACTOR, *settings, *model)
    assert plain.code == 2 and "about the stain" in plain.errors[0] and not (tmp_path / "p.zarr.work").exists()


def test_a_model_on_a_section_that_it_never_saw(cli, manifest, place, tracking, tmp_path, monkeypatch):
    """Other tissue, other grid, other place on its slide: the last layer is solved anew, and all blocks judge it."""
    registry.promote("deepfere", 1, uri=tracking)
    spec = PhantomSpec(shape_px=(20, 23), slide_mpp_um=2.0, factor=FACTOR, seed=11, chemistry=3)
    new = write_phantom(tmp_path / "new", spec)
    judged, chosen = [], learn.choose
    monkeypatch.setattr(learn, "choose", lambda *a, **k: judged.append((a[6], chosen(*a, **k))) or judged[-1][1])
    monkeypatch.setattr(learn, "train_network", lambda *_: pytest.fail("it was trained"))
    settings = [s for s in place.overrides if not s.startswith("tracking")] + [f"tracking.uri={tracking}"]
    given = ["--alignment", new.truth / "alignment.json", "--factor", FACTOR, "model.tier=T2"]
    model = ["--model", "models:/deepfere@champion"]
    out = tmp_path / "new.zarr"
    done = cli("fuse", new.imzml, new.slide, "-o", out, *given, *settings, *model)
    assert done.code == 0, done
    result = deepfere.open(out)
    assert (result.provenance["model"]["name"], result.provenance["model"]["tier"]) == ("deepfere", "T2")
    assert result.ions["consistency"].max() <= 1e-5
    [(held, learned)] = judged
    assert held.all()
    study = SectionFit.load(manifest.parent / "work" / "sections" / "one" / "fit.npz")
    # The model's factors; the rows of its network come last, behind those of the section's own types of stain.
    last = [fit.weights[-8:] for fit in (learned.fit, study)]
    assert last[0].shape == last[1].shape and not np.allclose(*last)


def test_a_promoted_model_brings_its_own_reach_and_may_be_left_aside(stage, manifest, monkeypatch):
    from deepfere.pipeline import tile

    reaches, reach_um = [], tile.reach_um
    monkeypatch.setattr(tile, "reach_um", lambda *a: reaches.append(a[2]) or reach_um(*a))
    given = ["--model", "models:/deepfere@champion", "model.depth=1", "model.tier=T1", "--overwrite"]
    done = stage("reconstruct", *given)
    assert done.code == 0, done
    assert reaches == [3, 3]  # of a network of depth 2, as it was trained
    for name in ("one", "two"):
        fitted = json.loads((manifest.parent / "work" / "sections" / name / "model.json").read_text())
        assert fitted["tier"] == "T1" and fitted["network"] is None


def test_sections_that_cannot_be_used_are_named(cli, phantom, tmp_path):
    shutil.copy(phantom.imzml, tmp_path / "broken.imzML")
    (tmp_path / "broken.ibd").write_bytes((phantom.folder / "section.ibd").read_bytes()[:-4000])
    sections = [
        {"name": "good", "msi": str(phantom.imzml), "slide": str(phantom.slide)},
        {"name": "broken", "msi": "broken.imzML", "slide": str(phantom.slide)},
    ]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": sections}))
    done = cli("ingest", tmp_path / "study.yaml", "-o", tmp_path / "work")
    assert done.code == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "broken" in errors[0]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sections: [{name: a, msi: gone.imzML}]", "no slide for a"),
        ("sections: [{name: a, msi: gone.imzML, slide: gone.svs}]", "gone.imzML"),
        ("sections: [{name: a/b, msi: x, slide: y}]", "name"),
        ("sections: [{name: a, msi: x, slide: y}, {name: a, msi: x, slide: y}]", "twice: a"),
        ("- nothing", "not a study"),
    ],
)
def test_wrong_manifests_are_refused(cli, tmp_path, text, word):
    (tmp_path / "study.yaml").write_text(text)
    done = cli("ingest", tmp_path / "study.yaml", "-o", tmp_path / "work")
    assert done.code == 2 and len(done.errors) == 1, done
    assert done.errors[0].startswith("error: ") and word in done.errors[0]
    assert not (tmp_path / "work").exists()
