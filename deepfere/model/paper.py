"""The published DeepFERE model (Guo et al., Anal. Chem. 2023, 95, 9714): networks, losses and training of one section.

Written anew from what its publication and its authors' program state: shapes of the layers, losses, learning rates,
numbers of iterations. It is here to be compared with: it looks at a section whole, is trained for that section alone,
and nothing makes its images agree with the measurement.

Four parts. *Registration*: an affine map from the stain alone, the identity at first. *Mapping*: registered stain to
channels. *Fusion*: a U-Net over the interpolated measurement and the mapped stain. *Revision*: three small
convolutions on its output, and these are the images. Losses: mapped, fused and revised images, reduced to measured
pixels by a Lanczos kernel, against the measurement (mean squares); and distances between the pixels of random windows
of the fused images against those of the registered stain or, for a single ion, of the mapped stain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from deepfere.errors import InputError

LEAST_SIDE_PX = 86
"""Of a section: what the registration's convolutions and poolings leave at least one value of."""
WIDTH, SCALES, SKIP = 128, 5, 5
MAPPING_WIDTH, MAPPING_DEPTH, REVISION_WIDTH = 64, 3, 16
SLOPE = 0.2
BETAS = (0.5, 0.999)
BLACK = 0.05
"""Pixels whose channels sum to less have no say in the correlation loss: nothing of the slide is there."""
PATCHES_PER_UNIT = 5
"""The correlation loss is the mean over the windows times this."""


class Registration(nn.Module):
    """An affine map of the stain onto the section's grid, from the stain alone."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(3, 8, 7), nn.MaxPool2d(4), nn.ReLU(),
            nn.Conv2d(8, 10, 5), nn.MaxPool2d(4), nn.ReLU(),
            nn.Conv2d(10, 8, 1), nn.MaxPool2d(4), nn.ReLU(),
        )  # fmt: skip
        self.decide = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
        last: Any = self.decide[2]
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))

    def affine(self, stain: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, 2, 3): where to sample, both axes from -1 to 1."""
        return self.decide(self.look(stain).mean((-1, -2))).view(1, 2, 3)

    def forward(self, stain: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, 3, H, W), black beyond the slide's window."""
        grid = functional.affine_grid(self.affine(stain), list(stain.shape), align_corners=False)
        return functional.grid_sample(stain, grid, align_corners=False)


def _convolution(entering: int, leaving: int, stride: int = 1) -> list[nn.Module]:
    """3 x 3 on mirrored edges, and its activation."""
    convolution = nn.Conv2d(entering, leaving, 3, stride, padding=1, padding_mode="reflect")
    return [convolution, nn.LeakyReLU(SLOPE)]


class Mapping(nn.Module):
    """Registered stain -> channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = [3, *[MAPPING_WIDTH] * (MAPPING_DEPTH + 1), channels]
        layers: list[nn.Module] = []
        for entering, leaving in zip(sizes[:-1], sizes[1:], strict=True):  # noqa: RUF007
            layers += [nn.Conv2d(entering, leaving, 3, padding=1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers)

    def forward(self, stain: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, K, H, W)."""
        return self.layers(stain)


class Scale(nn.Module):
    """One scale of the U-Net: a thin way past, and a way through half the resolution and all scales below."""

    def __init__(self, entering: int, below: int) -> None:
        super().__init__()
        self.past = nn.Sequential(nn.Conv2d(entering, SKIP, 1), nn.LeakyReLU(SLOPE))
        self.down = nn.Sequential(*_convolution(entering, WIDTH, 2), *_convolution(WIDTH, WIDTH))
        self.below = Scale(WIDTH, below - 1) if below else nn.Identity()
        self.join = nn.Sequential(*_convolution(SKIP + WIDTH, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1), nn.LeakyReLU(SLOPE))

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, H, W) -> (1, `WIDTH`, H, W)."""
        deep = functional.interpolate(self.below(self.down(x)), scale_factor=2, mode="bilinear", align_corners=False)
        # An odd side comes back one longer.
        deep = deep[..., : x.shape[-2], : x.shape[-1]]
        return self.join(torch.cat([self.past(x), deep], 1))


class Fusion(nn.Module):
    """Interpolated measurement and mapped stain -> fused images, and the revised ones that are delivered."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unet = Scale(2 * channels, SCALES - 1)
        self.leave = nn.Conv2d(WIDTH, channels, 1)
        self.revise = nn.Sequential(
            nn.Conv2d(channels, REVISION_WIDTH, 3, padding=1), nn.LeakyReLU(SLOPE),
            nn.Conv2d(REVISION_WIDTH, REVISION_WIDTH, 3, padding=1), nn.LeakyReLU(SLOPE),
            nn.Conv2d(REVISION_WIDTH, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, upsampled: Tensor, mapped: Tensor) -> tuple[Tensor, Tensor]:
        """(1, K, H, W) twice -> fused (between 0 and 1) and revised, each (1, K, H, W)."""
        fused = torch.sigmoid(self.leave(self.unet(torch.cat([upsampled, mapped], 1))))
        return fused, self.revise(fused)


def check_size(shape_px: tuple[int, int], most_px: int) -> None:
    """Refuse a section that the networks cannot look at whole.

    Args:
        shape_px: High-resolution rows and columns.
        most_px: Most high-resolution pixels.

    Raises:
        InputError: It is too large, or a side is shorter than `LEAST_SIDE_PX`.
    """
    height, width = shape_px
    where = "model.tier=paper"
    if height * width > most_px:
        raise InputError(
            f"the published model sees a section whole: {height} x {width} high-resolution pixels are more than "
            f"{most_px}",
            where=where,
            remedy="give a smaller --factor, raise paper.max_px (memory and time grow with it), or use another tier",
        )
    if min(height, width) < LEAST_SIDE_PX:
        raise InputError(
            f"{height} x {width} high-resolution pixels: the published model needs {LEAST_SIDE_PX} on each side",
            where=where,
            remedy="give a larger --factor, or use another tier",
        )


def macs_per_px(channels: int) -> tuple[int, int]:
    """Multiply-accumulates per high-resolution pixel: registration and mapping, and fusion with its revision."""
    before = 3 * 8 * 49 + 8 * 10 * 25 // 16 + 10 * 8 // 256
    before += 9 * (3 * MAPPING_WIDTH + MAPPING_DEPTH * MAPPING_WIDTH**2 + MAPPING_WIDTH * channels)
    fusion = WIDTH * channels + 9 * (2 * channels * REVISION_WIDTH + REVISION_WIDTH**2)
    for scale in range(SCALES):
        entering = WIDTH if scale else 2 * channels
        full = entering * SKIP + 9 * (SKIP + WIDTH) * WIDTH + WIDTH**2
        halved = 9 * (entering + WIDTH) * WIDTH
        fusion += full // 4**scale + halved // 4 ** (scale + 1)
    return before, fusion


def shrink_matrix(count: int, factor: int) -> NDArray[np.float64]:
    """The published reduction of one axis to ``count`` measured pixels, (count, count factor): rows sum to one.

    Lanczos' kernel with two lobes, stretched by the factor, in the middle of each measured pixel; the edge repeats.
    """
    offset = np.arange(-2 * factor, 2 * factor) + (0.5 if factor % 2 == 0 else 0.0)
    taps = np.sinc(offset / factor) * np.sinc(offset / factor / 2)
    taps /= taps.sum()
    first = np.arange(count) * factor + factor // 2 - 2 * factor
    positions = np.clip(first[:, None] + np.arange(4 * factor), 0, count * factor - 1)
    out = np.zeros((count, count * factor))
    np.add.at(out, (np.arange(count)[:, None], positions), taps)
    return out


class _Distances(torch.autograd.Function):
    """Sum over windows and pairs of their pixels of |distance in the image - distance in the guide|.

    The gradient is written down rather than recorded: 256 x 256 pairs of 800 windows would be kept several times.
    """

    CHUNK = 16

    @staticmethod
    def forward(ctx: Any, image: Tensor, guide: Tensor, starts: Tensor, size: int) -> Tensor:
        channels, height, width = image.shape
        step = torch.arange(size, device=image.device)
        inside = (step[:, None] * width + step).reshape(-1)
        index = (starts[:, :1] * width + starts[:, 1:]) + inside  # (P, size^2) of flattened images
        flat, led = image.reshape(channels, -1), guide.reshape(len(guide), -1)
        lit = (led.sum(0) >= BLACK).to(image.dtype)
        total = image.new_zeros((), dtype=torch.float64)
        slope = image.new_empty((channels, *index.shape))
        for n in range(0, len(index), _Distances.CHUNK):
            some = index[n : n + _Distances.CHUNK]
            a = flat[:, some]
            gap = _squares(a) - _squares(led[:, some])
            counted = lit[some]
            gap *= counted[:, :, None]
            gap *= counted[:, None, :]
            total += gap.abs().sum(dtype=torch.float64)
            sign = gap.sign_()
            # Every pair counts twice, and each pixel is in both.
            slope[:, n : n + len(some)] = 4 * (sign.sum(-1) * a - torch.einsum("pij,kpj->kpi", sign, a))
        where = index.reshape(-1)
        added = [torch.bincount(where, one.reshape(-1), minlength=height * width) for one in slope]
        ctx.save_for_backward(torch.stack(added).to(image.dtype).reshape(image.shape))
        return total.to(image.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None


def _squares(pixels: Tensor) -> Tensor:
    """(C, P, N) -> squared distances (P, N, N) over the channels."""
    out = None
    for channel in pixels:
        gap = (channel[:, :, None] - channel[:, None, :]).square_()
        out = gap if out is None else out.add_(gap)
    assert out is not None
    return out


def correlation_loss(image: Tensor, guide: Tensor, starts: Tensor, size: int) -> Tensor:
    """Pixels of a window that differ in the guide have to differ as much in the image.

    Args:
        image: (K, H, W).
        guide: (C, H, W); pixels whose channels sum to less than `BLACK` do not count.
        starts: (P, 2) first row and column of every window.
        size: Side of the windows.

    Returns:
        Mean over windows and pairs of pixels of the absolute difference of their squared distances, times
        `PATCHES_PER_UNIT`.
    """
    scale = PATCHES_PER_UNIT / (len(starts) * size**4)
    return _Distances.apply(image, guide.detach(), starts, size) * scale


@dataclass(frozen=True)
class Recipe:
    """How a section is trained.

    Attributes:
        warm_up: Iterations of registration and mapping alone.
        iterations: Iterations of all parts.
        rate: Learning rate of Adam.
        patches: Windows of the correlation loss.
        patch_px: Side of a window.
        stain_guides: The correlation loss looks at the registered stain; else at the mapped stain.
        seed: Of first weights and windows.
    """

    warm_up: int
    iterations: int
    rate: float
    patches: int
    patch_px: int
    stain_guides: bool
    seed: int

    @property
    def total(self) -> int:
        """All iterations."""
        return self.warm_up + self.iterations


class Training:
    """One section's networks on their way.

    Args:
        cells: (K, ny, nx) measured channels, 0 to 1, none missing.
        stain: (3, H, W) colours of the stain on the high-resolution grid, 0 to 1.
        recipe: How.
        device: Where.
    """

    def __init__(
        self, cells: NDArray[np.floating], stain: NDArray[np.floating], recipe: Recipe, device: str = "cpu"
    ) -> None:
        channels, ny, nx = cells.shape
        factor = stain.shape[-1] // nx
        self.recipe, self.done, self.device = recipe, 0, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.registration, self.mapping, self.fusion = Registration(), Mapping(channels), Fusion(channels)
        self._nets = nn.ModuleDict(
            {"registration": self.registration, "mapping": self.mapping, "fusion": self.fusion}
        ).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        first = [*self.registration.parameters(), *self.mapping.parameters()]
        self._first = torch.optim.Adam(first, recipe.rate, BETAS)
        self._second = torch.optim.Adam(self.fusion.parameters(), recipe.rate, BETAS)

        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values, np.float32), device=device)

        self._cells, self._stain = tensor(cells)[None], tensor(stain)[None]
        self._rows, self._cols = tensor(shrink_matrix(ny, factor)), tensor(shrink_matrix(nx, factor).T)
        # Cubic convolution with a = -3/4, as OpenCV has it.
        self._upsampled = functional.interpolate(self._cells, self._stain.shape[-2:], mode="bicubic")

    def _off(self, image: Tensor) -> Tensor:
        """Mean square of what an image, reduced to measured pixels, differs from them by."""
        return functional.mse_loss(self._rows @ image @ self._cols, self._cells)

    def step(self) -> float:
        """One iteration; returns the loss against the measurement."""
        self._first.zero_grad()
        self._second.zero_grad()
        registered = self.registration(self._stain)
        mapped = self.mapping(registered)
        loss = self._off(mapped)
        if self.done >= self.recipe.warm_up:
            fused, revised = self.fusion(self._upsampled, mapped)
            loss = loss + self._off(fused) + self._off(revised)
        loss.backward()
        self._first.step()
        if self.done >= self.recipe.warm_up:
            self._second.step()
            # The first gradient is still there: the published program adds to it, and steps along the sum.
            mapped, registered = mapped.detach(), registered.detach()
            fused, _ = self.fusion(self._upsampled, mapped)
            guide = registered if self.recipe.stain_guides else mapped
            correlation_loss(fused[0], guide[0], self._starts(), self.recipe.patch_px).backward()
            self._second.step()
        self.done += 1
        return float(loss.detach())

    def _starts(self) -> Tensor:
        """Windows of this iteration: they depend on the seed and its number alone."""
        rng = np.random.default_rng([self.recipe.seed, 11, self.done])
        high = np.array(self._stain.shape[-2:]) - self.recipe.patch_px
        return torch.as_tensor(rng.integers(0, high, (self.recipe.patches, 2)), device=self.device)

    @torch.no_grad()
    def images(self) -> NDArray[np.float64]:
        """The delivered images (K, H, W), in units of the channels."""
        return self.fusion(self._upsampled, self.mapping(self.registration(self._stain)))[1][0].double().cpu().numpy()

    @torch.no_grad()
    def affine(self) -> NDArray[np.float64]:
        """The registration's map (2, 3): x, y from -1 to 1."""
        return self.registration.affine(self._stain)[0].double().cpu().numpy()

    def state(self) -> dict[str, Any]:
        """All that going on takes."""
        return {
            "done": self.done,
            "nets": self._nets.state_dict(),
            "first": self._first.state_dict(),
            "second": self._second.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.done = int(state["done"])
        self._nets.load_state_dict(state["nets"])
        self._first.load_state_dict(state["first"])
        self._second.load_state_dict(state["second"])
