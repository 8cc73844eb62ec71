"""What users bring: sections (one slide and one measurement each) and studies of many."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deepfere.config import read_yaml, rising
from deepfere.errors import InputError
from deepfere.places import located
from deepfere.remote import is_url

EACH = "each"
"""Of a section of a study: one section for every region of its measurement, or for every piece on its slide."""
PLACED = "slide_region is each, but an alignment, landmarks or teaching points say where the section lies"


class Section(BaseModel):
    """One slide and one measurement of the same (or the next) piece of tissue.

    Attributes:
        name: Unique in the study; names folders, so letters, digits, ``.``, ``_`` and ``-`` only.
        msi: The .imzML file, the store of a table (AnnData, SpatialData), or an ingested cube.
        slide: The slide; None for a run without the stain.
        pitch_um: Measured pixel size (y, x) where the file does not state it (always wins).
        slide_mpp_um: Slide pixel size (y, x) where the file does not state it (always wins).
        alignment: Alignment JSON that is used as it is.
        landmarks: Landmark CSV, or sequence file with teaching points (.mis), that fixes the affine.
        mz_range: Lowest and highest m/z that was scanned, where the spectra do not show it: an ion of the study that
            they never hold is zero within, and refused outside.
        region: Which of the measurement's regions it is: a number, "all" for all of them as one section, or, in a
            study, "each" for as many sections. None where there is only one.
        slide_region: Which of the slide's pieces of tissue is searched and used: a number, "all" for all, or, in a
            study, "each" for as many sections. None where one alone is large enough to be what was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    msi: str = Field(min_length=1)
    slide: str | None = Field(None, min_length=1)
    pitch_um: tuple[float, float] | None = None
    slide_mpp_um: tuple[float, float] | None = None
    alignment: str | None = None
    landmarks: str | None = None
    mz_range: tuple[float, float] | None = None
    region: int | Literal["all", "each"] | None = None
    slide_region: int | Literal["all", "each"] | None = None

    @property
    def everywhere(self) -> bool:
        """Whether all of its files are at URLs, where every machine finds them."""
        return all(is_url(path) for path in (self.msi, self.slide, self.alignment, self.landmarks) if path is not None)

    @model_validator(mode="after")
    def _one_placement(self) -> Section:
        if self.alignment is not None and self.landmarks is not None:
            raise ValueError("both an alignment and landmarks are given: give one of them")
        if self.slide_region == EACH and self.region == EACH:
            raise ValueError(
                "region and slide_region are each: which region lies on which piece is not guessed; give a section for "
                "every pair (region: 1, slide_region: 2), or slide_region: all, and each region is looked for on "
                "all of the slide"
            )
        if self.slide_region == EACH and (self.alignment is not None or self.landmarks is not None):
            raise ValueError(f"{PLACED}; give slide_region a number")
        return self

    @field_validator("mz_range", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("mz_range")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return rising(value)

    @field_validator("pitch_um", "slide_mpp_um", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = [float(part) for part in value.replace("x", ",").split(",")] if value.strip() else None
            except ValueError:
                form = "give 50, or 50,40 (in a table 50x40) for y and x"
                raise ValueError(f"{value!r} is no size in micrometres: {form}") from None
        if isinstance(value, int | float):
            value = (float(value), float(value))
        if isinstance(value, list | tuple) and len(value) == 1:
            value = (value[0], value[0])
        return value

    @field_validator("pitch_um", "slide_mpp_um")
    @classmethod
    def _positive(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 < v < 1e5 for v in value):
            raise ValueError(f"{value[0]:g} x {value[1]:g} is no size: it must be positive micrometres, below 100 000")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        # YAML's yes and true would count as 1. Of validators before the type's own the last one is the first.
        if any(isinstance(part, bool) for part in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError("true and false are no values here")
        return value


class Study(BaseModel):
    """Sections that are processed and trained together. One section is a study of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sections: list[Section] = Field(min_length=1)

    @field_validator("sections")
    @classmethod
    def _unique(cls, value: list[Section]) -> list[Section]:
        names = [s.name for s in value]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise ValueError(f"section names must differ; twice: {', '.join(doubled)}")
        return value


def make_section(**values: Any) -> Section:
    """A `Section`, with problems told as one clear line.

    Raises:
        InputError: A value is missing, unknown or wrong.
    """
    return validated(Section, {k: v for k, v in values.items() if v is not None}, None)


def validated(model: Any, values: Any, where: object) -> Any:
    """A model of these values, with problems told as one clear line.

    Raises:
        InputError: A value is missing, unknown or wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{name}: {text}" if name else text, where=where, remedy="correct the manifest or flag"
        ) from error


def _rows(table: csv.DictReader[str], path: Path) -> list[dict[str, str]]:
    """The rows of a CSV manifest, without empty fields.

    Raises:
        InputError: A field stands under no column: an unquoted 50,40 would else lose its 40 without a word.
    """
    names = table.fieldnames or []
    twice = sorted({name for name in names if name and list(names).count(name) > 1})
    if twice:
        raise InputError(f"has several columns {', '.join(twice)}", where=path, remedy="keep one of each")
    unknown = [name for name in names if name and name not in Section.model_fields]
    if unknown or "name" not in names:
        raise InputError(
            f"has no column name; its first line is {','.join(names)!r}"
            if "name" not in names
            else f"has the unknown columns {', '.join(unknown)}",
            where=path,
            remedy=f"give columns, separated by commas, among {', '.join(Section.model_fields)}",
        )
    out = []
    for row in table:
        beyond: Any = row.get(None, [])
        if any(beyond) or row.get(""):
            raise InputError(
                f"line {table.line_num} ({row.get('name')}) has more fields than the header names",
                where=path,
                remedy='quote a value that holds a comma, such as "50,40", and name every column',
            )
        out.append({name: value for name, value in row.items() if name and value})
    return out


def load_study(path: str | Path) -> Study:
    """Read a study manifest: YAML (``sections:`` list) or CSV (one row a section).

    Relative paths are relative to the manifest.

    Raises:
        InputError: Unreadable, an unknown or missing column, a row longer than the header, doubled names.
    """
    if is_url(path):
        raise InputError("is a URL", where=path, remedy="give the manifest as a local file; its files may be URLs")
    path = Path(path)
    try:
        if path.suffix.lower() == ".csv":
            # Spreadsheets may put a byte order mark first.
            with path.open(newline="", encoding="utf-8-sig") as handle:
                values: Any = {"sections": _rows(csv.DictReader(handle), path)}
        else:
            values = read_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, csv.Error) as error:
        raise InputError(f"cannot be read as a study ({error})", where=path, remedy="give a YAML or CSV") from error
    if not isinstance(values, dict) or not isinstance(values.get("sections"), list):
        raise InputError("is not a study", where=path, remedy='give a list "sections:" with name, msi and slide')
    for row in values["sections"]:
        if not isinstance(row, dict):
            raise InputError(f"a section is {row!r}", where=path, remedy="give name, msi and slide for each")
        for key in ("msi", "slide", "alignment", "landmarks"):
            if isinstance(row.get(key), str) and row[key] and "://" not in row[key]:
                row[key] = located(path.parent / row[key])
    return validated(Study, values, path)
