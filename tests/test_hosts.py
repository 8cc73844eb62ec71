"""Several hosts with addresses of their own: all of them work, and they write what one machine writes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import FACTOR, contents, write_study
from tests.hosts import Hosts, missing

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
]

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")


@pytest.fixture(scope="module")
def hosts():
    if why := missing():
        pytest.skip(f"no hosts on this machine: {why}")
    with Hosts(workers=2) as made:
        made.join()
        yield made


@pytest.fixture(scope="module")
def study(phantom, tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), phantom)


@pytest.fixture(scope="module")
def command(study, place):
    def build(stage: str, work: str) -> list[str]:
        settings = [s for s in place.overrides if not s.startswith(("tracking", "train.steps"))]
        settings += [f"tracking.uri=sqlite:///{study.parent / work}.db", "train.steps=40", "model.tier=T2"]
        settings += ["reconstruct.shard_px=64", "reconstruct.chunk_px=16"]  # several shards for each host
        return ["deepfere", stage, str(study), "-o", str(study.parent / work), "--factor", str(FACTOR), *settings]

    return build


@pytest.fixture(scope="module")
def calm(hosts, study, command):
    """A run in which nothing happens; it must use every host."""
    log, seen = study.parent / "calm.log", set()
    running = hosts.begin(0, command("reconstruct", "calm"), log)
    while running.poll() is None:
        seen |= {n for n in (0, 1, 2) if hosts.holds(n, "ray::Rows(reconstruct)")}
        time.sleep(0.1)
    assert running.returncode == 0, log.read_text()
    assert seen == {1, 2}
    return study.parent / "calm" / "results" / "one.zarr"


def test_several_hosts_write_what_one_writes(calm, study, command, ray_session, cli):
    done = cli(*command("reconstruct", "alone")[1:])
    assert done.code == 0, done
    assert contents(study.parent / "alone" / "results" / "one.zarr", *ARRAYS) == contents(calm, *ARRAYS)


def step_of(work) -> int:
    """Steps that the first training worker has told of."""
    texts = [file.read_text() for file in (work / "training").glob("*.step")]
    return max((int(text) for text in texts if text.isdigit()), default=0)


def test_a_host_is_cut_off_while_it_trains_and_comes_back(calm, hosts, study, command):
    """One worker a host: what is left goes on with one, to the same weights but for rounding."""
    work, log = study.parent / "cut", study.parent / "cut.log"
    running = hosts.begin(0, [*command("train", "cut"), "train.workers=2"], log)
    while step_of(work) < 6:
        assert running.poll() is None, log.read_text()
        time.sleep(0.1)
    assert all(hosts.holds(n, "ray::RayTrainWorker") for n in (1, 2))
    hosts.cut(2)
    try:
        assert running.wait(timeout=400) == 0, log.read_text()
    finally:
        hosts.rejoin(2)
    one, two = (load_file(study.parent / at / "sections" / "one" / "network.safetensors") for at in ("calm", "cut"))
    for name, value in one.items():
        assert np.abs(value - two[name]).max() <= 1e-3 * max(np.abs(value).max(), 1e-6), name


def test_a_host_is_cut_off_while_it_reconstructs(calm, hosts, study, command):
    log = study.parent / "torn.log"
    running = hosts.begin(0, command("reconstruct", "torn"), log)
    while not hosts.holds(2, "ray::Rows(reconstruct)"):
        assert running.poll() is None, log.read_text()
        time.sleep(0.02)
    hosts.cut(2)
    try:
        assert running.wait(timeout=400) == 0, log.read_text()
    finally:
        hosts.rejoin(2)
    assert contents(study.parent / "torn" / "results" / "one.zarr", *ARRAYS) == contents(calm, *ARRAYS)
