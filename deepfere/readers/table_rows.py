"""The values of a table of pixels by m/z bins, whatever its encoding: by columns, by rows, dense.

`RowReader` gives those of many pixels in about one pass over the store, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from deepfere.errors import InputError
from deepfere.readers.columns import Column, blocks, reach
from deepfere.scratch import ScratchFile

if TYPE_CHECKING:
    from deepfere.readers.table import Table

PIECE_VALUES, LARGEST_PIECE = 1 << 20, 1 << 22
"""What is read at a time: whole chunks of about so many values; of a chunk that is larger than the second, parts."""
MOST_DECODED = 16
"""So often at most is such a chunk decoded, once for each part."""
HELD_VALUES, MOST_HELD = 1 << 21, 1 << 25
"""So many values, of 8 bytes each, are held of a table that is in order: two chunks, if that lies between the two. Of
any other table that has more than the first none is."""
MOST_PARTS = 1024
"""Parts of the file that values are dealt out to."""
RECORD = np.dtype([("place", "<i4"), ("column", "<i4"), ("value", "<f4")])

Piece = tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]


class RowReader:
    """The values of a table's pixels, asked for in an order that is known beforehand.

    A table by columns has a pixel's values all over it, one in another order those of neighbours. Where they are more
    than should be held, one pass over the table brings all of them into order, in a temporary file of 12 bytes a value
    (`deepfere.scratch`). Copies of a reader share that; each of them may be asked by a thread of its own.

    Args:
        table: Of the store.
        order: Pixels (positions in ``table``, each once) in the order in which they will be asked for.

    Raises:
        InputError: The table is damaged.
        DeepfereError: There is no room for the temporary file.
    """

    def __init__(self, table: Table, order: Column | NDArray[np.int64]) -> None:
        self.table, self.order = table, order if isinstance(order, Column) else Column.of(order)
        self._ends, total, last, rising = Column(), 0, -1, True
        for part in blocks(self.order):
            self._ends.extend(total + np.cumsum(table.length[part]))
            rising = rising and part[0] > last and bool((np.diff(part) > 0).all())
            total, last = int(self._ends[-1]), int(part[-1])
        self._at = None if rising else _inverse(self.order[:], len(table))
        in_order, many = table.encoding != "csc" and rising, total > HELD_VALUES
        try:
            self._indptr = None if table.encoding == "dense" else _indptr(table.group, table.encoding, table.shape)
        except Exception as error:  # see `open_table`
            raise damaged(table.path, error) from error
        self._sorted = self._brought_into_order() if many and not in_order else None
        self._held = max(HELD_VALUES, min(2 * _decoded_together(table), MOST_HELD))
        self._hold_nothing()

    def __copy__(self) -> RowReader:
        other = object.__new__(RowReader)
        vars(other).update(vars(self))
        other._hold_nothing()
        return other

    def _hold_nothing(self) -> None:
        self._first = self._last = 0  # places in the order that are held
        self._starts = np.zeros(1, np.int64)
        self._columns, self._values = np.empty(0, np.int32), np.empty(0, np.float32)

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]:
        """Variables, values and their number (n,) of some pixels, which are neighbours in the order.

        What it gives may be overwritten by the next call.

        Raises:
            InputError: The table is damaged.
        """
        first, last = self._place(int(rows[0])), self._place(int(rows[-1])) + 1
        done = int(self._ends[first - 1]) if first else 0
        if self._sorted is not None:
            found = self._sorted.read(done, int(self._ends[last - 1]) - done)
            return found["column"], found["value"], self.table.length[rows]
        if not self._first <= first < last <= self._last:
            self._load(first, max(last, self._ends.count_up_to(done + self._held)))
        part = slice(*self._starts[[first - self._first, last - self._first]].tolist())
        return self._columns[part], self._values[part], self.table.length[rows]

    def _place(self, pixel: int) -> int:
        """Where a pixel comes in the order."""
        return self.order.count_up_to(pixel) - 1 if self._at is None else int(self._at[pixel])

    def _load(self, first: int, last: int) -> None:
        held = self.order[first:last]
        lengths = self.table.length[held]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        self._first = self._last = 0
        if len(self._columns) < starts[-1]:
            self._hold_nothing()  # room for the next ones
            self._columns, self._values = np.empty(int(starts[-1]), np.int32), np.empty(int(starts[-1]), np.float32)
        columns, values = self._columns, self._values
        fill = starts[:-1].copy()
        for row, column, value in self._pieces(held):
            # By pixel; where each goes is behind what its pixel has already.
            count = np.bincount(row, minlength=len(held))
            begin = np.cumsum(count) - count
            into = np.repeat(fill - begin, count) + np.arange(len(row))
            fill += count
            if (fill > starts[1:]).any():
                raise damaged(self.table.path, CHANGES)
            order = _by_row(row, count)
            columns[into], values[into] = column[order], value[order]
        if (fill != starts[1:]).any():
            raise damaged(self.table.path, CHANGES)
        self._starts, self._first, self._last = starts, first, last

    def _brought_into_order(self) -> ScratchFile:
        """All values in the order of the pixels: dealt out to parts of the file, each of which is then sorted."""
        table, order, ends = self.table, self.order, self._ends
        out = ScratchFile(RECORD)
        # First pixel of each part, and where its values begin.
        total = int(ends[-1])
        each = max(PIECE_VALUES, -(-total // MOST_PARTS))
        cuts = np.unique([ends.count_up_to(value) for value in range(0, total, each)])
        starts = np.concatenate([[0], ends[cuts[1:] - 1], ends[-1:]])
        done = starts[:-1].copy()
        for place, column, value in self._pieces(order):
            part = np.searchsorted(cuts, place, side="right") - 1
            count = np.bincount(part, minlength=len(cuts))
            if (done + count > starts[1:]).any():
                raise damaged(table.path, CHANGES)
            records, by_part = np.empty(len(place), RECORD), _by_row(part, count)
            for name, values in (("place", place), ("column", column), ("value", value)):
                records[name] = values[by_part]
            for k, some in zip(np.flatnonzero(count), np.split(records, np.cumsum(count[count > 0])[:-1]), strict=True):
                out.write(int(done[k]), some)
                done[k] += len(some)
        if (done != starts[1:]).any():
            raise damaged(table.path, CHANGES)
        for number, (first, last) in enumerate(pairwise(starts)):
            records = out.read(int(first), int(last - first))
            begin, end = int(cuts[number]), int(cuts[number + 1]) if number + 1 < len(cuts) else len(order)
            place = records["place"] - begin
            count = np.bincount(place, minlength=end - begin)
            if (count != np.diff(ends[begin:end], prepend=first)).any():
                raise damaged(table.path, CHANGES)
            out.write(int(first), records[_by_row(place, count)])
        return out

    def _pieces(self, wanted: Column | NDArray[np.int64]) -> Iterator[Piece]:
        """Values of some pixels, a piece at a time: place among them, variable, value.

        Raises:
            InputError: The table is damaged.
        """
        table, done = self.table, 0
        ends = [reach(table.rows[part]) for part in blocks(wanted)]
        low, high = min(first for first, _ in ends), max(last for _, last in ends) + 1
        place = np.full(high - low, -1, np.int32)
        for part in blocks(wanted):
            place[table.rows[part] - low] = np.arange(done, done + len(part))
            done += len(part)
        try:
            if self._indptr is None:
                yield from _of_dense(table, place, low)
            else:
                yield from _of_sparse(table, self._indptr, place, low)
        except Exception as error:  # see `open_table`
            raise damaged(table.path, error) from error


CHANGES = "it changes while it is read"


def _inverse(order: NDArray[np.int64], count: int) -> Column:
    """The place in the order of each of so many pixels; 0 for those that are not in it."""
    at = np.zeros(count, np.int64)
    at[order] = np.arange(len(order))
    return Column.of(at)


def _decoded_together(table: Table) -> int:
    """Values of a chunk (a shard), of a dense table of a row of them."""
    array = stored_array(table.group, "X" if table.encoding == "dense" else "X/indices")
    unit = (array.shards or array.chunks)[0]
    return unit * table.shape[1] if table.encoding == "dense" else unit


def stored_lengths(group: zarr.Group, encoding: str, shape: tuple[int, int]) -> NDArray[np.int64]:
    """(rows,) stored values of each row of the table; dense: those that are not zero."""
    if encoding == "dense":
        lengths = np.zeros(shape[0], np.int64)
        matrix = stored_array(group, "X")
        for rows, columns in _tiles(matrix, 0, shape[0]):
            lengths[rows] += np.count_nonzero(np.asarray(matrix[rows, columns]), axis=1)
        return lengths
    indptr = _indptr(group, encoding, shape)
    if encoding == "csr":
        return np.diff(indptr[:])
    lengths = np.zeros(shape[0], np.int64)
    indices = stored_array(group, "X/indices")
    for begin, end in _cuts(0, int(indptr[-1]), indices):
        lengths += np.bincount(indices[begin:end], minlength=shape[0])  # raises where an index is beyond the rows
    return lengths


def _indptr(group: zarr.Group, encoding: str, shape: tuple[int, int]) -> Column:
    indptr = np.asarray(stored_array(group, "X/indptr")[:]).astype(np.int64)
    stored = min(stored_array(group, f"X/{name}").shape[0] for name in ("data", "indices"))
    if len(indptr) != shape[encoding == "csc"] + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError("X/indptr does not fit the shape")
    if indptr[-1] > stored:
        raise ValueError(f"X/indptr ends at {indptr[-1]} of {stored} values")
    return Column.of(indptr)


def _cuts(first: int, last: int, array: zarr.Array) -> list[tuple[int, int]]:
    """Ranges of a part of a flat array: whole chunks (or shards) but at its ends, or parts of very large ones."""
    unit = (array.shards or array.chunks)[0]
    step = unit * max(1, PIECE_VALUES // unit)
    if step > LARGEST_PIECE:
        step = max(LARGEST_PIECE, -(-unit // MOST_DECODED))
    return [(max(k, first), min(k + step, last)) for k in range(first // step * step, last, step)]


def _tiles(matrix: zarr.Array, low: int, high: int) -> Iterator[tuple[slice, slice]]:
    """Rows and variables of blocks of some rows of a dense matrix."""
    unit = matrix.shards or matrix.chunks
    width = min(matrix.shape[1], unit[1] * max(1, PIECE_VALUES // (unit[0] * unit[1])))
    height = unit[0] * max(1, PIECE_VALUES // (unit[0] * width))
    for top in range(low // height * height, high, height):
        for left in range(0, matrix.shape[1], width):
            yield slice(max(top, low), min(top + height, high)), slice(left, min(left + width, matrix.shape[1]))


def _of_dense(table: Table, place: NDArray[np.int32], low: int) -> Iterator[Piece]:
    """`RowReader._pieces` of the rows from ``low`` on whose place is not negative."""
    matrix = stored_array(table.group, "X")
    for rows, columns in _tiles(matrix, low, low + len(place)):
        own = place[rows.start - low : rows.stop - low]
        if not (own >= 0).any():
            continue
        block = np.asarray(matrix[rows, columns])
        row, column = np.nonzero((block != 0) & (own >= 0)[:, None])
        if len(row):
            yield own[row], (column + columns.start).astype(np.int32), block[row, column].astype(np.float32)


def _of_sparse(table: Table, indptr: Column, place: NDArray[np.int32], low: int) -> Iterator[Piece]:
    """`RowReader._pieces` of the rows from ``low`` on whose place is not negative."""
    indices, data = stored_array(table.group, "X/indices"), stored_array(table.group, "X/data")
    by_row, high = table.encoding == "csr", low + len(place)
    first, last = (int(indptr[low]), int(indptr[high])) if by_row else (0, int(indptr[-1]))
    for begin, end in _cuts(first, last, indices):
        # Which row (by columns: which variable) each value of the piece belongs to.
        lines = np.arange(indptr.count_up_to(begin) - 1, indptr.count_up_to(end - 1))
        if by_row and not (place[lines - low] >= 0).any():
            continue
        count = np.minimum(indptr[lines + 1], end) - np.maximum(indptr[lines], begin)
        line, index = np.repeat(lines.astype(np.int32), count), np.asarray(indices[begin:end])
        if index.min(initial=0) < 0 or index.max(initial=0) >= table.shape[1 if by_row else 0]:
            raise ValueError("X/indices point beyond the table")
        row, column = (line, index) if by_row else (index, line)
        inside = slice(None) if by_row else np.flatnonzero((row >= low) & (row < high))
        at = place[row[inside] - low]
        kept = np.flatnonzero(at >= 0)
        if len(kept):
            values = np.asarray(data[begin:end]).astype(np.float32, copy=False)[inside]
            yield at[kept], column[inside][kept].astype(np.int32, copy=False), values[kept]


def _by_row(row: NDArray[Any], count: NDArray[np.int64]) -> NDArray[Any] | slice:
    """The order that sorts values by their row, stably; as scipy counts, several times faster than a sort."""
    if len(row) < 2 or (row[1:] >= row[:-1]).all():
        return slice(None)
    each = sparse.coo_matrix((np.ones(len(row), np.int8), (row, np.arange(len(row)))), shape=(len(count), len(row)))
    return np.asarray(each.tocsr().indices)


def stored_array(group: zarr.Group, name: str) -> zarr.Array:
    """An array of the table's store."""
    found = group[name]
    assert isinstance(found, zarr.Array)
    return found


def damaged(path: Path, error: object) -> InputError:
    """What is told of a table that is broken."""
    kind = type(error).__name__ + ": " if isinstance(error, Exception) else ""
    return InputError(f"its table cannot be read ({kind}{error})", where=path, remedy="copy or convert it again")
