"""``evaluate``: the pipeline judged at reduced scale (Wald's protocol), and images judged against tissue labels.

The measurement is degraded by a ratio r (footprint means; a coarse pixel needs all of its pixels), the whole
pipeline runs on the degraded data, blind, with factor r, and its output is compared with what was measured.
Source: Wald, Ranchin and Mangolini, Photogramm. Eng. Remote Sens. 63, 691 (1997).

Labels are compared in `deepfere.evaluation.label_scores`. All scores of a result lie in one file beside it; each part
stays until it is measured again, or the result is another one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.config import Config, IngestSettings, load_config
from deepfere.errors import InputError
from deepfere.evaluation.label_scores import label_scores, render_labels
from deepfere.evaluation.metrics import degrade, ergas, keys_bicubic, pearson, psnr, rmse, sam_deg, ssim
from deepfere.frame import apart_px
from deepfere.measured.store import write_measured
from deepfere.pipeline.fuse import fuse, quiet
from deepfere.pipeline.workspace import Progress, write_json
from deepfere.reconstruction.result import Result, beside

LEAST_PX = 80
"""Degraded measured pixels below which a ratio is left out."""


def scores_file(path: str | Path) -> Path:
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


def save_scores(result: Result, **parts: Any) -> dict[str, Any]:
    """Put parts of the scores beside a result; what is known of the same result otherwise is kept.

    ``boundaries`` is a list with one entry per label image; only those of the same images are replaced.

    Returns:
        All that is known.
    """
    known = load_evaluation(result.path) or {}
    if "boundaries" in parts:
        again = {block["labels"] for block in parts["boundaries"]}
        kept = [block for block in known.get("boundaries", []) if block["labels"] not in again]
        parts["boundaries"] = kept + parts["boundaries"]
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
    found = [label_scores(result, labels, against, progress)]
    known = save_scores(result, boundaries=list(found))
    return {"identity": known["identity"], "boundaries": found, "consistency": known["consistency"]}


def ion_scores(truth: NDArray[Any], estimate: NDArray[Any], mask: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Per ion: psnr (dB), pearson, ssim and rmse of (M, H, W) cubes on the mask."""
    peaks = [float(np.nanmax(np.where(mask, t, np.nan))) for t in truth]
    pairs = list(zip(truth, estimate, peaks, strict=True))
    return {
        "psnr": np.array([psnr(t, e, mask, p) if p > 0 else np.nan for t, e, p in pairs]),
        "pearson": np.array([pearson(t, e, mask) for t, e, _ in pairs]),
        "ssim": np.array([ssim(t, e, mask, p) if p > 0 else np.nan for t, e, p in pairs]),
        "rmse": np.array([rmse(t, e, mask) for t, e, _ in pairs]),
    }


def coverage(
    truth: NDArray[Any], estimate: NDArray[Any], sd: NDArray[Any], mask: NDArray[np.bool_], share: float = 0.8
) -> float:
    """Share of the pixels whose truth lies in the central interval of this share, median over ions.

    Intervals are of a normal distribution, cut at zero; a truth on the edge of its interval counts half.

    Args:
        truth: (M, H, W) intensities.
        estimate: (M, H, W).
        sd: (M, H, W) standard deviations of the estimate.
        mask: (H, W) pixels that count.
        share: Nominal share of the interval.
    """
    half = NormalDist().inv_cdf(0.5 + share / 2) * sd[:, mask]
    t, e = truth[:, mask], estimate[:, mask]
    low, high = np.maximum(e - half, 0.0), e + half
    held = ((t > low) & (t < high)).mean(1) + 0.5 * ((t == low) | (t == high)).mean(1)
    return float(np.median(held))


def decoded(result: Result) -> NDArray[np.float32]:
    """All ions (M, H, W) of a small result."""
    return np.stack([result.ion(float(mz)).compute() for mz in result.ions["mz"]])


def evaluate_result(
    result: Result,
    *,
    ratios: Iterable[int] = (2, 4, 8),
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Wald scores of the pipeline that made a result; written beside it.

    Args:
        result: A finished result; its slide must still be where it was.
        ratios: Degradations.
        config: Settings file (YAML) whose values replace those of the result.
        overrides: ``section.key=value`` changes to its settings.
        progress: Called with (what, share).

    Returns:
        ``{"identity", "wald": [{"ratio", "alignment", "rows": [...], "ions": [...]}], "consistency"}``: what was
        measured now.

    Raises:
        InputError: The slide is gone, or a setting is wrong.
    """
    stored = dict(result.provenance["config"])
    stored["tracking"] = {"uri": "none"}
    base = Config.model_validate(stored)
    base = load_config(config, overrides, base=base)
    section = result.provenance["section"]
    if base.guide and not Path(section["slide"]).exists():
        raise InputError("the slide of this result is gone", where=section["slide"], remedy="put it back")
    cube = np.stack([result.measured(float(mz)) for mz in result.ions["mz"]]).astype(np.float64)
    wald = []
    for ratio in ratios:
        coarse, mask = degrade(cube, result.mask, ratio)
        if mask.sum() < LEAST_PX:
            note = f"x{ratio} leaves {int(mask.sum())} measured pixels: too few to say anything"
            wald.append({"ratio": ratio, "alignment": "none", "note": note, "rows": [], "ions": []})
            continue
        wald.append(_wald(result, base, section, cube, coarse, mask, ratio, progress))
    known = save_scores(result, wald=wald)
    return {"identity": known["identity"], "wald": wald, "consistency": known["consistency"]}


def _wald(
    result: Result,
    base: Config,
    section: dict[str, Any],
    cube: NDArray[np.float64],
    coarse: NDArray[np.float64],
    mask: NDArray[np.bool_],
    ratio: int,
    progress: Progress,
) -> dict[str, Any]:
    pitch = (result.grid.pitch_um[0] * ratio, result.grid.pitch_um[1] * ratio)
    label = f"wald x{ratio}"
    # The degraded cube is measured data already: its ingestion and its normalisation are done.
    settings = base.model_copy(update={"factor": ratio, "ingest": IngestSettings()})
    with tempfile.TemporaryDirectory() as folder:
        msi = Path(folder) / "measured.zarr"
        attrs = {"tolerance_ppm": result._measured.tolerance_ppm}
        write_measured(msi, np.nan_to_num(np.maximum(coarse, 0)), mask, result.ions["mz"], pitch, attrs)
        plain = fuse(msi, None, Path(folder) / "plain.zarr", config=settings.model_copy(update={"guide": False}))
        images = {"no_guide": decoded(plain)}
        state, note = "none", ""
        if base.guide:
            given = {key: section[key] for key in ("slide_mpp_um", "alignment", "landmarks") if section.get(key)}
            state = "given" if section.get("alignment") or section.get("landmarks") else "found"

            def tell(stage: str, share: float) -> None:
                progress(f"{label} {stage}", share)

            try:
                ours = fuse(msi, section["slide"], Path(folder) / "ours.zarr", config=settings, progress=tell, **given)
            except InputError as error:
                # The row says so, and shows what the full-scale alignment would have given.
                state, note = "refused", f"blind: {error}; scored with the full-scale alignment"
                given = {"slide_mpp_um": section.get("slide_mpp_um"), "alignment": Path(result.path) / "alignment.json"}
                ours = fuse(msi, section["slide"], Path(folder) / "ours.zarr", config=settings, progress=tell, **given)
            images["ours"] = decoded(ours)
            sd = np.stack([ours.uncertainty(float(mz)).compute() for mz in ours.ions["mz"]])
        shape = images["no_guide"].shape[1:]
    truth = cube[:, : shape[0], : shape[1]]
    inside = result.mask[: shape[0], : shape[1]] & np.repeat(np.repeat(mask, ratio, 0), ratio, 1)
    images["bicubic"] = np.stack([keys_bicubic(c, ratio, mask) for c in coarse])
    out = {"ratio": ratio, "alignment": state, "note": note, **_table(truth, images, inside, result, ratio)}
    if base.guide:
        out["coverage_80"] = coverage(truth, images["ours"], sd, inside)
    if state == "found" and ours.alignment is not None and result.alignment is not None:
        out["alignment_apart_px"] = apart_px(ours.alignment, result.alignment, result.grid, result.mask)
    return out


def _table(
    truth: NDArray[Any], images: dict[str, NDArray[Any]], mask: NDArray[np.bool_], result: Result, ratio: int
) -> dict[str, Any]:
    """Medians over groups of ions, and every ion's scores."""
    names = [n for n in ("bicubic", "no_guide", "ours") if n in images]
    scores = {name: ion_scores(truth, images[name], mask) for name in names}
    informed = np.asarray(result.ions["informed"])
    groups = {"all ions": np.ones(len(truth), bool)}
    groups |= {kind: informed == kind for kind in ("stain-informed", "partly", "smooth") if (informed == kind).any()}
    rows = []
    for what, chosen in groups.items():
        row: dict[str, Any] = {"what": f"{what} ({int(chosen.sum())})"}
        for name in names:
            row[f"{name}_db"] = float(np.nanmedian(scores[name]["psnr"][chosen]))
            row[f"{name}_r"] = float(np.nanmedian(scores[name]["pearson"][chosen]))
            row[f"{name}_ssim"] = float(np.nanmedian(scores[name]["ssim"][chosen]))
        rows.append(row)
    for name in names:
        rows[0][f"{name}_sam_deg"] = float(sam_deg(truth, images[name], mask))
        rows[0][f"{name}_ergas"] = float(ergas(truth, images[name], ratio, mask))
    ions = [
        {"mz": float(mz)} | {f"{name}_{key}": float(scores[name][key][m]) for name in names for key in scores[name]}
        for m, mz in enumerate(result.ions["mz"])
    ]
    return {"rows": rows, "ions": ions}


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
    lines += [render_labels(block) for block in scores.get("boundaries") or []]
    lines.append(f"consistency: {scores['consistency']:.1e}")
    return "\n".join(lines)


def _methods(row: dict[str, Any]) -> list[str]:
    return [name for name in ("bicubic", "no_guide", "ours") if f"{name}_db" in row]
