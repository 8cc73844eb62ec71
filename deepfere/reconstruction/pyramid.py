"""Pyramids: level k + 1 from level k, whole shards, in parallel; level k is the average of level 0.

Where a side is no multiple of 2^k, the last pixel of level k lies over fewer pixels of level 0 than the others:
its value is the mean of those that exist. Two such pixels must therefore not count alike when they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.cluster import Journal
from deepfere.rows import Phase, Phases, Row, RowWorker
from deepfere.store import open_group, reading_again, write_shard

PIECE_VALUES = 1 << 17
"""Values that are averaged at a time."""
READ_BYTES = 16 << 20
"""So much of a level is read at a time, or one row of a shard's chunks."""


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
        (c, ceil(h / 2), ceil(w / 2)), rounded (half to even) to uint8 or half precision where the image is of that
        type, else float32. Away from the level's end it is the plain mean, so tiles agree with the whole.
    """
    if image.dtype not in (np.uint8, np.float16):
        return _pairs(_pairs(image.astype(np.float32), rows, 1), cols, 2)
    out = np.empty((len(image), -(-image.shape[1] // 2), -(-image.shape[2] // 2)), image.dtype)
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
    (_halve_bytes if image.dtype == np.uint8 else _halve_floats)(
        even, out[:, : even.shape[1] // 2, : even.shape[2] // 2]
    )
    # The level's last row and column may be single, or weigh less.
    last = [slice((n - 1) // 2 * 2, None) for n in image.shape[1:]]
    ends: list[tuple[NDArray[Any], NDArray[Any]]] = []
    if _uneven(rows):
        ends.append((out[:, -1:], halve(image[:, last[0]].astype(np.float32), rows[last[0]], cols)))
    if _uneven(cols):
        ends.append((out[:, :, -1:], halve(image[:, :, last[1]].astype(np.float32), rows, cols[last[1]])))
    for target, values in ends:
        target[:] = np.rint(values) if image.dtype == np.uint8 else values
    return out


def _uneven(counts: NDArray[np.float32]) -> bool:
    """Whether the last two of (n,) `pixels_below` are no pair of equals."""
    return len(counts) % 2 == 1 or bool(counts[-1] != counts[-2])


def _halve_bytes(even: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """In pieces that stay in the processor's cache; two neighbours are the halves of a 16-bit number."""
    _, height, width = even.shape
    if not out.size:
        return
    step = max(2, PIECE_VALUES // width // 2 * 2)
    sums, odd = (np.empty((step, width // 2), np.uint16) for _ in range(2))
    for channel, result in zip(even, out, strict=True):
        for top in range(0, height, step):
            n = min(step, height - top)
            pairs, total = channel[top : top + n].view(np.uint16), sums[:n]
            np.bitwise_and(pairs, 255, out=total)
            total += np.right_shift(pairs, 8, out=odd[:n])
            four = np.add(total[0::2], total[1::2], out=total[: n // 2])
            # Half to even: 1 more, and another one where the quotient is odd.
            four += 1 + ((four >> 2) & 1)
            np.right_shift(four, 2, out=result[top // 2 : (top + n) // 2], casting="unsafe")


def _halve_floats(even: NDArray[np.float16], out: NDArray[np.float16]) -> None:
    """In pieces that stay in the processor's cache: PyTorch takes two thirds of NumPy's time, a tenth to convert."""
    _, height, width = even.shape
    if not out.size:
        return
    step = max(2, PIECE_VALUES // width // 2 * 2)
    piece, rows, means = (torch.empty(shape) for shape in ((step, width), (step // 2, width), (step // 2, width // 2)))
    source, target = torch.from_numpy(even), torch.from_numpy(out)
    for channel in range(len(even)):
        for top in range(0, height, step):
            n = min(step, height - top)
            values, sums, mean = piece[:n], rows[: n // 2], means[: n // 2]
            values.copy_(source[channel, top : top + n])
            torch.add(values[0::2], values[1::2], out=sums)
            torch.add(sums[:, 0::2], sums[:, 1::2], out=mean)
            mean *= 0.25
            target[channel, top // 2 : (top + n) // 2].copy_(mean)


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


def _steps(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    return [(at, min(at + step, stop)) for at in range(start, stop, max(step, 1))]


class PyramidWorker(RowWorker):
    """Writes one shard of one level of one image per row."""

    def __init__(self, out: str, journal: str, fingerprint: str) -> None:
        self._out, self.journal = out, Journal(journal, fingerprint)

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read the 2 x 2 region below, average, write the shard; on disk when this returns."""
        group: Any = open_group(self._out, "r+")[row["image"]]
        level, full = row["level"], group["0"].shape[1:]
        below, target = group[str(level - 1)], group[str(level)]
        side_y, side_x = target.shards[1:]
        r0, c0 = row["row"] * side_y, row["col"] * side_x
        r1, c1 = min(r0 + side_y, target.shape[1]), min(c0 + side_x, target.shape[2])
        values = np.empty((target.shape[0], r1 - r0, c1 - c0), target.dtype)
        # A shard of the level below at a time, or some of its rows of chunks: what is read is held three times over.
        width, chunk = side_x // 2, below.chunks[1]
        held = chunk * 2 * width * len(values) * values.itemsize
        height = max(1, min(side_y // chunk, READ_BYTES // held)) * chunk // 2
        for top, bottom in _steps(r0, r1, height):
            for left, right in _steps(c0, c1, width):
                y0, y1 = 2 * top, min(2 * bottom, below.shape[1])
                x0, x1 = 2 * left, min(2 * right, below.shape[2])
                counts = pixels_below(y0, y1, level - 1, full[0]), pixels_below(x0, x1, level - 1, full[1])
                with reading_again(self._out):
                    pixels = np.asarray(below[:, y0:y1, x0:x1])
                values[:, top - r0 : bottom - r0, left - c0 : right - c0] = halve(pixels, *counts)
        return {"wrote": {target.path: write_shard(self._out, target, row["row"], row["col"], values)}}


def pyramid_rows(level: int, counts: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """The shards of one level.

    Args:
        level: Which, from 1.
        counts: Shards (rows, columns) of each image at that level.
    """
    for image, (rows, cols) in counts.items():
        for r in range(rows):
            for c in range(cols):
                yield {"unit": f"{image}/{level}/{r}/{c}", "image": image, "level": level, "row": r, "col": c}


Counts = dict[int, dict[str, tuple[int, int]]]
"""Shards (rows, columns) of each image at each level from 1 on."""


def level_counts(shapes: Sequence[tuple[int, int]], shard_px: int, images: Sequence[str]) -> Counts:
    """How many shards of a side there are where all images have levels of the same shapes, level 0 the first."""
    counts = [(-(-height // shard_px), -(-width // shard_px)) for height, width in shapes]
    return {level: dict.fromkeys(images, count) for level, count in enumerate(counts) if level}


def averaged_from(array: str, row: int, col: int, counts: Counts) -> Iterator[str]:
    """The units that stand above one shard: what is averaged from its pixels.

    Args:
        array: ``IMAGE/LEVEL``.
        row: Of the shard.
        col: Of the shard.
        counts: Shards of each level.
    """
    image, level = array.split("/")
    for higher in range(int(level) + 1, max(counts, default=0) + 1):
        row, col = row // 2, col // 2
        yield f"{image}/{higher}/{row}/{col}"


def pyramid_phases(
    out: str,
    counts: Counts,
    journal: Journal,
    what: str = "pyramid",
    progress: Callable[[float], None] = lambda share: None,
    worker: type[RowWorker] = PyramidWorker,
) -> Phases:
    """Levels 1 and up, a phase each; finished shards are not computed again.

    Args:
        out: The result's group.
        counts: Shards of each level.
        journal: What is done.
        what: Name of the work for messages.
        progress: Called with the share that is done, weighed by shards.
        worker: What fills a shard.
    """
    total = sum(rows * cols for of_level in counts.values() for rows, cols in of_level.values())
    finished = journal.done()
    done = len(finished)

    def step(_: Any) -> None:
        nonlocal done
        done += 1
        progress(done / total)

    arguments = (out, str(journal.folder), journal.fingerprint)
    for level, of_level in counts.items():
        left = sum(row["unit"] not in finished for row in pyramid_rows(level, of_level))
        if left:
            rows = (row for row in pyramid_rows(level, of_level) if row["unit"] not in finished)
            yield Phase(what, worker, arguments, rows, left, step)
