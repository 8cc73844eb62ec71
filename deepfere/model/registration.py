"""Registration: where each high-resolution section pixel lies on the slide, differentiably.

Coordinates stay float64 until the fraction inside a plane pixel is taken, so a tile and the whole
section sample the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from deepfere.frame import Alignment, Displacement, Points


def bilinear(planes: Tensor, origin_px: tuple[int, int], coordinates_px: Tensor) -> Tensor:
    """Bilinear samples (N, C) of planes (h, w, C) at pixel coordinates (N, 2), differentiable in the coordinates.

    Channels come last so that one sample gathers one contiguous run of memory.

    Args:
        planes: A window of a larger image.
        origin_px: Row and column of the window's first pixel in the larger image.
        coordinates_px: (N, 2) float64 continuous pixel indices (y, x) in the larger image: pixel k's
            centre is at k. Beyond the window the edge pixel repeats.
    """
    height, width, channels = planes.shape
    rel = coordinates_px - coordinates_px.new_tensor(origin_px)
    y, x = rel[:, 0].clamp(0, height - 1), rel[:, 1].clamp(0, width - 1)
    row = y.detach().floor().clamp(max=max(height - 2, 0))
    col = x.detach().floor().clamp(max=max(width - 2, 0))
    fy, fx = (y - row).to(planes.dtype)[:, None], (x - col).to(planes.dtype)[:, None]
    top, left = row.long(), col.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    at = (top * width + left, top * width + right, bottom * width + left, bottom * width + right)
    return _Between.apply(planes.reshape(-1, channels), at, fy, fx)


def _cubic_basis(u: Tensor) -> Tensor:
    """Torch twin of `deepfere.frame.cubic_basis`."""
    v = 1.0 - u
    return torch.stack([v**3 / 6, (3 * u**3 - 6 * u**2 + 4) / 6, (3 * v**3 - 6 * v**2 + 4) / 6, u**3 / 6], dim=-1)


class _Between(torch.autograd.Function):
    """Bilinear samples, differentiable in the fractions alone: pixels are constants, and most of the cost."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor], fy: Tensor, fx: Tensor) -> Tensor:
        corners = [flat.index_select(0, one) for one in at]
        upper, lower = torch.lerp(corners[0], corners[1], fx), torch.lerp(corners[2], corners[3], fx)
        if any(ctx.needs_input_grad):
            across = torch.lerp(corners[1].sub_(corners[0]), corners[3].sub_(corners[2]), fy)
            ctx.save_for_backward(lower - upper, across)
        return torch.lerp(upper, lower, fy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, Tensor]:
        down, across = ctx.saved_tensors
        return None, None, *(torch.linalg.vecdot(gradient, slope)[:, None] for slope in (down, across))


class _Combined(torch.autograd.Function):
    """A sparse matrix (N, M), which is constant, times knots (M, 2)."""

    @staticmethod
    def forward(ctx: Any, knots: Tensor, matrix: csr_array) -> Tensor:
        ctx.matrix = matrix
        return torch.from_numpy(matrix @ knots.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.matrix.T @ gradient.numpy()), None


def spline_weights(
    points_um: Tensor, origin_um: tuple[float, float], spacing_um: tuple[float, float], shape: tuple[int, int]
) -> csr_array:
    """What each knot of a B-spline counts at section points: `Displacement.at` as a sparse matrix.

    Args:
        points_um: (N, 2) float64, on the host.
        origin_um: Position of the first knot.
        spacing_um: Between knots.
        shape: Number of knots (ny, nx); beyond them there is nothing.

    Returns:
        (N, ny nx), at most sixteen values in a row.
    """
    rel = (points_um - points_um.new_tensor(origin_um)) / points_um.new_tensor(spacing_um)
    base = rel.floor()
    weights = _cubic_basis(rel - base).numpy()
    weight = weights[:, 0, :, None] * weights[:, 1, None, :]
    knot = (base.long() - 1).numpy()[:, :, None] + np.arange(4)
    row, col = np.broadcast_arrays(knot[:, 0, :, None], knot[:, 1, None, :])
    inside = (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1])
    point = np.broadcast_to(np.arange(len(base))[:, None, None], inside.shape)
    at = (point[inside], row[inside] * shape[1] + col[inside])
    return csr_array((weight[inside], at), shape=(len(base), shape[0] * shape[1]))


def spline_grid(
    y_um: Tensor, x_um: Tensor, origin_um: tuple[float, float], spacing_um: tuple[float, float], knots_um: Tensor
) -> Tensor:
    """Displacement at all points of a grid, differentiable in the knots: rows (H,), columns (W,) -> (H, W, 2).

    Knots act along rows and columns separately, so that two products of small matrices do what takes sixteen knots at
    every point. The axes are on the host, so that a device is not waited for to read them; the rest is where the knots
    are.
    """
    (wy, rows), (wx, cols) = (
        _weights(axis, origin_um[d], spacing_um[d], knots_um.shape[d]) for d, axis in enumerate((y_um, x_um))
    )
    near = knots_um[rows, cols]
    across = torch.einsum("wj,ijc->icw", wx.to(near), near)
    return torch.einsum("hi,icw->hwc", wy.to(near), across)


def _weights(axis_um: Tensor, origin_um: float, spacing_um: float, count: int) -> tuple[Tensor, slice]:
    """Weights (N, n) of the n knots along one axis that act on some of its points, and which these are."""
    rel = (axis_um - origin_um) / spacing_um
    base = rel.floor()
    first = base.long() - 1
    place = torch.arange(count)[None] - first[:, None]  # 0 to 3 where a knot acts
    acts = (place >= 0) & (place < 4)
    weights = _cubic_basis(rel - base).gather(1, place.clamp(0, 3)) * acts
    used = acts.any(0).nonzero().flatten().tolist()
    some = slice(used[0], used[-1] + 1) if used else slice(0, 0)
    return weights[:, some], some


def mapped_grid(alignment: Alignment, y_um: Tensor, x_um: Tensor, device: str = "cpu") -> Tensor:
    """`Alignment.map` of all points of a grid, on a device.

    Args:
        alignment: Section to slide.
        y_um: (H,) float64, of the rows, on the host.
        x_um: (W,) of the columns.
        device: Where the positions are computed, and stay.

    Returns:
        Slide micrometres (H, W, 2).
    """
    matrix, offset = (torch.from_numpy(part).to(device) for part in (alignment.matrix, alignment.offset_um))
    out = y_um.to(device)[:, None, None] * matrix[:, 0] + x_um.to(device)[None, :, None] * matrix[:, 1] + offset
    bend = alignment.displacement
    if bend is None:
        return out
    knots = torch.from_numpy(bend.coefficients_um).to(device)
    return out + spline_grid(y_um, x_um, bend.origin_um, bend.spacing_um, knots)


class Registration(nn.Module):
    """One section's alignment as a trainable module, float64.

    The parameters are increments in micrometres over a starting alignment, about the section's
    centre: ``shift_um`` (2,) and ``shear_um`` (2, 2), the displacement at half the section's extent.

    Args:
        start: The alignment to begin from.
        extent_um: Outer size (y, x) of the section grid.
        knots: Knots (ny, nx) of a trainable B-spline over the extent, or None for the affine part
            alone (a displacement that ``start`` has is kept as it is).
    """

    def __init__(self, start: Alignment, extent_um: tuple[float, float], knots: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.start = start
        self.half_um = max(extent_um) / 2
        self.centre_um: Tensor
        self.matrix: Tensor
        self.offset_um: Tensor
        self.register_buffer("centre_um", torch.tensor(extent_um, dtype=torch.float64) / 2)
        self.register_buffer("matrix", torch.as_tensor(start.matrix, dtype=torch.float64))
        self.register_buffer("offset_um", torch.as_tensor(start.offset_um, dtype=torch.float64))
        self.shift_um = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.shear_um = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.knots_um: nn.Parameter | None = None
        self._fixed = start.displacement
        if knots is not None:
            # One knot beyond the grid on every side keeps the spline complete over the section.
            spacing = tuple(e / max(n - 1, 1) for e, n in zip(extent_um, knots, strict=True))
            shape = (knots[0] + 2, knots[1] + 2, 2)
            self._spacing = (spacing[0], spacing[1])
            self._origin = (-spacing[0], -spacing[1])
            initial = torch.zeros(shape, dtype=torch.float64)
            if start.displacement is not None:
                given = start.displacement
                same = np.allclose([*given.origin_um, *given.spacing_um], [*self._origin, *self._spacing], rtol=1e-9)
                if given.coefficients_um.shape != shape or not same:
                    raise ValueError("the starting displacement has another grid of knots")
                initial = torch.as_tensor(start.displacement.coefficients_um).clone()
            self.knots_um = nn.Parameter(initial)

    def displacement(self) -> Displacement | None:
        """The B-spline part as it stands."""
        if self.knots_um is None:
            return self._fixed
        return Displacement(self._origin, self._spacing, self.knots_um.detach().cpu().numpy().copy())

    def alignment(self) -> Alignment:
        """The current transform as a plain `Alignment`, the start's evidence kept."""
        gain = self.shear_um.detach().cpu().numpy() / self.half_um
        shift = self.shift_um.detach().cpu().numpy()
        centre = self.centre_um.cpu().numpy()
        return Alignment(
            self.start.matrix + gain,
            self.start.offset_um + shift - gain @ centre,
            self.displacement(),
            dict(self.start.evidence),
        )

    def forward(self, points_um: Tensor) -> Tensor:
        """Slide micrometres (N, 2) of section micrometres (N, 2), float64, differentiable in the parameters."""
        return self.at(points_um)()

    def at(self, points_um: Tensor) -> Callable[[], Tensor]:
        """`forward` for points that stay: what does not change with the parameters is computed once.

        Args:
            points_um: (N, 2) float64, on the host, as the module has to be.

        Returns:
            Gives the slide micrometres (N, 2) float64 at the parameters as they stand whenever it is called.
        """
        start = points_um @ self.matrix.T + self.offset_um
        relative = (points_um - self.centre_um) / self.half_um
        bend, weights = self._bend(), None
        if bend is not None:
            origin, spacing, knots = bend
            weights = spline_weights(points_um, origin, spacing, (knots.shape[0], knots.shape[1]))
            if self.knots_um is None:
                start, weights = start + _Combined.apply(knots.reshape(-1, 2), weights), None

        def mapped() -> Tensor:
            out = start + self.shift_um + relative @ self.shear_um.T
            if weights is None or self.knots_um is None:
                return out
            return out + _Combined.apply(self.knots_um.reshape(-1, 2), weights)

        return mapped

    def grid(self, y_um: Tensor, x_um: Tensor) -> Tensor:
        """`forward` of all points of a grid: rows (H,), columns (W,), both on the host -> (H, W, 2)."""
        y, x = y_um.to(self.matrix)[:, None, None], x_um.to(self.matrix)[None, :, None]
        out = y * self.matrix[:, 0] + x * self.matrix[:, 1] + self.offset_um
        relative_y, relative_x = (y - self.centre_um[0]) / self.half_um, (x - self.centre_um[1]) / self.half_um
        out = out + self.shift_um + relative_y * self.shear_um[:, 0] + relative_x * self.shear_um[:, 1]
        bend = self._bend()
        return out if bend is None else out + spline_grid(y_um, x_um, *bend)

    def _bend(self) -> tuple[tuple[float, float], tuple[float, float], Tensor] | None:
        """The spline's origin, spacing and knots, trainable or as they were at the start."""
        if self.knots_um is not None:
            return self._origin, self._spacing, self.knots_um
        if self._fixed is None:
            return None
        knots = torch.from_numpy(self._fixed.coefficients_um).to(self.matrix)
        return self._fixed.origin_um, self._fixed.spacing_um, knots


def sample_window(
    planes: Tensor,
    origin_px: tuple[int, int],
    spacing_um: tuple[float, float],
    slide_um: Tensor,
    supersample: int | tuple[int, int] = 2,
) -> Tensor:
    """Area-averaged samples (C, H, W) of planes at a window of section pixels.

    Args:
        planes: (h, w, C) window of the plane grid, floating point.
        origin_px: First row and column of that window in the plane grid.
        spacing_um: Plane pixel size (y, x), slide micrometres; the grid starts at the slide's corner.
        slide_um: (H sy, W sx, 2) float64 slide positions of sy x sx points per section pixel.
        supersample: (sy, sx), or one for both; each output pixel is the mean of its bilinear samples.
    """
    sy, sx = (supersample, supersample) if isinstance(supersample, int) else supersample
    height, width = slide_um.shape[0] // sy, slide_um.shape[1] // sx
    coordinates = slide_um.reshape(-1, 2) / slide_um.new_tensor(spacing_um) - 0.5
    samples = bilinear(planes, origin_px, coordinates)
    # One axis after the other: the mean over both at once takes three times as long.
    pooled = samples.reshape(height, sy, width, sx, -1).sum(3).sum(1) / (sy * sx)
    return pooled.permute(2, 0, 1)


def on_slide(slide_um: Tensor, extent_um: Tensor, supersample: int | tuple[int, int] = 2) -> Tensor:
    """Share (H, W) of each pixel's sample points that lie on the slide: beyond it sampling repeats its edge.

    Args:
        slide_um: As for `sample_window`.
        extent_um: (2,) size of the slide (y, x).
        supersample: As for `sample_window`.
    """
    inside = ((slide_um >= 0) & (slide_um <= extent_um)).all(-1).float()
    return torch.nn.functional.avg_pool2d(inside[None, None], supersample)[0, 0]


def plane_window(
    points_um: Points, spacing_um: tuple[float, float], shape_px: tuple[int, int], margin_px: int = 1
) -> tuple[int, int, int, int]:
    """Rows and columns (r0, r1, c0, c1) of the plane grid that bilinear sampling of points needs.

    Clipped to the grid; at least one pixel even where the points lie beyond it.
    """
    rel = np.asarray(points_um).reshape(-1, 2) / np.asarray(spacing_um) - 0.5
    low = np.floor(rel.min(0)).astype(int) - margin_px
    high = np.floor(rel.max(0)).astype(int) + 2 + margin_px
    r0, c0 = (int(np.clip(low[d], 0, shape_px[d] - 1)) for d in (0, 1))
    r1, c1 = (int(np.clip(high[d], lo + 1, shape_px[d])) for d, lo in ((0, r0), (1, c0)))
    return r0, r1, c0, c1
