"""A registered model in the place of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.factors import Factors
from deepfere.model.network import FusionNetwork
from deepfere.pipeline.prepare import Prepared


@dataclass(frozen=True)
class GivenModel:
    """A registered model that takes the place of training.

    Attributes:
        network: The deep model.
        mz: (M,) ions of its basis.
        basis: (M, K) W.
        noise_sd: (M,) noise that W was weighted with.
        seen: Digests of the measurements that it was trained on.
        seed: Seed of its held-out blocks.
        held_out: Share of its held-out blocks.
        digest: Digest of its weights.
    """

    network: FusionNetwork
    mz: NDArray[np.float64]
    basis: NDArray[np.float64]
    noise_sd: NDArray[np.float64]
    seen: list[str]
    seed: int
    held_out: float
    digest: str


def given_factors(prep: Prepared, cube: NDArray[np.float32], model: GivenModel) -> Factors:
    """The section's images of a model's factors: noise-weighted least squares on its basis.

    Raises:
        InputError: The section has other ions than the model.
    """
    axis, tolerance = prep.measured.mz, prep.measured.tolerance_ppm
    if len(axis) != len(model.mz) or (np.abs(axis - model.mz) > axis * tolerance * 1e-6).any():
        raise InputError(
            f"the model knows {len(model.mz)} ions, the section has {len(axis)} others",
            where=prep.section.msi,
            remedy="ingest with the model's list of m/z (--mz)",
        )
    table = np.asarray(cube[:, prep.measured.mask], np.float64).T
    weight = 1.0 / np.maximum(model.noise_sd, 1e-6 * max(float(model.noise_sd.max()), 1e-300))
    scores = np.linalg.lstsq(model.basis * weight[:, None], ((table - table.mean(0)) * weight).T, rcond=None)[0]
    images = np.zeros((model.basis.shape[1], *prep.measured.mask.shape))
    images[:, prep.measured.mask] = scores
    residual = (table - table.mean(0) - scores.T @ model.basis.T).var(0)
    variance = np.maximum(table.var(0), 1e-300)
    return Factors(images, model.basis, model.noise_sd, np.clip(1 - residual / variance, 0, 1))
