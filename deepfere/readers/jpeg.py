"""JPEG streams: memory that they are decoded into, and what is wrong with one, as far as its markers tell."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_STREAMED = 32
_MARKER = re.compile(rb"\xff[^\x00]")


def pixel_memory(height: int, width: int) -> NDArray[np.uint8]:
    """Memory (height, width, 3) for pixels that are used at once.

    Where rows lie on multiples of 32 bytes, libjpeg-turbo writes past the processor's cache, and copying the pixels
    on takes as long as decoding them: these rows lie beside such multiples.
    """
    raw = np.empty(height * width * 3 + 2 * _STREAMED, np.uint8)
    first = -raw.ctypes.data % _STREAMED + _STREAMED // 2
    return raw[first : first + height * width * 3].reshape(height, width, 3)


def jpeg_damage(data: bytes) -> str | None:
    """What is wrong with a JPEG stream that libjpeg would only warn of; None where nothing is.

    A baseline scan holds no marker but restarts, and an end marker follows it. What is overwritten or cut off
    breaks one of the two nearly always; a few changed bits need not.
    """
    position, restarts = 2, False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # progressive or the like: several scans
        if marker == 0xDD:
            restarts = True
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xDA:
            end, first = data.rfind(b"\xff\xd9"), _MARKER.search(data, position)
            if end < position:
                return "it is cut off"
            if first is not None and first.start() == end:
                return None  # as nearly always; what follows takes five times as long
            scan = np.frombuffer(data, np.uint8, end - position, position)
            after = scan[np.flatnonzero(scan[:-1] == 0xFF) + 1]
            strange = (after != 0) & ~((after >= 0xD0) & (after < 0xD8) & restarts)
            return "its data are overwritten" if strange.any() else None
    return None  # no scan: the decoder says why
