"""MLflow tracking and the model registry, against real stores."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepfere.config import load_config
from deepfere.errors import DeepfereError, InputError
from deepfere.pipeline import track
from deepfere.training import mlflow_store
from deepfere.training.tracking import (
    NullTracker,
    Tracker,
    connect,
    default_uri,
    load_registered,
    log_history,
    promote,
    register_model,
    resolve_uri,
)

CONFIG = {
    "network": {"features": 5, "factors": 3, "width": 8, "depth": 2},
    "factor": 8,
    "pitch_um": [50.0, 50.0],
}


@pytest.fixture
def uri(empty_store, tmp_path, monkeypatch):
    """The URI of a store of this test's own; the process's global store is elsewhere and must not be used."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(empty_store, path)
    return f"sqlite:///{path}"


def network(seed=0):
    from deepfere.model.network import network_from_config

    torch.manual_seed(seed)
    net = network_from_config(CONFIG["network"]).eval()
    with torch.no_grad():  # a network may start from a zero last layer, which would hide wrong weights
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
        for buffer in net.buffers():  # so may the feature scales start neutral
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return net


def batch(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {
        "stain": rng.normal(size=(2, 5, 12, 10)).astype(dtype),
        "upsampled": rng.normal(size=(2, 3, 12, 10)).astype(dtype),
    }


def steps(tracker, name):
    return [(p.step, p.value) for p in tracker.client.get_metric_history(tracker.run_id, name)]


# -- where ---------------------------------------------------------------------------------------


def test_a_relative_sqlite_uri_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///runs/a.db") == f"sqlite:///{tmp_path.resolve()}/runs/a.db"
    assert resolve_uri(f"sqlite:///{tmp_path}/a.db") == f"sqlite:///{tmp_path.resolve()}/a.db"
    assert resolve_uri("https://mlflow.example.org/x") == "https://mlflow.example.org/x"


def test_the_default_store_is_the_users_or_the_environments(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_uri() == f"sqlite:///{tmp_path}/deepfere/mlflow.db"
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_uri() == f"sqlite:///{tmp_path}/.local/share/deepfere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert default_uri() == "http://localhost:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI: 'file:///tmp/mlruns' is a folder"):
        default_uri()


@pytest.mark.parametrize("uri", ["file:///tmp/x", "./mlruns", "sqlite://", "sqlite:///:memory:", "ftp://u:pw@h"])
def test_a_store_that_cannot_be_used_is_refused_in_one_line(uri):
    with pytest.raises(InputError, match=r"tracking.uri: .*; give sqlite:///FILE") as caught:
        resolve_uri(uri)
    assert "pw@" not in str(caught.value)


def test_a_server_that_does_not_answer_is_refused_at_once():
    with socket.socket() as taken:  # bound and not listening: refuses connections
        taken.bind(("127.0.0.1", 0))
        start = time.monotonic()
        with pytest.raises(InputError, match=r"^http://127.0.0.1:\d+: .*; check the store"):
            Tracker.start(f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert time.monotonic() - start < 8


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(InputError, match=r"x\.db: .*; check the store"):
        connect(f"sqlite:///{tmp_path}/x.db")


def test_reading_a_model_makes_no_store(tmp_path):
    with pytest.raises(InputError, match=r"new\.db: there is no tracking store"):
        load_registered("models:/a/1", f"sqlite:///{tmp_path}/new.db")
    assert not list(tmp_path.iterdir())


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_holds_what_it_was_given(uri, tmp_path):
    params = {
        "seed": 3,
        "train": {"steps": 200, "loss": ["huber", "cc"], "pitch um": np.float32(0.5)},
        "long": "x" * 9000,
    }
    tracker = Tracker.start(uri, "sections", "one", params, {"identity": "abc"})
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.params["train.steps"] == "200"
    assert run.data.params["train.loss"] == '["huber", "cc"]'
    assert run.data.params["train.pitch um"] == "0.5"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["identity"] == "abc"
    assert run.info.run_name == "one"
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_absolute()
    assert artifacts.is_relative_to(tmp_path / "store" / "mlartifacts")
    assert json.loads((artifacts / "config.json").read_text())["long"] == "x" * 9000
    # nothing where MLflow would put its own store and artifacts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_runs_below_a_run_are_found_again(uri):
    tracker = Tracker.start(uri, "study")
    others = Tracker.start(uri, "study").nested("one", {"name": "one"})
    made = [tracker.nested(name, {"name": name}) for name in ("one", "two", "gone")]
    tracker.client.delete_run(made[2].run_id)
    made[0].log_metrics({"score": 0.5}, tags={"told": "yes"})
    made[0].log_metrics({}, tags={"more": 1})
    found = {child.tags["name"]: child for child in Tracker.start(uri, run_id=tracker.run_id).children()}
    assert {name: child.run_id for name, child in found.items()} == {"one": made[0].run_id, "two": made[1].run_id}
    assert (found["one"].tags["told"], found["one"].tags["more"], "told" in found["two"].tags) == ("yes", "1", False)
    found["one"].log_metrics({"score": 0.7})
    assert steps(found["one"], "score") == [(0, 0.5)] and others.children() == []
    run = tracker.client.get_run(made[1].run_id)
    assert (run.data.tags["mlflow.parentRunId"], run.info.run_name) == (tracker.run_id, "two")


def test_many_parameters_and_metrics_go_in_batches(uri):
    tracker = Tracker.start(uri, params={f"p{i}": i for i in range(250)})
    log_history(tracker, [{"step": s, "a": s, "b": -s} for s in range(800)])
    assert len(tracker.client.get_run(tracker.run_id).data.params) == 250
    assert steps(tracker, "b") == [(s, -s) for s in range(800)]


def test_resuming_does_not_duplicate_points(uri):
    first = Tracker.start(uri, params={"a": 1})
    for step in range(5):
        first.log_metrics({"loss": 1.0 / (step + 1)}, step)
        first.log_metrics({"loss": 99.0}, step)  # said twice
    first.finish("KILLED")

    second = Tracker.start(uri, run_id=first.run_id, params={"a": 1, "b": 2})
    assert second.client.get_run(second.run_id).info.status == "RUNNING"
    log_history(second, [{"step": s, "loss": 1.0 / (s + 1)} for s in range(3, 8)])
    second.log_metrics({"loss": 7.0}, 7)
    assert steps(second, "loss") == [(s, 1.0 / (s + 1)) for s in range(8)]

    # a tracker that does not know what the other wrote meanwhile asks before it logs a history
    log_history(first, [{"step": s, "loss": 1.0 / (s + 1)} for s in range(9)])
    assert [s for s, _ in steps(second, "loss")] == list(range(9))
    second.finish()
    run = second.client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1", "b": "2"}


def test_points_that_did_not_arrive_are_sent_again(uri, monkeypatch):
    from mlflow.exceptions import MlflowException

    tracker = Tracker.start(uri)
    tracker.log_metrics({"loss": 0.0}, 0)

    def fail(*_, **__):
        raise MlflowException("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", fail)
        with pytest.raises(DeepfereError, match=r"mlflow\.db: database is locked"):
            tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"loss": 0.0}, 0)
    tracker.log_metrics({"loss": 1.0}, 1)
    assert steps(tracker, "loss") == [(0, 0.0), (1, 1.0)]


def test_resuming_with_other_parameters_or_an_unknown_run_is_refused(uri):
    tracker = Tracker.start(uri, params={"train": {"lr": 0.1}})
    with pytest.raises(InputError, match=r"train\.lr = 0\.1, this configuration has 0\.2; start a new run"):
        Tracker.start(uri, run_id=tracker.run_id, params={"train": {"lr": 0.2}})
    with pytest.raises(InputError, match=r"0{32}"):
        Tracker.start(uri, run_id="0" * 32)


def test_metrics_are_plain_finite_floats(uri):
    tracker = Tracker.start(uri)
    tracker.log_metrics(
        {"r2": np.float32(0.5), "t": torch.tensor(2.0), "nan": float("nan"), "inf": np.inf, "no": None}, 4
    )
    assert steps(tracker, "r2") == [(4, 0.5)]
    assert set(tracker.client.get_run(tracker.run_id).data.metrics) == {"r2", "t"}
    with pytest.raises(InputError, match="history entry 1: no whole-numbered `step`"):
        log_history(tracker, [{"step": 1, "a": 1.0}, {"a": 2.0}])


def test_metric_names_that_mlflow_refuses_are_made_acceptable(uri):
    tracker = Tracker.start(uri)
    tracker.log_metrics({"r2[798.541] µ": 1.0}, 0)
    tracker.log_metrics({"r2[798.541] µ": 1.0}, 0)
    assert steps(tracker, "r2_798.541_ _") == [(0, 1.0)]


def test_figures_and_dictionaries(uri):
    from matplotlib.figure import Figure

    tracker = Tracker.start(uri)
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    for _ in range(2):
        tracker.log_figure(figure, "figures/loss.png")
    tracker.log_figure(b"\x89PNG rest", "raw.png")
    tracker.log_dict({"a": np.arange(2), "p": Path("/x"), "bad": float("nan")}, "d.json")
    root = Path(tracker.client.get_run(tracker.run_id).info.artifact_uri.removeprefix("file://"))
    assert (root / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (root / "raw.png").read_bytes() == b"\x89PNG rest"
    assert json.loads((root / "d.json").read_text()) == {"a": [0, 1], "p": "/x", "bad": None}


def test_a_dataset_is_recorded_once_with_its_whole_digest(uri):
    tracker = Tracker.start(uri)
    digest = "ab" * 32
    rows = [
        {"section": "s1", "pixels": 5, "digest": digest},
        {"section": "s2", "pixels": 6, "digest": digest},
    ]
    for _ in range(2):
        tracker.log_dataset("kidney study", digest, "s3://bucket/study.yaml", rows)
    inputs = tracker.client.get_run(tracker.run_id).inputs.dataset_inputs
    assert len(inputs) == 1
    dataset = inputs[0].dataset
    assert (dataset.name, dataset.digest, dataset.source_type) == ("kidney study", digest[:36], "s3")
    assert json.loads(dataset.source) == {"uri": "s3://bucket/study.yaml"}
    assert [c["type"] for c in json.loads(dataset.schema)["mlflow_colspec"]] == ["string", "long", "string"]
    assert {t.key: t.value for t in inputs[0].tags}["digest"] == digest
    root = Path(tracker.client.get_run(tracker.run_id).info.artifact_uri.removeprefix("file://"))
    assert json.loads((root / "datasets" / "kidney_study.json").read_text()) == rows


def test_the_first_finish_counts(uri):
    tracker = Tracker.start(uri)
    tracker.finish("FAILED")
    tracker.finish()
    assert tracker.client.get_run(tracker.run_id).info.status == "FAILED"


def test_a_deleted_experiment_is_refused(uri):
    tracker = Tracker.start(uri, "gone")
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match="the experiment 'gone' is deleted"):
        Tracker.start(uri, "gone")


def test_tracking_that_is_off_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.start("none", params={"a": 1})
    assert isinstance(tracker, NullTracker)
    assert tracker.run_id == ""
    tracker.log_metrics({"a": 1.0}, 0)
    log_history(tracker, [{"step": 0, "a": 1.0}])
    tracker.log_figure(b"", "a.png")
    tracker.log_dict({}, "a.json")
    tracker.log_dataset("a", "b", "c", [])
    assert tracker.nested("one", {}).run_id == "" and tracker.children() == []
    tracker.finish()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="tracking is off"):
        register_model(tracker, "m", {}, CONFIG)


def test_importing_tracking_imports_neither_mlflow_nor_torch():
    code = "import sys, deepfere.training.tracking; print(sorted({'mlflow', 'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- models --------------------------------------------------------------------------------------


def test_a_registered_model_is_the_network(uri, monkeypatch, recwarn, capfd):
    import mlflow

    import deepfere

    net = network()
    tracker = Tracker.start(uri)
    info = register_model(tracker, "kidney", net.state_dict(), CONFIG, alias="champion")
    assert (info.version, info.uri) == ("1", "models:/kidney/1")

    loaded = load_registered("models:/kidney@champion", uri)
    assert (loaded.name, loaded.version, loaded.run_id) == ("kidney", "1", tracker.run_id)
    assert loaded.config == CONFIG
    assert loaded.uri == "models:/kidney/1"
    from safetensors.torch import load_file

    weights = load_file(loaded.weights_path)
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    assert load_registered("models:/kidney/1", uri) == loaded
    assert load_registered(f"runs:/{tracker.run_id}/kidney", uri) == loaded

    # the user's way, with MLflow alone; and nothing in it needs pickle
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model("models:/kidney@champion")
    finally:
        mlflow.set_tracking_uri(None)
    data = batch()
    with torch.inference_mode():
        expected = net(torch.from_numpy(data["stain"]), torch.from_numpy(data["upsampled"])).numpy()
    got = model.predict(data)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    assert np.ptp(expected) > 0

    with pytest.raises(mlflow.exceptions.MlflowException, match="float64"):
        model.predict(batch(np.float64))
    with pytest.raises(mlflow.exceptions.MlflowException, match="shape"):
        model.predict(data | {"stain": data["stain"][:, :4]})

    stored = Path(loaded.weights_path).parents[1]
    assert not [p for p in stored.rglob("*") if p.suffix in {".pkl", ".pt", ".pth", ".bin"}]
    pins = (stored / "requirements.txt").read_text()
    assert f"torch=={torch.__version__.split('+')[0]}\n" in pins + "\n"
    assert f"deepfere=={deepfere.__version__}\n" in pins + "\n"
    assert not [w for w in recwarn if "mlflow" in str(w.filename)]
    assert "WARNING" not in capfd.readouterr().err


def test_the_packaged_example_is_as_wide_as_a_deep_network_needs(uri):
    import mlflow

    from deepfere.model.network import network_from_config

    config = {"network": CONFIG["network"] | {"depth": 4}}
    tracker = Tracker.start(uri)
    register_model(tracker, "deep", network_from_config(config["network"]).state_dict(), config)
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model("models:/deep/1")
    finally:
        mlflow.set_tracking_uri(None)
    assert model.predict(model.input_example).shape == (1, 3, 8, 8)


def test_registering_again_makes_no_second_version(uri, tmp_path):
    from safetensors.torch import save_file

    tracker = Tracker.start(uri)
    first = register_model(tracker, "m", network().state_dict(), CONFIG)
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    resumed = Tracker.start(uri, run_id=tracker.run_id)
    again = register_model(resumed, "m", tmp_path / "w.safetensors", CONFIG, alias="champion")
    assert again == first
    other = register_model(resumed, "m", network(seed=1).state_dict(), CONFIG)
    assert other.version == "2"
    assert other.weights_sha256 != first.weights_sha256
    assert load_registered("models:/m@champion", uri).version == "1"
    promote("m", 2, uri=uri)
    assert load_registered("models:/m@champion", uri).weights_sha256 == other.weights_sha256


def test_unknown_models_are_refused_and_what_exists_is_named(uri):
    with pytest.raises(InputError, match=r"there is no model 'm'; its models are: none"):
        load_registered("models:/m@champion", uri)
    tracker = Tracker.start(uri)
    register_model(tracker, "m", network().state_dict(), CONFIG, alias="best")
    with pytest.raises(
        InputError,
        match=r"'m' has no alias 'champion'; its aliases are: best \(version 1\); its versions are: 1",
    ):
        load_registered("models:/m@champion", uri)
    with pytest.raises(InputError, match=r"'m' has no version 7; its versions are: 1"):
        load_registered("models:/m/7", uri)
    with pytest.raises(InputError, match=r"there is no model 'n'; its models are: m"):
        load_registered("models:/n/1", uri)
    with pytest.raises(InputError, match=r"made no model 'n'; its models are: m"):
        load_registered(f"runs:/{tracker.run_id}/n", uri)
    with pytest.raises(InputError, match=r"0{32}"):
        load_registered(f"runs:/{'0' * 32}/m", uri)
    with pytest.raises(InputError, match=r"--model: 'm@best' does not name a model; give models:/NAME@ALIAS"):
        load_registered("m@best", uri)
    with pytest.raises(InputError, match="no version 3"):
        promote("m", 3, uri=uri)
    for alias in ("latest", "V2", "a/b", ""):
        with pytest.raises(InputError, match="cannot be an alias"):
            promote("m", 1, alias=alias, uri=uri)


def test_weights_that_do_not_belong_to_the_configuration_are_refused(uri):
    tracker = Tracker.start(uri)
    other = {"network": CONFIG["network"] | {"width": 16}}
    with pytest.raises(InputError, match="do not fit the network"):
        register_model(tracker, "m", network().state_dict(), other)
    partial = dict(list(network().state_dict().items())[:-1])
    with pytest.raises(InputError, match="do not fit the network"):
        register_model(tracker, "m", partial, CONFIG)
    with pytest.raises(InputError, match="no section `network`"):
        register_model(tracker, "m", network().state_dict(), {"seed": 1})
    with pytest.raises(InputError, match="cannot be a model's name"):
        register_model(tracker, "a/b", network().state_dict(), CONFIG)
    assert not tracker.client.search_registered_models()


def test_damaged_weights_are_noticed(uri):
    tracker = Tracker.start(uri)
    register_model(tracker, "m", network().state_dict(), CONFIG)
    path = load_registered("models:/m/1", uri).weights_path
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(DeepfereError, match="not those that were registered"):
        load_registered("models:/m/1", uri)


# -- a server ------------------------------------------------------------------------------------


def test_a_server_keeps_runs_and_models(mlflow_server, tmp_path, monkeypatch):
    server = mlflow_server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    net = network()
    tracker = Tracker.start(server, "study", params={"a": 1})
    tracker.log_metrics({"loss": 1.0}, 0)
    resumed = Tracker.start(server, run_id=tracker.run_id, params={"a": 1})
    log_history(resumed, [{"step": s, "loss": 1.0} for s in range(3)])
    assert [s for s, _ in steps(resumed, "loss")] == [0, 1, 2]
    resumed.log_dataset("d", "ab" * 32, "/data/x", [{"n": 1}])
    resumed.log_figure(b"png", "figures/a.png")
    assert resumed.client.get_run(tracker.run_id).info.artifact_uri.startswith("mlflow-artifacts:")
    info = register_model(resumed, "m", net.state_dict(), CONFIG, alias="champion")
    resumed.finish()

    loaded = load_registered("models:/m@champion", server)
    assert loaded.weights_path.is_relative_to(tmp_path / "cache")
    assert (loaded.uri, loaded.config, loaded.run_id) == (info.uri, CONFIG, tracker.run_id)
    written = loaded.weights_path.stat().st_mtime_ns
    assert load_registered(f"runs:/{tracker.run_id}/m", server) == loaded
    assert loaded.weights_path.stat().st_mtime_ns == written  # downloaded once

    # a damaged copy is noticed, and downloaded again by the next attempt
    loaded.weights_path.write_bytes(b"damaged")
    with pytest.raises(DeepfereError, match="not those that were registered"):
        load_registered("models:/m/1", server)
    assert load_registered("models:/m/1", server) == loaded


def test_recorded_settings_hide_passwords():
    config = load_config(None, ["tracking.uri=http://me:secret@host/x"])
    assert mlflow_store.recorded(config)["tracking"]["uri"] == "http://***@host/x"
    assert config.resolved()["tracking"]["uri"] == "http://me:secret@host/x"
    assert mlflow_store.recorded(load_config(None, [])) == load_config(None, []).resolved()
    tracker = SimpleNamespace(uri="http://me:secret@host/x", run_id="1")
    run = track.Run(tracker, None, config, [], [], True)
    assert run.describe()["uri"] == "http://***@host/x"


def test_error_text_hides_passwords():
    assert mlflow_store.redact("http://me:secret@host/x") == "http://***@host/x"
