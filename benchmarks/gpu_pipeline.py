"""What a GPU brings the pipeline: ``python benchmarks/gpu_pipeline.py [CASE ...] [--quick] [--json FILE]``.

`training`: as in ``distributed.py``, the same steps under Ray Train and in one process, both on the GPU; and on a CPU
in one process. `reconstruction`: output pixels per second of the pipeline's own workers on invented planes and
factors, as many as there are cores without a GPU, then sharing one GPU by different numbers; and how much of one
worker's time is the model. Both write the same store. Without a GPU all runs on the CPU, which shows that it runs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import numpy as np
import ray
import torch
from common import Row, chosen, finish, parser
from safetensors.torch import save_file

from deepfere.cluster import connect
from deepfere.config import RaySettings, load_config
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.features import FEATURES, PLANES, StainReference
from deepfere.model.guide import GuideSpec
from deepfere.model.network import FusionNetwork
from deepfere.model.stain_types import MOST_TYPES, StainTypes
from deepfere.pipeline import write
from deepfere.places import place
from deepfere.reconstruction.shards import DetailWorker, SectionModel
from deepfere.rows import Phase, Phases
from deepfere.rows import Row as Work
from deepfere.schedule import run_jobs
from deepfere.store import open_group, shard_object
from deepfere.tiling.cache import CacheSpec, create_cache
from deepfere.tiling.plan import SHARD_PX, PlaneGrid, ShardGrid

CELLS, QUICK_CELLS = 1024, 128
SIDE_PX = 128
"""Measured pixels a side of the section that is trained on: what takes the time is done before."""
FACTOR, FACTORS, PRODUCTS = 8, 16, 12
PITCH_UM, SPACING_UM = 50.0, 3.0
SHARING, QUICK_SHARING = (1, 2, 4, 8), (2,)


def invented(folder: Path, side: int) -> tuple[SectionModel, ShardGrid]:
    """A section of ``side`` measured pixels: its planes on disk, smooth factors, a network that nothing was taught."""
    rng = np.random.default_rng(0)
    grid = SectionGrid((side, side), (PITCH_UM, PITCH_UM))
    most = int(side * PITCH_UM / SPACING_UM) + 1
    planes = PlaneGrid((1.0, 1.0), int(SPACING_UM), (most, most))
    reference: Any = StainReference((240.0, 240.0, 240.0), 0.1, 0.4)
    nothing: Any = None
    create_cache(CacheSpec(str(folder / "planes"), "", "invented", (1.0, 1.0), planes, reference, nothing, nothing))
    array: Any = open_group(str(folder / "planes"), "r+")["planes"]
    coarse = rng.normal(140, 40, (len(PLANES), SHARD_PX // 4, SHARD_PX // 4)).clip(0, 255)
    block = coarse.repeat(4, 1).repeat(4, 2) + rng.normal(0, 6, (len(PLANES), SHARD_PX, SHARD_PX))
    block = block.clip(0, 255).astype(np.uint8)
    block[-1] = 255

    array[:, :SHARD_PX, :SHARD_PX] = block
    first = Path(str(shard_object(str(folder / "planes"), "planes", 0, 0)))
    for row, col in np.ndindex(*planes.shards):
        # All shards are the same block: what is decoded is a whole one, also at the edge.
        copy = Path(str(shard_object(str(folder / "planes"), "planes", row, col)))
        if copy != first:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(first, copy)
    types = StainTypes(rng.normal(0, 1, (MOST_TYPES, len(FEATURES))), rng.normal(0, 1, MOST_TYPES))
    spec = GuideSpec(grid, FACTOR, planes.spacing_um, planes.shape_px, reference.white, 0.3, types)
    torch.manual_seed(0)
    network = FusionNetwork(len(FEATURES), FACTORS)
    save_file(network.state_dict(), folder / "network.safetensors")
    factors = rng.normal(size=(FACTORS, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
    regressors = spec.count + PRODUCTS + network.regressors
    np.savez(
        folder / "arrays.npz",
        factors=factors,
        mask=np.ones((side, side), bool),
        weights=0.1 * rng.normal(size=(regressors, FACTORS)),
        gate=np.ones(FACTORS),
        centre=np.full(3, 0.3),
    )
    alignment = Alignment(np.eye(2), np.zeros(2)).to_dict()
    paths = (str(folder / name) for name in ("arrays.npz", "planes"))
    section = SectionModel(spec.to_dict(), alignment, *paths, network.settings, str(folder / "network.safetensors"))
    return section, ShardGrid.plan(grid, FACTOR, 256, 1024)


def rate(folder: Path, section: SectionModel, shards: ShardGrid, device: str, per_gpu: int | None) -> float:
    """Output Mpx/s of the pool's workers, from when they are warm."""
    out = folder / f"out-{device}-{per_gpu}"
    config = load_config(None, ["tracking.uri=none"])
    write._create(place(out), shards, [shards.shape_px], FACTORS, config, "benchmark")
    arguments = (section, str(out), shards, str(folder / f"journal-{device}-{per_gpu}"), "", [1.0] * FACTORS, device)
    rows: list[Work] = [{"unit": f"{r}/{c}", "row": r, "col": c} for r, c in np.ndindex(*shards.shards)]
    few = rows[: int(2 * ray.cluster_resources()["CPU"])]
    took: list[float] = []

    def phases() -> Phases:
        yield Phase("warming up", DetailWorker, arguments, few, len(few))
        began = time.perf_counter()
        yield Phase("reconstructing", DetailWorker, arguments, rows, len(rows))
        took.append(time.perf_counter() - began)

    run_jobs([("one", phases())], title="benchmark", per_gpu=per_gpu)
    return np.prod(shards.shape_px) / took[0] / 1e6


def alone(folder: Path, section: SectionModel, shards: ShardGrid, device: str) -> tuple[float, float]:
    """Output Mpx/s of one worker in this process, and the share of its time in the model."""
    out = folder / f"alone-{device}"
    config = load_config(None, ["tracking.uri=none"])
    write._create(place(out), shards, [shards.shape_px], FACTORS, config, "benchmark")
    worker = DetailWorker(section, str(out), shards, str(folder / "journal-alone"), "", [1.0] * FACTORS, device)

    rows = [{"unit": str(n), "row": r, "col": c} for n, (r, c) in enumerate(np.ndindex(*shards.shards))][:4]
    worker.work(rows[0])
    with distributed.time_in_model() as model_s:
        began = time.perf_counter()
        for row in rows:
            worker.work(row)
        took = time.perf_counter() - began
    return len(rows) * shards.shard_px**2 / took / 1e6, sum(model_s) / took


def reconstruction(scratch: Path, quick: bool, gpu: bool, rows: list[Row]) -> None:
    """See the module."""
    section, shards = invented(scratch, QUICK_CELLS if quick else CELLS)
    for device in ["cpu"] + ["cuda"] * gpu:
        one, share = alone(scratch, section, shards, device)
        rows.append(Row.of(f"reconstruction: Mpx/s of one worker alone, {device}", one))
        rows.append(Row.of(f"reconstruction: share of its time in the model, {device}", share))
    connect(RaySettings())
    cores = int(ray.cluster_resources()["CPU"])
    plain = rate(scratch, section, shards, "cpu", None)
    rows.append(Row.of(f"reconstruction: Mpx/s on {cores} cores", plain))
    for per_gpu in (QUICK_SHARING if quick else SHARING) if gpu else ():
        shared = rate(scratch, section, shards, "cuda", per_gpu)
        rows.append(Row.of(f"reconstruction: Mpx/s of {per_gpu} workers that share a GPU", shared))
        rows.append(Row.of(f"reconstruction: {per_gpu} workers that share a GPU / {cores} cores", shared / plain))


def training(scratch: Path, quick: bool, gpu: bool, rows: list[Row]) -> None:
    """See the module."""
    with mock.patch.object(distributed, "SIDE_PX", SIDE_PX):
        manifest, work, settings = distributed.prepared(scratch, quick)
    found: list[float] = []
    plain = distributed.plain_steps_per_s

    def both(**job: Any) -> float:
        found.append(plain(**{**job, "train": job["train"].model_copy(update={"use_gpu": False})}))
        return plain(**job)

    with mock.patch.object(distributed, "plain_steps_per_s", both):
        distributed.training(manifest, work, [*settings, f"train.use_gpu={str(gpu).lower()}"], rows)
    rows.append(Row.of("training: steps per second, in one process on a CPU core", found[0]))


class Told(list[Row]):
    """Rows that are printed as they come."""

    def append(self, row: Row) -> None:
        """See `list`."""
        super().append(row)
        print(f"{row.what}: {row.value:.4g}", flush=True)

    def __iadd__(self, rows: Any) -> Told:
        for row in rows:
            self.append(row)
        return self


CASES = {"training": training, "reconstruction": reconstruction}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases."""
    given = parser(__doc__.splitlines()[0], list(CASES)).parse_args(arguments)
    gpu, rows = torch.cuda.is_available(), Told()
    for name in chosen(given, dict.fromkeys(CASES), "training"):
        with tempfile.TemporaryDirectory(prefix="deepfere-gpu-") as scratch:
            CASES[name](Path(scratch), given.quick, gpu, rows)
    print(torch.cuda.get_device_name() if gpu else "no GPU: a CPU did all of it")
    return finish([replace(row, must="") for row in rows], given.json)


if __name__ == "__main__":
    sys.exit(main())
