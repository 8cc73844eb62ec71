"""The pixel pitch that an imzML states, in micrometres, or why it cannot be trusted."""

from __future__ import annotations

import math

import numpy as np

from deepfere.readers import imzml_head as head

LEAST_UM, MOST_UM = 0.01, 1e4
"""No instrument has smaller or larger pixels: the unit is wrong."""

# Metres and friends in micrometres, by Unit Ontology accession or by name.
UNITS_UM = {
    "UO:0000008": 1e6,
    "UO:0000015": 1e4,
    "UO:0000016": 1e3,
    "UO:0000017": 1.0,
    "UO:0000018": 1e-3,
    "meter": 1e6,
    "centimeter": 1e4,
    "millimeter": 1e3,
    "micrometer": 1.0,
    "micron": 1.0,
    "um": 1.0,
    "nanometer": 1e-3,
    "": 1.0,  # the convention where a file states none
}


def _length_um(terms: head.Terms, accession: str) -> tuple[float | None, str]:
    """A length in micrometres and, where it cannot be had, why."""
    if accession not in terms:
        return None, ""
    text, unit, name = terms[accession]
    scale = UNITS_UM.get(unit, UNITS_UM.get(unit.lower().replace("metre", "meter").replace("µ", "u")))
    if scale is None:
        return None, f"{name or accession} is in {unit!r}, not a length that is known"
    try:
        value = float(text) * scale
    except ValueError:
        return None, f"{name or accession} is {text!r}, not a number"
    if not (math.isfinite(value) and value > 0):
        return None, f"{name or accession} is {text}, not a positive length"
    return value, ""


def stated_pitch(settings: list[head.Terms]) -> tuple[tuple[float, float] | None, str]:
    """The one pitch (y, x) that all scanSettings agree on, or why there is none."""
    found: list[tuple[float, float]] = []
    for terms in settings:
        x, problem_x = _length_um(terms, "IMS:1000046")
        y, problem_y = _length_um(terms, "IMS:1000047")
        if problem_x or problem_y:
            return None, problem_x or problem_y
        if x is None and y is None:
            continue
        if x is None:
            return None, "states pixel size y but not x"
        if y is None:
            problem = _lone_size_problem(terms, x)
            if problem:
                return None, problem
        found.append((x if y is None else y, x))
    if not found:
        return None, "states no pixel size"
    if any(not np.allclose(f, found[0], rtol=1e-6) for f in found):
        sizes = " and ".join(f"{x:g} x {y:g} um" for y, x in dict.fromkeys(found))
        return None, f"its scanSettings contradict each other on the pixel size ({sizes})"
    if not all(LEAST_UM <= size <= MOST_UM for size in found[0]):
        y, x = found[0]
        return None, f"states a pixel size of {x:g} x {y:g} um (x, y), which cannot be meant"
    return found[0], ""


def _lone_size_problem(terms: head.Terms, size: float) -> str:
    """Why a pixel size given once, for both axes, cannot be believed; empty where it can.

    Older versions of the vocabulary called IMS:1000046 "pixel size" and meant an area; the image's outer
    dimensions tell, where they are there. A term named "pixel size x" is a length, and pixels are square.
    """
    agree, known = True, False
    for count_term, extent_term in (("IMS:1000042", "IMS:1000044"), ("IMS:1000043", "IMS:1000045")):
        extent, _ = _length_um(terms, extent_term)
        try:
            count = float(terms[count_term][0])
        except (KeyError, ValueError):
            continue
        if extent is None or count < 1:
            continue
        known = True
        # Extents are rounded to whole micrometres, and some count first to last centre.
        agree &= any(abs(extent - n * size) <= 1.0 + 0.02 * extent for n in (count, count - 1))
    name = terms["IMS:1000046"][2]
    if known and not agree:
        return f"its {name or 'pixel size'} {size:g} contradicts its dimensions (it may be an area)"
    if not known and name.strip().lower() == "pixel size":
        return f"its only 'pixel size', {size:g}, may be a length or an area"
    return ""
