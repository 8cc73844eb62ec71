"""Borders between tissues: ``python benchmarks/boundaries.py [CASE ...] [--quick] [--paper] [--json FILE]``.

Case ``phantom``: the tissue classes of generated sections, and the infiltrate against all else, compared with
segmentations of every method's images by one rule that was learned on measured pixels. Beside them what the rule makes
of the oracle's images (the same stain features regressed on the truth) and of the true ones. ``--paper`` adds the
published model, at the alignment found: hours for each section, with ``--work`` resumable.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cases import Case, phantom_case
from common import Row, chosen, finish, parser, table
from methods import fused
from numpy.typing import NDArray
from oracle import oracle_images, stain_features

from deepfere.evaluation.label_scores import label_scores
from deepfere.evaluation.segmentation import Images
from deepfere.phantom import Phantom, PhantomSpec

OURS, PLAIN, PAPER = "ours", "no-guide run", "paper"
PRESET = Path(__file__).resolve().parents[1] / "configs" / "paper.yaml"
SEEDS = (0, 1)


def known_images(case: Case, cube: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], Images]:
    """Images (M, H, W) of a case's ions, as a method for `label_scores`."""
    f = case.factor

    def of(mz: NDArray[np.float64]) -> Images:
        rows = [int(np.abs(case.mz - one).argmin()) for one in mz]
        return lambda cells: cube[rows, cells.i0 * f : cells.i1 * f, cells.j0 * f : cells.j1 * f]

    return of


def phantom(folder: Path, quick: bool, preset: Path | None = None) -> list[Row]:
    """Boundary F1, Hausdorff-95 and Dice of generated sections; with the settings of ``preset`` as one more method."""
    rows: list[Row] = []
    specs = [PhantomSpec(seed=0, slide_mpp_um=3.0)] if quick else [PhantomSpec(seed=seed) for seed in SEEDS]
    tier = "T1" if quick else "auto"
    for spec in specs:
        case = phantom_case(folder, spec)
        source = Phantom.open(case.msi.parent)
        plain = fused(case, folder / f"{case.name}-no-guide.zarr", [], guide=False)
        ours = fused(case, folder / f"{case.name}-{tier}.zarr", [f"model.tier={tier}"], **case.given())
        assert ours.alignment is not None
        against = [f"{PLAIN}={plain.path}"]
        if preset is not None:
            place = folder / f"{case.name}-alignment.json"
            ours.alignment.save(place)
            told = {**case.given(), "alignment": place, "config": preset}
            against.append(f"{PAPER}={fused(case, folder / f'{case.name}-paper.zarr', [], **told).path}")
        oracle = np.nan_to_num(oracle_images(case, plain, ours, *stain_features(case, ours, ours.alignment)))
        more = {"oracle": known_images(case, oracle), "true images": known_images(case, case.truth)}
        classes, names = source.labels(), source.class_names()
        infiltrate = names.index("infiltrate")
        two = np.where(classes == 0, 0, np.where(classes == infiltrate, 1, 2)).astype(np.uint8)
        for what, labels, called in (("tissues", classes, names), ("infiltrate", two, ["", "infiltrate", "the rest"])):
            path = folder / f"{case.name}-{what}.npy"
            np.save(path, labels)
            block = label_scores(ours, path, against, more=more)
            rows += _rows(f"{case.name}, {what}", block, called)
    return rows


def _rows(name: str, block: dict, classes: list[str]) -> list[Row]:
    """A table, and rows against the run without the stain."""
    scores = {row["method"]: row for row in block["rows"]}
    head = [*(f"F1 at {tolerance:g} px" for tolerance in block["tolerances_px"]), "Hausdorff-95 px", "Dice"]
    found = {method: [*row["f1"], row["hausdorff95_px"], row["dice"]] for method, row in scores.items()}
    lines = [[method, *(f"{value:.3f}" for value in values)] for method, values in found.items()]
    print("\n" + table(f"{name}: borders, {len(block['classes'])} classes", ["images", *head], lines))
    names = [classes[value] for value in block["classes"]]
    lines = [[method, *(f"{value:.3f}" for value in row["class_dice"])] for method, row in scores.items()]
    print("\n" + table(f"{name}: Dice of every class", ["images", *names], lines))
    print("\n".join(f"  {note}" for note in block["notes"]))
    rows = []
    for method in [name for name in ("bicubic", PAPER, OURS, "oracle", "true images") if name in found]:
        for k, what in enumerate(head):
            rows.append(Row.of(f"{name}: {what}, {method}", found[method][k], PLAIN, found[PLAIN][k]))
    return rows


CASES = {"phantom": phantom}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    command = parser(__doc__.splitlines()[0], list(CASES))
    command.add_argument(
        "--work", metavar="DIR", help="keep files and results here, and take finished ones as they are"
    )
    command.add_argument("--paper", action="store_true", help="the published model as one method more: hours")
    given = command.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deepfere-boundaries-") as scratch:
        folder = Path(given.work or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen(given, CASES, "phantom"):
            rows += CASES[name](folder, given.quick, PRESET if given.paper else None)
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
