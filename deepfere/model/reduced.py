"""The tiers at reduced scale (Wald, ratio 2): the same maps as at full scale, on the measured grid."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.measured.factors import Factors
from deepfere.measured.operator import cell_means, expand, fill_missing, null_space, pad_edge, spline_coefficients
from deepfere.model.features import FEATURES
from deepfere.model.fit import RATIO, Evidence
from deepfere.model.network import FusionNetwork
from deepfere.model.ridge import phases, stain_detail, usable

Array = NDArray[np.float64]


def _network_detail(network: FusionNetwork, features: Array, images: Array, ratio: int) -> Array:
    """``(I - P A)`` of the network's output (K, ny, nx) with measured pixels as its pixels.

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
        raw = network(x, u)[0].double().numpy()
    return null_space(raw, ratio)


def network_rows(network: FusionNetwork, problem: Evidence, factors: Factors, features: Array | None = None) -> Array:
    """The network's predictions (R, K) in the row order of the reduced-scale problem.

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
    return np.concatenate(out) if out else np.zeros((0, len(images)))


def _measured(factors: Factors, problem: Evidence) -> NDArray[np.bool_]:
    return problem.mask | (factors.images != 0).any(0)


def reduced_detail(network: FusionNetwork, problem: Evidence, factors: Factors) -> Array:
    """The network's detail (K, ny', nx') on the whole grid cropped to multiples of the ratio."""
    ny, nx = (n // RATIO * RATIO for n in problem.mask.shape)
    images = fill_missing(factors.images, _measured(factors, problem))
    return _network_detail(network, problem.features[: len(FEATURES), :ny, :nx], images[:, :ny, :nx], RATIO)


def ridge_detail(problem: Evidence, weights: Array) -> Array:
    """T1's detail (K, ny', nx') on the whole grid cropped to multiples of the ratio."""
    regressors = stain_detail(problem.features, RATIO, (0, 0), problem.chemistry)
    return np.einsum("fyx,fk->kyx", regressors, weights)
