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
    """Values of one type, by their position; in the folder for temporary files (``TMPDIR``). Threads may share it.

    Args:
        dtype: Of the values.

    Raises:
        DeepfereError: There is no such folder that can be written.
    """

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        try:
            self._file = tempfile.TemporaryFile(prefix="deepfere-", buffering=0)  # noqa: SIM115  # as long as this lives
        except OSError as error:
            raise DeepfereError(f"no temporary file can be made ({error.strerror or error}); set TMPDIR") from error

    def write(self, first: int, values: NDArray[Any]) -> None:
        """Write values (n,) from position ``first`` on.

        Raises:
            DeepfereError: There is no room.
        """
        data = np.ascontiguousarray(values, self._dtype).view(np.uint8).data
        at = first * self._dtype.itemsize
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, at)
                data, at = data[written:], at + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DeepfereError(
                f"{tempfile.gettempdir()}: {os.strerror(error.errno)}; make room, or set TMPDIR to a folder with more"
            ) from error

    def read(self, first: int, count: int) -> NDArray[Any]:
        """The values (count,) from position ``first`` on.

        Raises:
            ValueError: They were never written.
        """
        out = np.empty(count, self._dtype)
        left, at = out.view(np.uint8).data, first * self._dtype.itemsize
        while left:
            got = os.preadv(self._file.fileno(), [left], at)
            if not got:
                raise ValueError(f"values {first} to {first + count} were never written")
            left, at = left[got:], at + got
        return out
