"""What a result knows about itself: the evidence for each ion, with wrong stains beside the right one.

The fit of a section rehearses at reduced scale: it predicts, for blocks left out, what is lost when the measurement is
made coarser by 2. A prediction of that detail with a held-out R² gains ``-10 log10(1 - R²)`` dB over interpolation
there. The same fit with null guides (the stain mirrored, turned, shifted) says what chance, and the stain's texture
alone, would have gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepfere.reconstruction.result import Result

COLUMNS = ("held_out_r2", "gate", "consistency", "inferred_share", "noise_share", "chi_square")


def gain_db(r2: ArrayLike) -> NDArray[np.float64]:
    """Decibels that a prediction of the detail with this R² gains over interpolation."""
    left = 1.0 - np.minimum(np.asarray(r2, np.float64), 1.0)
    with np.errstate(divide="ignore"):
        return np.asarray(-10.0 * np.log10(left), np.float64)


def nested_medians(evidence: Mapping[str, Any]) -> tuple[float, float] | None:
    """Medians over the informed ions of the nested held-out R², and of that with alignment and factors as they are.

    Args:
        evidence: From `evidence_of`, with ``nested`` from `deepfere.evaluation.nested.nested_scores`.

    Returns:
        None where no ion is informed, or it was not done.
    """
    informed = {ion["mz"] for ion in evidence.get("ions") or [] if ion["informed"] != "smooth"}
    ions = [ion for ion in (evidence.get("nested") or {}).get("ions") or [] if ion["mz"] in informed]
    if not ions:
        return None
    both = (float(np.median([ion[key] for ion in ions])) for key in ("nested_r2", "left_out_r2"))
    return next(both), next(both)


def evidence_of(result: Result) -> dict[str, Any]:
    """What the result holds about its own quality, as plain values.

    Returns:
        ``ions``: per ion the columns of `Result.ions` and ``gain_db``, ``null_mean_db``, ``null_p95_db``;
        ``null_guides``: how many there were, and medians over the informed ions, largest values over all;
        ``alignment``: what it was accepted on; ``inferred_share`` over all ions.
    """
    table = result.ions
    gains = {
        "gain_db": gain_db(table["held_out_r2"]),
        "null_mean_db": gain_db(table["null_mean_r2"]),
        "null_p95_db": gain_db(table["null_r2"]),
    }
    ions = [
        {"mz": float(row["mz"]), "informed": str(row["informed"])}
        | {name: float(row[name]) for name in COLUMNS}
        | {name: float(values[n]) for name, values in gains.items()}
        for n, row in enumerate(table.to_dict("records"))
    ]
    out: dict[str, Any] = {"ions": ions, "inferred_share": result.inferred_share}
    if result.alignment is None:
        return out
    shown = np.asarray(table["informed"] != "smooth")
    config = result.provenance["config"]
    out["null_guides"] = {
        "count": int(config["model"]["null_guides"]),
        "informed_ions": int(shown.sum()),
        "gain_db": float(np.median(gains["gain_db"][shown])) if shown.any() else None,
        "null_mean_db": float(np.median(gains["null_mean_db"])),
        "null_p95_db": float(np.median(gains["null_p95_db"])),
        "null_p95_most_db": float(gains["null_p95_db"].max()),
    }
    found = result.alignment.evidence
    out["alignment"] = {
        key: found[key]
        for key in ("source", "held_out_r2", "runner_up_r2", "null_r2", "slide_cover", "stages", "residual_um")
        if key in found
    }
    notes = result.provenance["model"].get("notes") or {}
    if "t1_left_joint" in notes:
        out["alignment"]["joint"] = {
            "frozen_r2": 1.0 - notes["t1_left"],
            "joint_r2": 1.0 - notes["t1_left_joint"],
            "moved_px": notes.get("joint_moved_px"),
            "kept": bool(notes.get("joint_kept")),
        }
    return out
