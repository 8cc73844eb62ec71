"""Damage painted on a slide: ``python benchmarks/painted.py [CASE ...] [--quick] [--json FILE] [--places N]``.

Cases: ``phantom-0``, ``phantom-1`` (generated sections as in the demo) and ``bladder``. Tears, folds and pen marks of
random place, direction, width, edge and strength are painted on the clean slide, one at a time, and the section is
fused with artefacts masked and with ``artefacts=none``, at the alignment of the clean slide. What counts is the detail:

* **inside**: energy of the detail in the painted region, as far as tissue was there, with masking over without;
* **added**: energy of the detail less that of the clean slide, in the region and one measured pixel around it, where
  there is detail: pixels that are masked get none, so nothing is added to them;
* **changed**: the same with the masked pixels, which lose the detail that the clean slide gave: **lost** is that alone.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from cases import AbsentDataError, Case, bladder_case, phantom_case
from common import Row, chosen, finish, parser, table
from methods import fused
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter

from deepfere.evaluation.metrics import psnr
from deepfere.frame import Alignment
from deepfere.model.features import stain_reference
from deepfere.model.guide import Cells
from deepfere.phantom import PhantomSpec
from deepfere.readers.slide import open_slide, read_area
from deepfere.reconstruction.result import Result

TIER = ["model.tier=T1"]
INKS = ((20, 140, 60), (30, 40, 160))
KINDS = ("tear", "fold", "pen")
SUMS = ("inside", "added", "changed", "lost")
MUST = 0.05


@dataclass(frozen=True)
class Picture:
    """A slide in memory: rgb (h, w, 3), its pixel size (y, x) in um, its glass and where tissue lies (h, w)."""

    rgb: NDArray[np.uint8]
    mpp_um: tuple[float, float]
    white: NDArray[np.float64]
    tissue: NDArray[np.bool_]


def picture_of(case: Case) -> Picture:
    """The case's slide at its full resolution."""
    slide = open_slide(str(case.slide), case.slide_mpp_um)
    rgb, cover = read_area(slide, (0.0, 0.0), slide.shape_px, slide.mpp_um)
    reference = stain_reference(rgb, cover)
    white = np.asarray(reference.white)
    density = -np.log10((rgb.astype(np.float32).mean(2) + 1) / (white.mean() + 1))
    side = max(1, int(20 / min(slide.mpp_um)))
    solid = gaussian_filter((density > min(0.1, reference.tissue_od)).astype(np.float32), side / 2) > 0.5
    return Picture(rgb, slide.mpp_um, white, solid)


def band(
    rng: np.random.Generator,
    shape: tuple[int, int],
    centre: NDArray[np.float64],
    size: tuple[float, float],
    bend: float,
    soft: float,
    ragged: float,
    taper: bool = False,
) -> NDArray[np.float64]:
    """Opacity (h, w) of an irregular band; lengths in slide pixels.

    Args:
        rng: Random numbers.
        shape: Of the slide.
        centre: Row and column.
        size: Length and mean width.
        bend: Largest turn to either side, radians.
        soft: Width of its edge.
        ragged: Relative s.d. of the width.
        taper: Narrow at one end and wide at the other.
    """
    steps = max(2, int(size[0]))
    turn = gaussian_filter(rng.normal(size=steps), steps / 6)
    heading = rng.uniform(0, np.pi) + turn * bend / (np.abs(turn).max() + 1e-9)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)], 1), 0)
    path = centre + path - path.mean(0)
    width = gaussian_filter(rng.normal(size=steps), max(1.0, steps / 20))
    width = size[1] / 2 * np.clip(1 + ragged * width / (width.std() + 1e-9), 0.4, 1.8)
    if taper:
        width = width * np.linspace(0.15, 1.6, steps)
    number = np.full(shape, -1)
    at = path.round().astype(int)
    on = ((at >= 0) & (at < shape)).all(1)
    number[at[on, 0], at[on, 1]] = np.flatnonzero(on)
    distance, nearest = distance_transform_edt(number < 0, return_indices=True)
    return np.clip((width[number[nearest[0], nearest[1]]] - distance) / max(soft, 0.5) + 0.5, 0, 1)


def paint(
    picture: Picture, kind: str, pitch_px: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float64], str]:
    """The slide with one mark, its opacity (h, w), and what it is in words."""
    deep = distance_transform_edt(picture.tissue)
    rows = np.argwhere(deep > pitch_px)
    centre = rows[rng.integers(len(rows))].astype(np.float64)
    length, width = rng.uniform(8, 14), rng.uniform(1, 3 if kind == "tear" else 2)
    soft, strength = rng.uniform(0.02, 0.35), rng.uniform(1.5, 2.5)
    taper = bool(rng.random() < 0.3)
    size = (length * pitch_px, width * pitch_px)
    shape = picture.rgb.shape[:2]
    alpha = band(rng, shape, centre, size, rng.uniform(0, 1.2), soft * pitch_px, rng.uniform(0, 0.4), taper)
    cover, rgb = alpha[..., None], picture.rgb.astype(np.float64)
    words = f"{length:.0f} x {width:.1f}, edge {soft:.2f}"
    if kind == "fold":
        density = np.log10((picture.white + 1) / (rgb + 1)) * (1 + (strength - 1) * cover)
        out = (picture.white + 1) * 10**-density - 1
        words += f", {strength:.1f} times as dense"
    else:
        ink = np.asarray(INKS[int(rng.integers(2))])
        colour = picture.white if kind == "tear" else ink
        out = rgb * (1 - cover) + cover * (colour + rng.normal(0, 1.5, rgb.shape))
    return np.clip(out + 0.5, 0, 255).astype(np.uint8), alpha, words


def detail(result: Result) -> NDArray[np.float64]:
    """What the stain adds to each ion (M, H, W), in that ion's s.d. over the section, before positivity."""
    basis = result._basis
    spread = np.array([float(np.nanstd(result.measured(float(mz)))) or 1.0 for mz in result.ions["mz"]])
    loadings = basis["gate"][:, None] * basis["loadings"] * basis["detail_scale"] / spread[:, None]
    ny, nx = result.grid.shape_px
    planes = np.asarray(result.detail(Cells(0, ny, 0, nx)), np.float64)
    return np.einsum("mk,kyx->myx", loadings, planes)


def at_section(alpha: NDArray[np.float64], mpp_um: tuple[float, float], result: Result, place: Alignment) -> Any:
    """Opacity on the section's fine grid, (H, W) bool above one half."""
    at = np.floor(place.map(result.grid.refine(result.factor).centres_um()) / np.asarray(mpp_um)).astype(int)
    on = ((at >= 0) & (at < alpha.shape)).all(-1)
    at = np.clip(at, 0, np.array(alpha.shape) - 1)
    return on & (alpha[at[..., 0], at[..., 1]] > 0.5)


def gain_elsewhere(case: Case, clean: Result, now: Result, near: NDArray[np.bool_]) -> float:
    """Mean change of PSNR (dB) over the informed ions, away from the mark."""
    seen, changes = case.inside & ~near, []
    for mz, informed in zip(clean.ions["mz"], clean.ions["informed"], strict=True):
        if informed == "smooth":
            continue
        truth = case.truth[int(np.abs(case.mz - mz).argmin())]
        top = float(truth[case.inside].max())
        scores = [psnr(truth, r.ion(float(mz)).compute(scheduler="threads"), seen, top) for r in (now, clean)]
        changes.append(scores[0] - scores[1])
    return float(np.mean(changes))


def painted(case: Case, folder: Path, places: int, first: int) -> list[Row]:
    """All kinds at so many places of one case."""
    clean = fused(case, folder / f"{case.name}-clean.zarr", TIER, **case.given())
    assert clean.alignment is not None
    placed = folder / f"{case.name}.json"
    clean.alignment.save(placed)
    picture, f = picture_of(case), clean.factor
    kinds = clean.artefacts()
    assert kinds is not None
    small = clean.overview()
    assert small is not None
    tissue = (picture.tissue.mean() * picture.tissue.size) * np.prod(picture.mpp_um)
    masked = float((kinds > 1).sum() * np.prod(small[1]) / tissue)
    pitch_px = float(np.mean(clean.grid.pitch_um)) / float(np.mean(picture.mpp_um))
    before = detail(clean)
    rows = [Row.of(f"{case.name}: share of the clean slide's tissue that is masked", masked, must="<= 0.002")]
    lines: list[list[str]] = []
    sums: dict[tuple[str, str], NDArray[np.float64]] = {}
    for kind in KINDS:
        for place in range(first, first + places):
            rng = np.random.default_rng([place, KINDS.index(kind)])
            rgb, alpha, words = paint(picture, kind, pitch_px, rng)
            path = folder / "painted.tif"
            tifffile.imwrite(path, rgb, photometric="rgb")
            other = replace(case, slide=path)
            energy: dict[str, list[float]] = {}
            for how in ("auto", "none"):
                result = fused(
                    other,
                    folder / "painted.zarr",
                    [*TIER, f"artefacts={how}"],
                    alignment=placed,
                    slide_mpp_um=picture.mpp_um,
                )
                inside = at_section(alpha * picture.tissue, picture.mpp_um, result, clean.alignment) & case.inside
                near = binary_dilation(inside, iterations=f)
                now = detail(result)
                given = near & (now != 0).any(0)
                change = (now - before) ** 2
                energy[how] = [float(e.sum()) for e in (now[:, inside] ** 2, change[:, given], change[:, near])]
                if how == "auto":
                    found = result.artefacts()
                    assert found is not None
                    hit = at_section((found > 0).astype(float), small[1], result, clean.alignment)
                    share = float(hit[inside].mean())
                    spilt = float((hit & case.inside & ~near).sum() / case.inside.sum())
                    gain = gain_elsewhere(case, clean, result, near)
                    energy["auto"].append(float((before[:, near & ~given] ** 2).sum()))
            energy["none"].append(energy["none"][-1])
            for name, *pair in zip(SUMS, energy["auto"], energy["none"], strict=True):
                total = sums.setdefault((kind, name), np.zeros(2))
                total += pair
            ratio = [a / n if n else np.nan for a, n in zip(energy["auto"], energy["none"], strict=True)]
            cells = [f"{100 * v:.1f}" for v in (share, *ratio, spilt)]
            lines.append([f"{kind} {place}: {words}", *cells, f"{gain:+.3f}"])
            print(" | ".join(lines[-1]), flush=True)
    header = ["mark (measured pixels)", "masked %", *[f"{name} %" for name in SUMS], "spilt %", "elsewhere dB"]
    print("\n" + table(f"{case.name}: energy with masking, % of that without", header, lines))
    for (kind, name), (auto, none) in sums.items():
        must = f"<= {MUST}" if name in ("inside", "added") else ""
        rows.append(Row.of(f"{case.name}, {kind}: {name}, energy with masking over without", auto / none, must=must))
    return rows


def _phantom(seed: int, folder: Path, quick: bool) -> Case:
    return phantom_case(folder, PhantomSpec(seed=seed, slide_mpp_um=3.0 if quick else 1.0))


CASES = {
    "phantom-0": lambda folder, quick: _phantom(0, folder, quick),
    "phantom-1": lambda folder, quick: _phantom(1, folder, quick),
    "bladder": lambda folder, quick: bladder_case(folder, 8),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    options = parser(__doc__.splitlines()[0], list(CASES))
    options.add_argument("--places", type=int, default=4, help="places of each kind of mark")
    options.add_argument("--first", type=int, default=0, help="number of the first place; others are other marks")
    given = options.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deepfere-painted-") as scratch:
        for name in chosen(given, CASES, "phantom-0"):
            try:
                case = CASES[name](Path(scratch), given.quick)
                rows += painted(case, Path(scratch), 1 if given.quick else given.places, given.first)
            except AbsentDataError as error:
                print(f"\n{name}: left out: {error}", file=sys.stderr)
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
