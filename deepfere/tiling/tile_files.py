"""Files of tiles: plans, and the rows that a job leaves, by which an interrupted one goes on. Without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.parquet import write_table
from deepfere.places import Place, place, reading
from deepfere.readers.ranges import open_binary
from deepfere.readers.slide import Reading, slide_digest
from deepfere.remote import is_url
from deepfere.tiling.tiles import TilePlan, TileSpec

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

VERSION = 1
KEY = b"deepfere.tiles"
COLUMNS = {
    "corner_px": ("row_px", "col_px"),
    "window_px": ("first_row", "end_row", "first_col", "end_col"),
    "valid_px": ("valid_h", "valid_w"),
}
"""Of a plan's file: the columns of its arrays."""
PAIRS = ("slide_mpp_um", "level_px", "native_px")
NAMES = ("plan", "slide", "tile", "error")
"""Columns by which a row is known as that of a tile."""


def save_plan(plan: TilePlan, path: str | Path | Place) -> None:
    """Write a plan; see `deepfere.tiling.tiles.TilePlan.to_parquet`."""
    import pyarrow as pa

    columns = {name: getattr(plan, array)[:, k] for array, names in COLUMNS.items() for k, name in enumerate(names)}
    kept = {"version": VERSION, "spec": asdict(plan.spec), "path": plan.path, "slide_sha256": plan.slide_sha256}
    kept |= {"reading": asdict(plan.reading), "candidates": plan.candidates}
    kept |= {name: getattr(plan, name) for name in PAIRS}
    table = pa.table(columns | {"tissue": plan.tissue})
    write_table(table.replace_schema_metadata({KEY: json.dumps(kept, sort_keys=True)}), place(path))


def load_plan(path: str | Path | Place, slide: str | Path | None = None) -> TilePlan:
    """Read a plan; see `deepfere.tiling.tiles.TilePlan.from_parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with reading(place(path)) as file, pq.ParquetFile(file) as opened:
            table = opened.read()
        kept = json.loads(table.schema.metadata[KEY])
        if kept["version"] != VERSION:
            raise ValueError(f"version {kept['version']}; this program knows {VERSION}")
        plan = _plan_of(table, kept)
    except FileNotFoundError as error:
        raise InputError("does not exist", where=path, remedy="check the path") from error
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"cannot be read as a plan of tiles ({error})",
            where=path,
            remedy="give what to_parquet wrote, or plan anew",
        ) from error
    where = plan.path if slide is None else str(slide if is_url(slide) else Path(slide).resolve())
    if slide_digest(where) != plan.slide_sha256:
        raise InputError(
            f"is not the slide that {path} was made for: its content is another", where=where, remedy="plan anew"
        )
    return replace(plan, path=where)


def _plan_of(table: pa.Table, kept: dict[str, Any]) -> TilePlan:
    arrays: dict[str, Any] = {
        array: np.stack([table.column(name).to_numpy() for name in names], axis=1) for array, names in COLUMNS.items()
    }
    pairs: dict[str, Any] = {name: (kept[name][0], kept[name][1]) for name in PAIRS}
    spec, how = kept["spec"], kept["reading"]
    spec["offset_px"] = tuple(spec["offset_px"])
    how |= {name: tuple(how[name]) for name in ("level_mpp_um", "mpp_um", "scale")}
    return TilePlan(
        spec=TileSpec(**spec),
        path=kept["path"],
        slide_sha256=kept["slide_sha256"],
        reading=Reading(**how),
        tissue=table.column("tissue").to_numpy(),
        candidates=kept["candidates"],
        **pairs,
        **arrays,
    )


def tiles_done(folder: str | Path | Place) -> pd.DataFrame:
    """The tiles whose rows the Parquet files of a folder hold; of what was made of them nothing is read.

    Args:
        folder: Where `deepfere.write_tiles` wrote, a path or a URL; one that is not there yet holds none.

    Returns:
        A row for each tile: ``plan`` (key), ``slide``, ``tile`` (number in the plan) and ``error``, which is missing
        where there was none. Of a tile that was tried again the row without an error counts.

    Raises:
        InputError: A file is damaged, or has not these columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = place(folder)
    tables = [pa.table({name: pa.array([], pa.int64() if name == "tile" else pa.string()) for name in NAMES})]
    paths: list[Place] = [*folder.glob("*.parquet")]
    for path in sorted(paths, key=str):
        try:
            with open_binary(path) as stream, pq.ParquetFile(stream) as file:
                check_columns(file.schema_arrow.names, path)
                tables.append(file.read(columns=list(NAMES)).select(NAMES).cast(tables[0].schema))
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"cannot be read as Parquet ({error})", where=path, remedy="delete it: its tiles are then made again"
            ) from error
    table = pa.concat_tables(tables)
    # Few plans and slides, many tiles.
    for k, name in enumerate(NAMES[:2]):
        table = table.set_column(k, name, table.column(name).combine_chunks().dictionary_encode())
    rows = table.to_pandas()
    good_first = rows["error"].notna().argsort(kind="stable")
    again = rows.iloc[good_first].duplicated(["plan", "tile"])
    return rows.drop(index=again.index[again]).reset_index(drop=True)


def check_columns(names: Sequence[str], where: object) -> None:
    """Refuse rows that nobody could tell the tile of.

    Raises:
        InputError: A column is missing.
    """
    lost = [name for name in NAMES if name not in names]
    if lost:
        raise InputError(
            f"has no column {', '.join(lost)}", where=where, remedy=f"pass {', '.join(NAMES)} on with what is made"
        )


def missing_tiles(
    plans: Sequence[TilePlan], done: pd.DataFrame | None
) -> list[tuple[TilePlan, str, NDArray[np.int64]]]:
    """Of each plan the part that is not done, the plan's key, and the part's numbers in the plan.

    Raises:
        InputError: Of one of their slides, tiles of another plan are done: rows of both would be told apart by nobody.
    """
    keys = [plan.key for plan in plans]
    if done is None:
        return [(plan, key, np.arange(len(plan))) for plan, key in zip(plans, keys, strict=True)]
    mixed = done["slide"].isin({plan.path for plan in plans}) & ~done["plan"].isin(keys)
    if mixed.any():
        raise InputError(
            f"{int(mixed.sum())} of its tiles that are done are of another plan",
            where=done["slide"][mixed].iloc[0],
            remedy="go on with that plan (TilePlan.from_parquet), or write to another folder",
        )
    out = []
    for plan, key in zip(plans, keys, strict=True):
        left = np.setdiff1d(np.arange(len(plan)), done["tile"][done["plan"] == key])
        out.append((plan.take(left), key, left))
    return out


def with_text_errors(table: pa.Table) -> pa.Table:
    """A table whose column of errors is of text also where there are none: files of two types are not read as one."""
    import pyarrow as pa

    k = table.schema.get_field_index("error")
    if k < 0 or not pa.types.is_null(table.schema.field(k).type):
        return table
    return table.set_column(k, "error", table.column(k).cast(pa.string()))
