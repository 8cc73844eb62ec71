"""A large section end to end: ``python benchmarks/end_to_end.py [--section DIR] [--quick] [--json FILE]``.

Generates a slide of about 40 000 x 40 000 px and an imzML of 500 x 500 pixels with 500 ions, then runs `deepfere fuse`
on the two files as a user would: wall time by stage, and memory as the sum of PSS over the whole process tree, Ray's
object store included. Writing the files takes about half an hour on one core; ``--section`` keeps them there, and takes
what is there already. ``--quick`` is the same with a tenth of the pixels along each side.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import Row, finish, measured, parser, table

SIDE_PX, QUICK_PX = 500, 50
PITCH_UM, MPP_UM = 50.0, 0.75
FACTOR = 8
IONS = {"class": 120, "nuclear": 100, "mixed": 60, "smooth": 60, "hotspot": 60, "twin": 50, "matrix": 50}
MOST_GIB = 10.0


def section(folder: Path, side_px: int) -> Path:
    """The generated section; written once. Its own truth is kept coarse: it is not what is looked at here."""
    from deepfere.phantom import Phantom, PhantomSpec, write_phantom

    spec = PhantomSpec(
        seed=5, shape_px=(side_px, side_px), pitch_um=PITCH_UM, factor=2, slide_mpp_um=MPP_UM, ions_per_kind=IONS
    )
    if not (folder / "truth").exists() or Phantom.open(folder).spec != spec:
        write_phantom(folder, spec, overwrite=True)
    return folder


def run(folder: Path, scratch: Path) -> list[Row]:
    """Fuse, and read the result's own record of it."""
    from deepfere.phantom import Phantom
    from deepfere.readers.slide import open_slide
    from deepfere.reconstruction.result import Result

    phantom = Phantom.open(folder)
    out = scratch / "result.zarr"
    settings = ["--factor", str(FACTOR), "tracking.uri=none"]
    command = [
        sys.executable,
        "-m",
        "deepfere",
        "fuse",
        str(phantom.imzml),
        str(phantom.slide),
        "-o",
        str(out),
        *settings,
    ]
    seconds, peak, printed = measured(command)
    print(printed)
    result = Result(out)
    slide = open_slide(phantom.slide)
    timings = result.provenance["timings_s"]
    print("\n" + table("seconds by stage", ["stage", "s"], [[k, f"{v:.0f}"] for k, v in timings.items()]))
    tier = result.provenance["model"]["tier"]
    print(f"slide {slide.shape_px[0]} x {slide.shape_px[1]} px, {len(result.ions)} ions, tier {tier}")
    return [
        Row.of("end to end: slide, Gpx", slide.shape_px[0] * slide.shape_px[1] / 1e9),
        Row.of("end to end: spectra", int(result.mask.sum())),
        Row.of("end to end: wall time, s", seconds),
        Row.of("end to end: peak PSS of the process tree, GiB", peak / 2**30, must=f"< {MOST_GIB:g}"),
        Row.of("end to end: consistency, worst ion", float(result.ions["consistency"].max()), must="<= 1e-5"),
    ]


def main() -> int:
    """Run it; the exit code is 1 if a must is missed."""
    command = parser(__doc__.splitlines()[0], ["end_to_end"])
    command.add_argument("--section", metavar="DIR", help="keep the generated files here, and take finished ones")
    given = command.parse_args()
    side = QUICK_PX if given.quick else SIDE_PX
    with tempfile.TemporaryDirectory(prefix="deepfere-end-to-end-") as scratch:
        folder = Path(given.section or Path(scratch) / "section").resolve()
        return finish(run(section(folder, side), Path(scratch)), given.json)


if __name__ == "__main__":
    sys.exit(main())
