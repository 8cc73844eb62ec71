"""Which ions a measurement gets: a given list, the file's own axis, or what a sample of its spectra shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.peaks import SharedIons, found_ions
from deepfere.measured.raster import Raster, batches, in_image_order, plan_raster
from deepfere.measured.reduce import (
    Reduce,
    Reducer,
    ascending,
    check_axis,
    refuse_range,
    refuse_twice,
    refuse_values,
    shared_axis,
)
from deepfere.measured.regions import choose_region
from deepfere.measured.sampled import PeakSpec, Sample, Spectra, sample_centroids, sample_profiles, sample_rows
from deepfere.measured.structure import Evidence, evidence, neighbours, nothing_seen, structured
from deepfere.measured.table import MAX_VARIABLES, TableReducer, sample_table
from deepfere.measured.tolerance import Targets
from deepfere.measured.treatment import UNTREATED, Treatment, true_mz
from deepfere.readers.imzml import MIXED, ImzmlIndex, read_index
from deepfere.readers.imzml_arrays import read_arrays
from deepfere.readers.ranges import open_binary
from deepfere.readers.table import Table, is_table, open_table
from deepfere.readers.table_rows import RowReader

Source = ImzmlIndex | Table


def open_source(path: str | Path, index_cache: str | Path | None = None) -> Source:
    """An imzML's index (see `read_index`), or a table.

    Raises:
        InputError: It holds spectra of both polarities, which do not measure the same; or see there.
    """
    if is_table(path):
        return open_table(path)
    index = read_index(path, cache=index_cache)
    if index.polarity == MIXED:
        raise InputError("holds spectra of both polarities", where=path, remedy="export each polarity alone")
    return index


def of_region(source: Source, region: int | str | None) -> Source:
    """The spectra of a region alone; see `choose_region`.

    Raises:
        InputError: There are several and none is chosen, or there is none of that number.
    """
    whole = plan_raster(source, "sum")
    chosen = choose_region(whole.mask, region, whole.origin_px, source.path)
    if int(whole.counts.sum(where=chosen)) == len(source):
        return source
    inside = chosen.reshape(-1)
    return source.only(np.concatenate([begin + np.flatnonzero(inside[places]) for begin, places in whole.pixels()]))


def own_axis(source: Source) -> NDArray[np.float64] | None:
    """The m/z (A,), ascending, that all spectra share and that are the ions; None where peaks have to be found."""
    if isinstance(source, Table):
        variables = source.sorted_mz()[0]
        return variables if len(variables) <= MAX_VARIABLES else None
    with open_binary(source.ibd_path) as ibd:
        axis = shared_axis(source, ibd)
    return None if axis is None else np.sort(axis, kind="stable")


def known_kind(source: Source, representation: str | None) -> str:
    """ "centroid" or "profile".

    Raises:
        InputError: Nothing says which.
    """
    kind = representation or source.representation
    if kind is None:
        raise InputError(
            "says neither centroid nor profile",
            where=source.path,
            remedy="give --representation (ingest.representation)",
        )
    return kind


def sample_source(
    source: Source, raster: Raster, kind: str, spec: PeakSpec, treatment: Treatment = UNTREATED
) -> Sample:
    """What up to `PeakSpec.sample` spectra, evenly over the image, show.

    Args:
        source: Spectra.
        raster: Their pixels.
        kind: "centroid" or "profile".
        spec: How many, and how finely.
        treatment: What is done to them first; a spectrum without a lock mass takes the median of the sample.

    Raises:
        InputError: A spectrum's bytes are missing or no numbers.
    """
    if isinstance(source, Table):
        return sample_table(source, raster, kind, spec)
    rows = in_image_order(raster, sample_rows(len(source), spec))
    shifts = treatment.shifts(source, rows, kind)
    if shifts is not None:
        shifts = np.where(np.isnan(shifts), np.nanmedian(shifts), shifts)
    with open_binary(source.ibd_path) as ibd:
        if kind == "centroid":
            return sample_centroids(_spectra(source, ibd, rows, shifts), spec)
        if not treatment.profile.active:
            return sample_profiles(lambda: _spectra(source, ibd, rows, shifts), spec)
        apply = treatment.profile.applied
        return sample_profiles(
            lambda: ((mz, apply(mz, v[None])[0].astype(np.float64)) for mz, v in _spectra(source, ibd, rows, shifts)),
            spec,
        )


def look_at_neighbours(
    source: Source, raster: Raster, ions: NDArray[np.float64], kind: str, spec: PeakSpec, treatment: Treatment
) -> Evidence:
    """What up to `PeakSpec.sample` spectra, among them neighbours, say of the structure of ions.

    Args:
        source: Spectra.
        raster: Their pixels.
        ions: (M,) ascending.
        kind: "centroid" or "profile".
        spec: How many; the ions' windows.
        treatment: What is done to spectra first, as for `sample_source`.
    """
    rows, along, across = neighbours(raster, spec.sample)
    if not len(rows):
        return nothing_seen(len(ions))

    def images(reduce: Reduce) -> Evidence:
        parts = [reduce(batch)[0] for batch in batches(source.length, rows, len(ions))]
        return evidence(np.concatenate(parts), along, across)

    if isinstance(source, Table):
        return images(TableReducer(RowReader(source, rows), ions, "list", spec.tolerance))
    shifts, found = None, treatment.shifts(source, rows, kind)
    if found is not None:
        shifts = np.zeros(len(source))
        shifts[rows] = np.where(np.isnan(found), np.nanmedian(found), found)
    with open_binary(source.ibd_path) as ibd:
        axis = shared_axis(source, ibd)
        reduce = Reducer(source, axis, ions, "list", kind, spec.tolerance, shifts, treatment.profile)
        return images(partial(reduce, ibd))


def with_structure(
    ions: NDArray[np.float64], how: dict[str, Any], sections: Iterable[Evidence], count: int, where: object
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The ions (M,) that are not proven to be without structure, and how they were found.

    Args:
        ions: Found m/z.
        how: What is known of that ("peaks").
        sections: What each of the sections says.
        count: Number of sections.
        where: The measurement.

    Raises:
        InputError: None is left.
    """
    kept = structured(sections, count)
    if not kept.any():
        raise InputError(
            f"none of its {len(ions)} peaks shows any spatial structure",
            where=where,
            remedy="give --mz, or ingest.structure=none",
        )
    return ions[kept], {**how, "without_structure": int((~kept).sum())}


def own_structured(
    source: Source,
    raster: Raster,
    ions: NDArray[np.float64],
    how: dict[str, Any],
    kind: str | None,
    spec: PeakSpec,
    treatment: Treatment,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The ions of one section, of automatic ones that it brought itself those with structure; and how they were chosen.

    Raises:
        InputError: None is left.
    """
    if how["ions"] != "automatic" or "sections" in how["peaks"] or not spec.structure:
        return ions, how
    found = look_at_neighbours(source, raster, ions, known_kind(source, kind), spec, treatment)
    kept, peaks = with_structure(ions, how["peaks"], [found], 1, source.path)
    return kept, {**how, "peaks": peaks}


def _spectra(index: ImzmlIndex, ibd: IO[bytes], rows: NDArray[np.int64], shifts: NDArray[np.float64] | None) -> Spectra:
    def each() -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        done = 0
        for batch in batches(index.length, rows, 1):
            mzs, values = read_arrays(index, ibd, batch, "mz"), read_arrays(index, ibd, batch, "int")
            for i, m, v in zip(batch, mzs, values, strict=True):
                m64, v64 = m.astype(np.float64), v.astype(np.float64)
                check_axis(index, m64, int(i))
                if shifts is not None:
                    m64 = true_mz(m64, shifts[done])
                done += 1
                if not np.isfinite(v64).all():
                    refuse_values(index, int(i))
                yield ascending(m64, np.maximum(v64, 0.0))

    return each()


def choose_ions(
    index: ImzmlIndex,
    raster: Raster,
    axis: NDArray[np.float64] | None,
    targets: Targets | SharedIons | None,
    kind: str | None,
    spec: PeakSpec,
    treatment: Treatment,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The ions (M,) of an imzML, ascending, and how they were chosen.

    Args:
        index: Of the file.
        raster: Its pixels.
        axis: What its spectra share, if they do.
        targets: Given m/z, or those that a study found.
        kind: "centroid", "profile" or unknown.
        spec: How peaks are found.
        treatment: What is done to spectra first.

    Raises:
        InputError: Nothing says how to find ions, or none is found.
    """
    if targets is None and axis is not None:
        refuse_range(spec.mz_range, index.path)
        ions = np.sort(axis, kind="stable")
        refuse_twice(ions, index.path)
        return ions, {"ions": "axis"}
    kind = known_kind(index, kind)
    if isinstance(targets, SharedIons):
        return targets.mz, {"ions": "automatic", "peaks": targets.peaks}
    if targets is not None:
        return targets.mz, {"ions": "list"}
    return found_ions(sample_source(index, raster, kind, spec, treatment), spec, index.path)
