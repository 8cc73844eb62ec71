"""A large slide for the tiling benchmark: real-looking JPEG tiles (4:2:0, quality 80) in an arrangement without order.

    python benchmarks/tiling_slide.py OUT.tif --side 20480 [--tiles SLIDE] [--levels]

The different tiles, all of tissue, are cut from SLIDE, or painted by `deepfere.phantom`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from deepfere.readers.slide import open_slide

TILE = 256
MPP_UM = 0.5
QUALITY = 80
MOST = 256


def different_tiles(source: str | None) -> list[NDArray[np.uint8]]:
    """Up to 256 tiles of 256 px of a slide, or of a painted one."""
    if source is None:
        from deepfere.phantom import PhantomSpec, write_phantom

        with tempfile.TemporaryDirectory() as name:
            spec = PhantomSpec(shape_px=(24, 24), slide_mpp_um=MPP_UM, factor=4, seed=11)
            write_phantom(Path(name) / "section", spec)
            return _cut(Path(name) / "section" / "slide.tiff")
    return _cut(Path(source))


def _cut(path: Path) -> list[NDArray[np.uint8]]:
    slide = open_slide(path)
    h, w = slide.shape_px
    places = [(r, c) for r in range(0, h - TILE + 1, TILE) for c in range(0, w - TILE + 1, TILE)]
    tiles = [slide.read(0, *place, TILE, TILE) for place in places]
    # Tissue, with its borders: glass is not read by a job that looks for tissue first.
    tissue = [tile for tile in tiles if tile.std() > 12]
    return [tissue[k] for k in np.random.default_rng(0).permutation(len(tissue))[:MOST]]


def encoded(tile: NDArray[np.uint8]) -> bytes:
    """One JPEG tile as scanners write it."""
    return imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=QUALITY, subsampling="420")


def write_slide(path: Path, tiles: list[NDArray[np.uint8]], side_px: int, levels: bool) -> None:
    """A square slide; with ``levels``, also its 4 and 16 times smaller ones."""
    across = side_px // TILE
    which = np.random.default_rng(1).integers(0, len(tiles), (across, across))
    jpegs = [encoded(tile) for tile in tiles]
    small = [t.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3)).astype(np.uint8) for t in tiles]

    def reduced() -> NDArray[np.uint8]:
        image = np.stack(small)[which]
        return np.ascontiguousarray(image.transpose(0, 2, 1, 3, 4)).reshape(across * 64, across * 64, 3)

    images = [reduced()] if levels else []
    if levels:
        images.append(np.ascontiguousarray(images[0][2::4, 2::4]))
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for k in range(1 + len(images)):
            image = images[k - 1] if k else None
            data: Iterator[bytes] = (jpegs[n] for n in which.ravel()) if image is None else _tiles_of(image)
            tif.write(
                data,
                shape=(side_px, side_px, 3) if image is None else image.shape,
                dtype=np.uint8,
                photometric="rgb",
                tile=(TILE, TILE),
                compression="jpeg",
                subsampling=(2, 2),
                subfiletype=1 if k else 0,
                resolution=(1e4 / (MPP_UM * 4**k), 1e4 / (MPP_UM * 4**k)),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def _tiles_of(image: NDArray[np.uint8]) -> Iterator[bytes]:
    h, w = image.shape[:2]
    full = np.pad(image, ((0, -h % TILE), (0, -w % TILE), (0, 0)), mode="edge")
    for r in range(0, h, TILE):
        for c in range(0, w, TILE):
            yield encoded(full[r : r + TILE, c : c + TILE])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=20480)
    parser.add_argument("--tiles", metavar="SLIDE")
    parser.add_argument("--levels", action="store_true")
    given = parser.parse_args()
    write_slide(given.out, different_tiles(given.tiles), given.side, given.levels)
