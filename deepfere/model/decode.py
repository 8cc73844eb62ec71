"""From the stored result to one ion: ``s = P y + g (W D)``, then as many positivity steps as were selected.

Everything is local: a window needs as many measured pixels of context as there are positivity steps.
Whatever D holds, ``A s = y`` to rounding: each measured pixel's mean of the detail is subtracted here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.operator import cell_means, expand, pad_edge, spline_coefficients, take
from deepfere.model.guide import Cells

Array = NDArray[np.float64]

ADDITIVE = 2
"""Positivity steps that add before those that multiply."""


def positive(image: Array, cells: Array, factor: int, steps: int) -> Array:
    """Remove negative values and keep every measured pixel's mean.

    Up to `ADDITIVE` times what a measured pixel lacks is added, linearly interpolated, and negative values are set to
    zero again: next to the projection onto images without them. Then ``s <- s up(y / A s)`` with a linearly
    interpolated ratio, and last the exact ratio inside each measured pixel: ``steps`` in all. The smooth steps avoid
    visible measured-pixel borders; those of the ratio also steepen.

    Args:
        image: (h f, w f) estimate; negative values are set to zero first.
        cells: (h, w) measured values, not negative, none missing.
        factor: f.
        steps: Number of steps; 0 returns the image as it is.
    """
    if steps == 0:
        return image
    out = np.maximum(image, 0.0)
    for step in range(steps):
        means = cell_means(out, factor)
        if step < min(steps - 1, ADDITIVE):
            out = np.maximum(out + expand(pad_edge(cells - means), factor, "linear"), 0.0)
            continue
        empty = means <= 1e-12 * np.maximum(cells, 1e-300)
        ratio = np.where(empty, 1.0, cells / np.where(empty, 1.0, means))
        if step < steps - 1:
            out *= expand(pad_edge(ratio), factor, "linear")
        else:
            # A pixel whose estimate vanished takes its measured value evenly.
            flat = np.repeat(np.repeat(np.where(empty, cells, 0.0), factor, 0), factor, 1)
            out = out * np.repeat(np.repeat(ratio, factor, 0), factor, 1)
            lost = np.repeat(np.repeat(empty, factor, 0), factor, 1)
            out = np.where(lost, flat, out)
    return out


@dataclass(frozen=True)
class IonDecoder:
    """All that one ion needs besides the detail planes.

    Attributes:
        cells: (ny, nx) measured values, holes filled from their nearest neighbour.
        coefficients: (ny, nx) spline coefficients of ``cells``.
        loadings: (K,) gate times row of W; zeros where the stain does not inform the ion.
        factor: f.
        steps: Positivity steps.
        exact: Take each measured pixel's mean off the detail, so that the ion agrees with the measurement.
    """

    cells: Array
    coefficients: Array
    loadings: Array
    factor: int
    steps: int
    exact: bool = True

    @classmethod
    def build(cls, cells: Array, loadings: Array, factor: int, steps: int, exact: bool = True) -> IonDecoder:
        """Solve for the coefficients once."""
        return cls(cells, spline_coefficients(cells), loadings, factor, steps, exact)

    def window(self, cells: Cells, detail: Callable[[Cells], NDArray[np.floating]] | None) -> Array:
        """The ion (h f, w f) float64 over a window of measured pixels inside the grid.

        Args:
            cells: Window.
            detail: Returns the detail planes (K, h f, w f) over a window; None = none.
        """
        ny, nx = self.cells.shape
        wide = cells.grow(self.steps)
        wide = Cells(max(wide.i0, 0), min(wide.i1, ny), max(wide.j0, 0), min(wide.j1, nx))
        f = self.factor
        out = expand(take(self.coefficients, wide.i0 - 1, wide.i1 + 1, wide.j0 - 1, wide.j1 + 1), f)
        if detail is not None and self.loadings.any():
            used = np.flatnonzero(self.loadings)
            planes = np.asarray(detail(wide)[used], np.float64)
            added = np.tensordot(self.loadings[used], planes, axes=1)
            if self.exact:
                added -= np.repeat(np.repeat(cell_means(added, f), f, 0), f, 1)
            out += added
        inside = self.cells[wide.i0 : wide.i1, wide.j0 : wide.j1]
        if not self.exact or (out < 0).any():
            # Without negative values an exact estimate has every mean as it is.
            out = positive(out, inside, f, self.steps)
        top, left = (cells.i0 - wide.i0) * f, (cells.j0 - wide.j0) * f
        height, width = cells.shape
        return out[top : top + height * f, left : left + width * f]
