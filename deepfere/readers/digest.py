"""Content digests of large input files."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from deepfere.errors import InputError
from deepfere.places import UrlPath
from deepfere.readers.ranges import open_ranges
from deepfere.remote import is_url

MIB = 1 << 20
WHOLE_BELOW_BYTES = 64 * MIB
SAMPLED_BLOCKS = 64


def content_digest(path: str | Path) -> str:
    """sha256 of a file's content, hexadecimal; the same wherever the file lies.

    Files below 64 MiB are hashed whole. Of larger ones are hashed: the size (as decimal text), the first
    and the last MiB, and 64 blocks of one MiB at evenly spaced offsets; an identity check, cheap on a
    gigapixel slide, not a defence against somebody who edits bytes in between.

    Args:
        path: A file, or the URL of one, whose blocks are fetched by ranges.

    Raises:
        InputError: The file cannot be read.
    """
    if is_url(path):
        return _remote_digest(str(path))
    digest = hashlib.sha256()
    try:
        size = Path(path).stat().st_size
        with Path(path).open("rb") as handle:
            if size < WHOLE_BELOW_BYTES:
                while block := handle.read(4 * MIB):
                    digest.update(block)
                return digest.hexdigest()
            digest.update(str(size).encode())
            for k in _block_offsets(size):
                handle.seek(k)
                digest.update(handle.read(MIB))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=path, remedy="check the path") from error
    return digest.hexdigest()


def _block_offsets(size: int) -> list[int]:
    last = size - MIB
    return [0, *(last * (i + 1) // (SAMPLED_BLOCKS + 1) for i in range(SAMPLED_BLOCKS)), last]


def _remote_digest(url: str) -> str:
    digest, ranges = hashlib.sha256(), open_ranges(url)
    if ranges.size < WHOLE_BELOW_BYTES:
        offsets = list(range(0, ranges.size, MIB))
    else:
        digest.update(str(ranges.size).encode())
        offsets = _block_offsets(ranges.size)
    for first in range(0, len(offsets), 8):
        part = offsets[first : first + 8]
        for block in ranges.fetch(part, [MIB] * len(part)):
            digest.update(block)
    return digest.hexdigest()


def names_and_sizes(folder: Path) -> str:
    """A line for each file below a local folder: its name and how many bytes it has; in name order."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return "\n".join(f"{p.relative_to(folder).as_posix()} {p.stat().st_size}" for p in files)


def tree_digest(path: str | Path) -> str:
    """SHA-256 (hex) over the names and content digests of all files below a folder or URL, in name order."""
    sha = hashlib.sha256()
    if is_url(path):
        names = {str(one).removeprefix(f"{str(path).rstrip('/')}/"): str(one) for one in UrlPath(path).below()}
    else:
        names = {p.relative_to(path).as_posix(): str(p) for p in Path(path).rglob("*") if p.is_file()}
    for name in sorted(names, key=PurePosixPath):
        sha.update(f"{name}\0{content_digest(names[name])}\n".encode())
    return sha.hexdigest()
