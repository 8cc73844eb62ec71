"""How true the reconstructed ions are: ``python benchmarks/fidelity.py [CASE ...] [--quick] [--json FILE]``.

Cases: ``phantom`` (generated sections, truth known), ``bladder`` (real tissue, x8 and x16 against the 10 um
truth) and ``deepfere-example`` (the DeepFERE paper's example under Wald's protocol, x2 and x4). deepfere's own runs go
through `deepfere.pipeline.fuse` as a user's files would; the truth scores, it never chooses. ``--write-docs`` writes
``docs/fidelity.md``, from a run or, with ``--from``, from the JSON of earlier ones.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from cases import AbsentDataError, Case, bladder_case, example_case, phantom_case, present_ions
from common import Row, chosen, finish, parser
from methods import Runs, fused, reconstruct
from numpy.typing import NDArray
from page import PAGE, load, page
from scipy.ndimage import uniform_filter
from scores import (
    Gains,
    Scores,
    bladder_scores,
    coverage_scores,
    example_scores,
    phantom_scores,
    phantom_summary,
)

from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.phantom import Phantom, PhantomSpec

SEEDS = (0, 1, 2)
FEW_COUNTS = 30.0
"""Counts at full scale of one section more, of the first seed; it is no part of the means."""


def show(scores: Scores) -> Scores:
    """Print the tables as they come."""
    for table in scores.tables:
        print("\n" + table.text(), flush=True)
    return scores


def phantom(folder: Path, quick: bool) -> Scores:
    """Generated sections: gains per kind of ion, and whether the uncertainty holds."""
    specs = [PhantomSpec(seed=s) for s in SEEDS] + [PhantomSpec(seed=SEEDS[0], counts=FEW_COUNTS)]
    if quick:
        specs = [PhantomSpec(seed=0, slide_mpp_um=3.0)]
    out, all_gains = Scores(), list[Gains]()
    for spec in specs:
        case = phantom_case(folder, spec)
        runs = reconstruct(case, folder, quick)
        scores, gains = phantom_scores(case, runs)
        truths = {"what smaller pixels would have counted": counted(spec, case), "the truth without noise": case.truth}
        scores.add(coverage_scores(case, runs.results[runs.ours], truths, list(range(len(case.mz)))))
        out.add(show(scores))
        if spec.counts != FEW_COUNTS:
            all_gains.append(gains)
    summary = show(
        phantom_summary([spec.seed for spec in specs[: len(all_gains)]], all_gains, "T1" if quick else "auto")
    )
    summary.add(out)
    return summary


def counted(spec: PhantomSpec, case: Case) -> NDArray[np.float64]:
    """What an instrument with fine pixels would have counted: each has its share of a measured pixel's counts."""
    if spec.counts is None:
        return case.truth
    amplitudes = Phantom.open(case.msi.parent).amplitudes()
    unit = (amplitudes / spec.counts * spec.factor**2)[:, None, None]
    return np.random.default_rng([spec.seed, 7]).poisson(np.maximum(case.truth, 0) / unit) * unit


def bladder(folder: Path, quick: bool) -> Scores:
    """Real tissue against the real 10 um image, raw and smoothed 3 x 3."""
    out = Scores()
    for factor in (16,) if quick else (8, 16):
        case = bladder_case(folder, factor)
        runs = reconstruct(case, folder, quick)
        scores = bladder_scores(case, runs)
        smooth = np.stack([uniform_filter(t, 3, mode="nearest") for t in case.truth])
        truths = {"the 10 um measurement": case.truth, "the same, smoothed 3 x 3": smooth}
        scores.add(coverage_scores(case, runs.results[runs.ours], truths, present_ions(case)))
        out.add(show(scores))
    return out


def example(folder: Path, quick: bool, recompute: bool = False) -> Scores:
    """Wald's protocol on the paper's example, blind; with ``recompute`` the published model is run anew (hours)."""
    full = replace(example_case(folder, 1), name="example-full", factor=2)
    fallback: Alignment | None = None
    try:
        fallback = fused(full, folder / "example-full.zarr", ["model.tier=T1"], **full.given()).alignment
    except InputError as error:
        print(f"full scale: {error}")
    out = Scores()
    for ratio in (4,) if quick else (2, 4):
        case = example_case(folder, ratio)
        runs = reconstruct(case, folder, quick, fallback, recompute)
        if fallback is not None:
            runs.notes.append(against_full_scale(case, runs, fallback))
        out.add(show(example_scores(case, runs, ratio)))
    return out


def against_full_scale(case: Case, runs: Runs, full: Alignment) -> str:
    """How far the alignment is from the one that the whole measurement leads to."""
    result, ratio = runs.results["T1"], case.factor
    assert result.alignment is not None
    points = result.grid.centres_um()[case.inside[ratio // 2 :: ratio, ratio // 2 :: ratio]]
    off = np.linalg.norm(result.alignment.map(points) - full.map(points), axis=1)
    off = off / (np.sqrt(abs(np.linalg.det(full.matrix))) * result.grid.pitch_um[0] / ratio)
    return f"alignment against full scale's: median {np.median(off):.2f} full-scale pixels"


EXAMPLE = "deepfere-example"
CASES = {"phantom": phantom, "bladder": bladder, EXAMPLE: example}


def run_cases(
    names: Sequence[str], folder: Path, quick: bool, asked: bool, recompute: bool = False
) -> tuple[list[Row], dict[str, Any], bool]:
    """Run cases one after the other.

    Args:
        names: Of `CASES`.
        folder: Where files and results go.
        quick: The short form of each.
        asked: Whether they were asked for by name: absent data are then an error.
        recompute: Make the kept images of the published model anew.

    Returns:
        Rows; what else the JSON holds; whether a case could not be run.
    """
    rows: list[Row] = []
    about: dict[str, Any] = {"date": date.today().isoformat(), "quick": quick, "cases": {}, "left_out": []}
    failed = False
    for name in names:
        began = time.perf_counter()
        try:
            scores = example(folder, quick, recompute) if name == EXAMPLE else CASES[name](folder, quick)
        except InputError as error:
            left_out = isinstance(error, AbsentDataError) and not asked
            print(f"\n{name}: {'left out: ' if left_out else ''}{error}", file=sys.stderr)
            failed = failed or not left_out
            about["left_out"] += [name] if left_out else []
            continue
        rows += scores.rows
        about["cases"][name] = {**scores.plain(), "figures": [row.what for row in scores.rows]}
        print(f"\n{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return rows, about, failed


def write_page(target: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write the page, and say where."""
    target.write_text(page(runs))
    print(f"wrote {target}")


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed, 2 if a case cannot be run."""
    command = parser(__doc__.splitlines()[0], list(CASES))
    command.add_argument(
        "--work", metavar="DIR", help="keep files and results here, and take finished ones as they are"
    )
    command.add_argument(
        "--write-docs", nargs="?", const=str(PAGE), metavar="FILE", help="write the page docs/fidelity.md, or FILE"
    )
    command.add_argument(
        "--from", nargs="+", dest="stored", metavar="JSON", help="with --write-docs: from stored JSON, without a run"
    )
    command.add_argument(
        "--recompute-paper", action="store_true", help=f"run the published model anew on {EXAMPLE}, and keep its images"
    )
    given = command.parse_args(arguments)
    if given.write_docs and given.quick:
        command.error("--write-docs takes full runs: leave --quick out")
    if given.stored:
        if not given.write_docs or given.cases:
            command.error("--from goes with --write-docs, and without a case")
        try:
            write_page(Path(given.write_docs), load(given.stored))
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    names = chosen(given, CASES, "phantom")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="deepfere-fidelity-") as scratch:
        folder = Path(given.work or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # The quick run without a case is the one that needs no real data.
        rows, about, failed = run_cases(names, folder, given.quick, bool(given.cases), given.recompute_paper)
        file = given.json or str(Path(scratch) / "fidelity.json")
        code = finish(rows, file, about)
        if given.write_docs and not failed and about["cases"]:
            write_page(Path(given.write_docs), load([file]))
        elif given.write_docs:
            print(f"{given.write_docs}: not written, a case is missing", file=sys.stderr)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 2 if failed else code


if __name__ == "__main__":
    sys.exit(main())
