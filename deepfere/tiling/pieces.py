"""Several pieces of tissue on one slide: where they are, how they are numbered, and what belongs to one of them.

Pieces are parts of the tissue mask (8 um) with more than 0.32 mm of glass between them. They are numbered in reading
order of their upper left corners. Ink is no tissue. What is less than 0.1 mm2, or than 2 % of the largest piece, is a
speck and in no piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepfere.errors import InputError
from deepfere.model.artefacts import Artefacts, find_artefacts
from deepfere.model.features import base_planes, stain_reference
from deepfere.readers.slide import Slide, adequate_level
from deepfere.tiling.tiles import TISSUE_UM, TissueMask, tissue_overview

BLOCK = 4
"""Pixels of the mask per pixel that pieces are told apart on, and axis."""
HALO_UM = 160.0
"""A piece's ground reaches so far beyond its tissue; pieces are one where their grounds meet."""
LEAST_UM2, LEAST_SHARE = 1e5, 0.02
INK_UM = 128.0
LOOKED_AT_PX = 1 << 27
"""Where the level to look at has more pixels, pieces are looked for on request alone."""
NAMED = 8
"""Pieces that an error lists."""


@dataclass(frozen=True)
class Piece:
    """One piece of tissue.

    Attributes:
        number: From 1, in reading order of the upper left corners.
        start_um: Its upper left corner (y, x), slide micrometres.
        extent_um: Its height and width.
        area_um2: Of its tissue.
    """

    number: int
    start_um: tuple[float, float]
    extent_um: tuple[float, float]
    area_um2: float

    def text(self) -> str:
        """Place, size and area in words."""
        (y, x), (h, w) = self.start_um, self.extent_um
        return (
            f"y {y:.0f} to {y + h:.0f} um, x {x:.0f} to {x + w:.0f} um ({h:.0f} x {w:.0f} um), "
            f"{self.area_um2 / 1e6:.3g} mm2 of tissue"
        )


@dataclass(frozen=True)
class Pieces:
    """The pieces of one slide.

    Attributes:
        pieces: In the order of their numbers.
        ground: (h, w) number of the piece that each pixel belongs to, its surroundings included; 0 is glass.
        ground_um: Size (y, x) of its pixels, slide micrometres.
        mask: Tissue of all of the slide, ink left out.
    """

    pieces: tuple[Piece, ...]
    ground: NDArray[np.int32]
    ground_um: tuple[float, float]
    mask: TissueMask

    def tissue(self, number: int) -> TissueMask:
        """The tissue mask of one piece.

        Raises:
            InputError: There is no piece of that number.
        """
        self.choose(number, "the slide")
        own = Artefacts(self.ground == number, self.ground_um)
        return TissueMask(
            self.mask.mask & own.at((0.0, 0.0), self.mask.spacing_um, self.mask.mask.shape), self.mask.spacing_um
        )

    def elsewhere(self, number: int) -> Artefacts:
        """Where the other pieces are."""
        return Artefacts((self.ground > 0) & (self.ground != number), self.ground_um)

    def nearest(self, point_um: NDArray[np.float64]) -> int:
        """The piece at or nearest to a point (y, x), slide micrometres; 0 where there is none."""
        places = np.argwhere(self.ground > 0)
        if not len(places):
            return 0
        off = (places + 0.5) * np.asarray(self.ground_um) - point_um
        return int(self.ground[tuple(places[np.argmin((off**2).sum(1))])])

    def choose(self, number: int, where: object) -> Piece:
        """The piece of a number.

        Raises:
            InputError: There is none.
        """
        if not 1 <= number <= len(self.pieces):
            raise InputError(
                f"has no piece of tissue {number} (its pieces: {self.listed()})",
                where=where,
                remedy="correct --slide-region (in a study slide_region)",
            )
        return self.pieces[number - 1]

    def listed(self) -> str:
        """All pieces in one line, or the first of many."""
        said = "; ".join(f"{p.number}: {p.text()}" for p in self.pieces[:NAMED])
        rest = len(self.pieces) - NAMED
        return said + (f"; and {rest} more" if rest > 0 else "") if self.pieces else "none"


def looked_at_px(slide: Slide) -> int:
    """Pixels of the level that pieces are found on."""
    spacing = (max(TISSUE_UM, slide.mpp_um[0]), max(TISSUE_UM, slide.mpp_um[1]))
    h, w = slide.levels[adequate_level(slide, spacing)].shape_px
    return h * w


def find_pieces(slide: Slide) -> Pieces:
    """The pieces of tissue on a slide; deterministic. What is damaged of it is no tissue.

    Args:
        slide: An opened slide.

    Raises:
        InputError: Nothing of it can be read.
    """
    rgb, coverage, _, spacing = tissue_overview(slide)
    reference = stain_reference(rgb, coverage)
    h, w = (max(1, n // BLOCK) for n in rgb.shape[:2])
    rows, cols = (min(BLOCK, n) for n in rgb.shape[:2])
    inner = (slice(0, h * rows), slice(0, w * cols))
    blocks = rgb[inner].reshape(h, rows, w, cols, 3)
    ground_um = (spacing[0] * rows, spacing[1] * cols)
    coarse = np.rint(blocks.mean((1, 3), dtype=np.float32)).astype(np.uint8)
    ink = find_artefacts(coarse, coverage[: h * rows : rows, : w * cols : cols], reference, ground_um, INK_UM)
    marks = ink.at((0.0, 0.0), spacing, coverage.shape)
    # Marks must not set the thresholds by which tissue is told.
    coverage = np.where(marks, 0.0, coverage).astype(np.float32)
    tissue = (base_planes(rgb, coverage, 1, stain_reference(rgb, coverage))[5] > 127) & ~marks
    mask = TissueMask(tissue, spacing)
    some = tissue[inner].reshape(h, rows, w, cols).any((1, 3))
    near = ndimage.distance_transform_edt(~some, sampling=ground_um) <= HALO_UM if some.any() else some
    parts, count = ndimage.label(near, np.ones((3, 3), bool))
    share = tissue[inner].reshape(h, rows, w, cols).sum((1, 3))
    areas = np.bincount(parts.ravel(), share.ravel(), count + 1)[1:] * float(np.prod(spacing))
    least = max(LEAST_UM2, LEAST_SHARE * float(areas.max(initial=0.0)))
    boxes = ndimage.find_objects(np.where(some, parts, 0), max_label=count)
    kept = [k for k in range(count) if areas[k] >= least]
    kept.sort(key=lambda k: (boxes[k][0].start, boxes[k][1].start))
    numbers = np.zeros(count + 1, np.int32)
    pieces = []
    for n, k in enumerate(kept, 1):
        numbers[k + 1] = n
        start = tuple(boxes[k][a].start * ground_um[a] for a in (0, 1))
        size = tuple((boxes[k][a].stop - boxes[k][a].start) * ground_um[a] for a in (0, 1))
        pieces.append(Piece(n, (start[0], start[1]), (size[0], size[1]), float(areas[k])))
    return Pieces(tuple(pieces), numbers[parts], ground_um, mask)
