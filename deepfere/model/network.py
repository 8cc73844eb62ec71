"""The deep model: mapping and fusion in one network, with a receptive field known in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepfere.model.fusion import Fusion
from deepfere.model.mapping import Mapping

NETWORK_SHARE = 0.5
"""Weight, in the deep tier, of the fit that has the network's regressors; the rest is the closed form alone."""


class FusionNetwork(nn.Module):
    """Stain features and upsampled factors -> the detail planes before projection.

    Args:
        features: F, stain features per pixel.
        factors: K.
        width: Hidden channels of both modules.
        depth: Fusion blocks; the receptive field reaches ``2**depth - 1`` pixels.
    """

    def __init__(self, features: int, factors: int, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.settings = {"features": features, "factors": factors, "width": width, "depth": depth}
        self.feature_mean: Tensor
        self.feature_sd: Tensor
        self.register_buffer("feature_mean", torch.zeros(1, features, 1, 1))
        self.register_buffer("feature_sd", torch.ones(1, features, 1, 1))
        self.mapping = Mapping(features, factors, width)
        self.fusion = Fusion(factors, width, depth)

    @property
    def radius_px(self) -> int:
        """Pixels of context needed on every side."""
        return self.fusion.radius_px

    @property
    def macs_per_px(self) -> int:
        """Multiply-accumulates per output pixel of one forward pass."""
        f, k, w, n = (self.settings[name] for name in ("features", "factors", "width", "depth"))
        mapping = f * k + f * w + w * w + w * k
        return mapping + 2 * k * w + n * (9 * w + w * w) + w * k

    def standardise(self, stain: Tensor) -> Tensor:
        """Features in units of their s.d. over the study's tissue."""
        return (stain - self.feature_mean) / self.feature_sd

    def set_feature_scale(self, mean: Any, sd: Any) -> None:
        """Fix the standardisation: (F,) means and s.d. over the study's tissue."""
        self.feature_mean.copy_(torch.as_tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.feature_sd.copy_(torch.as_tensor(sd, dtype=torch.float32).view(1, -1, 1, 1))

    def set_linear(self, weights: Any) -> None:
        """Start the mapping's linear part at T1: (F, K) weights on raw features."""
        scaled = torch.as_tensor(weights, dtype=torch.float32).T[:, :, None, None] * self.feature_sd.view(1, -1, 1, 1)
        with torch.no_grad():
            self.mapping.linear.weight.copy_(scaled)

    def mapped(self, stain: Tensor) -> Tensor:
        """What the stain alone says: (N, F, H, W) -> (N, K, H, W)."""
        return self.mapping(self.standardise(stain))

    @property
    def regressors(self) -> int:
        """How many regressors a section's closed form gets from the network: its output and what makes it."""
        return self.settings["factors"] + self.settings["width"]

    def regress(self, stain: Tensor, upsampled: Tensor) -> Tensor:
        """Output and last hidden layer, (N, K + C, H - 2 r, W - 2 r); arguments as for `forward`."""
        return torch.cat(self.fusion.both(self.mapped(stain), upsampled), dim=1)

    def forward(self, stain: Tensor, upsampled: Tensor) -> Tensor:
        """Detail before projection.

        Args:
            stain: (N, F, H, W) raw stain features.
            upsampled: (N, K, H, W) upsampled factors P y_z.

        Returns:
            (N, K, H - 2 r, W - 2 r), r = `radius_px`.
        """
        return self.fusion(self.mapped(stain), upsampled)


def network_from_config(config: dict[str, Any]) -> FusionNetwork:
    """Rebuild a network from the ``settings`` of a saved one (other keys are ignored)."""
    return FusionNetwork(**{name: int(config[name]) for name in ("features", "factors", "width", "depth")})
