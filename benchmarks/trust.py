"""What a wrong or spoilt slide can do: ``python benchmarks/trust.py [CASE ...] [--quick] [--json FILE]``.

Cases: ``phantom`` and ``bladder`` (the alignment forced to wrong places, and a foreign slide forced: no ion may gain or
lose), and ``marks`` (a pen mark painted on the slide: detail added there, with and without recognising it).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cases import AbsentDataError, Case, bladder_case, phantom_case, real_data
from common import Row, chosen, finish, parser, table
from methods import decode, fused
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from deepfere.evaluation.metrics import pearson, psnr
from deepfere.frame import Alignment
from deepfere.phantom import PhantomSpec, write_phantom
from deepfere.readers.slide import open_slide, read_area
from deepfere.reconstruction.result import Result

TIER = ["model.tier=T1"]
INK = (20, 140, 60)


def wrong_places(right: Alignment, extent_um: tuple[float, float], pitch_um: float) -> dict[str, Alignment]:
    """The right place mirrored, turned and shifted about the section's centre."""
    middle = np.asarray(extent_um) / 2
    centre = right.map(middle[None])[0]
    turns = {"mirrored": np.diag([1.0, -1.0]), "turned by 180 degrees": -np.eye(2), "turned by 90": np.eye(2)[::-1]}
    out = {}
    for name, turn in turns.items():
        matrix = right.matrix @ turn
        out[name] = Alignment(matrix, centre - matrix @ middle)
    out["shifted by 3 pixels"] = Alignment(right.matrix, right.offset_um + 3 * pitch_um)
    return out


def forced(
    case: Case, folder: Path, score: Callable[[NDArray, NDArray], NDArray], unit: str, bar: float, foreign: Any
) -> list[Row]:
    """Largest change of any ion from no-guide, for every wrong place.

    Args:
        case: Files and truth.
        folder: Where results go.
        score: Scores (M,) of images against the truth.
        unit: Of the scores.
        bar: Change that is allowed.
        foreign: A foreign slide, its mpp and an alignment onto it; or None.
    """
    plain = fused(case, folder / f"{case.name}-plain.zarr", [], guide=False)
    base = score(case.truth, decode(case, plain))
    guided = fused(case, folder / f"{case.name}-right.zarr", TIER, **case.given())
    assert guided.alignment is not None
    places = wrong_places(guided.alignment, plain.grid.extent_um, float(np.mean(plain.grid.pitch_um)))
    runs: list[tuple[str, Path, Alignment, Any]] = [(n, case.slide, a, case.slide_mpp_um) for n, a in places.items()]
    if foreign is not None:
        runs.append(("foreign slide", *foreign))
    rows, lines = [], []
    for number, (name, slide, alignment, mpp) in enumerate([("right", None, None, None), *runs]):
        if slide is None:
            result = guided
        else:
            path = folder / f"{case.name}-{number}.json"
            alignment.save(path)
            other = Case(case.name, case.msi, slide, case.factor, case.truth, case.mz, case.inside, mpp, case.labels)
            result = fused(other, folder / f"{case.name}-{number}.zarr", TIER, alignment=path, **other.given())
        change = score(case.truth, decode(case, result)) - base
        change = change[np.isfinite(change)]
        opened = int((result.ions["informed"] != "smooth").sum())
        warned = any("informs no ion" in text for text in result.provenance["warnings"])
        lines.append([name, opened, f"{change.min():+.4f}", f"{change.max():+.4f}", "yes" if warned else ""])
        if name != "right":
            rows.append(Row.of(f"{case.name}, {name}: largest change, {unit}", abs(change).max(), must=f"<= {bar}"))
    header = ["place", "ions informed", "least change", "largest", "warned"]
    print("\n" + table(f"{case.name}: alignment forced, change from no-guide, {unit}", header, lines))
    return rows


def phantom(folder: Path, quick: bool) -> list[Row]:
    """PSNR of every ion of a generated section."""
    mpp = 3.0 if quick else 1.0
    case = phantom_case(folder, PhantomSpec(seed=0, slide_mpp_um=mpp))
    other = write_phantom(folder / "foreign", PhantomSpec(seed=1, slide_mpp_um=mpp))

    def score(truth: NDArray, images: NDArray) -> NDArray:
        return np.array(
            [
                psnr(t, e, case.inside, float(t[case.inside].max())) if np.isfinite(e).any() else np.nan
                for t, e in zip(truth, images, strict=True)
            ]
        )

    return forced(case, folder, score, "dB", 0.05, (other.slide, other.alignment(), None))


def bladder(folder: Path, quick: bool) -> list[Row]:
    """Pearson r of every ion that is present in more than 30 % of the pixels."""
    case = bladder_case(folder, 8)
    present = np.array([(t[case.inside] > 0).mean() > 0.3 for t in case.truth])
    smooth = [uniform_filter(t, 3, mode="nearest") for t in case.truth]

    def score(truth: NDArray, images: NDArray) -> NDArray:
        r = [pearson(t, e, case.inside) for t, e in zip(smooth, images, strict=True)]
        return np.where(present, r, np.nan)

    foreign = None
    try:
        slide = real_data("wsi", "CMU-1-Small-Region.svs")
        foreign = (slide, Alignment(0.75 * np.eye(2), np.array([20.0, 20.0])), None)
    except AbsentDataError:
        pass
    return forced(case, folder, score, "r", 0.002, foreign)


def marks(folder: Path, quick: bool) -> list[Row]:
    """Energy of the detail inside a painted pen mark, as a share of that without recognising it."""
    case = phantom_case(folder, PhantomSpec(seed=0, slide_mpp_um=3.0))
    slide = open_slide(str(case.slide))
    rgb, _ = read_area(slide, (0.0, 0.0), slide.shape_px, slide.mpp_um)
    assert case.alignment is not None
    shape = tuple(n // case.factor for n in case.inside.shape)
    middle = case.alignment.map(np.array([[25.0 * shape[0] + 200.0, 25.0 * shape[1]]]))[0] / slide.mpp_um[0]
    r, c = int(middle[0]), int(middle[1])
    side = (int(150 / slide.mpp_um[0]), int(400 / slide.mpp_um[1]))
    marked = rgb.copy()
    marked[r : r + side[0], c - side[1] : c + side[1]] = INK
    import tifffile

    path = folder / "marked.tif"
    tifffile.imwrite(path, marked, photometric="rgb")
    other = Case("marks", case.msi, path, case.factor, case.truth, case.mz, case.inside, slide.mpp_um[0], case.labels)
    energy = {}
    for name, how in (("recognised", "auto"), ("not recognised", "none")):
        target = folder / f"marks-{name.replace(' ', '-')}.zarr"
        result = fused(other, target, [*TIER, f"artefacts={how}"], **other.given())
        energy[name] = _energy(result, case.alignment, slide.mpp_um[0], (r, r + side[0], c - side[1], c + side[1]))
    lines = [[name, f"{value:.4g}"] for name, value in energy.items()]
    print("\n" + table("marks: mean squared detail inside a pen mark, all ions, in their s.d.", ["", "energy"], lines))
    share = energy["recognised"] / energy["not recognised"]
    return [Row.of("marks: energy of the detail inside, share of that without recognising it", share, must="<= 0.05")]


def _energy(result: Result, truth: Alignment, mpp_um: float, box_px: tuple[int, int, int, int]) -> float:
    """Mean square over ions and pixels of a slide's box of what the detail adds, in the ions' s.d."""
    at = truth.map(result.grid.refine(result.factor).centres_um()) / mpp_um
    r0, r1, c0, c1 = box_px
    inside = (at[..., 0] > r0) & (at[..., 0] < r1) & (at[..., 1] > c0) & (at[..., 1] < c1)
    table = result.ions
    total = 0.0
    for mz in table["mz"]:
        y = result.measured(float(mz))
        flat = result.ion(float(mz)).compute(scheduler="threads").astype(np.float64)
        spread = float(np.nanstd(y)) or 1.0
        added = flat - _plain(result, float(mz))
        total += float(np.nanmean((added[inside] / spread) ** 2))
    return total / len(table)


def _plain(result: Result, mz: float) -> NDArray[np.float64]:
    """The ion without its detail: interpolation with the same positivity steps."""
    from deepfere.measured.operator import fill_missing
    from deepfere.model.decode import IonDecoder
    from deepfere.model.guide import Cells

    y = fill_missing(np.asarray(result.measured(mz), np.float64), result.mask)
    steps = int(result.ions["nonneg_steps"].iloc[result.index(mz)])
    decoder = IonDecoder.build(y, np.zeros(1), result.factor, steps)
    return decoder.window(Cells(0, y.shape[0], 0, y.shape[1]), None)


CASES = {"phantom": phantom, "bladder": bladder, "marks": marks}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    given = parser(__doc__.splitlines()[0], list(CASES)).parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deepfere-trust-") as scratch:
        for name in chosen(given, CASES, "marks"):
            try:
                rows += CASES[name](Path(scratch), given.quick)
            except AbsentDataError as error:
                print(f"\n{name}: left out: {error}", file=sys.stderr)
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
