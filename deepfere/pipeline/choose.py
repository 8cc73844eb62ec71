"""What is kept of a section's learning: alignment and tier by held-out blocks, then gates, positivity, uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.config import Config
from deepfere.cores import side_by_side
from deepfere.errors import InputError
from deepfere.frame import Alignment, apart_px
from deepfere.measured.factors import Factors, factor_weight
from deepfere.model.detail import COVERED
from deepfere.model.features import FEATURES
from deepfere.model.fit import (
    RATIO,
    SectionFit,
    evidence,
    fit_t1,
    gate_ions,
    select_positivity,
    tier_error,
    tier_evidence,
)
from deepfere.model.fit import Evidence as Problem
from deepfere.model.gate import Gate
from deepfere.model.guide import GuideSpec
from deepfere.model.network import FusionNetwork
from deepfere.model.reduced import deep_detail, fit_deep, mixed_by_factor, ridge_detail
from deepfere.model.ridge import RidgeFit, null_guides
from deepfere.model.transfer import LEAST_PX, SmoothingChoice
from deepfere.pipeline.prepare import Prepared, load_alignment
from deepfere.pipeline.tile import FEW, pool, read_pooled
from deepfere.pipeline.workspace import Progress
from deepfere.places import Place
from deepfere.schedule import run_phase

TIER_EVIDENCE = 1.0
"""Standard errors over spatial blocks by which the network must be ahead to be used at all: on few pixels luck looks
like skill. See `network_share`."""

ALIGNMENT_MARGIN = 0.001
"""Share of the detail's variance by which the jointly refined alignment must be ahead of its start."""


@dataclass(frozen=True)
class Learned:
    """What one section's reconstruction uses.

    Attributes:
        tier: "T0", "T1" or "T2".
        alignment: The alignment kept.
        guide: The stain as the model sees it: its smoothing, its types; None without a slide.
        fit: Gates, weights and evidence.
        notes: Scores of the choices made, for the report and MLflow.
    """

    tier: str
    alignment: Alignment
    guide: GuideSpec | None
    fit: SectionFit
    notes: dict[str, Any]


def section_problem(
    prep: Prepared,
    cube: NDArray[np.float32],
    factors: Factors,
    pooled: Place,
    smoothings: tuple[float, ...],
    choice: SmoothingChoice | None = None,
) -> Problem:
    """The section's reduced-scale problem, from footprint averages of the stain at some smoothings.

    Raises:
        InputError: The slide shows no measured pixel.
    """
    features, cover = read_pooled(pooled, len(smoothings))
    covered = cover >= COVERED
    if not (covered & prep.measured.mask).any():
        raise InputError(
            "the slide shows no measured pixel at this alignment",
            where=prep.section.slide,
            remedy="correct the alignment",
        )
    return evidence(features, smoothings, prep.measured.mask, covered, cube, factors, choice)


def without_guide(cube: NDArray[np.float32], mask: NDArray[np.bool_], factors: Factors) -> Learned:
    """T0: no stain at all; only the positivity steps are selected."""
    ions, count = len(cube), factors.basis.shape[1]
    steps, uncertainty = select_positivity(cube, mask, None, np.zeros((ions, count)))
    zero = np.zeros(ions)
    fit = SectionFit(
        np.zeros((len(FEATURES), count)),
        factors.basis,
        np.zeros(count),
        np.zeros(count),
        zero,
        zero,
        zero,
        zero,
        steps,
        uncertainty,
        np.zeros(len(FEATURES)),
        np.ones(len(FEATURES)),
    )
    return Learned("T0", Alignment.identity(), None, fit, {"tier": "T0"})


def deep_gates(
    problem: Problem,
    basis: NDArray[np.float64],
    closed: tuple[RidgeFit, list[NDArray[np.float32]]],
    deep: tuple[RidgeFit, list[NDArray[np.float32]]],
    rows: NDArray[np.bool_],
    share: NDArray[np.float64],
) -> tuple[Gate, Gate]:
    """Gates of the factors and of the ions where the network is used.

    Only rows that training never saw can judge the network; but they are few, and no ion is opened further by them than
    by what the closed form shows all over the section. The closed form's part keeps the gates that it has there.

    Args:
        problem: The section's reduced-scale problem.
        basis: (M, K) W.
        closed: The closed form, and its null guides' held-out predictions.
        deep: The same with the network.
        rows: (R,) rows that training never saw.
        share: (K,) how much of the network each factor has.
    """
    told, shown = gate_ions(problem, basis, closed[0].predicted, closed[1])
    factor, ion = gate_ions(problem, basis, deep[0].predicted, deep[1], rows)
    ion = replace(ion, gate=np.minimum(ion.gate, shown.gate))
    power = basis**2
    of_ions = (power @ share / np.maximum(power.sum(1), 1e-300)).round(12)  # all of it is all of it
    return between(told, factor, share), between(shown, ion, of_ions)


def between(closed: Gate, deep: Gate, share: NDArray[np.float64]) -> Gate:
    """Gates, and the evidence for them, of a mean of two tiers.

    Args:
        closed: Of the closed form.
        deep: Of the network.
        share: (M,) how much of the network each has, in [0, 1].

    Returns:
        Every figure (M,) between those of the two.
    """

    def mean(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        # What is not judged is NaN: of a tier that has no part it does not count.
        both = (1 - share) * one + share * other
        return np.where(share <= 0, one, np.where(share >= 1, other, both))

    return Gate(*(mean(getattr(closed, f.name), getattr(deep, f.name)) for f in fields(Gate)))


def network_share(evidence: float) -> float:
    """How much of the network's advantage on held-out blocks is believed, in [0, 1).

    An estimate that is z standard errors from nothing is shrunk by ``1 - 1 / z^2``, to nothing below one, as James and
    Stein do (*Estimation with quadratic loss*, 1961). What is gained where there is no advantage is lost in part where
    there is one of about two standard errors.

    Args:
        evidence: Standard errors by which it is ahead, see `tier_evidence`; negative where it is behind.
    """
    return max(0.0, 1.0 - (TIER_EVIDENCE / evidence) ** 2) if evidence > 0 else 0.0


def choose(
    prep: Prepared,
    cube: NDArray[np.float32],
    factors: Factors,
    problem: Problem,
    guide: GuideSpec,
    closed: tuple[RidgeFit, list[NDArray[np.float32]]],
    held: NDArray[np.bool_],
    joint: tuple[FusionNetwork, Alignment] | None,
    config: Config,
    progress: Progress,
    moved: bool,
    spread: bool,
) -> Learned:
    """Decide alignment and tier by held-out blocks, then gates, positivity and uncertainty.

    Args:
        prep: The section.
        cube: (M, ny, nx) ions.
        factors: Its factors.
        problem: Its reduced-scale problem.
        guide: The stain as the model sees it.
        closed: The closed form, and its null guides' held-out predictions.
        held: By number, the blocks that the network never saw.
        joint: The network, and the section's alignment after training; None where there is no network.
        config: Settings.
        progress: Called with ("learn", share).
        moved: Whether training may have moved the alignment.
        spread: The workers of a pool may be asked for help: this is none of them.
    """
    weight = factor_weight(factors) ** 2
    everywhere, blocks = np.ones(len(problem.rows.block), bool), problem.blocks
    alignment = load_alignment(prep.folder)
    notes: dict[str, Any] = {"t1_left": tier_error(problem, weight, closed[0].predicted, everywhere)}
    how = "search, affine and spline" if alignment.displacement is not None else "search and affine"
    stages = [{"stage": how, "r2": 1 - notes["t1_left"], "kept": True}]
    free = prep.section.alignment is None and prep.section.landmarks is None
    if joint is not None and moved and free:
        # The jointly refined registration stays only if the closed form, refitted with it, says so.
        trial = joint[1]
        choice = problem.choice
        kept_smoothing = choice.distinct
        averages = pool(prep, guide, trial, lambda *_: None, prep.folder.pooled_joint, kept_smoothing)
        run_phase(averages, inline_up_to=FEW if spread else averages.count)
        other = section_problem(prep, cube, factors, prep.folder.pooled_joint, kept_smoothing, choice)
        refit = fit_t1(other, config.model.null_guides, config.seed)
        left = tier_error(other, weight, refit[0].predicted, np.ones(len(other.rows.block), bool))
        notes["t1_left_joint"] = left
        notes["joint_moved_px"] = apart_px(trial, alignment, prep.measured.grid, prep.measured.mask)
        # Losing rows must not look like a gain: the slide has to cover every pixel that it covered before.
        kept = left < notes["t1_left"] - ALIGNMENT_MARGIN and bool((other.mask >= problem.mask).all())
        notes["joint_kept"] = kept
        stages.append({"stage": "joint with the network", "r2": 1 - left, "kept": kept})
        if kept:
            alignment, problem, closed = trial, other, refit
    alignment = alignment.with_evidence(stages=stages)
    progress("learn", 0.9)
    fit, nulls = closed
    tier, network = "T1", None
    if joint is not None:
        # By the blocks that training knew: those of another alignment, which covers more, are cut elsewhere.
        rows = held[blocks.ravel()[problem.rows.index]]
        deep = fit_deep(joint[0], problem, factors, fit)
        # Its features have the common smoothing, which is not the one of other factors.
        able = problem.group == 0
        together, apart = tier_evidence(problem, weight * able, fit.predicted, deep.predicted, rows)
        by_network = (apart > 0) & able & (problem.mask.sum() >= LEAST_PX)
        share = network_share(together) * by_network
        if config.model.tier == "T2":
            share = np.ones(len(by_network))
        mixed = mixed_by_factor(fit, deep, share)
        notes["t1_left_held_out"] = tier_error(problem, weight, fit.predicted, rows)
        notes["t2_left_held_out"] = tier_error(problem, weight, deep.predicted, rows)
        notes["t2_evidence"] = together
        notes["t2_factors"], notes["t2_share"] = int((share > 0).sum()), float(share.max())
        if share.any():
            tier, network = "T2", joint[0]
            guides = null_guides(problem.features, config.model.null_guides, config.seed)

            def of_null(given: tuple[NDArray[np.float32], NDArray[np.float64]]) -> NDArray[np.float32]:
                null, features = given
                alone = replace(closed[0], predicted=null.astype(np.float64))
                both = fit_deep(joint[0], problem, factors, alone, features)
                return mixed_by_factor(alone, both, share).predicted.astype(np.float32)

            null_rows = side_by_side(of_null, zip(nulls, guides, strict=True), at_once=problem.at_once)
            factor_gate, ion_gate = deep_gates(problem, factors.basis, (fit, nulls), (mixed, null_rows), rows, share)
            fit = mixed
    if tier == "T1":
        factor_gate, ion_gate = gate_ions(problem, factors.basis, fit.predicted, nulls)
    if config.model.tier == "T0" or not ion_gate.gate.any():
        tier = "T0" if config.model.tier == "T0" else tier
    gate = np.zeros_like(ion_gate.gate) if tier == "T0" else ion_gate.gate
    loadings = gate[:, None] * factors.basis

    def detail_at(ratio: int) -> NDArray[np.float64]:
        raw = (
            ridge_detail(problem, fit.weights)
            if network is None
            else deep_detail(network, problem, factors, fit.weights)
        )
        # As in the result: what the slide does not show has none.
        covered = problem.mask[: raw.shape[1], : raw.shape[2]]
        return raw * factor_gate.gate[:, None, None] * covered

    steps, uncertainty = select_positivity(cube, prep.measured.mask, detail_at, loadings)
    shown = problem.features[: guide.count, problem.mask].T
    sd = shown.std(0)
    section = SectionFit(
        fit.weights,
        factors.basis,
        factor_gate.gate,
        factor_gate.r2,
        gate,
        ion_gate.r2,
        ion_gate.null_r2,
        ion_gate.null_mean,
        steps,
        uncertainty,
        shown.mean(0),
        np.where(sd > 1e-6, sd, 1.0),
    )
    notes["tier"] = tier
    notes["ratio"] = RATIO
    notes["smoothing_pitch"] = problem.choice.smoothing_pitch
    notes["own_smoothing_pitch"] = list(problem.choice.own_pitch)
    notes["stain_types"] = 0 if guide.types is None else len(guide.types)
    notes["transferred_r2"] = problem.choice.transferred_r2
    notes["transfer_gain"] = problem.choice.gain
    return Learned(tier, alignment, guide, section, notes)
