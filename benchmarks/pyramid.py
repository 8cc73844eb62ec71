"""How fast a pyramid is built: ``python benchmarks/pyramid.py [CASE ...] [--quick | --write-docs] [--json FILE]``.

Cases: ``detail`` (16 half-precision planes) and ``stain`` (three bytes a pixel), each made once with structure that
compresses like tissue. deepfere and ome-zarr-py read the same level 0 from disk and write levels 1 and up by means over
2 x 2 pixels, with the same chunks, shards and codec, on one thread, each in a process of its own. ome-zarr-py also
writes a level 0 of its own, which its writer cannot leave out: what that costs beyond reading, measured by itself, is
taken off. Starting Python and importing count on neither side. ome-zarr-py runs as it comes, with zarr's own codecs;
beside it with zarrs, which deepfere reads with. All arms take turns in every round; a ratio is the median over rounds
of the ratio within each, seconds are medians.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, chosen, finish, markdown, measured, parser, table
from numpy.typing import NDArray
from performance import Section, versions

CHUNK_PX, SHARD_PX = 256, 1024
LEVELS = 5
ROUNDS = 5
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


def ours(path: str) -> Callable[[], None]:
    """Levels 1 and up, by the worker that a result's pyramid is built with."""
    from deepfere.reconstruction.pyramid import PyramidWorker, pyramid_rows
    from deepfere.store import open_group

    def build() -> None:
        image: Any = open_group(path)["image"]
        worker = PyramidWorker(path, str(Path(path).with_suffix(".journal")), "benchmark")
        for level in range(1, LEVELS):
            array = image[str(level)]
            counts = -(-array.shape[1] // array.shards[1]), -(-array.shape[2] // array.shards[2])
            for row in pyramid_rows(level, {"image": counts}):
                worker.carry_out([row])

    return build


def peer(path: str, out: str, levels: int) -> Callable[[], None]:
    """The same levels with ome-zarr-py, nothing of deepfere in the process; 1 level is level 0 alone."""
    import dask
    import dask.array
    import zarr
    from ome_zarr.scale import Methods
    from ome_zarr.writer import write_image
    from zarr.codecs import ZstdCodec

    def build() -> None:
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

    shutil.rmtree(out, ignore_errors=True)
    return build


def read(path: str) -> Callable[[], None]:
    """Level 0, a shard at a time, with zarr's own codecs or those that are set."""
    import zarr

    def build() -> None:
        array: Any = zarr.open_group(path, mode="r")["image"]["0"]
        _, height, width = array.shards
        for top in range(0, array.shape[1], height):
            for left in range(0, array.shape[2], width):
                array[:, top : top + height, left : left + width]

    return build


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


def one(words: list[str]) -> tuple[list[float], int]:
    """An arm in a process of its own: seconds (wall, processor) of the work in it, and its peak PSS."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", *words]
    _, peak, printed = measured(command)
    found = re.search(r"^RESULT (.*)$", printed, re.MULTILINE)
    if found is None:
        sys.exit(f"{' '.join(command)} printed no result\n{printed[-2000:]}")
    return json.loads(found[1]), peak


def times_faster(spent: dict[str, NDArray[np.float64]], how: str = "") -> NDArray[np.float64]:
    """ome-zarr-py's time over ours within each round, (rounds, 2): wall, processor.

    Args:
        spent: Seconds of each arm, (rounds, 2).
        how: " in Rust" where it runs with zarrs.

    Its time is that of all levels without the level 0 that it writes, and of reading level 0. NaN where noise leaves
    nothing of it.
    """
    theirs = its_own(spent, how)
    return np.where(theirs > 0, theirs, np.nan) / spent["mine"]


def its_own(spent: dict[str, NDArray[np.float64]], how: str = "") -> NDArray[np.float64]:
    """Seconds of ome-zarr-py in each round for what deepfere does, (rounds, 2)."""
    return spent[f"all{how}"] - spent[f"own{how}"] + spent[f"read{how}"]


def case(name: str, quick: bool, folder: Path) -> tuple[list[Row], list[str]]:
    """One array: the rows, and the line of the page."""
    side = (QUICK_PX if quick else SIDES_PX)[name]
    path = make(folder, name, side)
    arms = {
        "mine": ["ours", str(path)],
        "own": ["peer", str(path), str(folder / f"{name}-0.zarr"), "1"],
        "all": ["peer", str(path), str(folder / f"{name}-all.zarr"), str(LEVELS)],
        "read": ["read", str(path)],
        "own in Rust": ["peer", str(path), str(folder / f"{name}-0.zarr"), "1", "zarrs"],
        "all in Rust": ["peer", str(path), str(folder / f"{name}-rust.zarr"), str(LEVELS), "zarrs"],
        "read in Rust": ["read", str(path), "zarrs"],
    }
    rounds = 1 if quick else ROUNDS
    spent, peak = {arm: np.zeros((rounds, 2)) for arm in arms}, dict.fromkeys(arms, 0)
    for k in range(rounds):
        for arm, words in arms.items():
            spent[arm][k], peak_b = one(words)
            peak[arm] = max(peak[arm], peak_b)
    apart = compare(path, folder / f"{name}-all.zarr")
    ratios, rust = times_faster(spent), times_faster(spent, " in Rust")
    (wall, cpu), least, most = np.median(ratios, axis=0), np.min(ratios, axis=0)[0], np.max(ratios, axis=0)[0]
    with_rust = float(np.median(rust, axis=0)[0])
    shown = {
        "deepfere": (spent["mine"], peak["mine"]),
        "ome-zarr-py": (its_own(spent), peak["all"]),
        "ome-zarr-py with zarrs": (its_own(spent, " in Rust"), peak["all in Rust"]),
        "ome-zarr-py, level 0 alone": (spent["own"], peak["own"]),
        "reading level 0": (spent["read"], peak["read"]),
    }
    medians = {who: np.median(s, axis=0) for who, (s, _) in shown.items()}
    seconds = {who: [f"{s:.1f}" if s > 0 else "lost in noise" for s in both] for who, both in medians.items()}
    cells = [[who, *seconds[who], f"{b / 2**20:.0f}"] for who, (_, b) in shown.items()]
    head = ["", "seconds", "of processor", "peak PSS MiB"]
    what = f"{CHANNELS[name]} x {side} x {side} {DTYPES[name]}"
    print("\n" + table(f"{name}: {what}, medians of rounds", head, cells))
    print(f"times faster than ome-zarr-py: {wall:.2f} ({least:.2f} to {most:.2f} in {rounds} rounds)")
    line = [f"{name}, {what}", *(seconds[who][0] for who in list(shown)[:3]), f"{wall:.2f}"]
    line += [f"{least:.2f} to {most:.2f}", f"{cpu:.2f}", f"{with_rust:.2f}"]
    line.append(f"{peak['mine'] / 2**20:.0f} / {peak['all'] / 2**20:.0f}")
    # ome-zarr-py cuts bytes off at every level where deepfere rounds.
    tolerance = float(LEVELS - 1) if DTYPES[name] == "uint8" else 0.01
    memory = peak["mine"] / 2**20, "ome-zarr-py", peak["all"] / 2**20
    return [
        Row.of(f"{name}: times faster than ome-zarr-py", wall, must="" if quick else ">= 2"),
        Row.of(f"{name}: times faster than ome-zarr-py, least of the rounds", least),
        Row.of(f"{name}: times faster than ome-zarr-py, most of the rounds", most),
        Row.of(f"{name}: times faster than ome-zarr-py, processor time", cpu),
        Row.of(f"{name}: times faster than ome-zarr-py with zarrs", with_rust),
        Row.of(f"{name}: peak PSS, MiB", *memory, "" if quick else "<= baseline"),
        Row.of(f"{name}: largest difference of the two pyramids", apart, must=f"<= {tolerance}"),
    ], line


def worker(arguments: list[str]) -> None:
    """What the measured processes run: prints the seconds of the work itself, wall and processor."""
    import torch
    import zarr
    from threadpoolctl import threadpool_limits

    os.environ["OMP_NUM_THREADS"] = "1"  # as in a worker of the pool
    codecs = "zarrs.ZarrsCodecPipeline" if arguments[-1] == "zarrs" else "zarr.core.codec_pipeline.BatchedCodecPipeline"
    if arguments[0] != "ours":
        zarr.config.set({"codec_pipeline.path": codecs, "threading.max_workers": 1})
    torch.set_num_threads(1)
    with threadpool_limits(1):
        if arguments[0] == "ours":
            work = ours(arguments[1])
        elif arguments[0] == "peer":
            work = peer(arguments[1], arguments[2], int(arguments[3]))
        else:
            work = read(arguments[1])
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        print("RESULT " + json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))


HEAD = [
    "array", "deepfere s", "ome-zarr-py s", "with zarrs s", "times faster (must 2)", "rounds", "by processor time",
    "than with zarrs", "peak PSS MiB, ours / theirs",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    words = sys.argv[1:] if arguments is None else arguments
    given = parser(__doc__.splitlines()[0], list(SIDES_PX), page=True).parse_args(words)
    names = chosen(given, dict.fromkeys(SIDES_PX), "stain")
    section = Section.begin("pyramid", words, versions(["ome-zarr", "zarr", "zarrs", "dask"]))
    rows, lines = [], []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="deepfere-pyramid-") as scratch:
            more, line = case(name, given.quick, Path(scratch))
            rows += more
            lines.append(line)
    if given.write_docs:
        told = (
            f"Medians of {ROUNDS} rounds; *times faster* is the median of the ratios within each, beside their range."
        )
        section.write(told, markdown(HEAD, lines))
    return finish(rows, given.json, section.facts())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        sys.exit(main())
