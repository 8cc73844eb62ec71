"""Placements of a section on a slide: how they are made, worded and compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.frame import Alignment, SectionGrid


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


def describe(alignment: Alignment) -> tuple[bool, float, float]:
    """Mirrored or not, rotation in degrees (-180..180) and mean scale of the affine part."""
    matrix = alignment.matrix
    flip = bool(np.linalg.det(matrix) < 0)
    turned = matrix @ np.diag([1.0, -1.0 if flip else 1.0])
    rotation = float(np.rad2deg(np.arctan2(turned[1, 0] - turned[0, 1], turned[0, 0] + turned[1, 1])))
    return flip, round(rotation, 2), round(float(np.sqrt(abs(np.linalg.det(matrix)))), 4)


def same_place(a: Alignment, b: Alignment, grid: SectionGrid, pixels: float = 1.0) -> bool:
    """Whether two placements agree to within some measured pixels (median over the section)."""
    points = SectionGrid((5, 5), (grid.extent_um[0] / 5, grid.extent_um[1] / 5)).centres_um()
    gap = np.linalg.norm(a.map(points) - b.map(points), axis=-1)
    return float(np.median(gap)) < pixels * max(grid.pitch_um)


def same_basin(a: Alignment, b: Alignment, grid: SectionGrid) -> bool:
    """Whether two refined placements are versions of one: near, with the same flip and nearly the same angle."""
    (flip_a, angle_a, _), (flip_b, angle_b, _) = describe(a), describe(b)
    turn = abs((angle_a - angle_b + 180.0) % 360.0 - 180.0)
    return flip_a == flip_b and turn < 12.0 and same_place(a, b, grid, 3.0)


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
