"""Processes killed while a study trains and reconstructs: the rest goes on, the bytes are those of a calm run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from deepfere.cluster import records_in
from tests.conftest import FACTOR, SETTINGS, contents, write_study

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")
STEPS = 24


class Run:
    """A stage as a process of its own, with its own Ray, in a process group that can be ended as one."""

    def __init__(self, stage: str, study: Path, work: Path, log: Path, factor: int = FACTOR, *more: str) -> None:
        settings = [s for s in SETTINGS if not s.startswith("train.steps")]
        settings += [f"tracking.uri=sqlite:///{work}.db", f"train.steps={STEPS}", "model.tier=T2", "ray.num_cpus=2"]
        settings += ["reconstruct.shard_px=64", "reconstruct.chunk_px=16"]
        command = [sys.executable, "-m", "deepfere", stage, str(study), "-o", str(work), "--factor", str(factor)]
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, *settings, *more], stdout=out, stderr=out, start_new_session=True
            )

    def workers(self, title: str) -> list[psutil.Process]:
        """Processes of its Ray whose title begins so."""
        found = []
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if " ".join(process.cmdline()).startswith(title):
                        found.append(process)
                except psutil.Error:
                    pass
        except psutil.NoSuchProcess:
            pass
        return found

    def wait_for(self, condition) -> None:
        """Until it holds, as long as the process lives."""
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(timeout=400)

    def kill_driver(self) -> None:
        """As the kernel does when memory runs out; Ray's own processes end by themselves."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(below, timeout=60)


def step_of(work: Path) -> int:
    """Optimiser steps that the first worker has told of."""
    for file in (work / "training").glob("*.step"):
        text = file.read_text()
        return int(text) if text.isdigit() else 0
    return 0


def shards_of(work: Path) -> int:
    """Shards in all journals of the reconstruction."""
    folders = work.glob("sections/*/journal/reconstruct")
    return sum(len(record["units"]) for folder in folders for record in records_in(folder))


def weights_of(work: Path) -> bytes:
    return (work / "sections" / "one" / "network.safetensors").read_bytes()


def points_of(work: Path) -> dict[str, list[int]]:
    """Steps that MLflow has of each loss, over all runs that trained."""
    client = MlflowClient(f"sqlite:///{work}.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    trained = [run for run in runs if "total" in run.data.metrics]
    assert len(trained) == 1
    return {
        name: [point.step for point in client.get_metric_history(trained[0].info.run_id, name)]
        for name in ("total", "mapping", "reconstruction")
    }


@pytest.fixture(scope="module")
def study(phantom, tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("kills"), phantom)


@pytest.fixture(scope="module")
def tiled(study):
    """A work folder that every other one is a copy of."""
    work = study.parent / "tiled"
    run = Run("tile", study, work, study.parent / "tile.log")
    assert run.end() == 0, run.log.read_text()
    return work


@pytest.fixture(scope="module")
def calm(study, tiled):
    """Training and reconstruction undisturbed."""
    work = copied(tiled, "calm")
    run = Run("reconstruct", study, work, study.parent / "calm.log")
    assert run.end() == 0, run.log.read_text()
    return work


def copied(work: Path, name: str) -> Path:
    to = work.parent / name
    shutil.copytree(work, to)
    return to


def test_a_training_worker_is_killed(study, tiled, calm):
    work = copied(tiled, "worker")
    run = Run("train", study, work, study.parent / "worker.log")
    run.wait_for(lambda: step_of(work) >= 5)
    victims = run.workers("ray::RayTrainWorker")
    assert victims, [p.cmdline() for p in psutil.Process(run.process.pid).children(recursive=True)]
    victims[0].kill()
    assert run.end() == 0, run.log.read_text()
    assert weights_of(work) == weights_of(calm)
    steps = list(range(2, STEPS + 1, 2))
    assert points_of(work) == dict.fromkeys(("total", "mapping", "reconstruction"), steps)


def test_the_driver_is_killed_while_it_trains(study, tiled, calm):
    work = copied(tiled, "driver")
    run = Run("train", study, work, study.parent / "driver.log")
    run.wait_for(lambda: step_of(work) >= 7)
    run.kill_driver()
    assert not (work / "done" / "learn.json").exists()
    again = Run("train", study, work, study.parent / "driver.log")
    seen: list[int] = []
    while again.process.poll() is None:
        seen.append(step_of(work))
        time.sleep(0.02)
    assert again.end() == 0, again.log.read_text()
    # It went on from a checkpoint: the first steps were not done again.
    assert min(step for step in seen if step) > 4
    assert weights_of(work) == weights_of(calm)
    assert points_of(work) == points_of(calm)
    history = [json.loads((at / "done" / "learn.json").read_text())["history"] for at in (work, calm)]
    assert history[0] == history[1]


def test_reconstruction_is_killed_at_ten_random_moments(study, tiled, calm):
    work = copied(tiled, "moments")
    trained = Run("train", study, work, study.parent / "moments.log")
    assert trained.end() == 0
    order, kills, killed_driver = random.Random(0), 0, False
    while True:
        run = Run("reconstruct", study, work, study.parent / "moments.log")
        run.wait_for(lambda run=run: run.workers("ray::Rows(reconstruct)") or run.process.poll() is not None)
        while run.process.poll() is None:
            time.sleep(order.uniform(0.05, 0.5))
            workers = run.workers("ray::Rows(reconstruct)")
            if kills >= 4 and not killed_driver and shards_of(work):
                done = shards_of(work)
                run.kill_driver()
                killed_driver = True
                assert not (work / "results" / "one.zarr").exists()
                assert shards_of(work) >= done
                break
            if workers and kills < 10:
                # All at once, else those that are left end the small section before ten moments have come.
                for worker in workers:
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()
                kills += 1
        if run.process.wait(timeout=400) == 0:
            break
        # A row whose workers die again and again is given up; the same command goes on.
        assert not (work / "results" / "one.zarr").exists()
    assert killed_driver and kills == 10
    assert contents(work / "results" / "one.zarr", *ARRAYS) == contents(calm / "results" / "one.zarr", *ARRAYS)
