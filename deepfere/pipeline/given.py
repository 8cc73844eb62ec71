"""A registered model in the place of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.config import Config
from deepfere.errors import InputError
from deepfere.measured.factors import Factoring, Moments
from deepfere.measured.store import SOURCE_DIGEST, Measured
from deepfere.measured.tolerance import Tolerance
from deepfere.model.network import FusionNetwork, network_from_config


@dataclass(frozen=True)
class GivenModel:
    """A registered model that takes the place of training.

    Attributes:
        network: The deep model.
        mz: (M,) ions of its basis.
        basis: (M, K) W.
        noise_sd: (M,) noise that W was weighted with.
        seen: Digests of the measurements that it was trained on, and of what these were ingested from.
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

    def saw(self, msi_digest: str, measured: Measured) -> bool:
        """Whether it was trained on a measurement, as it is or ingested.

        Args:
            msi_digest: Of what the user gave: an imzML, a table, a cube.
            measured: The cube that it became.
        """
        return bool({msi_digest, measured.attrs.get(SOURCE_DIGEST)} & set(self.seen))


def given_model(uri: str, config: Config) -> tuple[GivenModel, dict[str, str]]:
    """Load a registered model (``models:/NAME@ALIAS``, ``models:/NAME/VERSION``).

    Returns:
        The model, and its name, version and digest for the provenance.

    Raises:
        InputError: There is no such model.
    """
    if config.model.tier == "paper":
        raise InputError(
            "a registered model takes the place of training, and the published model is trained anew",
            where="model.tier=paper",
            remedy="leave one of them out",
        )
    from safetensors.torch import load_file

    from deepfere.training.tracking import load_registered

    loaded = load_registered(uri, config.tracking.uri)
    settings = loaded.config
    network = network_from_config(settings["network"])
    network.load_state_dict(load_file(str(loaded.weights_path)))
    network.eval()
    trained = settings["config"]
    model = GivenModel(
        network,
        np.asarray(settings["mz"], np.float64),
        np.asarray(settings["basis"], np.float64),
        np.asarray(settings["noise_sd"], np.float64),
        list(settings["seen"]),
        int(trained["seed"]),
        float(trained["train"]["held_out"]),
        loaded.weights_sha256,
    )
    # Stores number their versions alike: only the weights tell one model from another.
    return model, {"name": loaded.name, "version": str(loaded.version), "weights_sha256": loaded.weights_sha256}


def given_factoring(
    model: GivenModel, moments: Moments, mz: NDArray[np.float64], tolerance: Tolerance, where: str
) -> Factoring:
    """How a section's ions become a model's factors: noise-weighted least squares on its basis.

    Args:
        model: The model.
        moments: Of the section.
        mz: (M,) its ions.
        tolerance: Half-width of their windows.
        where: The measurement, for a refusal.

    Raises:
        InputError: The section has other ions than the model.
    """
    if len(mz) != len(model.mz) or (np.abs(mz - model.mz) > tolerance.half_da(mz)).any():
        raise InputError(
            f"the model knows {len(model.mz)} ions, the section has {len(mz)} others",
            where=where,
            remedy="ingest with the model's list of m/z (--mz)",
        )
    weight = 1.0 / np.maximum(model.noise_sd, 1e-6 * max(float(model.noise_sd.max()), 1e-300))
    rcond = np.finfo(np.float64).eps * max(model.basis.shape)
    projection = weight[:, None] * np.linalg.pinv(model.basis * weight[:, None], rcond=rcond).T
    rest = np.eye(len(mz)) - model.basis @ projection.T
    left = ((rest @ moments.products) * rest).sum(1)
    total = np.maximum(np.diag(moments.products), 1e-300)
    return Factoring(moments.mean, projection, model.basis, model.noise_sd, np.clip(1 - left / total, 0, 1))
