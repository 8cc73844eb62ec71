"""The tiers at reduced scale (Wald, ratio 2): the same maps as at full scale, on the measured grid."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.measured.factors import Factors
from deepfere.measured.operator import cell_means, expand, fill_missing, null_space, pad_edge, spline_coefficients
from deepfere.model.features import FEATURES
from deepfere.model.fit import RATIO, Evidence
from deepfere.model.network import NETWORK_SHARE, FusionNetwork
from deepfere.model.ridge import RidgeFit, detail_rows, fit_own, phases, stain_detail, usable

Array = NDArray[np.float64]


def _network_detail(network: FusionNetwork, features: Array, images: Array, ratio: int) -> Array:
    """``(I - P A)`` of the network's regressors (K + C, ny, nx) with measured pixels as its pixels.

    Args:
        network: The deep model.
        features: (F, ny, nx) footprint-averaged features.
        images: (K, ny, nx) factors, holes filled; degraded here, so the network never sees them.
        ratio: Degradation; ny and nx are multiples of it.
    """
    upsampled = expand(pad_edge(spline_coefficients(cell_means(images, ratio))), ratio)
    r = network.radius_px
    pad = [(0, 0), (r, r), (r, r)]
    x = torch.from_numpy(np.pad(features, pad, mode="edge")).float()[None]
    u = torch.from_numpy(np.pad(upsampled, pad, mode="edge")).float()[None]
    with torch.inference_mode():
        raw = network.regress(x, u)[0].double().numpy()
    return null_space(raw, ratio)


def network_rows(network: FusionNetwork, problem: Evidence, factors: Factors, features: Array | None = None) -> Array:
    """Detail of the network's regressors (R, K + C) in the row order of the reduced-scale problem.

    Args:
        network: The deep model.
        problem: The section's reduced-scale problem.
        factors: Its factors.
        features: Another guide (a null guide) in place of the section's.
    """
    guide = (problem.features if features is None else features)[: len(FEATURES)]
    images = fill_missing(factors.images, _measured(factors, problem))
    out = []
    for phase in phases(RATIO, int(problem.mask.sum())):
        n = [(problem.mask.shape[d] - phase[d]) // RATIO * RATIO for d in (0, 1)]
        if min(n) < 2 * RATIO:
            continue
        rows, cols = slice(phase[0], phase[0] + n[0]), slice(phase[1], phase[1] + n[1])
        detail = _network_detail(network, guide[:, rows, cols], images[:, rows, cols], RATIO)
        out.append(detail[:, usable(problem.mask, RATIO, phase)].T)
    return np.concatenate(out) if out else np.zeros((0, network.regressors))


def fit_deep(
    network: FusionNetwork, problem: Evidence, factors: Factors, closed: RidgeFit, features: Array | None = None
) -> RidgeFit:
    """The deep tier of one section: the closed form with the network's regressors behind its own.

    The network is the study's; these weights, its last layer, are the section's. The mean of this fit and of the one
    without the network is taken, as of the fits on few and on many features.

    Args:
        network: Shared by the sections.
        problem: The section's reduced-scale problem.
        factors: Its factors.
        closed: The closed form without the network, with the same guide.
        features: Another guide (a null guide) in place of the section's.

    Returns:
        Weights (R + K + C, K) and held-out predictions.
    """
    rows = problem.rows
    if features is not None:
        rows = detail_rows(features, problem.mask, problem.blocks, RATIO, problem.chemistry)
    more = network_rows(network, problem, factors, features)
    fit = fit_own(rows, problem.factor_rows, problem.group, more)
    padded = np.concatenate([closed.weights, np.zeros((more.shape[1], closed.weights.shape[1]))])
    return RidgeFit(
        (1 - NETWORK_SHARE) * padded + NETWORK_SHARE * fit.weights,
        fit.ridge,
        (1 - NETWORK_SHARE) * closed.predicted + NETWORK_SHARE * fit.predicted,
    )


def mixed_by_factor(closed: RidgeFit, deep: RidgeFit, share: Array) -> RidgeFit:
    """For each factor the one fit, the other, or a mean of both.

    Args:
        closed: Weights (R, K), predictions (rows, K).
        deep: Weights (R + K + C, K), from `fit_deep`.
        share: (K,) how much of the deep one, in [0, 1].

    Returns:
        Weights (R + K + C, K), with zeros for the network's regressors where the closed form is taken.
    """
    padded = np.zeros_like(deep.weights)
    padded[: len(closed.weights)] = closed.weights
    return RidgeFit(
        (1 - share) * padded + share * deep.weights,
        np.where(share > 0, deep.ridge, closed.ridge),
        (1 - share) * closed.predicted + share * deep.predicted,
    )


def _measured(factors: Factors, problem: Evidence) -> NDArray[np.bool_]:
    return problem.mask | (factors.images != 0).any(0)


def ridge_detail(problem: Evidence, weights: Array) -> Array:
    """T1's detail (K, ny', nx') on the whole grid cropped to multiples of the ratio."""
    regressors = stain_detail(problem.features, RATIO, (0, 0), problem.chemistry)
    return np.einsum("fyx,fk->kyx", regressors, weights)


def deep_detail(network: FusionNetwork, problem: Evidence, factors: Factors, weights: Array) -> Array:
    """The deep tier's detail (K, ny', nx') on the whole grid cropped to multiples of the ratio."""
    ny, nx = (n // RATIO * RATIO for n in problem.mask.shape)
    images = fill_missing(factors.images, _measured(factors, problem))
    guide = problem.features[: len(FEATURES), :ny, :nx]
    more = _network_detail(network, guide, images[:, :ny, :nx], RATIO)
    own = len(weights) - len(more)
    return ridge_detail(problem, weights[:own]) + np.einsum("fyx,fk->kyx", more, weights[own:])
