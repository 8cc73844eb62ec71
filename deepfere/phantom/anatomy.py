"""The invented organ: which tissue lies at a point of the section, in micrometres.

A kidney-like slice: a bean outline with a hilum, cortex with glomeruli, two zones of medulla whose
ducts converge on the hilum, a pelvis, vessels, and one dense infiltrate. A sector of the cortex is a
class of its own that looks exactly like the rest. Everything is a pure function of position and seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.frame import SectionGrid
from deepfere.phantom.noise import (
    Floats,
    fractal_noise,
    gradient_noise,
    hash_lattice,
    ramp,
    salt_of,
    uniform,
)

#: Names of the label values; 0 is no tissue (outside, pelvis, empty vessels).
CLASSES = (
    "none",
    "cortex",
    "cortex_twin",
    "outer_medulla",
    "inner_medulla",
    "stroma",
    "glomerulus",
    "infiltrate",
    "blood",
)
NONE, CORTEX, TWIN, OUTER, INNER, STROMA, GLOMERULUS, INFILTRATE, BLOOD = range(9)

_GLOMERULUS_CELL_UM = 165.0
_VESSEL_CELL_UM = 330.0
_FOCUS = 1.75  # from the organ's centre towards the hilum, in unit coordinates


@dataclass(frozen=True)
class Anatomy:
    """What lies at some points; every array has the points' shape.

    Attributes:
        label: Index into `CLASSES`, int8.
        depth_um: Distance from the outline, positive inside (approximate).
        glomerulus: Distance from the nearest glomerulus' centre over its radius (large: none).
        glomerulus_radius_um: That glomerulus' radius.
        wall_um: Distance from the nearest vessel's lumen (negative inside; large: none).
        pelvis_um: Distance from the pelvis (negative inside).
        duct_v: Coordinate along the medulla's ducts, micrometres.
        duct_u: Coordinate across them, micrometres.
    """

    label: NDArray[np.int8]
    depth_um: Floats
    glomerulus: Floats
    glomerulus_radius_um: Floats
    wall_um: Floats
    pelvis_um: Floats
    duct_v: Floats
    duct_u: Floats


class Organ:
    """The anatomy of one section.

    Args:
        extent_um: Outer size (y, x) of the measured raster; the organ fills it but for a margin.
        margin_um: That margin.
        seed: Names the organ.
    """

    def __init__(self, extent_um: tuple[float, float], margin_um: float, seed: int) -> None:
        self.extent_um = extent_um
        self.seed = seed
        rng = np.random.default_rng([seed, 2])
        hilum = rng.uniform(0, 2 * np.pi)
        self._hilum = (float(np.sin(hilum)), float(np.cos(hilum)))
        self._twin = float(rng.uniform(0.7, 1.0) * rng.choice([-1, 1])), float(rng.uniform(1.2, 1.5))
        infiltrate = np.pi + rng.uniform(-1.1, 1.1)
        self._infiltrate = 0.66 * float(np.cos(infiltrate)), 0.66 * float(np.sin(infiltrate))
        self._lopsided = float(rng.uniform(0, 2 * np.pi))
        self._fit(margin_um)

    def _salt(self, name: str) -> int:
        return salt_of(self.seed, name)

    def _fit(self, margin_um: float) -> None:
        """Place the unit organ so that its bounding box leaves exactly the margin on every side."""
        grid = SectionGrid((240, 240), (3.2 / 240, 3.2 / 240)).centres_um() - 1.6
        v, u = self._warp(grid[..., 0], grid[..., 1])
        rows, cols = np.nonzero(self._outline(v, u) > 0)
        low = np.array([grid[rows.min(), 0, 0], grid[0, cols.min(), 1]])
        high = np.array([grid[rows.max(), 0, 0], grid[0, cols.max(), 1]])
        extent = np.asarray(self.extent_um)
        self._size = (extent - 2 * margin_um) / (high - low)
        self._centre = extent / 2 - self._size * (high + low) / 2
        self._unit_um = float(self._size.min())
        #: Where the ducts of the medulla would meet, micrometres (y, x).
        self.focus_um = tuple(float(c) for c in self._centre + _FOCUS * self._size * self._hilum)

    def _warp(self, v: NDArray[np.floating], u: NDArray[np.floating]) -> tuple[Floats, Floats]:
        """Displace unit coordinates smoothly: no boundary is a circle or a straight line."""
        warped = []
        for axis, base in (("v", v), ("u", u)):
            slow = gradient_noise(v, u, 0.75, self._salt(f"warp-slow-{axis}"))
            quick = gradient_noise(v, u, 0.21, self._salt(f"warp-quick-{axis}"))
            warped.append((base + 0.05 * slow + 0.014 * quick).astype(np.float32))
        return warped[0], warped[1]

    def _polar(self, v: Floats, u: Floats) -> tuple[Floats, Floats]:
        """Unit coordinates along and across the direction of the hilum."""
        hy, hx = np.float32(self._hilum[0]), np.float32(self._hilum[1])
        return v * hy + u * hx, u * hy - v * hx

    def _outline(self, v: Floats, u: Floats) -> Floats:
        """Distance from the outline in unit coordinates, positive inside."""
        along, across = self._polar(v, u)
        angle = np.arctan2(across, along)
        radius = 0.93 + 0.05 * np.cos(angle - self._lopsided) - 0.27 * np.exp(-((angle / 0.42) ** 2))
        return (radius - np.hypot(along, across * 1.12)).astype(np.float32)

    def depth_um(self, y: NDArray[np.floating], x: NDArray[np.floating]) -> Floats:
        """Distance from the outline, positive inside, at section points (micrometres; any shape)."""
        return self._zones(y, x)[1]

    def at(self, y: NDArray[np.floating], x: NDArray[np.floating]) -> Anatomy:
        """Anatomy at section points (micrometres; any shape)."""
        zones = self._zones(y, x)
        label, depth_um, pelvis_um, duct_v, duct_u = zones
        bend_y = 10 * gradient_noise(y, x, 85.0, self._salt("disc-y"))
        bend_x = 10 * gradient_noise(y, x, 85.0, self._salt("disc-x"))
        distance, radius, _ = self._discs(y + bend_y, x + bend_x, _GLOMERULUS_CELL_UM, "glomerulus")
        glomerulus = distance / radius
        cortex = (label == CORTEX) | (label == TWIN)
        label = np.where((glomerulus < 1) & cortex, np.int8(GLOMERULUS), label)
        glomerulus = np.where(label == GLOMERULUS, glomerulus, np.float32(9))

        distance, vessel, filled = self._discs(y + bend_y, x + bend_x, _VESSEL_CELL_UM, "vessel")
        wall_um = np.where(depth_um > 15, distance - vessel, np.float32(1e6))
        tissue = label != NONE
        label = np.where((wall_um < 0.28 * vessel) & tissue, np.int8(STROMA), label)
        # Blood settles: part of the vessels are partly filled.
        level = wall_um + 4 * gradient_noise(y, x, 30.0, self._salt("blood"), nodes_per_cell=8)
        inside = np.where(filled & (level < -2.0), np.int8(BLOOD), np.int8(NONE))
        label = np.where((wall_um < 0) & tissue, inside, label)
        return Anatomy(label, depth_um, glomerulus, radius, wall_um, pelvis_um, duct_v, duct_u)

    def _zones(
        self, y: NDArray[np.floating], x: NDArray[np.floating]
    ) -> tuple[NDArray[np.int8], Floats, Floats, Floats, Floats]:
        """Label without glomeruli and vessels, depth, distance from the pelvis, duct coordinates."""
        v, u = self._warp((y - self._centre[0]) / self._size[0], (x - self._centre[1]) / self._size[1])
        unit = np.float32(self._unit_um)
        outline = self._outline(v, u)
        depth_um = outline * unit + 3 * gradient_noise(y, x, 22.0, self._salt("ragged"), nodes_per_cell=10)
        along, across = self._polar(v, u)

        # Ducts converge on a point beyond the hilum; rays of medulla reach into the cortex along them.
        reach = np.hypot(_FOCUS - along, across)
        fan = np.arctan2(across, _FOCUS - along)
        rays = gradient_noise(reach * 0.7, fan, 0.075, self._salt("rays"))
        inward = along - np.float32(0.12)
        core = np.hypot(inward, across)
        bearing = np.abs(np.arctan2(across, inward)) + 0.1 * gradient_noise(v, u, 0.15, self._salt("hilum"))
        rim = gradient_noise(v, u, 0.09, self._salt("rim"))

        label = np.where(outline < 0.30 + 0.022 * rays, np.int8(CORTEX), np.int8(OUTER))
        angle = np.arctan2(across, along) * np.float32(np.sign(self._twin[0]))
        start = abs(self._twin[0]) + 0.12 * gradient_noise(v, u, 0.2, self._salt("twin"))
        twin = (label == CORTEX) & (angle > start) & (angle < start + self._twin[1])
        label = np.where(twin, np.int8(TWIN), label)
        label = np.where(core < 0.33 + 0.012 * rim, np.int8(INNER), label)
        label = np.where((core > 0.36) & (bearing < 0.55) & (along > 0), np.int8(STROMA), label)
        spot = np.hypot(along - self._infiltrate[0], across - self._infiltrate[1])
        spot = spot + 0.025 * fractal_noise(v, u, 0.13, self._salt("infiltrate"), octaves=3)
        label = np.where(spot < 0.17, np.int8(INFILTRATE), label)
        label = np.where(depth_um < np.minimum(9.0, 0.03 * unit), np.int8(STROMA), label)

        # A crescent around the papilla, open towards the hilum, thinner towards its horns.
        width = 0.045 * np.cos(np.clip(bearing / 1.35, 0, np.pi / 2)) + 0.004 * rim
        pelvis_um = np.where(inward > -0.2, (np.abs(core - 0.372) - width) * unit, np.float32(1e6))
        pelvis_um = pelvis_um.astype(np.float32)
        label = np.where((pelvis_um < 0) | (depth_um < 0), np.int8(NONE), label)
        ducts = np.float32(_FOCUS * self._unit_um)
        return label, depth_um, pelvis_um, reach * unit, fan * ducts

    def _discs(
        self, y: NDArray[np.floating], x: NDArray[np.floating], cell_um: float, name: str
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Distance from the disc of each point's lattice cell, its radius, and whether it is "filled".

        A disc lies wholly inside its own cell, so that a point need look at one cell only.
        """
        # Turned and sheared by slow noise, so that no lattice shows.
        turned_y, turned_x = 0.883 * y + 0.469 * x, 0.883 * x - 0.469 * y
        row, col = (
            np.floor(turned_y / cell_um).astype(np.int64),
            np.floor(turned_x / cell_um).astype(np.int64),
        )
        origin = int(row.min()), int(col.min())
        rows = np.arange(origin[0], int(row.max()) + 1)[:, None]
        cols = np.arange(origin[1], int(col.max()) + 1)[None]
        rows, cols = np.broadcast_arrays(rows, cols)
        names = hash_lattice(rows, cols, self._salt(name))
        grow = uniform(names, 1)
        if name == "glomerulus":
            radius = 30 + 16 * grow
        else:
            radius = 14 + 46 * grow**2
        room = 0.5 * cell_um - 1.3 * radius - 10
        centre_y = (rows + 0.5) * cell_um + (2 * uniform(names, 2) - 1) * room
        centre_x = (cols + 0.5) * cell_um + (2 * uniform(names, 3) - 1) * room
        there = 0.883 * centre_y - 0.469 * centre_x, 0.883 * centre_x + 0.469 * centre_y
        zone = self._zones(*there)[0]
        if name == "glomerulus":
            present = ((zone == CORTEX) | (zone == TWIN)) & (uniform(names, 4) < 0.75)
        else:
            odds = np.array([0, 0.15, 0.15, 0.35, 0.1, 0.9, 0, 0.1, 0], np.float32)
            present = uniform(names, 4) < odds[zone]
        radius = radius.astype(np.float32)
        filled = uniform(names, 5) < 0.45
        at = row - origin[0], col - origin[1]
        distance = np.hypot(turned_y - centre_y[at], turned_x - centre_x[at]).astype(np.float32)
        return np.where(present[at], distance, np.float32(1e6)), radius[at], filled[at]

    def coverage(self, anatomy: Anatomy, edge_um: float = 1.0) -> Floats:
        """Part of tissue at each point, smooth over `edge_um` at the outline, the pelvis and vessels."""
        inside = ramp(anatomy.depth_um, 0.0, edge_um) * ramp(anatomy.pelvis_um, 0.0, edge_um)
        lumen = (anatomy.wall_um < 0) & (anatomy.label != BLOOD)
        return np.where(lumen, np.float32(0), inside)
