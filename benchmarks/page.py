"""``docs/fidelity.md`` from what ``benchmarks/fidelity.py --json`` wrote: nothing on the page is typed in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from common import markdown, signed
from methods import ROWS, ahead

from deepfere.errors import InputError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fidelity.md"
TITLES = {
    "phantom": "Generated sections",
    "bladder": "Mouse bladder, real 10 µm truth",
    "deepfere-example": "The DeepFERE paper's example",
}
ABOUT = {
    "phantom": "40 x 36 measured pixels, factor 8, about 400 counts at full scale (one more section: 30), true "
    "alignment affine and bent; the truth is known at every fine pixel and has no noise. Scored on all measured "
    "pixels.",
    "bladder": "A measurement with pixels of 10 µm, averaged to 80 µm (x8) and 160 µm (x16), and the slide of the same "
    "section. Scored on ions that are present in more than 30 % of the pixels. The truth has noise of its own: the "
    "smoothed truth has less. Square roots of counts have the same noise everywhere, so that r of them is not that of "
    "the few brightest pixels: the musts and the overview are of these.",
    "deepfere-example": "Wald's protocol: the published measurement (40 x 36 pixels, three embedding channels and one "
    "ion) averaged by 2 and by 4, reconstructed, and compared with itself on tissue.",
}
HEAD = """# Fidelity: how true the reconstructed ions are

Written by `python benchmarks/fidelity.py --write-docs` from a run; do not edit. [benchmarks.md](benchmarks.md) says how
the other benchmarks work, and what the cases need.
"""
OVERVIEW = """
Mean changes from `no-guide`, the same reconstruction without the stain. The oracle knows the truth: a ceiling, not a
method. All that averages back to the measurement keeps its noise. What smooths (bicubic, guided filter) gains where
noise dominates (ions without fine structure, few counts) and pays elsewhere, most with hot spots, and with the
measurement itself. `denoised` leaves the measurement too, as far as its counting noise is estimated to reach.
"""
FAIR = """
Methods that use the stain get the alignment and the stain features that deepfere found, so that only the fusion
differs. All choose their settings from the measurement alone; the truth only scores. Unmeasured pixels are filled
alike. *Off the measurement*: `max |A s - y| / max |y|` of the worst ion, how far a method's image, averaged back to the
measured pixels, contradicts them.
"""


def load(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Finished runs from their JSON.

    Raises:
        InputError: A file cannot be read, or is of another benchmark or of a quick run.
    """
    out = []
    for path in paths:
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be read: {error}", where=path, remedy="give what --json wrote") from error
        if not isinstance(values, dict) or not {"machine", "cases", "date", "rows"} <= set(values):
            raise InputError("is no result of this benchmark", where=path, remedy="give what --json wrote")
        if values.get("quick"):
            raise InputError("is of a quick run", where=path, remedy="run without --quick")
        out.append(values)
    return out


def merged(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cases and rows of several runs; where a case is in several, the last counts."""
    cases: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for name, case in run["cases"].items():
            cases[name] = case
            rows[name] = [row for row in run["rows"] if row["what"] in set(case["figures"])]
    order = [*[name for name in TITLES if name in cases], *[name for name in cases if name not in TITLES]]
    return {name: cases[name] for name in order}, [row for name in order for row in rows[name]]


def overview(cases: dict[str, Any], ours: str) -> str:
    """All methods against all cases."""
    columns = {column: values for case in cases.values() for column, values in case["overview"].items()}
    known = [method.name for method in ROWS]
    names = sorted({name for values in columns.values() for name in values}, key=known.index)
    rows = []
    for name in names:
        cells = []
        for column, values in columns.items():
            digits = 3 if column.endswith(" r") else 2
            value = values.get(name)
            cells.append("" if value is None else signed(value, digits))
        rows.append([name, *cells])
    return markdown(["", *columns], rows, ours) + "\n\n" + exceptions(columns, ours)


def exceptions(columns: dict[str, dict[str, float]], ours: str) -> str:
    """Columns in which a baseline is ahead of ours."""
    lines = []
    for column, values in columns.items():
        best = ahead(values, ours)
        lines += [f"- {column}: {', '.join(f'`{name}`' for name in best)}"] if best else []
    if not lines:
        return f"No baseline is ahead of `{ours}` in any column."
    return f"Baselines that are ahead of `{ours}`, the best first:\n\n" + "\n".join(lines)


def figure(value: float | None) -> str:
    """A figure of a row."""
    return "-" if value is None else f"{value:.4g}"


def musts(rows: Sequence[dict[str, Any]]) -> str:
    """What was met and what was missed."""
    judged = [row for row in rows if row["must"]]
    missed = [row for row in judged if not row["ok"]]
    out = [f"{len(judged) - len(missed)} of {len(judged)} met. The program ends with 1 where one is missed."]
    cells = [
        [
            row["what"],
            figure(row["value"]),
            "" if row["baseline"] is None else f"{row['against']} {figure(row['baseline'])}",
            row["must"],
            "met" if row["ok"] else "**missed**",
        ]
        for row in [*missed, *[row for row in judged if row["ok"]]]
    ]
    out.append(markdown(["what", "value", "against", "must", "verdict"], cells))
    return "\n\n".join(out)


def about_run(run: dict[str, Any]) -> str:
    """Date, machine and versions of a run."""
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cases = ", ".join(f"`{name}`" for name in run["cases"])
    return (
        f"- {cases}: {run['date']}, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, Python {machine['python']}; {versions}."
    )


def page(runs: Sequence[dict[str, Any]], ours: str = "auto") -> str:
    """The page.

    Args:
        runs: From `load`, or what a run is about to write.
        ours: The method that is set off.
    """
    cases, rows = merged(runs)
    shown = {name for case in cases.values() for values in case["overview"].values() for name in values}
    out = [HEAD, "## Overview", OVERVIEW.strip(), overview(cases, ours)]
    listed = [[f"`{m.name}`", m.about] for m in ROWS if m.name in shown or m.name == "no-guide"]
    lines = ["| row | what it is |", "|---|---|", *[f"| {name} | {about} |" for name, about in listed]]
    out += ["## Methods", FAIR.strip(), "\n".join(lines)]
    for name, case in cases.items():
        out += [f"## {TITLES.get(name, name)}", fill(ABOUT.get(name, ""), 120, break_on_hyphens=False)]
        for table in case["tables"]:
            if table["long"]:
                continue
            out.append(f"**{table['title']}**")
            out.append(markdown(table["header"], table["rows"], ours))
            out.append("\n".join(f"- {note}" for note in table["notes"]))
    out += ["## Musts", musts(rows), "## Where the figures come from", "\n".join(about_run(run) for run in runs)]
    left_out = sorted({name for run in runs for name in run["left_out"]} - set(cases))
    if left_out:
        out.append(f"Left out, because their data were absent: {', '.join(left_out)}.")
    out.append("Figures of single ions are in the JSON: `python benchmarks/fidelity.py --json fidelity.json`.")
    return "\n\n".join(part.strip() for part in out if part.strip()) + "\n"
