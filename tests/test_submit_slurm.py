"""Jobs of a real Slurm: success, failure, a stop that saves its work, a time limit, a job that is attached to."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from deepfere.submit.stop import ask, wait
from tests.conftest import FACTOR, SETTINGS
from tests.slurm import SlurmCluster, missing

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
PROGRAM = [sys.executable, "-m", "deepfere"]
STEPS = 60
SMALL = ["--sbatch=--nodes=1", "--sbatch=--cpus-per-task=2"]


@pytest.fixture(scope="module")
def slurm():
    if why := missing():
        pytest.skip(f"no Slurm on this machine: {why}")
    with SlurmCluster() as made:
        yield made


@pytest.fixture
def run(slurm, tmp_path):
    """Start deepfere as a user of the cluster."""

    def start(*words: object) -> subprocess.Popen[str]:
        more = {"XDG_DATA_HOME": str(tmp_path / "data"), "DEEPFERE_NODE_WAIT_S": "600"}
        return subprocess.Popen(
            [*PROGRAM, *map(str, words)],
            env={**slurm.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=1000)
    return process.returncode, out, err


def manifest(folder: Path, **section: str) -> Path:
    (folder / "study.yaml").write_text(yaml.safe_dump({"sections": [{"name": "one", **section}]}))
    return folder / "study.yaml"


def test_a_job_runs_and_another_fails_with_its_own_code(run, phantom, tmp_path):
    shutil.copy(phantom.imzml, tmp_path / "a.imzML")
    study = manifest(tmp_path, msi=str(tmp_path / "a.imzML"))
    words = ["submit", "ingest", study, "-o", tmp_path / "my work", "--no-guide", "--to", "slurm", *SMALL]
    code, out, err = finished(run(*words))
    assert code == 2 and "a.ibd is missing" in out, (out, err)
    name = err.split(":")[0]
    assert (tmp_path / "my work.jobs" / f"{name}.sbatch").is_file()
    # The same again, now that the measurement is whole.
    shutil.copy(phantom.imzml.with_suffix(".ibd"), tmp_path / "a.ibd")
    code, out, err = finished(run(*words))
    assert code == 0 and "one: 24 ions, 24 x 21 pixels" in out, (out, err)
    assert err == f"{name}-2: submitted\n"


def test_a_job_is_attached_to_and_its_time_limit_stops_it(run, slurm, tmp_path):
    """The measurement is a pipe that nobody writes to: the job waits until Slurm's signal before the limit."""
    os.mkfifo(tmp_path / "slow.imzML")
    study = manifest(tmp_path, msi=str(tmp_path / "slow.imzML"))
    words = ["submit", "ingest", study, "-o", tmp_path / "work", "--no-guide", "--to", "slurm", *SMALL]
    words += ["--sbatch=--time=3", "--sbatch=--signal=B:TERM@60"]
    code, _, err = finished(run(*words, "--no-wait"))
    assert code == 0, err
    name = err.split(":")[0]
    second = run(*words)
    assert second.stderr is not None and second.stderr.readline() == f"{name}: runs already\n"
    code, out, err = finished(second)
    assert code == 1, (out, err)
    assert "stopped; the same command again resumes" in out


def test_the_same_work_submitted_at_once_is_one_job(run, slurm, tmp_path):
    os.mkfifo(tmp_path / "slow.imzML")
    study = manifest(tmp_path, msi=str(tmp_path / "slow.imzML"))
    words = ["submit", "ingest", study, "-o", tmp_path / "work", "--no-guide", "--to", "slurm", "--no-wait", *SMALL]
    try:
        ended = [finished(process) for process in [run(*words) for _ in range(4)]]
        shown = slurm.run("squeue", "--noheader", "--format=%j").split()
    finally:
        slurm.run("scancel", f"--user={getpass.getuser()}")
    assert [code for code, _, _ in ended] == [0] * 4, ended
    told = sorted(err.strip().partition(": ")[2] for _, _, err in ended)
    assert told == ["runs already"] * 3 + ["submitted"]
    assert shown == [ended[0][2].split(":")[0]]
    while slurm.run("squeue", "--noheader").strip():  # the next job has the machine to itself
        time.sleep(0.5)


def test_a_job_that_is_stopped_saves_a_checkpoint_and_resumes(run, slurm, phantom, tmp_path, monkeypatch):
    study = manifest(
        tmp_path, msi=str(phantom.imzml), slide=str(phantom.slide), alignment=str(phantom.truth / "alignment.json")
    )
    work = tmp_path / "work"
    settings = [s for s in SETTINGS if not s.startswith(("train.steps", "train.report_every"))]
    settings += [
        f"train.steps={STEPS}",
        f"train.report_every={STEPS}",
        "model.tier=T2",
        f"tracking.uri=sqlite:///{work}.db",
    ]
    words = ["submit", "train", study, "-o", work, "--factor", FACTOR, *settings, "--to", "slurm", *SMALL]
    first = run(*words)
    assert first.stderr is not None
    name = first.stderr.readline().split(":")[0]
    while not any(file.read_text() for file in (work / "training").glob("*.step")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    (number,) = slurm.run("squeue", "--noheader", f"--name={name}", "--format=%i").split()
    slurm.run("scancel", "--batch", "--signal=TERM", number)
    code, out, _ = finished(first)
    assert code == 1 and "stopped (by SIGTERM); the same command again resumes" in out, out
    (kept,) = (work / "training").glob("run-*/checkpoint_*/training.pt")
    saved = torch.load(kept, weights_only=True)
    assert 0 < saved["step"] < STEPS and saved["count"] == saved["step"]
    # Stopped once more, by its id.
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    second = run(*words)
    assert second.stderr is not None
    name = second.stderr.readline().split(":")[0]
    while not any(file.read_text() for file in (work / "training").glob("*.step")):
        assert second.poll() is None, second.communicate()
        time.sleep(0.02)
    asked = ask(name)
    assert asked.told == f"{name}: asked to stop"
    wait(asked)
    code, out, _ = finished(second)
    assert code == 1 and "stopped (by deepfere stop)" in out, out
    code, out, err = finished(run(*words))
    assert code == 0 and "one: fitted" in out, (out, err)
    history = json.loads((work / "done" / "learn.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [STEPS]
