"""Fitting one section: the tiers, their gates, positivity and uncertainty, all from reduced-scale runs.

Input is small: footprint-averaged stain features and the measurement, both on the measured grid. Each tier
must beat the one below on spatial blocks left out; each ion's gate is its own evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.alignment.score import spatial_blocks
from deepfere.cores import side_by_side
from deepfere.measured.factors import Factors, factor_weight, noise_sd
from deepfere.measured.operator import cell_means, fill_missing
from deepfere.model import gate as gates
from deepfere.model.decode import IonDecoder, positive
from deepfere.model.guide import Cells
from deepfere.model.ridge import (
    DENSITIES,
    LEADING,
    Chemistry,
    DetailRows,
    RidgeFit,
    detail_rows,
    fit_average,
    fit_own,
    null_guides,
    target_rows,
    usable,
)
from deepfere.model.transfer import SmoothingChoice, choose_smoothing
from deepfere.model.uncertainty import NoiseModel, common_scale, local_variance, scale_needed, variance_model

Array = NDArray[np.float64]
RATIO = 2
IONS_AT_ONCE = 32
SMALL_BYTES = 128 * 2**20
"""Of the regressors of all fits that are in the memory at a time; each takes several times as much."""
IMAGE_BYTES = 64 * 2**20
"""Of the images of ions that are looked at at a time; each takes ten times as much."""
POSITIVITY = (3, 4, 5)
"""Steps tried. None is no choice: below zero an intensity means nothing, and the fewest never cost accuracy."""


@dataclass(frozen=True)
class SectionFit:
    """What a section's reconstruction needs, and the evidence for it.

    Attributes:
        weights: (R, K) T1 weights on features, types and products at every smoothing: detail = regressors @ weights.
        basis: (M, K) ions from factors (W).
        factor_gate: (K,) gates of the factors.
        factor_r2: (K,) held-out R2 of the factors' detail.
        ion_gate: (M,) gates of the ions.
        ion_r2: (M,) held-out R2 of each ion's detail, at reduced scale.
        ion_null_r2: (M,) its 95th percentile over null guides.
        ion_null_mean: (M,) its mean over null guides.
        positivity: (M,) positivity steps.
        uncertainty: (M, 5) rows of `deepfere.model.uncertainty.NoiseModel`.
        feature_mean: (F,) mean of the features at the first smoothing over the tissue, types included.
        feature_sd: (F,) their s.d.
    """

    weights: Array
    basis: Array
    factor_gate: Array
    factor_r2: Array
    ion_gate: Array
    ion_r2: Array
    ion_null_r2: Array
    ion_null_mean: Array
    positivity: NDArray[np.int64]
    uncertainty: Array
    feature_mean: Array
    feature_sd: Array

    @property
    def loadings(self) -> Array:
        """(M, K) ion gate times W: what multiplies the stored (factor-gated) detail."""
        return self.ion_gate[:, None] * self.basis

    def informed(self) -> list[str]:
        """Each ion's class: "stain-informed", "partly" or "smooth"."""
        return gates.Gate(self.ion_gate, self.ion_r2, self.ion_null_r2, self.ion_null_mean).informed()

    def save(self, path: Any) -> None:
        """Write all arrays to one .npz."""
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Any) -> SectionFit:
        """Read what `save` wrote."""
        with np.load(path) as data:
            return cls(**{f.name: data[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Evidence:
    """The reduced-scale regression problem of one section.

    Attributes:
        choice: How smooth the features are.
        features: (S F, ny, nx) footprint-averaged features at its smoothings, holes filled.
        mask: (ny, nx) measured pixels that the slide covers.
        blocks: (ny, nx) spatial block numbers.
        chemistry: Leading factors, which the densities are multiplied with.
        rows: Stain detail rows.
        factor_rows: (R, K) measured detail of the factors.
        ion_rows: (R, M) float32, measured detail of the ions.
    """

    choice: SmoothingChoice
    features: Array
    mask: NDArray[np.bool_]
    blocks: NDArray[np.int64]
    chemistry: Chemistry
    rows: DetailRows
    factor_rows: Array
    ion_rows: NDArray[np.float32]

    @property
    def group(self) -> NDArray[np.int64]:
        """(K,) number of each factor's smoothing."""
        return self.choice.groups(self.factor_rows.shape[1])

    @property
    def at_once(self) -> int:
        """How many fits like its own may be made at once: each has rows of its own, and what is made of them."""
        return max(1, SMALL_BYTES * self.rows.groups // max(1, self.rows.stain.nbytes))


def evidence(
    pooled: Array,
    smoothings: tuple[float, ...],
    mask: NDArray[np.bool_],
    covered: NDArray[np.bool_],
    cube: Any,
    factors: Factors,
    choice: SmoothingChoice | None = None,
) -> Evidence:
    """Set up the reduced-scale problem.

    Args:
        pooled: (S, F, ny, nx) footprint-averaged stain features at every smoothing, perhaps with shares of types.
        smoothings: (S,) in measured pixels.
        mask: (ny, nx) measured pixels.
        covered: (ny, nx) pixels that the slide shows completely.
        cube: (M, ny, nx) ions.
        factors: Their factors.
        choice: Smoothing; None lets the data choose.
    """
    inside = mask & covered
    blocks = spatial_blocks(inside)
    images = fill_missing(factors.images, mask)
    if choice is None:
        choice = choose_smoothing(pooled, smoothings, inside, blocks, images, factor_weight(factors) ** 2)
    kept = choice.distinct
    features = np.concatenate([pooled[smoothings.index(s)] for s in kept])
    filled = fill_missing(features, inside) if inside.any() else features
    centre = filled[list(DENSITIES)][:, inside].mean(1) if inside.any() else np.zeros(3)
    chemistry = Chemistry(images[:LEADING], centre, len(kept))
    rows = detail_rows(filled, inside, blocks, RATIO, chemistry)
    ion_rows = np.empty((len(rows.block), len(cube)), np.float32)
    # A few ions at a time: with many of them, every copy of the cube counts.
    for k in range(0, len(cube), IONS_AT_ONCE):
        part = fill_missing(np.asarray(cube[k : k + IONS_AT_ONCE], np.float64), mask)
        ion_rows[:, k : k + IONS_AT_ONCE] = target_rows(part, inside, RATIO)
    return Evidence(choice, filled, inside, blocks, chemistry, rows, target_rows(images, inside, RATIO), ion_rows)


def gate_ions(
    problem: Evidence,
    basis: Array,
    predicted: Array,
    nulls: Sequence[NDArray[np.floating]],
    judged: NDArray[np.bool_] | None = None,
) -> tuple[gates.Gate, gates.Gate]:
    """Gates of the factors and of the ions for one tier's held-out predictions.

    Args:
        problem: The section's reduced-scale problem.
        basis: (M, K) W.
        predicted: (R, K) held-out predictions of the factors' detail.
        nulls: The same from null guides.
        judged: (R,) rows that may judge; all by default. With few blocks among them, the evidence is
            counted over finer ones.
    """
    rows = np.ones(len(predicted), bool) if judged is None else judged
    eye = np.eye(basis.shape[1])
    per_side = 4 if judged is None else 12
    block = spatial_blocks(problem.mask, per_side).ravel()[problem.rows.index][rows]
    # All rows are taken as they are: with many ions a copy of them is large.
    some: Any = rows if judged is not None else slice(None)
    factor_rows, ion_rows = problem.factor_rows[some], problem.ion_rows[some]

    def factor_gain(p: NDArray[np.floating]) -> gates.Gain:
        return gates.gains(gates.moments(factor_rows, p[some], block), eye)

    factor = gates.decide(factor_gain(predicted), [factor_gain(p) for p in nulls], gates.LEAST_FACTOR_R2)
    loadings = basis * factor.gate

    def ion_gain(p: NDArray[np.floating]) -> gates.Gain:
        return gates.gains(gates.moments(ion_rows, p[some], block), loadings)

    ion = gates.decide(ion_gain(predicted), [ion_gain(p) for p in nulls], gates.LEAST_R2)
    return factor, ion


def fit_t1(problem: Evidence, null_count: int, seed: int) -> tuple[RidgeFit, list[NDArray[np.float32]]]:
    """The closed-form tier and its null guides' held-out predictions."""
    fit = fit_own(problem.rows, problem.factor_rows, problem.group)

    def predicted(features: Array) -> NDArray[np.float32]:
        # Half the memory: with many pixels these are what there is most of. Regressors of one smoothing at a time.
        out = np.zeros(problem.factor_rows.shape, np.float32)
        chemistry, parts = replace(problem.chemistry, groups=1), np.split(features, problem.rows.groups)
        for number in np.unique(problem.group):
            own = problem.group == number
            rows = detail_rows(parts[number], problem.mask, problem.blocks, RATIO, chemistry)
            out[:, own] = fit_average(rows, problem.factor_rows[:, own]).predicted
        return out

    guides = null_guides(problem.features, null_count, seed)
    return fit, side_by_side(predicted, guides, at_once=problem.at_once)


def tier_error(problem: Evidence, weight: Array, predicted: Array, where: NDArray[np.bool_]) -> float:
    """Weighted share of the factors' detail that a prediction leaves unexplained on some rows.

    Gains are free per factor, so that a tier is judged by its structure, as its gate will use it.
    """
    t, p = problem.factor_rows[where], predicted[where]
    cross, power = (t * p).sum(0), (p * p).sum(0)
    gain = np.clip(cross / np.where(power > 0, power, np.inf), 0, 1)
    total = (t**2).sum(0)
    # Where there is nothing to explain (no rows, say), nothing is explained.
    left = np.where(total > 0, ((t - gain * p) ** 2).sum(0) / np.where(total > 0, total, 1.0), 1.0)
    return float((weight * left).sum() / weight.sum())


def tier_evidence(
    problem: Evidence, weight: Array, lower: Array, upper: Array, where: NDArray[np.bool_]
) -> tuple[float, Array]:
    """By how many standard errors over spatial blocks the upper tier leaves less unexplained than the lower.

    Gains are free per factor, as its gate will use it.

    Args:
        problem: The section's reduced-scale problem.
        weight: (K,) importance of the factors; those of none are not looked at.
        lower: (R, K) predictions of the lower tier.
        upper: (R, K) predictions of the upper tier.
        where: (R,) rows that may judge: neither tier has seen them.

    Returns:
        For the factors together, and (K,) for each alone; 0 where there are too few blocks to tell.
    """
    t = problem.factor_rows[where]
    if not len(t) or not weight.any():
        return 0.0, np.zeros(len(weight))
    share = weight / weight.sum() / np.maximum((t**2).sum(0), 1e-300)
    errors = []
    for predicted in (lower[where], upper[where]):
        power = (predicted**2).sum(0)
        gain = np.clip((t * predicted).sum(0) / np.where(power > 0, power, np.inf), 0, 1)
        errors.append((t - gain * predicted) ** 2 * share)
    block = spatial_blocks(problem.mask, 12).ravel()[problem.rows.index][where]
    names, number = np.unique(block, return_inverse=True)
    if len(names) < 4:
        return 0.0, np.zeros(len(weight))
    better = np.zeros((len(names), len(weight)))
    np.add.at(better, number, errors[0] - errors[1])
    better = np.column_stack([better.sum(1), better])
    spread = better.std(0, ddof=1) / np.sqrt(len(names))
    found = better.mean(0) / np.where(spread > 0, spread, np.inf)
    return float(found[0]), found[1:]


def select_positivity(
    cube: Any,
    mask: NDArray[np.bool_],
    detail_at: Callable[[int], Array] | None,
    loadings: Array,
) -> tuple[NDArray[np.int64], Array]:
    """Positivity steps and uncertainty of every ion, from one reduced-scale reconstruction (ratio 2).

    Args:
        cube: (M, ny, nx) ions.
        mask: (ny, nx) measured pixels.
        detail_at: Returns the reduced-scale detail (K, ny', nx') for the cropped grid; None = none.
        loadings: (M, K) gated W.

    Returns:
        Steps (M,) and rows (M, 5) of `NoiseModel`.
    """
    ny, nx = (n // RATIO * RATIO for n in mask.shape)
    count = len(loadings)
    steps_out, uncertainty = np.full(count, POSITIVITY[0]), np.zeros((count, 5))
    inside = usable(mask, RATIO, (0, 0)) if min(ny, nx) >= 2 * RATIO else np.zeros((0, 0), bool)
    if inside.sum() < 8 or not count:
        # Nothing to judge by: the measurement's own noise, and all that varies between neighbours.
        for m, sd in enumerate(noise_sd(np.asarray(cube), mask)):
            cell = np.asarray(cube[m], np.float64)
            uncertainty[m] = NoiseModel.of(np.array([sd**2, 0.0, 1.0]), cell, mask).row()
        return steps_out, uncertainty
    detail = detail_at(RATIO) if detail_at is not None and loadings.any() else None

    def judged(m: int) -> tuple[int, Array, float, float]:
        cell = np.asarray(cube[m], np.float64)
        fine = fill_missing(cell, mask)[:ny, :nx]
        coarse = cell_means(fine, RATIO)
        decoder = IonDecoder.build(coarse, loadings[m], RATIO, 0)
        whole = Cells(0, ny // RATIO, 0, nx // RATIO)
        linear = decoder.window(whole, (lambda _: detail) if detail is not None else None)
        errors, images = [], []
        for steps in POSITIVITY:
            image = positive(linear, coarse, RATIO, steps) if (coarse >= 0).all() else linear
            images.append(image)
            errors.append(float(((image - fine)[inside] ** 2).mean()))
        # A step must pay: positivity is taken where it is not worse, fewer steps where equal.
        best = int(np.argmin(np.array(errors) * (1 + 1e-3 * np.arange(len(POSITIVITY)))))
        spread = np.repeat(np.repeat(local_variance(coarse), RATIO, 0), RATIO, 1)
        image, truth, around = images[best][inside], fine[inside], spread[inside]
        coefficients = variance_model(image, truth, around)
        variance = coefficients @ np.stack([np.ones_like(image), np.maximum(image, 0), around])
        row = NoiseModel.of(coefficients, cell, mask).row()
        return POSITIVITY[best], row, scale_needed(image, truth, variance), float((truth > 0).mean())

    found = side_by_side(judged, range(count), at_once=max(1, IMAGE_BYTES // (8 * mask.size)))
    steps_out, rows, needed, present = (np.array(column) for column in zip(*found, strict=True))
    return steps_out, rows * common_scale(needed, present) ** 2
