"""The correlation loss against a plain loop over its windows: ``python benchmarks/losses.py [--quick] [--json FILE]``.

The same mathematics twice, forward and backward: as the training computes it (all windows at once, by pooling) and as
it is usually written (one window after another). Both on one thread, the same input, alternating.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from common import Row, finish, parser, table
from torch import Tensor

from deepfere.model.losses import correlation_loss

WINDOWS, RADIUS, FACTORS = (20, 40), 4, 16


def looped(detail: Tensor, proven: Tensor, gate: Tensor, radius: int) -> Tensor:
    """`correlation_loss`, window by window."""
    size, step = 2 * radius + 1, radius + 1
    losses = []
    for i in range(0, detail.shape[-2] - size + 1, step):
        for j in range(0, detail.shape[-1] - size + 1, step):
            a = detail[..., i : i + size, j : j + size].flatten(2)
            b = proven[..., i : i + size, j : j + size].flatten(2)
            mean_a, mean_b = a.mean(-1, keepdim=True), b.mean(-1, keepdim=True)
            covariance = ((a - mean_a) * (b - mean_b)).mean(-1)
            variance = ((a - mean_a) ** 2).mean(-1) * ((b - mean_b) ** 2).mean(-1)
            losses.append(gate * (1.0 - covariance / torch.sqrt(variance + 1e-8)))
    return torch.stack(losses).mean()


def run(repeats: int) -> list[Row]:
    """Seconds of both, and how far they are from each other."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side = [(n - 1) * (RADIUS + 1) + 2 * RADIUS + 1 for n in WINDOWS]
    proven = torch.randn(1, FACTORS, *side)
    start, gate = proven + torch.randn(1, FACTORS, *side), torch.rand(FACTORS)
    seconds: dict[str, list[float]] = {"loop": [], "pooled": []}
    values, gradients = {}, {}
    for _ in range(repeats):
        for name, loss in (("loop", looped), ("pooled", correlation_loss)):
            detail = start.clone().requires_grad_()
            began = time.perf_counter()
            value = loss(detail, proven, gate, RADIUS)
            value.backward()
            seconds[name].append(time.perf_counter() - began)
            assert detail.grad is not None
            values[name], gradients[name] = float(value.detach()), detail.grad
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    off = float((gradients["loop"] - gradients["pooled"]).abs().max() / gradients["loop"].abs().max())
    lines = [[name, f"{1e3 * medians[name]:.2f}", f"{values[name]:.6f}"] for name in medians]
    count = WINDOWS[0] * WINDOWS[1]
    print(table(f"{count} windows, {FACTORS} factors, forward and backward", ["", "ms", "loss"], lines))
    return [
        Row.of("pooled, ms", 1e3 * medians["pooled"], "loop", 1e3 * medians["loop"], "< baseline"),
        Row.of("loss, pooled", values["pooled"], "loop", values["loop"], "within 1e-5 of baseline"),
        Row.of("largest difference of gradients, of the largest gradient", off, must="<= 1e-3"),
    ]


if __name__ == "__main__":
    given = parser("The correlation loss against a loop over its windows.", cases=()).parse_args()
    sys.exit(finish(run(3 if given.quick else 15), given.json))
