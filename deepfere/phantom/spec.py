"""What a phantom is made of: its size, its noise and how its slide is misplaced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from deepfere.errors import InputError
from deepfere.frame import Alignment, Displacement, SectionGrid

#: Kinds of ions and whether the stain explains them.
KINDS: dict[str, bool] = {
    "class": True,  # a level per tissue class, the same in the two classes that look alike
    "nuclear": True,  # local nuclear density
    "mixed": True,  # class and nuclear density
    "smooth": False,  # a gradient over tissue and glass that the stain does not show
    "hotspot": False,  # a few spots that the stain does not show
    "twin": True,  # in part: tells apart two classes that look alike, but their other borders show
    "matrix": True,  # high where there is no tissue
}

_IONS_PER_KIND = {"class": 6, "nuclear": 5, "mixed": 3, "smooth": 3, "hotspot": 3, "twin": 2, "matrix": 2}


@dataclass(frozen=True)
class PhantomSpec:
    """One invented section: everything in it follows from these values.

    Attributes:
        seed: Names the tissue, its chemistry, its placement and its noise.
        chemistry: Names the chemistry instead: sections of one number hold the same ions in different tissue.
        shape_px: Measured pixels (ny, nx), the margin around the tissue included.
        pitch_um: Distance between measured pixel centres, micrometres, the same in y and x.
        factor: The truth is stored on pixels of ``pitch_um / factor``.
        slide_mpp_um: Size of a slide pixel, micrometres.
        mode: "processed" (each spectrum has its own m/z list) or "continuous" (one shared axis).
        counts: Poisson counts at an ion's full scale; None for no counting noise.
        ions_per_kind: How many ions of each kind in `KINDS`; kinds left out have none.
        missing_fraction: Part of the measured pixels that are absent from the file.
        flip: Whether the slide is mirrored; None draws it.
        rotation_deg: Rotation section to slide, degrees; None draws 0/90/180/270 plus up to 15 either way.
        scale: Size on the slide over size in the section; None draws 0.97 to 1.03.
        shift_fraction: Distance between the centres of section and slide over the mean side of the
            section; None draws 0.1 to 0.3.
        bend_um: Largest smooth displacement over the section; None draws 0.5 to 1 ``pitch_um``.
        stain_noise: Relative slow variation of either stain over the slide.
        sensor_noise: Amplitude of the camera's noise, grey levels.
        jpeg_quality: Quality of the slide's tiles, 1 to 100.
    """

    seed: int = 0
    chemistry: int | None = None
    shape_px: tuple[int, int] = (40, 36)
    pitch_um: float = 50.0
    factor: int = 8
    slide_mpp_um: float = 1.0
    mode: Literal["processed", "continuous"] = "processed"
    counts: float | None = 400.0
    ions_per_kind: Mapping[str, int] = field(default_factory=lambda: dict(_IONS_PER_KIND))
    missing_fraction: float = 0.01
    flip: bool | None = None
    rotation_deg: float | None = None
    scale: float | None = None
    shift_fraction: float | None = None
    bend_um: float | None = None
    stain_noise: float = 0.08
    sensor_noise: float = 3.0
    jpeg_quality: int = 85

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape_px", (int(self.shape_px[0]), int(self.shape_px[1])))
        object.__setattr__(self, "ions_per_kind", dict(self.ions_per_kind))
        self._check("seed", self.seed >= 0, "give an integer that is not negative")
        self._check("chemistry", (self.chemistry or 0) >= 0, "give an integer that is not negative, or None")
        self._check("shape_px", min(self.shape_px) >= 4, "give at least 4 x 4 pixels")
        self._check("pitch_um", 0 < self.pitch_um < math.inf, "give a positive size in micrometres")
        self._check("factor", self.factor >= 1, "give a whole number from 1")
        self._check("slide_mpp_um", 0 < self.slide_mpp_um <= 8, "give micrometres per pixel, up to 8")
        self._check("mode", self.mode in ("processed", "continuous"), "give processed or continuous")
        self._check("counts", self.counts is None or self.counts > 0, "give a positive number or None")
        known = set(self.ions_per_kind) <= set(KINDS) and all(n >= 0 for n in self.ions_per_kind.values())
        self._check("ions_per_kind", known, f"give counts for {', '.join(KINDS)}")
        self._check("ions_per_kind", sum(self.ions_per_kind.values()) > 0, "give at least one ion")
        self._check("missing_fraction", 0 <= self.missing_fraction <= 0.5, "give a part from 0 to 0.5")
        self._check("scale", self.scale is None or 0.2 <= self.scale <= 5, "give a ratio from 0.2 to 5")
        self._check("shift_fraction", 0 <= (self.shift_fraction or 0) <= 1, "give a part from 0 to 1")
        # Beyond this the displacement could fold the section over itself.
        limit = 0.06 * min(self.grid.extent_um)
        self._check("bend_um", 0 <= (self.bend_um or 0) <= limit, f"give 0 to {limit:g} micrometres")
        self._check("stain_noise", 0 <= self.stain_noise <= 0.5, "give a part from 0 to 0.5")
        self._check("sensor_noise", 0 <= self.sensor_noise <= 30, "give 0 to 30 grey levels")
        self._check("jpeg_quality", 1 <= self.jpeg_quality <= 100, "give 1 to 100")

    def _check(self, name: str, good: bool, remedy: str) -> None:
        if not good:
            raise InputError(f"{name} is {getattr(self, name)!r}", where="phantom", remedy=remedy)

    @property
    def grid(self) -> SectionGrid:
        """The measured grid."""
        return SectionGrid(self.shape_px, (float(self.pitch_um), float(self.pitch_um)))

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers of one use, independent of every other use of the same seed."""
        return np.random.default_rng([self.seed, *key])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return out | {"shape_px": list(self.shape_px), "ions_per_kind": dict(self.ions_per_kind)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PhantomSpec:
        """Read what `to_dict` wrote."""
        return cls(**(values | {"shape_px": tuple(values["shape_px"])}))


def draw_placement(spec: PhantomSpec) -> tuple[Alignment, tuple[int, int]]:
    """The true alignment (section um -> slide um) and the slide's shape in pixels (rows, columns).

    The slide holds the whole section, its margin included, and lies around it off centre, so that the
    shift cannot be guessed from the slide's size.
    """
    rng = spec.rng(1)
    # Everything is drawn always: fixing one value must not change the others.
    drawn_flip = bool(rng.random() < 0.5)
    drawn_rotation = float(rng.integers(4) * 90 + rng.uniform(-15, 15))
    drawn_scale = float(rng.uniform(0.97, 1.03))
    drawn_shift = float(rng.uniform(0.10, 0.30))
    drawn_bend = float(rng.uniform(0.5, 1.0) * spec.pitch_um)
    heading = float(rng.uniform(0, 2 * np.pi))
    flip = drawn_flip if spec.flip is None else spec.flip
    rotation_deg = drawn_rotation if spec.rotation_deg is None else spec.rotation_deg
    scale = drawn_scale if spec.scale is None else spec.scale
    shift_fraction = drawn_shift if spec.shift_fraction is None else spec.shift_fraction
    extent = np.asarray(spec.grid.extent_um)
    # On a handful of pixels a bend of one pixel would fold the section.
    bend_um = min(drawn_bend, 0.06 * float(extent.min())) if spec.bend_um is None else spec.bend_um

    turn = math.radians(rotation_deg)
    rotate = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    matrix = scale * rotate @ np.diag([1.0, -1.0 if flip else 1.0])
    displacement = _draw_bend(rng, extent, bend_um)
    bent = Alignment(matrix, np.zeros(2), displacement)

    border = spec.grid.refine(1).centres_um().reshape(-1, 2)
    border = np.concatenate([border, np.array([[0, 0], [0, extent[1]], [extent[0], 0], extent])])
    mapped = bent.map(border) - bent.map(extent[None] / 2)
    shift = shift_fraction * extent.mean() * np.array([math.sin(heading), math.cos(heading)])
    clear = 0.06 * float(extent.mean())
    half = np.maximum(mapped.max(0) + shift, -(mapped.min(0) + shift)) + clear
    shape_px = np.ceil(2 * half / spec.slide_mpp_um).astype(int)
    offset = shape_px * spec.slide_mpp_um / 2 + shift - bent.map(extent[None] / 2)[0]
    evidence = {
        "source": "phantom",
        "flip": flip,
        "rotation_deg": rotation_deg,
        "scale": scale,
        "shift_fraction": shift_fraction,
        "bend_um": bend_um,
    }
    return Alignment(matrix, offset, displacement, evidence), (int(shape_px[0]), int(shape_px[1]))


def _draw_bend(rng: np.random.Generator, extent: np.ndarray, bend_um: float) -> Displacement:
    """A smooth random displacement whose largest length over the section is `bend_um`."""
    spacing = extent / 3.0
    # Two knots beyond each side: the field has no kink where the section ends.
    coefficients = rng.normal(size=(8, 8, 2))
    origin = (float(-2 * spacing[0]), float(-2 * spacing[1]))
    step = (float(spacing[0]), float(spacing[1]))
    points = SectionGrid((25, 25), (extent[0] / 25, extent[1] / 25)).centres_um()
    largest = np.hypot(*np.moveaxis(Displacement(origin, step, coefficients).at(points), -1, 0)).max()
    return Displacement(origin, step, coefficients * (bend_um / largest))
