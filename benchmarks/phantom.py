"""Writing a generated section up to a slide of 100 000 x 100 000 px: time and memory against its size.

    python benchmarks/phantom.py [small] [medium] [gigapixel] [--quick] [--json FILE]

One section at 100 um pitch and 0.5 um per slide pixel, larger from case to case. `gigapixel` takes about an hour on
one core and 12 GB of disk. Memory is the sum of PSS over the process tree; it does not depend on the slide, but on the
number of spectra (the imzML's writer holds some 7 kB of each). `--quick` is `small` alone.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import openslide
from common import Row, chosen, finish, measured, parser, table

#: Measured pixels along each side.
CASES = {"small": 32, "medium": 100, "gigapixel": 420}
MPP_UM = 0.5


def run(case: str) -> tuple[list[Row], list[str]]:
    """The rows of one size and its line in the table."""
    side = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "section"
        options = ["--shape", str(side), str(side), "--pitch-um", "100", "--slide-mpp-um", str(MPP_UM)]
        seconds, peak, _ = measured([sys.executable, "-m", "deepfere.phantom", str(folder), *options])
        file = folder / "slide.tiff"
        with openslide.OpenSlide(str(file)) as slide:
            width, height = slide.dimensions
            mpp_um = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
            levels = slide.level_count
            # The far corner proves that the last tiles are there.
            corner = slide.read_region((width - 64, height - 64), 0, (64, 64))
        size, pixels = file.stat().st_size, width * height
    rows = [
        Row.of(f"{case}: slide, Gpx", pixels / 1e9, must=">= 10" if case == "gigapixel" else ""),
        Row.of(f"{case}: wall time, s", seconds),
        Row.of(f"{case}: Mpx/s", pixels / 1e6 / seconds),
        Row.of(f"{case}: peak PSS of the process tree, GiB", peak / 2**30, must="<= 1.5"),
        Row.of(f"{case}: mpp that OpenSlide reads, um/px", mpp_um, "as asked", MPP_UM, "within 1e-6 of baseline"),
        Row.of(
            f"{case}: darkest value of the far corner", min(low for low, _ in corner.getextrema()[:3]), must="> 100"
        ),
    ]
    line = [case, f"{width} x {height}", str(levels), f"{seconds:.0f}", f"{pixels / 1e6 / seconds:.1f}"]
    return rows, [*line, f"{peak / 2**20:.0f}", f"{size / 2**30:.2f}"]


if __name__ == "__main__":
    given = parser("Time and memory of writing generated sections.", cases=tuple(CASES)).parse_args()
    every: list[Row] = []
    lines: list[list[str]] = []
    for case in chosen(given, CASES, "small"):
        rows, line = run(case)
        every, lines = every + rows, [*lines, line]
        print(
            table("phantom", ["case", "slide, px", "levels", "s", "Mpx/s", "peak, MiB", "file, GiB"], [line]),
            flush=True,
        )
    sys.exit(finish(every, given.json))
