"""Processes killed while a study trains and reconstructs: the rest goes on, the bytes are those of a calm run."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from deepfere.cluster import records_in
from deepfere.errors import InputError
from deepfere.reconstruction.result import Result
from deepfere.reconstruction.whole import object_of
from deepfere.training.checkpoint import read_state
from deepfere.training.trainer import MOST_FAILURES
from tests.conftest import FACTOR, contents, write_study
from tests.runs import STEPS, Run, points_of, step_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")
FINE = 16
"""Factor with which the section has 36 shards, and 30 above them."""
ROWS = "ray::Rows(reconstruct)"


def kill_at(steps: Sequence[int], run: Run, work: Path, count: int) -> None:
    """One of the training workers, another one by turns, whenever their group has got so far."""
    seen: set[int] = set()
    killed_s = 0.0
    for turn, step in enumerate(steps):
        group = run.wait_for(partial(group_at, step, run, work, count, seen, killed_s))
        seen |= {one.pid for one in group}
        killed_s = time.time()
        group[turn % count].kill()


def group_at(
    step: int, run: Run, work: Path, count: int, seen: set[int], after_s: float
) -> list[psutil.Process] | None:
    """A whole group of training workers that has itself got so far; None as long as there is none."""
    if step_of(work, after_s) < step:
        return None
    group = sorted(run.workers("ray::RayTrainWorker"), key=lambda one: one.pid)
    return group if len(group) == count and not seen & {one.pid for one in group} else None


def units_of(work: Path) -> dict[str, dict[str, list[int] | None]]:
    """What is recorded as done of a reconstruction and its pyramid: by unit, the arrays that it has objects of."""
    folders = [work / "sections" / "one" / "journal" / name for name in ("reconstruct", "pyramid")]
    return {
        unit: kept["wrote"] for at in folders for record in records_in(at) for unit, kept in record["units"].items()
    }


def objects_of(made: Path) -> list[Path]:
    """Shards on the disk."""
    return [file for image in ("detail", "stain") for file in (made / image).glob("*/c/*/*/*")]


def at_work(run: Run, made: Path, count: int, total: int, after_s: float) -> bool:
    """Whether workers have written objects, so many in all and one after a moment, or seal what is written."""
    files, latest = objects_of(made), 0.0
    for file in files:
        with suppress(FileNotFoundError):  # being made anew
            latest = max(latest, file.stat().st_mtime)
    new = latest > after_s or len(files) == total
    return len(files) >= count and new and bool(run.workers(ROWS))


def made_at(work: Path) -> dict[Path, int]:
    """When each object that is recorded was written."""
    made = work / "sections" / "one" / "result.zarr"
    files = [
        object_of(made, unit, array)
        for unit, wrote in units_of(work).items()
        for array, told in wrote.items()
        if told is not None
    ]
    return {file.relative_to(made): file.stat().st_mtime_ns for file in files}


def weights_of(work: Path) -> bytes:
    return (work / "sections" / "one" / "network.safetensors").read_bytes()


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


@pytest.mark.timeout(1800)
def test_one_of_two_training_workers_is_killed_more_often_than_ray_forgives(study, tiled):
    """The machines of a cluster may be lent: what counts is that training gets on."""
    calm, lent = copied(tiled, "pair"), copied(tiled, "lent")
    run = Run("train", study, calm, study.parent / "pair.log", FACTOR, "train.workers=2")
    assert run.end() == 0, run.log.read_text()
    run = Run("train", study, lent, study.parent / "lent.log", FACTOR, "train.workers=2")
    moments = (3, 7, 11, 15)
    assert len(moments) > MOST_FAILURES + 1
    kill_at(moments, run, lent, 2)
    assert run.end() == 0, run.log.read_text()
    assert weights_of(lent) == weights_of(calm)
    assert points_of(lent) == points_of(calm)
    history = [json.loads((at / "done" / "learn.json").read_text())["history"] for at in (lent, calm)]
    assert history[0] == history[1]


def test_the_driver_is_killed_while_it_trains_by_itself(study, tiled, calm):
    """Without Ray Train, the same bytes as with it."""
    work, log, more = copied(tiled, "alone"), study.parent / "alone.log", (FACTOR, "train.workers=auto")
    run = Run("train", study, work, log, *more)
    run.wait_for(lambda: list((work / "training").glob("run-*/training.pt")))
    assert not run.workers("ray::RayTrainWorker")
    run.kill_driver()
    assert not (work / "done" / "learn.json").exists()
    (state,) = (work / "training").glob("run-*/training.pt")
    kept = read_state(state)["step"]
    assert 2 <= kept < STEPS
    again = Run("train", study, work, log, *more)
    assert again.end() == 0, log.read_text()
    assert weights_of(work) == weights_of(calm)
    assert points_of(work) == points_of(calm)
    history = [json.loads((at / "done" / "learn.json").read_text())["history"] for at in (work, calm)]
    assert history[0] == history[1]


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


@pytest.mark.timeout(1800)
def test_reconstruction_is_killed_at_ten_random_moments(study, tmp_path):
    """Six among the shards and four in the pyramid, new ones made before each; one in each is the driver's."""
    calm, work, log = tmp_path / "calm", tmp_path / "moments", tmp_path / "log"
    quick = ("train.steps=4", "tracking.uri=none", "reconstruct.chunk_px=64")
    trained = Run("train", study, calm, log, FINE, *quick)
    assert trained.end() == 0, log.read_text()
    shutil.copytree(calm, work)
    undisturbed = Run("reconstruct", study, calm, log, FINE, *quick)
    assert undisturbed.end() == 0, log.read_text()
    whole = calm / "results" / "one.zarr"
    total, shards = len(objects_of(whole)), len(list(whole.glob("*/0/c/*/*/*")))
    assert shards > 50 and total - shards > 20

    order, made = random.Random(0), work / "sections" / "one" / "result.zarr"
    moments = sorted([*order.sample(range(1, shards), 6), *order.sample(range(shards, total - 4), 4)])
    with_driver = (order.choice(moments[:6]), order.choice(moments[6:-1]))
    run, killed_s = None, 0.0
    kept: dict[Path, int] = {}
    for moment in moments:
        if run is None:
            run = Run("reconstruct", study, work, log, FINE, *quick)
        run.wait_for(partial(at_work, run, made, moment, total, killed_s))
        time.sleep(order.uniform(0, 0.1))
        if moment in with_driver:
            run.kill_driver()
            run, kept = None, made_at(work) | kept
        else:
            for worker in run.workers(ROWS):
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
        killed_s = time.time()
        assert not (work / "results" / "one.zarr").exists()
        with pytest.raises(InputError, match="is unfinished"):
            Result(str(made))
    assert run is not None and run.end() == 0, log.read_text()
    result = work / "results" / "one.zarr"
    assert contents(result, *ARRAYS) == contents(whole, *ARRAYS)
    assert len(Result(str(result)).ions) == len(Result(str(whole)).ions)
    # What was recorded when a driver was killed was not made again by the next one.
    assert len(kept) >= shards and kept == {file: (result / file).stat().st_mtime_ns for file in kept}
