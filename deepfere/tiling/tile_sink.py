"""Ray Data adapter of what is made of tiles: rows in, whole Parquet files out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from deepfere.parquet import make_folder, write_table
from deepfere.places import Place, place

# Zarr and fsspec before any row: Ray interrupts the other tasks when one fails, and a process whose import of fsspec
# was interrupted can import it no more.
from deepfere.store import sync  # noqa: F401
from deepfere.tiling.tile_files import check_columns, with_text_errors

Written = tuple[int, int, str]
"""Rows of a task, how many of them are of bad tiles, and what is wrong with the first one."""


class TileFiles(Datasink[Written]):
    """Writes rows of tiles, a file for each task, which is there whole or not at all.

    Args:
        folder: A path or a URL.
    """

    def __init__(self, folder: str | Path | Place) -> None:
        # Absolute: workers may stand in another folder.
        self._folder, self._run = place(folder).resolve(), uuid4().hex[:12]

    def write(self, blocks: Iterable[Block], ctx: Any) -> Written:
        """See Ray Data. A task that is tried again replaces its own file."""
        import pyarrow as pa

        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [with_text_errors(table) for table in tables if table.num_rows]
        if not tables:
            return 0, 0, ""
        check_columns(tables[0].schema.names, self._folder)
        table = pa.concat_tables(tables)
        write_table(table, self._folder / f"{self._run}-{ctx.task_idx:06d}.parquet")
        errors = table.column("error").drop_null()
        return table.num_rows, len(errors), str(errors[0]) if len(errors) else ""

    def on_write_complete(self, write_result: WriteResult[Written]) -> None:
        """See Ray Data. Tells of bad tiles."""
        rows, bad, texts = zip(*write_result.write_returns, strict=True) if write_result.write_returns else ((), (), ())
        if sum(bad):
            first = next(filter(None, texts), "")
            warnings.warn(f"{sum(bad)} of {sum(rows)} tiles are bad, first {first}", UserWarning, stacklevel=2)


def write_tiles(tiles: Any, folder: str | Path | Place) -> None:
    """Carry a dataset of tiles out, and write what comes of it to Parquet files as it is finished.

    After an interruption `deepfere.tiles_done` tells which tiles the folder holds.

    Args:
        tiles: From `deepfere.tile_dataset`, and what was mapped over it; each row keeps ``plan``, ``slide``, ``tile``
            and ``error``.
        folder: Where the files go, a path or an ``s3://`` URL; others that are there stay.

    Raises:
        InputError: A local folder cannot be written, which shows before any tile is read.

    Warns:
        UserWarning: Some tiles are bad; how many, and what is wrong with the first one.
    """
    target = place(folder)
    if isinstance(target, Path):
        make_folder(target)
    tiles.write_datasink(TileFiles(target))
