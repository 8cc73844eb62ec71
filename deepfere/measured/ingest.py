"""imzML, or a table of pixels, to the measured store: in image bands, memory one band.

The index tells which bytes belong to which image rows, so every band is read, reduced to its ions and written
to its own shards, whatever order the instrument scanned in. Only automatic ions look at a sample beforehand.
"""

from __future__ import annotations

import errno
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DeepfereError, InputError
from deepfere.measured.heap import give_back, tidy_heap
from deepfere.measured.ions import (
    Source,
    choose_ions,
    known_kind,
    of_region,
    open_source,
    own_structured,
)
from deepfere.measured.lock_mass import SectionShifts, told
from deepfere.measured.normalise import FACTORS, REFERENCE
from deepfere.measured.peaks import SharedIons
from deepfere.measured.raster import Raster, batches, by_band, plan_raster
from deepfere.measured.reduce import Reduce, Reducer, put, shared_axis
from deepfere.measured.sampled import PeakSpec
from deepfere.measured.store import Measured
from deepfere.measured.table import TableReducer
from deepfere.measured.table import choose_ions as choose_table_ions
from deepfere.measured.tolerance import Targets, Tolerance
from deepfere.measured.treatment import UNTREATED, Treatment
from deepfere.measured.windows import Windows
from deepfere.measured.writer import MeasuredWriter, fitting_band, refuse_occupied
from deepfere.readers.columns import Column
from deepfere.readers.imzml import ImzmlIndex
from deepfere.readers.ranges import open_binary
from deepfere.readers.table import Table
from deepfere.readers.table_rows import RowReader
from deepfere.store import Codec, StorageOptions, remove

BAND_BYTES = 512 << 20


@dataclass
class _Tally:
    """What is counted on the way: which ions (M,) are anywhere above zero, among it."""

    seen: NDArray[np.bool_]
    negatives: int = 0


@dataclass(frozen=True)
class _Plan:
    """What is to be written.

    Attributes:
        ions: (M,) ascending.
        tolerance: Half-width of their windows.
        how: How they were chosen, and what is done to spectra.
        band_rows: Image rows of a band.
        of: Image rows [begin, end) and their spectra, to what makes ions of those, counted from 0, and to further
            images (rows, nx) of the store.
    """

    ions: NDArray[np.float64]
    tolerance: Tolerance
    how: dict[str, Any]
    band_rows: int
    of: Callable[[int, int, NDArray[np.int64]], tuple[Reduce, dict[str, NDArray[Any]]]]


@tidy_heap()
def ingest(
    msi_path: str | Path,
    out_path: str | Path,
    *,
    pitch_um: float | tuple[float, float] | None = None,
    mz: Sequence[float] | Targets | SharedIons | None = None,
    mz_range: tuple[float, float] | None = None,
    tolerance_ppm: float = 5.0,
    tolerance_da: float = 0.0,
    structure: bool = True,
    representation: str | None = None,
    treatment: Treatment = UNTREATED,
    reference_mz: float | None = None,
    band_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
    duplicates: str = "error",
    overwrite: bool = False,
    region: int | str | None = None,
    storage_options: StorageOptions | None = None,
    codec: Codec = "zstd",
    index_cache: str | Path | None = None,
) -> Measured:
    """Ingest an imzML pair, or a table of pixels by m/z bins (AnnData, SpatialData).

    Ions: those of ``mz`` where given; else the file's own axis, no ion dropped, where all spectra share one
    (continuous; a table of at most 5000 variables); else automatic, by `PeakSpec`. An ion's value is the sum of the
    centroids or bins in its window, or the area under the profile in it. Normalisation factors are those of the whole
    spectrum as read, of profiles after smoothing and baseline.

    Args:
        msi_path: The .imzML or its URL, or the table's store (see `open_table`).
        out_path: Store to write, path or URL.
        pitch_um: Pixel pitch, one value or (y, x); wins over the file's.
        mz: Target m/z, with windows of their own or not, or ions that were found over the sections of a study.
        mz_range: Lowest and highest m/z of automatic ions.
        tolerance_ppm: Half-width of an ion's window.
        tolerance_da: What is added to it, whatever the m/z.
        structure: Leave out automatic ions that vary from pixel to pixel as noise does.
        representation: "centroid" or "profile"; wins over what the file says.
        treatment: What is done to spectra before windows are taken. With a lock mass the file is read twice, first
            for the shift of every spectrum; an image of them is stored.
        reference_mz: Its intensity in each pixel is stored as one more factor of normalisation.
        band_rows: Image rows per band at most; fewer where a band would exceed 512 MiB.
        progress: Called with (bands done, bands).
        duplicates: What to do where a pixel has several spectra: "error", "sum" or "mean".
        overwrite: Replace a finished store.
        region: Which of several regions (see `deepfere.measured.regions`), or "all"; only its spectra are read.
        storage_options: For URLs.
        codec: How the ions are compressed: "zstd", or "blosc" (bits shuffled first).
        index_cache: Keeps the index for the next reading; see `read_index`.

    Returns:
        The finished store, opened.

    Raises:
        InputError: See `read_index`, `open_table` and `Treatment.check`; a lock mass is hardly found;
            several regions and none chosen; no pitch;
            fewer than four measured pixels; duplicate coordinates with
            "error"; intensities that are not finite; every ion zero; nothing says whether spectra are
            centroids or profiles and it matters; the store exists.

        DeepfereError: The disk is full; nothing of the store is left behind.

    Warns:
        UserWarning: Negative intensities were set to zero; what a lock mass did.
    """
    source = open_source(msi_path, index_cache=index_cache)
    refuse_occupied(out_path, overwrite, storage_options)
    pitch = _choose_pitch(source, pitch_um)
    source = of_region(source, region)
    raster = plan_raster(source, duplicates)
    give_back()
    if not (math.isfinite(tolerance_ppm) and 0 < tolerance_ppm < 1e5):
        raise InputError(f"a tolerance of {tolerance_ppm} ppm", where="--tolerance-ppm", remedy="give a positive one")
    if not (math.isfinite(tolerance_da) and tolerance_da >= 0):
        raise InputError(f"a tolerance of {tolerance_da} Da", where="ingest.tolerance_da", remedy="give 0 or more")
    if band_rows < 1:
        raise InputError(f"bands of {band_rows} rows", where="ingest.band_rows", remedy="give a positive number")
    if representation not in (None, "centroid", "profile"):
        raise InputError(f"unknown representation {representation!r}", remedy="give centroid or profile")
    kind = representation or source.representation
    spec = PeakSpec(tolerance_ppm, mz_range=mz_range, tolerance_da=tolerance_da, structure=structure)
    targets = mz if mz is None or isinstance(mz, SharedIons) else _targets(mz, spec.tolerance)
    if reference_mz is not None and not 0 < reference_mz < math.inf:
        raise InputError(f"{reference_mz} is no m/z", where="--reference-mz", remedy="give a positive number")
    with _open_reduce(source, raster, targets, spec, kind, treatment, reference_mz, band_rows) as plan:
        with _whole_or_not(out_path, storage_options):
            writer = MeasuredWriter(
                out_path,
                plan.ions,
                raster.shape_px,
                band_rows=plan.band_rows,
                overwrite=overwrite,
                storage_options=storage_options,
                codec=codec,
            )
            names = FACTORS if reference_mz is None else (*FACTORS, REFERENCE)
            tally = _write_bands(source.length, raster, plan, names, writer, duplicates, progress)
            if not tally.seen.any():
                raise InputError(
                    "every ion is zero in every pixel",
                    where=source.path,
                    remedy="check the file, --mz and --tolerance-ppm (in a study ingest.mz and ingest.tolerance_ppm)",
                )
        if tally.negatives:
            warnings.warn(
                f"{source.path}: {tally.negatives} negative intensities set to zero", UserWarning, stacklevel=3
            )
        if plan.how["ions"] == "list" and isinstance(source, ImzmlIndex) and not tally.seen.all():
            # What a table lacks is told by its variables.
            absent = plan.ions[~tally.seen]
            warnings.warn(
                f"{source.path}: {len(absent)} of {len(plan.ions)} targets are zero in every pixel, first "
                f"m/z {absent[0]:.6g}",
                UserWarning,
                stacklevel=3,
            )
        if left_out := plan.how.get("peaks", {}).get("without_structure"):
            warnings.warn(
                f"{source.path}: {left_out} automatic peaks vary from pixel to pixel as noise does and are left out; "
                f"ingest.structure=none keeps them",
                UserWarning,
                stacklevel=3,
            )
        if "lock_mass" in plan.how:
            warnings.warn(f"{source.path}: {told(plan.how['lock_mass'])}", UserWarning, stacklevel=3)
        attrs = {
            **plan.how,
            **plan.tolerance.to_attrs(spec.tolerance),
            "reference_mz": reference_mz,
            "origin_px": list(raster.origin_px),
            "region": region,
            "pitch_source": "given" if pitch_um is not None else "file",
            "representation": kind,
            **_provenance(source),
            "spectra": len(source),
            "pixels": int(raster.mask.sum()),
            "duplicates": duplicates,
            "duplicate_spectra": int(len(source) - raster.mask.sum()),
            "negative_intensities": tally.negatives,
            "written_by": f"deepfere {_version()}",
        }
        with _whole_or_not(out_path, storage_options):
            return writer.finish(raster.mask, pitch, attrs)


def _provenance(source: Source) -> dict[str, Any]:
    if isinstance(source, Table):
        names = [source.path.name, source.name] if source.name else [source.path.name]
        return {"mode": "table", "encoding": source.encoding, "source": names, "empty_rows": source.empty}
    return {
        "mode": source.mode,
        "polarity": source.polarity,
        "source": [source.path.name, source.ibd_path.name],
        "uuid": source.uuid,
        "uuid_matches": source.uuid_matches,
    }


@contextmanager
def _open_reduce(
    source: Source,
    raster: Raster,
    targets: Targets | SharedIons | None,
    spec: PeakSpec,
    kind: str | None,
    treatment: Treatment,
    reference_mz: float | None,
    band_rows: int,
) -> Iterator[_Plan]:
    tolerance = targets.tolerance if isinstance(targets, Targets) else spec.tolerance
    reference = None if reference_mz is None else Windows(np.array([reference_mz]), spec.tolerance)
    if isinstance(source, Table):
        treatment.check(source, kind, "list", False)
        ions, how = choose_table_ions(source, raster, targets, kind, spec)
        ions, how = own_structured(source, raster, ions, how, kind, spec, treatment)
        rows = _band_rows(band_rows, len(ions), raster)
        order = Column()
        for band in by_band(raster, fitting_band(rows, raster.shape_px)):
            order.extend(band)
        reduce = TableReducer(RowReader(source, order), ions, how["ions"], tolerance, reference)
        yield _Plan(ions, tolerance, how, rows, lambda begin, end, band: (reduce.of(band), {}))
        return
    with open_binary(source.ibd_path) as ibd:
        axis = shared_axis(source, ibd)
        treatment.check(source, kind, "axis" if axis is not None and targets is None else "list", axis is not None)
        ions, how = choose_ions(source, raster, axis, targets, kind, spec, treatment)
        ions, how = own_structured(source, raster, ions, how, kind, spec, treatment)
        rows, shifts = _band_rows(band_rows, len(ions), raster), None
        if kind is not None and treatment.lock_mass is not None:
            fitting = fitting_band(rows, raster.shape_px)
            shifts = SectionShifts(source, ibd, raster, kind, treatment.lock_mass, fitting)
            how["lock_mass"] = shifts.facts()
        if reference_mz is not None:
            kind = known_kind(source, kind)
        if treatment.profile.active:
            how["profile"] = treatment.profile.to_dict()
        spectra = Reducer(source, axis, ions, how["ions"], kind, tolerance, None, treatment.profile, reference)

        def of(begin: int, end: int, band: NDArray[np.int64]) -> tuple[Reduce, dict[str, NDArray[Any]]]:
            own, images = (None, {}) if shifts is None else shifts.of_band(begin, end, band)
            return partial(spectra.of(band, own), ibd), images

        yield _Plan(ions, tolerance, how, rows, of)


def _band_rows(most: int, ions: int, raster: Raster) -> int:
    return min(most, max(1, BAND_BYTES // (4 * ions * raster.shape_px[1])))


def _targets(mz: Sequence[float] | Targets, tolerance: Tolerance) -> Targets:
    ions = mz.mz if isinstance(mz, Targets) else np.sort(np.asarray(list(mz), dtype=np.float64))
    if not len(ions) or not np.isfinite(ions).all() or ions[0] <= 0 or (np.diff(ions) == 0).any():
        raise InputError("is not a list of different positive m/z", where="--mz", remedy="correct it")
    found = mz if isinstance(mz, Targets) else Targets(ions, tolerance)
    width = found.tolerance.half_da(ions)
    if not (np.isfinite(width).all() and (width > 0).all()):
        raise InputError(f"{width.min():g} Da is no window", where="--mz", remedy="correct its tolerances")
    return found


@contextmanager
def _whole_or_not(path: str | Path, storage_options: StorageOptions | None) -> Iterator[None]:
    """Leave nothing of a store whose writing fails, and say in one line that the disk is full."""
    try:
        yield
    except BaseException as error:
        remove(path, storage_options)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DeepfereError(f"{path}: {os.strerror(error.errno)}; make room and run it again") from error
        raise


def _version() -> str:
    try:
        return metadata.version("deepfere")
    except metadata.PackageNotFoundError:
        return "unknown"


def _choose_pitch(source: Source, given: float | tuple[float, float] | None) -> tuple[float, float]:
    if given is None:
        if source.pitch_um is None:
            raise InputError(source.pitch_problem, where=source.path, remedy="give --pitch-um (in a study pitch_um)")
        return source.pitch_um
    pair = given if isinstance(given, tuple | list) else (given, given)
    values = tuple(float(v) for v in pair)
    if len(values) != 2 or not all(math.isfinite(v) and v > 0 for v in values):
        raise InputError(f"{given} is not a pixel pitch", where="--pitch-um", remedy="give one or two positive numbers")
    stated = source.pitch_um
    if stated is not None and not np.allclose(values, stated, rtol=0.02):
        # It may be wrong there, and is at times; a comma in the place of a point makes two numbers.
        warnings.warn(
            f"{source.path}: states pixels of {stated[0]:g} x {stated[1]:g} um (y, x); taken are those given, "
            f"{values[0]:g} x {values[1]:g} um",
            UserWarning,
            stacklevel=3,
        )
    return values[0], values[1]


def _write_bands(
    lengths: Column | NDArray[np.int64],
    raster: Raster,
    plan: _Plan,
    names: tuple[str, ...],
    writer: MeasuredWriter,
    duplicates: str,
    progress: Callable[[int, int], None] | None,
) -> _Tally:
    nx = raster.shape_px[1]
    repeated = bool(raster.counts.max() > 1)
    bands = writer.bands
    ions = writer.ions.shape[0]
    tally = _Tally(np.zeros(ions, bool))
    # One band, used again for the next.
    images = np.empty((ions, writer.band_rows, nx), dtype=np.float32)
    factors = np.empty((len(names), writer.band_rows, nx), np.float64 if repeated else np.float32)
    for done, ((begin, end), spectra) in enumerate(zip(bands, by_band(raster, writer.band_rows), strict=True)):
        flat, own = images.reshape(ions, -1), factors.reshape(len(names), -1)
        counts = raster.counts[begin:end]
        if repeated or not counts.all():
            flat[:] = own[:] = 0
        row, col = raster.at(spectra)
        pixels, (reduce, further) = (row - begin) * nx + col, plan.of(begin, end, spectra)
        for batch in batches(lengths[spectra], np.arange(len(spectra)), ions):
            values, found, negatives = reduce(batch)
            tally.negatives += negatives
            # Nearly all ions are seen in the first batch: the others are few to look at.
            missing = np.flatnonzero(~tally.seen)
            tally.seen[missing] = values[:, missing].any(0)
            put(flat, pixels[batch], values, repeated)
            put(own, pixels[batch], found.T, repeated)
        block, factor = images[:, : end - begin], factors[:, : end - begin]
        for part in (block, factor):
            if repeated and duplicates == "mean":
                part /= np.maximum(counts, 1)
            if not counts.all():
                part[:, counts == 0] = np.nan
        writer.write_images(begin, block)
        writer.write_factors(begin, dict(zip(names, factor.astype(np.float32, copy=False), strict=True)) | further)
        if progress is not None:
            progress(done + 1, len(bands))
    return tally
