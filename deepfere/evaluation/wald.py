"""Wald's protocol: the whole pipeline run blind on the degraded measurement, and compared with the measurement.

The measurement is degraded by a ratio r (footprint means; a coarse pixel needs all of its pixels), the pipeline runs on
the degraded data with factor r, and its output is compared with what was measured.
Source: Wald, Ranchin and Mangolini, Photogramm. Eng. Remote Sens. 63, 691 (1997).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.config import Config, IngestSettings
from deepfere.errors import InputError
from deepfere.evaluation.metrics import ergas, keys_bicubic, pearson, psnr, rmse, sam_deg, ssim
from deepfere.frame import Alignment, apart_px
from deepfere.measured.tolerance import OWN
from deepfere.measured.writer import write_measured
from deepfere.pipeline.fuse import fuse
from deepfere.pipeline.workspace import Progress
from deepfere.readers.mis import MIS
from deepfere.reconstruction.result import Result

METHODS = ("bicubic", "no_guide", "ours")
PRESENT = 0.3
"""An ion is present where more than this share of the measured pixels is not zero."""


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


def covered(
    truth: NDArray[Any], estimate: NDArray[Any], sd: NDArray[Any], mask: NDArray[np.bool_], share: float = 0.8
) -> NDArray[np.float64]:
    """Share (M,) of the pixels whose truth lies in the central interval of this share.

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
    return np.asarray(((t > low) & (t < high)).mean(1) + 0.5 * ((t == low) | (t == high)).mean(1), np.float64)


def coverage(
    truth: NDArray[Any], estimate: NDArray[Any], sd: NDArray[Any], mask: NDArray[np.bool_], share: float = 0.8
) -> float:
    """Median of `covered` over the ions."""
    return float(np.median(covered(truth, estimate, sd, mask, share)))


def decoded(result: Result) -> NDArray[np.float32]:
    """All ions (M, H, W) of a small result."""
    return np.stack([result.ion(float(mz)).compute() for mz in result.ions["mz"]])


def wald(
    result: Result,
    base: Config,
    cube: NDArray[np.float64],
    coarse: NDArray[np.float64],
    mask: NDArray[np.bool_],
    ratio: int,
    progress: Progress,
) -> dict[str, Any]:
    """Scores of the pipeline at one ratio.

    Args:
        result: A finished result.
        base: Settings of the pipeline.
        cube: (M, ny, nx) as measured.
        coarse: The cube, degraded.
        mask: Degraded pixels that were measured.
        ratio: Degradation.
        progress: Called with (what, share).

    Returns:
        ``alignment`` ("found", "given", "refused" or "none") with a ``note``, ``rows`` (medians over groups of ions;
        the first has SAM and ERGAS), ``ions``, ``consistency``, ``coverage_80`` over all ions and
        ``coverage_80_present`` over those that are present, ``alignment_apart_px``, ``alignment_evidence``.
    """
    pitch = (result.grid.pitch_um[0] * ratio, result.grid.pitch_um[1] * ratio)
    section = result.provenance["section"]
    # The degraded cube is measured data already: its ingestion and its normalisation are done.
    settings = base.model_copy(update={"factor": ratio, "ingest": IngestSettings()})

    def tell(what: str) -> Progress:
        return lambda stage, share: progress(f"wald x{ratio} {what}{stage}", share)

    with tempfile.TemporaryDirectory() as folder:
        msi = Path(folder) / "measured.zarr"
        known = result._measured.attrs
        attrs = {name: known[name] for name in ("tolerance_ppm", "tolerance_da", OWN) if name in known}
        write_measured(msi, np.nan_to_num(np.maximum(coarse, 0)), mask, result.ions["mz"], pitch, attrs)
        bare = settings.model_copy(update={"guide": False})
        plain = fuse(msi, None, Path(folder) / "plain.zarr", config=bare, progress=tell("no-guide "))
        images = {"no_guide": decoded(plain)}
        state, note = "none", ""
        if base.guide:
            out = Path(folder) / "ours.zarr"
            full = Path(folder) / "alignment.json"
            if result.alignment is not None:
                result.alignment.save(full)
            placed = {"slide_mpp_um": section.get("slide_mpp_um"), "alignment": full}
            placed["slide_region"] = section.get("slide_region")
            asked = ("slide_mpp_um", "alignment", "landmarks", "slide_region")
            given = {key: section[key] for key in asked if section.get(key)}
            state = "given" if section.get("alignment") or section.get("landmarks") else "found"
            if Path(given.get("landmarks") or "").suffix.lower() == MIS:
                # Teaching points know the grid that was measured, not one that was degraded.
                given = placed
            try:
                ours = fuse(msi, section["slide"], out, config=settings, progress=tell(""), **given)
            except InputError as error:
                # The row says so, and shows what the full-scale alignment would have given.
                state, note = "refused", f"blind: {error}; scored with the full-scale alignment"
                ours = fuse(msi, section["slide"], out, config=settings, progress=tell("placed "), **placed)
            images["ours"] = decoded(ours)
            sd = np.stack([ours.uncertainty(float(mz)).compute() for mz in ours.ions["mz"]])
            # Read while its folder is there.
            found = ours.alignment
    shape = images["no_guide"].shape[1:]
    truth = cube[:, : shape[0], : shape[1]]
    inside = result.mask[: shape[0], : shape[1]] & np.repeat(np.repeat(mask, ratio, 0), ratio, 1)
    images["bicubic"] = np.stack([keys_bicubic(c, ratio, mask) for c in coarse])
    scored: dict[str, Any] = {"ratio": ratio, "alignment": state, "note": note, "pixels": int(mask.sum())}
    scored |= _table(truth, images, inside, result, ratio)
    scored["consistency"] = float((ours if base.guide else plain).ions["consistency"].max())
    if base.guide:
        held = covered(truth, images["ours"], sd, inside)
        present = (truth[:, inside] > 0).mean(1) > PRESENT
        scored["coverage_80"] = float(np.median(held))
        scored["coverage_80_present"] = float(np.median(held[present])) if present.any() else None
        for ion, share in zip(scored["ions"], held, strict=True):
            ion["coverage_80"] = float(share)
        if state == "found" and found is not None:
            scored |= _alignment(found, result)
    return scored


def _alignment(found: Alignment, result: Result) -> dict[str, Any]:
    """How far the alignment of the degraded run lies from the result's, and what it was accepted on."""
    keys = ("held_out_r2", "runner_up_r2", "null_r2")
    out: dict[str, Any] = {"alignment_evidence": {key: found.evidence[key] for key in keys if key in found.evidence}}
    if result.alignment is not None:
        out["alignment_apart_px"] = apart_px(found, result.alignment, result.grid, result.mask)
    return out


def _table(
    truth: NDArray[Any], images: dict[str, NDArray[Any]], mask: NDArray[np.bool_], result: Result, ratio: int
) -> dict[str, Any]:
    """Medians over groups of ions, and every ion's scores."""
    names = [n for n in METHODS if n in images]
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
