"""The command ``deepfere``: thin; every command calls the library."""

# Each adds its commands; `submit` makes its own from those that are there.
from deepfere.cli import fuse, look, models, results, stages  # noqa: F401, I001
from deepfere.cli import stop, submit  # noqa: F401
from deepfere.cli.root import main

__all__ = ["main"]
