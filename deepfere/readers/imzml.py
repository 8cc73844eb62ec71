"""imzML: a streaming index of the XML, checked against the .ibd, and the arrays behind it.

``read_index`` reads no spectrum: it knows every coordinate, byte range and type, and refuses a truncated
.ibd from these alone. Bytes are read on demand with ``spectrum``, or many at a time with ``read_arrays``.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Any
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.places import Place, place
from deepfere.readers import imzml_cache
from deepfere.readers import imzml_head as head
from deepfere.readers.columns import Column, blocks, same
from deepfere.readers.digest import content_digest
from deepfere.readers.imzml_pitch import stated_pitch
from deepfere.readers.imzml_scan import Unsure, scan
from deepfere.readers.ranges import open_binary, size_of

IMZML = (".imzml", ".xml", ".ibd")
MIXED = "mixed"
"""Polarity of a file that holds spectra of both."""
"""How the files of a pair end; some converters write .xml."""


@dataclass(frozen=True, eq=False)
class ImzmlIndex:
    """Where everything in an imzML pair is; N spectra.

    What there is of every spectrum takes a few bytes (`Column`) and is read as an array is.

    Attributes:
        path: The .imzML.
        ibd_path: The .ibd.
        mode: "continuous" or "processed", as the file says.
        representation: "centroid", "profile", or None where the file does not say.
        polarity: "positive", "negative", "mixed", or None where the file does not say.
        x: (N,), position x as in the file.
        y: (N,), position y as in the file.
        length: (N,), values of either array.
        mz_offset: (N,), byte offset of the m/z array in the .ibd.
        mz_bytes: (N,) int64, its bytes in the .ibd; computed when asked for, unless compressed.
        mz_dtype: Type of an m/z value.
        mz_compressed: Whether m/z arrays are zlib streams.
        int_offset: As mz_offset, of the intensities.
        int_bytes: As mz_bytes.
        int_dtype: As mz_dtype.
        int_compressed: As mz_compressed.
        pitch_um: Pixel pitch (y, x) in micrometres, or None where the file gives none that can be trusted.
        pitch_problem: Why ``pitch_um`` is None, in words; empty otherwise.
        uuid: The file's identifier, 32 hexadecimal digits, or None.
        uuid_matches: Whether the .ibd begins with it; None where the file states none.
        stated_bytes: "mz" and "int" -> bytes of each array, where they do not follow from its length.
        numbers: (N,) where these are not all spectra: their positions in the file.
    """

    path: Place
    ibd_path: Place
    mode: str
    representation: str | None
    polarity: str | None
    x: Column
    y: Column
    length: Column
    mz_offset: Column
    mz_dtype: np.dtype[Any]
    mz_compressed: bool
    int_offset: Column
    int_dtype: np.dtype[Any]
    int_compressed: bool
    pitch_um: tuple[float, float] | None
    pitch_problem: str
    uuid: str | None
    uuid_matches: bool | None
    stated_bytes: dict[str, Column]
    numbers: Column | None = None

    @property
    def mz_bytes(self) -> NDArray[np.int64]:
        """(N,) int64; see the class."""
        return self.sizes("mz", slice(None))

    @property
    def int_bytes(self) -> NDArray[np.int64]:
        """(N,) int64; see the class."""
        return self.sizes("int", slice(None))

    def sizes(self, kind: str, rows: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Bytes in the .ibd of the "mz" or "int" arrays of some spectra."""
        if kind in self.stated_bytes:
            return self.stated_bytes[kind][rows]
        return self.length[rows] * (self.mz_dtype if kind == "mz" else self.int_dtype).itemsize

    @property
    def shared_axis(self) -> bool:
        """Whether all spectra point at one and the same m/z array."""
        return same(self.mz_offset) and same(self.length)

    def __len__(self) -> int:
        return len(self.x)

    def only(self, rows: NDArray[np.int64]) -> ImzmlIndex:
        """The index of some spectra (their positions here, rising), which keep their numbers in the file."""
        columns: dict[str, Any] = {name: Column.of(getattr(self, name)[rows]) for name in head.COLUMNS}
        stated = {kind: Column.of(sizes[rows]) for kind, sizes in self.stated_bytes.items()}
        numbers = Column.of(rows if self.numbers is None else self.numbers[rows])
        return replace(self, **columns, stated_bytes=stated, numbers=numbers)

    def number(self, i: int | np.integer[Any]) -> int:
        """The number of a spectrum in the file, from 1."""
        return 1 + int(i if self.numbers is None else self.numbers[i])


def read_index(path: str | Place, *, check_ibd: bool = True, cache: str | Place | None = None) -> ImzmlIndex:
    """Index an imzML pair without reading its spectra.

    Args:
        path: The .imzML, or its URL; the .ibd beside it is found whatever the case of its extension.
        check_ibd: False takes the XML's word: the .ibd may be missing, short or another file's.
        cache: Path or URL of a Parquet file that keeps what the XML says: read if it is of this very file, else
            written anew.

    Raises:
        InputError: The XML is broken or not imzML, holds no spectra or contradicts itself; the .ibd is
            missing or shorter than the index says.

    Warns:
        UserWarning: The .ibd does not begin with the identifier that the .imzML states.
    """
    path = place(path)
    if path.suffix.lower() == ".ibd":
        raise InputError("is the binary half of an imzML", where=path, remedy="give the .imzML beside it")
    walk = _walk(path) if cache is None else _cached_walk(path, place(cache))
    if not len(walk):
        raise InputError("holds no spectra", where=path, remedy="export the imzML again")
    modes = [m for a, m in ((head.CONTINUOUS, "continuous"), (head.PROCESSED, "processed")) if a in walk.content]
    if len(modes) != 1:
        stated = "both continuous and processed" if modes else "neither continuous nor processed"
        raise InputError(f"states {stated}", where=path, remedy="correct its fileContent (IMS:1000030 or 31)")
    columns = walk.columns
    uuid, matches = None, None
    if check_ibd:
        ibd_path = _find_ibd(path)
        _check_length(ibd_path, walk)
        uuid, matches = _check_uuid(walk.content, path, ibd_path)
    else:
        try:
            ibd_path = _find_ibd(path)
        except InputError:
            ibd_path = path.with_suffix(".ibd")
    pitch_um, problem = stated_pitch(walk.scan_settings)
    # What the spectra say is nearer to the data than what the file says.
    representations = walk.representations or {
        name for a, name in ((head.CENTROID, "centroid"), (head.PROFILE, "profile")) if a in walk.content
    }
    polarities = walk.polarities or {
        name for a, name in ((head.NEGATIVE, "negative"), (head.POSITIVE, "positive")) if a in walk.content
    }
    return ImzmlIndex(
        path=path,
        ibd_path=ibd_path,
        mode=modes[0],
        representation=min(representations) if len(representations) == 1 else None,
        polarity=min(polarities, default=None) if len(polarities) <= 1 else MIXED,
        mz_dtype=np.dtype(walk.dtypes["mz"]),
        mz_compressed=walk.compressed["mz"],
        int_dtype=np.dtype(walk.dtypes["int"]),
        int_compressed=walk.compressed["int"],
        pitch_um=pitch_um,
        pitch_problem=problem,
        uuid=uuid,
        uuid_matches=matches,
        stated_bytes={kind: columns[f"{kind}_bytes"] for kind in ("mz", "int") if walk.compressed[kind]},
        **{name: columns[name] for name in head.COLUMNS},
    )


def msi_digest(path: str | Place) -> str:
    """sha256 (hexadecimal) over the content digests of an .imzML and its .ibd (see ``content_digest``)."""
    path = place(path)
    if path.is_file() and path.suffix.lower() not in IMZML:
        raise InputError("is no imzML", where=path, remedy="give the .imzML first, then the slide")
    if path.is_file() and not size_of(path):
        raise InputError("is empty", where=path, remedy="export it again")
    parts = content_digest(str(path)) + content_digest(str(_find_ibd(path)))
    return hashlib.sha256(parts.encode()).hexdigest()


def _cached_walk(path: Place, cache: Place) -> head.Walk:
    try:
        key = imzml_cache.key_of(path)
    except OSError:
        return _walk(path)  # which says why it cannot be read
    walk = imzml_cache.load(path, cache)
    if walk is None:
        walk = _walk(path)
        imzml_cache.save(walk, key, cache)
    return walk


def _walk(path: Place) -> head.Walk:
    # Files that declare UTF-8 but hold Latin-1 text ("µm") exist; all that is kept is ASCII either way.
    for encoding in (None, "iso-8859-1"):
        try:
            return scan(path, encoding)
        except (expat.ExpatError, LookupError):
            continue
        except (Unsure, InputError, OSError):
            break
    return _walk_all(path)


def _walk_all(path: Place) -> head.Walk:
    """Every tag through the parser: the reference, which words all errors."""
    problem: expat.ExpatError | None = None
    for encoding in (None, "iso-8859-1"):
        walk = head.Walk(path)
        try:
            walk.run(encoding)
            return walk
        except (expat.ExpatError, LookupError) as error:
            if isinstance(error, LookupError):
                continue
            problem = problem or error
            if error.code != expat.errors.codes[expat.errors.XML_ERROR_INVALID_TOKEN]:
                break
        except OSError as error:
            raise InputError(
                f"cannot be read ({error.strerror or error})", where=path, remedy="check the path"
            ) from error
    raise InputError(
        f"not well-formed XML ({problem})", where=path, remedy="copy or export the imzML again"
    ) from problem


def _find_ibd(path: Place) -> Place:
    exact = path.with_suffix(".ibd")
    # A web server does not say what lies in a folder.
    for ending in (".ibd", ".IBD", ".Ibd"):
        if (found := path.with_suffix(ending)).is_file():
            return found
    if path.parent.is_dir():
        beside: list[Place] = sorted(path.parent.iterdir(), key=str)
        for candidate in beside:
            if candidate.stem == path.stem and candidate.suffix.lower() == ".ibd":
                return candidate
    raise InputError(f"its binary file {exact.name} is missing", where=path, remedy="put it beside the .imzML")


def _check_length(ibd_path: Place, walk: head.Walk) -> None:
    size, needed, first, done = size_of(ibd_path), 0, None, 0
    for parts in zip(*map(blocks, walk.columns.values()), strict=True):
        part, ends = dict(zip(walk.columns, parts, strict=True)), np.zeros(1, np.int64)
        for kind in ("mz", "int"):
            sizes = part.get(f"{kind}_bytes", part["length"] * np.dtype(walk.dtypes[kind]).itemsize)
            ends = np.maximum(ends, part[f"{kind}_offset"] + sizes)
        needed = max(needed, int(ends.max()))
        beyond = np.flatnonzero(ends > size)
        if first is None and len(beyond):
            first = done + int(beyond[0])
        done += len(ends)
    if first is not None:
        raise InputError(
            f"truncated: spectrum {first + 1} of {done} ends beyond it; {needed} bytes needed, {size} present",
            where=ibd_path,
            remedy="copy the .ibd again",
        )


def _check_uuid(content: head.Terms, path: Place, ibd_path: Place) -> tuple[str | None, bool | None]:
    stated = content.get(head.UUID, ("", "", ""))[0]
    uuid = "".join(c for c in stated.lower() if c in "0123456789abcdef")
    if len(uuid) != 32:
        return None, None
    with open_binary(ibd_path) as handle:
        matches = handle.read(16).hex() == uuid
    if not matches:
        warnings.warn(
            f"{path}: {ibd_path.name} does not begin with the identifier that the .imzML states; "
            "make sure that the two belong together",
            UserWarning,
            stacklevel=3,
        )
    return uuid, matches
