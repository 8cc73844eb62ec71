"""Whether what journals record is there, and whole.

A record says of each object of its unit how many bytes it has and their CRC-32, or that none was written, as where a
shard holds fill values alone. A recorded object may be gone all the same: a worker that was taken for lost comes back,
deletes what another one has written meanwhile, and is lost again; disks and people lose files. Zarr reads what is gone
as fill values, without a word.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from deepfere.cluster import Journal
from deepfere.errors import Damaged
from deepfere.places import Place, place, sizes
from deepfere.rows import Phase, Record, Row, RowWorker
from deepfere.store import shard_object

OBJECTS = 32
"""So many are read in a row."""
READ_BYTES = 4 << 20

Records = Mapping[str, Mapping[str, Any]]
"""What a journal holds: by units ``.../ROW/COLUMN``, each with ``wrote``: array -> [bytes, CRC-32] or None."""
Wrong = set[tuple[str, str]]
"""(unit, array) of each object that is not what was recorded; no array where nothing was recorded of objects."""


def row_col(unit: str) -> tuple[int, int]:
    """Of a unit's shards."""
    row, col = unit.split("/")[-2:]
    return int(row), int(col)


def object_of(root: str | Place, unit: str, array: str) -> Place:
    """Of a unit of a store."""
    return shard_object(root, array, *row_col(unit))


def lost(root: str | Place, records: Records) -> Wrong:
    """Objects that are gone, have another size, or stand where none was written; nothing is read.

    Every array's folder is listed once: at a URL that is a request for a thousand objects.

    Args:
        root: The store.
        records: Of its units.
    """
    wrong: Wrong = {(unit, "") for unit, record in records.items() if "wrote" not in record}
    wanted: dict[str, list[tuple[str, int | None]]] = {}
    for unit, record in records.items():
        for array, told in record.get("wrote", {}).items():
            wanted.setdefault(array, []).append((unit, told and told[0]))
    for array, units in wanted.items():
        there = sizes(place(root) / f"{array}/c/0")
        wrong |= {(unit, array) for unit, size in units if there.get("{}/{}".format(*row_col(unit))) != size}
    return wrong


def check_there(root: str | Place, records: Records) -> None:
    """See `lost`.

    Raises:
        Damaged: Something is.
    """
    if wrong := lost(root, records):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(object_of(root, *min(wrong)), f"is gone or damaged{more}")


def unsound_phases(what: str, root: str | Place, journal: Journal) -> Generator[Phase, None, Wrong]:
    """What a journal records that is not there as it was written, every byte read: `lost`, and then on the workers.

    Args:
        what: Name of the work for messages.
        root: The store.
        journal: Its journal.
    """
    records = journal.done()
    wrong = lost(root, records)
    count = sum(told is not None for record in records.values() for told in record.get("wrote", {}).values())
    count -= sum(bool(array) and records[unit]["wrote"][array] is not None for unit, array in wrong)

    def keep(record: Record) -> None:
        wrong.update((unit, array) for unit, array in record.get("wrong", ()))

    if count:
        rows = _rows(records, frozenset(wrong))
        yield Phase(what, WholeWorker, (str(root),), rows, -(-count // OBJECTS), keep)
    return wrong


def _rows(records: Records, but: frozenset[tuple[str, str]]) -> Iterator[Row]:
    objects = (
        [unit, array, told[1]]
        for unit, record in records.items()
        for array, told in record.get("wrote", {}).items()
        if told is not None and (unit, array) not in but
    )
    while some := list(islice(objects, OBJECTS)):
        yield {"unit": "/".join(some[0][:2]), "objects": some}


class WholeWorker(RowWorker):
    """Reads some objects of a store per row (``objects``: unit, array, CRC-32)."""

    def __init__(self, root: str) -> None:
        self._root = root

    def work(self, row: Row) -> Record:
        """Those that are gone or hold something else."""
        objects = row["objects"]
        return {"wrong": [[unit, array] for unit, array, crc in objects if _crc(self._root, unit, array) != crc]}


def _crc(root: str, unit: str, array: str) -> int | None:
    """Of an object's bytes; None where it is gone, or the disk does not give it back."""
    path = object_of(root, unit, array)
    try:
        if not isinstance(path, Path):
            return zlib.crc32(path.read_bytes())
        crc = 0
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                crc = zlib.crc32(piece, crc)
        return crc
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise
        return None
