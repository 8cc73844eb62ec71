"""Where things are: the section grid, the slide frame and the alignment between them.

All physical coordinates are micrometres, float64, ordered (y, x); values live at pixel centres.

* **Section frame**: origin at the outer corner of the smallest x and y coordinate measured; y down,
  x right. Measured pixel (i, j) covers ``[i p, (i+1) p) x [j p, (j+1) p)``, p the pitch.
* **Slide frame**: origin at the outer corner of level 0's first pixel; pixel (r, c) has its centre at
  ``((r + 1/2) mpp_y, (c + 1/2) mpp_x)``.
* **Alignment**: section micrometres to slide micrometres, one per section.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepfere.errors import InputError

Points = NDArray[np.float64]

LANDMARK_COLUMNS = ("section_y_um", "section_x_um", "slide_y_um", "slide_x_um")


@dataclass(frozen=True)
class SectionGrid:
    """The measured pixel grid of one section and its refinement by an integer factor.

    Attributes:
        shape_px: Measured pixels (ny, nx).
        pitch_um: Distance between measured pixel centres (y, x), micrometres.
    """

    shape_px: tuple[int, int]
    pitch_um: tuple[float, float]

    @property
    def extent_um(self) -> tuple[float, float]:
        """Outer size (y, x) of the grid, micrometres."""
        return self.shape_px[0] * self.pitch_um[0], self.shape_px[1] * self.pitch_um[1]

    def refine(self, factor: int) -> SectionGrid:
        """The grid whose pixels are ``factor`` times smaller in y and x."""
        return SectionGrid(
            (self.shape_px[0] * factor, self.shape_px[1] * factor),
            (self.pitch_um[0] / factor, self.pitch_um[1] / factor),
        )

    def centres_um(self, origin_px: tuple[int, int] = (0, 0), shape_px: tuple[int, int] | None = None) -> Points:
        """Centres of a window of pixels, (h, w, 2) float64 micrometres (y, x), section frame.

        Args:
            origin_px: First row and column of the window (may be negative).
            shape_px: Rows and columns of the window; the whole grid by default.
        """
        axes = self.axes_um(origin_px, shape_px if shape_px is not None else self.shape_px)
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)

    def axes_um(self, origin_px: tuple[int, int], shape_px: tuple[int, int]) -> tuple[Points, Points]:
        """Of `centres_um`, the rows' y (h,) and the columns' x (w,)."""
        y, x = (
            (np.arange(n, dtype=np.float64) + first + 0.5) * pitch
            for n, first, pitch in zip(shape_px, origin_px, self.pitch_um, strict=True)
        )
        return y, x


def cubic_basis(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (..., 4) of the uniform cubic B-spline's four knots at fraction u in [0, 1).

    Source: de Boor, A Practical Guide to Splines (1978), uniform knots.
    """
    v = 1.0 - u
    w0, w3 = v**3 / 6.0, u**3 / 6.0
    w1 = (3.0 * u**3 - 6.0 * u**2 + 4.0) / 6.0
    w2 = (3.0 * v**3 - 6.0 * v**2 + 4.0) / 6.0
    return np.stack([w0, w1, w2, w3], axis=-1)


@dataclass(frozen=True)
class Displacement:
    """A smooth cubic B-spline displacement field on a regular grid of knots.

    Attributes:
        origin_um: Section position (y, x) of knot (0, 0), micrometres.
        spacing_um: Knot spacing (y, x), micrometres.
        coefficients_um: (ny, nx, 2) float64 displacement (y, x) per knot, in slide micrometres.
    """

    origin_um: tuple[float, float]
    spacing_um: tuple[float, float]
    coefficients_um: NDArray[np.float64]

    def __post_init__(self) -> None:
        values = [*self.origin_um, *self.spacing_um, np.sum(self.coefficients_um)]
        if not np.isfinite(values).all() or min(self.spacing_um) <= 0:
            raise InputError("the alignment's displacement needs finite numbers and a positive knot spacing")

    def at(self, points: ArrayLike) -> Points:
        """Displacement (N, 2) at section points (N, 2); zero coefficients beyond the knots."""
        pts = np.asarray(points, dtype=np.float64)
        out = np.zeros_like(pts)
        rel = (pts - np.asarray(self.origin_um)) / np.asarray(self.spacing_um)
        base = np.floor(rel).astype(np.int64)
        weights_y, weights_x = (
            cubic_basis(rel[..., 0] - base[..., 0]),
            cubic_basis(rel[..., 1] - base[..., 1]),
        )
        ny, nx = self.coefficients_um.shape[:2]
        for a in range(4):
            row = base[..., 0] + a - 1
            for b in range(4):
                col = base[..., 1] + b - 1
                inside = (row >= 0) & (row < ny) & (col >= 0) & (col < nx)
                weight = np.where(inside, weights_y[..., a] * weights_x[..., b], 0.0)
                knot = self.coefficients_um[np.clip(row, 0, ny - 1), np.clip(col, 0, nx - 1)]
                out += weight[..., None] * knot
        return out


@dataclass(frozen=True)
class Alignment:
    """Section micrometres to slide micrometres: one affine, then one smooth displacement.

    ``slide = matrix @ section + offset_um + displacement(section)``, all ordered (y, x).

    Attributes:
        matrix: (2, 2) float64.
        offset_um: (2,) float64, micrometres.
        displacement: The B-spline part, or None.
        evidence: How it was found and how well (plain values; saved with the alignment).
    """

    matrix: NDArray[np.float64]
    offset_um: NDArray[np.float64]
    displacement: Displacement | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        matrix = np.asarray(self.matrix, dtype=np.float64).reshape(2, 2)
        offset = np.asarray(self.offset_um, dtype=np.float64).reshape(2)
        if not (np.isfinite(matrix).all() and np.isfinite(offset).all()):
            raise InputError("the alignment holds values that are not finite numbers")
        if abs(np.linalg.det(matrix)) < 1e-6:
            raise InputError("the alignment's matrix is singular", remedy="give a matrix that can be inverted")
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "offset_um", offset)

    @classmethod
    def identity(cls) -> Alignment:
        """Section and slide share one frame."""
        return cls(np.eye(2), np.zeros(2))

    def map(self, points: ArrayLike) -> Points:
        """Slide points (N, 2) of section points (N, 2), micrometres (y, x); any leading shape."""
        pts = np.asarray(points, dtype=np.float64)
        out = pts @ self.matrix.T + self.offset_um
        return out if self.displacement is None else out + self.displacement.at(pts)

    def unmap(self, points: ArrayLike, iterations: int = 30, tolerance_um: float = 0.0) -> Points:
        """Section points (N, 2) of slide points (N, 2), any leading shape: the inverse, by fixed-point iteration.

        Args:
            points: Slide micrometres (y, x).
            iterations: At most.
            tolerance_um: A last step that moves no point by more is small enough.
        """
        target = np.asarray(points, dtype=np.float64)
        inverse = np.linalg.inv(self.matrix)
        out = (target - self.offset_um) @ inverse.T
        if self.displacement is not None:
            for _ in range(iterations):
                step = (target - self.map(out)) @ inverse.T
                out = out + step
                if np.abs(step).max(initial=0.0) <= tolerance_um:
                    break
        return out

    def max_stretch(self, extent_um: tuple[float, float]) -> float:
        """Largest singular value of the Jacobian over the section: how much halos must grow."""
        stretch = float(np.linalg.svd(self.matrix, compute_uv=False)[0])
        if self.displacement is None:
            return stretch
        grid = SectionGrid((24, 24), (extent_um[0] / 24, extent_um[1] / 24)).centres_um()
        step = 1e-3 * min(extent_um)
        columns = [(self.map(grid + step * e) - self.map(grid - step * e)) / (2 * step) for e in np.eye(2)]
        jacobian = np.stack(columns, axis=-1)
        return float(np.linalg.svd(jacobian, compute_uv=False).max())

    def with_evidence(self, **evidence: Any) -> Alignment:
        """The same transform with more evidence recorded."""
        return replace(self, evidence={**self.evidence, **evidence})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        out: dict[str, Any] = {
            "maps": "section um (y, x) -> slide um (y, x)",
            "matrix": self.matrix.tolist(),
            "offset_um": self.offset_um.tolist(),
            "displacement": None,
            "evidence": self.evidence,
        }
        if self.displacement is not None:
            out["displacement"] = {
                "kind": "uniform cubic B-spline",
                "origin_um": list(self.displacement.origin_um),
                "spacing_um": list(self.displacement.spacing_um),
                "coefficients_um": self.displacement.coefficients_um.tolist(),
            }
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: object = None) -> Alignment:
        """Read what `to_dict` wrote; only ``matrix`` and ``offset_um`` are needed."""
        try:
            spline = values.get("displacement")
            displacement = None
            if spline is not None:
                displacement = Displacement(
                    (float(spline["origin_um"][0]), float(spline["origin_um"][1])),
                    (float(spline["spacing_um"][0]), float(spline["spacing_um"][1])),
                    np.asarray(spline["coefficients_um"], dtype=np.float64).reshape(
                        *np.shape(spline["coefficients_um"])[:2], 2
                    ),
                )
            return cls(
                np.asarray(values["matrix"], dtype=np.float64),
                np.asarray(values["offset_um"], dtype=np.float64),
                displacement,
                dict(values.get("evidence") or {}),
            )
        except InputError as error:
            raise InputError(error.what, where=where, remedy=error.remedy) from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"not an alignment ({type(error).__name__}: {error})",
                where=where,
                remedy='it needs "matrix" (2 x 2) and "offset_um" (2), ordered y, x, in micrometres',
            ) from error

    def save(self, path: str | Path) -> None:
        """Write JSON that people can read and edit."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read an alignment JSON.

        Raises:
            InputError: The file is missing, not JSON or not an alignment.
        """
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(
                f"cannot be read as an alignment ({error})", where=path, remedy="give an alignment JSON"
            ) from error
        return cls.from_dict(values, where=path)

    @classmethod
    def from_landmarks(cls, path: str | Path) -> Alignment:
        """Least-squares affine through landmark pairs from a CSV.

        Args:
            path: CSV with the columns ``section_y_um,section_x_um,slide_y_um,slide_x_um``; at least
                three pairs that do not lie on one line.

        Raises:
            InputError: Columns are missing, values are not numbers, or the pairs do not fix an affine.
        """
        try:
            # Spreadsheets may put a byte order mark first.
            with Path(path).open(newline="", encoding="utf-8-sig") as handle:
                rows = list(csv.DictReader(handle))
            if any(None in row for row in rows):
                # Decimal commas would shift every value to the next column.
                raise ValueError("a row has more fields than the header")
            table = np.array([[float(row[name]) for name in LANDMARK_COLUMNS] for row in rows])
        except (OSError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot be read as landmarks ({type(error).__name__}: {error})",
                where=path,
                remedy=f"give a CSV with the columns {','.join(LANDMARK_COLUMNS)}",
            ) from error
        return cls.through(table, path).with_evidence(source="landmarks")

    @classmethod
    def through(cls, table: NDArray[np.float64], where: str | Path) -> Alignment:
        """Least-squares affine through pairs of points.

        Args:
            table: (n, 4) section y, x and slide y, x in micrometres; at least three pairs that do not lie on one line.
            where: Where they come from, for errors.

        Raises:
            InputError: The pairs do not fix an affine.
        """
        if len(table) < 3:
            raise InputError(f"{len(table)} landmarks", where=where, remedy="give at least three pairs")
        section, slide = table[:, :2], table[:, 2:]
        if not np.isfinite(table).all():
            raise InputError("landmarks must be finite numbers", where=where, remedy="correct the CSV")
        design = np.hstack([section - section.mean(0), np.ones((len(table), 1))])
        scales = np.linalg.svd(design[:, :2], compute_uv=False)
        if scales[1] < 1e-3 * max(scales[0], 1e-9):
            raise InputError("the landmarks lie on one line", where=where, remedy="add one away from that line")
        solution = np.linalg.lstsq(design, slide, rcond=None)[0]
        matrix = solution[:2].T
        offset = solution[2] - matrix @ section.mean(0)
        scale = float(np.sqrt(abs(np.linalg.det(matrix))))
        if not 0.4 < scale < 2.5:
            raise InputError(
                f"the landmarks say that a micrometre of the section is {scale:.3g} on the slide",
                where=where,
                remedy="give both sides in micrometres, and check --pitch-um and --slide-mpp-um",
            )
        residual = np.hypot(*(slide - (section @ matrix.T + offset)).T)
        return cls(
            matrix,
            offset,
            evidence={"pairs": len(table), "residual_um": float(np.median(residual))},
        )


def apart_px(one: Alignment, other: Alignment, grid: SectionGrid, mask: NDArray[np.bool_]) -> float:
    """Median distance over the measured pixels between where two alignments put them, in measured pixels.

    Args:
        one: Section to slide.
        other: Another; its scale says how large a measured pixel is on the slide.
        grid: The measured grid.
        mask: (ny, nx) pixels that count.
    """
    points = grid.centres_um()[mask]
    size = np.sqrt(abs(np.linalg.det(other.matrix))) * float(np.mean(grid.pitch_um))
    return float(np.median(np.linalg.norm(one.map(points) - other.map(points), axis=1)) / size)
