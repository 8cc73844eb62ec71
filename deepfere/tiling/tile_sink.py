"""Ray Data adapter of what is made of tiles: rows in, whole Parquet files out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink

from deepfere.parquet import write_table
from deepfere.places import Place, place

# Zarr and fsspec before any row: Ray interrupts the other tasks when one fails, and a process whose import of fsspec
# was interrupted can import it no more.
from deepfere.store import sync  # noqa: F401
from deepfere.tiling.tile_files import check_columns, with_text_errors


class TileFiles(Datasink[None]):
    """Writes rows of tiles, a file for each task, which is there whole or not at all.

    Args:
        folder: A path or a URL.
    """

    def __init__(self, folder: str | Path | Place) -> None:
        # Absolute: workers may stand in another folder.
        self._folder, self._run = place(folder).resolve(), uuid4().hex[:12]

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """See Ray Data. A task that is tried again replaces its own file."""
        import pyarrow as pa

        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [with_text_errors(table) for table in tables if table.num_rows]
        if not tables:
            return
        check_columns(tables[0].schema.names, self._folder)
        write_table(pa.concat_tables(tables), self._folder / f"{self._run}-{ctx.task_idx:06d}.parquet")


def write_tiles(tiles: Any, folder: str | Path | Place) -> None:
    """Carry a dataset of tiles out, and write what comes of it to Parquet files as it is finished.

    After an interruption `deepfere.tiles_done` tells which tiles the folder holds.

    Args:
        tiles: From `deepfere.tile_dataset`, and what was mapped over it; each row keeps ``plan``, ``slide``, ``tile``
            and ``error``.
        folder: Where the files go, a path or an ``s3://`` URL; others that are there stay.
    """
    tiles.write_datasink(TileFiles(folder))
