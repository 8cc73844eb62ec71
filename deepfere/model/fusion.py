"""Fusion module: mapped stain and upsampled measurement -> detail."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class FusionBlock(nn.Module):
    """Residual block: dilated depthwise 3 x 3 ("valid") and pointwise; no normalisation over space."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.depthwise = nn.Conv2d(width, width, 3, dilation=dilation, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H - 2 d, W - 2 d)."""
        d = self.dilation
        return x[..., d:-d, d:-d] + self.pointwise(functional.gelu(self.depthwise(x)))


class Fusion(nn.Module):
    """Mapped stain + upsampled measurement -> a correction of the mapped stain.

    Args:
        factors: K.
        width: Hidden channels.
        depth: Blocks, with dilations 1, 2, 4, ...
    """

    def __init__(self, factors: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2 * factors, width, 1)
        self.blocks = nn.ModuleList(FusionBlock(width, 2**n) for n in range(depth))
        self.leave = nn.Conv2d(width, factors, 1, bias=False)
        nn.init.zeros_(self.leave.weight)

    @property
    def radius_px(self) -> int:
        """Pixels of context that one output pixel depends on: the sum of the dilations."""
        return 2 ** len(self.blocks) - 1

    def both(self, mapped: Tensor, upsampled: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K, H, W) twice -> the output (N, K, H - 2 r, W - 2 r), and what its last layer sees (N, C, ...)."""
        r = self.radius_px
        x = self.enter(torch.cat([mapped, upsampled], dim=1))
        for block in self.blocks:
            x = block(x)
        hidden = functional.gelu(x)
        centre = mapped[..., r : mapped.shape[-2] - r, r : mapped.shape[-1] - r]
        return centre + self.leave(hidden), hidden

    def forward(self, mapped: Tensor, upsampled: Tensor) -> Tensor:
        """(N, K, H, W) twice -> (N, K, H - 2 r, W - 2 r)."""
        return self.both(mapped, upsampled)[0]
