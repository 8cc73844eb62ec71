"""Pyramids: level k + 1 from level k, whole shards, in parallel; level k is the average of level 0.

Where a side is no multiple of 2^k, the last pixel of level k lies over fewer pixels of level 0 than the others:
its value is the mean of those that exist. Two such pixels must therefore not count alike when they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.cluster import Journal, RowWorker, run_rows
from deepfere.reconstruction.shards import delete_shard
from deepfere.store import open_group, sync_shard


def pixels_below(start: int, stop: int, level: int, full: int) -> NDArray[np.float32]:
    """How many pixels of level 0 lie below each of the pixels ``start`` to ``stop`` of a level, along one axis.

    Args:
        start: First pixel of the level.
        stop: End of the range.
        level: The level.
        full: Length of level 0.
    """
    edges = np.minimum(np.arange(start, stop + 1) * 2**level, full)
    return np.diff(edges).astype(np.float32)


def halve(image: NDArray[Any], rows: NDArray[np.float32], cols: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means over 2 x 2 pixels of (c, h, w), each weighted by the pixels of level 0 that it stands for.

    Args:
        image: (c, h, w), beginning at an even row and column of its level; an odd side is the level's last.
        rows: (h,) `pixels_below` along y.
        cols: (w,) `pixels_below` along x.

    Returns:
        (c, ceil(h / 2), ceil(w / 2)). Away from the level's end it is the plain mean, so tiles agree with the whole.
    """
    weights = rows[:, None] * cols
    odd = [(0, n % 2) for n in image.shape[1:]]
    sums = [_sums(np.pad(values, [(0, 0), *odd])) for values in (image.astype(np.float32) * weights, weights[None])]
    return sums[0] / sums[1]


def _sums(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums over 2 x 2 pixels of (c, h, w), both sides even."""
    c, h, w = image.shape
    return image.reshape(c, h // 2, 2, w // 2, 2).sum(axis=(2, 4), dtype=np.float32)


class PyramidWorker(RowWorker):
    """Writes one shard of one level of one image per row."""

    def __init__(self, out: str, journal: str, fingerprint: str) -> None:
        self._out, self._journal = out, Journal(journal, fingerprint)

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read the 2 x 2 region below, average, write the shard, record it."""
        group: Any = open_group(self._out, "r+")[row["image"]]
        level, full = row["level"], group["0"].shape[1:]
        below, target = group[str(level - 1)], group[str(level)]
        side_y, side_x = target.shards[1:]
        r0, c0 = row["row"] * side_y, row["col"] * side_x
        r1, c1 = min(r0 + side_y, target.shape[1]), min(c0 + side_x, target.shape[2])
        y0, y1, x0, x1 = 2 * r0, min(2 * r1, below.shape[1]), 2 * c0, min(2 * c1, below.shape[2])
        rows, cols = pixels_below(y0, y1, level - 1, full[0]), pixels_below(x0, x1, level - 1, full[1])
        values = halve(np.asarray(below[:, y0:y1, x0:x1]), rows, cols)
        if target.dtype == np.uint8:
            values = np.rint(values)
        delete_shard(target, Path(self._out), f"{row['image']}/{level}", row["row"], row["col"])
        target[:, r0:r1, c0:c1] = values.astype(target.dtype)
        sync_shard(self._out, f"{row['image']}/{row['level']}", row["row"], row["col"])
        self._journal.record(row["unit"])
        return {}


def pyramid_rows(out: str, images: list[str], levels: int) -> list[list[dict[str, Any]]]:
    """What has to be done for levels 1 and up, level by level; see `build_pyramid`."""
    group: Any = open_group(out, "r")
    rows: list[list[dict[str, Any]]] = []
    for level in range(1, levels):
        this_level = []
        for image in images:
            array = group[image][str(level)]
            counts = [-(-n // s) for n, s in zip(array.shape[1:], array.shards[1:], strict=True)]
            this_level += [
                {"unit": f"{image}/{level}/{r}/{c}", "image": image, "level": level, "row": r, "col": c}
                for r in range(counts[0])
                for c in range(counts[1])
            ]
        rows.append(this_level)
    return rows


def build_pyramid(
    out: str, images: list[str], levels: int, journal: Journal, on_done: Callable[[int, int], None] | None = None
) -> None:
    """Fill levels 1 and up of the named images.

    Args:
        out: The result's group.
        images: Names of its multiscale groups.
        levels: Number of levels.
        journal: Progress; finished shards are not computed again.
        on_done: Called with (done, all) shards.
    """
    rows = pyramid_rows(out, images, levels)
    done, total = 0, sum(len(level) for level in rows)
    finished = journal.done()
    for level_rows in rows:
        todo = [row for row in level_rows if row["unit"] not in finished]
        arguments = (out, str(journal.folder), journal.fingerprint)
        run_rows(todo, PyramidWorker, arguments, what="pyramid", inline_up_to=8)
        done += len(level_rows)
        if on_done:
            on_done(done, total)
