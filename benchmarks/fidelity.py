"""How true the reconstructed ions are: ``python benchmarks/fidelity.py [CASE ...] [--quick] [--json FILE]``.

Cases: ``phantom`` (a generated section, truth known), ``bladder`` (real tissue, x8 and x16 against the 10 um
truth) and ``deepfere-example`` (the DeepFERE paper's example under Wald's protocol, x2 and x4). Everything
goes through `deepfere.pipeline.fuse` as a user's files would; the truth scores, it never chooses.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cases import AbsentDataError, Case, bladder_case, example_case, phantom_case
from common import Row, finish, parser, table
from numpy.typing import NDArray
from oracle import nearest, oracle_images
from scipy.ndimage import uniform_filter

from deepfere.alignment.search import describe
from deepfere.errors import IdentityError, InputError
from deepfere.evaluation.evaluate import coverage
from deepfere.evaluation.metrics import fill_nearest, keys_bicubic, pearson, psnr
from deepfere.frame import Alignment
from deepfere.phantom import KINDS, Phantom, PhantomSpec
from deepfere.pipeline import fuse
from deepfere.reconstruction.result import Result

CONSISTENT = "<= 1e-5"
SEEDS = (0, 1)
PRESENT = 0.3
"""Ions count where more than this share of the truth's pixels are not zero."""


@dataclass
class Runs:
    """Every method's images of one case.

    Attributes:
        images: Name -> (M, H, W); NaN images for ions that were not found.
        results: Name -> the opened result, where there is one.
        seconds: Name -> seconds of all its stages, as its provenance says.
        notes: What a reader must know.
    """

    images: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def decode(case: Case, result: Result, denoised: bool = False) -> NDArray[np.float64]:
    """The case's images from a result, (M, H, W)."""
    out = np.full(case.truth.shape, np.nan)
    for m, mz in enumerate(case.mz):
        near = nearest(result, float(mz))
        if near is not None:
            out[m] = result.ion(near, denoised=denoised).compute(scheduler="threads")
    return out


def opencv_cubic(image: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """OpenCV's INTER_CUBIC (a = -0.75, half-pixel centres, edge replicated)."""
    import cv2

    ny, nx = image.shape
    out = cv2.resize(image, (nx * factor, ny * factor), interpolation=cv2.INTER_CUBIC)
    return np.asarray(out, np.float64)


def fused(case: Case, target: Path, overrides: list[str], **given: Any) -> Result:
    """`fuse` without tracking; a finished result of the same inputs and settings is taken as it is."""
    slide = None if given.get("guide") is False else case.slide
    settings = ["tracking.uri=none", *overrides]
    try:
        return fuse(case.msi, slide, target, factor=case.factor, overrides=settings, **given)
    except IdentityError:
        return fuse(case.msi, slide, target, factor=case.factor, overrides=settings, overwrite=True, **given)


def reconstruct(case: Case, folder: Path, tiers: tuple[str, ...], fallback: Alignment | None = None) -> Runs:
    """Run every method on a case.

    Args:
        case: Files and truth.
        folder: Where results go; finished ones are taken as they are.
        tiers: Of "T1" and "auto"; "auto" also gives "deep" (the deep tier forced).
        fallback: Alignment to score with where the search refuses; such results are labelled.
    """
    runs = Runs()

    def run(name: str, overrides: list[str], **given: Any) -> None:
        print(f"  {case.name}: {name} ...", file=sys.stderr, flush=True)
        result = fused(case, folder / f"{case.name}-{name}.zarr", overrides, **given)
        runs.images[name], runs.results[name] = decode(case, result), result
        runs.seconds[name] = sum(result.provenance["timings_s"].values())

    run("no-guide", [], guide=False)
    plain = runs.results["no-guide"]
    cells = {m: plain.measured(near) for m, mz in enumerate(case.mz) if (near := nearest(plain, float(mz))) is not None}
    for name, method in (("bicubic", keys_bicubic), ("opencv", opencv_cubic)):
        runs.images[name] = np.full(case.truth.shape, np.nan)
        for m, y in cells.items():
            # The same filling of holes for both: from the nearest measured pixel.
            runs.images[name][m] = method(fill_nearest(y), case.factor)
    given = case.given()
    for tier in tiers:
        overrides = [f"model.tier={tier}"]
        try:
            run(tier, overrides, **given)
        except InputError as error:
            if fallback is None or "alignment" in given:
                raise
            runs.notes.append(f"refused blind ({error}): scored with the full-scale alignment")
            path = folder / f"{case.name}-full-scale-alignment.json"
            fallback.save(path)
            given["alignment"] = path
            run(tier, overrides, **given)
    if "auto" in tiers:
        chosen = runs.results["auto"].provenance["model"]["tier"]
        runs.notes.append(f"auto chose {chosen}")
        if chosen == "T2":
            # The same training and the same choices: forcing the tier would repeat this run.
            runs.images["deep"], runs.results["deep"] = runs.images["auto"], runs.results["auto"]
        else:
            run("deep", ["model.tier=T2"], **given)
    ours = runs.results[tiers[-1]]
    runs.images["denoised"] = decode(case, ours, denoised=True)
    assert ours.alignment is not None
    runs.images["oracle"] = oracle_images(case, plain, ours, ours.alignment)
    flip, rotation, scale = describe(ours.alignment)
    stages = [f"{s['stage']}{'' if s['kept'] else ' (not kept)'}" for s in ours.alignment.evidence.get("stages", [])]
    runs.notes.append(f"alignment: flip {flip}, {rotation:.1f} degrees, scale {scale:.3f}; {', '.join(stages)}")
    runs.notes.append(f"oracle: in-sample, at the alignment and with the positivity steps of {tiers[-1]}")
    return runs


def consistency_rows(case: Case, runs: Runs) -> list[Row]:
    """The worst ion of every run."""
    return [
        Row.of(f"{case.name}: consistency, {name}", float(result.ions["consistency"].max()), must=CONSISTENT)
        for name, result in runs.results.items()
        if not (name == "deep" and result is runs.results.get("auto"))
    ]


HELD = "within 0.1 of baseline"


def coverage_rows(case: Case, result: Result, truths: dict[str, NDArray[np.float64]], ions: list[int]) -> list[Row]:
    """How much of each truth the central 80 % intervals of a result hold, median over some ions.

    The first truth is what the uncertainty speaks of (an instrument with these pixels, its noise included), and must
    be met; the others are for information.

    Args:
        case: The case.
        result: Its result.
        truths: What is compared with -> (M, H, W), for all ions of the case.
        ions: Numbers of those that count.
    """
    near = {m: nearest(result, float(case.mz[m])) for m in ions}
    found = [m for m in ions if near[m] is not None]
    images, sd = (
        np.stack([np.asarray(read(near[m]).compute(scheduler="threads"), np.float64) for m in found])
        for read in (result.ion, result.uncertainty)
    )
    rows = []
    for what, truth in truths.items():
        share = coverage(truth[found], images, sd, case.inside)
        must = "" if rows else HELD
        rows.append(Row.of(f"{case.name}: share of {what} in 80 % intervals", share, "nominal", 0.8, must))
        print(f"  80 % intervals hold {100 * share:.0f} % of {what} (median over {len(found)} ions)")
    off = [
        np.sqrt(((t - e)[case.inside] ** 2).mean() / (s[case.inside] ** 2).mean())
        for t, e, s in zip(next(iter(truths.values()))[found], images, sd, strict=True)
    ]
    rows.append(
        Row.of(f"{case.name}: root mean square error over s.d., median ion", float(np.median(off)), "ideal", 1.0)
    )
    print(f"  root mean square error over s.d.: median {np.median(off):.2f}")
    return rows


def chi_square_row(case: Case, result: Result, ions: Iterable[int]) -> Row:
    """Reduced chi-square of what the denoised mode takes away, median over some ions."""
    near = [nearest(result, float(case.mz[m])) for m in ions]
    values = result.ions.set_index("mz")["chi_square"][[mz for mz in near if mz is not None]]
    median = float(np.nanmedian(values))
    print(f"  denoised: reduced chi-square {median:.2f} (median of {values.notna().sum()} ions)")
    return Row.of(f"{case.name}: denoised, reduced chi-square", median, "ideal", 1.0, "within 0.1 of baseline")


def notes(runs: Runs) -> str:
    """What stands below a table."""
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in runs.seconds.items())
    return "\n".join(f"  {line}" for line in [*runs.notes, f"seconds: {seconds}"])


def phantom(folder: Path, quick: bool) -> list[Row]:
    """PSNR gains over no-guide per kind of ion, and how far the alignment is off."""
    specs = [PhantomSpec(seed=s) for s in SEEDS] + [PhantomSpec(seed=SEEDS[0], counts=30.0)]
    if quick:
        specs = [PhantomSpec(seed=0, slide_mpp_um=3.0)]
    rows: list[Row] = []
    for spec in specs:
        case = phantom_case(folder, spec)
        runs = reconstruct(case, folder, ("T1",) if quick else ("T1", "auto"))
        ours = "T1" if quick else "auto"
        plain, guided = runs.results["no-guide"], runs.results[ours]
        assert case.alignment is not None
        if not quick:
            runs.images["oracle, true place"] = oracle_images(case, plain, guided, case.alignment)
        rows += _phantom_rows(case, runs, ours) + consistency_rows(case, runs)
        truths = {"what smaller pixels would have counted": counted(spec, case), "the truth without noise": case.truth}
        rows += coverage_rows(case, guided, truths, list(range(len(case.mz))))
    return rows


def counted(spec: PhantomSpec, case: Case) -> NDArray[np.float64]:
    """What an instrument with fine pixels would have counted: each has its share of a measured pixel's counts."""
    if spec.counts is None:
        return case.truth
    amplitudes = Phantom.open(case.msi.parent).amplitudes()
    unit = (amplitudes / spec.counts * spec.factor**2)[:, None, None]
    return np.random.default_rng([spec.seed, 7]).poisson(np.maximum(case.truth, 0) / unit) * unit


def _phantom_rows(case: Case, runs: Runs, ours: str) -> list[Row]:
    names = ["bicubic", "opencv", "T1", "deep", "auto", "denoised", "oracle", "oracle, true place"]
    names = [name for name in names if name in runs.images]
    scores = {
        name: np.array(
            [
                psnr(t, e, case.inside, float(t[case.inside].max())) if np.isfinite(e).any() else np.nan
                for t, e in zip(case.truth, images, strict=True)
            ]
        )
        for name, images in runs.images.items()
    }
    rows, lines = [], []
    base = scores["no-guide"]
    for kind, informed in KINDS.items():
        chosen = np.array([label == kind for label in case.labels]) & np.isfinite(base)
        if not chosen.any():
            continue
        gains = {name: scores[name][chosen] - base[chosen] for name in names}
        cells = [f"{gains[name].mean():+.2f}" for name in names]
        worst = f"{gains[ours].min():+.2f}"
        for against in ("opencv", ours):
            value, bar = (float(scores[name][chosen].mean()) for name in ("denoised", against))
            rows.append(Row.of(f"{case.name}: {kind}, denoised, PSNR dB", value, against, bar, ">= baseline"))
        shown = "in part" if kind == "twin" else "yes" if informed else "no"
        lines.append([kind, shown, int(chosen.sum()), f"{base[chosen].mean():.2f}", *cells, worst])
        for name in ("T1", "deep", "auto"):
            if name in scores:
                must = ("> baseline" if informed else "within 0.05 of baseline") if name == ours else ""
                value, plain = float(scores[name][chosen].mean()), float(base[chosen].mean())
                gain = f"{value - plain:+.3f}"
                what = f"{case.name}: {kind}, {name} ({gain}), PSNR dB"
                rows.append(Row.of(what, value, "no-guide", plain, must))
    rows.append(chi_square_row(case, runs.results[ours], range(len(case.mz))))
    header = ["kind", "stain shows", "ions", "no-guide", *names, f"worst ion, {ours}"]
    print("\n" + table(f"{case.name}: PSNR dB of no-guide, then gains over it (mean over ions)", header, lines))
    lines = []
    for name in ("T1", "deep", "auto"):
        if name in runs.results:
            median, p90 = alignment_error_px(case, runs.results[name])
            lines.append([name, f"{median:.3f}", f"{p90:.3f}"])
            rows.append(Row.of(f"{case.name}: alignment error, {name}, median, measured pixels", median))
            rows.append(Row.of(f"{case.name}: alignment error, {name}, P90, measured pixels", p90))
    print(table("alignment error, measured pixels", ["", "median", "P90"], lines))
    missing = int(np.isnan(base).sum())
    print(notes(runs) + (f"\n  {missing} true ions not found by peak picking" if missing else ""))
    return rows


def alignment_error_px(case: Case, result: Result) -> tuple[float, float]:
    """Median and 90th percentile of |found - true| over the measured pixels, in measured pixels."""
    assert case.alignment is not None and result.alignment is not None
    points = result.grid.centres_um()[result.mask]
    off = np.linalg.norm(case.alignment.map(points) - result.alignment.map(points), axis=1)
    size = np.sqrt(abs(np.linalg.det(case.alignment.matrix))) * float(np.mean(result.grid.pitch_um))
    return float(np.median(off) / size), float(np.percentile(off, 90) / size)


def bladder(folder: Path, quick: bool) -> list[Row]:
    """Pearson r per ion against the real 10 um image, raw and smoothed 3 x 3."""
    rows: list[Row] = []
    for factor in (16,) if quick else (8, 16):
        case = bladder_case(folder, factor)
        runs = reconstruct(case, folder, ("T1",) if quick else ("T1", "auto"))
        rows += _bladder_rows(case, runs) + consistency_rows(case, runs)
        smooth = np.stack([uniform_filter(t, 3, mode="nearest") for t in case.truth])
        truths = {"the 10 um measurement": case.truth, "the same, smoothed 3 x 3": smooth}
        rows += coverage_rows(case, runs.results["T1" if quick else "auto"], truths, present_ions(case))
    return rows


def present_ions(case: Case) -> list[int]:
    """Ions that are not zero in more than `PRESENT` of the truth's pixels."""
    return [m for m, t in enumerate(case.truth) if (t[case.inside] > 0).mean() > PRESENT]


def _bladder_rows(case: Case, runs: Runs) -> list[Row]:
    names = ["bicubic", "opencv", "no-guide", "T1", "deep", "auto", "denoised", "oracle"]
    names = [name for name in names if name in runs.images]
    present = present_ions(case)
    exact = "auto" if "auto" in runs.results else "T1"
    rows = [chi_square_row(case, runs.results[exact], present)]
    for kind in ("raw", "3x3-smoothed"):
        truth = case.truth[present]
        if kind != "raw":
            truth = np.stack([uniform_filter(t, 3, mode="nearest") for t in truth])
        r = {
            name: np.array([pearson(t, e, case.inside) for t, e in zip(truth, runs.images[name][present], strict=True)])
            for name in names
        }
        base, lines = r["no-guide"], []
        for against in ("opencv", exact):
            bar, must = float(np.median(r[against])), ">= baseline" if kind != "raw" else ""
            what = f"{case.name}: denoised, {kind}, median r"
            rows.append(Row.of(what, float(np.median(r["denoised"])), against, bar, must))
        ceiling = float((r["oracle"] - base).mean())
        for name in names:
            change = r[name] - base
            # Where no run before differs, neither does this one: rounding is not a change.
            better, worse = int((change > 1e-5).sum()), int((change < -1e-5).sum())
            share = float(change.mean()) / ceiling if ceiling > 0 else float("nan")
            plain = name == "no-guide"
            lines.append(
                [
                    name,
                    f"{np.median(r[name]):.4f}",
                    *[
                        "" if plain else t
                        for t in (f"{change.mean():+.4f}", f"{change.min():+.4f}", f"{change.max():+.4f}")
                    ],
                    "" if plain else f"{better} / {worse} of {len(present)}",
                    "" if plain else f"{100 * share:.0f} %",
                ]
            )
            if not plain:
                what = f"{case.name}: {name}, {kind}"
                rows.append(Row.of(f"{what}, median r", np.median(r[name]), "no-guide", np.median(base)))
                rows.append(Row.of(f"{what}, worst ion's change of r (aim >= 0)", change.min()))
                rows.append(Row.of(f"{what}, ions better than no-guide", better, "ions", len(present)))
                aim = "mean change of r (aim 60 % of the oracle's)"
                rows.append(Row.of(f"{what}, {aim}", change.mean(), "oracle", ceiling))
        header = ["", "median r", "mean change", "worst", "best", "better / worse", "of oracle's gain"]
        title = f"{case.name}: r against the {kind} truth, {len(present)} ions; changes from no-guide"
        print("\n" + table(title, header, lines))
        if kind == "raw":
            lines = [[f"{case.mz[m]:.3f}", *[f"{r[name][n]:.3f}" for name in names]] for n, m in enumerate(present)]
            print("\n" + table(f"{case.name}: r of every ion, raw", ["m/z", *names], lines))
    print(notes(runs))
    return rows


def example(folder: Path, quick: bool) -> list[Row]:
    """Wald's protocol on the paper's example: PSNR (peak 1) on tissue, blind."""
    full = replace(example_case(folder, 1), name="example-full", factor=2)
    fallback: Alignment | None = None
    try:
        fallback = fused(full, folder / "example-full.zarr", ["model.tier=T1"], **full.given()).alignment
    except InputError as error:
        print(f"full scale: {error}")
    rows: list[Row] = []
    for ratio in (4,) if quick else (2, 4):
        case = example_case(folder, ratio)
        runs = reconstruct(case, folder, ("T1",) if quick else ("T1", "auto"), fallback)
        if fallback is not None:
            found = runs.results["T1"]
            assert found.alignment is not None
            points = found.grid.centres_um()[case.inside[ratio // 2 :: ratio, ratio // 2 :: ratio]]
            off = np.linalg.norm(found.alignment.map(points) - fallback.map(points), axis=1)
            off = off / (np.sqrt(abs(np.linalg.det(fallback.matrix))) * found.grid.pitch_um[0] / ratio)
            runs.notes.append(f"alignment against full scale's: median {np.median(off):.2f} full-scale pixels")
        rows += _example_rows(case, runs, ratio) + consistency_rows(case, runs)
    return rows


def _example_rows(case: Case, runs: Runs, ratio: int) -> list[Row]:
    aim = {2: 21.2, 4: 18.3}[ratio]
    refused = any("refused blind" in note for note in runs.notes)
    names = ["bicubic", "opencv", "no-guide", "T1", "deep", "auto", "oracle"]
    names = [name for name in names if name in runs.images]
    parts = {"ion 505": [3], "embedding": [0, 1, 2]}
    rows, lines = [], []
    base: dict[str, float] = {}
    for name in ["no-guide", *[n for n in names if n != "no-guide"]]:
        cells = []
        given = refused and name in (*runs.results, "oracle") and name != "no-guide"
        for part, index in parts.items():
            inside = np.broadcast_to(case.inside, (len(index), *case.inside.shape))
            score = psnr(case.truth[index], runs.images[name][index], inside, 1.0)
            base.setdefault(part, score)
            cells += [f"{score:.2f}", f"{score - base[part]:+.2f}"]
            where = ", full-scale alignment" if given else ""
            goal = f" (aim >= {aim})" if part == "ion 505" else ""
            if name != "no-guide":
                what = f"{case.name}: {part}, {name}{where}, PSNR dB{goal}"
                rows.append(Row.of(what, score, "no-guide", base[part]))
        r = pearson(case.truth[3], runs.images[name][3], case.inside)
        lines.append([name + (" *" if given else ""), *cells, f"{r:.3f}"])
    header = ["", "ion 505", "gain", "embedding", "gain", "ion r"]
    print("\n" + table(f"{case.name}: PSNR dB, peak 1, on tissue; gains over no-guide", header, lines))
    print(("  * with the full-scale alignment\n" if refused else "") + notes(runs))
    return rows


CASES = {"phantom": phantom, "bladder": bladder, "deepfere-example": example}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed, 2 if a case cannot be run."""
    command = parser(__doc__.splitlines()[0], list(CASES))
    command.add_argument(
        "--work", metavar="DIR", help="keep files and results here, and take finished ones as they are"
    )
    given = command.parse_args(arguments)
    unknown = [name for name in given.cases if name not in CASES]
    if unknown:
        command.error(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")
    # The quick run without a case is the one that needs no real data.
    names = given.cases or (["phantom"] if given.quick else list(CASES))
    rows: list[Row] = []
    failed = False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="deepfere-fidelity-") as scratch:
        folder = Path(given.work or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            began = time.perf_counter()
            try:
                rows += CASES[name](folder, given.quick)
            except InputError as error:
                # Without a case on the command line, those whose data are absent are not wanted.
                left_out = isinstance(error, AbsentDataError) and not given.cases
                print(f"\n{name}: {'left out: ' if left_out else ''}{error}", file=sys.stderr)
                failed = failed or not left_out
                continue
            print(f"\n{name}: {time.perf_counter() - began:.0f} s", flush=True)
    code = finish(rows, given.json)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 2 if failed else code


if __name__ == "__main__":
    sys.exit(main())
