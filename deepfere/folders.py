"""Folders of the user's own, by the XDG base directory specification."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """``deepfere`` in ``XDG_DATA_HOME`` (by default ``~/.local/share``); it need not exist."""
    return _base("XDG_DATA_HOME", Path(".local") / "share") / "deepfere"


def cache_folder() -> Path:
    """``deepfere`` in ``XDG_CACHE_HOME`` (by default ``~/.cache``); it need not exist."""
    return _base("XDG_CACHE_HOME", Path(".cache")) / "deepfere"


def _base(variable: str, default: Path) -> Path:
    given = os.environ.get(variable, "").strip()
    # The specification says to ignore a relative path there.
    return Path(given) if given and Path(given).is_absolute() else Path.home() / default
