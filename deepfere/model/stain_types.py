"""Stain types: a soft division of the tissue by the look of its stain, as more features for the closed form.

A linear relation between stain and ions has to hold for all tissue at once. Types let it bend: every fine pixel belongs
to each of a few types of stain by a share, the shares are features like any other, and a ridge on them is a radial
basis function network (Moody and Darken, Neural Comput. 1, 281, 1989). They are found without the ions, so nothing of
the measurement can leak into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepfere.model.features import FEATURES

USED = tuple(FEATURES.index(name) for name in ("od_red", "od_green", "od_blue", "nuclear", "texture", "tissue"))
"""Features that tell types apart; the others follow from these."""
MOST_TYPES = 32
PX_PER_TYPE = 30
"""Measured pixels per type: what a section can support."""
LEAST_PX = 200
"""Measured pixels below which there are none: on 63 and 73 pixels they explained more of what was left out at the
measured scale, and less of the truth below it."""
WIDTH = 2.0
"""S.d. of a type, in median distances between nearest types."""


def type_count(measured_px: int) -> int:
    """How many types a section of so many covered pixels gets."""
    return min(MOST_TYPES, measured_px // PX_PER_TYPE) if measured_px >= LEAST_PX else 0


@dataclass(frozen=True)
class StainTypes:
    """Shares of stain types, ``softmax(weights f + bias)``.

    The share of type n falls off as a Gaussian around its centre c: ``exp(-|f - c|^2 / (2 h^2))`` over the sum of all
    types', f in standard deviations; what does not depend on n cancels.

    Attributes:
        weights: (n, F) on raw features.
        bias: (n,).
    """

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]

    @classmethod
    def find(cls, samples: NDArray[np.floating], count: int, seed: int) -> StainTypes | None:
        """Types from features of fine pixels, by k-means.

        Args:
            samples: (N, F) raw features.
            count: Types wanted; fewer than two, or fewer distinct samples than types, give None.
            seed: Of the first centres.
        """
        from scipy.cluster.vq import kmeans2

        used = np.asarray(samples, np.float64)[:, USED]
        if count < 2 or len(used) < count:
            return None
        sd = used.std(0)
        sd = np.where(sd > 1e-6, sd, np.inf)
        scaled = (used - used.mean(0)) / sd
        if len(np.unique(scaled, axis=0)) < count:
            return None
        centres, _ = kmeans2(scaled, count, iter=30, minit="++", seed=np.random.default_rng([seed, 11]))
        apart = ((centres[:, None] - centres[None]) ** 2).sum(-1)
        np.fill_diagonal(apart, np.inf)
        variance = (WIDTH * np.median(np.sqrt(apart.min(1)))) ** 2
        if not variance > 0:
            return None
        weights = np.zeros((count, len(FEATURES)))
        weights[:, USED] = centres / sd / variance
        bias = -(centres**2).sum(1) / (2 * variance) - (centres * (used.mean(0) / sd)).sum(1) / variance
        return cls(weights, bias)

    def __len__(self) -> int:
        return len(self.bias)

    def shares(self, features: Tensor) -> Tensor:
        """(F, H, W) raw features -> (n, H, W); they add up to one."""
        weights, bias = (torch.from_numpy(np.asarray(v)).to(features) for v in (self.weights, self.bias))
        return torch.softmax(torch.einsum("nf,fyx->nyx", weights, features) + bias[:, None, None], dim=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the plan."""
        return {"weights": self.weights.tolist(), "bias": self.bias.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> StainTypes | None:
        """Read what `to_dict` wrote; None stays None."""
        return None if values is None else cls(np.asarray(values["weights"]), np.asarray(values["bias"]))
