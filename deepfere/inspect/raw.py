"""What users bring: imzML pairs, tables of pixels and slides; and phantoms, which are both."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.inspect.notes import MAX_LISTED, Description, Notes, add_mask, count_text, pair_text, sample, size_text
from deepfere.places import Place
from deepfere.readers.ranges import first_bytes, open_binary, open_ranges, size_of
from deepfere.readers.slide_zarr import is_zarr
from deepfere.remote import is_url

if TYPE_CHECKING:
    from deepfere.readers.imzml import ImzmlIndex
    from deepfere.readers.slide import Slide
    from deepfere.readers.table import Table

# imzML 1.1: the .ibd's checksum is one of IMS:1000090, -91 and -92.
CHECKSUMS = {b"0": "md5", b"1": "sha1", b"2": "sha256"}
CHECKSUM_BYTES = 1 << 30
HEAD_BYTES = 1 << 17
MZ_SAMPLE_BYTES = 64 << 20
PROBES = (0.0, 0.5, 1.0)
READ_BY = {
    "openslide": "OpenSlide",
    "tiff": "deepfere itself (JPEG tiles)",
    "flat": "deepfere itself",
    "zarr": "deepfere itself (OME-Zarr)",
}
STORED = {"csc": "by variable (csc)", "csr": "by pixel (csr)", "dense": "densely"}


def imzml(path: Place) -> Description:
    """An imzML pair, or the URL of one; one whose .ibd is missing or cut off is described from the XML.

    Raises:
        InputError: The XML is broken or is not imzML.
    """
    from deepfere.readers.imzml import read_index

    notes = Notes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the identifier is reported below
            index = read_index(path)
    except InputError as error:
        index = _index_despite(path, error)
        notes.problem(error.what if error.where == path else f"{Path(str(error.where)).name}: {error.what}")
    size = size_of(index.ibd_path) if index.ibd_path.is_file() else 0
    ends = np.maximum(index.mz_offset[:] + index.mz_bytes, index.int_offset[:] + index.int_bytes)
    inside = np.flatnonzero(ends <= size)
    pitch = index.pitch_um
    notes.add("mode", index.mode)
    notes.add("representation", index.representation or "not stated")
    notes.add("polarity", index.polarity or "not stated")
    notes.add("pitch", f"{pair_text(pitch)} um" if pitch else f"not known ({index.pitch_problem}): give --pitch-um")
    notes.add("spectra", f"{len(index):,}")
    empty = int((index.length[:] == 0).sum())
    if empty:
        notes.add("empty spectra", f"{empty:,}")
    if size and len(inside) < len(index):
        notes.add("cut off", f"{len(index) - len(inside):,} of {len(index):,} spectra end beyond the .ibd")
    _add_raster(notes, index, pitch)
    if len(inside):
        _add_mz(notes, index, inside)
    if size:
        _add_checks(notes, index, size)
    return notes.done(path, "imzML, a mass spectrometry image")


def table(path: Path) -> Description:
    """A table of pixels by m/z bins, in an AnnData or SpatialData store.

    Raises:
        InputError: There is no table, or several; see `deepfere.readers.table.open_table`.
    """
    from deepfere.readers.columns import reach
    from deepfere.readers.table import open_table

    notes, found = Notes(), open_table(path)
    pitch = found.pitch_um
    notes.add("table", found.name)
    notes.add("representation", found.representation or "not stated")
    notes.add("pitch", f"{pair_text(pitch)} um" if pitch else f"not known ({found.pitch_problem}): give --pitch-um")
    notes.add("pixels", f"{len(found):,}")
    if found.empty:
        notes.add("empty rows", f"{found.empty:,}, taken as not measured")
    _add_raster(notes, found, pitch)
    low, high = reach(found.length)
    stored = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    notes.add("values", f"{stored} per pixel, stored {STORED[found.encoding]}")
    mz = f"{found.mz.min():.4f} to {found.mz.max():.4f}"
    notes.add("m/z", f"{mz} ({count_text(len(found.mz), 'variable')} for all pixels)")
    return notes.done(path, "table of pixels by m/z, a mass spectrometry image")


def _add_raster(notes: Notes, source: ImzmlIndex | Table, pitch_um: tuple[float, float] | None) -> None:
    """Grid, regions, and pixels that were measured more than once."""
    from deepfere.measured.raster import plan_raster

    try:
        raster = plan_raster(source, "sum")
    except InputError as error:
        notes.problem(error.what)
        return
    notes.add("origin", f"x {raster.origin_px[1]}, y {raster.origin_px[0]} in the file's coordinates")
    add_mask(notes, raster.mask, pitch_um)
    repeated = int((raster.counts > 1).sum())
    if repeated:
        notes.add(
            "repeated",
            f"{count_text(repeated, 'pixel')} with several spectra (refused unless they are summed or averaged)",
        )


def _index_despite(path: Place, error: InputError) -> ImzmlIndex:
    """The index of a pair that the reader refuses, from the XML alone; ``error`` again where that is no use."""
    from deepfere.readers.imzml import read_index

    try:
        return read_index(path, check_ibd=False)
    except InputError:
        raise error from None


def _add_mz(notes: Notes, index: ImzmlIndex, inside: NDArray[np.int64]) -> None:
    """The m/z range: of the shared axis, of all spectra, or of a sample, which it says."""
    from deepfere.readers.imzml_arrays import read_arrays

    if index.shared_axis:
        rows, what = inside[:1], "one axis for all spectra"
    else:
        mean_bytes = max(1.0, float(index.mz_bytes[inside].mean()))
        rows = inside[sample(len(inside), max(1, int(MZ_SAMPLE_BYTES / mean_bytes)))]
        what = "over all spectra" if len(rows) == len(index) else f"over {len(rows):,} of {len(index):,} spectra"
    try:
        with open_binary(index.ibd_path) as ibd:
            arrays = [array for array in read_arrays(index, ibd, rows, "mz") if len(array)]
    except InputError as error:
        notes.problem(error.what)
        return
    lengths = index.length[inside]
    low, high = int(lengths.min()), int(lengths.max())
    notes.add("values", f"{low:,} per spectrum" if low == high else f"{low:,} to {high:,} per spectrum")
    if not arrays:
        return
    mz = np.concatenate(arrays).astype(np.float64)
    good = mz[np.isfinite(mz) & (mz > 0)]
    if len(good) < len(mz):
        notes.problem(f"{count_text(len(mz) - len(good), 'm/z value')} not positive numbers")
    if len(good):
        notes.add("m/z", f"{good.min():.4f} to {good.max():.4f} ({what})")


def _add_checks(notes: Notes, index: ImzmlIndex, size: int) -> None:
    """The identifier and the checksum that tie the .ibd to its .imzML."""
    if index.uuid_matches is False:
        notes.problem(f"{index.ibd_path.name} does not begin with the identifier that the .imzML states")
    with open_binary(index.path) as handle:
        head = handle.read(HEAD_BYTES)
    for tag in re.findall(rb"<cvParam\b[^>]*>", head):
        term = re.search(rb'accession="IMS:100009([012])"', tag)
        stated = re.search(rb'value="\s*([0-9A-Fa-f]{32,64})\s*"', tag)
        if term is None or stated is None:
            continue
        name = CHECKSUMS[term.group(1)]
        if size > CHECKSUM_BYTES:
            notes.add("checksum", f"{name}, not checked: the .ibd is over 1 GiB")
            continue
        with open_binary(index.ibd_path) as handle:
            found = hashlib.file_digest(handle, name).hexdigest()
        agrees = found == stated.group(1).decode().lower()
        notes.add("checksum", f"{name} {'agrees' if agrees else 'does not agree'}")
        if not agrees:
            notes.problem(f"{index.ibd_path.name} does not have the {name} checksum that the .imzML states")


def slide(path: str | Path) -> Description:
    """A slide or picture, or the URL of one; one that does not say how large its pixels are is described all the same.

    Raises:
        InputError: No reader takes it.
    """
    with _tifffile_log() as said:
        return _slide(path, said)


def _slide(path: str | Path, said: list[str]) -> Description:
    from deepfere.readers.slide import open_slide
    from deepfere.readers.slide_colour import profile_text
    from deepfere.readers.slide_mpp import GIVE_MPP

    notes, mpp_text = Notes(), ""
    problem = "" if is_zarr(path) else _tiff_problem(path, said)
    if problem:
        notes.problem(problem)
    try:
        opened = open_slide(path)
    except InputError as error:
        if error.remedy != GIVE_MPP:
            if problem:
                raise InputError(f"is {problem}", where=path, remedy="copy it again") from error
            raise
        mpp_text = f"not known ({error.what}): {GIVE_MPP}"
        opened = open_slide(path, 1.0)
    except Exception as error:  # a file of a few torn bytes makes the libraries raise anything
        raise InputError(
            f"cannot be opened ({type(error).__name__}: {error})", where=path, remedy="copy or export it again"
        ) from error
    try:
        known = None if mpp_text else opened.mpp_um
        notes.add("format", _format(path, opened))
        notes.add("read by", READ_BY[opened.backend])
        notes.add("size", size_text(opened.shape_px, known))
        notes.add("pixel size", mpp_text or f"{pair_text(opened.mpp_um)} um (mpp)")
        notes.add("colour profile", "none" if opened.profile is None else profile_text(opened.profile))
        if opened.backend in ("openslide", "tiff") and not is_url(path):
            _add_properties(notes, path)
        notes.add("levels", len(opened.levels))
        for number, level in enumerate(opened.levels):
            shrunk = pair_text(round(d, 4) for d in level.downsample)
            size = f"{level.shape_px[0]:,} x {level.shape_px[1]:,} pixels"
            notes.add(f"level {number}", size + (f", {shrunk} times smaller" if number else ", full size"))
        _probe(notes, opened)
        if known is not None and not notes.problems:
            _add_pieces(notes, opened)
    finally:
        opened.close()
    plain = opened.backend == "flat" and notes.fact("format") != "OME-TIFF"
    return notes.done(path, "slide (plain picture)" if plain else "slide")


@contextmanager
def _tifffile_log() -> Iterator[list[str]]:
    """What tifffile says of a broken file: in its log alone, after which it goes on with what it could read."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tifffile")
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


def _tiff_problem(path: str | Path, said: list[str]) -> str:
    """Where a TIFF of any brand points beyond its end, as one that was not copied whole does."""
    import tifffile

    if first_bytes(path, 2) not in (b"II", b"MM"):
        return ""
    try:
        with closing(open_ranges(path)) as ranges, ranges.open() as stream, tifffile.TiffFile(stream) as file:
            size = ranges.size
            pages: list[Any] = []
            for page in file.pages:
                pages += [page, *(getattr(page, "pages", None) or [])]
            # Zero where a writer left an empty tag: only what lies behind the end is missing.
            if any(int(n) >= 8 for line in said for n in re.findall(r"invalid (?:page|value) offset (\d+)", line)):
                return f"cut off: pages or their tags lie beyond its end at {size:,} bytes"
            for number, page in enumerate(pages):
                end = max((a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
                if end > size:
                    return f"cut off: page {number} needs {end:,} bytes, {size:,} present"
    except Exception:  # whatever is wrong with it, the reader will say
        return ""
    return ""


def _format(path: str | Path, opened: Slide) -> str:
    """What OpenSlide calls the format; at a URL it cannot look."""
    import openslide

    from deepfere.readers.slide_flat import is_ome_tiff
    from deepfere.readers.slide_zarr import ZarrSlide

    if isinstance(opened, ZarrSlide):
        return f"OME-Zarr {opened.version}"
    picture = _picture(path)
    if picture == "TIFF" and is_ome_tiff(path):
        return "OME-TIFF"
    vendor = None if is_url(path) else openslide.OpenSlide.detect_format(str(path))
    return vendor or f"plain {picture}"


def _picture(path: str | Path) -> str:
    begins = first_bytes(path, 3)
    if begins[:2] in (b"II", b"MM"):
        return "TIFF"
    return {b"\x89PN": "PNG", b"\xff\xd8\xff": "JPEG"}.get(begins, "picture")


def _add_properties(notes: Notes, path: str | Path) -> None:
    import openslide

    with openslide.OpenSlide(str(path)) as handle:
        power = handle.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
        notes.add("magnification", f"{power} x" if power else None)
        notes.add("further pictures", ", ".join(sorted(handle.associated_images)))


def _add_pieces(notes: Notes, opened: Slide) -> None:
    """Pieces of tissue, where a level is small enough to be looked at."""
    from deepfere.tiling.pieces import LOOKED_AT_PX, find_pieces, looked_at_px

    pixels = looked_at_px(opened)
    if pixels > LOOKED_AT_PX:
        notes.add("pieces", f"not looked for: the level to look at has {pixels:,} pixels")
        return
    found = find_pieces(opened).pieces
    notes.add("pieces", f"{len(found)} of tissue")
    for piece in found[:MAX_LISTED]:
        notes.add(f"piece {piece.number}", piece.text())
    if len(found) > MAX_LISTED:
        notes.add("further pieces", f"{len(found) - MAX_LISTED}")


def _probe(notes: Notes, opened: Slide) -> None:
    """Decode nine places of every level: a file that was cut off lacks some of them."""
    for number, level in enumerate(opened.levels):
        (h, w) = level.shape_px
        for row, col in [(int(a * (h - 1)), int(b * (w - 1))) for a in PROBES for b in PROBES]:
            try:
                opened.read(number, row, col, 1, 1)
            except InputError as error:
                notes.problem(error.what)
                return
    notes.add("decoded", "nine places of every level; the others were not looked at")


def phantom(path: Path) -> Description:
    """A phantom's folder.

    Raises:
        InputError: Its truth cannot be read.
    """
    from deepfere.phantom import Phantom

    notes = Notes()
    try:
        found = Phantom.open(path)
        mz, kinds = found.mz(), found.kinds()
        spec = found.spec
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"its truth cannot be read ({type(error).__name__}: {error})", where=path, remedy="write the phantom again"
        ) from error
    notes.add("seed", spec.seed)
    notes.add("pitch", f"{spec.pitch_um:g} um")
    try:
        add_mask(notes, found.mask(), spec.grid.pitch_um)
    except (OSError, ValueError):
        notes.problem("truth/mask.npy is missing or cannot be read")
    notes.add("truth", f"{spec.factor} times finer")
    notes.add("m/z", f"{count_text(len(mz), 'ion')}, {mz.min():.4f} to {mz.max():.4f}")
    notes.add("kinds of ions", ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))
    notes.add("informed", f"{sum(found.informed())} of {len(mz)} ions follow the stain")
    notes.add("measurement", found.imzml.name)
    notes.add("slide", f"{found.slide.name}, {spec.slide_mpp_um:g} um (mpp)")
    parts = [found.imzml, found.imzml.with_suffix(".ibd"), found.slide]
    parts += [found.truth / name for name in ("alignment.json", "ions.npy", "labels.npy")]
    for part in parts:
        if not part.exists():
            notes.problem(f"{part.relative_to(path)} is missing")
    return notes.done(path, "phantom, an invented section with its truth")
