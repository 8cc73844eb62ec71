"""Refinement by variable projection: only the transform is searched, the regression is solved.

For a transform T the stain features are sampled, averaged over the measured footprints and regressed
on the factors (ridge); the objective is ``sum_k log var(residual_k)``, the profile likelihood with each
factor's own noise. Gradients flow through the closed-form solve. The last stages compare high-passed
images (minus the 3 x 3 mean): only they see errors below a measured pixel.

Source of the scheme: Golub and Pereyra, Inverse Problems 19, R1 (2003), variable projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepfere.alignment.looks import MOST_PX, Looks
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.cores import side_by_side
from deepfere.frame import Alignment
from deepfere.model.registration import Registration, sample_window

RIDGE = 1e-3
PX_PER_KNOT = 15
"""Measured pixels that are looked at for every knot of a displacement, at least."""


@dataclass(frozen=True)
class Stage:
    """One stage of refinement.

    Attributes:
        blur_pitch: S.d. of the blur of the stain features, in measured pixels.
        high_pass: Compare images minus their 3 x 3 mean.
        steps: Optimiser steps.
        rate_pitch: First learning rate, in measured pixels (falls to a tenth).
    """

    blur_pitch: float
    high_pass: bool
    steps: int
    rate_pitch: float


BEND_STAGES = (
    Stage(0.35, False, 40, 0.05),
    Stage(0.25, True, 50, 0.04),
    Stage(0.15, True, 40, 0.02),
)

MOST_STRETCH = 0.10
"""The scale may leave the starting one by this share before a penalty sets in."""
STRETCHING = 500.0
"""Weight of the squared excess stretch (in logarithms): 10 % too much outweighs what noise can promise."""

BENDING = 10.0
"""Weight of squared second differences of the knots, in measured pixels, against the log likelihood.

It says that the displacement's slope changes by 0.22 pixels (one s.d.) from knot to knot.
"""

AFFINE_STAGES = (
    Stage(0.7, False, 60, 0.15),
    Stage(0.35, False, 50, 0.08),
    Stage(0.25, True, 50, 0.04),
    Stage(0.15, True, 40, 0.02),
)


def footprint_points(measured: MeasuredOverview, supersample: int) -> Tensor:
    """Section positions (ny s, nx s, 2) float64 of s x s points per measured pixel."""
    return torch.from_numpy(measured.grid.refine(supersample).centres_um())


def bending(knots: Tensor) -> Tensor:
    """Bending energy of a grid of knots (ny, nx, 2): squared second differences, mixed ones twice."""
    rows = knots[2:] - 2 * knots[1:-1] + knots[:-2]
    cols = knots[:, 2:] - 2 * knots[:, 1:-1] + knots[:, :-2]
    mixed = knots[1:, 1:] - knots[1:, :-1] - knots[:-1, 1:] + knots[:-1, :-1]
    return (rows**2).sum() + (cols**2).sum() + 2 * (mixed**2).sum()


def residual_variance(design: Tensor, targets: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Residual and total variance (K,) of a ridge regression with intercept, solved in closed form.

    Args:
        design: (N, F) float64.
        targets: (N, K) float64.
        ridge: Penalty on standardised features, as a share of N.
    """
    n = len(design)
    x = design - design.mean(0)
    x = x / (x.std(0) + 1e-9)
    z = targets - targets.mean(0)
    gram = x.T @ x / n + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    cross = x.T @ z / n
    beta = torch.linalg.solve(gram, cross)
    total = (z**2).mean(0)
    explained = 2 * (beta * cross).sum(0) - (beta * (x.T @ x / n @ beta)).sum(0)
    return (total - explained).clamp(min=1e-9), total


def refine(
    measured: MeasuredOverview,
    stain: StainOverview,
    start: Alignment,
    stages: Sequence[Stage] = AFFINE_STAGES,
    supersample: int = 4,
    knots: tuple[int, int] | None = None,
) -> Alignment:
    """Improve the affine part of an alignment, and with ``knots`` a B-spline displacement too.

    Args:
        measured: Factor images.
        stain: Slide overview.
        start: Where to begin (right to within about a measured pixel or two).
        stages: What to do in which order.
        supersample: Sample points per measured pixel and axis.
        knots: Knots (ny, nx) of the displacement over the section; None searches the affine part alone.

    Returns:
        The refined alignment, with the start's evidence.
    """
    return refine_each(measured, stain, [start], stages, supersample, knots)[0]


def refine_each(
    measured: MeasuredOverview,
    stain: StainOverview,
    starts: Sequence[Alignment],
    stages: Sequence[Stage],
    supersample: int,
    knots: tuple[int, int] | None = None,
    rows: Sequence[NDArray[np.bool_]] | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Alignment]:
    """`refine` from several starts; a stage's blurred slide is made once for all of them.

    Args:
        measured: Factor images.
        stain: Slide overview.
        starts: Where to begin.
        stages: What to do in which order.
        supersample: Sample points per measured pixel and axis.
        knots: As for `refine`.
        rows: For each start the measured pixels (ny, nx) that may be looked at; None takes all.
        progress: Called with the share done.

    Returns:
        The refined alignments, in the order of the starts, each with its start's evidence.
    """
    pitch = float(np.mean(measured.grid.pitch_um))
    most = MOST_PX if knots is None else max(MOST_PX, PX_PER_KNOT * knots[0] * knots[1])
    inside = [measured.mask] if rows is None else [measured.mask & some for some in rows]
    seen = [Looks(measured.grid, some, supersample, most) for some in inside]
    runs = []
    for n, start in enumerate(starts):
        looks = seen[0 if rows is None else n]
        registration = Registration(start, measured.grid.extent_um, knots)
        runs.append((registration, registration.at(looks.points_um.reshape(-1, 2)), looks))
    images, tell = torch.from_numpy(measured.images), progress or (lambda share: None)

    def take(stage: Stage, begun: float) -> None:
        # Pixels of half the blur lose nothing and cost less.
        scene = stain.coarsen(0.5 * stage.blur_pitch * pitch)
        features = scene.features(stage.blur_pitch * pitch)
        targets = [looks.of_grid(images, stage.high_pass) for looks in seen]

        def one(n: int) -> None:
            registration, mapped, looks = runs[n]
            z = targets[0 if rows is None else n]
            left = partial(_unexplained, mapped, looks, z, features, scene.spacing_um, stage.high_pass)
            _minimise(registration, left, looks.count, stage, pitch)

        side_by_side(one, range(len(runs)), lambda done: tell(begun + done / (len(stages) * len(runs))))

    for number, stage in enumerate(stages):
        take(stage, number / len(stages))
    return [registration.alignment() for registration, _, _ in runs]


def _unexplained(
    mapped: Callable[[], Tensor],
    looks: Looks,
    targets: Tensor,
    features: Tensor,
    spacing_um: tuple[float, float],
    fine: bool,
) -> Tensor:
    """Sum over the factors of the log residual variance, as a share of the variance, where a registration stands."""
    slide = mapped().reshape(*looks.points_um.shape)
    pooled = sample_window(features, (0, 0), spacing_um, slide, looks.supersample).double()
    residual, total = residual_variance(looks.of_samples(pooled, fine), targets)
    return torch.log(residual / total.clamp(min=1e-12)).sum()


def _minimise(
    registration: Registration, unexplained: Callable[[], Tensor], count: int, stage: Stage, pitch_um: float
) -> None:
    """Move a registration to the least of an objective and the penalties: the best of the steps stays.

    Args:
        registration: Moved.
        unexplained: Sum of log residual variances, where it stands.
        count: Measured pixels that this is of.
        stage: Steps and learning rate.
        pitch_um: Measured pixel size.
    """
    optimiser = torch.optim.Adam(registration.parameters(), lr=stage.rate_pitch * pitch_um, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, stage.steps, eta_min=0.1 * stage.rate_pitch * pitch_um
    )
    best, best_state = np.inf, None
    for _ in range(stage.steps):
        optimiser.zero_grad()
        gain = registration.shear_um / registration.half_um
        stretch = torch.linalg.svdvals(torch.linalg.solve(registration.matrix, registration.matrix + gain))
        excess = (torch.log(stretch).abs() - MOST_STRETCH).clamp(min=0)
        loss = unexplained() + STRETCHING * (excess**2).sum()
        if registration.knots_um is not None:
            # The likelihood is count / 2 times the log variances.
            loss = loss + 2.0 * BENDING / count * bending(registration.knots_um / pitch_um)
        value = float(loss.detach())
        if value < best:
            best = value
            best_state = {k: v.detach().clone() for k, v in registration.state_dict().items()}
        loss.backward()
        optimiser.step()
        schedule.step()
    if best_state is not None:
        registration.load_state_dict(best_state)
