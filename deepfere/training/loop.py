"""The joint model and its training step, in plain torch: no Ray here.

One network is shared by all sections; each section has its own registration; all train together. Losses:
mapping (footprint means of the mapped stain against the measurement), reconstruction at reduced scale
(Wald, ratios 2 to 4: real measured pixels are the targets), correlation (structure carried into the output,
only where the closed form proves it) and smoothness of the registration.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepfere.cores import side_by_side
from deepfere.frame import Alignment
from deepfere.measured.operator import cell_means, expand
from deepfere.model.guide import Cells, GuideSpec
from deepfere.model.losses import correlation_loss, huber, mapping_loss, project
from deepfere.model.network import FusionNetwork, network_from_config
from deepfere.model.registration import Registration

RATIOS = (2, 3, 4)
INDICES = ("section", "cell", "origin", "flip")
"""Columns of a batch that steer it: they stay on the host, so that a GPU is never waited for to read them."""
Batch = dict[str, Any]


@dataclass(frozen=True)
class SectionTask:
    """What training needs to know of one section (plain values: it travels to the workers).

    Attributes:
        spec: `GuideSpec.to_dict` of the section.
        alignment: `Alignment.to_dict` to start from.
        gate: K gates of the closed form.
        weights: (F, K) T1 weights as nested lists.
    """

    spec: dict[str, Any]
    alignment: dict[str, Any]
    gate: list[float]
    weights: list[list[float]]


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop (plain values)."""

    network: dict[str, int]
    feature_mean: list[float]
    feature_sd: list[float]
    steps: int
    batch: int
    patch_px: int
    context_px: int
    rate: float
    rate_registration_pitch: float
    mapping_weight: float
    correlation_weight: float
    seed: int
    precision: str = "float32"


class JointModel(nn.Module):
    """Network and registrations; the forward pass returns the losses of a batch of patches."""

    def __init__(self, settings: LoopSettings, sections: list[SectionTask]) -> None:
        super().__init__()
        self.settings = settings
        self.specs = [GuideSpec.from_dict(s.spec) for s in sections]
        torch.manual_seed(settings.seed)
        self.network: FusionNetwork = network_from_config(settings.network)
        self.network.set_feature_scale(settings.feature_mean, settings.feature_sd)
        self.network.set_linear(np.mean([s.weights for s in sections], axis=0))
        self.registrations = nn.ModuleList(
            Registration(Alignment.from_dict(s.alignment), spec.grid.extent_um)
            for s, spec in zip(sections, self.specs, strict=True)
        )
        self._proven = [any(g != 0 for g in s.gate) for s in sections]
        self.gates: Tensor
        self.closed_form: Tensor
        self.register_buffer("gates", torch.tensor([s.gate for s in sections]))
        self.register_buffer("closed_form", torch.tensor(np.array([s.weights for s in sections]), dtype=torch.float32))

    def optimiser(self) -> torch.optim.Optimizer:
        """AdamW for the network, Adam steps of a fraction of a measured pixel for the registrations."""
        pitch = float(np.mean([np.mean(spec.grid.pitch_um) for spec in self.specs]))
        return torch.optim.AdamW(
            [
                {"params": list(self.network.parameters()), "lr": self.settings.rate, "weight_decay": 1e-3},
                {
                    "params": list(self.registrations.parameters()),
                    "lr": self.settings.rate_registration_pitch * pitch,
                    "weight_decay": 0.0,
                },
            ]
        )

    def alignment(self, section: int) -> Alignment:
        """A section's alignment as it stands."""
        return self._registration(section).alignment()

    def _registration(self, section: int) -> Registration:
        module = self.registrations[section]
        assert isinstance(module, Registration)
        return module

    def _low(self, device: torch.device) -> Any:
        """Where the network runs in half precision; registration, sampling and losses never do."""
        low = self.settings.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if low else nullcontext()

    def _mapped(self, stain: Tensor) -> Tensor:
        with self._low(stain.device):
            return self.network.mapped(stain).float()

    def _detail(self, stain: Tensor, upsampled: Tensor) -> Tensor:
        with self._low(stain.device):
            return self.network(stain, upsampled).float()

    def features(self, batch: Batch, n: int) -> tuple[Tensor, Tensor, GuideSpec, int]:
        """Features of patch n's core, differentiable in its registration.

        Returns:
            Features (F, h, w) of the core with the network's receptive field around it, the share of each
            core pixel's footprint that the slide shows (c, c), the section's spec and number.
        """
        section, planes = batch["section"][n], batch["planes"][n]
        spec, c, p = self.specs[section], self.settings.context_px, self.settings.patch_px
        i0, j0 = batch["cell"][n]
        core = Cells(i0 + c, i0 + p - c, j0 + c, j0 + p - c)
        r = self.network.radius_px
        y, x = (torch.from_numpy(axis) for axis in spec.axes_um(core, r))
        slide = self._registration(section).grid(y, x)
        row, col = batch["origin"][n]
        features, cover = spec.features(planes.float(), (row, col), slide)
        inner = cover[r : cover.shape[0] - r, r : cover.shape[1] - r]
        return features, (cell_means(inner, spec.factor) >= 0.99).float(), spec, section

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean losses over the patches of a batch.

        Args:
            batch: From `on_device`: tensors ``planes`` (N, h, w, 7) uint8, ``pooled`` (N, F, p, p) footprint means
                of the features at the starting alignment, ``target`` (N, K, p, p) factors, ``weight`` (N, p, p),
                ``share`` (N,) by which a patch counts (1, where a step is dealt evenly to all workers);
                lists ``origin`` (N, 2), ``cell`` (N, 2), ``section`` (N,), ``flip`` (N, 2).

        Returns:
            ``mapping``, ``reconstruction``, ``correlation``, ``smoothness`` and ``total`` (weighted sum).
        """
        c, p, r = self.settings.context_px, self.settings.patch_px, self.network.radius_px
        core = slice(c, p - c)
        target, weight, share = batch["target"], batch["weight"][:, None], batch["share"]
        pooled_core, covered_core, mapping, correlation = [], [], [], []
        for n in range(len(target)):
            stain, covered, spec, section = self.features(batch, n)
            f = spec.factor
            inside = stain[:, r : stain.shape[1] - r, r : stain.shape[2] - r]
            # The core follows the registration; its context stays where the alignment was at the start.
            pooled_core.append(cell_means(inside, f))
            covered_core.append(covered[None])
            mapped = self._mapped(inside[None])
            small = (slice(n, n + 1), slice(None), core, core)
            mapping.append(mapping_loss(mapped, target[small], weight[small] * covered, f))
            correlation.append(self._correlation(stain[None].detach(), target[n : n + 1], f, section))
        pad = (c, c, c, c)
        inner = nn.functional.pad(target.new_ones(p - 2 * c, p - 2 * c), pad).bool()
        pooled = torch.where(inner, nn.functional.pad(torch.stack(pooled_core), pad), batch["pooled"])
        weight = weight * nn.functional.pad(torch.stack(covered_core), pad, value=1.0)
        flip_y, flip_x = torch.tensor(batch["flip"], dtype=torch.bool, device=target.device).T

        def flipped(x: Tensor) -> Tensor:
            x = torch.where(flip_y[:, None, None, None], x.flip(-2), x)
            return torch.where(flip_x[:, None, None, None], x.flip(-1), x)

        out = {
            "mapping": (torch.stack(mapping) * share).mean(),
            "reconstruction": self._reduced_scale(flipped(pooled), flipped(target), flipped(weight), share),
            "correlation": (torch.stack(correlation) * share).mean(),
            "smoothness": self._smoothness(),
        }
        out["total"] = (
            out["reconstruction"]
            + self.settings.mapping_weight * out["mapping"]
            + self.settings.correlation_weight * out["correlation"]
            + out["smoothness"]
        )
        return out

    def _reduced_scale(self, pooled: Tensor, target: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        r0 = self.network.radius_px
        losses = []
        for ratio in RATIOS:
            side = self.settings.patch_px // ratio * ratio
            x, z, w = pooled[..., :side, :side], target[..., :side, :side], weight[..., :side, :side]
            coarse = cell_means(z, ratio)
            upsampled = expand(nn.functional.pad(coarse, (1, 1, 1, 1), mode="replicate"), ratio, "keys")
            start = -(-r0 // ratio) * ratio
            stop = (side - r0) // ratio * ratio
            raw = self._detail(x, upsampled)[..., start - r0 : stop - r0, start - r0 : stop - r0]
            inner = slice(start + ratio, stop - ratio)
            error = project(raw, ratio) - (z - upsampled)[..., inner, inner]
            # A target counts only if its whole coarse cell was measured.
            whole = (cell_means(w, ratio) > 0.999).float().repeat_interleave(ratio, -1).repeat_interleave(ratio, -2)
            losses.append(huber(error, whole[..., inner, inner] * share[:, None, None, None]))
        return torch.stack(losses).mean()

    def _correlation(self, stain: Tensor, target: Tensor, factor: int, section: int) -> Tensor:
        gate = self.gates[section]
        if self.settings.correlation_weight == 0 or not self._proven[section]:
            return stain.new_zeros(())
        r, c = self.network.radius_px, self.settings.context_px
        around = c - 1 - -(-r // factor)
        cells = target[..., around : target.shape[-2] - around, around : target.shape[-1] - around]
        upsampled = expand(cells, factor, "keys")
        crop = (upsampled.shape[-1] - stain.shape[-1]) // 2
        upsampled = upsampled[..., crop : upsampled.shape[-2] - crop, crop : upsampled.shape[-1] - crop]
        detail = self._detail(stain, upsampled)
        inner = stain[..., r : stain.shape[-2] - r, r : stain.shape[-1] - r]
        proven = torch.einsum("nfyx,fk->nkyx", inner, self.closed_form[section])
        return correlation_loss(project(detail, factor), project(proven, factor), gate)

    def _smoothness(self) -> Tensor:
        total = self.closed_form.new_zeros(())
        for n, spec in enumerate(self.specs):
            registration, pitch = self._registration(n), float(np.mean(spec.grid.pitch_um))
            moved = (registration.shift_um**2).sum() + (registration.shear_um**2).sum()
            total = total + (1e-2 * moved / pitch**2).float()
        return total


def schedule(rate: float, step: int, steps: int) -> float:
    """Cosine decay to a twentieth after a short warm-up."""
    warm = min(1.0, (step + 1) / max(1, min(10, steps // 10)))
    return float(rate * warm * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / max(steps, 1)))))


def on_device(batch: dict[str, Tensor], device: torch.device | str) -> Batch:
    """A batch of `deepfere.tiling.dataset` as `JointModel.forward` takes it: pixels there, `INDICES` as lists here."""
    return {
        name: values.tolist() if name in INDICES else values.to(device, non_blocking=True)
        for name, values in batch.items()
    }


def train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, parts: Sequence[Batch], step: int, settings: LoopSettings
) -> dict[str, Tensor]:
    """One optimiser step on the mean of equally large parts of a batch (gradient accumulation).

    Args:
        model: The joint model, or DDP around it: gradients then travel once, with the last part.
        optimiser: Of its parameters.
        parts: The batch; several parts need the memory of one.
        step: Number of this step.
        settings: Of the loop.

    Returns:
        The losses, detached, where the model is: reading them waits for the device.
    """
    for group in optimiser.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = schedule(group["initial_lr"], step, settings.steps)
    optimiser.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    ddp = model if isinstance(model, DistributedDataParallel) else None
    by_patch = ddp is None and next(model.parameters()).device.type == "cpu"
    for k, part in enumerate(parts):
        if by_patch:
            losses = _patch_by_patch(model, part, len(parts))
        else:
            with ddp.no_sync() if ddp is not None and k + 1 < len(parts) else nullcontext():
                losses = model(part)
                (losses["total"] / len(parts)).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(parts)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.dtype == torch.float32], 1.0)
    optimiser.step()
    return sums


def _patch_by_patch(model: nn.Module, part: Batch, parts: int) -> dict[str, Tensor]:
    """Adds the gradients of the mean loss over a part's patches, a thread per patch, summed in the patches' order.

    The mean over patches is the mean of what each gives by itself, so the sum is the same to the bit however many
    threads there are.

    Args:
        model: On the host.
        part: Of the batch.
        parts: Of the step, over which the mean is taken as well.

    Returns:
        The mean losses, detached.
    """
    parameters, count = list(model.parameters()), len(part["target"])

    def one(n: int) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        losses: dict[str, Tensor] = model({name: values[n : n + 1] for name, values in part.items()})
        gradients = torch.autograd.grad(losses["total"] / (parts * count), parameters, allow_unused=True)
        return {name: value.detach() for name, value in losses.items()}, gradients

    sums: dict[str, Tensor] = {}
    for losses, gradients in side_by_side(one, range(count)):
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value / count
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return sums
