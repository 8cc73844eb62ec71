"""The form of a description, and how regions, sizes and counts are worded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_LISTED = 12
TINY_PX = 16
TINY_SHARE = 0.01
"""A region is listed by itself from 16 pixels and this share of the largest one's pixels on."""


@dataclass(frozen=True)
class Description:
    """What was found at a path.

    Attributes:
        path: As given.
        kind: What it is, in a few words.
        facts: (name, value) in reading order.
        whole: Whether everything that belongs to it is there and readable as far as was checked; None where
            the question does not arise (an alignment, settings).
        problems: Why it is not whole, one line each.
    """

    path: str
    kind: str
    facts: tuple[tuple[str, str], ...]
    whole: bool | None
    problems: tuple[str, ...] = ()

    def fact(self, name: str) -> str | None:
        """The first value of that name, or None."""
        return next((value for key, value in self.facts if key == name), None)


@dataclass(frozen=True)
class Region:
    """Measured pixels that hang together.

    Attributes:
        pixels: How many.
        box_px: First row, row after the last, first column, column after the last.
    """

    pixels: int
    box_px: tuple[int, int, int, int]


class Notes:
    """Collects facts and problems; empty values are left out."""

    def __init__(self) -> None:
        self.facts: list[tuple[str, str]] = []
        self.problems: list[str] = []

    def add(self, name: str, value: object) -> None:
        """One more fact."""
        if value is not None and value != "":
            self.facts.append((name, str(value)))

    def problem(self, text: str) -> None:
        """One more reason why it is not whole."""
        self.problems.append(" ".join(text.split()))

    def done(self, path: object, kind: str, *, may_be_whole: bool = True) -> Description:
        """The description; ``may_be_whole`` is False where the question does not arise."""
        whole = not self.problems if may_be_whole else None
        return Description(str(path), kind, tuple(self.facts), whole, tuple(self.problems))


def measured_regions(mask: NDArray[np.bool_]) -> list[Region]:
    """Regions of measured pixels that touch by an edge or a corner, largest first.

    Args:
        mask: (ny, nx) True where measured.
    """
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))
    pixels = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    found = [
        Region(int(n), (box[0].start, box[0].stop, box[1].start, box[1].stop))
        for n, box in zip(pixels, ndimage.find_objects(labels), strict=True)
    ]
    return sorted(found, key=lambda region: (-region.pixels, region.box_px))


def add_mask(notes: Notes, mask: NDArray[np.bool_], pitch_um: tuple[float, float] | None) -> None:
    """Facts on the grid: its size, how much of it was measured, and the regions with their boxes."""
    pixels, cells = int(mask.sum()), mask.size
    notes.add("grid", size_text((mask.shape[0], mask.shape[1]), pitch_um))
    missing = f", {cells - pixels:,} of the grid not ({100 * (1 - pixels / cells):.1f} %)" if cells > pixels else ""
    notes.add("measured", count_text(pixels, "pixel") + missing)
    found = measured_regions(mask)
    if not found:
        return
    # Strays of the stage and the points of a sparse raster are summed up: the pieces of tissue stay visible.
    least = max(TINY_SHARE * found[0].pixels, min(TINY_PX, found[0].pixels))
    listed = [region for region in found if region.pixels >= least][:MAX_LISTED]
    notes.add("regions", f"{len(found):,} that do not touch" if len(found) > 1 else "1")
    for number, region in enumerate(listed, 1):
        y0, y1, x0, x1 = region.box_px
        if pitch_um is None:
            box = f"rows {y0} to {y1}, columns {x0} to {x1} (pixels: the pitch is not known)"
        else:
            py, px = pitch_um
            box = f"y {y0 * py:g} to {y1 * py:g} um, x {x0 * px:g} to {x1 * px:g} um"
        notes.add(f"region {number}", f"{count_text(region.pixels, 'pixel')}, {box}")
    rest = found[len(listed) :]
    if rest:
        notes.add("further regions", f"{len(rest):,}, {count_text(sum(r.pixels for r in rest), 'pixel')} in all")


def count_text(number: int, what: str) -> str:
    """ "1 pixel", "2,000 pixels"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def pair_text(values: Iterable[float]) -> str:
    """One number where both are the same, else height x width."""
    return " x ".join(f"{v:g}" for v in dict.fromkeys(values))


def size_text(shape_px: tuple[int, int], pixel_um: tuple[float, float] | None) -> str:
    """Pixels and, where known, millimetres; height first."""
    text = f"{shape_px[0]:,} x {shape_px[1]:,} pixels (height x width)"
    if pixel_um is not None:
        text += f", {shape_px[0] * pixel_um[0] / 1000:.4g} x {shape_px[1] * pixel_um[1] / 1000:.4g} mm"
    return text


def sample(count: int, most: int) -> NDArray[np.int64]:
    """Up to ``most`` of ``count`` positions, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
