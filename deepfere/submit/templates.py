"""The files of ``cluster/`` that jobs are rendered from."""

from __future__ import annotations

from pathlib import Path

import deepfere


def template(name: str) -> str:
    """Text of a file of ``cluster/``: of the installed package, or of the checkout that it runs from."""
    package = Path(deepfere.__file__).resolve().parent
    folders = (package / "templates", package.parent / "cluster")
    return next(folder / name for folder in folders if (folder / name).is_file()).read_text()
