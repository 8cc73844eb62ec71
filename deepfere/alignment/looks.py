"""Where the refinement looks: at every measured pixel of a small section, at windows of a large one.

The likelihood of an alignment is a sum over pixels, and thousands of them fix it to a few hundredths of a pixel. So a
section of a million pixels is looked at through square windows spread over it, each with a ring of neighbours for
the high-pass filter; the cost does not grow with the section.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from deepfere.frame import SectionGrid

MOST_PX = 6000
"""Measured pixels that are looked at, about; more are seen through windows."""
SIDE_PX = 12


def high_pass(images: Tensor) -> Tensor:
    """Images (C, ny, nx) minus their 3 x 3 mean (edges repeated)."""
    padded = functional.pad(images[None], (1, 1, 1, 1), mode="replicate")
    return images - functional.avg_pool2d(padded, 3, stride=1)[0]


class Looks:
    """The pixels that count, and how rows of a regression are made of images over them.

    Args:
        grid: Measured grid.
        inside: (ny, nx) pixels that may be looked at.
        supersample: Sample points per measured pixel and axis.
        most_px: About how many pixels are looked at.
    """

    def __init__(self, grid: SectionGrid, inside: NDArray[np.bool_], supersample: int, most_px: int = MOST_PX) -> None:
        self.supersample = supersample
        fine = grid.refine(supersample)
        self._windows = plan_windows(inside, most_px)
        if self._windows is None:
            self._inside = torch.from_numpy(inside)
            self.points_um = torch.from_numpy(fine.centres_um())
            return
        s, side = supersample, SIDE_PX + 2
        self._inside = torch.from_numpy(np.stack([inside[i : i + SIDE_PX, j : j + SIDE_PX] for i, j in self._windows]))
        self.points_um = torch.from_numpy(
            np.concatenate(
                [fine.centres_um(((i - 1) * s, (j - 1) * s), (side * s, side * s)) for i, j in self._windows]
            )
        )

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self._inside.sum())

    def of_grid(self, images: Tensor, fine: bool) -> Tensor:
        """Rows (N, C) of images (C, ny, nx) on the whole grid; ``fine`` takes them minus their 3 x 3 mean."""
        if self._windows is None:
            return (high_pass(images) if fine else images)[:, self._inside].T
        cut = [images[:, i - 1 : i + SIDE_PX + 1, j - 1 : j + SIDE_PX + 1] for i, j in self._windows]
        return self._rows(torch.stack(cut, dim=1), fine)

    def of_samples(self, pooled: Tensor, fine: bool) -> Tensor:
        """Rows (N, C) of footprint means (C, H, W) at `points_um`."""
        if self._windows is None:
            return (high_pass(pooled) if fine else pooled)[:, self._inside].T
        side = SIDE_PX + 2
        return self._rows(pooled.reshape(len(pooled), -1, side, side), fine)

    def _rows(self, windows: Tensor, fine: bool) -> Tensor:
        """Rows of windows with their ring (C, n, side + 2, side + 2)."""
        inner = windows[..., 1:-1, 1:-1]
        if fine:
            inner = inner - functional.avg_pool2d(windows, 3, stride=1)
        return inner[:, self._inside].T


def plan_windows(inside: NDArray[np.bool_], most_px: int) -> list[tuple[int, int]] | None:
    """First row and column of windows spread over the pixels that count; None if all can be looked at.

    Windows lie on a regular lattice, as many as `most_px` allows, drawn from those that hold enough pixels; always
    the same ones.
    """
    if inside.sum() <= most_px:
        return None
    ny, nx = inside.shape
    origins = [
        (i, j)
        for i in range(1, ny - SIDE_PX, SIDE_PX)
        for j in range(1, nx - SIDE_PX, SIDE_PX)
        if inside[i : i + SIDE_PX, j : j + SIDE_PX].sum() >= SIDE_PX**2 / 2
    ]
    wanted = max(1, most_px // SIDE_PX**2)
    if len(origins) < wanted / 2:
        return None
    chosen = np.random.default_rng(0).permutation(len(origins))[:wanted]
    return [origins[n] for n in sorted(chosen.tolist())]
