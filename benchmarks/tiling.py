"""Tiles of a slide against what the machine can do: decoding the same compressed tiles, and nothing else.

    python benchmarks/tiling.py [plain] [peers] [memory] [ray] [--quick] [--json FILE] [--tiles SLIDE]
                                [--peer-python PYTHON] [--write-docs]

`plain`: one process, one thread, tiles of 512 px out of a slide of 20 480 x 20 480 px; the ceiling is libjpeg-turbo on
the distinct compressed native tiles that a case touches, in memory, into one buffer. Ceiling and case alternate, in
pieces of the slide; the ratio is the median over rounds, of processor time (what else runs on the machine does not
count) and of wall time. `memory`: peak PSS of a worker as the slide grows 10 and 100 times. `ray`: a Ray Data
job of about a minute against the same plan in a plain loop, one core each. `peers`: OpenSlide and tiffslide in a
loop, ratiopath with its own pipeline on Ray; PYTHON is that of an environment with `ratiopath==1.0.3 tiffslide`.
Slides are made in a temporary folder. `--quick` is `plain` on a smaller slide.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from common import Row, chosen, finish, machine, measured, parser, table
from numpy.typing import NDArray
from tiling_slide import MPP_UM, TILE, different_tiles, write_slide

from deepfere.readers.jpeg import pixel_memory
from deepfere.readers.slide import open_slide
from deepfere.tiling.groups import TileReader, group_tiles
from deepfere.tiling.tiles import TileSpec, plan_tiles

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- tiling:begin -->", "<!-- tiling:end -->"
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
CASES = ("plain", "peers", "memory", "ray")


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


def plain(slide_path: Path, rounds: int) -> list[Row]:
    """Every tiling against the ceiling."""
    rows, lines = [], []
    slide = open_slide(slide_path)
    raw, plane = slide_path.read_bytes(), slide.tiled[0]  # type: ignore[attr-defined]
    for name, (spec, least) in TILINGS.items():
        plan = plan_tiles(slide, spec)
        touched = np.zeros(plane.counts.shape, bool)
        for r0, r1, c0, c1 in plan.native:
            touched[r0:r1, c0:c1] = True
        places = zip(plane.offsets[touched].tolist(), plane.counts[touched].tolist(), strict=True)
        jpegs = [raw[a : a + n] for a, n in places]
        groups = group_tiles(plan)
        reader = TileReader(plan, slide)
        out = np.empty((max(len(g.tiles) for g in groups), spec.tile_px, spec.tile_px, 3), np.uint8)
        ratios, decoded = [], 0
        for _ in range(rounds):
            start, spent = slide.decoded, np.zeros((2, 2))  # type: ignore[attr-defined]
            for k in range(PIECES):
                spent[0] += ceiling(jpegs[k::PIECES])
                began = now()
                for group in groups[len(groups) * k // PIECES : len(groups) * (k + 1) // PIECES]:
                    reader.read(group, out[: len(group.tiles)])
                spent[1] += now() - began
            decoded = slide.decoded - start  # type: ignore[attr-defined]
            ratios.append(spent[0] / spent[1])
        cpu, wall = np.median(ratios, axis=0)
        again = decoded / len(jpegs)
        speeds = len(jpegs) * TILE**2 / 1e6 / spent[:, 0]
        rows += [
            Row.of(f"{name}: share of libjpeg-turbo, processor time", cpu, must=f">= {least}"),
            Row.of(f"{name}: share of libjpeg-turbo, wall time", wall),
            Row.of(f"{name}: native tiles decoded / distinct", again, must="<= 1.1"),
            Row.of(f"{name}: native Mpx per second of processor", speeds[1], "libjpeg-turbo", speeds[0]),
        ]
        low, high = np.min(ratios, axis=0)[0], np.max(ratios, axis=0)[0]
        cells = [f"{cpu:.2f}", f"{low:.2f} to {high:.2f}", f"{wall:.2f}", f">= {least:.2f}", f"{again:.3f}"]
        lines.append([name, *cells, f"{speeds[1]:.0f} of {speeds[0]:.0f}"])
        print(".", end="", flush=True)
    head = ["tiles", "share of libjpeg-turbo", "rounds", "by wall time", "must", "decoded / distinct"]
    head.append("native Mpx per second of processor")
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
    # Ray's workers give way to others on the machine; so must what they are compared with.
    alike = ("--nice", 15)
    one = arm("ours", slide, *alike)
    repeat = max(1, round(60 / one["seconds"]))
    rows, lines = [], []
    arms = (("ours-ray", "Ray Data"), ("ours-map", "Ray Data, blocks of pixels"), ("ours-rows", "Ray's actors"))
    for name, what in arms:
        before = arm("ours", slide, "--seconds", 15, *alike)["seconds"]
        ray = arm(name, slide, "--repeat", repeat)
        after = arm("ours", slide, "--seconds", 15, *alike)["seconds"]
        tax = ray["seconds"] / repeat / ((before + after) / 2)
        same = ray["checksum"] == one["checksum"] * repeat % (1 << 64)
        cells = [f"{ray['tiles']:,}", f"{ray['seconds']:.0f}", f"{tax:.2f}", "<= 1.15", "same" if same else "DIFFERENT"]
        lines.append([what, *cells])
        rows += [
            Row.of(f"{what}: time / plain loop of the same plan", tax, must="<= 1.15"),
            Row.of(f"{what}: checksums equal", float(same), must=">= 1"),
        ]
    _show("a job of a minute on Ray, one core", ["by", "tiles", "s", "time / plain loop", "must", "checksum"], lines)
    return rows


def peers(slide: Path, large: Path, python: str | None) -> list[Row]:
    """Other readers on the same slide and tiles, one core each; on Ray a larger slide, a job of a minute."""
    rows, lines = [], []
    ours = arm("ours", slide)
    most = 1000
    for name in ("openslide", *(["tiffslide"] if python else [])):
        found = arm(name, slide, "--most", most, python=sys.executable if name == "openslide" else str(python))
        speed = ours["tiles"] / ours["seconds"] / (found["tiles"] / found["seconds"])
        rows.append(Row.of(f"{name} loop: ours is faster by", speed))
        lines.append([f"{name}, loop", f"{found['tiles'] / found['seconds']:.0f}", f"{speed:.1f}", "", ""])
    if python:
        ray = arm("ours-ray", large)
        found = arm("ratiopath", large, python=python)
        again = arm("ours-ray", large)
        seconds = (ray["seconds"] + again["seconds"]) / 2
        same = found["checksum"] == ray["checksum"] and found["tiles"] == ray["tiles"]
        speed = found["seconds"] / seconds
        rows += [
            Row.of("ratiopath 1.0.3 on Ray: ours on Ray is faster by", speed, must=">= 5"),
            Row.of("ratiopath 1.0.3: checksums equal", float(same), must=">= 1"),
        ]
        rate = f"{found['tiles'] / found['seconds']:.0f}"
        lines.append(["ratiopath 1.0.3, Ray", rate, f"{speed:.1f}", ">= 5", "same" if same else "DIFFERENT"])
        lines.append(["ours, Ray", f"{ray['tiles'] / seconds:.0f}", "", "", ""])
    lines.append(["ours, loop", f"{ours['tiles'] / ours['seconds']:.0f}", "", "", ""])
    _show("512 px tiles, one core", ["reader", "tiles/s", "ours is faster by", "must", "checksum"], lines)
    return rows


TABLES: list[str] = []


def _show(title: str, head: list[str], lines: list[list[str]]) -> None:
    print("\n" + table(title, head, lines), flush=True)
    page = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]
    TABLES.append(f"{title[0].upper()}{title[1:]}:\n\n" + "\n".join(page))


def write_docs(command: str) -> None:
    """Put the tables between this program's own marks on the page; the rest of it stays."""
    about = machine()
    parts = [
        f"Measured on {time.strftime('%Y-%m-%d')} with `{command}` on {about['cpu']}, load {about['load_1min']:.1f}: "
        "ratios are of arms that alternate in one run, speeds are only for orientation.",
        *TABLES,
    ]
    text = PAGE.read_text() if PAGE.exists() else f"# Performance\n\n## Tiles of slides\n\n{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{tail}")


def main() -> int:
    options = parser("Tiles of a slide against what the machine can do.", cases=CASES)
    options.add_argument(
        "--tiles", metavar="SLIDE", help="cut the different tiles from a slide, not from a painted one"
    )
    options.add_argument("--peer-python", metavar="PYTHON", help="with ratiopath==1.0.3 and tiffslide")
    options.add_argument("--write-docs", action="store_true", help="write this program's part of docs/performance.md")
    given = options.parse_args()
    cases = chosen(given, dict.fromkeys(CASES), "plain")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        tiles = different_tiles(given.tiles)

        @cache
        def slide(side: int) -> Path:
            path = Path(name) / f"{side}.tif"
            write_slide(path, tiles, side, levels=False)
            return path

        run = {
            "plain": lambda: plain(slide(5120 if given.quick else 20480), 2 if given.quick else ROUNDS),
            "peers": lambda: peers(slide(20480), slide(40960), given.peer_python),
            "memory": lambda: memory({side: slide(side) for side in (4096, 12800, 40960)}),
            "ray": lambda: ray_tax(slide(40960)),
        }
        for case in cases:
            rows += run[case]()
    if given.write_docs:
        left_out = {"--write-docs", given.json, "--json"}  # where things lie is nobody else's
        asked = " ".join(word for word in sys.argv[1:] if word not in left_out)
        if given.peer_python:
            asked = asked.replace(given.peer_python, "PYTHON")
        write_docs(f"python benchmarks/tiling.py {asked}".strip())
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
