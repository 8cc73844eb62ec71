"""The demo: a generated section with known truth through every stage, scored against the truth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deepfere.config import load_config
from deepfere.errors import InputError
from deepfere.evaluation.evaluate import ion_scores, scores_file
from deepfere.evaluation.report import write_report
from deepfere.locking import unwritable
from deepfere.phantom import Phantom, PhantomSpec, write_phantom
from deepfere.pipeline.fuse import check_output, fuse, output
from deepfere.pipeline.workspace import Progress, write_json
from deepfere.places import UrlPath
from deepfere.reconstruction.result import Result

SEED = 7


def truth_scores(phantom: Phantom, ours: Result, plain: Result) -> dict[str, Any]:
    """PSNR per kind of ion against the truth, of a result and of the same run without the stain.

    Args:
        phantom: The phantom, with its truth at pitch / factor.
        ours: The fused result.
        plain: The no-guide result.

    Returns:
        ``rows`` per kind ("kind", "informed", "ions", "no_guide_db", "ours_db", "gain_db") and the
        alignment's error in measured pixels ("alignment_median_px", "alignment_p90_px").
    """
    kinds, informed, true_mz = phantom.kinds(), phantom.informed(), phantom.mz()
    f = ours.factor
    mask = np.repeat(np.repeat(ours.mask, f, 0), f, 1)
    per_kind: dict[str, list[tuple[float, float]]] = {}
    for m, mz in enumerate(true_mz):
        truth = np.asarray(phantom.ions(m), np.float64)
        near = float(ours.ions["mz"].iloc[int(np.abs(ours.ions["mz"] - mz).argmin())])
        if abs(near - mz) / mz * 1e6 > 10:
            continue
        images = [r.ion(near).compute().astype(np.float64) for r in (plain, ours)]
        scores = [ion_scores(truth[None], image[None], mask)["psnr"][0] for image in images]
        per_kind.setdefault(kinds[m], []).append((scores[0], scores[1]))
    rows = []
    for kind, pairs in per_kind.items():
        table = np.array(pairs)
        rows.append(
            {
                "kind": kind,
                "informed": bool(informed[kinds.index(kind)]),
                "ions": len(table),
                "no_guide_db": float(table[:, 0].mean()),
                "ours_db": float(table[:, 1].mean()),
                "gain_db": float((table[:, 1] - table[:, 0]).mean()),
                "worst_gain_db": float((table[:, 1] - table[:, 0]).min()),
                "best_gain_db": float((table[:, 1] - table[:, 0]).max()),
            }
        )
    out: dict[str, Any] = {"rows": rows}
    if ours.alignment is not None:
        points = ours.grid.centres_um()[ours.mask]
        true, found = phantom.alignment().map(points), ours.alignment.map(points)
        scale = np.sqrt(abs(np.linalg.det(phantom.alignment().matrix))) * float(np.mean(ours.grid.pitch_um))
        error = np.linalg.norm(true - found, axis=1) / scale
        out["alignment_median_px"] = float(np.median(error))
        out["alignment_p90_px"] = float(np.percentile(error, 90))
    return out


def run_demo(
    given: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    overwrite: bool = False,
    progress: Progress,
) -> tuple[str, Path]:
    """Write a phantom, fuse it with and without the stain, score both, write the report.

    Args:
        given: Folder where everything goes; a finished demo is left as it is.
        config: Settings file (YAML).
        overrides: ``section.key=value`` strings.
        overwrite: Do it again.
        progress: Called with (stage, share).

    Returns:
        A summary for the terminal, and the report's path.
    """
    folder = output(given)
    if isinstance(folder, UrlPath):
        raise InputError("is a URL", where=folder, remedy="give a folder")
    check_output(folder)
    spec = PhantomSpec(seed=SEED)
    # MLflow's place is a default; the factor is the truth's, and without the stain there would be nothing to show.
    here = load_config(tracking__uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    settings = load_config(config, overrides, base=here, factor=spec.factor, guide=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    source = folder / "section"
    if (source / "truth").exists() and not overwrite:
        phantom = Phantom.open(source)
        if phantom.spec != spec:
            raise InputError("holds another phantom", where=source, remedy="choose another folder, or give --overwrite")
    else:
        tell = lambda stage, done, total: progress(f"phantom {stage}", done / max(total, 1))  # noqa: E731
        phantom = write_phantom(source, spec, tell, overwrite=overwrite)
    (folder / "mlflow").mkdir(exist_ok=True)
    ours = fuse(
        phantom.imzml, phantom.slide, folder / "result.zarr", config=settings, overwrite=overwrite, progress=progress
    )
    bare = settings.model_copy(update={"guide": False})
    plain = fuse(
        phantom.imzml,
        None,
        folder / "no-guide.zarr",
        config=bare,
        overwrite=overwrite,
        progress=lambda stage, share: progress(f"no-guide {stage}", share),
    )
    scores = truth_scores(phantom, ours, plain)
    evaluation = {
        "identity": ours.provenance["identity"],
        "wald": [],
        "truth": scores["rows"],
        "alignment": {k: v for k, v in scores.items() if k != "rows"},
        "consistency": float(ours.ions["consistency"].max()),
    }
    write_json(scores_file(ours.path), evaluation)
    page = folder / "report.html"
    write_report(ours, page, evaluation=evaluation)
    return _summary(phantom, ours, evaluation), page


def _summary(phantom: Phantom, ours: Result, evaluation: dict[str, Any]) -> str:
    from deepfere.alignment.placement import describe

    assert ours.alignment is not None
    found, true = describe(ours.alignment), describe(phantom.alignment())
    align = evaluation["alignment"]
    lines = [
        f"orientation: found flip {found[0]}, {found[1]:.1f} degrees; true flip {true[0]}, {true[1]:.1f} degrees",
        f"alignment error: median {align['alignment_median_px']:.2f}, P90 {align['alignment_p90_px']:.2f} pixels",
        f"consistency, worst ion: {evaluation['consistency']:.1e}",
        f"{'ions':<10} {'stain shows them':<17} {'no-guide':>9} {'fused':>9} {'gain':>8}  (dB against the truth)",
    ]
    for row in evaluation["truth"]:
        shown = "in part" if row["kind"] == "twin" else "yes" if row["informed"] else "no"
        lines.append(
            f"{row['kind']:<10} {shown:<17} {row['no_guide_db']:9.2f} {row['ours_db']:9.2f} {row['gain_db']:+8.2f}"
        )
    return "\n".join(lines)
