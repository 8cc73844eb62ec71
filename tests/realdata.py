"""The real data that some tests use; they skip with a clear reason where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("DEEPFERE_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real_data(*parts: str) -> Path:
    """Path of a real file, or skip the calling test."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not found: {path} (set DEEPFERE_REAL_DATA)")
    return path
