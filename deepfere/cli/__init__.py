"""The command ``deepfere``: thin; every command calls the library."""

from deepfere.cli import fuse, look, results, stages  # noqa: F401 - each adds its commands
from deepfere.cli.root import main

__all__ = ["main"]
