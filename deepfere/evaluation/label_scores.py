"""``evaluate --labels``: which method's images show the borders of given tissue labels best.

Every method's images are segmented by one rule (`deepfere.evaluation.segmentation`) and compared with the labels
(`deepfere.evaluation.boundaries`). No pipeline runs: results are decoded as they are.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.evaluation.boundaries import Agreement, agreement, border
from deepfere.evaluation.labels import Labels, majority, read_labels
from deepfere.evaluation.metrics import keys_bicubic
from deepfere.evaluation.segmentation import LEAST_PX, Images, learn, segment, signal_to_noise
from deepfere.measured.operator import fill_missing, take
from deepfere.model.guide import Cells
from deepfere.reconstruction.result import Result

MOST_IONS = 64
TOLERANCES_PX = (0.25, 0.5, 1.0, 2.0)
METHODS = ("bicubic", "no_guide", "ours")
READ_IONS = 64
PICTURE_PX = 320
COLOURS = ("#ffffff", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
"""Unlabelled, then class after class, from the start again after the last (Paul Tol's bright scheme)."""


@dataclass(frozen=True)
class Chosen:
    """The ions that are compared.

    Attributes:
        rows: Their rows in the result.
        cube: (M, ny, nx) float64 as measured, holes filled from their nearest neighbour.
    """

    rows: list[int]
    cube: NDArray[np.float64]


def label_scores(
    result: Result,
    path: str | Path,
    against: Iterable[str] = (),
    progress: Callable[[str, float], None] = lambda stage, share: None,
    more: Mapping[str, Callable[[NDArray[np.float64]], Images]] | None = None,
) -> dict[str, Any]:
    """Scores of a result, of bicubic, of the same without the stain, and of other results, against labels.

    Args:
        result: A finished result.
        path: Label image (see `deepfere.evaluation.labels.read_labels`).
        against: Other results of the same measurement, ``NAME=RESULT.zarr``.
        progress: Called with (what, share).
        more: Further images by name: called with the m/z of the ions that are compared, (M,).

    Returns:
        ``{"labels", "how", "classes", "colours", "labelled_px", "border_px", "ions", "blocks", "tolerances_px",
        "notes", "picture", "rows": [{"method", "f1": [..], "dice", "hausdorff95_px", "class_f1": [[..]],
        "class_dice": [..], "picture"}]}``; lengths are measured pixels, F1 is per tolerance, what is undefined or
        infinite is None.

    Raises:
        InputError: The labels or another result do not fit.
    """
    f, shape = result.factor, result.grid.shape_px
    others = _others(result, against)
    labels = read_labels(path, shape, f)
    given = int((labels.codes != 0).sum())
    labels = labels.inside(result.mask, f)
    coarse, labels, notes = _learnable(labels, result, path)
    left = given - int((labels.inside(result.mask, f).codes != 0).sum())
    if left > 0.01 * given:
        notes.append(
            f"{100 * left / given:.0f} % of the labelled pixels are not used: not measured, or of a class left out"
        )
    chosen = _choose(result, [other for _, other in others])
    rule = learn(chosen.cube, result.mask, coarse)
    values = [labels.values[code - 1] for code in rule.codes]
    names = {int(code): value for code, value in zip(rule.codes, values, strict=True)}
    if rule.unseen:
        told = ", ".join(str(names[code]) for code in rule.unseen)
        notes.append(f"class {told} lies in one place: hardly any of it is left to learn from when it is scored")
    length = len(border(labels.codes).points)
    if not length:
        notes.append("no two classes touch: there is no border to score, only Dice")
    wanted = _any_inside(labels.codes, f)
    mz = np.asarray(result.ions["mz"], np.float64)[chosen.rows]
    methods = _methods(result, chosen, others) | {
        name: (lambda make=make: make(mz)) for name, make in (more or {}).items()
    }
    rows = []
    for number, (name, images) in enumerate(methods.items()):
        progress(f"labels {name}", number / len(methods))
        found = segment(rule, images(), wanted, f)
        found[labels.codes == 0] = 0
        scores = agreement(labels.codes, found, [int(code) for code in rule.codes], f, TOLERANCES_PX)
        rows.append(_row(name, scores) | {"picture": _picture(found)})
    return {
        "labels": str(Path(path).absolute()),
        "how": labels.how,
        "classes": values,
        "colours": [COLOURS[1 + (int(code) - 1) % (len(COLOURS) - 1)] for code in rule.codes],
        "labelled_px": int((labels.codes != 0).sum()),
        "border_px": length / f,
        "ions": len(chosen.rows),
        "blocks": len(rule.weights),
        "tolerances_px": list(TOLERANCES_PX),
        "notes": notes,
        "picture": _picture(labels.codes),
        "rows": rows,
    }


def _others(result: Result, against: Iterable[str]) -> list[tuple[str, Result]]:
    """The other results, by name."""
    found: list[tuple[str, Result]] = []
    for text in against:
        name, _, path = text.partition("=")
        name = name.strip()
        taken = (*METHODS, *(known for known, _ in found))
        if not name or not path:
            raise InputError(f"{text!r} is no NAME=RESULT", where="--against", remedy="give plain=other.zarr")
        if name in taken:
            raise InputError(f"the name {name!r} is taken", where="--against", remedy="choose another name")
        other = Result(path)
        if (other.grid.shape_px, other.factor) != (result.grid.shape_px, result.factor):
            (ny, nx), (my, mx) = result.grid.shape_px, other.grid.shape_px
            raise InputError(
                f"has {my} x {mx} measured pixels x{other.factor}, not {ny} x {nx} x{result.factor}",
                where=path,
                remedy="compare results of one measurement and factor",
            )
        found.append((name, other))
    return found


def _learnable(labels: Labels, result: Result, path: str | Path) -> tuple[NDArray[np.uint8], Labels, list[str]]:
    """Labels of the measured pixels, and those that are left once classes too rare to be learned are gone."""
    if not (labels.codes != 0).any():
        what = "no labelled pixel was measured" if labels.values else "every pixel is 0 (unlabelled)"
        raise InputError(what, where=path, remedy="label tissue inside the measured area")
    coarse = np.where(result.mask, majority(labels.codes, result.factor), np.uint8(0))
    counts = np.bincount(coarse.ravel(), minlength=len(labels.values) + 1)
    here = [int(code) for code in np.unique(labels.codes) if code]
    rare = {code for code in here if counts[code] < LEAST_PX}
    notes = [
        f"class {labels.values[code - 1]} is left out: in {counts[code]} measured pixels only has it the majority"
        for code in sorted(rare)
    ]
    left = [code for code in here if code not in rare]
    if len(left) < 2:
        told = f"only one class ({labels.values[left[0] - 1]})" if left else "no class"
        raise InputError(
            f"{told} has the majority in {LEAST_PX} or more measured pixels",
            where=path,
            remedy="label at least two tissues, each some measured pixels large",
        )
    return np.where(np.isin(coarse, left), coarse, np.uint8(0)), labels.without(rare), notes


def _any_inside(codes: NDArray[np.uint8], factor: int) -> NDArray[np.bool_]:
    h, w = codes.shape
    return (codes.reshape(h // factor, factor, w // factor, factor) != 0).any(axis=(1, 3))


def _choose(result: Result, others: list[Result]) -> Chosen:
    """The ions that stand out of their noise most, of those that every result has.

    Raises:
        InputError: Another result was made from other values, or no ion carries a signal.
    """
    mz = np.asarray(result.ions["mz"], np.float64)
    common = [m for m in range(len(mz)) if all(_row_of(other, mz[m]) is not None for other in others)]
    strength = np.zeros(len(mz))
    for start in range(0, len(common), READ_IONS):
        rows = common[start : start + READ_IONS]
        strength[rows] = signal_to_noise(_measured(result, rows), result.mask)[0]
    order = [m for m in np.argsort(-strength, kind="stable") if strength[m] > 0][:MOST_IONS]
    if not order:
        raise InputError(
            "no ion varies over the section" if not others else "the results have no ion in common that varies",
            where=result.path,
            remedy="give results of one measurement",
        )
    rows = sorted(int(m) for m in order)
    cube = _measured(result, rows)
    for other in others:
        theirs = _measured(other, [_row_of(other, mz[m]) or 0 for m in rows])
        top = np.abs(cube[:, result.mask]).max(axis=1)[:, None]
        both = (other.mask == result.mask).all()
        if not both or not (np.abs(theirs - cube)[:, result.mask] <= 1e-3 * top).all():
            raise InputError(
                "was made from other measured values",
                where=other.path,
                remedy="compare results of one measurement and normalisation",
            )
    return Chosen(rows, fill_missing(cube, result.mask))


def _row_of(result: Result, mz: float) -> int | None:
    try:
        return result.index(float(mz))
    except InputError:
        return None


def _measured(result: Result, rows: list[int]) -> NDArray[np.float64]:
    """(M, ny, nx) as measured and normalised; NaN = not measured."""
    store = result._measured
    picked = store.ions.get_orthogonal_selection((np.asarray(rows, np.int64), slice(None), slice(None)))
    cube = np.asarray(picked, np.float64)
    factor = store.factor(result.normalisation)  # type: ignore[arg-type]
    return cube if factor is None else cube * factor


def _methods(result: Result, chosen: Chosen, others: list[tuple[str, Result]]) -> dict[str, Callable[[], Images]]:
    """Every method's images by name; each is prepared when it is asked for, and let go afterwards."""
    mz = result.ions["mz"]
    out: dict[str, Callable[[], Images]] = {
        "bicubic": lambda: _bicubic(chosen.cube, result.factor),
        "no_guide": lambda: _decoded(result, chosen.rows, guided=False),
    }
    if result.provenance["config"]["guide"]:
        out["ours"] = lambda: _decoded(result, chosen.rows)
    for name, other in others:
        rows = [_row_of(other, float(mz.iloc[m])) or 0 for m in chosen.rows]
        out[name] = lambda other=other, rows=rows: _decoded(other, rows)  # type: ignore[misc]
    return out


def _bicubic(cube: NDArray[np.float64], factor: int) -> Images:
    def images(cells: Cells) -> NDArray[np.float64]:
        # Keys' kernel reaches two measured pixels; beyond the grid its edge repeats, as in the whole image.
        wide = take(cube, cells.i0 - 2, cells.i1 + 2, cells.j0 - 2, cells.j1 + 2)
        cut = slice(2 * factor, -2 * factor)
        return np.stack([keys_bicubic(ion, factor)[cut, cut] for ion in wide])

    return images


def _decoded(result: Result, rows: list[int], guided: bool = True) -> Images:
    decoders = [result.decoder(m) for m in rows]
    # Ions with equal positivity steps ask for the same window, one after another.
    detail = lru_cache(maxsize=4)(result.detail)

    def images(cells: Cells) -> NDArray[np.float64]:
        return np.stack([decoder.window(cells, detail if guided else None) for decoder in decoders])

    return images


def _row(name: str, scores: Agreement) -> dict[str, Any]:
    return {
        "method": name,
        "f1": [_finite(value) for value in scores.f1],
        "dice": _finite(scores.dice),
        "hausdorff95_px": _finite(scores.hausdorff95_px),
        "class_f1": [[_finite(value) for value in row] for row in scores.class_f1],
        "class_dice": [_finite(value) for value in scores.class_dice],
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _picture(codes: NDArray[np.uint8]) -> str:
    """A small PNG of a segmentation, as a data URI."""
    from PIL import Image

    step = -(-max(codes.shape) // PICTURE_PX)
    image = Image.fromarray(codes[step // 2 :: step, step // 2 :: step])
    colours = [COLOURS[0], *(COLOURS[1 + k % (len(COLOURS) - 1)] for k in range(255))]
    image.putpalette([int(colour[k : k + 2], 16) for colour in colours for k in (1, 3, 5)])
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def render_labels(block: dict[str, Any]) -> str:
    """The scores against one label image as text for a terminal."""
    head = [f"F1 {tolerance:g} px" for tolerance in block["tolerances_px"]]
    head += ["HD95 px", "Dice", *(f"Dice {value}" for value in block["classes"])]
    cells = [
        [row["method"], *map(_text, [*row["f1"], row["hausdorff95_px"], row["dice"], *row["class_dice"]])]
        for row in block["rows"]
    ]
    widths = [max(map(len, column)) for column in zip(["", *head], *cells, strict=True)]
    lines = [
        f"labels {block['labels']} ({block['how']}): {block['labelled_px']} pixels, borders of "
        f"{block['border_px']:.0f} measured pixels; {block['ions']} ions, {block['blocks']} blocks left out in turn"
    ]
    for row in (["", *head], *cells):
        columns = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *columns]))
    return "\n".join([*lines, *(f"  {note}" for note in block["notes"])])


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
