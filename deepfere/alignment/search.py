"""Coarse search: every flip and rotation, every shift, ranked by how well the stain predicts the ions.

1. For each flip and angle the slide's principal stain features are resampled at the (coarsened)
   measured pitch; masked normalised correlations with the leading factors at *all* shifts come from
   FFTs (Padfield, IEEE Trans. Image Process. 21, 2706, 2012). Their summed squares approximate R2.
2. The best shifts of every orientation are refined (affine, variable projection); distinct placements are
   ranked by R2 of the *fine* structure (minus the 3 x 3 mean) on blocks left out of the regression.
3. The best is accepted only if it beats every other placement by a margin, and a null distribution of
   wrong placements; otherwise landmarks are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.refine import Stage, refine
from deepfere.alignment.score import placement_r2, slide_cover
from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.registration import bilinear

MARGIN = 0.05
"""Held-out R2 by which the best placement must beat the best wrong one."""

LEAST_R2 = 0.1
"""Held-out R2 that it must reach. Right ones reached 0.18 and more, 50 slides of other tissue at most 0.07."""

COARSE_STAGES = (Stage(0.8, False, 30, 0.25), Stage(0.4, False, 25, 0.10))
FINAL_STAGES = (Stage(0.35, False, 20, 0.08), Stage(0.25, True, 35, 0.04))

FINALISTS = 6
"""Distinct placements that are refined to the end and compared."""

MIN_COVER = 0.7
"""Share of the measured tissue that the slide must cover."""

REMEDY = "give landmarks (--landmarks FILE.csv), an alignment (--alignment FILE.json), or the right slide"

MAX_STRETCH = 0.18
"""The stated sizes fix the scale: a placement that stretches any direction by more (in logarithms) is none.

It still competes: that it predicts as well as the best shows that the best is no more than luck.
"""


@dataclass(frozen=True)
class Candidate:
    """One placement and its scores."""

    alignment: Alignment
    flip: bool
    angle_deg: float
    r2: float
    fine_r2: float


def orientation(flip: bool, angle_deg: float) -> NDArray[np.float64]:
    """(2, 2) matrix (y, x) of a mirror of x (if ``flip``) followed by a rotation."""
    angle = np.deg2rad(angle_deg)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return rotation @ np.diag([1.0, -1.0 if flip else 1.0])


def centred_alignment(
    grid: SectionGrid, slide_extent_um: tuple[float, float], matrix: NDArray[np.float64]
) -> Alignment:
    """The alignment with this matrix that puts the section's centre on the slide's centre."""
    middle = np.asarray(grid.extent_um) / 2
    return Alignment(matrix, np.asarray(slide_extent_um) / 2 - matrix @ middle)


def principal_features(stain: StainOverview, sigma_um: float, count: int = 4) -> torch.Tensor:
    """Principal components of the stain features on tissue, and the tissue share, (h, w, count + 1)."""
    features = stain.features(sigma_um)
    tissue, flat = features[..., -1:], features[..., :-1].reshape(-1, features.shape[-1] - 1)
    chosen = flat[tissue.reshape(-1) > 0.5]
    if len(chosen) < 50:
        chosen = flat
    if len(chosen) < 50:
        raise InputError(
            f"the slide is only {len(chosen)} pixels at the scale of the measurement: nothing can be found on it",
            remedy="give the slide of this section, and check --pitch-um and --slide-mpp-um",
        )
    mean, sd = chosen.mean(0), chosen.std(0) + 1e-6
    vectors = torch.linalg.eigh(torch.cov(((chosen - mean) / sd).double().T)).eigenvectors[:, -count:]
    scores = ((flat - mean) / sd) @ vectors.float()
    # Glass is not tissue: keep its (extreme) scores from ruling the correlations.
    scores = scores.clamp(-4, 4).reshape(*tissue.shape[:2], count)
    return torch.cat([scores, tissue], dim=-1).contiguous()


def correlation_maps(
    images: NDArray[np.float64], mask: NDArray[np.bool_], features: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Summed squared masked correlations at every shift, (Hs - ny + 1, Ws - nx + 1).

    Args:
        images: (K, ny, nx) factors, scaled by the square root of their weight.
        mask: (ny, nx) measured pixels.
        features: (F, Hs, Ws) stain features on the same pitch, larger than the factors.
    """
    ny, nx = mask.shape
    shape = features.shape[1:]
    n = mask.sum()
    centred = np.where(mask, images - images[:, mask].mean(1)[:, None, None], 0.0)
    weight = (centred**2).sum((1, 2)) / n
    unit = centred / np.sqrt(np.maximum((centred**2).sum((1, 2), keepdims=True), 1e-300))

    def correlate(big: NDArray[np.complex128], small: NDArray[np.float64]) -> NDArray[np.float64]:
        full = np.fft.irfft2(big * np.conj(np.fft.rfft2(small, shape)), shape)
        return full[: shape[0] - ny + 1, : shape[1] - nx + 1]

    window = mask.astype(np.float64)
    score = np.zeros((shape[0] - ny + 1, shape[1] - nx + 1))
    for feature in features:
        spectrum = np.fft.rfft2(feature)
        mean = correlate(spectrum, window) / n
        square = correlate(np.fft.rfft2(feature**2), window) / n
        spread = n * np.maximum(square - mean**2, 1e-4)
        for image, share in zip(unit, weight, strict=True):
            score += share * correlate(spectrum, image) ** 2 / spread
    return score


def _peaks(score: NDArray[np.float64], count: int, distance: int) -> list[tuple[int, int]]:
    work, out = score.copy(), []
    for _ in range(count):
        r, c = np.unravel_index(int(work.argmax()), work.shape)
        if not np.isfinite(work[r, c]):
            break
        out.append((int(r), int(c)))
        work[max(r - distance, 0) : r + distance + 1, max(c - distance, 0) : c + distance + 1] = -np.inf
    return out


def _orientation_candidates(
    measured: MeasuredOverview,
    stain: StainOverview,
    principal: torch.Tensor,
    flip: bool,
    angle_deg: float,
    scale: float,
    shifts: int,
) -> list[tuple[float, Alignment]]:
    """Best shifts of one orientation, with their correlation scores."""
    matrix = scale * orientation(flip, angle_deg)
    pitch = np.asarray(measured.grid.pitch_um)
    extent = np.asarray(stain.extent_um)
    corners = np.array([[0, 0], [0, extent[1]], [extent[0], 0], extent]) - extent / 2
    reach = np.abs(corners @ np.linalg.inv(matrix).T).max(0)
    # The canvas holds the whole slide in the section's orientation, plus what MIN_COVER lets stick out: the margins
    # of the raster around its tissue, and a part of the tissue.
    held = np.argwhere(measured.tissue)
    first, last = held.min(0), held.max(0) + 1
    margin = np.maximum(first, np.array(measured.mask.shape) - last)
    size = np.ceil(2 * reach / pitch + 2 * (margin + (1 - MIN_COVER) * (last - first))).astype(int)
    size = np.maximum(size, np.array(measured.mask.shape) + 2)
    canvas = SectionGrid((int(size[0]), int(size[1])), measured.grid.pitch_um)
    placed = centred_alignment(canvas, stain.extent_um, matrix)
    points = torch.from_numpy(placed.map(canvas.centres_um()).reshape(-1, 2))
    coordinates = points / points.new_tensor(stain.spacing_um) - 0.5
    sampled = bilinear(principal, (0, 0), coordinates).double()
    inside = ((points >= 0) & (points <= points.new_tensor(stain.extent_um))).all(1)
    glass = principal.reshape(-1, principal.shape[-1]).double()
    bare = glass[:, -1] < 0.1
    empty = glass[bare].mean(0) if bare.any() else glass.min(0).values
    scene = torch.where(inside[:, None], sampled, empty).T.reshape(-1, *canvas.shape_px).numpy()
    scaled = measured.images * np.sqrt(measured.weight)[:, None, None]
    score = correlation_maps(scaled, measured.mask, scene)
    covered = inside.reshape(canvas.shape_px).double().numpy()[None]
    window = measured.tissue.astype(float)
    spectrum = np.fft.rfft2(covered[0]) * np.conj(np.fft.rfft2(window, canvas.shape_px))
    cover = np.fft.irfft2(spectrum, canvas.shape_px)[: score.shape[0], : score.shape[1]] / window.sum()
    score = np.where(cover >= MIN_COVER, score, -np.inf)
    out = []
    for r, c in _peaks(score, shifts, max(2, min(measured.mask.shape) // 12)):
        offset = placed.offset_um + matrix @ (np.array([r, c]) * pitch)
        out.append((float(score[r, c]), Alignment(matrix, offset)))
    return out


def search(
    measured: MeasuredOverview,
    stain: StainOverview,
    *,
    angle_step_deg: float = 10.0,
    scales: tuple[float, ...] = (1.0,),
    refined: int = 16,
    progress: Callable[[float], None] | None = None,
) -> tuple[Alignment, list[Candidate]]:
    """Find the section on the slide, unaided.

    Args:
        measured: Factor images at the measured pitch.
        stain: Slide overview.
        angle_step_deg: Step of the rotation search.
        scales: Scale factors tried (the pitches in micrometres fix the scale to a few per cent).
        refined: How many of the coarse candidates are refined and ranked.
        progress: Called with the share done.

    Returns:
        The best alignment with its evidence, and all refined candidates, best first.

    Raises:
        InputError: No placement is clearly better than the others, or than chance.
    """
    ny, nx = measured.mask.shape
    small = measured.coarsen(max(1, int(np.ceil(max(ny, nx) / 64))))
    stain = stain.coarsen(0.2 * float(np.mean(small.grid.pitch_um)))
    principal = principal_features(stain, 0.4 * float(np.mean(small.grid.pitch_um)))
    top = np.argsort(small.weight)[::-1][:6]
    leading = MeasuredOverview(small.images[top], small.mask, small.weight[top] / small.weight[top].sum(), small.grid)
    found: list[tuple[float, bool, float, Alignment]] = []
    angles = np.arange(0.0, 360.0, angle_step_deg)
    for n, angle in enumerate(angles):
        for flip in (False, True):
            for scale in scales:
                found += [
                    (score, flip, float(angle), alignment)
                    for score, alignment in _orientation_candidates(
                        leading, stain, principal, flip, float(angle), scale, 3
                    )
                ]
        if progress:
            progress(0.4 * (n + 1) / len(angles))
    if not found:
        raise InputError(
            "the slide is too small to hold 70 % of the measured tissue at this pitch and mpp",
            remedy="check --pitch-um and --slide-mpp-um, or give the slide of this section",
        )
    found.sort(key=lambda item: -item[0])
    chosen: list[tuple[float, bool, float, Alignment]] = []
    per_family: dict[tuple[bool, int], int] = {}
    for item in found:
        # Keep the field broad: at most three per flip and quadrant-eighth.
        family = (item[1], round(item[2] / 45.0) % 8)
        if per_family.get(family, 0) < 3:
            chosen.append(item)
            per_family[family] = per_family.get(family, 0) + 1
        if len(chosen) >= refined:
            break
    coarse = stain.features(0.35 * float(np.mean(small.grid.pitch_um)))
    placed = [Candidate(alignment, flip, angle, -1.0, -1.0) for _, flip, angle, alignment in chosen]
    # Successive halving: a short refinement of all, a longer one of the better half.
    for stage, keep in zip(COARSE_STAGES, (1.0, 0.5), strict=True):
        moved = []
        for candidate in placed[: max(FINALISTS, round(keep * len(placed)))]:
            better = refine(small, stain, candidate.alignment, (stage,), supersample=2)
            if slide_cover(small, stain, better) >= MIN_COVER:
                r2 = placement_r2(small, stain, better, features=coarse, fine=False)
                moved.append(Candidate(better, candidate.flip, candidate.angle_deg, r2, r2))
        placed = sorted(moved, key=lambda c: -c.r2)
        if progress:
            progress(0.6 if keep == 1.0 else 0.7)
    finalists: list[Candidate] = []
    for candidate in placed:
        if not any(_same_place(candidate.alignment, f.alignment, small.grid) for f in finalists):
            finalists.append(candidate)
    finalists = finalists[:FINALISTS]
    fine = stain.features(0.25 * float(np.mean(small.grid.pitch_um)))
    candidates = []
    for n, candidate in enumerate(finalists):
        if progress:
            progress(0.7 + 0.3 * n / len(finalists))
        better = refine(small, stain, candidate.alignment, FINAL_STAGES, supersample=3)
        r2 = placement_r2(small, stain, better, features=fine, fine=False)
        fine_r2 = placement_r2(small, stain, better, features=fine, fine=True)
        if slide_cover(small, stain, better) >= MIN_COVER:
            candidates.append(Candidate(better, candidate.flip, candidate.angle_deg, r2, fine_r2))
    if progress:
        progress(1.0)
    candidates.sort(key=lambda c: -c.fine_r2)
    return _accept(small, stain, candidates, fine), candidates


def _same_place(a: Alignment, b: Alignment, grid: SectionGrid, pixels: float = 1.0) -> bool:
    """Whether two placements agree to within some measured pixels (median over the section)."""
    points = SectionGrid((5, 5), (grid.extent_um[0] / 5, grid.extent_um[1] / 5)).centres_um()
    gap = np.linalg.norm(a.map(points) - b.map(points), axis=-1)
    return float(np.median(gap)) < pixels * max(grid.pitch_um)


def _same_basin(a: Alignment, b: Alignment, grid: SectionGrid) -> bool:
    """Whether two refined placements are versions of one: near, with the same flip and nearly the same angle."""
    (flip_a, angle_a, _), (flip_b, angle_b, _) = describe(a), describe(b)
    turn = abs((angle_a - angle_b + 180.0) % 360.0 - 180.0)
    return flip_a == flip_b and turn < 12.0 and _same_place(a, b, grid, 3.0)


def null_placements(grid: SectionGrid, best: Alignment, count: int, seed: int = 0) -> list[Alignment]:
    """Placements that must be wrong: the best one mirrored, turned and shifted about the section's centre."""
    rng = np.random.default_rng(seed)
    centre = np.asarray(grid.extent_um) / 2
    target = best.map(centre[None])[0]
    out = []
    for _ in range(count):
        turn = orientation(bool(rng.integers(2)), float(rng.uniform(30, 330)))
        matrix = best.matrix @ turn
        shift = rng.uniform(-0.2, 0.2, 2) * np.asarray(grid.extent_um)
        out.append(Alignment(matrix, target + best.matrix @ shift - matrix @ centre))
    return out


def _accept(
    measured: MeasuredOverview, stain: StainOverview, candidates: list[Candidate], features: torch.Tensor
) -> Alignment:
    if not candidates:
        raise InputError("no placement of the section on the slide covers 70 % of the measured tissue", remedy=REMEDY)
    best = candidates[0]
    others = [c for c in candidates[1:] if not _same_basin(c.alignment, best.alignment, measured.grid)]
    runner_up = max((c.fine_r2 for c in others), default=-1.0)
    nulls = np.array(
        [
            placement_r2(measured, stain, a, features=features, fine=True)
            for a in null_placements(measured.grid, best.alignment, 20)
        ]
    )
    bar = float(nulls.mean() + 3 * nulls.std())
    flip, rotation_deg, scale = describe(best.alignment)
    evidence = {
        "source": "search",
        "flip": flip,
        "rotation_deg": rotation_deg,
        "scale": scale,
        "held_out_r2": best.fine_r2,
        "held_out_r2_with_trend": best.r2,
        "runner_up_r2": runner_up,
        "null_r2": bar,
    }
    stretch = float(abs(np.log(np.linalg.svd(best.alignment.matrix, compute_uv=False))).max())
    if stretch > MAX_STRETCH:
        raise InputError(
            "the stain does not show where the section lies: the best placement stretches it by "
            f"{100 * np.expm1(stretch):.0f} %, against the stated sizes",
            remedy=f"check --pitch-um and --slide-mpp-um, or {REMEDY}",
        )
    if best.fine_r2 < runner_up + MARGIN or best.fine_r2 < bar or best.fine_r2 < LEAST_R2:
        raise InputError(
            f"the stain does not show where the section lies: the best placement predicts the ions' structure with a "
            f"held-out R2 of {best.fine_r2:.2f}, the next {runner_up:.2f}, wrong ones up to {bar:.2f}",
            remedy=REMEDY,
        )
    return best.alignment.with_evidence(**evidence)


def describe(alignment: Alignment) -> tuple[bool, float, float]:
    """Mirrored or not, rotation in degrees (-180..180) and mean scale of the affine part."""
    matrix = alignment.matrix
    flip = bool(np.linalg.det(matrix) < 0)
    turned = matrix @ np.diag([1.0, -1.0 if flip else 1.0])
    rotation = float(np.rad2deg(np.arctan2(turned[1, 0] - turned[0, 1], turned[0, 0] + turned[1, 1])))
    return flip, round(rotation, 2), round(float(np.sqrt(abs(np.linalg.det(matrix)))), 4)
