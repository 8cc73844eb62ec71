"""Tiles of a slide against what the machine can do: decoding the same compressed tiles, and nothing else.

    python benchmarks/tiling.py [plain] [peers] [pool] [memory] [ray] [--quick | --write-docs] [--json FILE]
                                [--tiles SLIDE] [--peer-python PYTHON]

`plain`: one process, one thread, tiles of 512 px out of a slide of 20 480 x 20 480 px; the ceiling is libjpeg-turbo on
the distinct compressed native tiles that a case touches, in memory, into one buffer; beside it reading their bytes
(`pread`, from the page cache) and one copy of the pixels that are delivered (`memcpy`). Ceilings and case alternate, in
pieces of the slide; the ratio is the median over rounds, of processor time (what else runs on the machine does not
count) and of wall time. `pool`: the same plan by plain processes, one and two. `memory`: peak PSS of a worker as the
slide grows 10 and 100 times. `ray`: a Ray Data job of about a minute against the same plan in a plain loop, before and
after it, one core each; the median of three. `peers`: OpenSlide and tiffslide in a loop, ratiopath with its own
pipeline on Ray; PYTHON is that of an environment with `ratiopath==1.0.3 tiffslide openslide-bin`, without which these
two are left out. Slides are made in a temporary folder. `--quick` is `plain`, `peers` and `pool` on a smaller slide,
once, with nothing to meet in time.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from common import Row, chosen, finish, machine, markdown, measured, parser, table
from numpy.typing import NDArray
from performance import Section, versions
from tiling_arm import KEPT, MASK, Reading, checksum
from tiling_slide import MPP_UM, TILE, different_tiles, write_slide

from deepfere.readers.jpeg import pixel_memory
from deepfere.readers.slide import open_slide
from deepfere.tiling.groups import Group, TileReader, group_tiles
from deepfere.tiling.tiles import TileSpec, plan_tiles

HERE = Path(__file__).resolve().parent
SIDE = 512
#: What is read, and the least share of the ceiling.
TILINGS = {
    "native tiles (256 px), aligned": (TileSpec(TILE, MPP_UM), 0.70),
    "512 px, aligned": (TileSpec(SIDE, MPP_UM), 0.70),
    "512 px, misaligned": (TileSpec(SIDE, MPP_UM, offset_px=(100, 100)), 0.60),
    "512 px, half overlap": (TileSpec(SIDE, MPP_UM, stride_px=SIDE // 2), 0.45),
    "512 px at 1.08 x the mpp": (TileSpec(SIDE, 1.08 * MPP_UM), 0.20),
    "512 px at 1.6 x the mpp": (TileSpec(SIDE, 1.6 * MPP_UM), 0.20),
}
ROUNDS = 3
CASES = ("plain", "peers", "pool", "memory", "ray")
PIECES = 8


def now() -> NDArray[np.float64]:
    """Processor time of this process and wall time, seconds."""
    return np.array([time.process_time(), time.perf_counter()])


def ceiling(jpegs: list[bytes]) -> NDArray[np.float64]:
    """Seconds (processor, wall) to decode tiles that are in memory, one thread, into one buffer."""
    buffer = pixel_memory(TILE, TILE)
    started = now()
    for data in jpegs:
        imagecodecs.jpeg8_decode(data, colorspace="ycbcr", outcolorspace="rgb", out=buffer)
    return now() - started


def preads(handle: int, places: list[tuple[int, int]]) -> NDArray[np.float64]:
    """Seconds (processor, wall) to read byte ranges, (offset, length), from the page cache into one buffer."""
    buffer = memoryview(bytearray(max(length for _, length in places)))
    started = now()
    for offset, length in places:
        os.preadv(handle, [buffer[:length]], offset)
    return now() - started


def memcpy(groups: list[Group], source: NDArray[np.uint8], out: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Seconds (processor, wall) to copy as many pixels as the tiles of some groups have, once."""
    started = now()
    for group in groups:
        np.copyto(out[: len(group.tiles)], source[: len(group.tiles)])
    return now() - started


def plain(slide_path: Path, rounds: int, judged: bool) -> list[Row]:
    """Every tiling against the ceilings."""
    rows, lines = [], []
    slide = open_slide(slide_path)
    raw, plane = slide_path.read_bytes(), slide.tiled[0]  # type: ignore[attr-defined]
    handle = os.open(slide_path, os.O_RDONLY)
    for name, (spec, least) in TILINGS.items():
        plan = plan_tiles(slide, spec)
        touched = np.zeros(plane.counts.shape, bool)
        for r0, r1, c0, c1 in plan.native:
            touched[r0:r1, c0:c1] = True
        places = list(zip(plane.offsets[touched].tolist(), plane.counts[touched].tolist(), strict=True))
        jpegs = [raw[a : a + n] for a, n in places]
        groups = group_tiles(plan)
        reader = TileReader(plan, slide)
        out = np.zeros((max(len(g.tiles) for g in groups), spec.tile_px, spec.tile_px, 3), np.uint8)
        copy = np.ones_like(out)
        ratios, decoded = [], 0
        for _ in range(rounds):
            start, spent = slide.decoded, np.zeros((4, 2))  # type: ignore[attr-defined]
            for k in range(PIECES):
                some = groups[len(groups) * k // PIECES : len(groups) * (k + 1) // PIECES]
                spent[0] += ceiling(jpegs[k::PIECES])
                spent[1] += preads(handle, places[k::PIECES])
                spent[2] += memcpy(some, out, copy)
                began = now()
                for group in some:
                    reader.read(group, out[: len(group.tiles)])
                spent[3] += now() - began
            decoded = slide.decoded - start  # type: ignore[attr-defined]
            ratios.append(spent[:3] / spent[3])
        (cpu, wall), (pread, _), (copied, _) = np.median(ratios, axis=0)
        again = decoded / len(jpegs)
        speeds = len(jpegs) * TILE**2 / 1e6 / spent[:, 0]
        must = f">= {least}" if judged else ""
        rows += [
            Row.of(f"{name}: share of libjpeg-turbo, processor time", cpu, must=must),
            Row.of(f"{name}: share of libjpeg-turbo, wall time", wall),
            Row.of(f"{name}: share of pread of the same bytes, processor time", pread),
            Row.of(f"{name}: share of one memcpy of the pixels, processor time", copied),
            Row.of(f"{name}: native tiles decoded / distinct", again, must="<= 1.1"),
            Row.of(f"{name}: native Mpx per second of processor", speeds[3], "libjpeg-turbo", speeds[0]),
        ]
        low, high = np.min(ratios, axis=0)[0, 0], np.max(ratios, axis=0)[0, 0]
        cells = [f"{cpu:.2f}", f"{low:.2f} to {high:.2f}", f"{wall:.2f}", f">= {least:.2f}", f"{again:.3f}"]
        cells += [f"{speeds[3]:.0f} of {speeds[0]:.0f}", f"{pread:.3f}", f"{copied:.3f}"]
        lines.append([name, *cells])
        print(".", end="", flush=True)
    os.close(handle)
    head = ["tiles", "share of libjpeg-turbo", "rounds", "by wall time", "must", "decoded / distinct"]
    head += ["native Mpx per second of processor", "share of pread", "share of memcpy"]
    _show("one process, one thread", head, lines)
    return rows


def arm(name: str, slide: Path, *options: Any, python: str = sys.executable) -> dict[str, Any]:
    """Run one arm in a process of its own: what it printed, and its peak PSS in ``peak``."""
    command = [python, str(HERE / "tiling_arm.py"), name, str(slide), *map(str, options)]
    _, peak, printed = measured(command)
    found = re.search(r"^RESULT (.*)$", printed, re.MULTILINE)
    if found is None:
        sys.exit(f"{' '.join(command)} printed no result\n{printed[-2000:]}")
    return {**json.loads(found[1]), "peak": peak}


def _mib(result: dict[str, Any]) -> str:
    return f"{result['peak'] / 2**20:.0f}"


def _peak(what: str, result: dict[str, Any]) -> Row:
    """Of the whole process tree, Ray's object store included."""
    return Row.of(f"{what}: peak PSS of its processes, MiB", result["peak"] / 2**20)


def pool(slide: Path, rounds: int, judged: bool) -> list[Row]:
    """The same plan in a loop, and by plain processes, one and two: what a pool costs, and what a second one brings."""
    seconds = 10 if judged else 1
    ratios, seen = [], set()
    for _ in range(rounds):
        found = {
            "loop": arm("ours", slide, "--seconds", seconds),
            "one": arm("ours-pool", slide, "--seconds", seconds, "--workers", 1),
            "two": arm("ours-pool", slide, "--seconds", seconds, "--workers", 2),
        }
        loop, one, two = (result["seconds"] for result in found.values())
        ratios.append([one / loop, one / (2 * two)])
        seen |= {(result["tiles"], result["checksum"]) for result in found.values()}
    same = len(seen) == 1
    names = ("a pool of one process: time / plain loop", "a pool of two: of twice the speed of one")
    rows, lines = [], []
    for k, (name, must) in enumerate(zip(names, ("", ">= 0.85"), strict=True)):
        each = [ratio[k] for ratio in ratios]
        rows.append(Row.of(name, float(np.median(each)), must=must if judged else ""))
        lines.append([name, f"{np.median(each):.2f}", f"{min(each):.2f} to {max(each):.2f}", must])
    rows.append(Row.of("pools: checksums equal", float(same), must=">= 1"))
    lines.append(["checksums", "same" if same else "DIFFERENT", "", ""])
    _show("plain processes, 512 px tiles", ["", "ratio", "rounds", "must"], lines)
    return rows


def memory(slides: dict[int, Path]) -> list[Row]:
    """Peak memory of a worker against the area of the slide."""
    found = {side: arm("ours", path, "--mpp", 1.08 * MPP_UM, "--seconds", 5) for side, path in slides.items()}
    least = min(found)
    rows, lines = [], []
    for side, result in found.items():
        growth = result["peak"] / found[least]["peak"]
        area = round((side / least) ** 2)
        rows.append(Row.of(f"peak memory, slide of {area} x the area, against 1 x", growth, must="<= 1.2"))
        lines.append([f"{side} x {side} px ({area} x)", f"{result['peak'] / 2**20:.0f}", f"{growth:.2f}", "<= 1.20"])
    _show("memory of a worker, 512 px tiles at 1.08 x the mpp", ["slide", "peak PSS, MiB", "growth", "must"], lines)
    return rows


def ray_tax(slide: Path) -> list[Row]:
    """The same plan, several times over, on one core: as a Ray Data job, and on our actors, against a plain loop."""
    one = arm("ours", slide)
    repeat = max(1, round(60 / one["seconds"]))
    rows, lines = [], []
    arms = (("ours-ray", "Ray Data"), ("ours-map", "Ray Data, blocks of pixels"), ("ours-rows", "Ray's actors"))
    for name, what in arms:
        ratios, jobs, same = [], [], True
        for _ in range(ROUNDS):
            before = arm("ours", slide, "--seconds", 15)["seconds"]
            jobs.append(arm(name, slide, "--repeat", repeat))
            after = arm("ours", slide, "--seconds", 15)["seconds"]
            ratios.append(jobs[-1]["seconds"] / repeat / ((before + after) / 2))
            same &= jobs[-1]["checksum"] == one["checksum"] * repeat % (1 << 64)
        tax, largest = float(np.median(ratios)), max(jobs, key=lambda job: job["peak"])
        cells = [f"{jobs[0]['tiles']:,}", f"{np.median([job['seconds'] for job in jobs]):.0f}", f"{tax:.2f}"]
        cells += [f"{min(ratios):.2f} to {max(ratios):.2f}", "<= 1.15", "same" if same else "DIFFERENT", _mib(largest)]
        lines.append([what, *cells])
        rows += [
            Row.of(f"{what}: time / plain loop of the same plan", tax, must="<= 1.15"),
            Row.of(f"{what}: checksums equal", float(same), must=">= 1"),
            _peak(what, largest),
        ]
    head = ["by", "tiles", "s", "time / plain loop", "rounds", "must", "checksum", "peak PSS, MiB"]
    _show("a job of a minute on Ray, one core", head, lines)
    return rows


def first_tiles(slide: Path, most: int) -> tuple[int, NDArray[np.uint8]]:
    """Checksum of our first tiles, row by row, as a loop reads them; and the pixels of the first `KEPT`."""
    reading = Reading(str(slide), SIDE, MPP_UM)
    across = reading.slide.shape_px[1] // SIDE
    place = reading.plan.corner_px // SIDE @ np.array([across, 1])
    total, kept = 0, np.zeros((min(KEPT, len(place)), SIDE, SIDE, 3), np.uint8)
    for number, group in enumerate(reading.groups):
        pixels, here = reading.pixels(number), place[group.tiles]
        total += checksum(pixels[here < most], *reading.plan.corner_px[group.tiles][here < most].T)
        kept[here[here < KEPT]] = pixels[here < KEPT]
    return total & MASK, kept


def loops(slide: Path, python: str | None) -> tuple[list[Row], list[list[str]]]:
    """OpenSlide and tiffslide, tile after tile, against our loop: time and pixels."""
    rows, lines = [], []
    ours, most = arm("ours", slide), 1000
    total, pixels = first_tiles(slide, most)
    for name, interpreter in {"openslide": sys.executable, **({"tiffslide": python} if python else {})}.items():
        kept = slide.with_name("kept.npy")
        found = arm(name, slide, "--most", most, "--keep", kept, python=interpreter)
        speed = ours["tiles"] / ours["seconds"] / (found["tiles"] / found["seconds"])
        same = found["checksum"] == total
        apart = float(np.abs(np.load(kept).astype(np.int16) - pixels).mean())
        rows += [
            Row.of(f"{name} loop: ours is faster by", speed),
            # Both decode with libjpeg-turbo: the same pixels, to the last bit.
            Row.of(f"{name} loop: checksums equal", float(same), must=">= 1"),
            Row.of(f"{name} loop: mean absolute difference of {len(pixels)} tiles, grey levels", apart),
        ]
        told = "same" if same else f"DIFFERENT, by {apart:.3f} grey levels"
        rows.append(_peak(f"{name} loop", found))
        cells = [f"{found['tiles'] / found['seconds']:.0f}", f"{speed:.1f}", "", told, _mib(found)]
        lines.append([f"{name}, loop", *cells])
    rows.append(_peak("our loop", ours))
    lines.append(["ours, loop", f"{ours['tiles'] / ours['seconds']:.0f}", "", "", "", _mib(ours)])
    return rows, lines


def peers(slide: Path, large: Path, python: str | None, judged: bool) -> list[Row]:
    """Other readers on the same slide and tiles, one core each; on Ray a larger slide, a job of a minute."""
    rows, lines = loops(slide, python)
    if python:
        ray = arm("ours-ray", large)
        found = arm("ratiopath", large, python=python)
        again = arm("ours-ray", large)
        seconds = (ray["seconds"] + again["seconds"]) / 2
        same = found["checksum"] == ray["checksum"] and found["tiles"] == ray["tiles"]
        speed = found["seconds"] / seconds
        rows += [
            Row.of("ratiopath on Ray: ours on Ray is faster by", speed, must=">= 5" if judged else ""),
            Row.of("ratiopath: checksums equal", float(same), must=">= 1"),
        ]
        rate = f"{found['tiles'] / found['seconds']:.0f}"
        rows += [_peak("ratiopath on Ray", found), _peak("ours on Ray", ray)]
        lines.append(["ratiopath, Ray", rate, f"{speed:.1f}", ">= 5", "same" if same else "DIFFERENT", _mib(found)])
        lines.append(["ours, Ray", f"{ray['tiles'] / seconds:.0f}", "", "", "", _mib(ray)])
    head = ["reader", "tiles/s", "ours is faster by", "must", "checksum", "peak PSS, MiB"]
    _show("512 px tiles, one core", head, lines)
    return rows


TABLES: list[str] = []


def _show(title: str, head: list[str], lines: list[list[str]]) -> None:
    print("\n" + table(title, head, lines), flush=True)
    TABLES.append(f"{title[0].upper()}{title[1:]}:\n\n{markdown(head, lines)}")


def main() -> int:
    options = parser("Tiles of a slide against what the machine can do.", cases=CASES, page=True)
    options.add_argument(
        "--tiles", metavar="SLIDE", help="cut the different tiles from a slide, not from a painted one"
    )
    options.add_argument("--peer-python", metavar="PYTHON", help="with ratiopath==1.0.3, tiffslide and openslide-bin")
    given = options.parse_args()
    cases = chosen(given, dict.fromkeys(CASES), "plain", "peers", "pool")
    packages = versions(["imagecodecs", "openslide-python", "openslide-bin", "ray"])
    left_out = []
    if given.peer_python:
        versions(["openslide-bin"], given.peer_python)  # ratiopath cannot do without
        packages |= versions(["tiffslide", "ratiopath"], given.peer_python)
    elif "peers" in cases:
        left_out.append("tiffslide and ratiopath (no `--peer-python`)")
    if machine()["cores"] < 2 and "pool" in cases:
        cases = [case for case in cases if case != "pool"]
        left_out.append("plain processes (one core)")
    section, judged = Section.begin("tiling", sys.argv[1:], packages, left_out), not given.quick
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        tiles = different_tiles(given.tiles)

        @cache
        def slide(side: int) -> Path:
            path = Path(name) / f"{side}.tif"
            write_slide(path, tiles, side, levels=False)
            return path

        side, rounds = (20480, ROUNDS) if judged else (5120, 1)
        run = {
            "plain": lambda: plain(slide(side), rounds, judged),
            "peers": lambda: peers(slide(side), slide(2 * side if judged else side), given.peer_python, judged),
            "pool": lambda: pool(slide(side), rounds, judged),
            "memory": lambda: memory({side: slide(side) for side in (4096, 12800, 40960)}),
            "ray": lambda: ray_tax(slide(40960)),
        }
        for case in cases:
            rows += run[case]()
    if given.write_docs:
        source = "cut from a real slide" if given.tiles else "painted"
        told = "Ratios are of arms that alternate in one run, speeds are only for orientation. Native tiles: "
        told += f"JPEG, 4:2:0, quality 80, {len(tiles)} different ones, {source}."
        section.write(told, *TABLES)
    return finish(rows, given.json, section.facts())


if __name__ == "__main__":
    sys.exit(main())
