"""Losses that reach MLflow while training runs; a store that is away costs nothing."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest
from mlflow import MlflowClient

from deepfere.training import live
from deepfere.training.live import Live, Recording
from deepfere.training.tracking import Tracker, log_history
from tests.conftest import FACTOR, free_port, serving, write_study
from tests.runs import Run

HISTORY = [{"step": step, "total": 1.0 / step, "mapping": 2.0 / step} for step in range(1, 6)]


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def sent(to: Live) -> None:
    to._thread.join(60)
    assert not to._thread.is_alive()


def test_little_patience_lasts_as_long_as_it_sends(tmp_path, monkeypatch):
    """Where training is in the driver, what comes after it waits for a server as usual."""
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    to = Live(Recording(store, Tracker.start(store).run_id, True))
    to(HISTORY)
    sent(to)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == live.PATIENCE["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    to.close()
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"


def test_points_come_once_whoever_sends_them(tracking_store, at_once):
    tracker = Tracker.start(tracking_store)
    to = Recording(tracking_store, tracker.run_id, True)

    def points():
        return [(p.step, p.value) for p in tracker.client.get_metric_history(tracker.run_id, "total")]

    first = Live(to)
    first([])
    assert first._thread is None
    for some in (HISTORY[:1], HISTORY[1:3]):
        first(some)
        sent(first)
    assert points() == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    # It was killed; the next one begins again with all that is behind its checkpoint.
    second = Live(to)
    second(HISTORY[:2])
    sent(second)
    second(HISTORY[2:4])
    sent(second)
    second.close()
    second(HISTORY[4:])
    sent(second)
    assert [step for step, _ in points()] == [1, 2, 3, 4]
    log_history(tracker, HISTORY)
    assert points() == [(entry["step"], entry["total"]) for entry in HISTORY]


def test_training_does_not_wait_for_a_store_that_is_silent(at_once, monkeypatch, caplog):
    for name, value in (("TIMEOUT", "1"), ("MAX_RETRIES", "0")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        to = Live(Recording(f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}", "0" * 32, False))
        for some in (HISTORY[:2], HISTORY[2:]):
            began = time.monotonic()
            to(some)
            assert time.monotonic() - began < 0.5
            sent(to)
        began = time.monotonic()
        to.close()
        assert time.monotonic() - began < 1
    (warning,) = [r.getMessage() for r in caplog.records if r.name == live.__name__]
    assert "no losses reach http://***@127.0.0.1" in warning and "secret" not in warning
    # They wait for a store that answers again.
    assert to._points == HISTORY


def test_pauses_become_longer_while_a_store_is_away(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    to = Live(Recording(f"http://127.0.0.1:{free_port()}", "0" * 32, False))
    to(HISTORY)
    assert to._thread is None  # a short training sends nothing
    pauses = []
    for _ in range(9):
        to._next_s = 0.0
        to([])
        sent(to)
        pauses.append(to._next_s - time.monotonic())
    assert pauses == pytest.approx([min(5 * 2**n, 600) for n in range(1, 10)], abs=1)


def test_a_sqlite_file_is_written_on_the_drivers_host_alone():
    file, server = (Recording(uri, "1", True) for uri in ("sqlite:////shared/m.db", "http://me:secret@host"))
    assert file.from_host("a", "a") and not file.from_host("b", "a")
    assert server.from_host("b", "a")
    assert "secret" not in str(server)


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_training_loses_its_driver_and_its_server(phantom, tmp_path, monkeypatch):
    """Points come while it trains, each once, although it is killed; the server dies, and no step is done again."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    study, work, port, log = write_study(tmp_path, phantom), tmp_path / "work", free_port(), tmp_path / "log"
    (tmp_path / "server").mkdir()
    client = MlflowClient(f"http://127.0.0.1:{port}")

    def train() -> Run:
        more = ("train.steps=80", "train.report_every=1")
        return Run("train", study, work, log, FACTOR, f"tracking.uri=http://127.0.0.1:{port}", *more)

    def points() -> list[tuple[int, float]]:
        time.sleep(0.5)
        told = work / "done" / "track.json"
        run_id = json.loads(told.read_text())["run_id"] if told.exists() else None
        return [(p.step, p.value) for p in client.get_metric_history(run_id, "total")] if run_id else []

    with serving(tmp_path / "server", port):
        run = train()
        run.wait_for(points)
        run.kill_driver()
        assert not (work / "done" / "learn.json").exists()
        killed = points()
        run = train()
        run.wait_for(lambda: len(points()) > len(killed))
        assert not (work / "done" / "learn.json").exists()
    assert run.end() == 1
    assert f"failed: http://127.0.0.1:{port}" in log.read_text()
    trained = (work / "done" / "learn.json").stat().st_mtime_ns
    with serving(tmp_path / "server", port):
        assert train().end() == 0, log.read_text()
        assert (work / "done" / "learn.json").stat().st_mtime_ns == trained
        history = json.loads((work / "done" / "learn.json").read_text())["history"]
        assert points() == [(entry["step"], entry["total"]) for entry in history]
        assert len(history) == 80 > len(killed)
