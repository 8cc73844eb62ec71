"""Figures of an evaluation: the right stain against wrong ones, and gains that were promised against measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepfere.evaluation.figures import CLASS_COLOURS, CLASSES, legend_above

LARGEST_DB = 30.0
"""Gains are drawn up to this: an ion that is predicted completely has an infinite one."""


def _panel(dark: bool) -> tuple[Figure, Axes, str]:
    ink = "#d6dae0" if dark else "#2b3038"
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.tick_params(colors=ink)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(ink)
    return figure, axes, ink


def right_and_wrong(evidence: Mapping[str, Any], *, dark: bool = False) -> Figure | None:
    """Every ion's gain with the right stain, best first, above what wrong stains reach.

    Args:
        evidence: From `deepfere.evaluation.trust.evidence_of`.
        dark: Light text, for a dark page; the background is transparent either way.
    """
    ions = sorted(evidence.get("ions") or [], key=lambda ion: -ion["gain_db"])
    if not ions:
        return None
    figure, axes, ink = _panel(dark)
    place = np.arange(1, len(ions) + 1)

    def column(name: str) -> np.ndarray:
        return np.clip(np.nan_to_num([ion[name] for ion in ions], nan=0.0), -1.0, LARGEST_DB)

    wrong, mean = column("null_p95_db"), column("null_mean_db")
    axes.fill_between(place, np.zeros(len(ions)), wrong, step="mid", color=ink, alpha=0.25, linewidth=0)
    axes.step(place, wrong, where="mid", color=ink, linewidth=1.2, label="wrong stains, 95 %")
    axes.step(place, mean, where="mid", color=ink, linewidth=1.0, linestyle=(0, (2, 2)), label="their mean")
    right = column("gain_db")
    size = float(np.clip(2000 / len(ions), 6, 40))
    for kind in CLASSES:
        chosen = np.array([ion["informed"] == kind for ion in ions])
        if chosen.any():
            axes.scatter(place[chosen], right[chosen], s=size, color=CLASS_COLOURS[kind], label=kind, zorder=3)
    axes.set_xlabel("ions, best first", color=ink)
    axes.set_ylabel("gain over interpolation, dB", color=ink)
    legend_above(axes, ink)
    return figure


def promised_and_measured(
    block: Mapping[str, Any], evidence: Mapping[str, Any], *, dark: bool = False
) -> Figure | None:
    """Every ion's gain over the run without the stain, as measured at one ratio, against what left-out blocks promised.

    Args:
        block: One ratio of ``wald``.
        evidence: From `deepfere.evaluation.trust.evidence_of`.
        dark: As for `right_and_wrong`.
    """
    known = {ion["mz"]: ion for ion in evidence.get("ions") or []}
    points = [
        (known[ion["mz"]]["informed"], known[ion["mz"]]["gain_db"], ion["ours_psnr"] - ion["no_guide_psnr"])
        for ion in block.get("ions") or []
        if ion["mz"] in known and "ours_psnr" in ion and np.isfinite(ion["ours_psnr"] - ion["no_guide_psnr"])
    ]
    if not points:
        return None
    figure, axes, ink = _panel(dark)
    kinds = np.array([kind for kind, _, _ in points])
    values = np.clip(np.nan_to_num([point[1:] for point in points], nan=0.0), -LARGEST_DB, LARGEST_DB)
    top = max(float(values.max()), 0.1) * 1.05
    axes.axhline(0.0, color=ink, linewidth=0.8)
    axes.plot([0, top], [0, top], color=ink, linewidth=1.0, linestyle=(0, (4, 2)), label="as promised")
    size = float(np.clip(4000 / len(points), 6, 40))
    for kind in CLASSES:
        if (kinds == kind).any():
            x, y = values[kinds == kind].T
            axes.scatter(x, y, s=size, color=CLASS_COLOURS[kind], label=kind, zorder=3)
    axes.set_xlabel("gain on left-out blocks at full scale, dB", color=ink)
    axes.set_ylabel(f"measured at × {block['ratio']}, dB", color=ink)
    legend_above(axes, ink)
    return figure
