"""Byte ranges of one file: a local one through a memory map, a remote one through fsspec, coalesced."""

from __future__ import annotations

import io
import mmap
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from deepfere.errors import InputError
from deepfere.places import Place
from deepfere.remote import FIRST_TRIES, TRIES, ShortAnswer, answered, filesystem, is_url

RELEASE_BYTES = 4 << 20
GAP_BYTES = 64 << 10
BLOCK_BYTES = 8 << 20
STREAM_BYTES, STREAM_KEPT = 256 << 10, 32


class Ranges(Protocol):
    """Random access to the bytes of one file (thread-safe)."""

    size: int

    def fetch(self, offsets: list[int], counts: list[int]) -> list[bytes]:
        """The bytes of each range; shorter where the file ends first."""
        ...

    def open(self) -> Any:
        """The file as a seekable stream, for its directory."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


class LocalRanges:
    """A memory-mapped file."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        with self._path.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)
        self._touched = 0

    def fetch(self, offsets: list[int], counts: list[int]) -> list[bytes]:
        """See `Ranges.fetch`."""
        found = [self._map[start : start + count] for start, count in zip(offsets, counts, strict=True)]
        # Pages that were looked at count as this process's memory until they are let go: without this a
        # worker would grow with the slide. They stay in the system's page cache.
        self._touched += sum(counts)
        if self._touched > RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return found

    def open(self) -> Any:
        """See `Ranges.open`."""
        return self._path.open("rb")

    def close(self) -> None:
        """See `Ranges.close`."""
        self._map.close()


class RemoteRanges:
    """A file behind a URL; near ranges are fetched as one, several at a time.

    A store that throttles or fails for a moment is asked again, with longer and longer pauses.

    Raises:
        InputError: The store does not know the file, does not let it be read, or does not answer.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = filesystem(url)
        self._fs.invalidate_cache()  # what a store listed a while ago may have been replaced since
        found = answered(url, lambda: self._fs.info(self._path), FIRST_TRIES)
        if found.get("type") == "directory":
            raise InputError("is a folder", where=url, remedy="give the address of a file")
        if found.get("size") is None:
            raise InputError(
                "the server does not say how large it is", where=url, remedy="copy it to a local disk, or to a store"
            )
        self.size = int(found["size"])

    def fetch(self, offsets: list[int], counts: list[int]) -> list[bytes]:
        """See `Ranges.fetch`.

        Raises:
            InputError: The store does not answer, or does not serve byte ranges.
        """
        ends = [min(start + count, self.size) for start, count in zip(offsets, counts, strict=True)]
        starts = [min(start, self.size) for start in offsets]
        runs = [run for run in coalesced(starts, ends) if run[1] > run[0]]
        blocks = answered(self._url, lambda: self._blocks(runs), TRIES) if runs else []
        found = []
        for start, end in zip(starts, ends, strict=True):
            if start == end:
                found.append(b"")
                continue
            block, (first, _) = next((b, r) for b, r in zip(blocks, runs, strict=True) if r[0] <= start and end <= r[1])
            found.append(bytes(block[start - first : end - first]))
        return found

    def _blocks(self, runs: list[tuple[int, int]]) -> list[bytes]:
        blocks: list[bytes] = self._fs.cat_ranges(
            [self._path] * len(runs), [a for a, _ in runs], [b for _, b in runs], on_error="raise"
        )
        for block, (first, last) in zip(blocks, runs, strict=True):
            if len(block) > last - first:
                raise InputError("the server does not serve byte ranges", where=self._url, remedy="copy it locally")
            if len(block) < last - first:
                raise ShortAnswer(f"{len(block)} bytes came of {last - first}")
        return blocks

    def open(self) -> io.BufferedReader:
        """See `Ranges.open`."""
        return io.BufferedReader(RangeStream(self), 64 << 10)

    def close(self) -> None:
        """See `Ranges.close`."""


class RangeStream(io.RawIOBase):
    """A file's ranges as one seekable stream; blocks that were read are kept, up to 8 MiB."""

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self._ranges, self._at = ranges, 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; see `io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ranges.size}[whence]
        if base + offset < 0:
            raise ValueError(f"{base + offset} lies before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes."""
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self._ranges.size)
        count = max(0, end - self._at)
        if count == 0:
            return 0
        first, last = self._at // STREAM_BYTES, (end - 1) // STREAM_BYTES
        missing = [k for k in range(first, last + 1) if k not in self._kept]
        got = self._ranges.fetch([k * STREAM_BYTES for k in missing], [STREAM_BYTES] * len(missing))
        self._kept.update(zip(missing, got, strict=True))
        for k in range(first, last + 1):
            self._kept.move_to_end(k)
        data = b"".join(self._kept[k] for k in range(first, last + 1))
        skip = self._at - first * STREAM_BYTES
        view[:count] = data[skip : skip + count]
        while len(self._kept) > STREAM_KEPT:
            self._kept.popitem(last=False)
        self._at = end
        return count


def coalesced(starts: list[int], ends: list[int]) -> list[tuple[int, int]]:
    """Ranges joined where at most 64 KiB lie between them, up to 8 MiB a piece: one request each."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(zip(starts, ends, strict=True)):
        if runs and start - runs[-1][1] <= GAP_BYTES and max(end, runs[-1][1]) - runs[-1][0] <= BLOCK_BYTES:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((start, end))
    return runs


def open_ranges(path: str | Path) -> Ranges:
    """A local file or a URL.

    Raises:
        InputError: A local file cannot be opened, or see `RemoteRanges`.
    """
    if is_url(path):
        return RemoteRanges(str(path))
    try:
        return LocalRanges(path)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(f"cannot be opened ({error})", where=path, remedy="copy it again") from error


def open_binary(path: Place) -> io.BufferedReader:
    """A file or an object, opened for reading bytes.

    Raises:
        InputError: See `RemoteRanges`.
        OSError: A local file cannot be read.
    """
    if isinstance(path, Path):
        return path.open("rb")
    return RemoteRanges(str(path)).open()


def size_of(path: Place) -> int:
    """Bytes of a file or an object; raises what `open_binary` raises."""
    return path.stat().st_size if isinstance(path, Path) else RemoteRanges(str(path)).size


def first_bytes(path: str | Path, count: int) -> bytes:
    """The first bytes of a local file or a URL.

    Raises:
        InputError: See `RemoteRanges`.
        OSError: A local file cannot be read.
    """
    if is_url(path):
        return RemoteRanges(str(path)).fetch([0], [count])[0]
    with Path(path).open("rb") as handle:
        return handle.read(count)
