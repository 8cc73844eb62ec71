"""One arm of the tiling benchmark in a process of its own; prints one line of JSON.

    python benchmarks/tiling_arm.py {ours|ours-pool|ours-ray|ours-map|ours-rows|ratiopath|openslide|tiffslide} SLIDE ...

Every arm ends in the same checksum of the same tiles, taken where the tile was read. It runs with what it needs alone:
`ratiopath` and `tiffslide` in an environment of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from itertools import islice
from typing import Any

import numpy as np

MASK = (1 << 64) - 1
KEPT = 32


def checksum(tiles: Any, rows: Any, cols: Any) -> int:
    """A sum over tiles (n, side, side, 3) that depends on where each lies, not on their order."""
    total = 0
    for tile, row, col in zip(tiles, rows, cols, strict=True):
        words = np.ascontiguousarray(tile).reshape(-1).view(np.uint64)
        total += int(np.add.reduce(words)) * (1 + 31 * int(row) + 17 * int(col))
    return total & MASK


class Reading:
    """A plan of all tiles, its groups and one buffer, in the process that decodes."""

    def __init__(self, path: str, side: int, mpp: float) -> None:
        from deepfere.readers.slide import open_slide
        from deepfere.tiling.groups import TileReader, group_tiles
        from deepfere.tiling.tiles import TileSpec, plan_tiles

        self.slide = open_slide(path)
        self.plan = plan_tiles(self.slide, TileSpec(side, mpp))
        self.groups, self.reader = group_tiles(self.plan), TileReader(self.plan, self.slide)
        self.out = np.empty((max(len(g.tiles) for g in self.groups), side, side, 3), np.uint8)

    def pixels(self, number: int) -> Any:
        """Tiles of a group, until the next is read."""
        group = self.groups[number]
        return self.reader.read(group, self.out[: len(group.tiles)])[0]

    def sum(self, number: int) -> int:
        """Checksum of a group's tiles."""
        return checksum(self.pixels(number), *self.plan.corner_px[self.groups[number].tiles].T)


def ours(path: str, side: int, mpp: float, seconds: float) -> dict[str, Any]:
    """Plain, in this process; again and again until ``seconds`` have passed."""
    began, rounds, total = time.perf_counter(), 0, 0
    reading = Reading(path, side, mpp)
    started = time.perf_counter()
    while not rounds or time.perf_counter() - began < seconds:
        total = sum(map(reading.sum, range(len(reading.groups))))
        rounds += 1
    took = (time.perf_counter() - started) / rounds
    return {"seconds": took, "tiles": len(reading.plan), "checksum": total & MASK, "backend": reading.slide.backend}


_HERE: dict[str, Reading] = {}  # of a process of the pool


def _open(path: str, side: int, mpp: float, ready: Any) -> None:
    _HERE["reading"] = Reading(path, side, mpp)
    _sum(0)
    ready.wait()


def _sum(number: int) -> int:
    return _HERE["reading"].sum(number)


def ours_pool(path: str, side: int, mpp: float, seconds: float, workers: int) -> dict[str, Any]:
    """The same groups by plain processes, one at a time to whichever is free; until ``seconds`` have passed."""
    reading, rounds, total = Reading(path, side, mpp), 0, 0
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers + 1)
    with context.Pool(workers, _open, (path, side, mpp, ready)) as pool:
        ready.wait()
        started = time.perf_counter()
        while not rounds or time.perf_counter() - started < seconds:
            total = sum(pool.imap_unordered(_sum, range(len(reading.groups))))
            rounds += 1
        took = (time.perf_counter() - started) / rounds
    return {"seconds": took, "tiles": len(reading.plan), "checksum": total & MASK}


def ours_ray(path: str, side: int, mpp: float, repeat: int, apart: bool = False) -> dict[str, Any]:
    """As a Ray Data job: the function in the task that reads, or (``apart``) as a map of blocks."""
    import ray

    from deepfere.cluster import connect
    from deepfere.config import RaySettings
    from deepfere.readers.slide import open_slide
    from deepfere.tiling.tile_source import tile_dataset
    from deepfere.tiling.tiles import TileSpec, plan_tiles

    def sums(batch: dict[str, Any]) -> dict[str, Any]:
        total = checksum(batch["pixels"], batch["row_px"], batch["col_px"])
        return {"sum": np.array([total], np.uint64), "n": [len(batch["row_px"])]}

    def job(times: int) -> tuple[float, list[Any]]:
        started = time.perf_counter()
        plan = plan_tiles(open_slide(path), TileSpec(side, mpp))
        if apart:
            rows = tile_dataset([plan] * times).map_batches(sums, batch_size=None).take_all()
        else:
            rows = tile_dataset([plan] * times, apply=sums).take_all()
        return time.perf_counter() - started, rows

    connect(RaySettings(num_cpus=1))
    ray.data.DataContext.get_current().enable_progress_bars = False
    job(1)  # workers started, modules imported
    took, rows = job(repeat)
    total = sum(int(row["sum"]) for row in rows)
    return {"seconds": took, "tiles": sum(row["n"] for row in rows), "checksum": total & MASK}


def ours_rows(path: str, side: int, mpp: float, repeat: int) -> dict[str, Any]:
    """On the pool of Ray's actors that `deepfere fuse` and `deepfere tile` decode slides with."""
    from deepfere.cluster import connect
    from deepfere.config import RaySettings
    from deepfere.rows import Phase, RowWorker
    from deepfere.schedule import pool, run_phase

    class Sums(RowWorker):
        def __init__(self) -> None:
            self.reading = Reading(path, side, mpp)

        def work(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"sum": self.reading.sum(row["group"]), "n": len(self.reading.groups[row["group"]].tiles)}

    found: list[dict[str, Any]] = []

    def job(times: int) -> float:
        found.clear()
        started = time.perf_counter()
        count = len(Reading(path, side, mpp).groups)
        rows = ({"unit": f"{k}/{group}", "group": group} for k in range(times) for group in range(count))
        run_phase(Phase("tiles", Sums, (), rows, times * count, found.append))
        return time.perf_counter() - started

    connect(RaySettings(num_cpus=1))
    with pool("tiles"):
        job(1)  # workers started, modules imported
        took = job(repeat)
    total = sum(record["sum"] for record in found)
    return {"seconds": took, "tiles": sum(record["n"] for record in found), "checksum": total & MASK}


def ratiopath(path: str, side: int) -> dict[str, Any]:
    """Its own pipeline: read_slides, grid_tiles, repartition(128 rows), read_slide_tiles."""
    import ray
    from ratiopath.ray import read_slides
    from ratiopath.tiling import grid_tiles, read_slide_tiles

    def grid(row: dict[str, Any], most: int | None) -> list[dict[str, Any]]:
        keys = ("path", "level", "tile_extent_x", "tile_extent_y")
        tiles = grid_tiles((row["extent_x"], row["extent_y"]), (side, side), (side, side), last="keep")
        return [{key: row[key] for key in keys} | {"tile_x": int(x), "tile_y": int(y)} for x, y in islice(tiles, most)]

    def read(batch: dict[str, Any]) -> dict[str, Any]:
        found = read_slide_tiles(dict(batch))
        return {"sum": [checksum(found["tile"], found["tile_y"], found["tile_x"])], "n": [len(found["tile"])]}

    def job(most: int | None) -> tuple[float, list[Any]]:
        started = time.perf_counter()
        slides = read_slides(path, tile_extent=side, stride=side, level=0)
        tiles = slides.flat_map(grid, fn_args=(most,)).repartition(target_num_rows_per_block=128)
        rows = tiles.map_batches(read, batch_size=128, num_cpus=1).take_all()
        return time.perf_counter() - started, rows

    _quiet(ray)
    job(2)  # workers started, modules imported
    took, rows = job(None)
    total = sum(int(row["sum"]) for row in rows)
    return {"seconds": took, "tiles": sum(row["n"] for row in rows), "checksum": total & MASK}


def loop(kind: str, path: str, side: int, most: int, keep: str = "") -> dict[str, Any]:
    """A loop over the tiles through one open handle, row by row; afterwards the first `KEPT` of them go to a file."""
    if kind == "openslide":
        import openslide

        handle = openslide.OpenSlide(path)
    else:
        import tiffslide

        handle = tiffslide.TiffSlide(path)

    def read(row: int, col: int) -> Any:
        if kind == "openslide":
            return np.asarray(handle.read_region((col, row), 0, (side, side)))[..., :3]
        return handle.read_region((col, row), 0, (side, side), as_array=True)

    w, h = handle.dimensions
    places = [(r, c) for r in range(0, h, side) for c in range(0, w, side)][:most]
    total, started = 0, time.perf_counter()
    for row, col in places:
        total += checksum([read(row, col)], [row], [col])
    took = time.perf_counter() - started
    if keep:
        np.save(keep, np.stack([read(*place) for place in places[:KEPT]]))
    return {"seconds": took, "tiles": len(places), "checksum": total & MASK}


def _quiet(ray: Any) -> None:
    # Workers as those of deepfere's sessions: not behind other programs.
    config = {"worker_niceness": 0}
    ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False, _system_config=config)
    ray.data.DataContext.get_current().enable_progress_bars = False


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "arm", choices=["ours", "ours-pool", "ours-ray", "ours-map", "ours-rows", "ratiopath", "openslide", "tiffslide"]
    )
    parser.add_argument("slide")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--most", type=int, default=1 << 40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", default="", metavar="FILE.npy", help="of a loop's first tiles")
    given = parser.parse_args()
    if given.arm == "ours":
        found = ours(given.slide, given.side, given.mpp, given.seconds)
    elif given.arm == "ours-pool":
        found = ours_pool(given.slide, given.side, given.mpp, given.seconds, given.workers)
    elif given.arm == "ours-ray":
        found = ours_ray(given.slide, given.side, given.mpp, given.repeat)
    elif given.arm == "ours-map":
        found = ours_ray(given.slide, given.side, given.mpp, given.repeat, apart=True)
    elif given.arm == "ours-rows":
        found = ours_rows(given.slide, given.side, given.mpp, given.repeat)
    elif given.arm == "ratiopath":
        found = ratiopath(given.slide, given.side)
    else:
        found = loop(given.arm, given.slide, given.side, given.most, given.keep)
    print("RESULT " + json.dumps(found))
