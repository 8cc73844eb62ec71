"""Whether the best placement found is the right one; else landmarks are asked for."""

from __future__ import annotations

import numpy as np
import torch

from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.placement import Candidate, describe, null_placements, same_basin
from deepfere.alignment.score import placement_r2
from deepfere.errors import InputError
from deepfere.frame import Alignment

MARGIN = 0.05
"""Held-out R2 by which the best placement must beat the best wrong one."""

LEAST_R2 = 0.1
"""Held-out R2 that it must reach. Right ones reached 0.18 and more, 50 slides of other tissue at most 0.07."""

FEW_PX, MANY_PX = 250, 1000
LEAST_SUM_FEW, LEAST_SUM_MANY = 0.32, 0.15
"""Held-out R2 plus its margin that the best placement must reach, with at most few and with at least many pixels.

The fewer the pixels, the better the best of many wrong placements. With 105 and 211 pixels, 86 slides of other tissue
reached 0.28 at most; 44 right ones 0.26 and more, 42 of them 0.33.
"""

REMEDY = (
    "check --pitch-um and --slide-mpp-um, or give landmarks (--landmarks FILE.csv), an alignment "
    "(--alignment FILE.json), or the right slide (in a study by the columns of these names)"
)

MAX_STRETCH = 0.18
"""The stated sizes fix the scale: a placement that stretches any direction by more (in logarithms) is none.

It still competes: that it predicts as well as the best shows that the best is no more than luck.
"""


class AmbiguousPlacement(InputError):
    """Two placements that lie apart predict the ions alike.

    Attributes:
        placements: The best and the next.
    """

    placements: tuple[Alignment, Alignment]


def accept(
    measured: MeasuredOverview, stain: StainOverview, candidates: list[Candidate], features: torch.Tensor
) -> Alignment:
    """The best candidate, with its evidence.

    Args:
        measured: Factor images, as they were searched with.
        stain: Slide overview.
        candidates: Refined placements, best first.
        features: The features that they were scored with.

    Raises:
        AmbiguousPlacement: Another one is nearly as good.
        InputError: It is stretched, or no better than wrong placements may be.
    """
    if not candidates:
        raise InputError("no placement of the section on the slide covers 70 % of the measured tissue", remedy=REMEDY)
    best = candidates[0]
    others = [c for c in candidates[1:] if not same_basin(c.alignment, best.alignment, measured.grid)]
    second = max(others, key=lambda c: c.fine_r2, default=None)
    runner_up = -1.0 if second is None else second.fine_r2
    nulls = np.array(
        [
            placement_r2(measured, stain, a, features=features, fine=True)
            for a in null_placements(measured.grid, best.alignment, 20)
        ]
    )
    bar = float(nulls.mean() + 3 * nulls.std())
    total = best.fine_r2 + min(best.fine_r2, best.fine_r2 - runner_up)
    flip, rotation_deg, scale = describe(best.alignment)
    evidence = {
        "source": "search",
        "flip": flip,
        "rotation_deg": rotation_deg,
        "scale": scale,
        "held_out_r2": best.fine_r2,
        "held_out_r2_with_trend": best.r2,
        "runner_up_r2": runner_up,
        "null_r2": bar,
    }
    stretch = float(abs(np.log(np.linalg.svd(best.alignment.matrix, compute_uv=False))).max())
    if stretch > MAX_STRETCH:
        raise InputError(
            "the stain does not show where the section lies: the best placement stretches it by "
            f"{100 * np.expm1(stretch):.0f} %, against the stated sizes",
            remedy=REMEDY,
        )
    if best.fine_r2 < runner_up + MARGIN or best.fine_r2 < bar or best.fine_r2 < LEAST_R2:
        told = (
            f"the stain does not show where the section lies: the best placement predicts the ions' structure with a "
            f"held-out R2 of {best.fine_r2:.2f}, the next {runner_up:.2f}, wrong ones up to {bar:.2f}"
        )
        if second is None or best.fine_r2 >= runner_up + MARGIN:
            raise InputError(told, remedy=REMEDY)
        ambiguous = AmbiguousPlacement(told, remedy=REMEDY)
        ambiguous.placements = best.alignment, second.alignment
        raise ambiguous
    least = least_sum(int(measured.mask.sum()))
    if total < least:
        raise InputError(
            f"the stain does not show where the section lies: the best placement predicts the ions' structure with a "
            f"held-out R2 of {best.fine_r2:.2f}, the next {runner_up:.2f}; with {int(measured.mask.sum())} pixels that "
            f"may be luck (R2 and lead add up to {total:.2f}, {least:.2f} is needed)",
            remedy=REMEDY,
        )
    return best.alignment.with_evidence(**evidence)


def least_sum(pixels: int) -> float:
    """What held-out R2 and margin must add up to, for this many pixels; see `LEAST_SUM_FEW`."""
    ends = np.log([FEW_PX, MANY_PX])
    return float(np.interp(np.log(pixels), ends, [LEAST_SUM_FEW, LEAST_SUM_MANY]))
