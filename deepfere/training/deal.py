"""What each worker of Ray Train's gets of a training's patches, however many of them there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray
from ray.train import DataConfig

from deepfere.cluster import quiet_ray_data
from deepfere.tiling.dataset import Dealing, bytes_of_patch, patch_dataset
from deepfere.tiling.patches import PatchSource
from deepfere.training.loop import LoopSettings


class Deal(DataConfig):
    """Deals the rows of a training to a group of workers, when it is known how many these are.

    Ray Train calls it anew for each group: after a host was lost or came there are fewer or more of them. Which worker
    gets which patch must not depend on the hosts they are on.

    Args:
        rows_after: Gives the rows of all steps but the first so many.
        sources: The sections.
        shape_px: Fixed plane window.
        settings: Of the loop.
        most: Patches that a worker takes at a time, at most.
    """

    def __init__(
        self,
        rows_after: Callable[[int], dict[str, NDArray[Any]]],
        sources: list[PatchSource],
        shape_px: tuple[int, int],
        settings: LoopSettings,
        most: int,
    ) -> None:
        super().__init__(enable_shard_locality=False)
        self._rows_after, self._batch, self._most = rows_after, settings.batch, most
        self._about = sources, settings.patch_px, shape_px
        network = settings.network
        self._bytes = bytes_of_patch(settings.patch_px, shape_px, network["features"], network["factors"])

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **more: Any) -> list[dict[str, Any]]:
        """Iterators for each worker; in the place of ``datasets`` there are numbers of steps that are done."""
        quiet_ray_data()  # in the process that calls it, which is one of Ray Train's
        dealing = Dealing.of(self._batch, world_size, self._most)
        made = {
            name: patch_dataset(self._rows_after(done), *self._about, dealing, self._bytes)
            for name, done in datasets.items()
        }
        dealt: list[dict[str, Any]] = super().configure(made, world_size, None, None)
        return dealt
