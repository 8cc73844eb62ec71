"""Several hosts with addresses of their own: all of them work, and they write what one machine writes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import FACTOR, contents, write_study
from tests.hosts import Hosts, missing
from tests.runs import points_of, step_of

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


LOSSES = [Hosts.cut, Hosts.kill]
"""A host falls silent, or its Ray node and all workers end at once."""


@pytest.mark.parametrize("lose", LOSSES)
def test_a_host_is_lost_while_it_trains_and_comes_back(calm, hosts, study, command, lose):
    """One worker a host: the other one goes on, to the same weights but for rounding; MLflow has each point once."""
    name = f"train-{lose.__name__}"
    work, log = study.parent / name, study.parent / f"{name}.log"
    hosts.rest()
    running = hosts.begin(0, [*command("train", name), "train.workers=2"], log)
    while step_of(work) < 6:
        assert running.poll() is None, log.read_text()
        time.sleep(0.1)
    assert all(hosts.holds(n, "ray::RayTrainWorker") for n in (1, 2))
    lose(hosts, 2)
    try:
        assert running.wait(timeout=600) == 0, log.read_text()
    finally:
        hosts.rejoin(2)
    one, two = (load_file(study.parent / at / "sections" / "one" / "network.safetensors") for at in ("calm", name))
    for part, value in one.items():
        assert np.abs(value - two[part]).max() <= 1e-3 * max(np.abs(value).max(), 1e-6), part
    assert points_of(work) == points_of(study.parent / "calm")


@pytest.mark.parametrize("lose", LOSSES)
def test_a_host_is_lost_while_it_reconstructs(calm, hosts, study, command, lose):
    name = f"reconstruct-{lose.__name__}"
    log = study.parent / f"{name}.log"
    running = hosts.begin(0, command("reconstruct", name), log)
    while not hosts.holds(2, "ray::Rows(reconstruct)"):
        assert running.poll() is None, log.read_text()
        time.sleep(0.02)
    lose(hosts, 2)
    try:
        assert running.wait(timeout=600) == 0, log.read_text()
    finally:
        hosts.rejoin(2)
    assert contents(study.parent / name / "results" / "one.zarr", *ARRAYS) == contents(calm, *ARRAYS)


@pytest.mark.timeout(1500)
def test_a_group_shrinks_to_what_is_left_and_grows_again(hosts, study, command, ray_session, cli):
    """Three workers, then two, which do not divide the patches of a step, and three again: what one learns."""
    wide = ["train.batch=27", "train.steps=200", "train.report_every=10"]
    work, log = study.parent / "grow", study.parent / "grow.log"
    hosts.rest()
    running = hosts.begin(0, [*command("train", "grow"), *wide, "train.workers=3"], log)

    def until(condition):
        while not condition():
            assert running.poll() is None, log.read_text()
            time.sleep(0.1)

    try:
        until(lambda: step_of(work) >= 12 and hosts.holds(2, "ray::RayTrainWorker"))
        hosts.kill(2)
        killed_s = time.time()
        until(lambda: step_of(work, killed_s) >= 20)
        hosts.rejoin(2)
        # Ray looks a minute after a group has begun whether there is room for more.
        while not hosts.holds(2, "ray::RayTrainWorker"):
            if running.poll() == 0 and time.time() - killed_s < 90:
                pytest.skip("too quick a machine: training was done before its group could grow")
            assert running.poll() is None, log.read_text()
            time.sleep(0.1)
        assert running.wait(timeout=900) == 0, log.read_text()
    finally:
        running.kill()
    done = cli(*command("train", "grow-not")[1:], *wide)
    assert done.code == 0, done
    folders = [study.parent / at for at in ("grow-not", "grow")]
    one, two = (load_file(at / "sections" / "one" / "network.safetensors") for at in folders)
    for part, value in one.items():
        assert np.abs(value - two[part]).max() <= 1e-3 * max(np.abs(value).max(), 1e-6), part
    assert points_of(work) == points_of(folders[0])
