"""Whole numbers, one per spectrum of a file, in a few bytes each: an index of millions of spectra is kept in memory.

Offsets and coordinates mostly go on as they began, and lengths differ by little: of blocks of a column first value and
step are kept, or the steps, compressed.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, overload

import numpy as np
from numcodecs import Blosc
from numpy.typing import NDArray

BLOCK = 1 << 16
HELD_BLOCKS = 2
"""Blocks of a column that stay unpacked: neighbours are asked for one after the other."""

_CODEC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE)
_Packed = tuple[int, int] | tuple[int, bytes, str]

Numbers = NDArray[np.int64]


class Column:
    """int64 values (N,), added at the end and read like an array; what is read is a copy."""

    def __init__(self) -> None:
        self._blocks: list[_Packed] = []
        self._tail = array("q")
        self._held: dict[int, Numbers] = {}

    @classmethod
    def of(cls, values: Numbers) -> Column:
        """The column of an array (N,)."""
        column = cls()
        column.extend(values)
        return column

    def append(self, value: int) -> None:
        """Add a value."""
        self._tail.append(value)
        self._pack()

    def extend(self, values: Numbers) -> None:
        """Add an array (n,)."""
        values, begin = np.ascontiguousarray(values, dtype=np.int64), 0
        while begin < len(values):
            part = values[begin : begin + BLOCK - len(self._tail)]
            self._tail.frombytes(part.tobytes())
            self._pack()
            begin += len(part)

    def _pack(self) -> None:
        if self._held:
            self._held = {}
        if len(self._tail) == BLOCK:
            self._blocks.append(_packed(np.array(self._tail, dtype=np.int64)))
            self._tail = array("q")

    def __len__(self) -> int:
        return BLOCK * len(self._blocks) + len(self._tail)

    def block(self, k: int) -> Numbers:
        """The values of a block."""
        found = self._held.get(k)
        if found is None:
            last = k == len(self._blocks)
            found = np.array(self._tail, dtype=np.int64) if last else _unpacked(self._blocks[k])
            found.flags.writeable = False
            # Replaced, never changed: threads read it.
            self._held = {**dict(list(self._held.items())[1 - HELD_BLOCKS :]), k: found}
        return found

    def count_up_to(self, value: int) -> int:
        """How many values are not above one; of a column that does not fall."""
        firsts = [packed[0] for packed in self._blocks] + self._tail[:1].tolist()
        k = bisect_right(firsts, value) - 1
        return 0 if k < 0 else k * BLOCK + int(np.searchsorted(self.block(k), value, side="right"))

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype)

    @overload
    def __getitem__(self, rows: int | np.integer) -> np.int64: ...
    @overload
    def __getitem__(self, rows: slice | Numbers) -> Numbers: ...
    def __getitem__(self, rows: int | np.integer | slice | Numbers) -> np.int64 | Numbers:
        if isinstance(rows, int | np.integer):
            k = int(rows) + (len(self) if rows < 0 else 0)
            if not 0 <= k < len(self):
                raise IndexError(f"{rows} of {len(self)}")
            return np.int64(self.block(k // BLOCK)[k % BLOCK])
        if isinstance(rows, slice):
            begin, end, step = rows.indices(len(self))
            if step == 1 and begin < end:
                parts = range(begin // BLOCK, (end - 1) // BLOCK + 1)
                whole = np.concatenate([self.block(k) for k in parts])
                return whole[begin - parts[0] * BLOCK : end - parts[0] * BLOCK]
            return self[np.arange(begin, end, step)]
        wanted = np.asarray(rows)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        out = np.empty(len(wanted), np.int64)
        if not len(wanted):
            return out
        number = wanted // BLOCK
        if number[0] == number[-1] and (number == number[0]).all():
            return self.block(int(number[0]))[wanted % BLOCK]
        for k in np.unique(number).tolist():
            here = number == k
            out[here] = self.block(k)[wanted[here] % BLOCK]
        return out


def block(column: Column | Numbers, k: int) -> tuple[int, Numbers]:
    """A block of a column or array: the position of its first value, and the values."""
    begin = k * BLOCK
    return begin, column.block(k) if isinstance(column, Column) else column[begin : begin + BLOCK]


def blocks(column: Column | Numbers) -> Iterator[Numbers]:
    """The values of a column or array, `BLOCK` at a time."""
    for k in range(-(-len(column) // BLOCK)):
        yield block(column, k)[1]


def same(column: Column | Numbers) -> bool:
    """Whether all values of a column or array, which holds some, are the same."""
    first = int(column[0])
    return all(bool((values == first).all()) for values in blocks(column))


def reach(column: Column | Numbers) -> tuple[int, int]:
    """Least and greatest value."""
    ends = [(int(values.min()), int(values.max())) for values in blocks(column)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _packed(values: Numbers) -> _Packed:
    first, steps = int(values[0]), np.diff(values)
    if (steps == steps[0]).all():
        return first, int(steps[0])
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= steps.min() and steps.max() <= np.iinfo(dtype).max:
            steps = steps.astype(dtype)
            break
    return first, bytes(_CODEC.encode(steps)), steps.dtype.str


def _unpacked(packed: _Packed) -> Numbers:
    out = np.empty(BLOCK, np.int64)
    out[0] = packed[0]
    if len(packed) == 2:
        out[1:] = packed[1]
    else:
        out[1:] = np.frombuffer(_CODEC.decode(packed[1]), dtype=packed[2])
    return np.cumsum(out, out=out)
