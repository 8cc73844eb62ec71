"""The one place that opens Zarr stores, so that paths and URLs (``s3://``, ``gs://``) behave alike.

Zarr v3 only, but for what another program wrote (``open_foreign``). Chunks and shards are always given: the
library's automatic choice has produced hundreds of thousands of tiny files before. A writer of a shard must own all
of it: a shard is rewritten as a whole, and two writers in one shard lose data silently.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore

from deepfere.errors import InputError

StorageOptions = Mapping[str, Any]
Codec = Literal["zstd", "blosc"]


def is_url(url: object) -> bool:
    """Whether this names a remote store (``scheme://...``) instead of a local path."""
    return "://" in str(url)


def missing(path: str | Path) -> InputError:
    """That nothing is at a path; where unfinished work of it stands beside it, that too."""
    begun = Path(str(path).rstrip("/") + ".work")
    with suppress(OSError, ValueError):
        if begun.is_dir():
            return InputError("is unfinished", where=path, remedy=f"run the same command again: its work is in {begun}")
    return InputError("does not exist", where=path, remedy="check the path")


def open_group(
    url: str | Path,
    mode: Literal["r", "r+", "a", "w", "w-"] = "r",
    storage_options: StorageOptions | None = None,
) -> zarr.Group:
    """Open or create a Zarr v3 group at a path or URL.

    Args:
        url: Local path, or ``s3://bucket/key`` and the like.
        mode: As in zarr: "r" read, "r+" read and write, "a" create if absent, "w" replace, "w-" must be new.
        storage_options: Passed to fsspec for URLs.

    Raises:
        InputError: There is no readable Zarr group there, or one is there already ("w-").
    """
    store: LocalStore | FsspecStore
    if is_url(url):
        options = dict(storage_options or {})
        store = FsspecStore.from_url(str(url), storage_options=options, read_only=mode == "r")
    else:
        # Not Path.exists: of an impossible name, too long or with a null byte, it raises.
        if mode in ("r", "r+") and not os.path.exists(url):  # noqa: PTH110
            raise missing(url)
        store = LocalStore(Path(url), read_only=mode == "r")
    try:
        return zarr.open_group(store, mode=mode, zarr_format=3)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError) as error:
        raise InputError("is not a Zarr v3 group", where=url, remedy="give a store that deepfere wrote") from error
    except (FileExistsError, zarr.errors.ContainsGroupError) as error:
        raise InputError("exists already", where=url, remedy="choose another path or remove it") from error
    except (ValueError, TypeError, KeyError) as error:  # what Zarr makes of a zarr.json that is damaged or another's
        raise InputError(
            f"has a zarr.json that cannot be read ({error})", where=url, remedy="give a store that deepfere wrote"
        ) from error


def open_foreign(path: str | Path) -> zarr.Group:
    """Open another program's group at a path or URL to read it, Zarr v3 or v2.

    Raises:
        InputError: There is no readable Zarr group there, or the store does not answer.
    """
    if is_url(path):
        from deepfere.readers.remote import FIRST_TRIES, answered

        return answered(str(path), lambda: _opened(path, FsspecStore.from_url(str(path), read_only=True)), FIRST_TRIES)
    if not os.path.exists(path):  # noqa: PTH110 - see `open_group`
        raise missing(path)
    return _opened(path, LocalStore(Path(path), read_only=True))


def _opened(path: str | Path, store: LocalStore | FsspecStore) -> zarr.Group:
    try:
        return zarr.open_group(store, mode="r")
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError) as error:
        raise InputError("is not a Zarr group", where=path, remedy="check the path") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"has metadata that cannot be read ({error})", where=path, remedy="write it again") from error


def create_array(
    group: zarr.Group,
    name: str,
    shape: Sequence[int],
    dtype: Any,
    chunks: Sequence[int],
    shards: Sequence[int] | None = None,
    *,
    fill_value: Any = 0,
    dimension_names: Sequence[str] | None = None,
    level: int = 1,
    codec: Codec = "zstd",
) -> zarr.Array:
    """Create one array with explicit chunks and shards, compressed.

    Args:
        group: Where to create it.
        name: Its name.
        shape: Elements per axis.
        dtype: Anything numpy takes.
        chunks: Inner chunk, elements per axis.
        shards: Shard (one object in the store), a multiple of the chunk on every axis; None for none.
        fill_value: Value of what was never written; a shard of nothing else gives no object at all.
        dimension_names: One name per axis.
        level: zstd level.
        codec: "zstd", or "blosc": zstd in blosc, the bits of the numbers shuffled before.
    """
    compressor: ZstdCodec | BloscCodec = ZstdCodec(level=level)
    if codec == "blosc":
        compressor = BloscCodec(cname="zstd", clevel=level, shuffle="bitshuffle", typesize=np.dtype(dtype).itemsize)
    return group.create_array(
        name,
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(chunks),
        shards=None if shards is None else tuple(shards),
        fill_value=fill_value,
        dimension_names=None if dimension_names is None else list(dimension_names),
        compressors=[compressor],
    )


def exists(url: str | Path, storage_options: StorageOptions | None = None) -> bool:
    """Whether anything is at this path or URL."""
    if not is_url(url):
        return Path(url).exists()
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(str(url), **dict(storage_options or {}))
    return bool(filesystem.exists(path))


def remove(url: str | Path, storage_options: StorageOptions | None = None) -> None:
    """Delete a store and everything in it; nothing happens if it is absent."""
    if not is_url(url):
        shutil.rmtree(url, ignore_errors=True)
        return
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(str(url), **dict(storage_options or {}))
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def sync(path: Path) -> None:
    """Have the bytes of a local file (or the names in a local folder) on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shard_object(root: str | Path, array: str, row: int, col: int) -> Path:
    """The file of one shard of a local (c, y, x) array; shards of fill values alone have none."""
    return Path(root) / array / "c" / "0" / str(row) / str(col)


def sync_shard(root: str | Path, array: str, row: int, col: int) -> None:
    """Have one shard of a local (c, y, x) array on disk: it may be recorded as done only then."""
    path = shard_object(root, array, row, col)
    if path.exists():
        # Its folders may be as new as itself.
        for part in (path, *path.parents[:4]):
            sync(part)


def settle(root: Path) -> None:
    """Have a whole local store on disk, without what interrupted writers left in it."""
    for path in list(root.rglob("*")):
        if path.suffix == ".partial":
            path.unlink(missing_ok=True)
        else:
            sync(path)
    sync(root)
