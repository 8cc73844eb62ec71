"""How chunks are encoded and decoded: zarr's codecs, without what makes them slow.

Zarr decodes a shard's chunks one by one as tasks of an event loop, which takes longer than decompressing; what lies on
a local disk is read by zarrs instead, which does so in Rust. Writing stays zarr's: zarrs writes in place, so that a
process that is killed leaves half a file under the name of a whole one, and a full disk has no error number.
"""

from __future__ import annotations

import asyncio
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteGetter, ByteSetter, Store
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.core.indexing import SelectorTuple
from zarr.core.metadata import ArrayMetadata, ArrayV3Metadata
from zarr.registry import register_pipeline
from zarr.storage import LocalStore
from zarrs import ZarrsCodecPipeline
from zarrs.pipeline import UnsupportedMetadataError, ZarrsCodecPipelineState, get_codec_pipeline_impl
from zarrs.utils import make_chunk_info_for_rust_with_indices

from deepfere.cores import usable_cores
from deepfere.errors import InputError

_OURS, _DEFAULT = "deepfere.codecs.Pipeline", "zarr.core.codec_pipeline.BatchedCodecPipeline"

_OS_ERROR = re.compile(r"\(os error (\d+)\)")

Asked = tuple[ByteGetter, ArraySpec, SelectorTuple, SelectorTuple, bool]
"""What zarr asks a pipeline for: where a shard or chunk lies, what it is, which part of it, where that goes in the
result, and whether it is the whole."""
Written = tuple[ByteSetter, ArraySpec, SelectorTuple, SelectorTuple, bool]
"""The same of what is written."""


class Noting:
    """Part of a store that is written to: it can note what its objects came to.

    Attributes:
        noted: Bytes and their CRC-32 of every object that was written, by its key; None where nobody asks.
    """

    noted: dict[str, list[int]] | None = None

    def note(self, key: str, value: Buffer) -> None:
        """Note an object that has been written."""
        if self.noted is not None:
            self.noted[key] = [len(value), zlib.crc32(value.as_buffer_like())]


class DiskStore(Noting, LocalStore):
    """A local store of deepfere's, which zarrs reads."""

    async def set(self, key: str, value: Buffer) -> None:
        """As in zarr."""
        await super().set(key, value)
        self.note(key, value)


class Pipeline(BatchedCodecPipeline):
    """Zarr's, but for how it finds that a chunk holds nothing but its fill value and need not be written."""

    @classmethod
    def from_array_metadata_and_store(cls, array_metadata: ArrayMetadata, store: Store) -> Any:
        """As in zarr; arrays of a `DiskStore` are read by zarrs."""
        if not isinstance(store, DiskStore) or not isinstance(array_metadata, ArrayV3Metadata):
            return super().from_array_metadata_and_store(array_metadata, store)
        return ReadInRust.of(array_metadata, store)

    async def write_batch(
        self,
        batch_info: Iterable[Written],
        value: NDBuffer,
        drop_axes: tuple[int, ...] = (),
    ) -> None:
        """As in zarr."""
        if not isinstance(self.array_bytes_codec, ShardingCodec):  # whose chunks come here themselves
            batch_info = [
                (at, _sparing(spec, value, out), chunk, out, all_) for at, spec, chunk, out, all_ in batch_info
            ]
        await super().write_batch(batch_info, value, drop_axes)


def _sparing(spec: ArraySpec, value: NDBuffer, selection: SelectorTuple) -> ArraySpec:
    """The spec of a chunk: not to be compared with its fill value where it is plain that it differs.

    Zarr compares whole chunks, floating-point ones bit by bit, which takes longer than compressing them.
    """
    if spec.config.write_empty_chunks or not value.shape:
        return spec
    values, fill = value[selection].as_numpy_array(), np.asarray(spec.fill_value)
    if values.dtype.kind not in "iuf" or not values.size:
        return spec
    first = (slice(0, 1),) * values.ndim  # nearly always enough
    if _differ(values[first], fill) or _differ(values, fill):
        return replace(spec, config=ArrayConfig(order=spec.config.order, write_empty_chunks=True))
    return spec


def _differ(values: NDArray[Any], fill: NDArray[Any]) -> bool:
    """Whether some values are not the fill value; a zero's sign counts, what a NaN holds does not."""
    if fill.dtype.kind == "f" and np.isnan(fill):
        return not np.isnan(values).all()
    if fill == 0 and not fill.tobytes().strip(b"\0"):
        return bool(values.view(f"u{values.dtype.itemsize}").any())
    return bool((values != fill).any())


class ReadInRust(ZarrsCodecPipeline):
    """Reads with zarrs and writes with zarr."""

    @classmethod
    def of(cls, metadata: ArrayV3Metadata, store: DiskStore) -> ReadInRust:
        """For an array of a local store; zarrs knows stores by their class."""
        pipeline = cls(metadata, LocalStore(store.root, read_only=True), None, None)
        pipeline._begin()
        return pipeline

    def __setstate__(self, state: ZarrsCodecPipelineState) -> None:
        self.metadata, self.store = state["metadata"], state["store"]  # type: ignore[typeddict-item]
        self._begin()

    def _begin(self) -> None:
        self.python_impl = Pipeline.from_codecs(cast(ArrayV3Metadata, self.metadata).codecs)
        self.impl = None  # zarr reads what zarrs does not know
        with zarr.config.set({"threading.max_workers": _threads()}), suppress(UnsupportedMetadataError):
            self.impl = get_codec_pipeline_impl(self.metadata, self.store, strict=True)

    async def read(
        self,
        batch_info: Iterable[Asked],
        out: NDBuffer,
        drop_axes: tuple[int, ...] = (),
    ) -> Any:
        """As in zarr.

        Raises:
            InputError: A chunk is damaged or cut off.
            OSError: The system refuses to read it.
        """
        batch = list(batch_info)
        # Threads are not forked, and zarrs would wait for them.
        boxes = None if _forked or drop_axes or self.impl is None else _boxes(batch, out)
        try:
            if boxes is not None and self.impl is not None:
                chunks, pixels = boxes
                known = make_chunk_info_for_rust_with_indices(chunks, (), pixels.shape)
                await asyncio.to_thread(
                    self.impl.retrieve_chunks_and_apply_index, known.chunk_info_with_indices, pixels
                )
                return None
            self._refuse_empty(batch)
            assert self.python_impl is not None
            return await self.python_impl.read(batch, out, drop_axes)
        except (RuntimeError, ValueError, OSError) as error:
            text = " ".join(str(error).split())
            if (number := _OS_ERROR.search(text)) is not None:
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(self._array(batch))) from error
            # What the system says has a number; a ValueError is a damaged index or the caller's mistake.
            if (isinstance(error, OSError) and error.errno) or (
                isinstance(error, ValueError) and "checksum" not in text
            ):
                raise
            raise self._damaged(self._array(batch), text) from error

    async def write(
        self,
        batch_info: Iterable[Written],
        value: NDBuffer,
        drop_axes: tuple[int, ...] = (),
    ) -> None:
        """As in zarr."""
        batch = list(batch_info)
        self._refuse_empty([part for part in batch if not part[4]])
        assert self.python_impl is not None
        await self.python_impl.write(batch, value, drop_axes)

    def _refuse_empty(self, batch: Sequence[Asked | Written]) -> None:
        """Zarr takes what is cut to nothing for fill values."""
        for at, *_ in batch:
            path = self._path(at)
            if path.exists() and not (path.is_file() and path.stat().st_size):
                raise self._damaged(path, "nothing is in it")

    def _path(self, at: Any) -> Path:
        """Of a shard or chunk."""
        return Path(self.store.root) / at.path  # type: ignore[attr-defined]

    def _array(self, batch: list[Asked]) -> Path:
        """What was read: the one object, or the array."""
        path = self._path(batch[0][0])
        return path if len(batch) == 1 else Path(str(path).rpartition("/c/")[0] or path)

    @staticmethod
    def _damaged(where: Path, why: str) -> InputError:
        return InputError(f"holds a chunk that cannot be read ({why})", where=where, remedy="copy or make it again")


def _boxes(batch: list[Asked], out: NDBuffer) -> tuple[list[Asked], NDArray[Any]] | None:
    """What is read, as boxes of pixels.

    Of other selections, and of single indices, zarrs (0.2) mistakes some.

    Args:
        batch: What is asked for.
        out: Result (n, ...), without the axes of single indices.

    Returns:
        The same, single indices as boxes one pixel wide, and a view of the result (n, ...) with their axes; None where
        it is no such box or no plain numbers.
    """
    pixels = out.as_ndarray_like()
    if not batch or not isinstance(pixels, np.ndarray) or not pixels.flags.c_contiguous or not pixels.dtype.isnative:
        return None
    single: list[bool] = []
    chunks = []
    for getter, spec, chosen, target, whole in batch:
        if not isinstance(chosen, tuple) or not isinstance(target, tuple):
            return None
        if spec.dtype.to_native_dtype().kind not in "biuf":
            return None
        single = [isinstance(part, (int, np.integer)) for part in chosen]
        if len(target) != single.count(False) or not all(
            isinstance(part, slice) and part.step in (None, 1)
            for part in (*target, *(p for p, one in zip(chosen, single, strict=True) if not one))
        ):
            return None
        axes = iter(target)
        chunks.append(
            (
                getter,
                spec,
                tuple(slice(int(p), int(p) + 1) if one else p for p, one in zip(chosen, single, strict=True)),
                tuple(slice(0, 1) if one else next(axes) for one in single),
                whole,
            )
        )
    sides = iter(pixels.shape)
    if pixels.ndim != single.count(False):
        return None
    return chunks, pixels.reshape([1 if one else next(sides) for one in single])


_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


def _threads() -> int:
    """As many as numerical libraries may use here."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return usable_cores()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
register_pipeline(Pipeline)
if zarr.config.get("codec_pipeline.path") == _DEFAULT:  # another choice is the user's
    zarr.config.set({"codec_pipeline.path": _OURS})
