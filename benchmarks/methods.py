"""The methods that the fidelity benchmark compares, and how all of them are run on a case."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import kept
import numpy as np
from baselines import Seen
from cases import Case
from numpy.typing import NDArray
from oracle import covered_cells, nearest, oracle_images, stain_features

from deepfere.alignment.placement import describe
from deepfere.errors import IdentityError, InputError
from deepfere.evaluation.metrics import fill_nearest
from deepfere.frame import Alignment
from deepfere.model.features import FEATURES
from deepfere.pipeline import fuse
from deepfere.reconstruction.result import Result

Images = NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """One row of every table.

    Attributes:
        name: In tables, in JSON and in names of files.
        about: What it is and where it comes from, for the page; markdown.
        images: A baseline: from what may be seen of a case to the images (M, H, W).
        settings: A run of deepfere: what differs from the default settings.
        stain: Whether it uses the stain.
        quick: Whether it takes part in quick runs.
    """

    name: str
    about: str
    images: Callable[[Seen], Images] | None = None
    settings: tuple[str, ...] | None = None
    stain: bool = True
    quick: bool = True


def _plain(name: str, about: str, method: Callable[[Images, int], Images]) -> Method:
    return Method(name, about, lambda seen: method(seen.cells, seen.factor), stain=False)


METHODS = (
    _plain("nearest", "the measured pixels as they are", baselines.nearest),
    _plain("bicubic", "Keys 1981, a = -1/2, half-pixel centres", baselines.bicubic),
    _plain("opencv", "OpenCV's `INTER_CUBIC`, a = -3/4", baselines.opencv_cubic),
    _plain("P", "quadratic spline whose footprint means are the measurement (de Boor 1978)", baselines.exact),
    _plain(
        "back-projection",
        "bicubic, corrected by its interpolated residual until it agrees to 1e-6 (Irani and Peleg 1991)",
        baselines.back_projected,
    ),
    Method(
        "guided filter",
        f"He, Sun and Tang 2013: bicubic, filtered with the optical densities of the stain; radius one measured pixel, "
        f"eps {baselines.EPS:g} of the guide's variance",
        baselines.guided,
    ),
    Method("guided filter + P", "the same, and P of what it leaves of the measurement", baselines.consistent_guided),
    Method(
        "ridge",
        "ridge of each ion on the pooled stain features, penalty by blocks left out, applied at high resolution",
        baselines.ridge,
    ),
    Method("ridge + P", "the same, and P of what it leaves of the measurement", baselines.consistent_ridge),
    Method(
        "PLS",
        "partial least squares (SIMPLS, de Jong 1993; the kind of regression of Van de Plas et al. 2015), number of "
        "components by blocks left out, applied at high resolution",
        baselines.pls,
    ),
    Method("PLS + P", "the same, and P of what it leaves of the measurement", baselines.consistent_pls),
    Method("no-guide", "deepfere without the stain: P, kept positive", settings=(), stain=False),
    Method("T1", "deepfere, closed form", settings=("model.tier=T1",)),
    Method(
        "auto",
        "deepfere as it is used by default: the tier that blocks left out favour",
        settings=("model.tier=auto",),
        quick=False,
    ),
    Method("deep", "deepfere, network forced", settings=("model.tier=T2",), quick=False),
)
DENOISED = Method("denoised", "the denoised mode of the default run: counting noise taken out of the measurement first")
ORACLE = Method(
    "oracle", "all regressors of T1 regressed on the truth, at the alignment found: a ceiling, not a method"
)
LINEAR = Method("linear oracle", "the same with the stain features alone: what is linear in the stain can give no more")
TRUE_PLACE = Method("oracle, true place", "the same at the true alignment, where it is known")
PAPER = Method(
    "paper",
    "the published DeepFERE model (Guo et al. 2023; `configs/paper.yaml`), trained for one ion at 16 times the "
    "measured resolution, averaged to the compared one; computed once and kept",
)
BASELINES = (*[method for method in METHODS if method.images is not None], PAPER)
RUNS = [method for method in METHODS if method.settings is not None]
ROWS = (*BASELINES, *RUNS, DENOISED, ORACLE, LINEAR, TRUE_PLACE)
STAINED = {method.name for method in ROWS if method.stain}


def ahead(values: dict[str, float], ours: str) -> list[str]:
    """Baselines with a higher value than ours, the best first: nobody should have to search for them."""
    names = [m.name for m in BASELINES if values.get(m.name, -np.inf) > values[ours]]
    return sorted(names, key=lambda name: -values[name])


@dataclass
class Runs:
    """Every method's images of one case.

    Attributes:
        images: Name -> (M, H, W); NaN images for ions that were not found. In the order of `ROWS`.
        results: Name -> the opened result, where there is one.
        seconds: Name -> seconds of all its stages, as its provenance says; of baselines, of the images alone.
        notes: What a reader must know.
        ours: The method that is judged.
        refused: Whether the blind alignment was refused, and another given.
    """

    images: dict[str, Images] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ours: str = "auto"
    refused: bool = False

    def names(self, *left_out: str) -> list[str]:
        """Names of the methods that have images."""
        return [m.name for m in ROWS if m.name in self.images and m.name not in left_out]


def decode(case: Case, result: Result, denoised: bool = False) -> Images:
    """The case's images from a result, (M, H, W)."""
    out = np.full(case.truth.shape, np.nan)
    for m, mz in enumerate(case.mz):
        near = nearest(result, float(mz))
        if near is not None:
            out[m] = result.ion(near, denoised=denoised).compute(scheduler="threads")
    return out


def measured(case: Case, result: Result) -> Images:
    """The case's ions as a result's section measured them, (M, ny, nx); NaN where not measured, or not found."""
    out = np.full((len(case.mz), *result.mask.shape), np.nan)
    for m, mz in enumerate(case.mz):
        near = nearest(result, float(mz))
        if near is not None:
            out[m] = result.measured(near)
    return out


def fused(case: Case, target: Path, overrides: list[str], **given: Any) -> Result:
    """`fuse` without tracking; a finished result of the same inputs and settings is taken as it is."""
    slide = None if given.get("guide") is False else case.slide
    settings = ["tracking.uri=none", *overrides]
    try:
        return fuse(case.msi, slide, target, factor=case.factor, overrides=settings, **given)
    except IdentityError:
        return fuse(case.msi, slide, target, factor=case.factor, overrides=settings, overwrite=True, **given)


def run_deepfere(case: Case, folder: Path, runs: Runs, quick: bool, fallback: Alignment | None) -> None:
    """All runs of deepfere on a case, into ``runs``.

    Args:
        case: Files and truth.
        folder: Where results go.
        runs: Filled.
        quick: Only those of the quick run.
        fallback: Alignment to use where the search refuses.
    """
    given = case.given()
    for method in METHODS:
        if method.settings is None or (quick and not method.quick):
            continue
        name, chosen = method.name, runs.results.get("auto")
        if name == "deep" and chosen is not None and chosen.provenance["model"]["tier"] == "T2":
            # The same training and the same choices: forcing the tier would repeat this run.
            runs.images[name], runs.results[name] = runs.images["auto"], chosen
            continue
        run = partial(fused, case, folder / f"{case.name}-{name.replace(' ', '-')}.zarr", list(method.settings))
        print(f"  {case.name}: {name} ...", file=sys.stderr, flush=True)
        try:
            result = run(**given) if method.stain else run(guide=False)
        except InputError as error:
            if fallback is None or "alignment" in given or not method.stain:
                raise
            runs.notes.append(f"refused blind ({error}): scored with the full-scale alignment")
            runs.refused = True
            path = folder / f"{case.name}-full-scale-alignment.json"
            fallback.save(path)
            given["alignment"] = path
            result = run(**given)
        runs.images[name], runs.results[name] = decode(case, result), result
        runs.seconds[name] = sum(result.provenance["timings_s"].values())


def reconstruct(
    case: Case, folder: Path, quick: bool = False, fallback: Alignment | None = None, recompute: bool = False
) -> Runs:
    """Run every method on a case.

    Args:
        case: Files and truth.
        folder: Where results go; finished ones are taken as they are.
        quick: Only the methods of the quick run.
        fallback: Alignment to score with where the search refuses; such results are labelled.
        recompute: Run the published model, too, where an image of it is kept, and keep the new one.
    """
    runs = Runs(ours="T1" if quick else "auto")
    run_deepfere(case, folder, runs, quick, fallback)
    plain, ours = runs.results["no-guide"], runs.results[runs.ours]
    assert ours.alignment is not None
    features, cover = stain_features(case, ours, ours.alignment)
    cells = measured(case, plain)
    found = np.flatnonzero(np.isfinite(cells).any((1, 2)))
    # The same filling of holes for all: from the nearest measured pixel.
    filled = np.stack([fill_nearest(cells[m]) for m in found])
    # Types belong to T1; what others regress on is the stain.
    seen = Seen(filled, case.factor, features[: len(FEATURES)], covered_cells(cover, plain))
    for method in METHODS:
        if method.images is not None:
            began = time.perf_counter()
            runs.images[method.name] = np.full(case.truth.shape, np.nan)
            runs.images[method.name][found] = method.images(seen)
            runs.seconds[method.name] = time.perf_counter() - began
    if case.name in kept.PUBLISHED:
        # Without the joint refinement, which depends on the network that competes.
        place = runs.results["T1"]
        if recompute and place.alignment is not None:
            kept.compute(case, kept.PUBLISHED[case.name], place.alignment, folder)
        images, note = kept.kept_image(case, place)
        runs.notes.append(note)
        if images is not None:
            runs.images[PAPER.name] = images
    runs.images[DENOISED.name] = decode(case, ours, denoised=True)
    runs.images[ORACLE.name] = oracle_images(case, plain, ours, features, cover)
    runs.images[LINEAR.name] = oracle_images(case, plain, ours, features, cover, linear=True)
    if case.alignment is not None and not quick:
        right = stain_features(case, ours, case.alignment)
        runs.images[TRUE_PLACE.name] = oracle_images(case, plain, ours, *right)
    if "auto" in runs.results:
        runs.notes.append(f"auto chose {runs.results['auto'].provenance['model']['tier']}")
    flip, rotation, scale = describe(ours.alignment)
    stages = [f"{s['stage']}{'' if s['kept'] else ' (not kept)'}" for s in ours.alignment.evidence.get("stages", [])]
    runs.notes.append(f"alignment: flip {flip}, {rotation:.1f} degrees, scale {scale:.3f}; {', '.join(stages)}")
    runs.notes.append(f"oracle: in-sample, at the alignment and with the positivity steps of {runs.ours}")
    seconds = ", ".join(f"{name} {runs.seconds[name]:.0f} s" for name in runs.results if name in runs.seconds)
    slowest = max(value for name, value in runs.seconds.items() if name not in runs.results)
    # Not among the notes: results may have been taken as they were, from another hour of a busy machine.
    print(f"  {case.name}: seconds: {seconds}; slowest baseline {slowest:.0f} s, alignment left out", file=sys.stderr)
    return runs
