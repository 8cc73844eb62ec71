"""The form of a description, and how regions, sizes and counts are worded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.regions import find_regions

MAX_LISTED = 12


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


class Notes:
    """Collects facts and problems; empty values are left out."""

    def __init__(self) -> None:
        self.facts: list[tuple[str, str]] = []
        self.problems: list[str] = []

    def add(self, name: str, value: object) -> None:
        """One more fact."""
        if value is not None and value != "":
            self.facts.append((name, str(value)))

    def fact(self, name: str) -> str | None:
        """The first value of that name, or None."""
        return next((value for key, value in self.facts if key == name), None)

    def problem(self, text: str) -> None:
        """One more reason why it is not whole."""
        self.problems.append(" ".join(text.split()))

    def done(self, path: object, kind: str, *, may_be_whole: bool = True) -> Description:
        """The description; ``may_be_whole`` is False where the question does not arise."""
        whole = not self.problems if may_be_whole else None
        return Description(str(path), kind, tuple(self.facts), whole, tuple(self.problems))


def add_mask(notes: Notes, mask: NDArray[np.bool_], pitch_um: tuple[float, float] | None) -> None:
    """Facts on the grid: its size, how much of it was measured, and the regions with their boxes."""
    pixels, cells = int(mask.sum()), mask.size
    notes.add("grid", size_text((mask.shape[0], mask.shape[1]), pitch_um))
    missing = f", {cells - pixels:,} of the grid not ({100 * (1 - pixels / cells):.1f} %)" if cells > pixels else ""
    notes.add("measured", count_text(pixels, "pixel") + missing)
    _, found = find_regions(mask)
    notes.add("regions", f"{len(found):,}")
    for region in found[:MAX_LISTED]:
        (y0, x0), (ny, nx) = region.start_px, region.shape_px
        if pitch_um is None:
            box = f"rows {y0} to {y0 + ny}, columns {x0} to {x0 + nx} (pixels: the pitch is not known)"
        else:
            py, px = pitch_um
            box = f"y {y0 * py:g} to {(y0 + ny) * py:g} um, x {x0 * px:g} to {(x0 + nx) * px:g} um"
        notes.add(f"region {region.number}", f"{count_text(region.pixels, 'pixel')}, {box}")
    rest = found[MAX_LISTED:]
    if rest:
        notes.add("further regions", f"{len(rest):,}, {count_text(sum(r.pixels for r in rest), 'pixel')} in all")
    specks = pixels - sum(region.pixels for region in found)
    if specks:
        notes.add("specks", f"{count_text(specks, 'pixel')} in no region")


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
