"""Teaching points: where flexImaging's sequence file (.mis) says that the measured area lies on its picture.

The file is XML. ``TeachPoint`` pairs a pixel of the picture with a position of the stage ("x,y;x,y", pixels and
micrometres), ``Area`` outlines what was measured in pixels of the picture, with the raster in micrometres, and
``ImageFile`` names the picture. The stage's frame in the teaching points is not that of the instrument's position log,
so positions of spectra cannot be mapped through it. What can: the area's extent along the stage's axes holds the
measured grid, rows and columns in the order of the picture's.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.remote import is_url

MIS = ".mis"
CSV_INSTEAD = "give landmarks as a CSV"
SIZE_SHARE = 0.03
"""By how much of its size an area may differ from the measured grid; by one pixel in any case."""
MPP_SHARE = 0.05
"""By how much the picture's pixel size may differ from what the teaching points say."""


@dataclass(frozen=True)
class Area:
    """One measured area.

    Attributes:
        name: As the operator called it.
        corners_px: (n, 2) outline on the picture, (x, y); two points are opposite corners.
        raster_um: Distance of spectra (x, y).
    """

    name: str
    corners_px: NDArray[np.float64]
    raster_um: tuple[float, float]

    def extent_um(self, matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centre and size (x, y) along the stage's axes, micrometres, the stage's origin at the picture's.

        Args:
            matrix: (2, 2) stage micrometres per picture pixel.
        """
        stage = self.corners_px @ matrix.T
        low, high = stage.min(0), stage.max(0)
        return (low + high) / 2, high - low


@dataclass(frozen=True)
class TeachingPoints:
    """What a .mis says about a picture and the measured areas on it.

    Attributes:
        path: The file.
        image: File name of the picture.
        matrix: (2, 2) stage micrometres per picture pixel, columns x and y.
        areas: The measured areas.
    """

    path: Path
    image: str
    matrix: NDArray[np.float64]
    areas: list[Area]

    @property
    def mpp_um(self) -> float:
        """Picture pixel size in stage micrometres."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix))))

    def alignment(self, grid: SectionGrid, slide: str | Path, mpp_um: tuple[float, float]) -> Alignment:
        """Section to slide, by the one area (or all of them together) that has the measured grid's size.

        Args:
            grid: Measured grid.
            slide: The picture that is used as the slide.
            mpp_um: Its pixel size (y, x).

        Raises:
            InputError: The picture is another one or of another pixel size, or no area, or more than one, fits.
        """
        if Path(slide).name.casefold() != self.image.casefold():
            raise InputError(
                f"its teaching points are for {self.image}, and the slide is {Path(slide).name}",
                where=self.path,
                remedy=f"give that picture as the slide, or {CSV_INSTEAD}",
            )
        if abs(np.sqrt(mpp_um[0] * mpp_um[1]) / self.mpp_um - 1) > MPP_SHARE:
            raise InputError(
                f"its teaching points say {self.mpp_um:.4g} um per pixel, the slide says {mpp_um[0]:.4g}",
                where=self.path,
                remedy=f"correct --slide-mpp-um, or {CSV_INSTEAD}",
            )
        fitting = [area for area in self._candidates() if self._fits(area, grid)]
        if len(fitting) != 1:
            said = "; ".join(
                f"{a.name}: {'x'.join(f'{n:.0f}' for n in a.extent_um(self.matrix)[1][::-1])} um" for a in self.areas
            )
            raise InputError(
                f"{'none' if not fitting else 'more than one'} of its areas ({said}) is the measured grid of "
                f"{grid.extent_um[0]:.0f}x{grid.extent_um[1]:.0f} um",
                where=self.path,
                remedy=CSV_INSTEAD,
            )
        centre, _ = fitting[0].extent_um(self.matrix)
        half_y, half_x = grid.extent_um[0] / 2, grid.extent_um[1] / 2
        section = np.array([[y, x] for y in (0.0, 2 * half_y) for x in (0.0, 2 * half_x)])
        # Rows and columns of the grid run as those of the picture do, whichever way the stage counts.
        along = np.sign(np.diag(self.matrix))
        stage = centre + along * (section[:, ::-1] - (half_x, half_y))
        picture = stage @ np.linalg.inv(self.matrix).T
        table = np.column_stack([section, picture[:, ::-1] * np.asarray(mpp_um)])
        return Alignment.through(table, self.path).with_evidence(source="teaching points", area=fitting[0].name)

    def _candidates(self) -> list[Area]:
        """Every area, and all of them in one if they share their raster."""
        if len(self.areas) < 2 or len({area.raster_um for area in self.areas}) > 1:
            return self.areas
        outline = np.concatenate([area.corners_px for area in self.areas])
        return [*self.areas, Area("all areas", outline, self.areas[0].raster_um)]

    def _fits(self, area: Area, grid: SectionGrid) -> bool:
        _, size = area.extent_um(self.matrix)
        pitch = np.array(grid.pitch_um[::-1])
        wanted = np.array(grid.extent_um[::-1])
        same_raster = np.allclose(area.raster_um, pitch, rtol=0.02)
        return same_raster and bool((np.abs(size - wanted) <= np.maximum(pitch, SIZE_SHARE * wanted)).all())


def read_mis(path: str | Path) -> TeachingPoints:
    """Read the teaching points and areas of a flexImaging sequence file.

    Raises:
        InputError: It is no such file, or has fewer than three teaching points, none off the others' line, a picture
            that is turned against the stage, or no area.
    """
    path = Path(path)
    try:
        root = ElementTree.parse(path).getroot()
        image = (root.findtext("ImageFile") or "").strip().replace("\\", "/").rpartition("/")[2]
        pairs = [[_pair(half) for half in (node.text or "").split(";")] for node in root.iter("TeachPoint")]
        areas = [
            Area(
                node.get("Name") or f"area {n + 1}",
                np.array([_pair(point.text or "") for point in node.iter("Point")], np.float64),
                _pair(node.findtext("Raster") or ""),
            )
            for n, node in enumerate(root.iter("Area"))
        ]
        table = np.array(pairs, np.float64).reshape(-1, 4)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(
            f"cannot be read as a sequence with teaching points ({error})", where=path, remedy=CSV_INSTEAD
        ) from error
    areas = [area for area in areas if len(area.corners_px) >= 2]
    if len(table) < 3 or not image or not areas:
        raise InputError(
            f"has {len(table)} teaching points, {len(areas)} areas and {'a' if image else 'no'} picture; three "
            "points, an area and a picture are needed",
            where=path,
            remedy=CSV_INSTEAD,
        )
    design = np.column_stack([table[:, :2] - table[:, :2].mean(0), np.ones(len(table))])
    scales = np.linalg.svd(design[:, :2], compute_uv=False)
    matrix = np.linalg.lstsq(design, table[:, 2:], rcond=None)[0][:2].T
    if scales[1] < 1e-3 * scales[0] or not abs(np.linalg.det(matrix)) > 0:
        raise InputError("the teaching points lie on one line", where=path, remedy=CSV_INSTEAD)
    if np.abs(matrix[[0, 1], [1, 0]]).max() > 0.3 * np.abs(np.diag(matrix)).min():
        raise InputError("the picture is turned against the stage", where=path, remedy=CSV_INSTEAD)
    return TeachingPoints(path, image, matrix, areas)


def teaching_points_beside(msi: str | Path, slide: str | Path) -> Path | None:
    """The .mis of a measurement's own name in its folder, if its teaching points are for this slide."""
    if is_url(msi):
        return None
    for suffix in (MIS, MIS.upper()):
        path = Path(msi).with_suffix(suffix)
        with suppress(InputError):
            if read_mis(path).image.casefold() == Path(slide).name.casefold():
                return path
    return None


def _pair(text: str) -> tuple[float, float]:
    first, _, second = text.partition(",")
    return float(first), float(second)
