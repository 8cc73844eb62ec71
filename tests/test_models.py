"""Registered models: listed, compared on the same blocks, promoted; on SQLite and on a real server."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from deepfere.config import load_config
from deepfere.pipeline import track
from deepfere.pipeline.track import tracked
from deepfere.pipeline.workspace import Workspace
from deepfere.section import make_section
from deepfere.training.pyfunc import WEIGHTS_FILE
from deepfere.training.registry import load_registered, register_model
from deepfere.training.tracking import Tracker, log_history
from tests.conftest import FACTOR
from tests.test_tracking import CONFIG, network


def test_models_are_listed_and_promoted(cli, tracking_store):
    name = f"listed-{'server' if tracking_store.startswith('http') else 'file'}"
    first = Tracker.start(tracking_store)
    first.log_metrics({"held_out_r2_median": 0.5})
    register_model(first, name, network().state_dict(), CONFIG, alias="champion")
    first.finish()
    second = Tracker.start(tracking_store)
    register_model(second, name, network(seed=1).state_dict(), CONFIG)
    setting = f"tracking.uri={tracking_store}"
    done = cli("models", "list", "--name", name, setting)
    assert done.code == 0, done
    head, one, two = (line.split() for line in done.out.splitlines())
    assert head[0] == "model"
    assert (one[0], one[1], one[-3:]) == (f"models:/{name}/1", "champion", ["0.500", first.run_id, "FINISHED"])
    assert (two[0], two[1], two[-3:]) == (f"models:/{name}/2", "-", ["-", second.run_id, "RUNNING"])
    done = cli("models", "promote", name, "2", setting)
    assert (done.code, done.out) == (0, f"models:/{name}@champion is version 2 (was version 1)\n"), done
    assert load_registered(f"models:/{name}@champion", tracking_store).run_id == second.run_id
    done = cli("models", "promote", name, "2", "--alias", "challenger", setting)
    assert done.out == f"models:/{name}@challenger is version 2\n"
    line = cli("models", "list", "--name", name, setting).out.splitlines()[2]
    assert line.split()[1] == "challenger,champion"
    for words, told in ((["promote", name, "3"], "no version 3"), (["list", "--name", "nobody"], "no model 'nobody'")):
        done = cli("models", *words, setting)
        assert done.code == 2 and len(done.errors) == 1 and told in done.errors[0], done


def test_a_store_that_is_not_there_is_refused(cli, tmp_path):
    done = cli("models", "list", f"tracking.uri=sqlite:///{tmp_path / 'gone.db'}")
    assert done.code == 2 and "no tracking store" in done.errors[0] and not (tmp_path / "gone.db").exists()


def test_the_driver_closes_its_run_and_a_restart_doubles_nothing(tracking_store, tmp_path):
    """The same command three times: it fails, is interrupted, and finishes."""
    work = Workspace(tmp_path / "work")
    config = load_config(None, [f"tracking.uri={tracking_store}", "tracking.experiment=restarts"])
    section, inputs = make_section(name="one", msi="a.imzML"), [{"msi": "ab" * 32}]
    history = [{"step": step, "total": 1.0 / step} for step in (1, 2, 3)]
    client, seen = MlflowClient(tracking_store), []

    def attempt(points: int, error: BaseException | None) -> str:
        with tracked(work, [section], inputs, config, "work") as run:
            assert client.get_run(run._tracker.run_id).info.status == "RUNNING"
            log_history(run._tracker, history[:points])
            seen.append(run._tracker.run_id)
            if error is not None:
                raise error
        return client.get_run(seen[-1]).info.status

    for error, status in ((RuntimeError(), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        with pytest.raises(type(error)):
            attempt(2, error)
        assert client.get_run(seen[-1]).info.status == status
    assert attempt(3, None) == "FINISHED"
    assert len(set(seen)) == 1
    points = [(p.step, p.value) for p in client.get_metric_history(seen[0], "total")]
    assert points == [(entry["step"], entry["total"]) for entry in history]
    runs = client.search_runs([client.get_experiment_by_name("restarts").experiment_id])
    assert len(runs) == 1 and len(runs[0].inputs.dataset_inputs) == 1


def test_sections_have_runs_of_their_own_which_a_restart_goes_on_with(tracking_store, tmp_path):
    """A study of three is interrupted, loses a section, ends: a run for it, and for each that told of itself."""
    work = Workspace(tmp_path / "work")
    config = load_config(None, [f"tracking.uri={tracking_store}", "tracking.experiment=sections"])
    sections = [make_section(name=name, msi=f"{name}.imzML") for name in ("one", "two", "three")]
    inputs = [{"msi": letter * 64} for letter in "abc"]
    client = MlflowClient(tracking_store)

    def runs() -> dict[str, tuple[str, str, dict[str, float]]]:
        found = client.search_runs([client.get_experiment_by_name("sections").experiment_id])
        return {run.info.run_name: (run.info.run_id, run.info.status, run.data.metrics) for run in found}

    def attempt(settings=config):
        return tracked(work, sections, inputs, settings, "study")

    with pytest.raises(KeyboardInterrupt), attempt() as run:
        run._of("one").log_metrics({"held_out_r2_median": 0.5})
        raise KeyboardInterrupt
    first = runs()
    assert {name: status for name, (_, status, _) in first.items()} == {"study": "KILLED", "one": "KILLED"}
    with attempt() as run:
        for name in ("one", "two"):
            run._of(name).log_metrics({"held_out_r2_median": 0.5})
        run.section_failed("two")
        run.section_failed("three")
    # Whether the machine's load is recorded makes no other run.
    with attempt(load_config(None, ["tracking.system_metrics=false"], base=config)) as run:
        run._of("one").log_metrics({"held_out_r2_median": 0.75})
    client.set_terminated(first["one"][0], "RUNNING")  # as if the program had been lost once more
    with attempt():
        pass
    last = runs()
    assert {name: status for name, (_, status, _) in last.items()} == {
        "study": "FINISHED",
        "one": "FINISHED",
        "two": "FAILED",
    }
    assert [last[name][0] for name in first] == [first[name][0] for name in first]
    assert last["one"][2] == last["two"][2] == {"held_out_r2_median": 0.5}
    child, study = (client.get_run(last[name][0]) for name in ("one", "study"))
    assert child.data.tags["mlflow.parentRunId"] == study.info.run_id
    (whole,), (own,) = study.inputs.dataset_inputs, child.inputs.dataset_inputs
    assert (whole.dataset.name, own.dataset.name, own.dataset.digest) == ("study", "one", "a" * 36)
    assert {f.path for f in client.list_artifacts(study.info.run_id, "datasets")} == {"datasets/study.json"}


@pytest.mark.parametrize("where", ["_write_params", "log_dict", "log_dataset"])
def test_a_driver_that_is_lost_while_it_begins_leaves_one_run(tracking_store, tmp_path, monkeypatch, where):
    work = Workspace(tmp_path / "work")
    config = load_config(None, [f"tracking.uri={tracking_store}", f"tracking.experiment={where}"])
    section, inputs = make_section(name="one", msi="a.imzML"), [{"msi": "ab" * 32}]

    def lost(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(track.Tracker, where, lost)
        with pytest.raises(KeyboardInterrupt), tracked(work, [section], inputs, config, "work"):
            pass
    with tracked(work, [section], inputs, config, "work") as run:
        name = run.describe()["run_id"]
    client = MlflowClient(tracking_store)
    experiment = client.get_experiment_by_name(where)
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.info.run_id == name and only.info.status == "FINISHED" and only.data.params["train.steps"]
    (given,) = only.inputs.dataset_inputs
    assert given.dataset.name == "one"
    assert "config.json" in {file.path for file in client.list_artifacts(name)}


def test_an_interruption_is_told_where_the_store_is_away(tracking_store, tmp_path, monkeypatch):
    work, config = Workspace(tmp_path / "work"), load_config(None, [f"tracking.uri={tracking_store}"])
    section = make_section(name="one", msi="a.imzML")
    with pytest.raises(KeyboardInterrupt), tracked(work, [section], [{"msi": "ab"}], config, "x"):
        monkeypatch.setattr(track, "probe", lambda uri: (_ for _ in ()).throw(ConnectionError("away")))
        raise KeyboardInterrupt


def test_the_load_of_the_machine_is_in_the_run(tracking_store, tmp_path, monkeypatch):
    """MLflow's own names; a restart goes on after the last point, and nothing is recorded where it is off."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    work, client = Workspace(tmp_path / "work"), MlflowClient(tracking_store)
    setting = [f"tracking.uri={tracking_store}", "tracking.experiment=load"]
    section = [make_section(name="one", msi="a.imzML")]

    def points(run_id: str) -> list[int]:
        return [p.step for p in client.get_metric_history(run_id, "system/cpu_utilization_percentage")]

    def attempt(*more: str) -> list[int]:
        with tracked(work, section, [{"msi": "ab" * 32}], load_config(None, [*setting, *more]), "work") as run:
            run_id = run.describe()["run_id"]
            before, until = len(points(run_id)), time.monotonic() + (0.6 if more else 60)
            while len(points(run_id)) < before + 2 and time.monotonic() < until:
                time.sleep(0.05)
        return points(run_id)

    first = attempt()
    assert len(first) >= 2
    second = attempt()
    assert len(second) >= len(first) + 2 and second == list(range(len(second)))
    assert attempt("tracking.system_metrics=false") == second


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_models_are_compared_on_blocks_that_neither_has_seen(cli, fused, phantom, place, ray_session, tmp_path):
    """The shared run's model, the same weights again, and a network that was never trained."""
    known = load_registered("models:/deepfere/1", place.tracking)
    tracker = Tracker.start(place.tracking)
    weights = load_file(str(known.weights_path.parent / WEIGHTS_FILE))
    noise = {k: v + 0.3 * (v.abs().mean() + 0.1) if v.dim() > 1 else v for k, v in weights.items()}
    same = register_model(tracker, "compared", weights, known.config)
    worse = register_model(tracker, "compared", noise, {**known.config, "seen": []})
    tracker.finish()
    section = {"name": "one", "msi": str(phantom.imzml), "slide": str(phantom.slide)}
    section["alignment"] = str(phantom.truth / "alignment.json")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": [section]}))
    words = ["models", "compare", "models:/deepfere/1", same.uri, worse.uri, f"tracking.uri={place.tracking}"]
    more = [s for s in place.overrides if not s.startswith("tracking")]
    done = cli(*words, *more, "--study", tmp_path / "study.yaml", "-o", tmp_path / "work", "--factor", FACTOR)
    assert done.code == 0, done
    rows = {line.split("  ")[0]: line.split()[-1] for line in done.out.splitlines()[1:]}
    assert list(rows) == ["closed form", "models:/deepfere/1", same.uri, worse.uri, "held-out blocks"]
    assert rows[same.uri] == rows["models:/deepfere/1"] != rows[worse.uri]
    assert float(rows[worse.uri]) < float(rows[same.uri])
    # The section was trained on: only the blocks that were held out then may judge, for all three.
    share = known.config["config"]["train"]["held_out"]
    assert 2 <= int(rows["held-out blocks"]) <= np.ceil(share * 16)
    assert json.loads((tmp_path / "work" / "identity.json").read_text())
    # And so it was where the same measurement comes ingested.
    section["msi"] = str(tmp_path / "work" / "sections" / "one" / "measured.zarr")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": [section]}))
    again = cli(*words, *more, "--study", tmp_path / "study.yaml", "-o", tmp_path / "cubes", "--factor", FACTOR)
    assert again.code == 0 and again.out.splitlines()[-1].split()[-1] == rows["held-out blocks"], again
