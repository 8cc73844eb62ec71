"""Mapping module: what the stain alone says about the factors, pixel by pixel."""

from __future__ import annotations

from torch import Tensor, nn


class Mapping(nn.Module):
    """Stain features -> factors, pointwise: a linear part (T1) plus a small perceptron.

    Pointwise, because a footprint mean of its output is then comparable with the measurement at any
    scale; the last layer starts at zero, so training starts from the linear part.

    Args:
        features: F.
        factors: K.
        width: Hidden channels.
    """

    def __init__(self, features: int, factors: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(features, factors, 1, bias=False)
        last = nn.Conv2d(width, factors, 1, bias=False)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(self.linear.weight)
        self.perceptron = nn.Sequential(
            nn.Conv2d(features, width, 1), nn.GELU(), nn.Conv2d(width, width, 1), nn.GELU(), last
        )

    def forward(self, stain: Tensor) -> Tensor:
        """(N, F, H, W) standardised features -> (N, K, H, W)."""
        return self.linear(stain) + self.perceptron(stain)
