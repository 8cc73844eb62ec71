"""The invented ions: what each pixel of the high-resolution truth holds, before any noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from deepfere.frame import SectionGrid
from deepfere.phantom.anatomy import CLASSES, CORTEX, NONE, TWIN
from deepfere.phantom.noise import Floats, fractal_noise, gradient_noise, salt_of
from deepfere.phantom.spec import KINDS, PhantomSpec
from deepfere.phantom.tissue import Tissue

_SUPERSAMPLE = 3  # points per side of a high-resolution pixel that its class fractions are averaged over
_SMEAR_UM = 12.0  # nuclear ions spread this far from their nuclei
_FULL_DENSITY = 0.38  # nuclear area fraction that counts as an ion's full scale
_MZ_RANGE = (400.0, 1000.0)


@dataclass(frozen=True)
class Ion:
    """One ion of the phantom.

    Attributes:
        mz: Its m/z.
        kind: One of `KINDS`.
        amplitude: Intensity at full scale.
        levels: Level per class of `CLASSES` (kinds "class" and "mixed"), 0 to 1.
        base: Level without its cause, 0 to 1.
        steepness: Exponent of the nuclear density.
        phase: Two angles that direct a smooth gradient.
        spots_um: (N, 2) centres of hot spots, section micrometres.
        spot_sigma_um: (N,) their sizes (standard deviation).
        salt: Names its within-class variation.
    """

    mz: float
    kind: str
    amplitude: float
    levels: Floats
    base: float
    steepness: float
    phase: tuple[float, float]
    spots_um: NDArray[np.float64]
    spot_sigma_um: NDArray[np.float64]
    salt: int

    @property
    def informed(self) -> bool:
        """Whether the stain explains it."""
        return KINDS[self.kind]


@dataclass(frozen=True)
class Window:
    """What every ion of a window of high-resolution pixels is made from; arrays are (h, w).

    Attributes:
        y: Section position of the pixels' centres, micrometres.
        x: Section position of the pixels' centres, micrometres.
        fractions: (classes, h, w) part of each pixel that each class covers.
        density: Nuclear area fraction, spread and relative to full scale, 0 to 1.
        labels: Class at the centre, int8.
    """

    y: NDArray[np.float64]
    x: NDArray[np.float64]
    fractions: Floats
    density: Floats
    labels: NDArray[np.int8]


def window_of(tissue: Tissue, grid: SectionGrid, origin_px: tuple[int, int], shape_px: tuple[int, int]) -> Window:
    """Evaluate the tissue on a window of the high-resolution grid.

    Args:
        tissue: The tissue.
        grid: The high-resolution grid.
        origin_px: First row and column of the window.
        shape_px: Rows and columns of the window.
    """
    s = _SUPERSAMPLE
    fine = grid.refine(s)
    points = fine.centres_um((origin_px[0] * s, origin_px[1] * s), (shape_px[0] * s, shape_px[1] * s))
    label = tissue.organ.at(points[..., 0], points[..., 1]).label
    blocks = label.reshape(shape_px[0], s, shape_px[1], s)
    fractions = np.stack([(blocks == c).mean(axis=(1, 3), dtype=np.float32) for c in range(len(CLASSES))])
    density = _nuclear_density(tissue, fine, (origin_px[0] * s, origin_px[1] * s), label.shape)
    density = density.reshape(shape_px[0], s, shape_px[1], s).mean(axis=(1, 3))
    centres = grid.centres_um(origin_px, shape_px)
    density = np.minimum(density / _FULL_DENSITY, 1).astype(np.float32)
    return Window(centres[..., 0], centres[..., 1], fractions, density, blocks[:, s // 2, :, s // 2])


def _nuclear_density(
    tissue: Tissue, fine: SectionGrid, origin_px: tuple[int, int], shape_px: tuple[int, ...]
) -> NDArray[np.float64]:
    """Area fraction of nuclei around each fine pixel, Gaussian-weighted over `_SMEAR_UM`."""
    pixel = np.asarray(fine.pitch_um)
    # The margin holds every nucleus that reaches into the window through the filter.
    margin = np.ceil(4.5 * _SMEAR_UM / pixel).astype(int)
    low = (np.asarray(origin_px) - margin) * pixel
    size = np.asarray(shape_px) + 2 * margin
    nuclei = tissue.nuclei(tuple(low), tuple(low + size * pixel))
    area = np.pi * nuclei.axes_um.prod(axis=1, dtype=np.float64)
    at = (nuclei.centres_um - low) / pixel - 0.5
    base = np.floor(at).astype(int)
    part = at - base
    image = np.zeros(tuple(size))
    for dy in (0, 1):
        for dx in (0, 1):
            row, col = base[:, 0] + dy, base[:, 1] + dx
            weight = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1]) * area
            inside = (row >= 0) & (row < size[0]) & (col >= 0) & (col < size[1])
            np.add.at(image, (row[inside], col[inside]), weight[inside])
    image = gaussian_filter(image / pixel.prod(), tuple(_SMEAR_UM / pixel), mode="constant")
    return image[margin[0] : margin[0] + shape_px[0], margin[1] : margin[1] + shape_px[1]]


def draw_ions(spec: PhantomSpec, tissue: Tissue) -> list[Ion]:
    """The phantom's ions in order of m/z; kinds are mixed along the m/z axis."""
    rng = spec.rng(3) if spec.chemistry is None else np.random.default_rng([spec.chemistry, 3])
    kinds = [kind for kind in KINDS for _ in range(spec.ions_per_kind.get(kind, 0))]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    # One ion per equal part of the range, away from its ends: neighbours stay apart.
    part = (_MZ_RANGE[1] - _MZ_RANGE[0]) / len(kinds)
    mz = _MZ_RANGE[0] + (np.arange(len(kinds)) + rng.uniform(0.2, 0.8, len(kinds))) * part
    seen = dict.fromkeys(KINDS, 0)
    ions = []
    for index, kind in enumerate(kinds):
        amplitude = 10 ** rng.uniform(2.0, 3.8)
        levels = _draw_levels(rng, kind, seen[kind])
        spots = np.zeros((0, 2))
        if kind == "hotspot":
            spots = _draw_spots(rng if spec.chemistry is None else spec.rng(7, index), spec, tissue)
        sigma = rng.uniform(0.45, 0.85, len(spots)) * spec.pitch_um
        phase = (float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0, 2 * np.pi)))
        base = float(rng.uniform(0.02, 0.12))
        steepness = float(rng.uniform(0.75, 1.6))
        salt = salt_of(spec.seed, f"ion-{index}")
        ions.append(
            Ion(
                mz=round(float(mz[index]), 4),
                kind=kind,
                amplitude=round(float(amplitude), 1),
                levels=levels,
                base=base,
                steepness=steepness,
                phase=phase,
                spots_um=spots,
                spot_sigma_um=sigma,
                salt=salt,
            )
        )
        seen[kind] += 1
    return ions


def _draw_levels(rng: np.random.Generator, kind: str, number: int) -> Floats:
    """Level per class: high in some classes, low in the others, none where there is no tissue."""
    high = rng.random(len(CLASSES)) < 0.35
    levels = np.where(high, rng.uniform(0.4, 0.75, len(CLASSES)), rng.uniform(0.02, 0.25, len(CLASSES)))
    if not high[1:].any() or high[1:].all():
        levels[1 + rng.integers(len(CLASSES) - 1)] = 0.7 if not high[1:].any() else 0.05
    levels[TWIN] = levels[CORTEX]
    if kind == "twin":
        levels = rng.uniform(0.05, 0.12, len(CLASSES))
        levels[TWIN if number % 2 == 0 else CORTEX] = rng.uniform(0.55, 0.75)
    levels[NONE] = 0.0
    return levels.astype(np.float32)


def _draw_spots(rng: np.random.Generator, spec: PhantomSpec, tissue: Tissue) -> NDArray[np.float64]:
    """Places of hot spots, in tissue, wherever the stain shows nothing in particular."""
    number = max(4, round(spec.shape_px[0] * spec.shape_px[1] / 250))
    tries = rng.uniform(0, 1, (40 * number, 2)) * spec.grid.extent_um
    good = tissue.organ.at(tries[:, 0], tries[:, 1]).label != NONE
    return tries[good][:number]


def ion_image(ion: Ion, window: Window, extent_um: tuple[float, float]) -> Floats:
    """One ion on a window, (h, w) float32, in intensity.

    Args:
        ion: The ion.
        window: Where, and the tissue there.
        extent_um: Outer size of the section, over which smooth gradients run.
    """
    y, x = window.y, window.x
    tissue = 1 - window.fractions[NONE]
    vary = fractal_noise(y, x, 240.0, ion.salt, octaves=3, nodes_per_cell=12)
    nuclear = tissue * (ion.base + (1 - ion.base) * window.density**ion.steepness)
    if ion.kind in ("class", "twin"):
        part = np.tensordot(ion.levels, window.fractions, 1) * np.clip(1 + 0.16 * vary, 0.3, 1.7)
    elif ion.kind == "nuclear":
        part = nuclear * np.clip(1 + 0.08 * vary, 0.3, 1.7)
    elif ion.kind == "mixed":
        classes = np.tensordot(ion.levels, window.fractions, 1) * np.clip(1 + 0.14 * vary, 0.3, 1.7)
        part = 0.55 * classes + 0.45 * nuclear
    elif ion.kind == "smooth":
        v, u = y / extent_um[0] - 0.5, x / extent_um[1] - 0.5
        along = v * np.sin(ion.phase[0]) + u * np.cos(ion.phase[0])
        across = v * np.cos(ion.phase[0]) - u * np.sin(ion.phase[0])
        wave = 0.5 + 0.7 * along + 0.12 * np.sin(5.0 * across + ion.phase[1])
        # On glass too: a tissue's outline alone would let the stain explain part of the ion.
        part = np.clip(wave, 0.05, 0.98)
    elif ion.kind == "hotspot":
        part = tissue * (0.04 + _spots(ion, y, x))
    else:
        slow = gradient_noise(y, x, 500.0, ion.salt)
        part = (1 - tissue) * np.clip(0.75 + 0.07 * slow, 0.3, 1) + ion.base * tissue
    return (np.clip(part, 0, 1) * ion.amplitude).astype(np.float32)


def _spots(ion: Ion, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the ion's Gaussian spots; each is evaluated where it is not negligible."""
    out = np.zeros(y.shape)
    for k, (centre, sigma) in enumerate(zip(ion.spots_um, ion.spot_sigma_um, strict=True)):
        height = 0.55 + 0.4 * ((k * 0.618) % 1.0)
        rows = np.flatnonzero(np.abs(y[:, 0] - centre[0]) < 5 * sigma)
        cols = np.flatnonzero(np.abs(x[0] - centre[1]) < 5 * sigma)
        if len(rows) and len(cols):
            box = np.ix_(rows, cols)
            squared = (y[box] - centre[0]) ** 2 + (x[box] - centre[1]) ** 2
            out[box] += height * np.exp(-squared / (2 * sigma**2))
    return out
