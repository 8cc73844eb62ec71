"""Ray Data adapter of the patches: rows in, fixed-shape tensors out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.model.features import PLANES

if TYPE_CHECKING:
    from deepfere.tiling.patches import PatchSource

MOST_BLOCKS = 16384
"""Of a longer training several steps share a block."""


SHORTEST_REST_S, LONGEST_REST_S = 0.04, 0.32
"""Between two steps of Ray Data's executor. While its output is not wanted yet it finds finished tasks whose results it
may not take, so it does not wait for any and turns in a loop, on a core that training could use. A step takes it
milliseconds even so: it rests twice as long each time in which nothing has moved."""


@lru_cache(maxsize=1)
def _rest() -> Any:
    """What has Ray Data's executor rest between steps. In one step it deals with all that is there, however much."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Rest(ExecutionCallback):
        def __init__(self) -> None:
            self._seen: Any = None
            self._rest_s = SHORTEST_REST_S

        def on_execution_step(self, executor: Any) -> None:
            _, output = executor._output_node
            seen = output.num_completed_tasks, len(output.output_queue)
            still = seen == self._seen
            self._seen, self._rest_s = seen, min(2 * self._rest_s, LONGEST_REST_S) if still else SHORTEST_REST_S
            time.sleep(self._rest_s)

    return Rest


def bytes_of_patch(patch_px: int, shape_px: tuple[int, int], features: int, factors: int) -> int:
    """Of a loaded patch, but for a few numbers."""
    return shape_px[0] * shape_px[1] * len(PLANES) + 4 * patch_px**2 * (features + factors + 1)


class LoadPatches:
    """Callable of ``map_batches``: reads the patches of a batch of rows from the caches."""

    def __init__(self, sources: list[dict[str, Any]], patch_px: int, shape_px: tuple[int, int]) -> None:
        # Ray Data's other processes see this class, too, and need none of what it reads with.
        from deepfere.readers.kept_tiles import KeptTiles
        from deepfere.tiling.patches import KEPT_BYTES, MIXED_GROUPS, PatchReader, PatchSource

        kept = KeptTiles(KEPT_BYTES)
        # Patches come from a few sections at a time (`deepfere.tiling.patches.order_of`).
        self._reader = lru_cache(maxsize=2 * MIXED_GROUPS)(
            lambda n: PatchReader(PatchSource(**sources[n]), patch_px, kept, n)
        )
        self._shape = shape_px

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of `draw` or `blocks_of` -> the batch of `JointModel.forward`, plus ``step``."""
        rows = range(len(batch["step"]))
        loaded = [self._reader(int(batch["section"][n])).load(int(batch["patch"][n]), self._shape) for n in rows]
        out = {name: np.stack([patch[name] for patch in loaded]) for name in loaded[0]}
        out["section"] = np.asarray(batch["section"], np.int64)
        out["step"] = np.asarray(batch["step"], np.int64)
        out["share"] = np.asarray(batch.get("share", np.ones(len(rows))), np.float32)
        out["flip"] = np.stack([batch["flip_y"], batch["flip_x"]], axis=1).astype(np.int64)
        return out


@dataclass(frozen=True)
class Dealing:
    """How the patches of a step are dealt to a group of workers.

    In ``parts`` turns each worker takes ``rows``, one worker after the other. Where that is more than a step has, its
    last patch comes again and does not count, and those that count do so for more: the mean is taken over all.

    Attributes:
        batch: Patches of a step.
        workers: Of the group.
        rows: That a worker takes at a time.
        parts: Of which its share of a step consists.
    """

    batch: int
    workers: int
    rows: int
    parts: int

    @classmethod
    def of(cls, batch: int, workers: int, most: int) -> Dealing:
        """Among so many workers, of which none takes more than ``most`` at a time: a smaller group, more turns."""
        parts = -(-batch // (workers * most))
        return cls(batch, workers, -(-batch // (workers * parts)), parts)

    @property
    def width(self) -> int:
        """Rows of a step, with those that do not count."""
        return self.workers * self.parts * self.rows

    def shares(self) -> NDArray[np.float32]:
        """By how much each row of a step counts (width,)."""
        return np.where(np.arange(self.width) < self.batch, self.width / self.batch, 0).astype(np.float32)


def blocks_of(rows: dict[str, NDArray[Any]], dealing: Dealing) -> list[Any]:
    """The rows as Arrow tables, each of whole steps or of one turn of one worker.

    Args:
        rows: Columns (n,) of whole steps, from `deepfere.tiling.patches.draw`.
        dealing: How they are dealt.
    """
    import pyarrow as pa

    steps, width = len(rows["step"]) // dealing.batch, dealing.width
    turns = width // dealing.rows
    if steps * turns <= MOST_BLOCKS:
        each, pieces = 1, turns
    else:
        each, pieces = -(-steps // MOST_BLOCKS), 1
    of_step, share = np.minimum(np.arange(width), dealing.batch - 1), dealing.shares()
    blocks = []
    for first in range(0, steps, each):
        some = np.arange(first, min(first + each, steps))
        at = (some[:, None] * dealing.batch + of_step).ravel()
        columns = {**{name: values[at] for name, values in rows.items()}, "share": np.tile(share, len(some))}
        dealt = np.split(np.arange(len(at)), pieces)
        blocks += [pa.table({name: values[piece] for name, values in columns.items()}) for piece in dealt]
    return blocks


def patch_dataset(
    rows: dict[str, NDArray[Any]],
    sources: list[PatchSource],
    patch_px: int,
    shape_px: tuple[int, int],
    dealing: Dealing,
    patch_bytes: int,
) -> Any:
    """A Ray Dataset of patches, step by step: its blocks dealt out in turn, every worker gets its share of each step.

    Args:
        rows: From `deepfere.tiling.patches.draw`.
        sources: The sections.
        patch_px: Patch side in measured pixels.
        shape_px: Fixed plane window, from `deepfere.tiling.patches.plane_shape`.
        dealing: How they are dealt: there are as many loaders as workers at most.
        patch_bytes: Of a loaded patch (`bytes_of_patch`).
    """
    import ray

    # Not `from_arrow`: it asks a task of Ray's what is in them, for which there is no CPU where training has them all.
    patches = ray.data.from_blocks(blocks_of(rows, dealing)).map_batches(
        LoadPatches,
        fn_constructor_args=([asdict(s) for s in sources], patch_px, shape_px),
        batch_size=dealing.rows,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=dealing.workers),
        # They ask for no CPU: where training has taken them all, its own input would wait for ever.
        num_cpus=0,
    )
    # What is loaded for a turn is a block, and goes to the next worker as it is: Ray joins blocks that are smaller than
    # this, and cuts those that are half as large again.
    patches.context.target_max_block_size = max(1, int(0.8 * dealing.rows * patch_bytes))
    # A new list: the one that is there may be that of all datasets of this process.
    patches.context.custom_execution_callback_classes = [_rest()]
    return patches
