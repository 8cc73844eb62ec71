"""Walks the XML of an .imzML once and keeps what matters: header terms and one row per spectrum.

Expat events instead of a tree: memory is the index alone, whatever the file's size. Terms are looked up by
accession, never by name, because writers spell names as they like.

Source: imzML 1.1 (Schramm et al., J. Proteomics 2012, 75, 5106), the PSI-MS and imaging-MS vocabularies.
"""

from __future__ import annotations

from contextlib import suppress
from xml.parsers import expat

import numpy as np

from deepfere.errors import InputError
from deepfere.places import Place
from deepfere.readers.columns import Column
from deepfere.readers.ranges import open_binary

Term = tuple[str, str, str]  # value, unit accession or unit name, term name
Terms = dict[str, Term]

CONTINUOUS, PROCESSED, UUID = "IMS:1000030", "IMS:1000031", "IMS:1000080"
CENTROID, PROFILE = "MS:1000127", "MS:1000128"
NEGATIVE, POSITIVE = "MS:1000129", "MS:1000130"
POSITION_X, POSITION_Y, POSITION_Z = "IMS:1000050", "IMS:1000051", "IMS:1000052"
EXTERNAL, OFFSET, LENGTH, ENCODED = "IMS:1000101", "IMS:1000102", "IMS:1000103", "IMS:1000104"
MZ_ARRAY, INTENSITY_ARRAY, ZLIB = "MS:1000514", "MS:1000515", "MS:1000574"

DTYPES = {
    "MS:1000519": "<i4",
    "MS:1000521": "<f4",
    "MS:1000522": "<i8",
    "MS:1000523": "<f8",
    "IMS:1000141": "<i4",
    "IMS:1000142": "<i8",
    "IMS:1100000": "|i1",
    "IMS:1100001": "<i2",
}
# MS:1002312-14 are numpress, 1002746-48 numpress followed by zlib, IMS:100500x xz, lz4 and zstd.
UNREAD_COMPRESSIONS = {f"MS:{n}" for n in (*range(1002312, 1002315), *range(1002746, 1002749), 1003088)}
UNREAD_COMPRESSIONS |= {"IMS:1005001", "IMS:1005002", "IMS:1005003"}

MOST = 10**17
"""No offset, length or position is larger: sums of such, in bytes, are no more than 64 bits hold."""
COLUMNS = ("x", "y", "length", "mz_offset", "int_offset")
"""What is known of every spectrum; "mz_bytes" and "int_bytes" are where arrays are compressed."""


class Walk:
    """What one pass over the XML found.

    Attributes:
        content: Terms of ``fileContent``.
        scan_settings: Terms of each ``scanSettings``.
        columns: A value per spectrum, by the names in ``COLUMNS``; bytes are those in the .ibd, and the length, in
            values, is that of both arrays.
        dtypes: Kind ("mz" or "int") -> numpy dtype string.
        compressed: Kind -> whether its arrays are zlib streams.
        representations: Which of "centroid" and "profile" the spectra state.
        polarities: Which of "negative" and "positive" the spectra or the file state.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.content: Terms = {}
        self.scan_settings: list[Terms] = []
        self.columns = {name: Column() for name in COLUMNS}
        self.dtypes: dict[str, str] = {}
        self.compressed: dict[str, bool] = {}
        self.representations: set[str] = set()
        self.polarities: set[str] = set()
        self._root = ""
        self._groups: dict[str, Terms] = {}
        self._late: list[tuple[Terms, str]] = []  # references that precede their group's definition
        self._ignored: Terms = {}
        self._sink: Terms = self._ignored
        self._spectrum: Terms | None = None
        self._arrays: list[Terms] = []
        self._kinds: dict[tuple[str, ...], tuple[str, tuple[str, ...], bool]] = {}
        self._z: str | None = None

    def __len__(self) -> int:
        return len(self.columns["x"])

    def parser(self, encoding: str | None = None) -> expat.XMLParserType:
        """A parser that tells this walk what it meets; ``encoding`` overrides what the XML declares."""
        parser = expat.ParserCreate(encoding)
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        return parser

    def run(self, encoding: str | None = None) -> None:
        """Walk the file; ``encoding`` overrides what the XML declares."""
        with open_binary(self.path) as handle:
            self.parser(encoding).ParseFile(handle)

    def group(self, name: str) -> Terms:
        """Terms of a referenceableParamGroup; none where it is not defined."""
        return self._groups.get(name, {})

    def describe(self, terms: Terms) -> tuple[str, tuple[str, ...]]:
        """Kind ("mz", "int" or empty) of an array with these terms, and the number types that it states."""
        return self._describe(terms, len(self) + 1)[:2]

    def _refuse(self, what: str, remedy: str) -> InputError:
        return InputError(what, where=self.path, remedy=remedy)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        tag = tag.rpartition(":")[2]
        if tag == "cvParam":
            accession = attributes.get("accession", "")
            unit = attributes.get("unitAccession") or attributes.get("unitName", "")
            self._sink[accession] = (attributes.get("value", ""), unit, attributes.get("name", ""))
        elif tag == "referenceableParamGroupRef":
            name = attributes.get("ref", "")
            if name in self._groups:
                self._sink.update(self._groups[name])
            elif self._spectrum is None:
                self._late.append((self._sink, name))
            # A spectrum may refer to a group that is nowhere (seen in converters' output): what is missing
            # for reading it is refused by its own name later on.
        elif tag == "binaryDataArray":
            self._sink = {}
            self._arrays.append(self._sink)
        elif tag == "spectrum":
            self._settle()
            self._sink = self._spectrum = {}
            self._arrays = []
        elif tag == "referenceableParamGroup":
            self._sink = self._groups[attributes.get("id", "")] = {}
        elif tag == "fileContent":
            self._sink = self.content
        elif tag == "scanSettings":
            self._sink = {}
            self.scan_settings.append(self._sink)
        elif not self._root:
            self._root = tag
            if tag not in ("mzML", "indexedmzML"):
                raise self._refuse(f"not an imzML file (its root is <{tag}>)", "give an .imzML file")

    def _end(self, tag: str) -> None:
        tag = tag.rpartition(":")[2]
        if tag == "binaryDataArray":
            self._sink = self._spectrum if self._spectrum is not None else self._ignored
        elif tag == "spectrum" and self._spectrum is not None:
            self._keep(self._spectrum)
            self._spectrum = None
            self._sink = self._ignored
        elif tag in ("referenceableParamGroup", "fileContent", "scanSettings"):
            self._sink = self._ignored

    def _settle(self) -> None:
        """Resolve references made before their group was defined (fileContent comes first)."""
        for sink, name in self._late:
            for accession, term in self._groups.get(name, {}).items():
                sink.setdefault(accession, term)
        self._late.clear()

    def _integer(self, terms: Terms, accession: str, what: str) -> int:
        number = len(self) + 1
        if accession not in terms:
            raise self._refuse(f"spectrum {number} has no {what} ({accession})", "export the imzML again")
        text = terms[accession][0]
        value: int | None = None
        try:
            value = int(text)
        except ValueError:
            with suppress(ValueError, OverflowError):
                value = int(float(text)) if float(text).is_integer() else None
        if value is not None:
            if abs(value) > MOST:
                raise self._refuse(f"spectrum {number}: {what} is {text!r}, which cannot be", "export the imzML again")
            return value
        raise self._refuse(f"spectrum {number}: {what} is {text!r}, not a whole number", "export the imzML again")

    def _keep(self, spectrum: Terms) -> None:
        number = len(self) + 1
        row = {
            "x": self._integer(spectrum, POSITION_X, "position x"),
            "y": self._integer(spectrum, POSITION_Y, "position y"),
        }
        for found, accessions in (
            (self.representations, {CENTROID: "centroid", PROFILE: "profile"}),
            (self.polarities, {NEGATIVE: "negative", POSITIVE: "positive"}),
        ):
            found.update(name for accession, name in accessions.items() if accession in spectrum)
        if POSITION_Z in spectrum:
            z = spectrum[POSITION_Z][0]
            if self._z is not None and z != self._z:
                raise self._refuse(f"holds several sections (position z {self._z} and {z})", "split it by z")
            self._z = z
        lengths: dict[str, int] = {}
        for terms in self._arrays:
            kind, dtypes, compressed = self._describe(terms, number)
            if not kind:
                continue
            if f"{kind}_offset" in row:
                raise self._refuse(f"spectrum {number} has two {kind} arrays", "export the imzML again")
            if terms.get(EXTERNAL, ("true",))[0].lower() == "false":
                raise self._refuse(f"spectrum {number} keeps its data in the XML, not in an .ibd", "export it as imzML")
            offset = self._integer(terms, OFFSET, "external offset")
            length = self._integer(terms, LENGTH, "external array length")
            encoded = self._integer(terms, ENCODED, "encoded length") if ENCODED in terms else 0
            if offset < 0 or length < 0 or encoded < 0:
                raise self._refuse(f"spectrum {number} has a negative offset or length", "export the imzML again")
            if not compressed:
                dtypes = self._fit(dtypes, length, encoded, kind, number)
                encoded = length * np.dtype(dtypes[0]).itemsize
            elif len(dtypes) > 1 or (not encoded and length):
                raise self._refuse(f"spectrum {number}: the {kind} array's size is unclear", "export it again")
            if (
                self.dtypes.setdefault(kind, dtypes[0]) != dtypes[0]
                or self.compressed.setdefault(kind, compressed) != compressed
            ):
                raise self._refuse(
                    f"spectrum {number}: its {kind} array has another number type than those before",
                    "export the imzML with one type",
                )
            row |= {f"{kind}_offset": offset, f"{kind}_bytes": encoded}
            lengths[kind] = length
        if len(lengths) < 2:
            missing = "m/z" if "mz" not in lengths else "intensity"
            raise self._refuse(f"spectrum {number} has no {missing} array", "export the imzML again")
        if lengths["mz"] != lengths["int"]:
            raise self._refuse(
                f"spectrum {number} has {lengths['mz']} m/z values but {lengths['int']} intensities",
                "export the imzML again",
            )
        row["length"] = lengths["mz"]
        for name in self.names():
            self.columns[name].append(row[name])

    def names(self) -> tuple[str, ...]:
        """What is kept of every spectrum, once the first was met."""
        names = (*COLUMNS, *(f"{kind}_bytes" for kind in ("mz", "int") if self.compressed[kind]))
        for name in names[len(self.columns) :]:
            self.columns[name] = Column()
        return names

    def _describe(self, terms: Terms, number: int) -> tuple[str, tuple[str, ...], bool]:
        """Kind, candidate dtypes and compression of an array, by which terms it has."""
        key = tuple(terms)
        if key not in self._kinds:
            kind = "mz" if MZ_ARRAY in terms else "int" if INTENSITY_ARRAY in terms else ""
            unread = UNREAD_COMPRESSIONS & terms.keys()
            if kind and unread:
                name = terms[min(unread)][2]
                raise self._refuse(
                    f"its arrays are compressed with {name!r}, which is not read", "export with zlib or none"
                )
            dtypes = tuple(dict.fromkeys(DTYPES[a] for a in terms if a in DTYPES))
            if kind and not dtypes:
                raise self._refuse(f"spectrum {number}: the {kind} array states no number type", "export it again")
            self._kinds[key] = (kind, dtypes, ZLIB in terms)
        return self._kinds[key]

    def _fit(self, dtypes: tuple[str, ...], length: int, encoded: int, kind: str, number: int) -> tuple[str, ...]:
        """The declared types that the byte count allows: it decides where a file declares two."""
        if length == 0:
            known = self.dtypes.get(kind)
            return (known,) if known in dtypes else dtypes[:1]
        if encoded:
            fitting = tuple(d for d in dtypes if np.dtype(d).itemsize * length == encoded)
            if not fitting:
                raise self._refuse(
                    f"spectrum {number}: {length} {kind} values in {encoded} bytes do not fit the type stated",
                    "export the imzML again",
                )
            dtypes = fitting
        if len(dtypes) > 1:
            raise self._refuse(
                f"the {kind} array states several number types ({', '.join(dtypes)})", "remove the wrong one"
            )
        return dtypes
