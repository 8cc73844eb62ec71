"""A measurement as a table of pixels by m/z bins: AnnData in Zarr, alone or as a table of a SpatialData store.

Converters of vendors' files write it (thyra does). ``open_table`` knows every pixel's place and how many values it
has; `deepfere.readers.table_rows` reads them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.readers.columns import Column
from deepfere.readers.digest import tree_digest
from deepfere.readers.table_rows import damaged, stored_lengths
from deepfere.remote import is_url
from deepfere.store import open_foreign

ENCODINGS = {"csc_matrix": "csc", "csr_matrix": "csr", "array": "dense"}
MICROMETRES = {*("micrometer", "micrometers", "micrometre", "micrometres"), *("micron", "microns", "um", "µm", "μm")}
AGAIN = "convert it again"


@dataclass(frozen=True, eq=False)
class Table:
    """A table of N pixels and A variables. Pixels without any value are left out: see `empty`.

    Attributes:
        path: As given.
        name: Path of the AnnData group below ``path``; empty where it is the group itself.
        group: That group.
        encoding: "csc", "csr" or "dense".
        shape: Rows and variables of the whole table.
        mz: (A,) float64, in the table's order.
        x: (N,) position x.
        y: (N,) position y.
        rows: (N,) which row of the table each pixel is, rising.
        length: (N,) values that are stored (dense: not zero).
        empty: Rows with no value. Converters list the whole rectangle around what was measured, so these count as not
            measured.
        representation: "centroid", "profile", or None where the table does not say.
        pitch_um: Pixel pitch (y, x), or None where none is stated that can be trusted.
        pitch_problem: Why ``pitch_um`` is None, in words; empty otherwise.
    """

    path: Path
    name: str
    group: zarr.Group
    encoding: str
    shape: tuple[int, int]
    mz: NDArray[np.float64]
    x: Column
    y: Column
    rows: Column
    length: Column
    empty: int
    representation: str | None
    pitch_um: tuple[float, float] | None
    pitch_problem: str

    def __len__(self) -> int:
        return len(self.x)

    def only(self, rows: NDArray[np.int64]) -> Table:
        """The table of some pixels (their positions here, rising)."""
        columns: dict[str, Any] = {name: Column.of(getattr(self, name)[rows]) for name in ("x", "y", "rows", "length")}
        return replace(self, **columns)

    def sorted_mz(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The variables' m/z (A,) ascending, and for each variable which of them it is (A,)."""
        order = np.argsort(self.mz, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return self.mz[order], rank


def is_table(path: str | Path) -> bool:
    """Whether this is a local AnnData or SpatialData store; nothing but its attributes is read."""
    if is_url(path) or not Path(path).is_dir():
        return False
    try:
        attrs = dict(open_foreign(path).attrs)
    except InputError:
        return False
    return "spatialdata_attrs" in attrs or attrs.get("encoding-type") == "anndata" or (Path(path) / "tables").is_dir()


def table_digest(path: str | Path) -> str:
    """sha256 (hexadecimal) of the one table that `open_table` would open and the pixel size that is stated for it."""
    _, name, attrs = _find(Path(path))
    parts = tree_digest(Path(path) / name) + repr(_pitch(attrs))
    return hashlib.sha256(parts.encode()).hexdigest()


def open_table(path: str | Path) -> Table:
    """Find the table, and where its pixels and variables are.

    Args:
        path: An AnnData store, a SpatialData store with one table, or one table of it (``STORE/tables/NAME``).

    Raises:
        InputError: There is no table, or several; x, y or m/z are missing or cannot be meant; it is damaged.
    """
    path = Path(path)
    group, name, attrs = _find(path)
    encoding, shape = _matrix(group, path)
    mz = _numbers(group, "var/mz", shape[1], path, "the m/z of its variables").astype(np.float64)
    if not shape[1] or not (np.isfinite(mz).all() and mz.min() > 0):
        raise InputError("has m/z that are not positive numbers", where=path, remedy=AGAIN)
    place = {}
    for axis in ("x", "y"):
        values = _numbers(group, f"obs/{axis}", shape[0], path, f"the position {axis} of its pixels")
        if not (np.isfinite(values) & (values == np.round(values)) & (np.abs(values) < 2**31)).all():
            raise InputError(
                f"has positions (obs/{axis}) that are not whole numbers of pixels", where=path, remedy=AGAIN
            )
        place[axis] = Column.of(values)
    if "obs/z" in group and len(np.unique(_numbers(group, "obs/z", shape[0], path, "z"))) > 1:
        raise InputError("holds several planes (obs/z)", where=path, remedy="convert each plane alone")
    try:
        lengths = stored_lengths(group, encoding, shape)
    except InputError:
        raise
    except Exception as error:  # a store that lost files, or holds nonsense, makes Zarr and numpy raise many things
        raise damaged(path, error) from error
    rows = np.flatnonzero(lengths)
    pitch_um, problem = _pitch(attrs)
    if not len(rows):
        raise InputError("holds no values", where=path, remedy=AGAIN)
    return Table(
        path=path,
        name=name,
        group=group,
        encoding=encoding,
        shape=shape,
        mz=mz,
        x=Column.of(place["x"][rows]),
        y=Column.of(place["y"][rows]),
        rows=Column.of(rows),
        length=Column.of(lengths[rows]),
        empty=shape[0] - len(rows),
        representation=_representation(group),
        pitch_um=pitch_um,
        pitch_problem=problem,
    )


def _find(path: Path) -> tuple[zarr.Group, str, dict[str, Any]]:
    """The AnnData group, its path below ``path``, and the attributes that may state the pixel size."""
    group = open_foreign(path)
    attrs = dict(group.attrs)
    if attrs.get("encoding-type") == "anndata":
        if "pixel_size_x_um" not in attrs and path.resolve().parent.name == "tables":
            try:
                attrs = dict(open_foreign(path.resolve().parents[1]).attrs)
            except InputError:
                pass
        return group, "", attrs
    tables = group.get("tables")
    names = sorted(name for name, _ in tables.groups()) if isinstance(tables, zarr.Group) else []
    if not names:
        raise InputError("holds no table of a measurement", where=path, remedy="give an AnnData or SpatialData store")
    if len(names) > 1:
        listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise InputError(
            f"holds {len(names)} tables ({listed})", where=path, remedy=f"give one of them: {path}/tables/{names[0]}"
        )
    found = group[f"tables/{names[0]}"]
    if not isinstance(found, zarr.Group) or found.attrs.get("encoding-type") != "anndata":
        raise InputError(f"its table {names[0]} is not AnnData", where=path, remedy=AGAIN)
    return found, f"tables/{names[0]}", attrs


def _matrix(group: zarr.Group, path: Path) -> tuple[str, tuple[int, int]]:
    """How the values are stored, and rows and variables."""
    matrix = group.get("X")
    if matrix is None:
        raise InputError("its table has no values (X)", where=path, remedy=AGAIN)
    stated = matrix.attrs.get("encoding-type", "array" if isinstance(matrix, zarr.Array) else "nothing")
    encoding = ENCODINGS.get(str(stated))
    if encoding is None or (encoding == "dense") != isinstance(matrix, zarr.Array):
        raise InputError(f"its values (X) are {stated}, not csc_matrix, csr_matrix or array", where=path, remedy=AGAIN)
    shape = matrix.shape if isinstance(matrix, zarr.Array) else matrix.attrs.get("shape")
    if not (isinstance(shape, list | tuple) and len(shape) == 2):
        raise InputError(f"its values (X) have the shape {shape}, not pixels by m/z", where=path, remedy=AGAIN)
    sizes = int(shape[0]), int(shape[1])  # type: ignore[arg-type]
    if isinstance(matrix, zarr.Group) and not all(isinstance(matrix.get(k), zarr.Array) for k in _PARTS):
        raise InputError("its values (X) lack data, indices or indptr", where=path, remedy=AGAIN)
    return encoding, sizes


_PARTS = ("data", "indices", "indptr")


def _numbers(group: zarr.Group, name: str, count: int, path: Path, what: str) -> NDArray[Any]:
    """A numeric column of a table."""
    column = group.get(name)
    if not isinstance(column, zarr.Array):
        raise InputError(f"does not state {what} ({name})", where=path, remedy="add that column")
    try:
        values = np.asarray(column[:])
    except Exception as error:  # see `open_table`
        raise damaged(path, error) from error
    if values.dtype.kind not in "iuf" or values.shape != (count,):
        raise InputError(
            f"{name} holds {values.dtype} of shape {values.shape}, not {count} numbers", where=path, remedy=AGAIN
        )
    return values


def _representation(group: zarr.Group) -> str | None:
    stated = group.get("uns/essential_metadata/spectrum_type")
    if not isinstance(stated, zarr.Array) or stated.shape != ():
        return None
    text = str(np.asarray(stated[()]).item()).lower()
    named = [kind for kind in ("centroid", "profile") if kind in text]
    return named[0] if len(named) == 1 else None


def _pitch(attrs: Mapping[str, Any]) -> tuple[tuple[float, float] | None, str]:
    """The pitch (y, x) in micrometres that the attributes state, or why there is none."""
    stated = [attrs.get(f"pixel_size_{axis}_um") for axis in ("y", "x")]
    if None in stated:
        known = [axis for axis, value in zip("yx", stated, strict=True) if value is not None]
        return None, f"states a pixel size for {known[0]} alone" if known else "states no pixel size"
    unit = attrs.get("pixel_size_units", "micrometers")
    if str(unit).lower() not in MICROMETRES:
        return None, f"states its pixel size in {unit!r}, not in micrometres"
    try:
        y, x = (float(str(value)) for value in stated)
    except ValueError:
        return None, f"states a pixel size that is no number ({stated[0]} x {stated[1]})"
    if not (math.isfinite(y) and math.isfinite(x) and y > 0 and x > 0):
        return None, f"states a pixel size of {y:g} x {x:g} um"
    # thyra 1 writes the size in x for both axes; what it found in the vendor's file stands beside it.
    info = attrs.get("pixel_size_detection_info")
    found = [info.get(f"detected_{axis}_um") for axis in ("y", "x")] if isinstance(info, Mapping) else []
    source = [float(v) for v in found if isinstance(v, int | float)]
    if len(source) == 2 and not np.allclose(source, (y, x), rtol=1e-6):
        return None, f"states pixels of {y:g} x {x:g} um, but its source's were {source[0]:g} x {source[1]:g} um"
    return (y, x), ""
