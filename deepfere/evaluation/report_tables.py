"""The report's words and tables: plain values, formatted for the template."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

EXACT = 1e-6
METHODS = {"bicubic": "bicubic", "no_guide": "no stain (--no-guide)", "ours": "deepfere"}
RANK = {"stain-informed": 0, "partly": 1, "smooth": 2}


def number(value: Any, spec: str = ".2f") -> str:
    """A number for a table cell; an en dash where there is none."""
    try:
        plain = float(value)
    except (TypeError, ValueError):
        return "–"
    if math.isnan(plain):
        return "–"
    if math.isinf(plain):
        return "∞" if plain > 0 else "-∞"
    text = format(plain, spec)
    return text if float(text) else format(0.0, spec)  # no "-0.00"


def small(value: Any) -> str:
    """A number near zero, with two digits."""
    return "0" if value == 0 else number(value, ".1e")


def duration_text(seconds: float) -> str:
    """A duration in words: ``4.2 s``, ``2 min 05 s``, ``1 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def verdict(ions: pd.DataFrame) -> str:
    """The result in one sentence: how many ions the stain informs.

    Args:
        ions: Table with a column ``informed`` of "stain-informed", "partly" and "smooth".
    """
    total = len(ions)
    counts = {kind: int((ions["informed"] == kind).sum()) for kind in RANK}
    full, partly, smooth = (counts[kind] for kind in RANK)
    if not sum(counts.values()):
        return "No ion was judged on held-out tissue: the images are those of the published model, as they come."
    noun = "ion" if total == 1 else "ions"
    if smooth == total:
        subject = "The one ion is not" if total == 1 else f"None of the {total} ions is"
        what = "its picture is" if total == 1 else "all pictures are"
        return f"{subject} informed by the stain (held-out): {what} plain interpolation of the measurement."
    are = "is" if full == 1 else "are"
    text = f"{full} of {total} {noun} {are} informed by the stain (held-out), {partly} partly"
    return f"{text}, {smooth} {'is' if smooth == 1 else 'are'} plain interpolation."


def table_row(row: Mapping[str, Any]) -> dict[str, str]:
    """One ion's row of the trust table, formatted."""
    steps = row.get("nonneg_steps")
    return {
        "mz": f"{row['mz']:.4f}",
        "informed": str(row["informed"]),
        "kind": str(RANK.get(str(row["informed"]), 2)),
        "held_out_r2": number(row["held_out_r2"]),
        "null_r2": number(row.get("null_r2")),
        "gate": number(row["gate"]),
        "inferred": number(row.get("inferred_share")),
        "consistency": small(row.get("consistency")),
        "nonneg_steps": number(steps, ".0f"),
    }


def exactness(ions: pd.DataFrame) -> dict[str, Any]:
    """The worst contradiction of a measurement, in words."""
    values = ions["consistency"].to_numpy(dtype=np.float64)
    if not np.isfinite(values).any():
        return {"value": "–", "ok": False, "text": "The agreement with the measurement was not recorded."}
    worst = int(np.nanargmax(values))
    largest, mz = float(values[worst]), float(ions["mz"].iloc[worst])
    known = int(np.isfinite(values).sum())
    scope = "every ion" if known == len(values) else f"the {known} ions checked"
    if largest <= EXACT:
        text = (
            f"Averaged back to the measured pixels, {scope} equals its measurement: the largest difference "
            f"is {small(largest)} of the ion's maximum (m/z {mz:.4f})."
        )
    else:
        text = (
            f"Averaged back to the measured pixels, m/z {mz:.4f} differs from its measurement by "
            f"{small(largest)} of its maximum, more than the {EXACT:.0e} that an exact result keeps to."
        )
    return {"value": small(largest), "ok": largest <= EXACT, "text": text}


def nonnegative(ions: pd.DataFrame) -> str:
    """In how many ions non-negativity is imposed, in words."""
    count, total = int((ions["nonneg_steps"].fillna(0) > 0).sum()), len(ions)
    if (ions["informed"] == "not judged").all():
        return "Nothing keeps the images from falling below zero: they are those of the published model, as they come."
    if count == total:
        return "No value is below zero: the non-negative correction is on for every ion."
    rest = (
        "in the others it would have cost accuracy on reduced-scale data, so small negative values can occur "
        "beside sharp edges"
    )
    if not count:
        return f"The non-negative correction is off for all ions: {rest.replace('in the others ', '')}."
    return f"The non-negative correction is on for {count} of {total} ions; {rest}."


def timings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Time per stage, with bars in per cent of the longest."""
    times = {str(stage): float(seconds) for stage, seconds in (provenance.get("timings_s") or {}).items()}
    longest = max(times.values(), default=0.0)
    rows = [
        {"stage": stage, "text": duration_text(s), "percent": round(100 * s / longest, 2) if longest else 0}
        for stage, s in times.items()
    ]
    return {"rows": rows, "total": duration_text(sum(times.values())) if times else "–"}


def _decibels(value: Any, r: Any = None, spec: str = ".2f") -> str:
    """A score with its unit, and the correlation where there is one."""
    text = number(value, spec)
    text = text if text == "–" else f"{text} dB"
    return text if number(r) == "–" else f"{text} · r {number(r, '.3f')}"


def score_tables(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The evaluation's tables, formatted."""
    if not evaluation:
        return None
    methods = tuple(METHODS.items())
    tables = []
    for block in evaluation.get("wald") or []:
        rows = []
        for row in block.get("rows") or []:
            values = np.array([row.get(f"{key}_db", np.nan) for key, _ in methods], dtype=np.float64)
            best = int(np.nanargmax(values)) if np.isfinite(values).any() else -1
            cells = [
                {"text": _decibels(values[k], row.get(f"{key}_r")), "best": k == best}
                for k, (key, _) in enumerate(methods)
            ]
            gains = [_decibels(values[2] - values[k], spec="+.2f") for k in (0, 1)]
            rows.append({"what": str(row.get("what", "")), "cells": cells, "gains": gains})
        apart = block.get("alignment_apart_px")
        tables.append(
            {
                "ratio": number(block.get("ratio"), "g"),
                "alignment": str(block.get("alignment") or "")
                + (f", {apart:.2f} measured pixels from the one at full scale" if apart is not None else ""),
                "note": str(block.get("note") or ""),
                "rows": rows,
                "more": wald_words(block),
            }
        )
    truth = [
        {
            "kind": str(row.get("kind", "")),
            "ions": number(row.get("ions"), ".0f"),
            "no_guide": _decibels(row.get("no_guide_db")),
            "ours": _decibels(row.get("ours_db")),
            "gain": _decibels(row.get("gain_db"), spec="+.2f"),
        }
        for row in evaluation.get("truth") or []
    ]
    checked = evaluation.get("consistency")
    return {
        "methods": [label for _, label in methods],
        "wald": tables,
        "truth": truth,
        "labels": [_label_table(block) for block in evaluation.get("boundaries") or []],
        "consistency": None if checked is None else small(checked),
    }


def wald_words(block: Mapping[str, Any]) -> list[str]:
    """What a ratio's scores say over all ions at once: angles between spectra, relative error, coverage."""
    first = (block.get("rows") or [{}])[0]
    out = []
    spectra = [
        f"{label} {number(first[f'{key}_sam_deg'])}° and {number(first.get(f'{key}_ergas'))}"
        for key, label in METHODS.items()
        if f"{key}_sam_deg" in first
    ]
    if spectra:
        out.append(f"Angle between spectra (SAM) and relative error over all ions (ERGAS): {'; '.join(spectra)}.")
    if block.get("coverage_80") is not None:
        present = block.get("coverage_80_present")
        rest = f", in ions present in over 30 % of the pixels {100 * present:.0f} %" if present is not None else ""
        out.append(f"80 % intervals hold {100 * block['coverage_80']:.0f} % of the measured pixels (median ion){rest}.")
    return out


def _label_table(block: Mapping[str, Any]) -> dict[str, Any]:
    """The scores against one label image, formatted; its pictures."""
    rows = block.get("rows") or []
    heads = [f"F1, {number(tolerance, 'g')} px" for tolerance in block.get("tolerances_px") or []]
    heads += ["Hausdorff-95, px", "Dice"]
    columns = []
    for k, head in enumerate(heads):
        values = [(*row["f1"], row["hausdorff95_px"], row["dice"])[k] for row in rows]
        known = [value for value in values if value is not None]
        best = (min if "Hausdorff" in head else max)(known, default=None)
        columns.append([{"text": number(v, ".3f"), "best": v is not None and v == best} for v in values])
    names = [METHODS.get(row["method"], str(row["method"])) for row in rows]
    shown = [("labels", block.get("picture")), *zip(names, (row.get("picture") for row in rows), strict=True)]
    return {
        "name": Path(str(block.get("labels", ""))).name,
        "heads": heads,
        "classes": [
            {"name": str(value), "colour": colour if re.fullmatch("#[0-9a-f]{6}", str(colour)) else "#888888"}
            for value, colour in zip(block.get("classes") or [], block.get("colours") or [], strict=False)
        ],
        "rows": [
            {
                "what": name,
                "cells": [column[k] for column in columns],
                "dice": [number(value, ".3f") for value in row["class_dice"]],
            }
            for k, (name, row) in enumerate(zip(names, rows, strict=True))
        ],
        "notes": [str(note) for note in block.get("notes") or []],
        # What is no picture of ours is not shown: the page fetches nothing.
        "pictures": [
            {"src": source, "alt": f"tissue classes, {name}", "label": name}
            for name, source in shown
            if str(source).startswith("data:image/png;base64,")
        ],
    }


def opening(result: Any, best_mz: float) -> dict[str, str]:
    """How to open the result, in Python and in napari."""
    # Four decimals tell any two ions apart that an instrument does; the nearest ion is taken.
    path, mz = str(result.path), f"{best_mz:.4f}"
    f, pitch = result.factor, result.grid.pitch_um
    scale = f"({pitch[0] / f:g}, {pitch[1] / f:g})"
    lines = (
        ("result.ions", "this table, in pandas"),
        (f"image = result.ion({mz})", "dask array (y, x)"),
        (f"sd = result.uncertainty({mz})", "one standard deviation"),
        ("image.compute()", "a numpy array"),
    )
    python = f"import deepfere\n\nresult = deepfere.open({path!r})\n"
    python += "\n".join(f"{code:<36}# {comment}" for code, comment in lines)
    stained = result.stain() is not None
    viewer = (
        f"import deepfere, napari{', numpy as np' if stained else ''}\n\n"
        f"result = deepfere.open({path!r})\n"
        f"pixel_um = {scale}\n"
        "viewer = napari.Viewer()\n"
    )
    if stained:
        viewer += "stain = np.moveaxis(result.stain(), 0, -1)\nviewer.add_image(stain, rgb=True, scale=pixel_um)\n"
    viewer += f'ion = result.ion({mz})\nviewer.add_image(ion, colormap="viridis", scale=pixel_um)\nnapari.run()'
    stores = [f"{path.rstrip('/')}/{'stain' if stained else 'detail'}"]
    written = Path(path) / "ions"
    if written.is_dir():
        stores += sorted(str(store) for store in written.iterdir() if store.is_dir())[:5]
    shell = "\n".join(f"napari --plugin napari-ome-zarr {shlex.quote(store)}" for store in stores)
    return {"python": python, "viewer": viewer, "shell": shell}


def pairs(values: Any) -> list[tuple[str, str]]:
    """Key and value texts of a mapping."""
    items = values.items() if isinstance(values, Mapping) else []
    return [(str(k), v if isinstance(v, str) else json.dumps(v, default=str)) for k, v in items]
