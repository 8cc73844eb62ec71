"""Small files that people write: alignments, landmarks, study manifests, settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from deepfere.config import read_yaml
from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.inspect.notes import Description, Notes, count_text, pair_text


def alignment(path: Path) -> Description:
    """An alignment JSON.

    Raises:
        InputError: It is JSON of something else, or none.
    """
    found = Alignment.load(path)
    notes = Notes()
    add_alignment(notes, found)
    return notes.done(path, "alignment, section um to slide um", may_be_whole=False)


def add_alignment(notes: Notes, found: Alignment) -> None:
    """What an alignment does, in words, and the plain values of its evidence."""
    matrix = found.matrix
    mirrored = bool(np.linalg.det(matrix) < 0)
    turned = matrix @ np.diag([1.0, -1.0 if mirrored else 1.0])
    # y points down, so a section's x axis that maps towards +y has turned clockwise on the screen.
    angle = float(np.degrees(np.arctan2(turned[0, 1] - turned[1, 0], turned[0, 0] + turned[1, 1])))
    way = "clockwise" if angle > 0 else "counter-clockwise"
    stretch = np.linalg.svd(matrix, compute_uv=False)[::-1]
    notes.add("mirrored", "left to right, before turning" if mirrored else "no")
    notes.add("turned", "no" if abs(angle) < 0.005 else f"{abs(angle):.2f} degrees {way}, as displayed")
    notes.add("scale", pair_text(round(float(s), 4) for s in stretch))
    notes.add("offset", f"y {found.offset_um[0]:g} um, x {found.offset_um[1]:g} um")
    if found.displacement is None:
        notes.add("bend", "none")
    else:
        knots = found.displacement.coefficients_um
        largest = float(np.hypot(knots[..., 0], knots[..., 1]).max()) if knots.size else 0.0
        spacing = pair_text(found.displacement.spacing_um)
        notes.add(
            "bend", f"{knots.shape[0]} x {knots.shape[1]} knots every {spacing} um, coefficients up to {largest:.4g} um"
        )
    for key, value in found.evidence.items():
        if isinstance(value, str | int | float) and key not in ("flip", "rotation_deg", "scale"):
            notes.add(f"evidence, {key}", f"{value:.4g}" if isinstance(value, float) else value)


def landmarks(path: Path) -> Description:
    """A landmark CSV, with how well one affine fits it.

    Raises:
        InputError: See `Alignment.from_landmarks`.
    """
    notes = Notes()
    add_alignment(notes, Alignment.from_landmarks(path))
    return notes.done(path, "landmarks, section um to slide um", may_be_whole=False)


def teaching_points(path: Path) -> Description:
    """A flexImaging sequence: its picture, and what was measured where on it.

    Raises:
        InputError: See `deepfere.readers.mis.read_mis`.
    """
    from deepfere.readers.mis import read_mis

    found, notes = read_mis(path), Notes()
    notes.add("picture", f"{found.image}, {found.mpp_um:.4g} um per pixel")
    for area in found.areas:
        _, size = area.extent_um(found.matrix)
        notes.add(
            f"area, {area.name}",
            f"{pair_text(round(float(s), 1) for s in size)} um, raster {pair_text(area.raster_um)} um (x, y)",
        )
    return notes.done(path, "teaching points", may_be_whole=False)


def study_or_settings(path: Path) -> Description:
    """A YAML file: a study where it has ``sections``, else settings.

    Raises:
        InputError: It is neither.
    """
    try:
        values = read_yaml(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read as YAML ({error})", where=path, remedy="correct it") from error
    if isinstance(values, dict) and "sections" in values:
        return study(path)
    from deepfere.config import Config, load_config

    if not isinstance(values, dict) or not values.keys() & set(Config.model_fields):
        raise InputError("is neither a study nor settings", where=path, remedy='give "sections:" or known settings')
    settings = load_config(path)
    notes = Notes()
    for key, value in values.items():
        notes.add(str(key), json.dumps(value, default=str))
    notes.add("digest", settings.digest()[:16])
    return notes.done(path, "settings", may_be_whole=False)


def study(path: Path) -> Description:
    """A study manifest; it is whole when every file that it names exists.

    Raises:
        InputError: See `deepfere.section.load_study`.
    """
    from deepfere.section import load_study

    found = load_study(path)
    notes = Notes()
    notes.add("sections", len(found.sections))
    for section in found.sections:
        files = {"slide": section.slide, "alignment": section.alignment, "landmarks": section.landmarks}
        texts = [section.msi] + [f"{key} {value}" for key, value in files.items() if value]
        texts += [f"pitch {pair_text(section.pitch_um)} um"] if section.pitch_um else []
        texts += [f"mpp {pair_text(section.slide_mpp_um)} um"] if section.slide_mpp_um else []
        notes.add(section.name, ", ".join(texts))
        for value in (section.msi, *files.values()):
            if value and "://" not in value and not Path(value).exists():
                notes.problem(f"section {section.name}: {value} does not exist")
    return notes.done(path, f"study of {count_text(len(found.sections), 'section')}")
