"""From files to results: the stages in order, each resumable."""

from deepfere.pipeline.fuse import fuse

__all__ = ["fuse"]
