"""Is the section found, and how exactly: ``python benchmarks/alignment.py [CASE ...] [--quick] [--json FILE]``.

Cases: ``starts`` (100 generated sections, each with a slide flipped, turned, scaled, shifted and bent at random:
found, refused or wrong; then the error after refinement), ``small`` (the same with a measurement of 24 x 21 pixels,
where refusing is expected and being wrong is not), and ``foreign`` (each measurement on another section's slide:
every one has to be refused). The truth scores, it never chooses.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, chosen, finish, parser, table

STARTS, QUICK_STARTS = 100, 6
SLIDE_MPP_UM = 3.0
FIRST_SEED = 1000
RIGHT_PX = 1.0
"""Median error in measured pixels below which a placement is called right."""


@dataclass(frozen=True)
class Start:
    """One section and slide to be tried.

    Attributes:
        seed: Of the section.
        slide_seed: Of the section whose slide is used.
        shape_px: Measured pixels; None takes the default.
    """

    seed: int
    slide_seed: int
    shape_px: tuple[int, int] | None


def attempt(start: Start) -> dict[str, Any]:
    """Search and refine one start, from files; runs in a process of its own."""
    import time

    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    from deepfere.alignment.bend import bend
    from deepfere.alignment.overview import MeasuredOverview
    from deepfere.alignment.refine import AFFINE_STAGES, refine
    from deepfere.alignment.search import search
    from deepfere.errors import InputError
    from deepfere.measured.factors import factor_weight, factorise
    from deepfere.measured.ingest import ingest
    from deepfere.phantom import PhantomSpec, write_phantom
    from deepfere.pipeline.overview import stain_overview
    from deepfere.readers.slide import open_slide

    size = {} if start.shape_px is None else {"shape_px": start.shape_px, "factor": 4}
    with tempfile.TemporaryDirectory(prefix="deepfere-alignment-") as scratch:
        folder = Path(scratch)
        phantom = write_phantom(folder / "a", PhantomSpec(seed=start.seed, slide_mpp_um=SLIDE_MPP_UM, **size))
        slide_file, truth = phantom.slide, phantom.alignment()
        if start.slide_seed != start.seed:
            other = PhantomSpec(seed=start.slide_seed, slide_mpp_um=SLIDE_MPP_UM, **size)
            slide_file = write_phantom(folder / "b", other).slide
        measured = ingest(phantom.imzml, folder / "measured.zarr")
        cube = np.nan_to_num(measured.cube("none"), nan=0.0)
        slide = open_slide(slide_file)
        began = time.perf_counter()
        stain, _ = stain_overview(slide, float(np.mean(measured.grid.pitch_um)))
        (factors,) = factorise([cube], [measured.mask], 16)
        view = MeasuredOverview.build(factors.images, measured.mask, factor_weight(factors), measured.grid)
        points = measured.grid.centres_um()[measured.mask]
        unit = np.sqrt(abs(np.linalg.det(truth.matrix))) * float(np.mean(measured.grid.pitch_um))

        def off_px(alignment: Any) -> np.ndarray:
            return np.linalg.norm(alignment.map(points) - truth.map(points), axis=1) / unit

        try:
            found, _ = search(view, stain)
        except InputError as error:
            return {
                "seed": start.seed,
                "outcome": "refused",
                "why": str(error),
                "search_s": time.perf_counter() - began,
            }
        searched = time.perf_counter()
        out = {"seed": start.seed, "search_s": searched - began, "evidence": found.evidence}
        if start.slide_seed != start.seed:
            return {**out, "outcome": "accepted"}
        if np.median(off_px(found)) > RIGHT_PX:
            return {**out, "outcome": "wrong", "search_px": float(np.median(off_px(found)))}
        affine = refine(view, stain, found, AFFINE_STAGES)
        final = bend(view, stain, affine)
        return {
            **out,
            "outcome": "found",
            "refine_s": time.perf_counter() - searched,
            "affine_px": [float(np.median(off_px(affine))), float(np.percentile(off_px(affine), 90))],
            "final_px": [float(np.median(off_px(final))), float(np.percentile(off_px(final), 90))],
            "bent": final.displacement is not None,
            "least_jacobian": final.evidence["bend"].get("least_jacobian", 1.0),
        }


def outcomes(starts: list[Start]) -> list[dict[str, Any]]:
    """All attempts, two at a time."""
    out = []
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=10) as pool:
        for record in pool.imap_unordered(attempt, starts):
            out.append(record)
            print(
                f"  {len(out)} / {len(starts)}: seed {record['seed']} {record['outcome']}", file=sys.stderr, flush=True
            )
            if record["outcome"] in ("wrong", "refused"):
                print(f"    {record.get('why') or record.get('evidence')}", file=sys.stderr, flush=True)
    return sorted(out, key=lambda r: r["seed"])


def _errors(records: list[dict[str, Any]], key: str) -> tuple[float, float, float, float]:
    """Median and worst over sections of the median error, then of the P90."""
    table = np.array([r[key] for r in records if key in r])
    return (
        float(np.median(table[:, 0])),
        float(table[:, 0].max()),
        float(np.median(table[:, 1])),
        float(table[:, 1].max()),
    )


def placed(name: str, shape_px: tuple[int, int] | None, quick: bool, judged: bool) -> list[Row]:
    """Found, refused or wrong over random starts, and the errors of those that were found."""
    count = QUICK_STARTS if quick else STARTS
    records = outcomes([Start(FIRST_SEED + n, FIRST_SEED + n, shape_px) for n in range(count)])
    tally = {what: sum(r["outcome"] == what for r in records) for what in ("found", "refused", "wrong")}
    found = [r for r in records if r["outcome"] == "found"]
    share = 100.0 * tally["found"] / count
    rows = [
        Row.of(f"{name}: orientation found, % of {count} starts", share, must=">= 98" if judged else ""),
        Row.of(f"{name}: wrong placements accepted", tally["wrong"], must="<= 0"),
        Row.of(f"{name}: seconds of a search, median", np.median([r["search_s"] for r in records])),
    ]
    lines = []
    if found:
        for label, key in (("affine", "affine_px"), ("with the displacement, where kept", "final_px")):
            errors = _errors(found, key)
            lines.append([label, *[f"{e:.3f}" for e in errors]])
            if key == "final_px":
                bars = ("<= 0.2", "<= 0.5") if judged else ("", "")
                rows.append(Row.of(f"{name}: alignment error, median, measured pixels", errors[0], must=bars[0]))
                rows.append(Row.of(f"{name}: alignment error, P90, measured pixels", errors[2], must=bars[1]))
        least = min(r["least_jacobian"] for r in found)
        rows.append(Row.of(f"{name}: smallest area ratio of the displacement", least, must="> 0"))
        rows.append(Row.of(f"{name}: seconds of the refinement, median", np.median([r["refine_s"] for r in found])))
    header = ["", "median: median", "worst", "P90: median", "worst"]
    print("\n" + table(f"{name}: {tally}; error over the sections, measured pixels", header, lines))
    return rows


def starts(quick: bool) -> list[Row]:
    """Sections of the default size."""
    return placed("starts", None, quick, True)


def small(quick: bool) -> list[Row]:
    """Sections of a few hundred pixels, on their own slides and on others."""
    return placed("small", (24, 21), quick, False) + strangers("small", (24, 21), quick)


def foreign(quick: bool) -> list[Row]:
    """Every measurement on the next section's slide."""
    return strangers("foreign", None, quick)


def strangers(name: str, shape_px: tuple[int, int] | None, quick: bool) -> list[Row]:
    """How many slides of another tissue are accepted."""
    count = QUICK_STARTS if quick else STARTS // 2
    records = outcomes([Start(FIRST_SEED + n, FIRST_SEED + n + 1, shape_px) for n in range(count)])
    accepted = sum(r["outcome"] == "accepted" for r in records)
    print(f"\n{name}: {count - accepted} of {count} slides of another tissue refused")
    return [Row.of(f"{name}: slides of another tissue accepted, of {count}", accepted, must="<= 0")]


CASES = {"starts": starts, "small": small, "foreign": foreign}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    given = parser(__doc__.splitlines()[0], list(CASES)).parse_args(arguments)
    rows: list[Row] = []
    for name in chosen(given, CASES, "starts"):
        rows += CASES[name](given.quick)
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
