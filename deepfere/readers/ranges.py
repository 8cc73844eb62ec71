"""Byte ranges of one file: a local one through a memory map, a remote one through fsspec, coalesced."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any, Protocol

from deepfere.errors import InputError

RELEASE_BYTES = 4 << 20
GAP_BYTES = 64 << 10
BLOCK_BYTES = 8 << 20
_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_url(path: object) -> bool:
    """Whether a path names a remote file (``s3://``, ``gs://``, ``http://`` and what else fsspec knows)."""
    return bool(_URL.match(str(path)))


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

    Raises:
        InputError: The store does not know the file, or does not answer.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
            self.size = int(self._fs.info(self._path)["size"])
        except Exception as error:  # every store raises its own
            raise _unread(url, error) from error

    def fetch(self, offsets: list[int], counts: list[int]) -> list[bytes]:
        """See `Ranges.fetch`.

        Raises:
            InputError: The store does not answer.
        """
        ends = [min(start + count, self.size) for start, count in zip(offsets, counts, strict=True)]
        starts = [min(start, self.size) for start in offsets]
        runs = coalesced(starts, ends)
        try:
            blocks = self._fs.cat_ranges(
                [self._path] * len(runs), [a for a, _ in runs], [b for _, b in runs], on_error="raise"
            )
        except Exception as error:
            raise _unread(self._url, error) from error
        found = []
        for start, end in zip(starts, ends, strict=True):
            block, (first, _) = next((b, r) for b, r in zip(blocks, runs, strict=True) if r[0] <= start and end <= r[1])
            found.append(bytes(block[start - first : end - first]))
        return found

    def open(self) -> Any:
        """See `Ranges.open`."""
        try:
            return self._fs.open(self._path, "rb", block_size=1 << 20)
        except Exception as error:
            raise _unread(self._url, error) from error

    def close(self) -> None:
        """See `Ranges.close`."""


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


def _unread(url: str, error: Exception) -> InputError:
    text = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"cannot be read ({text})", where=url, remedy="check the address, and that the store answers")
