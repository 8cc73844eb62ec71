"""What Ray costs a run: ``python benchmarks/distributed.py [CASE ...] [--quick] [--json FILE]``.

One generated section is prepared once. `training`: steps per second of the first worker under Ray Train, patches
through Ray Data, against the same steps in one process without Ray with all patches in memory; the share of the time
in which the worker waits for patches; and the rate of a training in the run's own process (`train.workers=auto`), with
as many threads as there are cores, against the same steps with as many.
`reconstruction`: output shards per second and core on Ray's actors against the same worker in a loop in one process,
both writing the same store; the share of the loop's time in the model; and beside it as many such loops at once, which
share the machine's memory and caches as Ray's actors do. The network is used whether or not it is the better model
(`model.tier=T2`): it is the dearer one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch
import yaml
from common import Row, chosen, finish, parser, table

from deepfere.cluster import MEMORY
from deepfere.cores import limited
from deepfere.model.detail import DetailModel
from deepfere.phantom import PhantomSpec, write_phantom
from deepfere.pipeline import deep, write
from deepfere.pipeline.study import run_stage
from deepfere.tiling.dataset import LoadPatches
from deepfere.tiling.patches import draw, plane_shape
from deepfere.training.loop import JointModel, on_device, train_step

SIDE_PX, QUICK_PX = 256, 64
FACTOR = 8
STEPS, QUICK_STEPS = 300, 24
ROUNDS = 10
IONS = {"class": 8, "nuclear": 8, "mixed": 6, "smooth": 4, "hotspot": 4, "twin": 4, "matrix": 6}


def _silent(stage: str, share: float) -> None:
    pass


def prepared(folder: Path, quick: bool) -> tuple[Path, Path, list[str]]:
    """A study of one section, tiled: its manifest, its work folder, its settings."""
    side = QUICK_PX if quick else SIDE_PX
    spec = PhantomSpec(
        seed=5, shape_px=(side, side), pitch_um=50.0, factor=FACTOR, slide_mpp_um=2.0, ions_per_kind=IONS
    )
    phantom = write_phantom(folder / "section", spec)
    section = {"name": "one", "msi": str(phantom.imzml), "slide": str(phantom.slide)}
    section["alignment"] = str(phantom.truth / "alignment.json")
    manifest = folder / "study.yaml"
    manifest.write_text(yaml.safe_dump({"sections": [section]}))
    steps = QUICK_STEPS if quick else STEPS
    settings = ["tracking.uri=none", "model.tier=T2", f"train.steps={steps}", f"train.report_every={steps}"]
    settings += ["train.workers=1", "model.null_guides=4", "reconstruct.shard_px=512", "reconstruct.chunk_px=128"]
    run_stage("tile", manifest, folder / "work", overrides=settings, factor=FACTOR, progress=_silent)
    return manifest, folder / "work", settings


def training(manifest: Path, work: Path, settings: list[str], rows: list[Row]) -> None:
    """Train by the pipeline with one worker of Ray Train's; time the same steps without it as well."""
    train = deep.train_joint
    found: dict[str, float] = {}

    def both(**job: Any) -> Any:
        with limited(1):  # as in a worker of Ray Train's
            before = plain_steps_per_s(**job)
            trained = train(**job)
            found.update(trained.timing)
            # Machines get slower and faster meanwhile.
            found["plain"], found["before"] = (before + plain_steps_per_s(**job)) / 2, before
        if not job["train"].use_gpu:
            alone = train(**{**job, "name": f"{job['name']}-alone", "alone": True}).timing
            found["alone"] = alone["steps_per_s"] / plain_steps_per_s(**job)
        return trained

    with mock.patch.object(deep, "train_joint", both):
        run_stage("train", manifest, work, overrides=settings, factor=FACTOR, progress=_silent)
    rate = found["steps_per_s"] / found["plain"]
    rows += [
        Row.of("training: rate on Ray / in one process, patches in memory", rate, must=">= 0.9"),
        Row.of("training: share of the time that waits for patches", found["input_wait"], must="<= 0.05"),
        Row.of("training: steps per second, in one process, before and after", found["plain"]),
        Row.of("training: the same, before alone", found["before"]),
    ]
    if "alone" in found:
        what = "training: rate in the run's own process / of the same steps, patches in memory"
        rows.append(Row.of(what, found["alone"], must=">= 0.9"))


def plain_steps_per_s(*, settings: Any, sections: Any, sources: Any, train: Any, **_: Any) -> float:
    """The same steps on the same patches, loaded before, without Ray; from the second step on."""
    patches = [(s, p) for s, source in enumerate(sources) for p in range(len(source.cells))]
    steps = min(settings.steps, 100)
    drawn = draw(patches, steps, settings.batch, settings.seed)
    load = LoadPatches([asdict(s) for s in sources], settings.patch_px, plane_shape(sources, settings.patch_px))
    batches = []
    for step in range(steps):
        part = slice(step * settings.batch, (step + 1) * settings.batch)
        columns = {name: values[part] for name, values in drawn.items()}
        batches.append({name: torch.from_numpy(value) for name, value in load(columns).items()})
    device = "cuda" if train.use_gpu else "cpu"
    model = JointModel(settings, sections).to(device)
    optimiser = model.optimiser()
    train_step(model, optimiser, [on_device(batches[0], device)], 0, settings)
    began = time.perf_counter()
    for step in range(1, steps):
        losses = train_step(model, optimiser, [on_device(batches[step], device)], step, settings)
    float(losses["total"])  # a GPU is waited for
    return (steps - 1) / (time.perf_counter() - began)


@contextmanager
def time_in_model() -> Iterator[list[float]]:
    """The seconds of every window that a model computes in this process meanwhile, colours included."""
    seconds: list[float] = []
    window = DetailModel.with_stain

    def timed(self: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return window(self, *arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    with mock.patch.object(DetailModel, "with_stain", timed):
        yield seconds


def _share(part: tuple[Any, tuple[Any, ...], list[dict[str, Any]], float]) -> float:
    """Seconds that one of several processes takes for its rows, from the moment at which all begin."""
    worker, arguments, rows, at = part
    torch.set_num_threads(1)
    loop = worker(*arguments)
    time.sleep(max(0.0, at - time.time()))
    began = time.perf_counter()
    for row in rows:
        loop.carry_out([row])
    return time.perf_counter() - began


def side_by_side_s(worker: Any, arguments: tuple[Any, ...], rows: list[dict[str, Any]], processes: int) -> float:
    """Seconds of as many loops as there are cores, each with its part of the rows, without Ray.

    They share the machine's memory and caches, which one loop has to itself: what Ray can reach at most.
    """
    begin = time.time() + 15  # Python and torch are imported by then
    parts = [(worker, arguments, rows[n::processes], begin) for n in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as started:
        return max(started.map(_share, parts, chunksize=1))


def reconstruction(manifest: Path, work: Path, settings: list[str], rows: list[Row]) -> None:
    """Reconstruct by the pipeline; when it hands its shards to Ray, carry them out in a loop as well."""
    rounds = 1 if f"train.steps={QUICK_STEPS}" in settings else ROUNDS
    planned = write.shard_phases
    found: dict[str, float] = {}

    def both(*about: Any) -> Any:
        for phase in planned(*about):
            todo, arguments = list(phase.rows), phase.arguments
            # A job of a minute or more: the section's shards are made over and over.
            many = [{**row, "unit": f"{row['unit']} {k}"} for k in range(rounds) for row in todo]
            apart = (*arguments[:3], str(work / "benchmark-journal"), *arguments[4:])
            loop = phase.worker(*apart)
            with time_in_model() as model_s:
                began = time.perf_counter()
                for row in many:
                    loop.carry_out([row])
                found["plain_s"] = time.perf_counter() - began
            found["model_s"] = sum(model_s)
            found["cores"] = ray.cluster_resources()["CPU"]
            found["shards"] = len(many)
            found["beside_s"] = side_by_side_s(phase.worker, apart, many, int(found["cores"]))
            few = todo[:2]
            yield replace(phase, arguments=apart, rows=few, count=len(few))  # actors started, modules imported
            began = time.perf_counter()
            yield replace(phase, arguments=apart, rows=many, count=len(many))
            found["ray_s"] = time.perf_counter() - began
            yield replace(phase, rows=todo)

    with mock.patch.object(write, "shard_phases", both):
        run_stage("reconstruct", manifest, work, overrides=settings, factor=FACTOR, progress=_silent)
    rate = found["plain_s"] / found["ray_s"] / found["cores"]
    ceiling = found["plain_s"] / found["beside_s"] / found["cores"]
    rows += [
        Row.of("reconstruction: rate per core on Ray / of one process", rate, must=">= 0.85"),
        Row.of("reconstruction: of as many processes at once, without Ray / of one", ceiling),
        Row.of("reconstruction: on Ray / of as many processes at once, without Ray", rate / ceiling),
        Row.of("reconstruction: seconds in one process", found["plain_s"]),
        Row.of("reconstruction: share of that in the model", found["model_s"] / found["plain_s"]),
        Row.of("reconstruction: shards", found["shards"]),
        Row.of("reconstruction: cores", found["cores"]),
    ]


CASES = {"training": training, "reconstruction": reconstruction}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    given = parser(__doc__.splitlines()[0], list(CASES)).parse_args(arguments)
    if any(name not in os.environ for name in MEMORY):
        # As the workers have it; it counts when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deepfere-distributed-") as scratch:
        manifest, work, settings = prepared(Path(scratch), given.quick)
        for name in chosen(given, dict.fromkeys(CASES), "training"):
            CASES[name](manifest, work, settings, rows)
    print(table("figures", ["what", "value"], [[row.what, f"{row.value:.4g}"] for row in rows if not row.must]))
    if given.quick:
        rows = [Row(**{**vars(row), "must": ""}) for row in rows]
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
