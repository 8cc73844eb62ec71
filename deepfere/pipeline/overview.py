"""The slide as the alignment sees it: opened as the settings say, small, and of one piece of tissue if chosen."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from deepfere.alignment.accept import AmbiguousPlacement
from deepfere.alignment.overview import NO_ARTEFACTS, StainOverview
from deepfere.config import Config
from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.artefacts import find_artefacts
from deepfere.model.features import base_planes, stain_reference
from deepfere.readers.slide import Readable, Slide, open_slide, read_area
from deepfere.readers.slide_damaged import ReadAround
from deepfere.section import Section
from deepfere.tiling.pieces import LOOKED_AT_PX, Piece, Pieces, find_pieces, looked_at_px

OVERVIEW_PX = 16_000_000
MARGIN_UM = 1000.0
"""What is read around the chosen piece of tissue."""
MEASURED_SHARE = 0.25
"""A piece of tissue with less than this share of the measured area is not what was measured; debris mostly is not."""


def section_slide(section: Section, config: Config) -> Slide:
    """A section's slide, opened as the settings say.

    Raises:
        InputError: See `deepfere.readers.slide.open_slide`.
    """
    return open_slide(str(section.slide), section.slide_mpp_um, config.slide.backend, config.slide.icc)


def section_pieces(section: Section, config: Config) -> Pieces | None:
    """The pieces of tissue on a section's slide, of which one was chosen; None where none was, and all of it counts.

    Raises:
        InputError: There is no piece of that number, or see `section_slide`.
    """
    with closing(section_slide(section, config)) as slide:
        if not isinstance(section.slide_region, int):
            return None
        pieces = find_pieces(slide)
        pieces.choose(section.slide_region, slide.path)
        return pieces


def section_overview(
    section: Section, config: Config, pitch_um: float
) -> tuple[StainOverview, NDArray[np.uint8], tuple[float, float]]:
    """Overview, picture and pixel size (y, x) of a section's slide, restricted to the piece that was chosen.

    Raises:
        InputError: See `section_pieces` and `stain_overview`.
    """
    pieces = section_pieces(section, config)
    number = section.slide_region if isinstance(section.slide_region, int) else 0
    with closing(section_slide(section, config)) as slide:
        stain, rgb = stain_overview(slide, pitch_um, config.artefacts == "auto", pieces, number)
        return stain, rgb, slide.mpp_um


def unnamed_pieces(section: Section, config: Config) -> Pieces | None:
    """The pieces of tissue on a section's slide where there are several, and nothing was said of them; else None."""
    if section.slide_region is not None:
        return None
    with closing(section_slide(section, config)) as slide:
        if looked_at_px(slide) > LOOKED_AT_PX:
            return None
        pieces = find_pieces(slide)
    return pieces if len(pieces.pieces) > 1 else None


def ask_which(several: Pieces | None, section: Section, measured_um2: float) -> None:
    """Have the user say which piece was measured, where it could have been more than one of them.

    Args:
        several: The slide's pieces of tissue, see `unnamed_pieces`.
        section: The section.
        measured_um2: Measured area.

    Raises:
        InputError: Two or more are large enough.
    """
    if several is None:
        return
    large = [p for p in several.pieces if p.area_um2 >= MEASURED_SHARE * measured_um2]
    if len(large) > 1:
        raise InputError(
            f"shows {len(several.pieces)} pieces of tissue ({several.listed()})",
            where=section.slide,
            remedy=f"choose the one that was measured with --slide-region {large[0].number} or another number (in a "
            "study slide_region); all takes all of them, and searches all of the slide",
        )


def telling_pieces(several: Pieces | None, found: Alignment, grid: SectionGrid) -> list[str]:
    """What is to be known of a placement that was found on a slide of several pieces, of which none was named."""
    if several is None:
        return []
    number = several.nearest(found.map(np.asarray(grid.extent_um)[None] / 2)[0])
    return [
        f"the slide shows {len(several.pieces)} pieces of tissue ({several.listed()}) and none was named: all of it "
        f"was searched, and the section was found on piece {number}; if another was measured, choose it with "
        "--slide-region (in a study slide_region)"
    ]


def naming_pieces(
    error: InputError, several: Pieces | None, section: Section, config: Config, grid: SectionGrid
) -> InputError:
    """The same refusal of a search; where the slide has several pieces of tissue, with the option that chooses one.

    Args:
        error: The refusal.
        several: See `unnamed_pieces`; looked for anew where a refusal is about two places and all of the slide was
            asked for.
        section: The section.
        config: Settings.
        grid: Measured pixels.
    """
    if not isinstance(error, AmbiguousPlacement):
        if several is None:
            return error
        return InputError(
            f"{error.what}; the slide shows {len(several.pieces)} pieces of tissue ({several.listed()})",
            where=error.where,
            remedy=f"choose the one that was measured with --slide-region (in a study slide_region), or {error.remedy}",
        )
    if isinstance(section.slide_region, int):
        return error
    if several is None:
        with closing(section_slide(section, config)) as slide:
            several = find_pieces(slide)
    middle = np.asarray(grid.extent_um)[None] / 2
    best, other = (several.nearest(placed.map(middle)[0]) for placed in error.placements)
    if best == other:
        return error
    return InputError(
        f"{error.what}; the first lies on piece {best} of the slide's {len(several.pieces)} pieces of tissue, the next "
        f"on piece {other} ({several.listed()})",
        where=error.where,
        remedy=f"choose one with --slide-region {best} or another number (in a study slide_region), or {error.remedy}",
    )


def stain_overview(
    slide: Slide, pitch_um: float, ink: bool = True, pieces: Pieces | None = None, number: int = 0
) -> tuple[StainOverview, NDArray[np.uint8]]:
    """Base planes and picture of the slide, at about an eighth of the measured pitch.

    Args:
        slide: The opened slide.
        pitch_um: Measured pixel size.
        ink: Whether ink is looked for, and painted over with glass.
        pieces: The slide's pieces of tissue, where one of them alone is wanted: nothing but its surroundings is read,
            and other pieces in them are painted over.
        number: Which of them.

    Raises:
        InputError: There is no tissue, or nothing of it can be read.
    """
    extent = (slide.shape_px[0] * slide.mpp_um[0], slide.shape_px[1] * slide.mpp_um[1])
    wanted = max(pitch_um / 8, float(np.sqrt(extent[0] * extent[1] / OVERVIEW_PX)), *slide.mpp_um)
    step = max(1, int(wanted / max(slide.mpp_um) + 1e-9))
    spacing = (slide.mpp_um[0] * step, slide.mpp_um[1] * step)
    shape = (max(1, slide.shape_px[0] // step), max(1, slide.shape_px[1] // step))
    around = ReadAround(slide)
    if pieces is None:
        rgb, coverage = read_area(around, (0.0, 0.0), shape, spacing)
        elsewhere, hidden = None, np.zeros(shape, bool)
    else:
        piece = pieces.choose(number, slide.path)
        elsewhere = pieces.elsewhere(number).at((0.0, 0.0), spacing, shape)
        rgb, coverage = _one_piece(around, piece, elsewhere, spacing)
        hidden = coverage == 0
    lost = around.hidden((0.0, 0.0), spacing, shape)
    coverage[lost], hidden = 0.0, hidden | lost
    if around.first is not None and not coverage.any():
        raise around.first
    reference = stain_reference(rgb, coverage)
    artefacts = find_artefacts(rgb, coverage, reference, spacing, pitch_um) if ink else NO_ARTEFACTS
    bare = rgb
    if artefacts.mask.any():
        hidden = hidden | artefacts.mask
    if hidden.any():
        # Marks, other pieces and what is damaged must neither set thresholds nor draw the search: they become glass.
        coverage = np.where(hidden, 0.0, coverage)
        reference = stain_reference(rgb, coverage)
        bare = np.where(hidden[..., None], np.asarray(reference.white).round(), rgb).astype(np.uint8)
    planes = base_planes(bare, coverage, 1, reference)
    if (planes[5] > 127).mean() < 0.002:
        raise InputError("shows no tissue", where=slide.path, remedy="give the slide of this section")
    return StainOverview(planes, spacing, reference, artefacts, elsewhere, around.damaged), rgb


def _one_piece(
    slide: Readable, piece: Piece, elsewhere: NDArray[np.bool_], spacing_um: tuple[float, float]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Picture and coverage of a whole overview (h, w) of which one piece's surroundings alone are read."""
    shape_px, low, high = elsewhere.shape, [], []
    for k in (0, 1):
        low.append(max(0, int((piece.start_um[k] - MARGIN_UM) / spacing_um[k])))
        end = int(np.ceil((piece.start_um[k] + piece.extent_um[k] + MARGIN_UM) / spacing_um[k]))
        high.append(max(low[k] + 1, min(shape_px[k], end)))
    part = slice(low[0], high[0]), slice(low[1], high[1])
    rgb, coverage = np.full((*shape_px, 3), 255, np.uint8), np.zeros(shape_px, np.float32)
    corner, size = (low[0] * spacing_um[0], low[1] * spacing_um[1]), (high[0] - low[0], high[1] - low[1])
    rgb[part], coverage[part] = read_area(slide, corner, size, spacing_um)
    coverage[elsewhere] = 0.0
    return rgb, coverage
