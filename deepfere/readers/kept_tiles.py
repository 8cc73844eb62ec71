"""Decoded native tiles that a later window of a slide needs again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int, int]


class KeptTiles:
    """Tiles by level, row and column; threads may share it.

    Args:
        most_bytes: The least recently used go when there are more.
        copy: Keep copies, of tiles that are views of something larger.
    """

    def __init__(self, most_bytes: int, copy: bool = False) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._copy = copy
        self._tiles: OrderedDict[Key, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tiles)

    def find(self, keys: Iterable[Key]) -> list[NDArray[np.uint8] | None]:
        """The tiles that are kept, None for the others."""
        with self._lock:
            return [self._tiles.get(key) for key in keys]

    def used(self, key: Key, tile: NDArray[np.uint8], again: bool) -> None:
        """A tile was used: keep it if it is needed again, else let go of it."""
        with self._lock:
            if again and key not in self._tiles:
                tile = tile.copy() if self._copy else tile
                self._tiles[key] = tile
                self.bytes += tile.nbytes
            elif again:
                self._tiles.move_to_end(key)
            elif key in self._tiles:
                self.bytes -= self._tiles.pop(key).nbytes
            while self.bytes > self.most_bytes and len(self._tiles) > 1:
                self.bytes -= self._tiles.popitem(last=False)[1].nbytes
