"""``evaluate``: the pipeline judged at reduced scale (Wald's protocol), and images judged against tissue labels.

Wald's protocol is in `deepfere.evaluation.wald`, labels are compared in `deepfere.evaluation.label_scores`, and
`deepfere.evaluation.trust` collects what the fit found out about itself. All scores of a result lie in one file beside
it; each part stays until it is measured again, or the result is another one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deepfere.config import Config, load_config
from deepfere.errors import InputError
from deepfere.evaluation.label_scores import label_scores, render_labels
from deepfere.evaluation.metrics import degrade
from deepfere.evaluation.nested import nested_scores
from deepfere.evaluation.trust import evidence_of, nested_medians
from deepfere.evaluation.wald import METHODS, coverage, ion_scores, wald
from deepfere.pipeline.fuse import quiet
from deepfere.pipeline.workspace import Progress, write_json
from deepfere.places import Place, beside, check_outside_stores
from deepfere.reconstruction.result import Result
from deepfere.remote import is_url

__all__ = [
    "check_json",
    "coverage",
    "evaluate_labels",
    "evaluate_result",
    "ion_scores",
    "load_evaluation",
    "render",
    "save_scores",
    "scores_file",
    "write_scores",
]

LEAST_PX = 80
"""Degraded measured pixels below which a ratio is left out."""


def scores_file(path: str | Place) -> Place:
    """Where a result's scores lie: beside it."""
    return beside(path, ".evaluation.json")


def load_evaluation(path: str | Path) -> dict[str, Any] | None:
    """The scores of a result, if it has been evaluated as it is now."""
    file = scores_file(path)
    if not file.exists():
        return None
    scores = json.loads(file.read_text())
    result = Result(path)
    return scores if scores.get("identity") == result.provenance["identity"] else None


def check_writable(result: Result) -> None:
    """Refuse a result beside which nothing can be written, before work starts.

    Raises:
        InputError: It is such a one.
    """
    if is_url(result.path):
        return  # its scores are small, and a store that refuses them says so in one line
    if not os.access(Path(result.path).parent, os.W_OK):
        raise InputError("scores cannot be written beside it", where=result.path, remedy="copy it to a folder of yours")


def save_scores(result: Result, **parts: Any) -> dict[str, Any]:
    """Put parts of the scores beside a result; what is known of the same result otherwise is kept.

    ``boundaries`` is a list with one entry per label image; only those of the same images are replaced. ``wald`` has
    one per ratio; those of other ratios stay if they were measured with the same settings.

    Returns:
        All that is known.
    """
    known = load_evaluation(result.path) or {}
    if "boundaries" in parts:
        again = {block["labels"] for block in parts["boundaries"]}
        kept = [block for block in known.get("boundaries", []) if block["labels"] not in again]
        parts["boundaries"] = kept + parts["boundaries"]
    if "wald" in parts:
        again = {block["ratio"] for block in parts["wald"]}
        settings = {block.get("settings") for block in parts["wald"]}
        kept = [b for b in known.get("wald", []) if b["ratio"] not in again and b.get("settings") in settings]
        parts["wald"] = sorted(kept + parts["wald"], key=lambda block: block["ratio"])
    known |= {
        "identity": result.provenance["identity"],
        "consistency": float(result.ions["consistency"].max()),
        **parts,
    }
    write_json(scores_file(result.path), known)
    return known


def evaluate_labels(
    result: Result, labels: str | Path, *, against: Iterable[str] = (), progress: Progress = quiet
) -> dict[str, Any]:
    """Scores of a result's images against tissue labels; written beside it.

    Args:
        result: A finished result.
        labels: Label image on the section's high-resolution grid, or a whole multiple or fraction of it.
        against: Other results of the same measurement, ``NAME=RESULT.zarr``.
        progress: Called with (what, share).

    Returns:
        ``{"identity", "boundaries": [...], "consistency"}``: what was measured now (`label_scores`).

    Raises:
        InputError: The labels or another result do not fit.
    """
    check_writable(result)
    found = [label_scores(result, labels, against, progress)]
    known = save_scores(result, boundaries=list(found))
    return {"identity": known["identity"], "boundaries": found, "consistency": known["consistency"]}


def evaluate_result(
    result: Result,
    *,
    ratios: Iterable[int] = (2, 4, 8),
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Wald scores of the pipeline that made a result, and its own evidence; written beside it, ratio by ratio.

    Args:
        result: A finished result; its slide must still be where it was.
        ratios: Degradations.
        config: Settings file (YAML) whose values replace those of the result.
        overrides: ``section.key=value`` changes to its settings.
        progress: Called with (what, share).

    Returns:
        ``{"identity", "wald": [...], "evidence": {...}, "consistency"}``: what was measured now (`wald`,
        `evidence_of`).

    Raises:
        InputError: The slide is gone, a ratio or a setting is wrong, or the scores cannot be written.
    """
    wanted = sorted(set(ratios))
    for ratio in wanted:
        if ratio < 2:
            raise InputError(f"a ratio of {ratio} degrades nothing", where="--ratio", remedy="give 2 or more")
    check_writable(result)
    stored = dict(result.provenance["config"])
    stored["tracking"] = {"uri": "none"}
    base = Config.model_validate(stored)
    base = load_config(config, overrides, base=base)
    slide = result.provenance["section"].get("slide")
    if base.guide and (slide is None or not (is_url(slide) or Path(slide).exists())):
        raise InputError("the slide of this result is gone", where=slide or result.path, remedy="put it back")
    cube = np.stack([result.measured(float(mz)) for mz in result.ions["mz"]]).astype(np.float64)
    measured: list[dict[str, Any]] = []
    for ratio in wanted:
        block: dict[str, Any] = {"ratio": ratio, "alignment": "none", "note": "", "rows": [], "ions": []}
        coarse, mask = None, np.zeros(0, bool)
        if min(result.grid.shape_px) >= ratio:
            coarse, mask = degrade(cube, result.mask, ratio)
        if coarse is None or mask.sum() < LEAST_PX:
            block["note"] = f"x{ratio} leaves {int(mask.sum())} measured pixels: too few to say anything"
        else:
            block = wald(result, base, cube, coarse, mask, ratio, progress)
        measured.append(block | {"settings": base.digest()})
        # What took minutes is kept even if the next ratio is stopped.
        save_scores(result, wald=list(measured))
    proof = evidence_of(result)
    # Nested scores are the closed form's: they say nothing of images that it did not make.
    judged = base.guide and base.model.tier != "paper"
    proof["nested"] = nested_scores(result, base, progress) if judged else None
    known = save_scores(result, evidence=proof)
    return {key: known[key] for key in ("identity", "consistency", "evidence")} | {"wald": measured}


def plain(values: Any) -> Any:
    """The same values as JSON has them: what is not finite becomes null."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def check_json(path: str | None) -> None:
    """Refuse a file that scores cannot be written to, before work starts; only scores are replaced.

    Raises:
        InputError: It is such a one.
    """
    if path is None or path == "-":
        return
    file = Path(path)
    if file.is_dir() or not os.access(file.resolve().parent, os.W_OK):
        raise InputError("cannot be written", where=path, remedy="give a file in a folder that you may write to")
    if file.exists() and not _holds_scores(file):
        raise InputError("holds no scores, and stays as it is", where=path, remedy="give another file")
    check_outside_stores(file)


def _holds_scores(file: Path) -> bool:
    try:
        values = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(values, dict) and bool({"wald", "boundaries"} & set(values))


def write_scores(path: str, scores: dict[str, Any]) -> None:
    """Write scores as strict JSON to a file; "-" is standard output.

    Raises:
        InputError: The file cannot be written.
    """
    text = json.dumps(plain(scores), indent=1, allow_nan=False)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror})", where=path, remedy="give a file that you may write"
        ) from error


def render(scores: dict[str, Any]) -> str:
    """The scores as text for a terminal."""
    lines = []
    for part in scores.get("wald") or []:
        note = f" ({part['note']})" if part["note"] else ""
        apart = part.get("alignment_apart_px")
        far = "" if apart is None else f", {apart:.2f} measured pixels from the one at full scale"
        lines.append(f"x{part['ratio']}: alignment {part['alignment']}{far}{note}")
        if "coverage_80" in part:
            lines.append(f"  80 % intervals hold {100 * part['coverage_80']:.0f} % of the pixels")
        for row in part["rows"]:
            cells = [f"{name} {row[f'{name}_db']:.2f} dB (r {row[f'{name}_r']:.3f})" for name in _methods(row)]
            lines.append(f"  {row['what']:<22} " + "   ".join(cells))
        for row in part["rows"][:1]:
            cells = [
                f"{name} SAM {row[f'{name}_sam_deg']:.2f} deg, ERGAS {row[f'{name}_ergas']:.2f}"
                for name in _methods(row)
            ]
            lines.append(f"  {'across ions':<22} " + "   ".join(cells))
    nulls = (scores.get("evidence") or {}).get("null_guides")
    if nulls:
        gain = "" if nulls["gain_db"] is None else f"the stain gains {nulls['gain_db']:.2f} dB (informed ions), "
        lines.append(
            f"left-out blocks: {gain}{nulls['count']} wrong stains {nulls['null_mean_db']:.2f} dB, "
            f"their 95th percentile at most {nulls['null_p95_most_db']:.2f} dB"
        )
    nested = nested_medians(scores.get("evidence") or {})
    if nested is not None:
        lines.append(
            f"held-out R2 of informed ions, median: {nested[0]:.3f} nested (alignment and factors without the block), "
            f"{nested[1]:.3f} with both as they are"
        )
    lines += [render_labels(block) for block in scores.get("boundaries") or []]
    lines.append(f"consistency: {scores['consistency']:.1e}")
    return "\n".join(lines)


def _methods(row: dict[str, Any]) -> list[str]:
    return [name for name in METHODS if f"{name}_db" in row]
