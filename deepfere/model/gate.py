"""Gates: how much of the predicted detail is let through, factor by factor and ion by ion.

The gate is the least-squares gain of the held-out predicted on the true detail at reduced scale, clipped
to [0, 1], and 0 unless the held-out R2 beats 95 % of null guides and the gain is positive over the
spatial blocks beyond two standard errors. Where it is 0 the output is plain interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

INFORMED_R2 = 0.10
"""Held-out R2 of the detail from which an ion is called "stain-informed"."""
LEAST_R2 = 0.05
"""Held-out R2 of an ion's detail below which its gate stays shut."""
LEAST_FACTOR_R2 = 0.02
"""The same for a factor: ions are judged once more."""
FAR_SD = 4.0
"""How far ahead of the null guides, in their standard deviations, is far."""


@dataclass(frozen=True)
class Moments:
    """Second moments of true detail and predictions per spatial block.

    Attributes:
        tt: (B, C) sum of squares of the targets.
        tp: (B, C, K) targets times predictions.
        pp: (B, K, K) predictions times predictions.
    """

    tt: Array
    tp: Array
    pp: Array


def moments(targets: NDArray[np.floating], predicted: NDArray[np.floating], block: NDArray[np.int64]) -> Moments:
    """Per-block moments, in float64, of (R, C) targets and (R, K) predictions."""
    # Without rows there is one empty block: no evidence, not an error.
    members = [np.flatnonzero(block == b) for b in np.unique(block)] or [np.zeros(0, np.int64)]
    found = []
    for m in members:
        t, p = targets[m].astype(np.float64), predicted[m].astype(np.float64)
        found.append(((t**2).sum(0), t.T @ p, p.T @ p))
    tt, tp, pp = (np.stack(part) for part in zip(*found, strict=True))
    return Moments(tt, tp, pp)


@dataclass(frozen=True)
class Gain:
    """What a prediction is worth for each target.

    Attributes:
        gain: (C,) least-squares gain clipped to [0, 1].
        r2: (C,) held-out R2 of the detail with that gain.
        evidence: (C,) mean over blocks of the improvement, in standard errors.
    """

    gain: Array
    r2: Array
    evidence: Array


def gains(m: Moments, loadings: Array) -> Gain:
    """Gain of the combined prediction ``predicted @ loadings.T`` for every target.

    Args:
        m: Moments with C targets and K predictions.
        loadings: (C, K).
    """
    cross = np.einsum("bck,ck->bc", m.tp, loadings)
    power = np.einsum("ck,bkl,cl->bc", loadings, m.pp, loadings, optimize=True)
    total = power.sum(0)
    gain = np.clip(cross.sum(0) / np.where(total > 0, total, np.inf), 0.0, 1.0)
    better = 2 * gain * cross - gain**2 * power
    truth = m.tt.sum(0)
    r2 = better.sum(0) / np.where(truth > 0, truth, np.inf)
    blocks = len(better)
    error = better.std(0, ddof=1) / np.sqrt(blocks) if blocks > 1 else np.full(len(gain), np.inf)
    evidence = better.mean(0) / np.where(error > 0, error, np.inf)
    return Gain(gain, r2, evidence)


@dataclass(frozen=True)
class Gate:
    """Gates and the figures behind them, one entry per target.

    Attributes:
        gate: In [0, 1]; 0 where nothing is proven.
        r2: Held-out R2 of the detail at reduced scale.
        null_r2: The 95th percentile of the same over null guides.
        null_mean: Its mean over null guides.
    """

    gate: Array
    r2: Array
    null_r2: Array
    null_mean: Array

    def informed(self) -> list[str]:
        """Each target's class: "stain-informed", "partly" or "smooth"; "not judged" where nothing was held out."""
        classes = []
        for gate, r2 in zip(self.gate, self.r2, strict=True):
            opened = "not judged" if np.isnan(r2) else ("stain-informed" if r2 >= INFORMED_R2 else "partly")
            classes.append("smooth" if gate <= 0 else opened)
        return classes


def decide(found: Gain, nulls: list[Gain], least_r2: float = 0.0) -> Gate:
    """Open the gate of every target whose gain is proven.

    It has to beat 95 % of the null guides, and the improvement has to be there all over the section: two standard
    errors above zero over spatial blocks. Where few blocks carry a target (a small section, a structure in one
    corner), one standard error is enough if the null guides are left far behind.

    Args:
        found: Gains of the guide.
        nulls: Gains of null guides, obtained in the same way.
        least_r2: Not opened for less: it would hardly show, and noise is as large.
    """
    r2 = np.stack([n.r2 for n in nulls]) if nulls else np.zeros((1, len(found.r2)))
    bar, far = np.quantile(r2, 0.95, axis=0), r2.mean(0) + FAR_SD * r2.std(0)
    everywhere = found.evidence > 2.0
    far_ahead = (found.evidence > 1.0) & (found.r2 > far) & (found.r2 > INFORMED_R2)
    proven = (found.r2 > np.maximum(bar, least_r2)) & (everywhere | far_ahead)
    return Gate(np.where(proven, found.gain, 0.0), found.r2, bar, r2.mean(0))
