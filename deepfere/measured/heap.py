"""How the C library keeps memory while a measurement is ingested, where it lets itself be told."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_AFTER = {"MMAP": 32 << 20, "TRIM": 64 << 20}
"""Bytes of glibc's thresholds afterwards, unless the environment names them (workers': `deepfere.cluster.MEMORY`)."""


@contextmanager
def tidy_heap() -> Iterator[None]:
    """Have what is large lie in pages of its own meanwhile: they go back at once, and leave no holes in the heap.

    Afterwards arrays may stay where they are, as computing on them is faster then.
    """
    _one_heap()
    _limits(4 << 20, 32 << 20)
    try:
        yield
    finally:
        kept = (os.environ.get(f"MALLOC_{name}_THRESHOLD_", default) for name, default in _AFTER.items())
        _limits(*map(int, kept))


def _limits(mmap_bytes: int, trim_bytes: int) -> None:
    """From which size on memory comes in pages of its own, and how much free memory the heap keeps at its end."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, mmap_bytes)  # M_MMAP_THRESHOLD
        library.mallopt(-1, trim_bytes)  # M_TRIM_THRESHOLD


def _one_heap() -> None:
    """Have the C library serve all threads from one heap, where that can be.

    With one for each of the threads that write, what a band leaves free in one of them is of no use to the next band,
    and the process grew by some 50 MB; as fast either way.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def give_back() -> None:
    """Return freed memory to the system, where that can be: the C library keeps what indexing has freed."""
    gc.collect(1)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
