"""The stages before learning: ingest, align, tile (plane cache and footprint averages)."""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.alignment.bend import bend
from deepfere.alignment.overview import MeasuredOverview, StainOverview
from deepfere.alignment.placement import centred_alignment, describe
from deepfere.alignment.refine import AFFINE_STAGES, refine
from deepfere.alignment.score import slide_cover
from deepfere.alignment.search import MIN_COVER, search
from deepfere.alignment.witness import expected_tissue, judge, masked_areas
from deepfere.config import Config, IngestSettings
from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.measured.factors import factor_weight, factorise
from deepfere.measured.ingest import ingest
from deepfere.measured.lock_mass import LockMass
from deepfere.measured.peaks import SharedIons
from deepfere.measured.profile import ProfileSpec
from deepfere.measured.store import Measured, open_measured, sign
from deepfere.measured.tolerance import Targets, Tolerance
from deepfere.measured.treatment import Treatment
from deepfere.model.artefacts import ARTEFACTS
from deepfere.model.damage import COARSEST_PITCH, find_candidates, with_small
from deepfere.model.paper import check_size
from deepfere.pipeline.overview import (
    ask_which,
    naming_pieces,
    section_overview,
    section_slide,
    telling_pieces,
    unnamed_pieces,
)
from deepfere.pipeline.workspace import Progress, SectionFolder, Workspace
from deepfere.places import UrlPath, copy_tree, place, reading, writing
from deepfere.readers.digest import tree_digest
from deepfere.readers.imzml import IMZML, msi_digest
from deepfere.readers.mis import MIS, read_mis
from deepfere.readers.slide_damaged import DamagedTiles
from deepfere.readers.slide_zarr import is_zarr
from deepfere.readers.table import is_table, table_digest
from deepfere.section import Section
from deepfere.store import remove
from deepfere.targets import Target
from deepfere.tiling.plan import check_factor


@dataclass(frozen=True)
class Prepared:
    """A section ready to learn from.

    Attributes:
        section: What the user gave.
        folder: Its work.
        measured: The ingested cube.
        factor: High-resolution pixels per measured pixel and axis.
    """

    section: Section
    folder: SectionFolder
    measured: Measured
    factor: int

    def cube(self, config: Config) -> NDArray[np.float32]:
        """(M, ny, nx) in the chosen normalisation, 0 where not measured."""
        return np.nan_to_num(self.measured.cube(config.ingest.normalisation), copy=False, nan=0.0)


def ingest_stage(
    section: Section,
    inputs: dict[str, str],
    work: Workspace,
    config: Config,
    progress: Progress,
    shared: SharedIons | None = None,
) -> None:
    """ImzML, or a table of pixels -> ``measured.zarr``; with the ions that a study found, where it did."""
    folder = work.section(section.name)
    found = None if shared is None else [shared.mz.tolist(), shared.peaks]
    depends = [inputs["msi"], config.ingest.model_dump(), section.pitch_um, section.region, found]
    with work.stage("ingest", depends, section.name) as facts:
        if facts is None:
            return
        remove(folder.measured)
        folder.root.mkdir(parents=True, exist_ok=True)
        if is_ingested(section.msi):
            _take_over(section, folder, config.ingest)
            facts["warnings"] = _notes(section, folder, config)
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ingest(
                section.msi,
                str(folder.measured),
                pitch_um=section.pitch_um,
                mz=shared or targets_of(config.ingest),
                mz_range=config.ingest.mz_range,
                tolerance_ppm=config.ingest.tolerance_ppm,
                tolerance_da=config.ingest.tolerance_da,
                structure=config.ingest.structure == "auto",
                representation=config.ingest.representation,
                treatment=treatment_of(config.ingest),
                reference_mz=config.ingest.reference_mz,
                duplicates=config.ingest.duplicates,
                band_rows=config.ingest.band_rows,
                index_cache=str(folder.index),
                region=section.region,
                progress=lambda done, total: progress("ingest", done / max(total, 1)),
            )
        sign(str(folder.measured), inputs["msi"])
        told = sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})
        facts["warnings"] = told + _notes(section, folder, config)


def _notes(section: Section, folder: SectionFolder, config: Config) -> list[str]:
    """What is to be known about the normalisation; refuses one that cannot be had."""
    try:
        notes = open_measured(str(folder.measured)).normalisation_notes(config.ingest.normalisation)
    except InputError as error:
        raise InputError(error.what, where=section.msi, remedy=error.remedy) from error
    return [f"{section.msi}: {note}" for note in notes]


def treatment_of(settings: IngestSettings) -> Treatment:
    """What is done to spectra first."""
    lock, s = settings.lock_mass_mz, settings
    return Treatment(
        None if lock is None else LockMass(tuple(lock), s.lock_mass_tolerance_ppm),
        ProfileSpec(s.baseline, s.baseline_width_ppm, s.smoothing, s.smoothing_points),
    )


def targets_of(settings: IngestSettings) -> list[float] | Targets | None:
    """The target list, plain m/z where no ion has a window of its own."""
    given = settings.mz
    plain = [one for one in given or () if not isinstance(one, Target)]
    if given is None or len(plain) == len(given):
        return None if given is None else plain
    each = [one if isinstance(one, Target) else Target(mz=one) for one in given]
    ppm = [settings.tolerance_ppm if one.tolerance_ppm is None else one.tolerance_ppm for one in each]
    da = [settings.tolerance_da if one.tolerance_da is None else one.tolerance_da for one in each]
    return Targets(np.array([one.mz for one in each]), Tolerance(np.array(ppm), np.array(da)))


def is_ingested(msi: str) -> bool:
    """Whether the measurement is a cube that was ingested before instead of an imzML or a table."""
    where = place(msi)
    if where.suffix.lower() in IMZML:
        return False
    return is_zarr(msi) if isinstance(where, UrlPath) else where.is_dir() and not is_table(msi)


def msi_input_digest(msi: str) -> str:
    """Content digest of a measurement, whatever it is.

    Raises:
        InputError: It is missing or cannot be read.
    """
    if is_table(msi):
        return table_digest(msi)
    if not is_ingested(msi):
        return msi_digest(msi)
    if msi.lower().startswith(("http://", "https://")):
        raise InputError(
            "is ingested, and a web server does not say which files it has", where=msi, remedy="copy it, or give s3://"
        )
    return tree_digest(msi)


def _take_over(section: Section, folder: SectionFolder, settings: IngestSettings) -> None:
    """Copy an ingested cube; the settings of its ingestion stand, and others that were given are refused."""
    cube, plain = open_measured(section.msi), IngestSettings()
    given: dict[str, bool] = {
        "pitch-um": section.pitch_um is not None,
        "region": section.region not in (None, cube.attrs.get("region")),
        "mz": settings.mz is not None and not _same_ions(cube, targets_of(settings)),
        "ingest.mz_range": settings.mz_range is not None and list(settings.mz_range) != _range_of(cube),
        "tolerance-ppm": settings.tolerance_ppm not in (plain.tolerance_ppm, cube.tolerance_ppm),
        "ingest.tolerance_da": settings.tolerance_da not in (plain.tolerance_da, cube.attrs.get("tolerance_da")),
        "representation": settings.representation not in (plain.representation, cube.attrs.get("representation")),
        "lock-mass": settings.lock_mass_mz not in (None, cube.attrs.get("lock_mass", {}).get("mz")),
        "ingest.baseline": settings.baseline not in (plain.baseline, cube.attrs.get("profile", {}).get("baseline")),
        "ingest.smoothing": settings.smoothing not in (plain.smoothing, cube.attrs.get("profile", {}).get("smoothing")),
        "reference-mz": settings.reference_mz not in (None, cube.attrs.get("reference_mz")),
        "duplicates": settings.duplicates not in (plain.duplicates, cube.attrs.get("duplicates")),
    }
    for name in (name for name, refused in given.items() if refused):
        words = [word for word in name.removeprefix("ingest.").split("-") if word not in ("um", "ppm")]
        raise InputError(
            f"{section.msi} is ingested: its {' '.join(words)} was settled then",
            where=name if "." in name else f"--{name}",
            remedy="leave it out, or give what it was ingested from",
        )
    copy_tree(place(section.msi), folder.measured)


def _range_of(cube: Measured) -> list[float] | None:
    found = cube.attrs.get("peaks", {}).get("mz_range")
    return None if found is None else [float(mz) for mz in found]


def _same_ions(cube: Measured, given: list[float] | Targets | None) -> bool:
    wanted = given.mz if isinstance(given, Targets) else np.unique(np.asarray(given or [], np.float64))
    width = cube.tolerance.half_da(cube.mz)
    if len(wanted) != len(cube.mz) or (np.abs(wanted - cube.mz) > width).any():
        return False
    return not isinstance(given, Targets) or np.allclose(given.tolerance.half_da(cube.mz), width, rtol=1e-9, atol=0)


def prepared(section: Section, work: Workspace, config: Config) -> Prepared:
    """An ingested section with its factor decided."""
    folder = work.section(section.name)
    measured = open_measured(str(folder.measured))
    mpp = None
    if section.slide and config.guide:
        with closing(section_slide(section, config)) as slide:
            mpp = slide.mpp_um
    factor = check_factor(config.factor, measured.grid, mpp)
    if config.guide and config.model.tier == "paper":
        check_size(measured.grid.refine(factor).shape_px, config.paper.max_px)
    return Prepared(section, folder, measured, factor)


def load_alignment(folder: SectionFolder) -> Alignment:
    """What `align_stage` found."""
    with reading(folder.alignment) as path:
        return Alignment.load(path)


def measured_overview(prep: Prepared, config: Config) -> MeasuredOverview:
    """The section's own leading factors, for the alignment."""
    (factors,) = factorise([prep.cube(config)], [prep.measured.mask], config.model.max_factors)
    return MeasuredOverview.build(factors.images, prep.measured.mask, factor_weight(factors), prep.measured.grid)


def align_stage(prep: Prepared, inputs: dict[str, str], work: Workspace, config: Config, progress: Progress) -> None:
    """Slide and measurement -> ``alignment.json``; user-given alignments and landmarks win."""
    section, folder = prep.section, prep.folder
    given = {name: section.model_dump(mode="json")[name] for name in ("slide_mpp_um", "pitch_um", "slide_region")}
    settings = [
        config.ingest.model_dump(),
        config.align.model_dump(),
        config.model.max_factors,
        config.artefacts,
        config.slide.icc,
    ]
    depends = [inputs, *settings, given, work.facts("ingest", section.name).get("fingerprint")]
    with work.stage("align", depends, section.name) as facts:
        if facts is None:
            return
        placed = section.alignment or section.landmarks
        several = None if placed else unnamed_pieces(section, config)
        ask_which(several, section, float(prep.measured.mask.sum() * np.prod(prep.measured.grid.pitch_um)))
        pitch = float(np.mean(prep.measured.grid.pitch_um))
        stain, rgb, mpp_um = section_overview(section, config, pitch)
        measured = measured_overview(prep, config)
        start = centred_alignment(prep.measured.grid, stain.extent_um, np.eye(2))
        if not np.ptp(measured.images[:, measured.mask], axis=1).any():
            raise InputError(
                "no ion differs from pixel to pixel",
                where=section.msi,
                remedy="check the file and the ions, or --no-guide",
            )
        if section.alignment:
            found = Alignment.load(section.alignment).with_evidence(source="given")
        elif section.landmarks:
            found = _placed_by_hand(section.landmarks, prep, mpp_um)
        else:
            try:
                best, _ = search(
                    measured,
                    stain,
                    angle_step_deg=config.align.angle_step_deg,
                    refined=config.align.candidates,
                    progress=lambda share: progress("align", 0.7 * share),
                )
            except InputError as error:
                raise naming_pieces(error, several, section, config, prep.measured.grid) from error
            found = refine(measured, stain, best, AFFINE_STAGES)
            progress("align", 0.8)
            found = bend(measured, stain, found, lambda share: progress("align", 0.8 + 0.2 * share))
            facts["warnings"] = telling_pieces(several, found, prep.measured.grid)
        flip, rotation, scale = describe(found)
        cover = slide_cover(measured, stain, found)
        check_cover(cover, section, stain.damaged)
        found = found.with_evidence(flip=flip, rotation_deg=rotation, scale=scale, slide_cover=cover)
        for alignment, where in ((found, folder.alignment), (start, folder.alignment_start)):
            with writing(where) as path:
                alignment.save(path)
        kinds = np.zeros(rgb.shape[:2], np.uint8)
        if config.artefacts == "auto":
            kinds, facts["artefacts"], facts["left_in"] = _artefacts(measured, stain, found)
            if max(stain.spacing_um) > COARSEST_PITCH * float(np.mean(measured.grid.pitch_um)):
                size = f"{max(stain.spacing_um):.3g} um"
                warning = f"tears and folds were not looked for: the slide's overview, {size} per pixel, is too coarse"
                facts["warnings"] = [*facts.get("warnings", []), warning]
        spacing = np.asarray(stain.spacing_um)
        if stain.elsewhere is not None and stain.elsewhere.any():
            kinds[stain.elsewhere] = ARTEFACTS.index("piece")
            area = float(stain.elsewhere.sum() * np.prod(stain.spacing_um))
            told = {"kind": "piece", "area_um2": area, "decided_by": f"slide_region {section.slide_region}"}
            facts["artefacts"] = [told, *facts.get("artefacts", [])]
        with writing(folder.overview) as path:
            np.savez_compressed(path, rgb=rgb, spacing_um=spacing, artefacts=kinds)
        facts["reference"] = stain.reference.to_dict()
        facts["damaged_tiles"] = stain.damaged.places
        ink = kinds == ARTEFACTS.index("ink")
        damage = (kinds > 0) & ~ink & (kinds != ARTEFACTS.index("piece"))
        for name, marks in (("ink_share", ink), ("damage_share", damage)):
            facts[name] = float(marks.sum() / max(1, (marks | (stain.planes[5] > 127)).sum()))
        progress("align", 1.0)


def check_cover(cover: float, section: Section, damaged: DamagedTiles) -> None:
    """Refuse a slide that shows too little of the section, some of it perhaps damaged.

    Raises:
        InputError: It does.
    """
    if cover >= MIN_COVER:
        return
    share = f"{100 * cover:.0f} % of the measured tissue; at least 70 % is needed"
    if damaged:
        raise InputError(
            f"is damaged in {damaged.text()}, and what can be read of it covers {share}",
            where=section.slide,
            remedy="copy or scan it again",
        )
    raise InputError(
        f"covers {share}",
        where=section.slide,
        remedy="give a slide that shows the section, or correct the alignment, --pitch-um or --slide-mpp-um",
    )


def _artefacts(
    measured: MeasuredOverview, stain: StainOverview, alignment: Alignment
) -> tuple[NDArray[np.uint8], list[dict[str, Any]], int]:
    """Kind (h, w) of what is not used of the overview, index into `ARTEFACTS`; what that is; candidates left in."""
    pitch = float(np.mean(measured.grid.pitch_um))
    kinds = np.zeros(stain.planes.shape[1:], np.uint8)
    kinds[stain.artefacts.mask] = ARTEFACTS.index("ink")
    expected = expected_tissue(measured, stain, alignment)
    candidates = find_candidates(stain.planes, stain.reference, stain.spacing_um, pitch, expected)
    candidates, verdicts = judge(measured, stain, alignment, candidates)
    masked = np.array([False, *[v.masked for v in verdicts]])
    proven = np.where(masked[candidates.labels], candidates.labels, 0)
    damage = with_small(proven, candidates, stain.spacing_um, pitch)
    damage[stain.artefacts.mask] = 0
    value = np.array([0, *[ARTEFACTS.index(v.kind) for v in verdicts]], np.uint8)
    kinds[damage > 0] = value[damage[damage > 0]]
    found = masked_areas(verdicts, damage, stain.spacing_um)
    if stain.artefacts.mask.any():
        area = float(stain.artefacts.mask.sum() * np.prod(stain.spacing_um))
        found.insert(0, {"kind": "ink", "area_um2": area, "decided_by": "colour"})
    return kinds, found, len({v.whole for v in verdicts}) - len({v.whole for v in verdicts if v.masked})


def _placed_by_hand(landmarks: str, prep: Prepared, mpp_um: tuple[float, float]) -> Alignment:
    if Path(landmarks).suffix.lower() == MIS:
        return read_mis(landmarks).alignment(prep.measured.grid, str(prep.section.slide), mpp_um)
    return Alignment.from_landmarks(landmarks)
