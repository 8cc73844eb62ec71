"""The stage that settles which ions the sections of a study have in common."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.config import Config, digest
from deepfere.errors import InputError
from deepfere.measured.ions import (
    Source,
    known_kind,
    look_at_neighbours,
    of_region,
    open_source,
    own_axis,
    sample_source,
    with_structure,
)
from deepfere.measured.peaks import SharedIons, find_ions, refuse_none
from deepfere.measured.raster import plan_raster
from deepfere.measured.sampled import PeakSpec, Sample, load_sample, save_sample
from deepfere.measured.store import open_measured
from deepfere.measured.structure import Evidence
from deepfere.measured.tolerance import Tolerance
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.prepare import is_ingested, treatment_of
from deepfere.pipeline.side_by_side import SectionWorker, SideBySide
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.places import reading, writing
from deepfere.section import Section


def shared_ions(
    sections: list[Section],
    inputs: list[dict[str, str]],
    work: Workspace,
    config: Config,
    progress: Progress,
    failures: Failures,
    beside: SideBySide,
) -> SharedIons | None:
    """Ions for all sections, where not every one of them brings the same already.

    A section's spectra are sampled once, by whichever worker is free, and what they show is kept with its work: one
    sample is held at a time.

    Args:
        sections: Of the study.
        inputs: Digests of what the user gave, per section.
        work: Unfinished work.
        config: Settings.
        progress: Called with (stage, share).
        failures: Gets the sections that cannot be used.
        beside: Looks at them.

    Returns:
        The ions; None where a list is given, where there is one section, or where the sections share their axis.

    Raises:
        InputError: No ion is found, or what the sections measured is not the same.
        SectionFailures: A section is unusable, and ions are to be found over all.
    """
    if len(sections) < 2:
        return None
    looked = [_Look(section, digests, work, config) for section, digests in zip(sections, inputs, strict=True)]
    beside.each(LookWorker, ((look.section, look.inputs) for look in looked), partial(progress, "look"))
    broken = set(failures.names)
    usable = [look for look in looked if look.section.name not in broken]
    _refuse_mixtures(usable)
    if config.ingest.mz is not None or _one_axis(usable):
        return None
    beside.each(SampleWorker, ((look.section, look.inputs) for look in usable), partial(progress, "sample"))
    failures.stop("the ions are common to all sections: none is ingested before all can be sampled")
    # In an order of their own: the manifest's must not change a digit.
    usable.sort(key=lambda look: look.key)
    spec = _peak_spec(config)
    with work.stage("ions", [spec.to_dict(usable[0].kind), [look.key for look in usable]]) as facts:
        if facts is not None:
            ions = find_ions(lambda: (look.load() for look in usable), spec)
            if not len(ions):
                refuse_none(spec, "the sections of the study together")
            spectra = sum(look.load().spectra for look in usable)
            told = {"sampled_spectra": spectra, "sections": len(usable)}
            facts["mz"], facts["peaks"] = ions.tolist(), {**spec.to_dict(usable[0].kind), **told}
    found = work.facts("ions")
    ions, peaks = np.asarray(found["mz"], np.float64), found["peaks"]
    if spec.structure:
        beside.each(StructureWorker, ((look.section, look.inputs) for look in usable), partial(progress, "structure"))
        failures.stop("the ions are common to all sections: none is ingested before all were looked at")
        seen = (look.evidence() for look in usable)
        ions, peaks = with_structure(ions, peaks, seen, len(usable), "the sections of the study together")
    shared = SharedIons(ions, {**peaks, "axis": digest(ions.tolist())[:16]})
    for look in usable:
        failures.of(look.section.name, "sample", partial(look.check_range, shared.mz, spec))
    failures.stop("the ions are common to all sections: none is ingested before all were measured over them")
    return shared


def _peak_spec(config: Config) -> PeakSpec:
    given = config.ingest
    return PeakSpec(
        given.tolerance_ppm,
        mz_range=given.mz_range,
        tolerance_da=given.tolerance_da,
        structure=given.structure == "auto",
    )


def same_axis(one: NDArray[np.float64], other: NDArray[np.float64], tolerance: Tolerance) -> bool:
    """Whether two lists of m/z are the same within a tolerance."""
    return len(one) == len(other) and bool((np.abs(other - one) <= tolerance.half_da(one)).all())


@dataclass(frozen=True)
class _Look:
    """One section, as far as its ions are concerned."""

    section: Section
    inputs: dict[str, str]
    work: Workspace
    config: Config

    @property
    def key(self) -> list[str]:
        """What its sample depends on, whatever the section is called."""
        s = self.section
        return [self.inputs["msi"], digest([s.region, self.config.ingest.sampled()])]

    @cached_property
    def facts(self) -> dict[str, Any]:
        return self.work.facts("look", self.section.name)

    @property
    def kind(self) -> str:
        return self.facts["kind"]

    def run(self) -> None:
        """Note what the file says, and keep its axis where that is its ions."""
        section, folder = self.section, self.work.section(self.section.name)
        with self.work.stage("look", self.key, section.name) as facts:
            if facts is None:
                return
            folder.root.mkdir(parents=True, exist_ok=True)
            if is_ingested(section.msi):
                cube = open_measured(section.msi)
                axis: NDArray[np.float64] | None = cube.mz
                kind, polarity = cube.attrs.get("representation"), cube.attrs.get("polarity")
            else:
                source = self._spectra()
                axis, kind = own_axis(source), self.config.ingest.representation or source.representation
                polarity = getattr(source, "polarity", None)
                if axis is None:
                    known_kind(source, self.config.ingest.representation)
            facts.update(kind=kind, polarity=polarity, axis=None)
            if axis is not None:
                with writing(folder.axis) as path:
                    np.save(path, axis)
                facts["axis"] = digest(axis.tolist())

    def _spectra(self) -> Source:
        folder = self.work.section(self.section.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ingestion tells what it has to say
            return of_region(open_source(self.section.msi, str(folder.index)), self.section.region)

    def axis(self) -> NDArray[np.float64]:
        with reading(self.work.section(self.section.name).axis) as path:
            return np.load(path)

    def sample(self) -> None:
        """Look at a sample of its spectra."""
        section, folder = self.section, self.work.section(self.section.name)
        if is_ingested(section.msi):
            raise InputError(
                "is ingested: its ions were settled then, and are not those of the other sections",
                where=section.msi,
                remedy="give what it was ingested from, or ingest all with one target list (ingest.mz)",
            )
        with self.work.stage("sample", self.key, section.name) as facts:
            if facts is not None:
                source = self._spectra()
                kind = known_kind(source, self.config.ingest.representation)
                treatment, raster = treatment_of(self.config.ingest), plan_raster(source, "sum")
                treatment.check(source, kind, "automatic", self.facts["axis"] is not None)
                sample = sample_source(source, raster, kind, _peak_spec(self.config), treatment)
                with writing(folder.sample) as path:
                    save_sample(sample, path)

    def structure(self) -> None:
        """See what neighbouring pixels say of the ions that were found."""
        section, folder = self.section, self.work.section(self.section.name)
        ions = np.asarray(self.work.facts("ions")["mz"], np.float64)
        with self.work.stage("structure", [self.key, digest(ions.tolist())], section.name) as facts:
            if facts is not None:
                source = self._spectra()
                kind = known_kind(source, self.config.ingest.representation)
                treatment, raster = treatment_of(self.config.ingest), plan_raster(source, "sum")
                found = look_at_neighbours(source, raster, ions, kind, _peak_spec(self.config), treatment)
                with writing(folder.structure) as path:
                    np.savez(path, **vars(found))

    def evidence(self) -> Evidence:
        with reading(self.work.section(self.section.name).structure) as path, np.load(path) as data:
            return Evidence(**{name: data[name] for name in data.files})

    def load(self) -> Sample:
        with reading(self.work.section(self.section.name).sample) as path:
            return load_sample(path)

    def check_range(self, ions: NDArray[np.float64], spec: PeakSpec) -> None:
        """Refuse ions where nothing says that the section was measured there: they would be zero for no reason."""
        low, high = self.section.mz_range or self.load().mz_range
        width = spec.tolerance.half_da(ions)
        outside = ions[(ions + width < low) | (ions - width > high)]
        if len(outside):
            raise InputError(
                f"its spectra reach from m/z {low:.6g} to {high:.6g}, and {len(outside)} of the study's {len(ions)} "
                f"ions, first {outside[0]:.6g}, lie outside",
                where=self.section.msi,
                remedy="say in the manifest which range was scanned (mz_range: [100, 1000]): ions in it are then zero; "
                "or leave such ions out of the study (ingest.mz_range=[100,1000])",
            )


class LookWorker(SectionWorker):
    """Notes what the files say."""

    stage = "look"

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        _Look(section, inputs, self.folder, self.config).run()


class SampleWorker(SectionWorker):
    """Looks at a sample of the spectra."""

    stage = "sample"

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        _Look(section, inputs, self.folder, self.config).sample()


class StructureWorker(SectionWorker):
    """Looks at neighbouring pixels."""

    stage = "structure"

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        _Look(section, inputs, self.folder, self.config).structure()


def _one_axis(looks: list[_Look]) -> bool:
    """Whether every section brings its ions, and all the same."""
    if not looks or any(look.facts["axis"] is None for look in looks):
        return not looks
    first, known = looks[0].axis(), {looks[0].facts["axis"]}
    for look in looks[1:]:
        if look.facts["axis"] not in known:
            if not same_axis(first, look.axis(), _peak_spec(look.config).tolerance):
                return False
            known.add(look.facts["axis"])
    return True


def _refuse_mixtures(looks: list[_Look]) -> None:
    """Refuse sections whose intensities, or whose ions, are not the same quantity."""
    for what, remedy in (
        ("kind", "export them alike, or make two studies"),
        ("polarity", "make a study of each polarity"),
    ):
        seen: dict[str, str] = {}
        for look in looks:
            if look.facts[what] is not None:
                seen.setdefault(look.facts[what], look.section.name)
        if len(seen) > 1:
            named = " and ".join(f"{value} ({name})" for value, name in seen.items())
            raise InputError(f"the study's sections are {named}: they do not measure the same", remedy=remedy)
