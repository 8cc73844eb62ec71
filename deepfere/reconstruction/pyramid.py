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


def halve(image: NDArray[Any], rows: NDArray[np.float32], cols: NDArray[np.float32]) -> NDArray[Any]:
    """Means over 2 x 2 pixels of (c, h, w), each weighted by the pixels of level 0 that it stands for.

    Args:
        image: (c, h, w), beginning at an even row and column of its level; an odd side is the level's last.
        rows: (h,) `pixels_below` along y.
        cols: (w,) `pixels_below` along x.

    Returns:
        (c, ceil(h / 2), ceil(w / 2)), uint8 rounded (half to even) where the image is uint8, else float32. Away from
        the level's end it is the plain mean, so tiles agree with the whole.
    """
    if image.dtype != np.uint8:
        return _pairs(_pairs(image.astype(np.float32), rows, 1), cols, 2)
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
    total = even[:, 0::2].astype(np.uint16)
    total += even[:, 1::2]
    total = total[:, :, 0::2] + total[:, :, 1::2]
    total += 1 + ((total >> 2) & 1)
    out = np.empty((len(image), -(-image.shape[1] // 2), -(-image.shape[2] // 2)), np.uint8)
    out[:, : total.shape[1], : total.shape[2]] = total >> 2
    # The level's last row and column may be single, or weigh less.
    last = [slice((n - 1) // 2 * 2, None) for n in image.shape[1:]]
    out[:, -1:] = np.rint(halve(image[:, last[0]].astype(np.float32), rows[last[0]], cols))
    out[:, :, -1:] = np.rint(halve(image[:, :, last[1]].astype(np.float32), rows, cols[last[1]]))
    return out


def _pairs(values: NDArray[np.float32], counts: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Weighted means of neighbours along an axis; all pixels but the last stand for the same number."""
    whole = len(counts) // 2 * 2

    def along(start: int, stop: int | None, step: int = 1) -> tuple[slice, ...]:
        return (slice(None),) * axis + (slice(start, stop, step),)

    shape = list(values.shape)
    shape[axis] = -(-len(counts) // 2)
    out = np.empty(shape, np.float32)
    inner = out[along(0, whole // 2)]
    np.add(values[along(0, whole, 2)], values[along(1, whole, 2)], out=inner)
    inner *= np.float32(0.5)
    if whole < len(counts):
        out[along(-1, None)] = values[along(-1, None)]
    elif counts[-1] != counts[-2]:
        share = counts[-1] / (counts[-1] + counts[-2])
        out[along(-1, None)] = (1 - share) * values[along(-2, -1)] + share * values[along(-1, None)]
    return out


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
        x0, x1 = 2 * c0, min(2 * c1, below.shape[2])
        cols = pixels_below(x0, x1, level - 1, full[1])
        values = np.empty((target.shape[0], r1 - r0, c1 - c0), target.dtype)
        # In strips: single precision is needed of a part only.
        for top in range(r0, r1, target.chunks[1]):
            bottom = min(top + target.chunks[1], r1)
            y0, y1 = 2 * top, min(2 * bottom, below.shape[1])
            strip = np.asarray(below[:, y0:y1, x0:x1])
            values[:, top - r0 : bottom - r0] = halve(strip, pixels_below(y0, y1, level - 1, full[0]), cols)
        delete_shard(target, Path(self._out), f"{row['image']}/{level}", row["row"], row["col"])
        target[:, r0:r1, c0:c1] = values
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
