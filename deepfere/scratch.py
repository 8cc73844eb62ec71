"""A temporary file for what is more than memory should hold; nobody sees it, and it is gone with its process."""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DeepfereError


class ScratchFile:
    """Values of one type, by their position; in the folder for temporary files (``TMPDIR``).

    Args:
        dtype: Of the values.

    Raises:
        DeepfereError: There is no such folder that can be written.
    """

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        try:
            self._file = tempfile.TemporaryFile(prefix="deepfere-")  # noqa: SIM115  # closed with its owner
        except OSError as error:
            raise DeepfereError(f"no temporary file can be made ({error.strerror or error}); set TMPDIR") from error

    def write(self, first: int, values: NDArray[Any]) -> None:
        """Write values (n,) from position ``first`` on.

        Raises:
            DeepfereError: There is no room.
        """
        try:
            self._file.seek(first * self._dtype.itemsize)
            self._file.write(np.ascontiguousarray(values, self._dtype).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DeepfereError(
                f"{tempfile.gettempdir()}: {os.strerror(error.errno)}; make room, or set TMPDIR to a folder with more"
            ) from error

    def read(self, first: int, count: int) -> NDArray[Any]:
        """The values (count,) from position ``first`` on."""
        out = np.empty(count, self._dtype)
        self._file.seek(first * self._dtype.itemsize)
        if self._file.readinto(out.view(np.uint8).data) != out.nbytes:
            raise ValueError(f"values {first} to {first + count} were never written")
        return out
