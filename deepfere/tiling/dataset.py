"""Ray Data adapter of the patches: rows in, fixed-shape tensors out."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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


def blocks_of(rows: dict[str, NDArray[Any]], batch: int, workers: int, parts: int) -> list[Any]:
    """The rows as Arrow tables, to be dealt out in turn: each holds what one worker takes in one step, or in several.

    Where a step cannot be dealt evenly, its last patch comes again and does not count (``share``); those that count
    do so for more, as the mean is taken over all of them.

    Args:
        rows: Columns (n,) of whole steps, from `deepfere.tiling.patches.draw`.
        batch: Rows of a step.
        workers: Who they are dealt to.
        parts: In which each of them takes its rows of a step.
    """
    import pyarrow as pa

    steps, each = len(rows["step"]) // batch, parts * rows_at_once(batch, workers, parts)
    width = workers * each
    share = np.where(np.arange(width) < batch, width / batch, 0).astype(np.float32)
    together = max(1, -(-steps * workers // MOST_BLOCKS))
    blocks = []
    for first in range(0, steps, together):
        some = np.arange(first, min(first + together, steps))
        for worker in range(workers):
            own = np.arange(worker * each, (worker + 1) * each)
            at = (some[:, None] * batch + np.minimum(own, batch - 1)).ravel()
            columns = {name: values[at] for name, values in rows.items()}
            blocks.append(pa.table({**columns, "share": np.tile(share[own], len(some))}))
    return blocks


def rows_at_once(batch: int, workers: int, parts: int) -> int:
    """Rows that one worker takes at a time."""
    return -(-batch // (workers * parts))


def patch_dataset(
    rows: dict[str, NDArray[Any]],
    sources: list[PatchSource],
    patch_px: int,
    shape_px: tuple[int, int],
    batch: int,
    workers: int,
    parts: int = 1,
) -> Any:
    """A Ray Dataset of patches, step by step, to be dealt out in turn.

    Args:
        rows: From `deepfere.tiling.patches.draw`.
        sources: The sections.
        patch_px: Patch side in measured pixels.
        shape_px: Fixed plane window, from `deepfere.tiling.patches.plane_shape`.
        batch: Rows of a step.
        workers: Training workers: as many loaders serve them at most.
        parts: In which each of them takes its rows of a step.
    """
    import ray

    # Not `from_arrow`: it asks a task of Ray's what is in them, for which there is no CPU where training has them all.
    patches = ray.data.from_blocks(blocks_of(rows, batch, workers, parts)).map_batches(
        LoadPatches,
        fn_constructor_args=([asdict(s) for s in sources], patch_px, shape_px),
        batch_size=rows_at_once(batch, workers, parts),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        # They ask for no CPU: where training has taken them all, its own input would wait for ever.
        num_cpus=0,
    )
    # A new list: the one that is there may be that of all datasets of this process.
    patches.context.custom_execution_callback_classes = [_rest()]
    return patches
