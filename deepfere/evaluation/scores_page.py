"""The page of an evaluation: every ion's scores, and the evidence behind them, in one HTML file beside the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepfere.evaluation import score_figures
from deepfere.evaluation.figures import figure_png
from deepfere.evaluation.report import MAX_TABLE_ROWS, environment, ramps, report_identity, write_page
from deepfere.evaluation.report_alignment import evidence_rows
from deepfere.evaluation.report_modes import percent
from deepfere.evaluation.report_pictures import data_uri
from deepfere.evaluation.report_tables import METHODS, RANK, number, score_tables, small
from deepfere.evaluation.trust import nested_medians
from deepfere.places import Place, beside
from deepfere.reconstruction.result import Result

SCORES = (("psnr", "PSNR, dB", ".2f"), ("pearson", "r", ".3f"), ("ssim", "SSIM", ".3f"), ("rmse", "RMSE", ".3g"))


def page_file(path: str | Place) -> Place:
    """Where the page of a result lies: beside it."""
    return beside(path, ".evaluation.html")


def write_scores_page(result: Result, scores: Mapping[str, Any], report: Place | None = None) -> Place:
    """Write the page beside the result.

    Args:
        result: The result.
        scores: All that is known (`load_evaluation`), its own evidence included.
        report: The report that is about to be written; None links one only where it stands already.

    Returns:
        The path written.

    Raises:
        InputError: It cannot be written.
    """
    target = page_file(result.path)
    identity = str(result.provenance["identity"])
    beside_it = report or beside(result.path, ".html")
    linked = beside_it.resolve().parent == target.resolve().parent and (
        report is not None or report_identity(beside_it) == identity
    )
    blocks = list(scores.get("wald") or [])
    evidence = scores.get("evidence") or {}
    tables = score_tables({**scores, "boundaries": []}) or {"wald": []}
    context = {
        "name": Path(result.path).name,
        "path": result.path,
        "identity": identity,
        "report": beside_it.name if linked else None,
        "verdict": verdict(blocks),
        "facts": facts(scores),
        "ramps": ramps(),
        "stain": False,
        "methods": list(METHODS.values()),
        "wald": [
            table
            | {
                "ions": ion_table(block, evidence),
                "picture": _both(score_figures.promised_and_measured, block, evidence),
            }
            for table, block in zip(tables["wald"], blocks, strict=True)
        ],
        "nulls": null_section(evidence),
        "alignment": evidence_rows(result.alignment) if result.alignment is not None else [],
        "alignments": alignment_rows(blocks),
        "most_rows": MAX_TABLE_ROWS,
    }
    write_page(target, environment().get_template("scores.html.j2").render(context))
    return target


def verdict(blocks: list[dict[str, Any]]) -> str:
    """The best known in one sentence: what was gained where the truth is known."""
    scored = [block for block in blocks if block.get("rows")]
    if not scored:
        return "Not judged at reduced scale: too few measured pixels remain."
    block = scored[0]
    row = next((r for r in block["rows"] if str(r.get("what", "")).startswith("stain-informed")), block["rows"][0])
    found, ratio = re.match(r"(.*) \((\d+)\)$", str(row.get("what", ""))), number(block.get("ratio"), "g")
    of = "the ions" if found is None else f"the {found[2]} {'' if found[1] == 'all ions' else found[1] + ' '}ions"
    if "ours_db" not in row:
        return f"Judged on the measurement made coarser by {ratio}, without the stain."
    gains = [f"{number(row['ours_db'] - row[f'{key}_db'], '+.2f')} dB" for key in ("bicubic", "no_guide")]
    return (
        f"Judged on the measurement made coarser by {ratio}: {gains[0]} against bicubic and {gains[1]} against no "
        f"stain (median of {of})."
    )


def facts(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the head of the page."""
    out = [("largest disagreement", small(scores.get("consistency")), "of an ion's maximum")]
    evidence = scores.get("evidence") or {}
    nulls = evidence.get("null_guides")
    if nulls:
        out.append(("the stain gains", f"{number(nulls['gain_db'])} dB", "left-out blocks, median of informed ions"))
        most = f"{number(nulls['null_p95_most_db'])} dB"
        out.append(("wrong stains gain", most, f"95th percentile of {nulls['count']}, the worst ion"))
    if "inferred_share" in evidence:
        out.append(("inferred from the stain", percent(evidence["inferred_share"]), "of all ions' contrast"))
    for block in scores.get("wald") or []:
        if block.get("coverage_80") is not None:
            text = f"{100 * block['coverage_80']:.0f} %"
            out.append((f"in 80 % intervals, × {number(block['ratio'], 'g')}", text, "of the pixels, median ion"))
    return out


def ion_table(block: Mapping[str, Any], evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Every ion's scores at one ratio: heads, and rows of texts."""
    ions = block.get("ions") or []
    if not ions:
        return {"heads": [], "rows": []}
    known = {ion["mz"]: ion for ion in evidence.get("ions") or []}
    methods = [(key, label) for key, label in METHODS.items() if f"{key}_psnr" in ions[0]]
    short = {"bicubic": "bicubic", "no_guide": "no stain", "ours": "deepfere"}
    heads = ["m/z", "informed"]
    heads += [f"{label}, {short[key]}" for _, label, _ in SCORES for key, _ in methods]
    heads += ["in 80 % interval"] if "coverage_80" in ions[0] else []
    rows = []
    for ion in ions[:MAX_TABLE_ROWS]:
        kind = str(known.get(ion["mz"], {}).get("informed", "–"))
        texts = [number(ion.get(f"{key}_{name}"), spec) for name, _, spec in SCORES for key, _ in methods]
        texts += [percent(ion["coverage_80"])] if "coverage_80" in ion else []
        rows.append({"mz": f"{ion['mz']:.4f}", "kind": kind, "rank": RANK.get(kind, 2), "texts": texts})
    return {"heads": heads, "rows": rows}


def null_section(evidence: Mapping[str, Any]) -> dict[str, Any] | None:
    """The right stain against wrong ones: a picture, words, and a row per ion."""
    nulls, ions = evidence.get("null_guides"), evidence.get("ions") or []
    if not nulls or not ions:
        return None
    nested = {ion["mz"]: ion["nested_r2"] for ion in (evidence.get("nested") or {}).get("ions") or []}
    ahead = sum(ion["gain_db"] > ion["null_p95_db"] for ion in ions)
    rows = [
        {
            "mz": f"{ion['mz']:.4f}",
            "kind": ion["informed"],
            "rank": RANK.get(ion["informed"], 2),
            "texts": [
                *(number(ion[key]) for key in ("gain_db", "null_p95_db", "null_mean_db", "held_out_r2")),
                number(nested.get(ion["mz"])),
                number(ion["gate"]),
                percent(ion["inferred_share"]),
                percent(ion["noise_share"]),
                small(ion["consistency"]),
            ],
        }
        for ion in sorted(ions, key=lambda ion: -ion["gain_db"])[:MAX_TABLE_ROWS]
    ]
    return {
        "count": nulls["count"],
        "words": f"The right stain gains more than 95 % of the wrong ones in {ahead} of {len(ions)} ions; in "
        f"{nulls['informed_ions']} that and the blocks of the section are proof enough, and the stain is used.",
        "nested": nested_words(evidence),
        "picture": _both(score_figures.right_and_wrong, evidence),
        "heads": [
            "m/z",
            "informed",
            "gain, dB",
            "wrong stains, 95 %",
            "wrong stains, mean",
            "held-out R²",
            "nested R²",
            "gate",
            "inferred",
            "noise taken out",
            "disagreement",
        ],
        "rows": rows,
    }


def nested_words(evidence: Mapping[str, Any]) -> str:
    """What the held-out scores lose when nothing has seen what is left out; empty where that was not asked."""
    medians, nested = nested_medians(evidence), evidence.get("nested") or {}
    if medians is None:
        return ""
    moved = [number(value) for value in nested.get("moved_px") or []]
    again = f"the alignment refined anew (it moves by {', '.join(moved)} measured pixels)" if moved else "the factors"
    return (
        f"Nested: with a quarter of the section hidden, {again} and everything else fitted without it, the hidden part "
        f"is predicted with a median R² of {number(medians[0], '.3f')} in informed ions; with alignment and factors as "
        f"they are, {number(medians[1], '.3f')}."
    )


def alignment_rows(blocks: list[dict[str, Any]]) -> list[dict[str, str]]:
    """How the section was found again at every ratio."""
    out = []
    for block in blocks:
        if not block.get("rows"):
            continue
        found = block.get("alignment_evidence") or {}
        null = found.get("null_r2")
        null = max(null, default=None) if isinstance(null, list) else null
        out.append(
            {
                "ratio": f"× {number(block['ratio'], 'g')}",
                "state": str(block["alignment"]),
                "apart": number(block.get("alignment_apart_px")),
                "scores": " / ".join(number(v) for v in (found.get("held_out_r2"), found.get("runner_up_r2"), null)),
            }
        )
    return out


def _both(draw: Any, *values: Any) -> dict[str, str] | None:
    """A figure for a light and a dark page; None where there is nothing to draw."""
    drawn = {}
    for theme in ("light", "dark"):
        figure = draw(*values, dark=theme == "dark")
        if figure is None:
            return None
        drawn[theme] = data_uri(figure_png(figure), "png")
    return drawn
