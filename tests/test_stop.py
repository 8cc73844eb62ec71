"""Runs that are asked to stop: they save first, say so, and end with the same bytes after all."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from mlflow import MlflowClient

from deepfere import stopping
from deepfere.config import load_config
from deepfere.errors import InputError
from deepfere.pipeline.workspace import Workspace
from deepfere.pipeline.write import shard_phases
from deepfere.places import UrlPath
from deepfere.rows import RowWorker
from deepfere.training import trainer
from tests.conftest import FACTOR, contents, run_rows, write_study
from tests.runs import Run, step_of

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")


@pytest.fixture
def watch(tmp_path):
    """A run in this process."""
    with stopping.watched(tmp_path):
        yield tmp_path / stopping.STOP


@contextmanager
def interrupting():
    """SIGTERM unwinds, as in the program."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_request_stops_at_the_next_look_and_says_why(watch):
    stopping.look()
    stopping.request(watch, "by a test")
    time.sleep(stopping.LOOK_EVERY_S)
    with pytest.raises(stopping.Stopped, match="by a test"):
        stopping.look()


def test_what_workers_have_begun_is_finished_first(watch):
    with pytest.raises(stopping.Stopped), stopping.saving():
        stopping.request(watch, "by a test")
        stopping.look()
        stopping.looking(lambda stage, share: None)("learn", 0.5)
        reached = True
    assert reached


def test_an_old_request_is_dropped_and_none_stays(tmp_path):
    stopping.request(tmp_path / "stop", "long ago")
    with stopping.watched(tmp_path):
        stopping.look()
        stopping.request(tmp_path / "stop", "too late")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_asked_every_few_seconds_whoever_asks(monkeypatch):
    file, now, asked = UrlPath("memory://runs/one/stop"), [1000.0], []
    there = [False]
    monkeypatch.setattr(UrlPath, "exists", lambda self: asked.append(str(self)) or there[0])
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))

    assert not any(stopping.requested(str(file)) for _ in range(100))
    there[0] = True
    assert not stopping.requested(file)  # the same file, asked for lately
    assert len(asked) == 1
    now[0] += stopping.ASK_EVERY_S
    assert all(stopping.requested(str(file)) for _ in range(100))
    assert asked == [str(file)] * 2


def test_who_asks_a_run_to_stop_knows_it_at_once(monkeypatch):
    file = UrlPath("memory://runs/two/stop")
    monkeypatch.setattr(UrlPath, "exists", lambda self: False)
    monkeypatch.setattr(UrlPath, "write_text", lambda self, text: None)
    monkeypatch.setattr(UrlPath, "unlink", lambda self, missing_ok: None)
    assert not stopping.requested(file)
    stopping.request(file, "by a test")
    assert stopping.requested(file)
    with stopping.watched(UrlPath("memory://runs/two")):
        assert not stopping.requested(file)


def test_a_time_limit_is_a_request(tmp_path):
    with pytest.raises(stopping.Stopped, match=r"0.05 s is over"), stopping.watched(tmp_path, 0.05):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            stopping.look()
            time.sleep(0.01)


@pytest.mark.parametrize("value", ["0", "-3", "soon"])
def test_a_time_limit_is_positive(value):
    with pytest.raises(InputError, match=r"run\.time_limit_s"):
        load_config(None, [f"run.time_limit_s={value}"])


def test_a_time_limit_changes_no_numbers():
    assert load_config(None, ["run.time_limit_s=60"]).digest() == load_config().digest()


def test_sigterm_asks_while_workers_save_and_interrupts_elsewhere(watch):
    with interrupting():
        with pytest.raises(KeyboardInterrupt) as elsewhere:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert not isinstance(elsewhere.value, stopping.Stopped) and not watch.exists()
        with pytest.raises(stopping.Stopped, match="SIGTERM"), stopping.saving():
            os.kill(os.getpid(), signal.SIGTERM)
            assert watch.exists()
        with pytest.raises(KeyboardInterrupt) as twice, stopping.saving():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert not isinstance(twice.value, stopping.Stopped)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


class Slow(RowWorker):
    """Rows take a while, so that most have not begun when the third asks for the stop."""

    def work(self, row):
        file = Path(row["file"])
        (file.parent / f"begun-{row['unit']}").touch()
        if row["unit"] == "3":
            stopping.request(file, "by a worker")
        time.sleep(0.05)
        return {}


@pytest.mark.ray
@pytest.mark.parametrize("inline", [0, 100])
def test_rows_that_were_begun_are_done_and_no_others(watch, request, inline):
    if not inline:
        request.getfixturevalue("ray_session")
    done: list[str] = []
    rows = [{"unit": str(n), "file": str(watch)} for n in range(1, 41)]
    with pytest.raises(stopping.Stopped, match="by a worker"):
        run_rows(rows, Slow, (), what="rows", on_done=lambda r: done.append(r["unit"]), inline_up_to=inline)
    begun = {file.name.removeprefix("begun-") for file in watch.parent.glob("begun-*")}
    assert "3" in done and len(done) < 40 and set(done) == begun
    if inline:
        assert done == ["1", "2", "3"]


# The command.


def test_stop_asks_a_run_and_waits_for_it(cli, tmp_path):
    work = Workspace(tmp_path / "result.zarr.work")
    begun, seen = threading.Event(), []

    def run() -> None:
        with work.locked(), stopping.watched(work.root):
            begun.set()
            while not (work.root / "stop").exists():
                time.sleep(0.02)
            seen.append((work.root / "stop").read_text())
            time.sleep(0.5)

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(20)
    done = cli("stop", tmp_path / "result.zarr")
    # It has waited: nobody is there any more.
    assert done.code == 0 and done.out.splitlines()[-1] == "stopped" and not (work.root / "stop").exists(), done
    thread.join()
    assert seen == ["by deepfere stop"]
    again = cli("stop", work.root)
    assert again.code == 0 and "nothing runs in" in again.out
    assert not (work.root / "stop").exists()


def test_stop_of_the_folder_where_one_is(cli, tmp_path, monkeypatch):
    work = Workspace(tmp_path / "study")
    with work.locked():
        work.claim("a", overwrite=False)
    monkeypatch.chdir(tmp_path / "study")
    for name in (".", "../study", "../study/"):
        told = cli("stop", name)
        assert told.code == 0 and f"nothing runs in {tmp_path / 'study'}" in told.out + told.err
    for name in ("", "/", " "):
        told = cli("stop", name)
        assert told.code == 2 and len(told.errors) == 1


def test_stop_of_what_is_no_run(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in (tmp_path, tmp_path / "gone", "deepfere-train-0123456789ab"):
        done = cli("stop", name)
        assert done.code == 2 and len(done.errors) == 1, done
    assert "was submitted from here" in done.errors[0]


@pytest.mark.parametrize("interrupt", [signal.default_int_handler, signal.SIG_IGN])
def test_who_has_lost_the_run_does_not_wait_for_training(tmp_path, interrupt):
    """In the background, too, where SIGINT is ignored."""
    (tmp_path / "step").write_text("3")
    before = signal.signal(signal.SIGINT, interrupt)

    def on_step(step):
        raise stopping.Stopped(f"another process has taken it over after step {step}")

    began = time.monotonic()
    try:
        with (
            pytest.raises(stopping.Stopped, match="taken it over after step 3"),
            trainer._watch(tmp_path / "step", on_step),
        ):
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGUSR2) in (signal.SIG_DFL, None)
    assert (tmp_path / "step").exists(), "it is the other process's now"


# A whole run, stopped in training and in reconstruction.


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", ["auto", "1"])
def test_a_run_that_another_took_over_leaves_training_at_once(
    cli, phantom, place, fused, tmp_path, monkeypatch, workers
):
    settings = [s for s in place.overrides if not s.startswith(("tracking", "train.steps"))]
    out, plain, alone = tmp_path / "result.zarr", trainer._watch, trainer.train_alone

    def lost(on_step):
        def tell(step):
            on_step(step)
            raise stopping.Stopped("another process has taken it over")

        return tell

    @contextmanager
    def taken_over(file, on_step):
        with plain(file, lost(on_step)):
            yield

    monkeypatch.setattr(trainer, "_watch", taken_over)
    monkeypatch.setattr(trainer, "train_alone", lambda *a, on_step, **more: alone(*a, on_step=lost(on_step), **more))
    steps = ["train.steps=20000", "train.report_every=1000", "tracking.uri=none", f"train.workers={workers}"]
    done = cli("fuse", phantom.imzml, phantom.slide, "-o", out, "--factor", FACTOR, *settings, *steps)
    assert done.code == 1 and "stopped (another process has taken it over)" in done.err, done
    assert not out.exists()
    if workers == "1":  # nothing of it is left in the session that lives on
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
            assert time.monotonic() < deadline, ray.available_resources()
            time.sleep(0.5)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", ["auto", "1"])
def test_a_run_that_was_stopped_twice_ends_with_the_same_bytes(
    cli, phantom, place, fused, tmp_path, monkeypatch, workers
):
    """Where training is in the run's own process, and where it is in one of Ray Train's."""
    settings = [s for s in place.overrides if not s.startswith("tracking")] + [f"train.workers={workers}"]
    settings.append(f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}")
    out, work = tmp_path / "result.zarr", tmp_path / "result.zarr.work"

    def fuse():
        return cli("fuse", phantom.imzml, phantom.slide, "-o", out, "--factor", FACTOR, *settings)

    def states() -> list[str]:
        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        return [run.info.status for run in client.search_runs([e.experiment_id for e in client.search_experiments()])]

    begins = {"auto": "train_alone", "1": "_on_ray"}[workers]
    plain = getattr(trainer, begins)

    def at_the_first_step(*arguments, **named):
        stopping.request(work / "stop", "in training")
        return plain(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, begins, at_the_first_step)
        done = fuse()
    assert done.code == 1 and "stopped (in training); the same command again resumes" in done.err, done
    assert states() == ["KILLED"]
    (kept,) = (work / "training").glob("run-*/training.pt" if workers == "auto" else "run-*/checkpoint_*/training.pt")
    saved = torch.load(kept, weights_only=True)
    # Between two reports (every second step): what is not in the history yet is saved, too.
    assert (saved["step"], saved["history"], saved["count"]) == (1, [], 1)
    # No patch of what is done is loaded again. Were the checkpoint lost that this was noted for, all would be.
    notes = list((work / "training").glob("run-*/begin.json"))
    assert len(notes) == (0 if workers == "auto" else 1)
    for note in notes:
        noted = json.loads(note.read_text())
        assert noted["step"] == 1
        note.write_text(json.dumps({**noted, "step": 3}))

    def in_reconstruction(*about):
        for phase in shard_phases(*about):

            def tell(record, phase=phase):
                stopping.request(work / "stop", "in reconstruction")
                phase.on_done(record)

            yield replace(phase, on_done=tell)

    with monkeypatch.context() as patched:
        patched.setattr("deepfere.pipeline.write.shard_phases", in_reconstruction)
        done = fuse()
    assert done.code == 1 and "stopped (in reconstruction)" in done.err, done
    assert not out.exists() and states() == ["KILLED"]
    history = json.loads((work / "done" / "learn.json").read_text())["history"]
    assert all(json.loads(note.read_text())["step"] == 4 for note in notes)
    done = fuse()
    assert done.code == 0 and states() == ["FINISHED"], done
    assert contents(out, *ARRAYS) == contents(place.result, *ARRAYS)
    client = MlflowClient(place.tracking)
    run = client.get_run(fused.provenance["run"]["run_id"])
    calm = [point.value for point in client.get_metric_history(run.info.run_id, "total")]
    assert [entry["total"] for entry in history] == calm


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_training_that_is_out_of_time_saves_first_and_goes_on(phantom, tmp_path):
    study, work = write_study(tmp_path, phantom), tmp_path / "work"
    more = ("train.steps=100000", "train.report_every=100000", "tracking.uri=none")
    tiled = Run("tile", study, work, tmp_path / "log", FACTOR, *more)
    assert tiled.end() == 0, tiled.log.read_text()

    def train(limit_s: int) -> list[int]:
        """The steps that it told of."""
        seen = set()
        run = Run("train", study, work, tmp_path / "log", FACTOR, *more, f"run.time_limit_s={limit_s}")
        while run.process.poll() is None:
            seen.add(step_of(work))
            time.sleep(0.02)
        assert run.end() == 1
        last = run.log.read_text().splitlines()[-1]
        assert f"stopped (its time limit of {limit_s} s is over); the same command again resumes" in last
        return sorted(seen - {0})

    def saved() -> list[int]:
        files = (work / "training").glob("run-*/checkpoint_*/history.json")
        return [json.loads(file.read_text())["step"] for file in files]

    # Until it is enough for this machine to begin; no report comes before the limit, so the checkpoint is its own.
    limit_s = next(limit_s for limit_s in (30, 90, 270, 540) if train(limit_s) and saved())
    (first,) = saved()
    seen = train(2 * limit_s)
    (second,) = saved()
    assert first < seen[0] <= seen[-1] <= second
    assert not (work / "done" / "learn.json").exists()
