"""Ray Data adapter of the tiles: many read tasks a slide, fixed-shape tensors out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from deepfere.tiling.groups import Group, TileReader, group_tiles
from deepfere.tiling.tile_files import missing_tiles, with_text_errors
from deepfere.tiling.tiles import TilePlan

if TYPE_CHECKING:
    import pandas as pd

LEAST_GROUPS = 12
"""Groups of a read task, unless there are too few for all processors. What tasks decode over the distinct native tiles,
512 px tiles that are not aligned: 1.09 to 1.10 with 12 groups, 1.21 with 3, 1.5 with one."""
TASK_BYTES = 1 << 30
"""Pixels of a read task, about: a second's work, beside which starting it is nothing. It holds one block of them."""
BLOCK_BYTES = 26 << 20
"""Pixels of a block, about: some groups of tiles. Larger ones leave the processor's cache before they are used."""


Batch = dict[str, Any]
Apply = Callable[[Batch], Batch]


class SlideTiles(Datasource):
    """Tiles of slides as rows (`tile_dataset` reads them).

    Columns: ``plan`` (its key), ``slide`` (path), ``tile`` (number in its plan), ``row_px`` and ``col_px`` (corner,
    output pixels), ``y_um`` and ``x_um`` (the same, slide micrometres), ``tissue`` (share), ``valid_h`` and
    ``valid_w`` (pixels that the slide reaches), ``error`` (None, or what is wrong; the tile is background then) and
    ``pixels`` (side, side, 3) uint8.

    Args:
        plans: Tiles of each slide, all of one side.
        apply: See `tile_dataset`.
        done: See `tile_dataset`.

    Attributes:
        block_bytes: Pixels of a whole block, of the plan where that is least; known after `get_read_tasks`.

    Raises:
        ValueError: Their sides differ, or there is none.
        InputError: See `tile_dataset`.
    """

    def __init__(self, plans: Sequence[TilePlan], apply: Apply | None = None, done: pd.DataFrame | None = None) -> None:
        super().__init__()
        self._apply = apply
        if not plans:
            raise ValueError("no plan is given")
        if len({plan.spec.tile_px for plan in plans}) > 1:
            raise ValueError("tiles of one dataset have one side")
        self._left = missing_tiles(plans, done)
        self.block_bytes = BLOCK_BYTES

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all tiles' pixels: exact, as shapes are fixed. What ``apply`` makes of them is not known."""
        return sum(len(part) * _tile_bytes(part) for part, _, _ in self._left)

    @property
    def groups(self) -> int:
        """Groups of tiles that are read at once, of all plans."""
        return sum(len(group_tiles(part)) for part, _, _ in self._left)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Read tasks of about `TASK_BYTES`, more if so many are asked for; each a run of neighbouring groups."""
        total = max(1, self.estimate_inmemory_data_size())
        tasks, sizes = [], []
        for plan, key, numbers in self._left:
            groups = group_tiles(plan)
            if groups:
                sizes.append(_groups_per_block(plan, groups) * _most_tiles(groups) * _tile_bytes(plan))
            size = len(plan) * _tile_bytes(plan)
            wanted = max(1, round(size / TASK_BYTES), round(parallelism * size / total))
            for part in np.array_split(np.arange(len(groups)), min(wanted, len(groups))) if groups else ():
                tiles = np.concatenate([groups[k].tiles for k in part])
                known, apply = self._apply is None, self._apply
                metadata = BlockMetadata(
                    num_rows=len(tiles) if known else None,
                    size_bytes=len(tiles) * _tile_bytes(plan) if known else None,
                    input_files=(plan.path,),
                    exec_stats=None,
                )
                taken = plan.take(tiles), key, numbers[tiles]
                task = partial(read_tiles, *taken) if apply is None else partial(apply_tiles, *taken, apply)
                tasks.append(ReadTask(task, metadata, per_task_row_limit=per_task_row_limit))
        self.block_bytes = min(sizes, default=BLOCK_BYTES)
        return tasks


def tile_dataset(
    plans: Sequence[TilePlan],
    tasks: int | None = None,
    apply: Apply | None = None,
    done: pd.DataFrame | None = None,
    **options: Any,
) -> Any:
    """A Ray Dataset of tiles, whose reading fuses with the map that follows it.

    Args:
        plans: Tiles of each slide, all of one side.
        tasks: At least so many read tasks; None is up to four for each CPU that the cluster has, and one where tasks
            would be small: much of what they decode at their borders their neighbours would decode, too.
        apply: Takes the columns of some tiles (NumPy arrays of one length); what it gives, columns of one length too,
            become the rows: a network's features of each tile, a score. It is called in the task that reads, while the
            pixels are in the processor's cache and before anything becomes a block: a little faster than with
            ``map_batches``. The pixels' memory is used again afterwards; what is returned is copied. A column that is
            not there for all tiles, or not of one number type, is an error of the job (``ValueError``).
        done: Tiles that are not wanted again, from `deepfere.tiling.tile_files.tiles_done`.
        **options: For ``ray.data.read_datasource``: ``num_cpus``, ``memory``, ``ray_remote_args``, ...

    Raises:
        ValueError: No plan is given, or their sides differ.
        InputError: Of a slide of these plans, ``done`` holds tiles of another plan.
    """
    import ray

    source = SlideTiles(plans, apply, done)
    if tasks is None:
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1.0))) if ray.is_initialized() else 1
        tasks = tasks_for(source.groups, cpus)
    # Ray splits the blocks of a source that has fewer tasks than it asks for, and then fuses nothing.
    out = ray.data.read_datasource(source, override_num_blocks=len(source.get_read_tasks(tasks)) or None, **options)
    # Blocks are to go on as they are: Ray joins those that are smaller than this, and cuts those that are half as large
    # again, both by copying.
    out.context.target_max_block_size = int(0.95 * source.block_bytes)
    # A thread that asks the kernel once a second what the task's memory is made of holds up its page faults.
    out.context.memory_usage_poll_interval_s = None
    return out


def tasks_for(groups: int, cpus: int) -> int:
    """How many read tasks so many groups are dealt to on so many CPUs."""
    return min(4 * cpus, max(cpus, groups // LEAST_GROUPS))


def _tile_bytes(plan: TilePlan) -> int:
    return plan.spec.tile_px**2 * 3


def _most_tiles(groups: list[Group]) -> int:
    return max(len(group.tiles) for group in groups)


def _groups_per_block(plan: TilePlan, groups: list[Group]) -> int:
    return max(1, BLOCK_BYTES // (_tile_bytes(plan) * _most_tiles(groups)))


def read_tiles(plan: TilePlan, key: str, numbers: NDArray[np.int64]) -> Iterator[Block]:
    """A plan's tiles, ``numbers`` of the whole plan ``key``, in blocks of some neighbouring groups."""
    reader, groups = TileReader(plan), group_tiles(plan)
    side, each = plan.spec.tile_px, _groups_per_block(plan, groups)
    for first in range(0, len(groups), each):
        members = groups[first : first + each]
        tiles = np.concatenate([group.tiles for group in members])
        pixels = np.empty((len(tiles), side, side, 3), np.uint8)
        errors: list[str | None] = []
        for group in members:
            done = len(errors)
            errors += reader.read(group, pixels[done : done + len(group.tiles)])[1]
        yield with_text_errors(BlockAccessor.batch_to_block(_columns(plan, key, numbers, tiles, pixels, errors)))


def apply_tiles(plan: TilePlan, key: str, numbers: NDArray[np.int64], apply: Apply) -> Iterator[Block]:
    """What a function gives for a plan's tiles, group by group, in blocks of about `BLOCK_BYTES`."""
    reader, groups = TileReader(plan), group_tiles(plan)
    side = plan.spec.tile_px
    pixels = np.empty((max((len(group.tiles) for group in groups), default=0), side, side, 3), np.uint8)
    found: list[Batch] = []
    size = 0
    for group in groups:
        own, errors = reader.read(group, pixels[: len(group.tiles)])
        given = apply(_columns(plan, key, numbers, group.tiles, own, list(errors)))
        found.append({name: np.array(column) for name, column in given.items()})
        size += sum(column.nbytes for column in found[-1].values())
        if size > BLOCK_BYTES:
            yield _joined(found)
            found, size = [], 0
    if found:
        yield _joined(found)


def _joined(batches: list[Batch]) -> Block:
    if any(batch.keys() != batches[0].keys() for batch in batches):
        raise ValueError(f"columns differ: {sorted({str(sorted(batch)) for batch in batches})}")
    for name in batches[0]:
        kinds = {batch[name].dtype for batch in batches}
        if len(kinds) > 1 and any(kind.kind in "biufc" for kind in kinds):
            # NumPy would make one of them: of uint64 and int64 a float64, which holds neither.
            raise ValueError(f"column {name} is of the types {', '.join(sorted(map(str, kinds)))}: return one of them")
    columns = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    return with_text_errors(BlockAccessor.batch_to_block(columns))


def _columns(
    plan: TilePlan,
    key: str,
    numbers: NDArray[np.int64],
    tiles: NDArray[np.int64],
    pixels: NDArray[np.uint8],
    errors: list[str | None],
) -> dict[str, Any]:
    corner, valid = plan.corner_px[tiles], plan.valid_px[tiles]
    return {
        "plan": np.full(len(tiles), key, object),
        "slide": np.full(len(tiles), plan.path, object),
        "tile": numbers[tiles],
        "row_px": corner[:, 0],
        "col_px": corner[:, 1],
        "y_um": corner[:, 0] * plan.spec.mpp_um,
        "x_um": corner[:, 1] * plan.spec.mpp_um,
        "tissue": plan.tissue[tiles],
        "valid_h": valid[:, 0],
        "valid_w": valid[:, 1],
        "error": np.array(errors, object),
        "pixels": pixels,
    }
