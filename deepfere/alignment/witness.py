"""The measurement as witness: which candidates on the slide are damage, and which are anatomy.

Where tissue was torn or folded after it was measured, the measurement shows there what it shows around; in a lumen or
in a dense layer it shows what the stain says. So a regression of the factors on footprint-averaged stain features,
fitted without the candidate, predicts its measured pixels twice: from the picture as it is, and from a repaired one (a
gap inpainted from around by normalised convolution, a band with its density divided by how much denser it is). The
difference of the two log likelihoods is the evidence. They know what the regression does not: its weights' covariance
is part of theirs, without the normalising determinants, which would count ignorance against the picture.

Large candidates are judged in parts: a tear may run into a lumen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.refine import RIDGE, footprint_points
from deepfere.alignment.repair import SUPERSAMPLE, pool, pooled_both, touched
from deepfere.frame import Alignment
from deepfere.model.damage import Candidates

TOUCHED = 0.2
"""Share of a measured pixel that a part has to cover for the pixel to bear witness."""
CLEAR = 0.05
"""Share of it that candidates may cover for it to count as free of them."""
LEAST_PX = 2
"""Measured pixels that a part needs to be judged on."""
MARGIN = 6.0
"""Difference of log likelihoods, in nats, that damage needs, besides the logarithm of the number of parts (Bonferroni);
and its opposite is what anatomy needs before it joins the regression."""
FITS = 2.0
"""Mean square of what the repaired picture leaves of damage, in units of what the regression leaves elsewhere..."""
EXPLAINS = 0.25
"""...or of what the picture as it is leaves, at most. Otherwise something is there that neither picture knows."""
MOST_DAMAGE = 0.2
"""Share of the measured pixels that may be damaged: of a picture that is wrong in more places the rest is no judge."""
TRENDS = 3
"""Cosines per axis that take up what changes smoothly over the section."""
ROUNDS = 3
"""Parts that prove real join the regression, which then judges the others again."""
LEAST_ROWS = 60
"""Measured pixels free of candidates that the regression needs."""


@dataclass(frozen=True)
class Verdict:
    """What became of one part of a candidate.

    Attributes:
        kind: "tear" or "fold".
        whole: Number of the candidate.
        area_um2: On the slide.
        measured_px: Measured pixels that bore witness.
        gain: How much of the change that the picture claims is in the measurement: 1 in anatomy, 0 in damage.
        evidence: Log likelihood of the repaired picture less that of the picture, the correlation of neighbouring
            pixels' residuals taken off; None = not judged.
        fits: Whether the repaired picture explains the measurement (`FITS`, `EXPLAINS`); None = not judged.
        masked: Whether it is taken for damage.
    """

    kind: str
    whole: int
    area_um2: float
    measured_px: int
    gain: float | None
    evidence: float | None
    fits: bool | None
    masked: bool


def judge(
    measured: MeasuredOverview, stain: StainOverview, alignment: Alignment, candidates: Candidates
) -> list[Verdict]:
    """A verdict on each part of each candidate, in the order of their numbers.

    Args:
        measured: The section's leading factors.
        stain: The slide's overview.
        alignment: Section to slide.
        candidates: What may be damage on it.
    """
    kinds, whole = candidates.kinds, candidates.whole
    area = np.bincount(candidates.labels.ravel(), minlength=len(kinds) + 1)[1:] * np.prod(stain.spacing_um)
    unjudged = [Verdict(*what, 0, None, None, None, False) for what in zip(kinds, whole, area.tolist(), strict=True)]
    if not kinds:
        return []
    slide = torch.from_numpy(alignment.map(footprint_points(measured, SUPERSAMPLE).numpy()))
    shown = stain.planes[6] > 250
    clear = shown & (candidates.labels == 0)
    painted, repaired = pooled_both(measured, stain, slide, candidates)
    pixel, part, share = touched(candidates.labels, stain.spacing_um, slide, measured.mask)
    free = measured.mask.ravel() & (pool(clear, stain.spacing_um, slide).ravel() >= 1 - CLEAR)
    if free.sum() < LEAST_ROWS:
        return unjudged
    regression = _Regression(measured, painted, repaired)
    found, real = unjudged, np.zeros(len(kinds), bool)
    for _ in range(ROUNDS):
        # Parts that are real anatomy: as painted; what is not decided teaches nothing.
        doubtful = np.zeros(measured.mask.size, bool)
        doubtful[pixel[~real[part] & (share > CLEAR)]] = True
        joined = np.zeros(measured.mask.size, bool)
        joined[pixel[real[part]]] = True
        regression.fit((free | joined) & ~doubtful)
        found = []
        for number, kind in enumerate(kinds):
            own = part == number
            witnesses = pixel[own & (share >= TOUCHED)]
            said: tuple[float | None, float | None, bool | None] = (None, None, None)
            if len(witnesses) >= LEAST_PX:
                said = regression.evidence(witnesses, pixel[own])
            found.append(Verdict(kind, whole[number], float(area[number]), len(witnesses), *said, False))
        before, real = real, np.array([v.evidence is not None and v.evidence < -MARGIN for v in found])
        if (before == real).all():
            break
    return _decided(found, int(measured.mask.sum()))


def _decided(found: list[Verdict], measured_px: int) -> list[Verdict]:
    """Damage is what is not real of a candidate, if all of that has the evidence; or a part with twice as much.

    Nothing speaks for damage where the repaired picture does not fit either; and too much of it is none.
    """
    margin = MARGIN + float(np.log(max(1, sum(v.evidence is not None for v in found))))
    total: dict[int, float] = {}
    evidence = []
    for v in found:
        own = min(v.evidence or 0.0, 0.0) if v.fits is False else v.evidence or 0.0
        evidence.append(own)
        total[v.whole] = total.get(v.whole, 0.0) + (own if own > -margin else 0.0)
    out = [
        replace(v, masked=v.fits is not False and (own > 2 * margin or (own > -margin and total[v.whole] > margin)))
        for v, own in zip(found, evidence, strict=True)
    ]
    if sum(v.measured_px for v in out if v.masked) > MOST_DAMAGE * measured_px:
        return found
    return out


def masked_areas(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """What is masked, one entry per candidate: kind, area (um2 on the slide), measured pixels and evidence (nats)."""
    out: dict[int, dict[str, Any]] = {}
    for v in verdicts:
        if v.masked:
            entry = out.setdefault(v.whole, {"kind": v.kind, "area_um2": 0.0, "measured_px": 0, "evidence": 0.0})
            entry["area_um2"] += v.area_um2
            entry["measured_px"] += v.measured_px
            entry["evidence"] += v.evidence or 0.0
    return [entry | {"decided_by": "measurement"} for entry in out.values()]


class _Regression:
    """Ridge of the factors on features and slow trends, rows left out at will."""

    def __init__(self, measured: MeasuredOverview, painted: NDArray, repaired: NDArray) -> None:
        ny, nx = self._shape = measured.mask.shape
        waves = [[np.cos(np.pi * k * (np.arange(n) + 0.5) / n) for k in range(TRENDS)] for n in (ny, nx)]
        trends = np.stack([np.outer(a, b).ravel() for a in waves[0] for b in waves[1]])
        # The first trend is constant: the intercept.
        self._painted, self._repaired = (np.concatenate([trends, p]).T for p in (painted, repaired))
        self._targets = measured.images.reshape(len(measured.images), -1).T

    def fit(self, rows: NDArray[np.bool_]) -> None:
        """Use these rows (ny nx,)."""
        self._rows = rows
        x = self._painted[rows]
        self._scale = np.concatenate([[1.0], x[:, 1:].std(0) + 1e-9])
        self._gram, self._cross = self._moments(rows)
        weights, _ = self._solve(self._gram, self._cross, int(rows.sum()))
        residual = np.full((rows.size, self._targets.shape[1]), np.nan)
        residual[rows] = self._targets[rows] - self._painted[rows] / self._scale @ weights
        inner = residual[rows]
        covariance = inner.T @ inner / max(1, rows.sum() - len(weights))
        # Independent components of the residuals, each with its own correlation of neighbours.
        variance, axes = np.linalg.eigh(covariance)
        self._whiten = axes / np.sqrt(np.maximum(variance, 1e-9 * variance[-1] + 1e-300))
        image = (residual @ self._whiten).reshape(*self._shape, -1)
        self._same = 1.0 + sum(
            count * np.maximum(_mean_product(image[low], image[high]), 0.0)
            for count, low, high in (
                (2, np.s_[1:], np.s_[:-1]),
                (2, np.s_[:, 1:], np.s_[:, :-1]),
                (4, np.s_[1:, 1:], np.s_[:-1, :-1]),
            )
        )

    def _moments(self, rows: NDArray) -> tuple[NDArray, NDArray]:
        x = self._painted[rows] / self._scale
        return x.T @ x, x.T @ self._targets[rows]

    def _solve(self, gram: NDArray, cross: NDArray, count: int) -> tuple[NDArray, NDArray]:
        """Weights, and their covariance in units of the residuals'."""
        penalty = RIDGE * count * np.eye(len(gram))
        penalty[0, 0] = 1e-9 * count
        inverse = np.linalg.inv(gram + penalty)
        return inverse @ cross, inverse

    def evidence(self, witnesses: NDArray, own: NDArray) -> tuple[float, float, bool]:
        """Gain, log likelihood ratio and `Verdict.fits` of a part, by a fit without its own pixels (flat)."""
        inside = own[self._rows[own]]
        gram, cross = self._moments(inside)
        count = int(self._rows.sum()) - len(inside)
        weights, spread = self._solve(self._gram - gram, self._cross - cross, count)
        left, distance = [], []
        for features in (self._painted, self._repaired):
            x = features[witnesses] / self._scale
            left.append((self._targets[witnesses] - x @ weights) @ self._whiten)
            # Far from all that it was fitted to, the regression does not know: that must not count against the picture.
            trust = np.linalg.inv(np.eye(len(x)) + x @ spread @ x.T)
            distance.append(np.einsum("ik,ij,jk->k", left[-1], trust, left[-1]))
        change = left[1] - left[0]
        size = float((change**2 / self._same).sum())
        gain = float((change * left[1] / self._same).sum()) / max(size, 1e-12)
        # A residual whose neighbours say the same counts for as much less.
        evidence = float(((distance[0] - distance[1]) / self._same).sum() / 2)
        mean = [float(d.sum()) / left[0].size for d in distance]
        return gain, evidence, mean[1] <= max(FITS, EXPLAINS * mean[0])


def _mean_product(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """Mean of a b over space, per component; 0 where no two pixels are known."""
    product = (a * b).reshape(-1, a.shape[-1])
    known = np.isfinite(product).all(1)
    return product[known].mean(0) if known.any() else np.zeros(a.shape[-1])
