"""Pyramids: level k + 1 from level k, whole shards, in parallel; level k is the average of level 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.cluster import Journal, RowWorker, run_rows
from deepfere.reconstruction.shards import delete_shard
from deepfere.store import open_group


def halve(image: NDArray[Any]) -> NDArray[np.float32]:
    """Means over 2 x 2 pixels of (c, h, w); an odd last row or column is averaged over what there is."""
    odd = [n % 2 for n in image.shape[1:]]
    padded = np.pad(image.astype(np.float32), [(0, 0), (0, odd[0]), (0, odd[1])], mode="edge")
    c, h, w = padded.shape
    return padded.reshape(c, h // 2, 2, w // 2, 2).mean(axis=(2, 4), dtype=np.float32)


class PyramidWorker(RowWorker):
    """Writes one shard of one level of one image per row."""

    def __init__(self, out: str, journal: str, fingerprint: str) -> None:
        self._out, self._journal = out, Journal(journal, fingerprint)

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read the 2 x 2 region below, average, write the shard, record it."""
        group: Any = open_group(self._out, "r+")[row["image"]]
        below, target = group[str(row["level"] - 1)], group[str(row["level"])]
        side_y, side_x = target.shards[1:]
        r0, c0 = row["row"] * side_y, row["col"] * side_x
        r1, c1 = min(r0 + side_y, target.shape[1]), min(c0 + side_x, target.shape[2])
        source = np.asarray(below[:, 2 * r0 : min(2 * r1, below.shape[1]), 2 * c0 : min(2 * c1, below.shape[2])])
        values = halve(source)
        if target.dtype == np.uint8:
            values = np.rint(values)
        delete_shard(target, Path(self._out), f"{row['image']}/{row['level']}", row["row"], row["col"])
        target[:, r0:r1, c0:c1] = values.astype(target.dtype)
        self._journal.record(row["unit"])
        return {}


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
    done, total = 0, sum(len(level) for level in rows)
    finished = journal.done()
    for level_rows in rows:
        todo = [row for row in level_rows if row["unit"] not in finished]
        arguments = (out, str(journal.folder), journal.fingerprint)
        run_rows(todo, PyramidWorker, arguments, what="pyramid", inline_up_to=8)
        done += len(level_rows)
        if on_done:
            on_done(done, total)
