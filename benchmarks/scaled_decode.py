"""Whether decoding JPEG at a half or a quarter pays: ``python benchmarks/scaled_decode.py [--tiles SLIDE]``.

libjpeg-turbo can decode a stream at 1/2, 1/4 or 1/8 of its size from fewer of its coefficients (Pillow offers it).
Where a slide has no level near the wanted pixel size, that could stand for decoding whole and averaging. Shown are its
speed against decoding whole, in the source's pixels, and how far its pixels are from the means of those decoded whole.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
from common import Row, finish, parser, table
from numpy.typing import NDArray
from PIL import Image
from tiling_slide import TILE, different_tiles, encoded

from deepfere.readers.jpeg import pixel_memory

ROUNDS = 7


def whole(data: bytes, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As the direct reader does it."""
    return imagecodecs.jpeg8_decode(data, colorspace="ycbcr", outcolorspace="rgb", out=out)


def scaled(data: bytes, by: int) -> NDArray[np.uint8]:
    """From the coefficients that are left at 1 / ``by`` of the size."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (TILE // by, TILE // by))
    return np.asarray(image)


def means(pixels: NDArray[np.uint8], by: int) -> NDArray[np.float32]:
    """Over ``by`` x ``by`` pixels."""
    return pixels.reshape(TILE // by, by, TILE // by, by, 3).astype(np.float32).mean((1, 3))


def main() -> int:
    """Speeds and differences, for a decision: nothing here is a must."""
    options = parser(__doc__.splitlines()[0], [])
    options.add_argument("--tiles", metavar="SLIDE", help="cut the tiles from a slide, not from a painted one")
    given = options.parse_args()
    streams = [encoded(tile) for tile in different_tiles(given.tiles)]
    buffer = pixel_memory(TILE, TILE)
    arms: dict[str, Callable[[bytes], Any]] = {
        "whole, imagecodecs": lambda data: whole(data, buffer),
        "whole, Pillow": lambda data: scaled(data, 1),
        "1/2, Pillow": lambda data: scaled(data, 2),
        "1/4, Pillow": lambda data: scaled(data, 4),
    }
    best = dict.fromkeys(arms, np.inf)
    for _ in range(ROUNDS):
        for name, decode in arms.items():
            started = time.process_time()
            for data in streams:
                decode(data)
            best[name] = min(best[name], time.process_time() - started)
    pixels = len(streams) * TILE**2 / 1e6
    apart = {
        f"1/{by}, Pillow": np.stack([scaled(data, by) - means(whole(data, buffer), by) for data in streams])
        for by in (2, 4)
    }
    lines = [
        [
            name, f"{pixels / s:.0f}", f"{best['whole, imagecodecs'] / s:.2f}",
            *([f"{np.abs(apart[name]).mean():.2f}", f"{np.abs(apart[name]).max():.0f}"] if name in apart else ["", ""]),
        ]
        for name, s in best.items()
    ]  # fmt: skip
    head = ["decoded", "Mpx/s of the source", "times whole", "grey levels from the mean", "largest"]
    print(table(f"{len(streams)} tiles", head, lines))
    rows = [
        Row.of(f"{name}: grey levels from the mean", float(np.abs(values).mean())) for name, values in apart.items()
    ]
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
