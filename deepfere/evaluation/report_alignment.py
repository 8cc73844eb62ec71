"""The report's alignment section: what was found in words, and overlays before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepfere.evaluation import figures
from deepfere.evaluation.report_pictures import data_uri, frame_of
from deepfere.evaluation.report_tables import number
from deepfere.frame import Alignment, Points, SectionGrid

BOX_COLOUR, OUTLINE_COLOUR, ARTEFACT_COLOUR = "#ffe14d", "#19e3ff", "#ff4fc3"
SUMMED_IONS = 32


def summed_ions(result: Any) -> NDArray[np.float64]:
    """A picture of the tissue as measured, (ny, nx): the mean of up to 32 ions, NaN = not measured.

    Each ion is divided by its own 99.5 % level, so that no single one decides.
    """
    rows = np.unique(np.linspace(0, len(result.ions) - 1, SUMMED_IONS).round().astype(int))
    total = np.zeros(result.grid.shape_px)
    for mz in result.ions["mz"].iloc[rows]:
        image = np.asarray(result.measured(float(mz)), dtype=np.float64)
        total += np.minimum(image / figures.robust_top(image), 1.0)
    return total / len(rows)


def outlines_um(image: NDArray[np.float64], grid: SectionGrid) -> list[Points]:
    """Outline of the tissue in a measured picture, polylines in section micrometres."""
    smooth = ndimage.gaussian_filter(np.nan_to_num(image, nan=0.0), 0.7)
    level = figures.otsu_threshold(smooth)
    return figures.contours_um(smooth, level, grid) if np.isfinite(level) else []


def describe(alignment: Alignment, grid: SectionGrid, start: Alignment | None = None) -> list[str]:
    """What the alignment does, in sentences: orientation, size, shift, bend.

    The angle is the one by which the measurement has to be turned to lie on the slide as displayed
    (y down), after any mirroring.
    """
    a = alignment.matrix
    mirrored = np.linalg.det(a) < 0
    # Of the whole affine part, as the search tells it: one axis alone would take a shear for a turn.
    upright = a @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    angle = float(np.degrees(np.arctan2(upright[0, 1] - upright[1, 0], upright[0, 0] + upright[1, 1])))
    mirror = ""
    if mirrored:
        # A mirror top to bottom is one left to right and half a turn: say the one with less turning.
        mirror = "mirrored top to bottom"
        if abs(angle) > 90:
            mirror, angle = "mirrored left to right", angle - np.copysign(180.0, angle)
    turned = f"turned by {abs(angle):.1f}° {'clockwise' if angle > 0 else 'counter-clockwise'}"
    if abs(angle) < 0.05:
        turned = "not turned"
    scale = float(np.sqrt(abs(np.linalg.det(a))))
    sentences = [
        f"To lie on the slide, the measurement is {mirror + ' and ' if mirror else ''}{turned}.",
        f"Its size on the slide is {100 * scale:.1f} % of its nominal size.",
    ]
    centres = grid.centres_um().reshape(-1, 2)
    if start is not None:
        moved = np.hypot(*(alignment.map(centres) - start.map(centres)).T)
        sentences.append(
            f"Compared with placing its centre on the slide's, its pixels moved by {np.median(moved):.0f} µm "
            f"(median; {np.median(moved) / np.mean(grid.pitch_um):.1f} measured pixels)."
        )
    if alignment.displacement is not None:
        bend = np.hypot(*alignment.displacement.at(centres).T)
        sentences.append(f"A smooth bend follows, of at most {bend.max():.0f} µm (median {np.median(bend):.0f} µm).")
    return sentences


def evidence_rows(alignment: Alignment) -> list[tuple[str, str]]:
    """The scores that an alignment was accepted on, as label and text."""
    return _evidence(alignment)[0]


def _evidence(alignment: Alignment) -> tuple[list[tuple[str, str]], list[dict[str, str]]]:
    """The scores that the alignment was accepted on, and its stages."""
    evidence = alignment.evidence
    labels = {
        "source": "how it was obtained",
        "held_out_r2": "held-out R² at the placement found",
        "runner_up_r2": "held-out R² of the best other orientation",
        "null_r2": "held-out R² of random placements (highest)",
        "pairs": "landmark pairs",
        "residual_um": "median landmark residual, µm",
    }
    rows = []
    for key, label in labels.items():
        value = evidence.get(key)
        if value is None:
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = max(value, default=None)
        text = value if isinstance(value, str) else number(value, ".0f" if isinstance(value, int) else ".2f")
        rows.append((label, text))
    stages = [
        {
            "stage": str(stage.get("stage", "")),
            "r2": number(stage.get("r2"), ".3f"),
            "kept": "kept" if stage.get("kept") else "not kept: no better on held-out blocks",
        }
        for stage in evidence.get("stages") or []
    ]
    return rows, stages


def joint_words(model: Mapping[str, Any]) -> str:
    """Whether registering jointly with the network was worth anything; empty where it was not tried."""
    notes = model.get("notes") or {}
    if notes.get("t1_left_joint") is None or notes.get("t1_left") is None:
        return ""
    frozen, joint = (1 - notes[key] for key in ("t1_left", "t1_left_joint"))
    moved = number(notes.get("joint_moved_px"), ".2f")
    verdict = "It is kept" if notes.get("joint_kept") else "It is not kept: that is not enough ahead"
    return (
        f"Registered jointly with the network, the section moved by {moved} measured pixels (median), and the held-out "
        f"R² of the closed form is {joint:.4f} with it against {frozen:.4f} with the registration frozen. {verdict}."
    )


def artefact_lines(result: Any, mpp_um: tuple[float, float]) -> list[figures.Line]:
    """Outlines of what is not used of the slide, in slide micrometres."""
    kinds = result.artefacts()
    if kinds is None or not kinds.any():
        return []
    shape = (int(kinds.shape[0]), int(kinds.shape[1]))
    grid = SectionGrid(shape, mpp_um)
    return [figures.Line(line, ARTEFACT_COLOUR) for line in figures.contours_um(kinds > 0, 0.5, grid)]


NAMES = {"tear": "A tear", "fold": "A fold", "ink": "An ink mark"}


def artefact_words(provenance: Mapping[str, Any]) -> list[str]:
    """What is not used of the slide, and who said so, in sentences."""
    told = provenance.get("artefacts") or {}
    out = []
    for entry in told.get("masked") or []:
        area = f"{entry['area_um2'] / 1e6:.3g} mm²"
        if entry["kind"] == "ink" and entry["decided_by"] == "colour":
            out.append(f"Ink or the like on {area} of the slide, told by its colour, is not used.")
        elif entry["kind"] == "piece":
            out.append(f"Other pieces of tissue on the slide ({area} with their surroundings) are not used.")
        else:
            out.append(
                f"{NAMES[entry['kind']]} of {area} on the slide is not used: {entry['measured_px']} measured pixels do "
                f"not show what the picture shows there (log likelihood ratio {entry['evidence']:.0f})."
            )
    if told.get("candidates_left_in"):
        out.append(
            f"{told['candidates_left_in']} more places look like a tear, a fold or ink and are used: the "
            "measurement shows them too, or cannot tell."
        )
    return out


def _window(shapes: Sequence[Points], slide_um: tuple[float, float]) -> tuple[float, float, float, float]:
    """A box around all outlines with a margin, kept near the slide."""
    points = np.concatenate(list(shapes))
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.1 * float((high - low).max())
    slide = np.asarray(slide_um)
    low = np.maximum(low - margin, -0.25 * slide)
    high = np.minimum(high + margin, 1.25 * slide)
    if (high - low <= 0).any():  # placed far off the slide: show the slide
        low, high = np.zeros(2), slide
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def alignment_section(result: Any, stain: NDArray[np.uint8], side_px: int) -> dict[str, Any]:
    """Words, evidence and pictures of the alignment.

    Args:
        result: The result.
        stain: (h, w, 3) uint8, the stain on the section grid.
        side_px: Longer side of the pictures.
    """
    grid, found, start = result.grid, result.alignment, result.alignment_start
    tissue = summed_ions(result)
    outlines = outlines_um(tissue, grid)
    border = figures.box_um(grid)
    placements = [("before", start), ("after", found)] if start is not None else [("as given", found)]
    overview, mpp_um = result.overview()
    overview = np.asarray(overview)
    slide_um = overview.shape[0] * mpp_um[0], overview.shape[1] * mpp_um[1]
    window = _window([placed.map(border) for _, placed in placements], slide_um)
    extent = window[2] - window[0], window[3] - window[1]
    slide_frame = frame_of(extent, figures.fit_shape(extent, side_px))
    pictures = []
    marks = artefact_lines(result, mpp_um)
    for label, placed in placements:
        lines = [figures.Line(placed.map(line), OUTLINE_COLOUR) for line in outlines]
        lines.append(figures.Line(placed.map(border), BOX_COLOUR, dashed=True))
        lines += marks
        drawn = figures.overlay(overview, mpp_um, lines, window, side_px)
        pictures.append(
            {
                "src": data_uri(figures.photo_jpeg(drawn), "jpeg"),
                "alt": f"the slide with the outline of the measured tissue, alignment {label}",
                "label": f"on the slide, {label}",
                "frame": slide_frame,
            }
        )
    shape = figures.fit_shape(grid.extent_um, side_px)
    photo = figures.resample_photo(stain, shape)
    mpp = grid.extent_um[0] / shape[0], grid.extent_um[1] / shape[1]
    drawn = figures.overlay(
        photo,
        mpp,
        [figures.Line(line, OUTLINE_COLOUR) for line in outlines],
        (0.0, 0.0, *grid.extent_um),
        side_px,
    )
    seen = figures.area_resample(tissue, shape)
    board = figures.checkerboard(photo, figures.colourise(seen, figures.robust_top(tissue)), np.isfinite(seen))
    section_frame = frame_of(grid.extent_um, shape)
    for label, alt, picture in (
        (
            "on the section grid",
            "the stain on the section grid, with the measured tissue's outline",
            drawn,
        ),
        ("checkerboard", "alternating squares of the stain and of the summed ions", board),
    ):
        source = data_uri(figures.photo_jpeg(picture), "jpeg")
        pictures.append({"src": source, "alt": alt, "label": label, "frame": section_frame})
    rows, stages = _evidence(found)
    return {
        "words": describe(found, grid, start),
        "joint": joint_words(result.provenance.get("model") or {}),
        "artefacts": artefact_words(result.provenance),
        "artefact_colour": ARTEFACT_COLOUR if marks else "",
        "pictures": pictures,
        "evidence": rows,
        "stages": stages,
        "box_colour": BOX_COLOUR,
        "outline_colour": OUTLINE_COLOUR,
    }
