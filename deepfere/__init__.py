"""deepfere: registers and fuses stained slides with mass spectrometry images, at high resolution."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "fuse": "deepfere.pipeline",
    "open": "deepfere.reconstruction.result",
    "open_measured": "deepfere.measured.raw",
    "open_slide": "deepfere.readers.slide",
    "TileSpec": "deepfere.tiling.tiles",
    "TilePlan": "deepfere.tiling.tiles",
    "plan_tiles": "deepfere.tiling.tiles",
    "tile_dataset": "deepfere.tiling.tile_source",
    "tiles_done": "deepfere.tiling.tile_files",
    "write_tiles": "deepfere.tiling.tile_sink",
    "Result": "deepfere.reconstruction.result",
    "Alignment": "deepfere.frame",
    "DeepfereError": "deepfere.errors",
    "InputError": "deepfere.errors",
}

if TYPE_CHECKING:
    from deepfere.errors import DeepfereError as DeepfereError
    from deepfere.errors import InputError as InputError
    from deepfere.frame import Alignment as Alignment
    from deepfere.measured.raw import open_measured as open_measured
    from deepfere.pipeline import fuse as fuse
    from deepfere.readers.slide import open_slide as open_slide
    from deepfere.reconstruction.result import Result as Result
    from deepfere.reconstruction.result import open as open
    from deepfere.tiling.tile_files import tiles_done as tiles_done
    from deepfere.tiling.tile_sink import write_tiles as write_tiles
    from deepfere.tiling.tile_source import tile_dataset as tile_dataset
    from deepfere.tiling.tiles import TilePlan as TilePlan
    from deepfere.tiling.tiles import TileSpec as TileSpec
    from deepfere.tiling.tiles import plan_tiles as plan_tiles

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: ``import deepfere`` stays light."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'deepfere' has no attribute {name!r}")
