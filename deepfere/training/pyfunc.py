"""The trained network as an MLflow pyfunc model: safetensors and JSON, nothing pickled.

A packaged model holds ``artifacts/model.safetensors`` (the network's state dict, float32),
``artifacts/model.json`` (the resolved configuration; its ``network`` section is what
:func:`deepfere.model.network.network_from_config` takes) and a three-line Python file that names
:class:`FusionPyfunc`. That is MLflow's *models from code*: loading it unpickles nothing, so it also
works where ``MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false`` is set.

Importing this module imports MLflow, which is slow: import it inside functions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import numpy as np
from mlflow.pyfunc.model import PythonModel

import deepfere
from deepfere.errors import InputError

if TYPE_CHECKING:
    import torch
    from mlflow.models import Model, ModelSignature

    from deepfere.model.network import FusionNetwork

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "model.json"

_MODEL_CODE = """from mlflow.models import set_model

from deepfere.training.pyfunc import FusionPyfunc

set_model(FusionPyfunc())
"""


class FusionPyfunc(PythonModel):
    """The fusion network behind MLflow's generic interface.

    ``predict`` takes ``{"stain": (N, F, H, W), "upsampled": (N, K, H, W)}``, both float32 (the stain's
    features and the upsampled factors on the high-resolution grid), and returns the detail planes
    (N, K, H - 2 r, W - 2 r) float32: r = `FusionNetwork.radius_px` pixels around are context. The packaged
    signature refuses any other dtype or number of planes.
    """

    # The input is checked by the packaged tensor signature; without this MLflow warns at every import
    # that `predict` has no type hints, which cannot express tensors.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Build the network from the packaged configuration and weights."""
        config = json.loads(Path(context.artifacts["config"]).read_text(encoding="utf-8"))
        self.network = build_network(config, Path(context.artifacts["weights"]))

    def predict(self, context, model_input, params=None):
        """Detail planes (N, K, H - 2 r, W - 2 r) float32 of one batch, computed on the CPU."""
        import torch

        with torch.inference_mode():
            stain, upsampled = (
                torch.from_numpy(np.array(model_input[name], dtype=np.float32)) for name in ("stain", "upsampled")
            )
            return self.network(stain, upsampled).numpy()


def build_network(config: dict[str, Any], weights_path: Path) -> FusionNetwork:
    """The network that ``config["network"]`` describes with the weights of a safetensors file.

    Raises:
        InputError: The configuration has no ``network`` section, the file is not safetensors, or
            its tensors are not those of the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from deepfere.model.network import network_from_config

    network = network_from_config(_network_section(config))
    try:
        network.load_state_dict(load_file(weights_path), strict=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(
            f"these weights do not fit the network of the configuration ({error})",
            where=weights_path,
            remedy="give the weights and the configuration of the same training run",
        ) from error
    return network.eval()


def signature(features: int, factors: int) -> ModelSignature:
    """Tensor signature of a network with F = ``features`` stain planes and K = ``factors`` factors."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    kind = np.dtype(np.float32)
    return ModelSignature(
        inputs=Schema(
            [
                TensorSpec(kind, (-1, features, -1, -1), "stain"),
                TensorSpec(kind, (-1, factors, -1, -1), "upsampled"),
            ]
        ),
        outputs=Schema([TensorSpec(kind, (-1, factors, -1, -1))]),
    )


def write_weights(weights: Mapping[str, torch.Tensor] | Path | str, target: Path) -> str:
    """Write (or copy) weights as safetensors to ``target`` and return their SHA-256, hexadecimal."""
    if isinstance(weights, Mapping):
        from safetensors.torch import save_file

        # safetensors refuses tensors that share memory or are strided views: give each its own.
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, target)
    else:
        if not Path(weights).is_file():
            raise InputError("no such weights file", where=weights, remedy="give a .safetensors file")
        shutil.copyfile(weights, target)
    return file_sha256(target)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_pyfunc(folder: Path, weights_path: Path, config: dict[str, Any], mlflow_model: Model) -> None:
    """Package weights and configuration as a pyfunc model in the new ``folder``.

    The network is built and loaded first, so that what is packaged is known to work.
    """
    network = build_network(config, weights_path)
    features, factors = network.settings["features"], network.settings["factors"]
    side = 2 * network.radius_px + 8
    example = {
        "stain": np.zeros((1, features, side, side), np.float32),
        "upsampled": np.zeros((1, factors, side, side), np.float32),
    }
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on example and type hints, answered above
        code, config_path = Path(scratch, "fusion_model.py"), Path(scratch, CONFIG_FILE)
        code.write_text(_MODEL_CODE, encoding="utf-8")
        config_path.write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(code),
            artifacts={"weights": str(weights_path), "config": str(config_path)},
            signature=signature(features, factors),
            input_example=example,
            pip_requirements=_requirements(),
            mlflow_model=mlflow_model,
        )


def _network_section(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("network")
    if not isinstance(section, dict) or not {"features", "factors", "width", "depth"} <= section.keys():
        raise InputError(
            "the model's configuration has no section `network` with `features`, `factors`, `width`, `depth`",
            where=CONFIG_FILE,
            remedy="register the resolved configuration that the network was built from",
        )
    return section


def _requirements() -> list[str]:
    """Pinned requirements, without local version parts such as ``+cpu``, which no index serves."""
    versions = {name: importlib.metadata.version(name) for name in ("mlflow", "numpy", "safetensors", "torch")}
    try:
        versions["deepfere"] = importlib.metadata.version("deepfere")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path: no metadata
        versions["deepfere"] = getattr(deepfere, "__version__", "")
    return [f"{name}=={version.split('+')[0]}" for name, version in sorted(versions.items()) if version]
