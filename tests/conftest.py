"""One phantom, one Ray session and one full run, shared by every test of the pipeline."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from threadpoolctl import threadpool_limits

from deepfere.config import RaySettings, load_config
from deepfere.rows import Phase
from deepfere.schedule import run_phase

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("RAY_ADDRESS", None)

# One numerical thread, as in every run of the pipeline: the same sums, and no threads that wait for each other.
torch.set_num_threads(1)
threadpool_limits(1)

UNTIL = float(os.environ.get("DEEPFERE_TESTS_UNTIL", "inf"))
"""Seconds since 1970 from which on no test is begun."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > UNTIL:
        pytest.skip("not begun: the time for these tests is used up (DEEPFERE_TESTS_UNTIL); make test-cluster runs all")


FACTOR = 4
SETTINGS = (
    "train.steps=4",
    "train.batch=2",
    "train.patch_px=20",
    "train.report_every=2",
    "model.depth=2",
    "model.null_guides=8",
    "align.angle_step_deg=30",
    "align.candidates=6",
)


@dataclass(frozen=True)
class Place:
    """Where the shared run is, and how it was made."""

    result: Path
    tracking: str

    @property
    def overrides(self) -> list[str]:
        return [*SETTINGS, f"tracking.uri={self.tracking}"]

    def config(self, *more: str, **given):
        return load_config(None, [*self.overrides, *more], factor=FACTOR, **given)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines on standard error besides the names of the stages."""
        stages = ("fuse: ", "ingest: ", "align: ", "tile: ", "train: ", "reconstruct: ", "evaluate: ")
        return [line for line in self.err.splitlines() if not line.startswith(stages)]


@pytest.fixture
def cli(capfd):
    """Run a command in this process; standard streams are those of the file descriptors, Ray's noise included."""
    from deepfere.cli import main

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as stop:
                main([str(a) for a in arguments])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capfd.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def s3_session():
    """A server of the S3 protocol; ``s3://bucket`` leads to it, in Ray's workers too (see `tests.s3`)."""
    from .s3 import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_session):
    """That server, with nothing failing before or after."""
    s3_session.heal()
    yield s3_session
    s3_session.heal()


@pytest.fixture(scope="session")
def ray_session(s3_session):
    import ray

    from deepfere.cluster import connect, shutdown

    assert not ray.is_initialized(), "a test before this one has started Ray and does not ask for ray_session"
    connect(RaySettings(num_cpus=2, object_store_memory_bytes=100 * 2**20))
    yield
    shutdown()


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    from deepfere.phantom import PhantomSpec, write_phantom

    spec = PhantomSpec(shape_px=(24, 21), slide_mpp_um=2.0, factor=FACTOR, seed=3)
    return write_phantom(tmp_path_factory.mktemp("phantom"), spec)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("run")
    return Place(folder / "result.zarr", f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture(scope="session")
def fused(phantom, place, ray_session):
    """The result of one whole run: search, training, reconstruction."""
    from deepfere.pipeline import fuse

    return fuse(phantom.imzml, phantom.slide, place.result, config=place.config())


@contextmanager
def serving(folder: Path, port: int) -> Iterator[str]:
    """A real tracking server on a port of this machine, ended with its group; gives its URL."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    log = folder / "server.log"
    env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=env, cwd=folder, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                    if answer.read() == b"OK":
                        break
            except OSError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """A tracking server for all tests."""
    with serving(tmp_path_factory.mktemp("server"), free_port()) as url:
        yield url


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated SQLite store of MLflow's: the migration takes seconds, so it is done once and copied."""
    from deepfere.training.mlflow_store import connect

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "server"])
def tracking_store(request, tmp_path):
    """The URI of a tracking store: a new SQLite file, or the server."""
    if request.param == "server":
        return request.getfixturevalue("mlflow_server")
    shutil.copyfile(request.getfixturevalue("empty_store"), tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("mount") and hasattr(os, "geteuid") and os.geteuid() == 0
        else None
    )
    if made is None or made.returncode:
        pytest.skip("a file system of its own needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def taken_cpus(ray_session):
    """An actor of somebody else that holds all CPUs of the session, until it is killed or the test ends."""
    import ray

    from deepfere.schedule import Host

    actor = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Host).remote()
    ray.get(actor.ready.remote())
    yield actor
    ray.kill(actor)


def write_study(folder: Path, phantom) -> Path:
    """A manifest of the phantom alone, aligned as it is."""
    section = {"name": "one", "msi": str(phantom.imzml), "slide": str(phantom.slide)}
    section["alignment"] = str(phantom.truth / "alignment.json")
    (folder / "study.yaml").write_text(yaml.safe_dump({"sections": [section]}))
    return folder / "study.yaml"


def contents(root: Path, *parts: str) -> dict[str, bytes]:
    """Every file below some folders of a store."""
    files = [p for part in parts for p in sorted((root / part).rglob("*")) if p.is_file()]
    assert files
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def footprint_means(image, factor: int):
    """Means over factor x factor pixels, in float64."""
    h, w = image.shape
    return np.asarray(image, np.float64).reshape(h // factor, factor, w // factor, factor).mean((1, 3))


def run_rows(rows, worker, arguments, *, what, on_done=None, inline_up_to=0):
    """Carry out rows as one phase."""
    todo = list(rows)
    run_phase(Phase(what, worker, arguments, todo, len(todo), on_done), inline_up_to)
