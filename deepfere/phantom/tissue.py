"""How the invented organ looks: tubules, nuclei and the amount of either stain at a point."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from deepfere.phantom.anatomy import (
    BLOOD,
    GLOMERULUS,
    INFILTRATE,
    INNER,
    NONE,
    OUTER,
    STROMA,
    Anatomy,
    Organ,
)
from deepfere.phantom.noise import (
    Floats,
    Hashes,
    cells,
    fractal_noise,
    gradient_noise,
    hash_lattice,
    ramp,
    salt_of,
    uniform,
)

#                      none cortex twin  outer inner stroma glom. infil. blood
_EOSIN = np.array([0.00, 0.40, 0.40, 0.32, 0.24, 0.33, 0.32, 0.19, 0.72], np.float32)
_HAEMATOXYLIN = np.array([0.00, 0.09, 0.09, 0.10, 0.08, 0.035, 0.09, 0.17, 0.03], np.float32)
_LUMEN_UM = np.array([0.0, 5.2, 5.2, 3.6, 4.4, 0.0, 0.0, 0.0, 0.0], np.float32)
#: Chance that a candidate site becomes a nucleus, where the structure allows one.
_NUCLEI = np.array([0.0, 0.62, 0.62, 0.66, 0.46, 0.16, 0.62, 0.93, 0.0], np.float32)

_NUCLEUS_CELL_UM = 7.4
_TUBULE_UM = 42.0
_DUCT_UM = 27.0
_DUCT_STRETCH = 5.0


@dataclass(frozen=True)
class Nuclei:
    """Nuclei as ellipses, one per row.

    Attributes:
        centres_um: (N, 2) float64 section positions (y, x).
        axes_um: (N, 2) float32 semi-axes (long, short).
        angle: (N,) float32 direction of the long axis, radians from x towards y.
        darkness: (N,) float32 haematoxylin inside.
        name: (N,) uint32, for the texture.
    """

    centres_um: NDArray[np.float64]
    axes_um: Floats
    angle: Floats
    darkness: Floats
    name: Hashes


@dataclass(frozen=True)
class Tubules:
    """Where points lie in the tubule or duct that holds them.

    Attributes:
        wall_um: Distance from the boundary with the next tubule.
        core_um: Distance from the tubule's centre line.
        name: Names the tubule.
    """

    wall_um: Floats
    core_um: Floats
    name: Hashes


class Tissue:
    """One section's look.

    Args:
        organ: Its anatomy.
    """

    def __init__(self, organ: Organ) -> None:
        self.organ = organ
        self.seed = organ.seed

    def _salt(self, name: str) -> int:
        return salt_of(self.seed, name)

    def tubules(self, y: NDArray[np.floating], x: NDArray[np.floating], anatomy: Anatomy) -> Tubules:
        """Tubules (cortex) and ducts (medulla) at points."""
        wobble = np.float32(5) * gradient_noise(y, x, 28.0, self._salt("tubule-wobble"), nodes_per_cell=10)
        drift = np.float32(16) * gradient_noise(y, x, 95.0, self._salt("tubule-drift"), nodes_per_cell=10)
        medulla = (anatomy.label == OUTER) | (anatomy.label == INNER)
        size = np.where(medulla, np.float32(_DUCT_UM), np.float32(_TUBULE_UM))
        v = np.where(medulla, anatomy.duct_v / _DUCT_STRETCH, y + wobble + drift) / size
        u = np.where(medulla, anatomy.duct_u + 0.4 * wobble + 0.2 * drift, x + wobble - drift) / size
        first, second, name = cells(v, u, self._salt("tubule"))
        return Tubules(0.5 * (second - first) * size, first * size, name)

    def lumen_um(self, y: NDArray[np.floating], x: NDArray[np.floating], anatomy: Anatomy, t: Tubules) -> Floats:
        """Radius of the lumen of the tubule that holds each point."""
        ragged = 1 + 0.22 * gradient_noise(y, x, 7.0, self._salt("lumen"), nodes_per_cell=6)
        return _LUMEN_UM[anatomy.label] * (0.35 + 1.3 * uniform(t.name, 1)) * ragged

    def stain(self, y: NDArray[np.floating], x: NDArray[np.floating], detail_um: float = 0.5) -> tuple[Floats, Floats]:
        """Haematoxylin and eosin (relative amounts) at section points, nuclei not included.

        Args:
            y: Section positions, micrometres.
            x: Section positions, same shape.
            detail_um: Texture finer than this is left out.
        """
        anatomy = self.organ.at(y, x)
        label = anatomy.label
        grain = gradient_noise(y, x, max(1.7, 2 * detail_um), self._salt("grain"), nodes_per_cell=6)
        mottle = fractal_noise(y, x, 14.0, self._salt("mottle"))
        patch = fractal_noise(y, x, 160.0, self._salt("patch"))
        eosin = _EOSIN[label] * (1 + 0.10 * grain + 0.09 * mottle + 0.06 * patch)
        haematoxylin = _HAEMATOXYLIN[label] * (1 + 0.2 * grain + 0.25 * mottle)

        # Tubules: a cell of the lattice with a wall of epithelium, a lumen and a thin gap around it.
        tubular = _LUMEN_UM[label] > 0
        t = self.tubules(y, x, anatomy)
        kind = uniform(t.name, 2)
        lumen = 1 - ramp(t.core_um - self.lumen_um(y, x, anatomy, t), -0.9, 1.1)
        gap = 1 - ramp(t.wall_um + 0.35 * grain, 0.3, 1.7)
        body = eosin * (0.80 + 0.34 * kind) * (1 + 0.14 * ramp(t.wall_um, 1.0, 8.0))
        body = body * (1 - 0.80 * gap) + 0.05 * gap
        body = body * (1 - 0.93 * lumen)
        eosin = np.where(tubular, body, eosin)
        haematoxylin = np.where(tubular, haematoxylin * (1 - 0.7 * gap) * (1 - 0.95 * lumen), haematoxylin)

        for which, texture in ((STROMA, self._stroma), (GLOMERULUS, self._glomeruli)):
            here = label == which
            if here.any():
                part = Anatomy(*(getattr(anatomy, f.name)[here] for f in fields(Anatomy)))
                of_eosin, of_haematoxylin = texture(y[here], x[here], part)
                eosin[here] *= of_eosin
                haematoxylin[here] *= of_haematoxylin
        blood = label == BLOOD
        if blood.any():
            # Red cells: discs packed loosely.
            clump = ramp(fractal_noise(y[blood], x[blood], 6.5, self._salt("red-cells")), -1.1, -0.3)
            eosin[blood] *= 0.25 + 0.75 * clump
        cover = self.organ.coverage(anatomy)
        # The outer edge of a section stains a little more deeply.
        rim = 1 + 0.25 * (1 - ramp(anatomy.depth_um, 2.0, 14.0))
        cover = np.where(label == NONE, np.float32(0), cover)
        return haematoxylin * cover, eosin * cover * rim

    def _stroma(self, y: NDArray[np.floating], x: NDArray[np.floating], a: Anatomy) -> tuple[Floats, Floats]:
        """Relative eosin and haematoxylin: wavy fibres with clefts; around vessels the fibres run round."""
        ring = a.wall_um < 40
        across = np.where(ring, a.wall_um, a.duct_u) + 7 * gradient_noise(y, x, 38.0, self._salt("wave"))
        along = np.where(ring, y + x, a.duct_v)
        fibre = gradient_noise(along / 9.0, across, 3.4, self._salt("fibre"))
        bundle = gradient_noise(along / 6.0, across, 11.0, self._salt("bundle"))
        cleft: Floats = np.where(ring, np.float32(1), ramp(bundle + 0.5 * fibre, -1.9, -1.0)).astype(np.float32)
        weave: Floats = (1 + 0.22 * fibre + 0.18 * bundle) * (0.12 + 0.88 * cleft)
        return weave, cleft

    def _glomeruli(self, y: NDArray[np.floating], x: NDArray[np.floating], a: Anatomy) -> tuple[Floats, Floats]:
        """Relative eosin and haematoxylin: a lobed tuft with open capillaries, a clear space, a capsule."""
        from_edge = (1 - a.glomerulus) * a.glomerulus_radius_um
        lobes = 3.2 * gradient_noise(y, x, 15.0, self._salt("lobes"))
        tuft = ramp(from_edge + lobes, 6.5, 8.0)
        capillary = ramp(gradient_noise(y, x, 6.0, self._salt("capillary")), 0.75, 1.25)
        capsule = 1 - ramp(np.abs(from_edge - 1.2), 0.6, 1.5)
        solid = tuft * (1 - 0.85 * capillary)
        return solid + 0.85 * capsule, solid

    def nuclei(self, low_um: tuple[float, float], high_um: tuple[float, float]) -> Nuclei:
        """All nuclei whose lattice site lies in a box of the section (micrometres), in lattice order."""
        cell = _NUCLEUS_CELL_UM
        rows = np.arange(int(np.floor(low_um[0] / cell)), int(np.ceil(high_um[0] / cell)) + 1)
        cols = np.arange(int(np.floor(low_um[1] / cell)), int(np.ceil(high_um[1] / cell)) + 1)
        row, col = (grid.ravel() for grid in np.meshgrid(rows, cols, indexing="ij"))
        name = hash_lattice(row, col, self._salt("nuclei"))
        y = (row + 0.5 + 0.66 * (uniform(name, 1).astype(np.float64) - 0.5)) * cell
        x = (col + 0.5 + 0.66 * (uniform(name, 2).astype(np.float64) - 0.5)) * cell
        a = self.organ.at(y, x)
        t = self.tubules(y, x, a)
        label = a.label
        chance = _NUCLEI[label] * (1 + 0.18 * gradient_noise(y, x, 110.0, self._salt("crowding")))
        # Nuclei sit in the outer part of the epithelium, never in a lumen; the tuft is full of them.
        tubular = _LUMEN_UM[label] > 0
        seat = ramp(t.wall_um, 0.5, 2.0) * (1 - ramp(t.wall_um, 8.0, 11.0))
        seat = seat * ramp(t.core_um - self.lumen_um(y, x, a, t), 1.5, 3.5)
        chance = np.where(tubular, chance * np.minimum(1, 1.35 * seat + 0.02), chance)
        tuft = (1 - a.glomerulus) * a.glomerulus_radius_um > 7.0
        chance = np.where((label == GLOMERULUS) & ~tuft, np.float32(0), chance)
        chance = np.where((a.depth_um < 4.5) | (a.pelvis_um < 4.5), np.float32(0), chance)
        keep = uniform(name, 3) < chance
        name, y, x, label = name[keep], y[keep], x[keep], label[keep]

        spread = 0.86 + 0.28 * uniform(name, 4)
        spindle = (label == STROMA) | ((label == INNER) & (uniform(name, 5) < 0.35))
        long = np.where(spindle, np.float32(4.6), np.float32(3.05)) * spread
        short = np.where(spindle, np.float32(1.35), 2.55 * (0.85 + 0.3 * uniform(name, 6))) * spread
        small = np.where((label == INFILTRATE) | (label == GLOMERULUS), np.float32(0.88), np.float32(1))
        angle = np.float32(2 * np.pi) * uniform(name, 7)
        angle = np.where(spindle, self._fibre_angle(y, x) + 0.35 * (uniform(name, 7) - 0.5), angle)
        darkness = (0.58 + 0.42 * uniform(name, 8)) * np.where(label == INFILTRATE, 1.22, 1.0)
        return Nuclei(
            np.stack([y, x], axis=-1),
            np.stack([long * small, np.minimum(short, long) * small], axis=-1).astype(np.float32),
            angle.astype(np.float32),
            darkness.astype(np.float32),
            name,
        )

    def _fibre_angle(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Direction of the ducts and fibres at points, radians from x towards y."""
        focus_y, focus_x = self.organ.focus_um
        return np.arctan2(y - focus_y, x - focus_x)
