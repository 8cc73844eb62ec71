"""What each worker of Ray Train's gets of a training's patches, however many of them there are."""

from __future__ import annotations

from typing import Any

from ray.train import DataConfig

from deepfere.cluster import quiet_ray_data
from deepfere.tiling.dataset import patch_dataset
from deepfere.tiling.patches import PatchSource


class Deal(DataConfig):
    """Deals the rows of a training to a group of workers, when it is known how many these are.

    Ray Train calls it anew for each group: after a host was lost or came there are fewer or more of them. Which worker
    gets which patch must not depend on the hosts they are on.

    Args:
        sources: The sections.
        patch_px: Patch side in measured pixels.
        shape_px: Fixed plane window.
        batch: Patches of a step.
        parts: In which each worker takes its own of them.
    """

    def __init__(
        self, sources: list[PatchSource], patch_px: int, shape_px: tuple[int, int], batch: int, parts: int
    ) -> None:
        super().__init__(enable_shard_locality=False)
        self._about = sources, patch_px, shape_px, batch
        self._parts = parts

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **more: Any) -> list[dict[str, Any]]:
        """Iterators for each worker; ``datasets`` are rows (`deepfere.tiling.patches.draw`)."""
        quiet_ray_data()  # in the process that calls it, which is one of Ray Train's
        made = {name: patch_dataset(rows, *self._about, world_size, self._parts) for name, rows in datasets.items()}
        dealt: list[dict[str, Any]] = super().configure(made, world_size, None, None)
        return dealt
