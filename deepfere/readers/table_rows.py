"""The values of a table of pixels by m/z bins, whatever its encoding: by columns, by rows, dense.

`RowReader` gives those of many pixels, and passes over the store as rarely as its memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from deepfere.errors import InputError

if TYPE_CHECKING:
    from deepfere.readers.table import Table

PIECE_VALUES = 1 << 22
BLOCK_VALUES = 1 << 26  # 8 bytes each

Piece = tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]


class RowReader:
    """The values of a table's pixels, asked for in an order that is known beforehand.

    As many pixels as fit into memory are read in one pass over the table: a table by columns has a pixel's values all
    over it.

    Args:
        table: Of the store.
        order: Pixels (positions in ``table``, each once) in the order in which they will be asked for.
    """

    def __init__(self, table: Table, order: NDArray[np.int64]) -> None:
        self.table, self.order = table, order
        self._ends = np.cumsum(table.length[order])
        self._at = np.empty(len(table), np.int64)  # of each pixel: its place in the order
        self._at[order] = np.arange(len(order))
        self._first = self._last = 0  # places in the order that are held
        self._starts = np.zeros(1, np.int64)
        self._columns, self._values = np.empty(0, np.int32), np.empty(0, np.float32)

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]:
        """Variables, values and their number (n,) of some pixels, which are neighbours in the order.

        Raises:
            InputError: The table is damaged.
        """
        first, last = int(self._at[rows[0]]), int(self._at[rows[-1]]) + 1
        if not self._first <= first < last <= self._last:
            done = int(self._ends[first - 1]) if first else 0
            self._load(first, max(last, int(np.searchsorted(self._ends, done + BLOCK_VALUES, side="right"))))
        part = slice(*self._starts[[first - self._first, last - self._first]].tolist())
        return self._columns[part], self._values[part], self.table.length[rows]

    def _load(self, first: int, last: int) -> None:
        held = self.order[first:last]
        self._columns = self._values = np.empty(0, np.int32)  # room for the next ones
        lengths = self.table.length[held]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        columns, values = np.zeros(int(starts[-1]), np.int32), np.zeros(int(starts[-1]), np.float32)
        place = np.full(self.table.shape[0], -1, np.int64)  # of each row of the table
        place[self.table.rows[held]] = np.arange(len(held))
        fill = starts[:-1].copy()
        try:
            for row, column, value in _pieces(self.table, place):
                # By pixel; where each goes is behind what its pixel has already.
                count = np.bincount(row, minlength=len(held))
                begin = np.cumsum(count) - count
                into = np.repeat(fill - begin, count) + np.arange(len(row))
                order = _by_row(row, count)
                columns[into], values[into] = column[order], value[order]
                fill += count
        except Exception as error:  # see `open_table`
            raise damaged(self.table.path, error) from error
        if (fill != starts[1:]).any():
            raise damaged(self.table.path, "it changes while it is read")
        self._columns, self._values, self._starts, self._first, self._last = columns, values, starts, first, last


def stored_lengths(group: zarr.Group, encoding: str, shape: tuple[int, int]) -> NDArray[np.int64]:
    """(rows,) stored values of each row of the table; dense: those that are not zero."""
    if encoding == "dense":
        lengths = np.zeros(shape[0], np.int64)
        for rows, block, _ in _tiles(stored_array(group, "X"), np.ones(shape[0], bool)):
            lengths[rows] += np.count_nonzero(block, axis=1)
        return lengths
    indptr = _indptr(group, encoding, shape)
    if encoding == "csr":
        return np.diff(indptr)
    lengths = np.zeros(shape[0], np.int64)
    indices = stored_array(group, "X/indices")
    for begin, end in _cuts(int(indptr[-1]), indices):
        lengths += np.bincount(indices[begin:end], minlength=shape[0])  # raises where an index is beyond the rows
    return lengths


def _indptr(group: zarr.Group, encoding: str, shape: tuple[int, int]) -> NDArray[np.int64]:
    indptr = np.asarray(stored_array(group, "X/indptr")[:]).astype(np.int64)
    stored = min(stored_array(group, f"X/{name}").shape[0] for name in ("data", "indices"))
    if len(indptr) != shape[encoding == "csc"] + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError("X/indptr does not fit the shape")
    if indptr[-1] > stored:
        raise ValueError(f"X/indptr ends at {indptr[-1]} of {stored} values")
    return indptr


def _cuts(total: int, array: zarr.Array) -> list[tuple[int, int]]:
    """Ranges of a flat array, whole chunks (or shards) each."""
    unit = (array.shards or array.chunks)[0]
    step = unit * max(1, PIECE_VALUES // unit)
    if step > 4 * PIECE_VALUES:  # one chunk of everything is read in parts all the same
        step = PIECE_VALUES
    return [(k, min(k + step, total)) for k in range(0, total, step)]


def _tiles(matrix: zarr.Array, wanted: NDArray[np.bool_]) -> Iterator[tuple[slice, NDArray[np.float32], int]]:
    """Blocks of a dense matrix that hold wanted rows: which rows, the values, and the first variable."""
    unit = matrix.shards or matrix.chunks
    width = min(matrix.shape[1], unit[1] * max(1, PIECE_VALUES // (unit[0] * unit[1])))
    height = unit[0] * max(1, PIECE_VALUES // (unit[0] * width))
    for top in range(0, matrix.shape[0], height):
        rows = slice(top, min(top + height, matrix.shape[0]))
        if wanted[rows].any():
            for left in range(0, matrix.shape[1], width):
                yield rows, np.asarray(matrix[rows, left : left + width]), left


def _pieces(table: Table, place: NDArray[np.int64]) -> Iterator[Piece]:
    """Values of the rows whose place is not negative, in a few passes' pieces: place, variable, value."""
    wanted = place >= 0
    if table.encoding == "dense":
        for rows, block, left in _tiles(stored_array(table.group, "X"), wanted):
            row, column = np.nonzero((block != 0) & wanted[rows, None])
            yield place[rows][row], (column + left).astype(np.int32), block[row, column].astype(np.float32)
        return
    indptr = _indptr(table.group, table.encoding, table.shape)
    indices, data = stored_array(table.group, "X/indices"), stored_array(table.group, "X/data")
    for begin, end in _cuts(int(indptr[-1]), indices):
        # Which row (by columns: which variable) each value of the piece belongs to.
        lines = np.arange(np.searchsorted(indptr, begin, "right") - 1, np.searchsorted(indptr, end, "left"))
        if table.encoding == "csr" and not wanted[lines].any():
            continue
        count = np.minimum(indptr[lines + 1], end) - np.maximum(indptr[lines], begin)
        line, index = np.repeat(lines, count), np.asarray(indices[begin:end]).astype(np.int64)
        row, column = (line, index) if table.encoding == "csr" else (index, line)
        kept = slice(None) if wanted.all() else np.flatnonzero(wanted[row])
        if column.min(initial=0) < 0 or column.max(initial=0) >= table.shape[1]:
            raise ValueError("X/indices point beyond the variables")
        row, column = place[row[kept]], column[kept].astype(np.int32)
        if len(row):
            yield row, column, np.asarray(data[begin:end]).astype(np.float32, copy=False)[kept]


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
