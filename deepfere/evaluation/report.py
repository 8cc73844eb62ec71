"""The report of one result: a single HTML file that a facility can hand to its client.

Everything is inlined (pictures, styles, a few lines of script) and a content security policy forbids the
page to fetch anything. Pictures are read from the level that fits a page, so a report of a whole slide
costs no more memory than one of a small section.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.evaluation import figures
from deepfere.evaluation import report_pictures as pictures
from deepfere.evaluation import report_tables as tables
from deepfere.evaluation.report_alignment import alignment_section
from deepfere.evaluation.report_modes import denoised_section, inferred_section, load_denoised, load_inferred
from deepfere.places import Place, UrlPath, beside, check_outside_stores, place, reading

PANEL_SIDES_PX = (640, 440, 300)
MAX_BYTES = 7_500_000
MAX_TABLE_ROWS = 10_000
SHORT_TABLE_ROWS = 40
HEAD_BYTES = 4096


def write_report(
    result: Any,
    path: str | Place,
    *,
    evaluation: Mapping[str, Any] | None = None,
    truth: Mapping[float, Any] | None = None,
) -> Place:
    """Write the report of a result as one self-contained HTML file.

    Args:
        result: An opened result (`deepfere.open`).
        path: The HTML file to write, or its URL; its folder is made if needed, an earlier report there is replaced at
            once when the new one is complete.
        evaluation: What `evaluate` found: ``wald`` (per ratio, rows of dB and r), ``truth`` (per kind
            of ion) and ``consistency``; its tables are left out without it.
        truth: Known high-resolution images by m/z, (H, W) on the result's grid, shown beside the ions.

    Returns:
        The path written.

    Raises:
        InputError: The result holds no ions, or the path cannot be written or holds something else.
    """
    if not len(result.ions):
        raise InputError("the result holds no ions", where=result.path, remedy="reconstruct it first")
    target = place(path)
    check_page(target)
    scores = beside(result.path, ".evaluation.html")
    linked = scores.parent == target.resolve().parent and report_identity(scores) == result.provenance.get("identity")
    page = render_report(result, evaluation=evaluation, truth=truth, scores_page=scores.name if linked else None)
    write_page(target, page)
    return target


def check_page(target: Place) -> None:
    """Refuse a place that a page is not to be written to: what stands there and is no page of deepfere stays.

    Raises:
        InputError: It is a folder, another file, or lies inside a store.
    """
    remedy = "give a path such as report.html"
    if isinstance(target, Path) and target.is_dir():
        raise InputError("is a folder", where=target, remedy=remedy)
    if target.exists() and report_identity(target) is None:
        raise InputError("is no report of deepfere, and stays as it is", where=target, remedy=remedy)
    check_outside_stores(target)


def write_page(target: Place, page: str) -> None:
    """Write a page, at once when it is complete.

    Raises:
        InputError: It cannot be written, or something else is there.
    """
    check_page(target)
    if isinstance(target, UrlPath):
        target.write_text(page)
        return
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)  # noqa: PTH105
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror})", where=target, remedy="give a path you can write to"
        ) from error


def environment() -> jinja2.Environment:
    """Templates of this package; everything is escaped."""
    loader = jinja2.FunctionLoader(
        lambda name: resources.files("deepfere.evaluation").joinpath(name).read_text(encoding="utf-8")
    )
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def report_identity(path: str | Place) -> str | None:
    """Which result the report at a path shows: its identity; None where there is no report or it does not say."""
    try:
        with reading(path) as file, file.open("rb") as handle:
            head = handle.read(HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r'<meta name="deepfere-identity" content="([^"]*)">', head)
    return found.group(1) if found else None


def render_report(
    result: Any,
    *,
    evaluation: Mapping[str, Any] | None = None,
    truth: Mapping[float, Any] | None = None,
    scores_page: str | None = None,
) -> str:
    """The report as HTML text of less than 8 MB; arguments as in `write_report`.

    Args:
        result: The result.
        evaluation: Scores.
        truth: Known images.
        scores_page: Name of the page with every ion's scores, which lies beside the report; None if there is none.
    """
    template = environment().get_template("report.html.j2")
    shape = figures.fit_shape(result.grid.extent_um, PANEL_SIDES_PX[0])
    most, least = pictures.pick_ions(result.ions)
    rows = result.ions.to_dict("records")
    loaded = {row: pictures.load_ion(result, rows[row], shape, truth) for row in (*most, *least)}
    stain = _stain(result)
    context = _context(result, rows, evaluation)
    context["zoom"] = pictures.zoom(result, loaded[most[0]])
    context["page"] = scores_page
    inferred = load_inferred(result, [rows[row] for row in most], shape) if stain is not None else None
    denoised = load_denoised(result, shape)
    page = ""
    for side in PANEL_SIDES_PX:
        # Noisy pictures hardly compress: a smaller side keeps the file one that can be mailed.
        shape = figures.fit_shape(result.grid.extent_um, side)
        context |= {
            "stain": stain is not None
            and pictures.data_uri(figures.photo_jpeg(figures.resample_photo(stain, shape)), "jpeg"),
            "frame": pictures.frame_of(result.grid.extent_um, shape),
            "most": [pictures.ion_row(loaded[row], shape) for row in most],
            "least": [pictures.ion_row(loaded[row], shape) for row in least],
            "inferred": inferred and inferred_section(inferred, shape),
            "denoised": denoised_section(result, denoised, shape) if denoised else None,
            "alignment": alignment_section(result, stain, side) if stain is not None else None,
        }
        page = template.render(context)
        if len(page.encode("utf-8")) <= MAX_BYTES:
            break
    return page


def _stain(result: Any) -> NDArray[np.uint8] | None:
    """The stain on the section grid, (h, w, 3) uint8, at the page's level; None for a run without it."""
    ny, nx = result.grid.shape_px
    level = pictures.page_level((ny * result.factor, nx * result.factor), result.levels)
    stain = result.stain(level=level)
    return None if stain is None else np.moveaxis(np.asarray(pictures.thin(stain)), 0, -1)


def _context(result: Any, rows: list[dict[str, Any]], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything in the page but the pictures."""
    ions, grid, provenance = result.ions, result.grid, result.provenance
    order = np.lexsort(
        (
            -np.nan_to_num(ions["held_out_r2"].to_numpy(dtype=np.float64), nan=-np.inf),
            ions["informed"].map(tables.RANK).to_numpy(dtype=np.float64),
        )
    )
    counts = {kind: int((ions["informed"] == kind).sum()) for kind in tables.RANK}
    exact, times = tables.exactness(ions), tables.timings(provenance)
    fine = grid.refine(result.factor)
    model = provenance.get("model") or {}
    evidence = result.alignment.evidence if result.alignment is not None else {"source": "no stain"}
    histogram = {
        theme: pictures.data_uri(
            figures.figure_png(
                figures.r2_histogram(ions["held_out_r2"], list(ions["informed"]), ions["null_r2"], dark=theme == "dark")
            ),
            "png",
        )
        for theme in ("light", "dark")
    }
    facts = [
        ("ions", f"{len(ions):,}", ""),
        ("measured pixel", _pixel(grid.pitch_um), f"{grid.shape_px[0]} × {grid.shape_px[1]} pixels"),
        (
            "reconstructed pixel",
            _pixel(fine.pitch_um),
            f"× {result.factor}, {fine.shape_px[0]} × {fine.shape_px[1]} pixels",
        ),
        ("section", " × ".join(f"{side / 1000:.2f}" for side in grid.extent_um) + " mm", "height × width"),
        ("largest disagreement", exact["value"], "of the maximum: " + ("exact" if exact["ok"] else "not exact")),
        (
            "alignment, held-out R²",
            tables.number(evidence.get("held_out_r2")),
            str(evidence.get("source") or ""),
        ),
        (
            "model",
            str(model.get("tier") or "–"),
            " ".join(str(model.get(k) or "") for k in ("name", "version")),
        ),
        ("time", times["total"], "all stages"),
    ]
    return {
        "name": str(result.path).rstrip("/").rsplit("/", 1)[-1],
        "path": str(result.path),
        "verdict": tables.verdict(ions),
        "counts": [(kind, n, round(100 * n / len(ions), 3)) for kind, n in counts.items()],
        "colours": figures.CLASS_COLOURS,
        "ramps": ramps(),
        "facts": facts,
        "warnings": [str(text) for text in provenance.get("warnings") or []],
        "exact": exact,
        "nonnegative": tables.nonnegative(ions),
        "histogram": histogram,
        "table": [tables.table_row(rows[k]) for k in order[:MAX_TABLE_ROWS]],
        "short_rows": SHORT_TABLE_ROWS,
        "ion_count": len(ions),
        "timings": times,
        "scores": tables.score_tables(evaluation),
        "opening": tables.opening(result, float(rows[int(order[0])]["mz"])),
        "settings": json.dumps(provenance.get("config") or {}, indent=2, default=str),
        "identity": str(provenance.get("identity") or "–"),
        "model": tables.pairs(model),
        "run": tables.pairs(provenance.get("run")),
        "versions": tables.pairs(provenance.get("versions")),
    }


def _pixel(pitch_um: tuple[float, float]) -> str:
    return " × ".join(f"{side:.4g}" for side in dict.fromkeys(pitch_um)) + " µm"


def ramps() -> dict[str, str]:
    """CSS gradients of the colour maps that the pages use."""
    maps = {"ion": figures.ION_MAP, "spread": figures.UNCERTAINTY_MAP, "share": figures.SHARE_MAP}
    return {name: _ramp(colour_map) for name, colour_map in maps.items()}


def _ramp(colour_map: str) -> str:
    """A CSS gradient of a colour map."""
    colours = figures.colourise(np.linspace(0.0, 1.0, 9)[None], 1.0, colour_map)[0]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours)
