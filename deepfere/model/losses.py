"""The multi-task losses: mapping, reconstruction at reduced scale, correlation, smoothness of T."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from deepfere.measured.operator import cell_means, expand


def project(detail: Tensor, factor: int) -> Tensor:
    """``(I - P A)`` of (N, K, n f + 2 f, ...): one cell of context on every side is consumed."""
    means = cell_means(detail, factor)
    inner = detail[..., factor:-factor, factor:-factor]
    return inner - expand(means, factor, "keys")


def huber(error: Tensor, weight: Tensor, delta: float = 1.0) -> Tensor:
    """Weighted Huber loss, its mean over all of ``error``; ``weight`` broadcasts against it.

    It is not divided by the weights: the loss of a batch is then the mean of its patches' losses, so that
    training does not depend on how the patches are spread over workers.
    """
    loss = functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    return (loss * weight).mean()


def mapping_loss(mapped: Tensor, target: Tensor, weight: Tensor, factor: int) -> Tensor:
    """The footprint mean of the mapped stain against the measurement, up to an offset per patch.

    Args:
        mapped: (N, K, n f, n f) mapped stain.
        target: (N, K, n, n) measured factors.
        weight: (N, 1, n, n) 1 where measured, covered and not held out.
        factor: f.
    """
    error = cell_means(mapped, factor) - target
    offset = (error * weight).sum((-1, -2), keepdim=True) / (weight.sum((-1, -2), keepdim=True) + 1e-6)
    return huber(error - offset, weight)


def local_correlation(a: Tensor, b: Tensor, radius: int = 4) -> Tensor:
    """Pearson correlation in half-overlapping square windows of two images (N, K, H, W); 0 where flat."""
    size = 2 * radius + 1

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, size, stride=radius + 1)

    mean_a, mean_b = mean(a), mean(b)
    covariance = mean(a * b) - mean_a * mean_b
    variance = (mean(a * a) - mean_a**2).clamp(min=0) * (mean(b * b) - mean_b**2).clamp(min=0)
    return covariance / torch.sqrt(variance + 1e-8)


def correlation_loss(detail: Tensor, proven: Tensor, gate: Tensor, radius: int = 4) -> Tensor:
    """Structure of the stain carried into the output, scale-free, only where it is proven.

    Args:
        detail: (N, K, H, W) detail of the network.
        proven: (N, K, H, W) detail that the closed form proves (T1).
        gate: (K,) how far each factor is proven, in [0, 1].
        radius: Half-width of the correlation windows.
    """
    correlation = local_correlation(detail, proven.detach(), radius)
    return (gate.view(1, -1, 1, 1) * (1.0 - correlation)).mean()
