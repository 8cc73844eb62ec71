"""The measurement as witness: which candidates on the slide are damage, and which are anatomy.

Where tissue was torn or folded after it was measured, the measurement shows there what it shows around; in a lumen or
in a dense layer it shows what the stain says. So the likelihood of its measured pixels is computed twice
(`deepfere.alignment.likelihood`): from the picture as it is, and from a repaired one (a gap or ink inpainted from
around by normalised convolution, a band with its density divided by how much denser it is). The regression has not
seen the candidate, but all others: most of what looks like damage is anatomy. What proves damaged leaves it, and the
others are judged again.

Large candidates are judged in parts: a tear may run into a lumen. Parts that touch are decided together. Ink and folds
are one thing each: what is proven of one as a whole holds for all parts that speak for it, and for those between them.
What lies beside what is proven is judged in smaller parts then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.nn.functional import interpolate

from deepfere.alignment.likelihood import StainRegression
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.refine import footprint_points
from deepfere.alignment.repair import SUPERSAMPLE, pool, pooled_both, touched
from deepfere.frame import Alignment
from deepfere.model.damage import Candidates, finer
from deepfere.model.registration import on_slide

TOUCHED = 0.2
"""Share of a measured pixel that a part has to cover for the pixel to bear witness."""
CLEAR = 0.05
"""Share of it that candidates or the slide's outside may cover for it to count as free of them."""
LEAST_PX = 2
"""Measured pixels that a part needs to be judged on; one is enough beside what is proven."""
MARGIN = 8.0
"""Evidence, in nats, that damage needs, besides the logarithm of the number of parts (Bonferroni). Regressions are
never quite right: of ten undamaged sections, generated and real, some parts reach 4 to 7 nats, one of two pixels 10.
"""
EACH = 2.0
"""Parts that touch and have more evidence than this are decided by the sum of what exceeds it. Less is what parts show
that have nothing to do with damage; thousands of them, all around a section, would add up."""
JOINS = -4.0
"""What is damage takes in the parts beside it that have more than this: what speaks against it there is little."""
INVERSE_PITCH = 0.01
"""How exactly the section's place on the slide has to be known to say what is tissue there, in measured pixels."""
MOST_DAMAGE = 0.2
"""Share of the measured pixels that may be damaged: of a picture that is wrong in more places the rest is no judge."""
ROUNDS = 3
LEAST_ROWS = 60
"""Measured pixels that the regression needs."""


@dataclass(frozen=True)
class Verdict:
    """What became of one part of a candidate.

    Attributes:
        kind: "tear", "fold" or "ink".
        whole: Number of the candidate.
        measured_px: Measured pixels that bore witness and that no other part covers more of.
        evidence: Log likelihood beside the repaired picture less that beside the picture; None = not judged.
        masked: Whether it is taken for damage.
    """

    kind: str
    whole: int
    measured_px: int
    evidence: float | None
    masked: bool


def expected_tissue(measured: MeasuredOverview, stain: StainOverview, alignment: Alignment) -> NDArray[np.bool_]:
    """Where the measurement shows tissue, on the slide's overview (h, w).

    Args:
        measured: The section's leading factors.
        stain: The slide's overview.
        alignment: Section to slide.
    """
    h, w = stain.planes.shape[1:]
    block = [max(1, int(p / 4 / s)) for p, s in zip(measured.grid.pitch_um, stain.spacing_um, strict=True)]
    axes = [(np.arange(-(-n // b)) + 0.5) * b * s for n, b, s in zip((h, w), block, stain.spacing_um, strict=True)]
    # The inverse is smooth: linear between points a measured pixel apart.
    coarse = [np.linspace(axis[0], axis[-1], len(axis) // 4 + 2) for axis in axes]
    points = np.stack(np.meshgrid(*coarse, indexing="ij"), -1)
    pitch_um = np.asarray(measured.grid.pitch_um)
    section = torch.from_numpy(alignment.unmap(points, tolerance_um=INVERSE_PITCH * float(pitch_um.min())))
    fine = interpolate(
        section.permute(2, 0, 1)[None], size=[len(axis) for axis in axes], mode="bilinear", align_corners=True
    )
    at = np.floor(fine[0].permute(1, 2, 0).numpy() / pitch_um).astype(np.int64)
    on = ((at >= 0) & (at < measured.mask.shape)).all(-1)
    at = np.where(on[..., None], at, 0)
    shown = on & measured.tissue[at[..., 0], at[..., 1]]
    return np.repeat(np.repeat(shown, block[0], 0), block[1], 1)[:h, :w]


def judge(
    measured: MeasuredOverview, stain: StainOverview, alignment: Alignment, candidates: Candidates
) -> tuple[Candidates, list[Verdict]]:
    """What of the candidates is damage.

    Where some parts are, all are judged once more, those beside them in smaller parts; what is masked stays so. Where
    that would be more than `MOST_DAMAGE`, it is left at the first look.

    Args:
        measured: The section's leading factors.
        stain: The slide's overview.
        alignment: Section to slide.
        candidates: What may be damage on it.

    Returns:
        The candidates, some with smaller parts, and a verdict on each of their parts, in the order of their numbers.
    """
    slide = torch.from_numpy(alignment.map(footprint_points(measured, SUPERSAMPLE).numpy()))
    on = on_slide(slide, slide.new_tensor(stain.extent_um), SUPERSAMPLE).double().numpy()
    shown = (pool(stain.planes[6] > 250, stain.spacing_um, slide) * on).ravel()
    covered = measured.mask.ravel() & (shown >= 1 - CLEAR)
    count = len(candidates.kinds)
    if not count or covered.sum() < LEAST_ROWS:
        return candidates, [Verdict(*what, 0, None, False) for what in _what(candidates)]
    painted, repaired = pooled_both(measured, stain, slide, candidates)
    court = _Court(measured.mask, covered, StainRegression(measured.images, painted), repaired)
    spacing_um = stain.spacing_um
    first = court.verdicts(candidates, touched(candidates.labels, spacing_um, slide, measured.mask))
    proven = np.array([v.masked for v in first], bool)
    beside = np.zeros(count, bool)
    pairs = _touching(candidates.labels, np.array(candidates.whole))
    beside[pairs[proven[pairs].any(1)]] = True
    divided = beside & ~proven
    if not divided.any():
        return candidates, first
    closer, was = finer(candidates, divided, spacing_um, float(np.mean(measured.grid.pitch_um)))
    earlier = Earlier.of(first, was, divided)
    again = court.verdicts(closer, touched(closer.labels, spacing_um, slide, measured.mask), earlier)
    return (closer, again) if any(v.masked for v in again) else (candidates, first)


@dataclass(frozen=True)
class Earlier:
    """What a first look has found, for each part (n,) of a second one.

    Attributes:
        masked: It is damage.
        core: It is, by evidence of its own.
        whole: Its candidate was proven as a whole.
        small: It is smaller now.
        refuted: The first look spoke against what it is part of.
    """

    masked: NDArray[np.bool_]
    core: NDArray[np.bool_]
    whole: NDArray[np.bool_]
    small: NDArray[np.bool_]
    refuted: NDArray[np.bool_]

    @classmethod
    def none(cls, count: int) -> Earlier:
        """Nothing."""
        return cls(*(np.zeros(count, bool) for _ in range(5)))

    @classmethod
    def of(cls, first: list[Verdict], was: NDArray[np.int64], divided: NDArray[np.bool_]) -> Earlier:
        """For the second look's parts.

        Args:
            first: Verdicts of the first look.
            was: (n,) number of the first look's part that each is or was part of.
            divided: Which of the first look's parts are divided.
        """
        evidence, masked = _evidence(first), np.array([v.masked for v in first], bool)
        whole = _as_a_whole(first, evidence > EACH, _margin(evidence))
        found = (masked, masked & (evidence > EACH), whole, divided, divided & (evidence <= JOINS))
        return cls(*(values[was] for values in found))


def _what(candidates: Candidates) -> Iterator[tuple[str, int]]:
    return zip(candidates.kinds, candidates.whole, strict=True)


@dataclass(frozen=True)
class _Court:
    """What does not depend on how candidates are divided.

    Attributes:
        mask: (ny, nx) measured pixels.
        covered: (ny nx,) those that the slide shows.
        regression: Of the measurement on the stain as it is.
        repaired: (F, ny nx) footprint means of the repaired stain.
    """

    mask: NDArray[np.bool_]
    covered: NDArray[np.bool_]
    regression: StainRegression
    repaired: NDArray[np.float64]

    def verdicts(
        self,
        candidates: Candidates,
        seen: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
        earlier: Earlier | None = None,
    ) -> list[Verdict]:
        """A verdict on each part.

        Args:
            candidates: What may be damage.
            seen: Measured pixels, parts and shares, see `touched`.
            earlier: What a first look has found; None = this is the first.
        """
        kinds, whole = candidates.kinds, np.array(candidates.whole)
        found = [Verdict(*what, 0, None, False) for what in _what(candidates)]
        earlier = earlier or Earlier.none(len(kinds))
        pixel, part, share = seen
        bears = _bears(pixel, whole[part], share)
        # Of the parts on a measured pixel, the one that covers most of it counts it.
        largest = np.lexsort((part, -share, pixel))
        largest = largest[bears[largest]]
        _, one_each = np.unique(pixel[largest], return_index=True)
        counts = np.bincount(part[largest[one_each]], minlength=len(kinds)).tolist()
        order = np.argsort(part, kind="stable")
        starts = np.searchsorted(part[order], np.arange(1, len(kinds)))
        pixels, shares, witness = (np.split(values[order], starts) for values in (pixel, share, bears))
        touching = _touching(candidates.labels, whole)
        damaged, least = earlier.masked, np.where(earlier.small, 1, LEAST_PX)
        for _ in range(ROUNDS):
            rows = self.covered.copy()
            rows[pixel[(share > CLEAR) & damaged[part]]] = False
            self.regression.fit(rows)
            for parts in np.split(np.arange(len(kinds)), np.flatnonzero(np.diff(whole)) + 1):
                near = np.unique(np.concatenate([pixels[n][shares[n] > CLEAR] for n in parts]))
                prediction = self.regression.without(near)
                for one in parts:
                    witnesses = pixels[one][witness[one]]
                    evidence = prediction.log_ratio(witnesses, self.repaired) if len(witnesses) >= least[one] else None
                    found[one] = replace(found[one], measured_px=counts[one], evidence=evidence)
            last, damaged = damaged, decide(found, touching, earlier)
            if (last == damaged).all():
                break
        if len(np.unique(pixel[bears & damaged[part]])) > MOST_DAMAGE * self.mask.sum():
            return found
        return [replace(v, masked=bool(is_damage)) for v, is_damage in zip(found, damaged, strict=True)]


def _bears(pixel: NDArray[np.int64], whole: NDArray[np.int64], share: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which (measured pixel, part) pairs (n,) bear witness: a pixel speaks of the candidate that covers most of it.

    Args:
        pixel: (n,) measured pixels.
        whole: (n,) candidates of the parts.
        share: (n,) of the pixel, covered by the part.
    """
    keys, of = np.unique(np.stack([pixel, whole]), axis=1, return_inverse=True)
    of = of.ravel()
    able = share >= TOUCHED
    total = np.bincount(of, share, keys.shape[1])
    total[np.bincount(of, able, keys.shape[1]) == 0] = 0.0  # no part of it is judged by this pixel
    most = np.zeros(int(pixel.max(initial=0)) + 1)
    np.maximum.at(most, keys[0], total)
    return able & (total[of] >= most[pixel] - 1e-9)


def decide(found: list[Verdict], touching: NDArray[np.int64], earlier: Earlier | None = None) -> NDArray[np.bool_]:
    """Which parts (n,) are damage.

    Parts that touch and have some evidence each (`EACH`) are decided together, by the sum of what exceeds that; ink and
    folds also as a whole, by that sum less what speaks against them, which takes in parts between two others. What is
    damage takes in the parts beside it that were not judged or have little against it (`JOINS`). Smaller parts of what
    was spoken against have to speak for themselves.

    Args:
        found: The evidence.
        touching: (p, 2) numbers of parts of one candidate that touch.
        earlier: What a first look has found.
    """
    evidence = _evidence(found)
    margin = _margin(evidence)
    earlier = earlier or Earlier.none(len(found))
    able = earlier.core | (evidence > EACH)
    a, b = touching[able[touching].all(1)].T
    _, group = connected_components(coo_array((np.ones(len(a)), (a, b)), (len(found), len(found))), directed=False)
    total = np.bincount(group, np.where(able, np.maximum(np.nan_to_num(evidence) - EACH, 0.0), 0.0))
    holds = np.bincount(group, earlier.core) > 0
    damaged = earlier.masked | (able & (holds | (total > margin))[group])
    proven = earlier.whole | _as_a_whole(found, able, margin)
    damaged |= proven & able
    # What only joined at the first look takes in no more.
    seeds = damaged & (able | ~earlier.masked)
    open_to = ~earlier.refuted | (evidence > 0)
    between = sum(np.bincount(k, seeds[other], len(found)) for k, other in (touching.T, touching.T[::-1])) >= 2
    taken = proven & between & ~(evidence < -margin) & open_to
    damaged |= taken
    seeds |= taken
    # One step only: a chain of parts that say little may lead all around the tissue.
    joins = np.where(earlier.small, evidence > JOINS, ~(evidence <= JOINS)) & (open_to | damaged)
    a, b = touching[seeds[touching].any(1) & joins[touching].all(1)].T
    damaged[a] = damaged[b] = True
    return damaged


def _evidence(found: list[Verdict]) -> NDArray[np.float64]:
    """Of each part (n,), NaN where it was not judged."""
    return np.array([np.nan if v.evidence is None else v.evidence for v in found])


def _margin(evidence: NDArray[np.float64]) -> float:
    return MARGIN + float(np.log(max(1, np.isfinite(evidence).sum())))


def _as_a_whole(found: list[Verdict], able: NDArray[np.bool_], margin: float) -> NDArray[np.bool_]:
    """Which parts (n,) are of ink or a fold that is proven by all of its parts."""
    whole, one = np.array([v.whole for v in found]), np.array([v.kind != "tear" for v in found])
    evidence = np.nan_to_num(_evidence(found))
    speaks = np.where(able, np.maximum(evidence - EACH, 0.0), np.minimum(evidence, 0.0))
    return np.asarray(one & (np.bincount(whole, speaks) > margin)[whole])


def _touching(labels: NDArray[np.int32], whole: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs (p, 2) of parts of one candidate that lie side by side on the overview."""
    pairs = [np.zeros((0, 2), np.int64)]
    for one, other in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        border = (one != other) & (one > 0) & (other > 0)
        pairs.append(np.sort(np.stack([one[border], other[border]], 1).astype(np.int64) - 1, 1))
    found = np.unique(np.concatenate(pairs), axis=0)
    return found[whole[found[:, 0]] == whole[found[:, 1]]] if len(found) else found


def masked_areas(
    verdicts: list[Verdict], masked: NDArray[np.int32], spacing_um: tuple[float, float]
) -> list[dict[str, Any]]:
    """What is masked, one entry per candidate: kind, area (um2 on the slide), measured pixels and evidence (nats).

    Args:
        verdicts: On all parts.
        masked: (h, w) the part that each pixel of the overview is masked with, plus one; 0 elsewhere.
        spacing_um: Overview pixel size (y, x).
    """
    area = np.bincount(masked.ravel(), minlength=len(verdicts) + 1)[1:] * np.prod(spacing_um)
    out: dict[int, dict[str, Any]] = {}
    for v, area_um2 in zip(verdicts, area.tolist(), strict=True):
        if v.masked:
            entry = out.setdefault(v.whole, {"kind": v.kind, "area_um2": 0.0, "measured_px": 0, "evidence": 0.0})
            entry["area_um2"] += area_um2
            entry["measured_px"] += v.measured_px
            entry["evidence"] += v.evidence or 0.0
    return [entry | {"decided_by": "measurement"} for entry in out.values()]
