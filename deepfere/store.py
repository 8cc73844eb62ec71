"""The one place that opens Zarr stores, so that paths and URLs (``s3://``, ``gs://``) behave alike.

Zarr v3 only, but for what another program wrote (``open_foreign``). Chunks and shards are always given: the
library's automatic choice has produced hundreds of thousands of tiny files before. A writer of a shard must own all
of it: a shard is rewritten as a whole, and two writers in one shard lose data silently.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore

from deepfere.codecs import DiskStore, Noting
from deepfere.cores import usable_cores
from deepfere.errors import Damaged, InputError, NoStore
from deepfere.places import Place, UrlPath, place, remove_tree
from deepfere.remote import FIRST_TRIES, OPTIONS, TRIES, answered, answered_later, is_url

Answer = TypeVar("Answer")
StorageOptions = Mapping[str, Any]
Codec = Literal["zstd", "blosc"]


class RemoteStore(Noting, FsspecStore):
    """A store at a URL that asks again where it throttles or fails, and says the rest in one line."""

    async def _ask(self, key: str, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        return await answered_later(f"{self.fs.unstrip_protocol(self.path)}/{key}".rstrip("/"), ask, TRIES)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As in zarr."""
        asked = super().get
        return await self._ask(key, lambda: asked(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """As in zarr."""
        asked, ranges = super().get_partial_values, list(key_ranges)
        return await self._ask("", lambda: asked(prototype, ranges))

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """As in zarr."""
        asked = super().set
        await self._ask(key, lambda: asked(key, value, byte_range))
        self.note(key, value)

    async def exists(self, key: str) -> bool:
        """As in zarr."""
        asked = super().exists
        return await self._ask(key, lambda: asked(key))

    async def delete(self, key: str) -> None:
        """As in zarr, but one by one: of objects deleted together, s3fs says nothing of those that stay."""
        self._check_writable()
        await self._ask(key, lambda: self.fs._rm_file(f"{self.path}/{key}"))

    async def delete_dir(self, prefix: str) -> None:
        """As in zarr; see `delete`."""
        self._check_writable()
        folder = f"{self.path}/{prefix}".rstrip("/")
        for name in await self._ask(prefix, lambda: self.fs._find(folder)):
            await self.delete(name.removeprefix(f"{self.path}/"))

    async def clear(self) -> None:
        """As in zarr; see `delete`."""
        await self.delete_dir("")

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """As in zarr."""
        asked = super().list_dir
        for name in await self._ask(prefix, lambda: _listed(asked(prefix))):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """As in zarr."""
        asked = super().list_prefix
        for name in await self._ask(prefix, lambda: _listed(asked(prefix))):
            yield name


async def _listed(names: AsyncIterator[str]) -> list[str]:
    return [name async for name in names]


def _remote(url: object, options: StorageOptions | None, read_only: bool) -> FsspecStore:
    def make() -> FsspecStore:
        return RemoteStore.from_url(str(url), storage_options={**OPTIONS, **(options or {})}, read_only=read_only)

    return answered(str(url), make, FIRST_TRIES)


def missing(path: str | Place) -> NoStore:
    """That nothing is at a path or URL; where unfinished work of it stands beside it, that too."""
    begun = place(str(path).rstrip("/") + ".work")
    with suppress(OSError, ValueError):
        if begun.exists():
            return NoStore("is unfinished", where=path, remedy=f"run the same command again: its work is in {begun}")
    return NoStore("does not exist", where=path, remedy="check the path")


def open_group(
    url: str | Place,
    mode: Literal["r", "r+", "a", "w", "w-"] = "r",
    storage_options: StorageOptions | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> zarr.Group:
    """Open or create a Zarr v3 group at a path or URL.

    Args:
        url: Local path, or ``s3://bucket/key`` and the like.
        mode: As in zarr: "r" read, "r+" read and write, "a" create if absent, "w" replace, "w-" must be new.
        storage_options: Passed to fsspec for URLs.
        attributes: What a group that is created has from the first moment.

    Raises:
        NoStore: There is no readable Zarr group there.
        InputError: One is there already ("w-"); or a store at a URL refuses, or does not answer.
        StorageError: A store at a URL keeps failing.
    """
    store: LocalStore | FsspecStore
    if is_url(url):
        store = _remote(url, storage_options, mode == "r")
    else:
        # Not Path.exists: of an impossible name, too long or with a null byte, it raises.
        if mode in ("r", "r+") and not os.path.exists(str(url)):  # noqa: PTH110
            raise missing(url)
        store = DiskStore(Path(str(url)), read_only=mode == "r")
    try:
        return zarr.open_group(store, mode=mode, zarr_format=3, attributes=dict(attributes or {}))
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError) as error:
        if is_url(url) and not exists(url, storage_options):
            raise missing(url) from error
        raise NoStore("is not a Zarr v3 group", where=url, remedy="give a store that deepfere wrote") from error
    except (FileExistsError, zarr.errors.ContainsGroupError) as error:
        raise InputError("exists already", where=url, remedy="choose another path or remove it") from error
    except (ValueError, TypeError, KeyError) as error:  # what Zarr makes of a zarr.json that is damaged or another's
        raise NoStore(
            f"has a zarr.json that cannot be read ({error})", where=url, remedy="give a store that deepfere wrote"
        ) from error


def open_foreign(path: str | Path) -> zarr.Group:
    """Open another program's group at a path or URL to read it, Zarr v3 or v2.

    Raises:
        InputError: There is no readable Zarr group there, or the store does not answer.
    """
    if is_url(path):
        store = _remote(path, None, True)
        return answered(str(path), lambda: _opened(path, store), FIRST_TRIES)
    if not os.path.exists(path):  # noqa: PTH110 - see `open_group`
        raise missing(path)
    return _opened(path, LocalStore(Path(path), read_only=True))


def _opened(path: str | Path, store: LocalStore | FsspecStore) -> zarr.Group:
    try:
        return zarr.open_group(store, mode="r")
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError) as error:
        if is_url(path) and not exists(path):
            raise missing(path) from error
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


@contextmanager
def chunks_at_once() -> Iterator[None]:
    """Have zarr encode no more chunks at a time than there are cores.

    Those beyond only wait: copied already, they fill memory and have left the cache when their turn comes.
    """
    with zarr.config.set({"async.concurrency": min(usable_cores(), zarr.config.get("async.concurrency"))}):
        yield


def exists(url: str | Place, storage_options: StorageOptions | None = None) -> bool:
    """Whether anything is at this path or URL."""
    if not is_url(url):
        return Path(str(url)).exists()
    if not storage_options:
        return UrlPath(url).exists()
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(str(url), **{**OPTIONS, **storage_options})
    return answered(str(url), lambda: bool(filesystem.exists(path)), FIRST_TRIES)


def remove(url: str | Place, storage_options: StorageOptions | None = None) -> None:
    """Delete a store and everything in it; nothing happens if it is absent."""
    if not is_url(url) or not storage_options:
        remove_tree(place(url))
        return
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(str(url), **{**OPTIONS, **storage_options})
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def sync(path: Place) -> None:
    """Have the bytes of a file (or the names in a folder) on disk when this returns; at a URL they are."""
    if isinstance(path, UrlPath):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shard_object(root: str | Place, array: str, row: int, col: int) -> Place:
    """The object of one shard of a (c, y, x) array; shards of fill values alone have none."""
    return place(root) / f"{array}/c/0/{row}/{col}"


def sync_shard(root: str | Place, array: str, row: int, col: int) -> None:
    """Have one shard of a (c, y, x) array on disk: it may be recorded as done only then."""
    path = shard_object(root, array, row, col)
    if isinstance(path, Path) and path.exists():
        # Its folders may be as new as itself.
        for part in (path, *path.parents[:4]):
            sync(part)


def write_shard(root: str | Place, array: Any, row: int, col: int, values: NDArray[Any]) -> list[int] | None:
    """Write one whole shard of a (c, y, x) array: nothing of a torn or older one is left, and it is on disk afterwards.

    Args:
        root: The store.
        array: In it, opened to be written.
        row: Which shard.
        col: Which shard.
        values: (c, h, w), less than a shard only where the array ends.

    Returns:
        Bytes of its object and their CRC-32; None where it is of fill values alone, and has none.
    """
    top, left = row * array.shards[1], col * array.shards[2]
    # Else what is read back first, since zarr reads a shard before it writes it, might be torn.
    shard_object(root, array.path, row, col).unlink(missing_ok=True)
    store = array.store
    store.noted = {}
    try:
        array[:, top : top + values.shape[1], left : left + values.shape[2]] = values
        written: list[int] | None = store.noted.get(f"{array.path}/c/0/{row}/{col}")
    finally:
        store.noted = None
    sync_shard(root, array.path, row, col)
    return written


@contextmanager
def reading_again(root: str | Place) -> Iterator[None]:
    """Read a store that the work itself has made: where that is damaged, the input is not wrong.

    Raises:
        Damaged: It is.
    """
    try:
        yield
    except InputError as error:
        if is_url(root):  # which refuses
            raise
        raise Damaged(error.where or root, error.what) from error
    except (RuntimeError, ValueError) as error:  # what zarr's codecs make of it
        raise Damaged(root, f"cannot be read ({error})") from error


def settle(root: Place) -> None:
    """Have a whole store on disk, without what interrupted writers left in it; at a URL it is."""
    if isinstance(root, UrlPath):
        return
    for path in list(root.rglob("*.partial")):
        path.unlink(missing_ok=True)
    sync_tree(root)


def sync_tree(root: Place) -> None:
    """Have a folder with everything in it on disk; nothing happens if it is absent."""
    if isinstance(root, UrlPath) or not root.exists():
        return
    for path in [*root.rglob("*"), root]:
        with suppress(FileNotFoundError):  # one that was only passing
            sync(path)
