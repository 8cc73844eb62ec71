"""How fast a pyramid is built: ``python benchmarks/pyramid.py [CASE ...] [--quick] [--json FILE]``.

Cases: ``detail`` (16 half-precision planes) and ``stain`` (three bytes a pixel), each made once with structure that
compresses like tissue. deepfere and ome-zarr-py read the same level 0 from disk and write levels 1 and up by means over
2 x 2 pixels, with the same chunks, shards and codec, on one thread, each in a process of its own. ome-zarr-py also
writes a level 0 of its own, which its writer cannot leave out: what that costs beyond reading, measured by itself, is
taken off. Starting Python and importing count on neither side. ome-zarr-py runs as it comes, with zarr's own codecs;
beside it with zarrs, which deepfere reads with.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, chosen, finish, measured, parser, table

CHUNK_PX, SHARD_PX = 256, 1024
LEVELS = 5
ROUNDS = 3
SIDES_PX = {"detail": 6144, "stain": 16384}
QUICK_PX = {"detail": 1024, "stain": 2048}
CHANNELS = {"detail": 16, "stain": 3}
DTYPES = {"detail": "float16", "stain": "uint8"}


def make(folder: Path, name: str, side_px: int) -> Path:
    """A group with level 0 filled and levels 1 and up created empty."""
    from deepfere.store import create_array, open_group

    path = folder / f"{name}.zarr"
    group = open_group(path, "w").create_group("image")
    channels = CHANNELS[name]
    for level in range(LEVELS):
        side = -(-side_px // 2**level)
        shard = min(SHARD_PX, -(-side // CHUNK_PX) * CHUNK_PX)
        create_array(
            group, str(level), (channels, side, side), DTYPES[name], (channels, CHUNK_PX, CHUNK_PX),
            (channels, shard, shard), dimension_names=("c", "y", "x"),
        )  # fmt: skip
    rng = np.random.default_rng(0)
    array: Any = group["0"]
    for top in range(0, side_px, SHARD_PX):
        for left in range(0, side_px, SHARD_PX):
            height, width = min(SHARD_PX, side_px - top), min(SHARD_PX, side_px - left)
            # Blocks of 8 pixels with a little noise: neither constant nor incompressible.
            coarse = rng.standard_normal((channels, -(-height // 8), -(-width // 8))).repeat(8, 1).repeat(8, 2)
            block = coarse[:, :height, :width] + 0.05 * rng.standard_normal((channels, height, width))
            if DTYPES[name] == "uint8":
                block = np.clip(180 + 25 * block, 0, 255)
            array[:, top : top + height, left : left + width] = block.astype(DTYPES[name])
    return path


def ours(path: str) -> None:
    """Levels 1 and up, by the worker that a result's pyramid is built with."""
    from deepfere.reconstruction.pyramid import PyramidWorker, pyramid_rows
    from deepfere.store import open_group

    image: Any = open_group(path)["image"]
    worker = PyramidWorker(path, str(Path(path).with_suffix(".journal")), "benchmark")
    for level in range(1, LEVELS):
        array = image[str(level)]
        counts = -(-array.shape[1] // array.shards[1]), -(-array.shape[2] // array.shards[2])
        for row in pyramid_rows(level, {"image": counts}):
            worker.carry_out([row])


def peer(path: str, out: str, levels: int) -> None:
    """The same levels with ome-zarr-py, nothing of deepfere in the process; 1 level is level 0 alone."""
    import dask
    import dask.array
    import zarr
    from ome_zarr.scale import Methods
    from ome_zarr.writer import write_image
    from zarr.codecs import ZstdCodec

    shutil.rmtree(out, ignore_errors=True)
    source: Any = zarr.open_group(path, mode="r")["image"]
    image = dask.array.from_zarr(source["0"], chunks=source["0"].shards)
    options = [
        {"chunks": source[str(k)].chunks, "shards": source[str(k)].shards, "compressors": [ZstdCodec(level=1)]}
        for k in range(levels)
    ]
    with dask.config.set(scheduler="synchronous"):
        write_image(
            image, out, scale_factors=[2**k for k in range(1, levels)], method=Methods.LOCAL_MEAN, axes="cyx",
            storage_options=options,
        )  # fmt: skip


def read(path: str) -> None:
    """Level 0, a shard at a time, with zarr's own codecs."""
    import zarr

    array: Any = zarr.open_group(path, mode="r")["image"]["0"]
    _, height, width = array.shards
    for top in range(0, array.shape[1], height):
        for left in range(0, array.shape[2], width):
            array[:, top : top + height, left : left + width]


def compare(path: Path, other: Path) -> float:
    """Largest difference between the two pyramids away from the last row and column, which peers weigh otherwise."""
    from deepfere.store import open_group

    a: Any = open_group(path)["image"]
    b: Any = open_group(other)
    names = sorted(b.array_keys())
    worst = 0.0
    for level in range(1, LEVELS):
        mine, theirs = a[str(level)][...].astype(np.float64), b[names[level]][...].astype(np.float64)
        side = min(mine.shape[1], theirs.shape[1]) - 1
        worst = max(worst, float(np.abs(mine[:, :side, :side] - theirs[:, :side, :side]).max()))
    return worst


def _children_s() -> float:
    """Processor seconds of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def case(name: str, quick: bool, folder: Path) -> list[Row]:
    """One array: seconds and memory of both programs."""
    side = (QUICK_PX if quick else SIDES_PX)[name]
    path = make(folder, name, side)
    run = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    arms = {
        "start": ["nothing"],
        "mine": ["ours", str(path)],
        "own": ["peer", str(path), str(folder / f"{name}-0.zarr"), "1"],
        "all": ["peer", str(path), str(folder / f"{name}-all.zarr"), str(LEVELS)],
        "read": ["read", str(path)],
        "own in Rust": ["peer", str(path), str(folder / f"{name}-0.zarr"), "1", "zarrs"],
        "all in Rust": ["peer", str(path), str(folder / f"{name}-rust.zarr"), str(LEVELS), "zarrs"],
        "read in Rust": ["read", str(path), "zarrs"],
    }
    spent = {arm: np.full(2, np.inf) for arm in arms}
    peak = dict.fromkeys(arms, 0)
    for _ in range(1 if quick else ROUNDS):
        for arm, words in arms.items():
            before = _children_s()
            wall_s, peak_b, _ = measured([*run, *words])
            spent[arm] = np.minimum(spent[arm], [wall_s, _children_s() - before])
            peak[arm] = max(peak[arm], peak_b)
    # What a process needs to start is no part of a pyramid; reading level 0 is.
    start, mine_b, all_b = spent["start"], peak["mine"], peak["all"]
    mine = spent["mine"] - start
    theirs, rust = (spent[f"all{how}"] - spent[f"own{how}"] + spent[f"read{how}"] - start for how in ("", " in Rust"))
    apart = compare(path, folder / f"{name}-all.zarr")
    shown = {
        "deepfere": (mine, mine_b),
        "ome-zarr-py": (theirs, all_b),
        "ome-zarr-py with zarrs": (rust, peak["all in Rust"]),
        "ome-zarr-py, level 0 alone": (spent["own"] - start, peak["own"]),
        "reading level 0": (spent["read"] - start, peak["read"]),
    }
    cells = [[who, f"{s[0]:.1f}", f"{s[1]:.1f}", f"{b / 2**20:.0f}"] for who, (s, b) in shown.items()]
    head = ["", "seconds", "of processor", "peak PSS MiB"]
    print("\n" + table(f"{name}: {CHANNELS[name]} x {side} x {side}, best of rounds", head, cells))
    # ome-zarr-py cuts bytes off at every level where deepfere rounds.
    tolerance = float(LEVELS - 1) if DTYPES[name] == "uint8" else 0.01
    return [
        Row.of(f"{name}: times faster than ome-zarr-py", theirs[0] / mine[0], must="" if quick else ">= 2"),
        Row.of(f"{name}: times faster than ome-zarr-py, processor time", theirs[1] / mine[1]),
        Row.of(f"{name}: times faster than ome-zarr-py with zarrs", rust[0] / mine[0]),
        Row.of(f"{name}: peak PSS, MiB", mine_b / 2**20, "ome-zarr-py", all_b / 2**20, "" if quick else "<= baseline"),
        Row.of(f"{name}: largest difference of the two pyramids", apart, must=f"<= {tolerance}"),
    ]


def worker(arguments: list[str]) -> None:
    """What the measured processes run."""
    import torch
    from threadpoolctl import threadpool_limits

    if arguments[0] != "peer":  # whose imports are in both of its arms
        import deepfere.reconstruction.pyramid  # noqa: F401
    import zarr

    codecs = "zarrs.ZarrsCodecPipeline" if arguments[-1] == "zarrs" else "zarr.core.codec_pipeline.BatchedCodecPipeline"
    if arguments[0] != "ours":
        zarr.config.set({"codec_pipeline.path": codecs, "threading.max_workers": 1})
    torch.set_num_threads(1)
    with threadpool_limits(1):
        if arguments[0] == "ours":
            os.environ["OMP_NUM_THREADS"] = "1"  # as in a worker of the pool
            ours(arguments[1])
        elif arguments[0] == "peer":
            peer(arguments[1], arguments[2], int(arguments[3]))
        elif arguments[0] == "read":
            read(arguments[1])


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    given = parser(__doc__.splitlines()[0], list(SIDES_PX)).parse_args(arguments)
    rows: list[Row] = []
    for name in chosen(given, dict.fromkeys(SIDES_PX), "stain"):
        with tempfile.TemporaryDirectory(prefix="deepfere-pyramid-") as scratch:
            rows += case(name, given.quick, Path(scratch))
    return finish(rows, given.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        sys.exit(main())
