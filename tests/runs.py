"""A stage as a process of its own, and how far its training has got."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from mlflow import MlflowClient

from tests.conftest import FACTOR, SETTINGS

STEPS = 24
"""Optimiser steps of a training, unless it is told otherwise."""


class Run:
    """A stage as a process of its own, with its own Ray, in a process group that can be ended as one."""

    def __init__(self, stage: str, study: Path, work: Path, log: Path, factor: int = FACTOR, *more: str) -> None:
        settings = [s for s in SETTINGS if not s.startswith("train.steps")]
        settings += [f"tracking.uri=sqlite:///{work}.db", f"train.steps={STEPS}", "model.tier=T2", "ray.num_cpus=2"]
        settings += ["train.workers=1"]  # of Ray Train, also where one process would do
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

    def wait_for(self, condition):
        """Until it holds, as long as the process lives; gives what it gives."""
        while not (found := condition()):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        return found

    def end(self) -> int:
        return self.process.wait(timeout=800)

    def kill_driver(self) -> None:
        """As the kernel does when memory runs out; Ray's own processes end by themselves."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(below, timeout=60)


def step_of(work: Path, after_s: float = 0.0) -> int:
    """Optimiser steps that the first training worker has told of since a moment."""
    for file in (work / "training").glob("*.step"):
        with suppress(FileNotFoundError):  # an attempt has just ended
            text = file.read_text()
            return int(text) if text.isdigit() and file.stat().st_mtime > after_s else 0
    return 0


def points_of(work: Path) -> dict[str, list[int]]:
    """Steps that MLflow has of each loss, of the only run that it has."""
    client = MlflowClient(f"sqlite:///{work}.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 1
    return {
        name: [point.step for point in client.get_metric_history(runs[0].info.run_id, name)]
        for name in ("total", "mapping", "reconstruction")
    }
