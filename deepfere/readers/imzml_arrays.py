"""The arrays behind an imzML index: m/z and intensities, one spectrum or many at a time."""

from __future__ import annotations

import zlib
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.readers.columns import Column
from deepfere.readers.imzml import ImzmlIndex

COALESCE_GAP_BYTES = 1 << 16


COALESCE_READ_BYTES = 1 << 25


def spectrum(index: ImzmlIndex, ibd: Any, i: int) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """One spectrum.

    Args:
        index: Of the file.
        ibd: The .ibd's bytes (a memory map, an array, bytes) or a binary file opened for reading.
        i: Which spectrum, in file order.

    Returns:
        m/z (P,) float64 and intensity (P,), float64 or float32 (float32 only where the file has it).

    Raises:
        InputError: The bytes are missing or not a valid zlib stream.
    """
    row = np.array([i])
    mz = _decode(index, "mz", _cut(ibd, int(index.mz_offset[i]), int(index.sizes("mz", row)[0])), i)
    values = _decode(index, "int", _cut(ibd, int(index.int_offset[i]), int(index.sizes("int", row)[0])), i)
    kind = np.float32 if values.dtype == np.float32 else np.float64
    return mz.astype(np.float64), values.astype(kind)


def read_arrays(index: ImzmlIndex, ibd: IO[bytes], rows: NDArray[np.int64], kind: str) -> list[NDArray[Any]]:
    """The m/z ("mz") or intensity ("int") arrays of many spectra, in the file's own number type.

    Reads are in file order, and byte ranges that nearly touch are read as one; memory is what the arrays
    need, however large the .ibd.

    Args:
        index: Of the file.
        ibd: The .ibd, opened for binary reading.
        rows: Which spectra.
        kind: "mz" or "int".

    Returns:
        One read-only array per entry of ``rows``, in its order.
    """
    return [_decode(index, kind, raw, int(i)) for i, raw in zip(rows, _read(index, ibd, rows, (kind,))[0], strict=True)]


def read_flat(
    index: ImzmlIndex, ibd: IO[bytes], rows: NDArray[np.int64], kinds: tuple[str, ...] = ("mz", "int")
) -> list[NDArray[Any]]:
    """As `read_arrays`, every kind in the same pass over the bytes, and the arrays of all spectra as one.

    Args:
        index: Of the file.
        ibd: The .ibd, opened for binary reading.
        rows: Which spectra.
        kinds: Of "mz" and "int".

    Returns:
        Per kind one read-only array: those of ``rows`` in its order, one behind the other.
    """
    out: list[NDArray[Any]] = []
    for kind, parts in zip(kinds, _read(index, ibd, rows, kinds), strict=True):
        dtype, packed, _ = _layout(index, kind)
        missing = int(index.sizes(kind, rows).sum()) != sum(map(len, parts))
        if missing or packed:  # an array of no values has bytes, too, once it is packed
            arrays = [_decode(index, kind, raw, int(i)) for i, raw in zip(rows, parts, strict=True)]
            out.append(np.concatenate(arrays) if arrays else np.empty(0, dtype))
        else:
            out.append(np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=dtype))
    return out


def _layout(index: ImzmlIndex, kind: str) -> tuple[np.dtype[Any], bool, Column]:
    if kind == "mz":
        return index.mz_dtype, index.mz_compressed, index.length
    return index.int_dtype, index.int_compressed, index.length


def _read(index: ImzmlIndex, ibd: IO[bytes], rows: NDArray[np.int64], kinds: tuple[str, ...]) -> list[list[memoryview]]:
    """The bytes of each kind and spectrum; byte ranges that nearly touch are read as one, whatever their kind."""
    offsets = np.concatenate([(index.mz_offset if kind == "mz" else index.int_offset)[rows] for kind in kinds])
    sizes = np.concatenate([index.sizes(kind, rows) for kind in kinds])
    order = np.argsort(offsets, kind="stable")
    begins = offsets[order]
    ends = np.maximum.accumulate(begins + sizes[order])
    cuts = np.flatnonzero(begins[1:] - ends[:-1] > COALESCE_GAP_BYTES) + 1
    out = [memoryview(b"")] * len(offsets)
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(order)], strict=True):
        start = first
        while start < last:
            origin = int(begins[start])
            stop = max(start + 1, start + int(np.searchsorted(ends[start:last], origin + COALESCE_READ_BYTES, "right")))
            block = _cut(ibd, origin, int(ends[stop - 1]) - origin)
            where = order[start:stop]
            if stop - start == len(out):  # all in one: in the order of the rows, not of the file
                at = offsets - origin
                out = [block[a:b] for a, b in zip(at.tolist(), (at + sizes).tolist(), strict=True)]
                break
            at = offsets[where] - origin
            for k, a, b in zip(where.tolist(), at.tolist(), (at + sizes[where]).tolist(), strict=True):
                out[k] = block[a:b]
            start = stop
    return [out[k * len(rows) : (k + 1) * len(rows)] for k in range(len(kinds))]


def _cut(ibd: Any, offset: int, size: int) -> memoryview:
    if hasattr(ibd, "read"):
        ibd.seek(offset)
        return memoryview(ibd.read(size))
    return memoryview(ibd)[offset : offset + size]


def _decode(index: ImzmlIndex, kind: str, raw: memoryview, i: int) -> NDArray[Any]:
    dtype, compressed, lengths = _layout(index, kind)
    length = int(lengths[i])
    data: bytes | memoryview = raw
    if compressed and length:
        try:
            data = zlib.decompress(raw)
        except zlib.error as error:
            raise InputError(
                f"the {kind} array of spectrum {index.number(i)} is not a valid zlib stream ({error})",
                where=index.ibd_path,
                remedy="copy the .ibd again",
            ) from error
    if len(data) < length * dtype.itemsize:
        raise InputError(
            f"the {kind} array of spectrum {index.number(i)} has {len(data)} bytes, not {length * dtype.itemsize}",
            where=index.ibd_path,
            remedy="copy the .ibd again",
        )
    return np.frombuffer(data, dtype=dtype, count=length)
