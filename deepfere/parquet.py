"""Parquet files that are there whole, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from deepfere.errors import InputError
from deepfere.places import Place, UrlPath, writing

if TYPE_CHECKING:
    import pyarrow as pa

NO_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS}
NO_PLACE |= {errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of a path that is no place to write to; others are the disk's."""


def write_table(table: pa.Table, target: Place) -> None:
    """Write a Parquet file that is there whole, or not at all.

    Args:
        table: What is written; its schema's metadata stay.
        target: Path or URL; a file that is there is replaced.

    Raises:
        InputError: A local folder cannot be written.
    """
    write_parts(table.schema, [table], target)


def make_folder(folder: Path) -> None:
    """Make a folder that files are to be written to, where it is not there.

    Raises:
        InputError: It cannot be made, or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno not in {*NO_PLACE, errno.ENOENT}:
            raise
        raise _refusal(error, folder) from error


def write_parts(schema: pa.Schema, parts: Iterable[pa.Table], target: Place) -> None:
    """As `write_table`, of parts that are not in memory all at once; each is a row group, or several."""
    from deepfere.store import sync

    if isinstance(target, UrlPath):
        with writing(target) as file:
            _write(schema, parts, file)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    make_folder(target.parent)
    try:
        try:
            _write(schema, parts, temporary)
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        raise _refusal(error, target) from error


def _refusal(error: OSError, where: Path) -> InputError:
    return InputError(f"cannot be written ({error.strerror or error})", where=where, remedy="choose another place")


def _write(schema: pa.Schema, parts: Iterable[pa.Table], path: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(part)
