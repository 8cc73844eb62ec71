"""Coarse search: every flip and rotation, every shift, ranked by how well the stain predicts the ions.

1. For each flip and angle the slide's principal stain features are resampled at the (coarsened)
   measured pitch; masked normalised correlations with the leading factors at *all* shifts come from
   FFTs (Padfield, IEEE Trans. Image Process. 21, 2706, 2012). Their summed squares approximate R2. Once on the images
   as they are, and once on their *fine* structure (minus the 3 x 3 mean): in a small section trends are alike
   at many places, and the right one may not be among the best of them.
2. The best shifts of every orientation are refined (affine, variable projection); distinct placements are
   ranked by R2 of the fine structure on blocks left out of the regression.
3. The best is accepted only if it beats every other placement by a margin, and a null distribution of
   wrong placements; otherwise landmarks are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.alignment.accept import accept
from deepfere.alignment.looks import high_pass
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.placement import Candidate, centred_alignment, orientation, same_place
from deepfere.alignment.refine import Stage, refine_each
from deepfere.alignment.score import placement_r2, slide_cover
from deepfere.cores import side_by_side
from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.registration import bilinear

COARSE_STAGES = (Stage(0.8, False, 30, 0.25), Stage(0.4, False, 25, 0.10))
FINE_STAGES = (Stage(0.5, True, 30, 0.25), Stage(0.35, True, 25, 0.10))
FINAL_STAGES = (Stage(0.35, False, 20, 0.08), Stage(0.25, True, 35, 0.04))

FINALISTS = 6
"""Distinct placements that are refined to the end and compared."""

MIN_COVER = 0.7
"""Share of the measured tissue that the slide must cover."""


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
    fine: bool,
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
    if fine:
        scene, scaled = (high_pass(torch.from_numpy(images)).numpy() for images in (scene, scaled))
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


def _all_placements(
    measured: MeasuredOverview,
    stain: StainOverview,
    principal: torch.Tensor,
    angle_step_deg: float,
    scales: tuple[float, ...],
    fine: bool,
) -> list[Candidate]:
    """The best shifts of every orientation, the best correlated first."""
    ways = list(product(np.arange(0.0, 360.0, angle_step_deg).tolist(), (False, True), scales))

    def one(way: tuple[float, bool, float]) -> list[tuple[float, Candidate]]:
        angle, flip, scale = way
        shifts = _orientation_candidates(measured, stain, principal, flip, angle, scale, 3, fine)
        return [(score, Candidate(alignment, flip, angle, -1.0, -1.0)) for score, alignment in shifts]

    found = [each for some in side_by_side(one, ways) for each in some]
    return [candidate for _, candidate in sorted(found, key=lambda item: -item[0])]


def _broad(found: list[Candidate], count: int) -> list[Candidate]:
    """The first ``count``, at most three per flip and eighth of a turn: the field stays broad."""
    chosen: list[Candidate] = []
    per_family: dict[tuple[bool, int], int] = {}
    for item in found:
        family = (item.flip, round(item.angle_deg / 45.0) % 8)
        if per_family.get(family, 0) < 3:
            chosen.append(item)
            per_family[family] = per_family.get(family, 0) + 1
        if len(chosen) >= count:
            break
    return chosen


def _halved(
    measured: MeasuredOverview,
    stain: StainOverview,
    placed: list[Candidate],
    fine: bool,
) -> list[Candidate]:
    """Successive halving: a short refinement of all, a longer one of the better half; the best first."""
    features = stain.features(0.35 * float(np.mean(measured.grid.pitch_um)))
    for stage, keep in zip(FINE_STAGES if fine else COARSE_STAGES, (1.0, 0.5), strict=True):
        moved, chosen = [], placed[: max(FINALISTS, round(keep * len(placed)))]
        starts = [candidate.alignment for candidate in chosen]
        for candidate, better in zip(chosen, refine_each(measured, stain, starts, (stage,), 2), strict=True):
            if slide_cover(measured, stain, better) >= MIN_COVER:
                r2 = placement_r2(measured, stain, better, features=features, fine=fine)
                moved.append(Candidate(better, candidate.flip, candidate.angle_deg, r2, r2))
        placed = sorted(moved, key=lambda c: -c.r2)
    return placed


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
        refined: How many candidates of either kind (as they are, and fine structure) are refined and ranked.
        progress: Called with the share done.

    Returns:
        The best alignment with its evidence, and all refined candidates, best first.

    Raises:
        InputError: No placement is clearly better than the others, or than chance.
    """
    ny, nx = measured.mask.shape
    # A narrow section keeps at least eight pixels across.
    small = measured.coarsen(max(1, min(int(np.ceil(max(ny, nx) / 64)), min(ny, nx) // 8)))
    stain = stain.coarsen(0.2 * float(np.mean(small.grid.pitch_um)))
    principal = principal_features(stain, 0.4 * float(np.mean(small.grid.pitch_um)))
    top = np.argsort(small.weight)[::-1][:6]
    leading = MeasuredOverview(small.images[top], small.mask, small.weight[top] / small.weight[top].sum(), small.grid)
    tell = progress or (lambda share: None)
    finalists: list[Candidate] = []
    for fine, begun in ((False, 0.0), (True, 0.35)):
        found = _all_placements(leading, stain, principal, angle_step_deg, scales, fine)
        if not found:
            raise InputError(
                "the slide is too small to hold 70 % of the measured tissue at this pitch and mpp",
                remedy="check --pitch-um and --slide-mpp-um, or give the slide of this section",
            )
        tell(begun + 0.15)
        placed = _halved(small, stain, _broad(found, refined), fine)
        tell(begun + 0.35)
        chosen = [c for c in placed if not any(same_place(c.alignment, f.alignment, small.grid) for f in finalists)]
        finalists += chosen[:FINALISTS]
    sharp = stain.features(0.25 * float(np.mean(small.grid.pitch_um)))
    candidates, starts = [], [candidate.alignment for candidate in finalists]
    ends = refine_each(small, stain, starts, FINAL_STAGES, 3, progress=lambda share: tell(0.7 + 0.3 * share))
    for candidate, better in zip(finalists, ends, strict=True):
        r2 = placement_r2(small, stain, better, features=sharp, fine=False)
        fine_r2 = placement_r2(small, stain, better, features=sharp, fine=True)
        if slide_cover(small, stain, better) >= MIN_COVER:
            candidates.append(Candidate(better, candidate.flip, candidate.angle_deg, r2, fine_r2))
    candidates.sort(key=lambda c: -c.fine_r2)
    return accept(small, stain, candidates, sharp), candidates
