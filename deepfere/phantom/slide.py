"""Paints the slide tile by tile and writes it as a pyramidal tiled JPEG TIFF that OpenSlide opens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepfere.frame import Alignment, SectionGrid
from deepfere.phantom.noise import Floats, fractal_noise, gradient_noise, hash_lattice, ramp, salt_of, spread, uniform
from deepfere.phantom.spec import PhantomSpec
from deepfere.phantom.tissue import Nuclei, Tissue

TILE = 256
_SHRINK = 4  # from one pyramid level to the next, as slide scanners do

# Optical density (R, G, B) of one unit of stain. Haematoxylin: A. C. Ruifrok, D. A. Johnston, Anal. Quant.
# Cytol. Histol. 23 (2001) 291. Eosin: the reference of M. Macenko et al., ISBI 2009; Ruifrok's eosin
# (0.07, 0.99, 0.11) paints a magenta that no scanner shows.
STAIN_VECTORS = np.array([[0.650, 0.704, 0.286], [0.2159, 0.8012, 0.5581]], np.float32)
_WHITE = np.array([243.0, 242.0, 244.0], np.float32)

Progress = Callable[[int, int], None]


class SlidePainter:
    """Any tile of the slide, each a pure function of its place.

    Args:
        tissue: What to paint, in the section frame.
        alignment: Section micrometres to slide micrometres.
        shape_px: Rows and columns of the slide.
        spec: The phantom's spec (size of a pixel, noise).
    """

    def __init__(self, tissue: Tissue, alignment: Alignment, shape_px: tuple[int, int], spec: PhantomSpec) -> None:
        self.tissue = tissue
        self.alignment = alignment
        self.shape_px = shape_px
        self.mpp_um = spec.slide_mpp_um
        self.spec = spec
        self._inverse = np.linalg.inv(alignment.matrix)
        # Section coordinates are computed on nodes and interpolated linearly: the bend turns over a
        # third of the section, so nodes a 64th apart are exact to some thousandths of the bend.
        nodes_um = min(32.0, float(np.mean(tissue.organ.extent_um)) / 64)
        step = 2 ** int(np.floor(np.log2(max(nodes_um / self.mpp_um, 1.0))))
        self._step = min(step, TILE)
        # Where the section can lie on the slide, with room for what bends between the points looked at.
        section = SectionGrid((25, 25), (tissue.organ.extent_um[0] / 25, tissue.organ.extent_um[1] / 25))
        mapped = alignment.map(section.centres_um()).reshape(-1, 2)
        room = 0.05 * np.asarray(tissue.organ.extent_um).max()
        self._reach_um = mapped.min(axis=0) - room, mapped.max(axis=0) + room

    def _salt(self, name: str) -> int:
        return salt_of(self.spec.seed, name)

    def section_um(self, row: int, col: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Section coordinates (y, x) of the pixel centres of the tile at (row, col), micrometres."""
        edge = np.arange(TILE // self._step + 1) * self._step
        slide = np.stack(np.meshgrid(row + edge, col + edge, indexing="ij"), axis=-1) * self.mpp_um
        section = self.alignment.unmap(slide, iterations=8)
        y, x = (spread(spread(section[..., k], self._step, TILE, 0.5).T, self._step, TILE, 0.5).T for k in (0, 1))
        return y, x

    def tile(self, row: int, col: int) -> NDArray[np.uint8]:
        """The (256, 256, 3) tile whose first pixel is (row, col)."""
        rows = (row + 0.5 + np.arange(TILE)) * self.mpp_um
        cols = (col + 0.5 + np.arange(TILE)) * self.mpp_um
        slide_y, slide_x = np.meshgrid(rows, cols, indexing="ij")
        light = _WHITE * self._lamp(slide_y, slide_x)[..., None]
        amounts = self._amounts(row, col)
        if amounts is not None:
            density = np.zeros((TILE, TILE, 3), np.float32)
            for amount, vector, name in zip(amounts, STAIN_VECTORS, ("haematoxylin", "eosin"), strict=True):
                slow = fractal_noise(slide_y, slide_x, 420.0, self._salt(f"stain-{name}"), octaves=3)
                amount = amount * np.exp(np.float32(self.spec.stain_noise) * slow)
                density += amount[..., None] * vector
            light = light * np.exp(density * np.float32(-np.log(10)))
        light = light + self._sensor(row, col)
        return np.clip(light + 0.5, 0, 255).astype(np.uint8)

    def _amounts(self, row: int, col: int) -> tuple[Floats, Floats] | None:
        """Haematoxylin and eosin on one tile, nuclei included; None where there is no tissue."""
        first = np.array([row, col]) * self.mpp_um
        low_um, high_um = self._reach_um
        if (first > high_um).any() or (first + TILE * self.mpp_um < low_um).any():
            return None
        y, x = self.section_um(row, col)
        if not self._near_tissue(y, x):
            return None
        haematoxylin, eosin = self.tissue.stain(y, x, detail_um=self.mpp_um)
        low = float(y.min()) - 8, float(x.min()) - 8
        high = float(y.max()) + 8, float(x.max()) + 8
        nuclear, cover = self._stamp(self.tissue.nuclei(low, high), row, col)
        chromatin = gradient_noise(y, x, max(0.9, 2 * self.mpp_um), self._salt("chromatin"))
        haematoxylin = haematoxylin * (1 - cover) + nuclear * (1 + 0.16 * chromatin)
        return haematoxylin, eosin * (1 - 0.45 * cover)

    def _near_tissue(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> bool:
        """Whether a tile can hold tissue: a sparse look, with a margin wider than its gaps."""
        sparse = (slice(None, None, 17), slice(None, None, 17))
        depth = self.tissue.organ.depth_um(y[sparse], x[sparse])
        return bool(depth.max() > -40.0 * max(1.0, self.mpp_um))

    def _stamp(self, nuclei: Nuclei, row: int, col: int) -> tuple[Floats, Floats]:
        """Haematoxylin of the nuclei on one tile, and how much of each pixel they cover."""
        nuclear = np.zeros((TILE, TILE), np.float32)
        cover = np.zeros((TILE, TILE), np.float32)
        if len(nuclei.name) == 0:
            return nuclear, cover
        centre = self.alignment.map(nuclei.centres_um) / self.mpp_um - (row + 0.5, col + 0.5)
        reach = int(np.ceil(7.0 * np.linalg.norm(self.alignment.matrix, 2) / self.mpp_um)) + 1
        near = ((centre > -reach) & (centre < TILE + reach)).all(axis=1)
        centre = centre[near]
        base = np.floor(centre).astype(np.int64)
        window = np.arange(-reach, reach + 1)
        # Offsets from each centre in section micrometres: ellipses keep their shape under the alignment.
        dy = ((base[:, :1] + window) - centre[:, :1])[:, :, None] * self.mpp_um
        dx = ((base[:, 1:] + window) - centre[:, 1:])[:, None, :] * self.mpp_um
        m = self._inverse
        sy, sx = (m[0, 0] * dy + m[0, 1] * dx), (m[1, 0] * dy + m[1, 1] * dx)
        sy, sx = sy.astype(np.float32), sx.astype(np.float32)
        cos, sin = (f(nuclei.angle[near])[:, None, None] for f in (np.cos, np.sin))
        long, short = (nuclei.axes_um[near, k][:, None, None] for k in (0, 1))
        u, v = (sx * cos + sy * sin) / long, (sy * cos - sx * sin) / short
        # A dent on one side makes a bean of some of them.
        dent = 0.30 * uniform(nuclei.name[near], 20)[:, None, None]
        radius = np.sqrt(u * u + (v + dent * (u * u - 0.3)) ** 2)
        soft = max(0.35, 0.6 * self.mpp_um)
        inside = np.clip((1 - radius) * short / np.float32(soft) + 0.5, 0, 1)
        # Chromatin lies along the membrane; the middle is a little lighter.
        amount = inside * nuclei.darkness[near][:, None, None] * (0.80 + 0.22 * np.minimum(radius, 1) ** 2)
        rows, cols = base[:, :1] + window, base[:, 1:] + window
        valid = ((rows >= 0) & (rows < TILE))[:, :, None] & ((cols >= 0) & (cols < TILE))[:, None, :]
        valid &= inside > 0
        index = (rows[:, :, None] * TILE + cols[:, None, :])[valid]
        np.maximum.at(nuclear.ravel(), index, amount[valid])
        np.maximum.at(cover.ravel(), index, inside[valid])
        return nuclear, cover

    def _lamp(self, slide_y: NDArray[np.float64], slide_x: NDArray[np.float64]) -> Floats:
        """Uneven light and a few specks of dust, which lie on the glass and not on the tissue."""
        shade = 1 + np.float32(0.006) * fractal_noise(
            slide_y, slide_x, 0.5 * max(self.shape_px) * self.mpp_um, self._salt("lamp")
        )
        cell = 700.0
        row, col = np.floor(slide_y / cell).astype(np.int64), np.floor(slide_x / cell).astype(np.int64)
        name = hash_lattice(row, col, self._salt("dust"))
        dy = slide_y - (row + 0.2 + 0.6 * uniform(name, 1)) * cell
        dx = slide_x - (col + 0.2 + 0.6 * uniform(name, 2)) * cell
        size = np.where(uniform(name, 3) < 0.12, 2.0 + 5.0 * uniform(name, 4), np.float32(0.1))
        away = np.hypot(dy, 1.6 * dx) / size
        near = away < 3
        ragged = 1 + 0.3 * gradient_noise(slide_y[near], slide_x[near], 4.0, self._salt("dust-edge"))
        shade[near] *= 1 - 0.45 * (1 - ramp(away[near] / np.maximum(ragged, 0.3), 0.6, 1.0))
        return shade

    def _sensor(self, row: int, col: int) -> Floats:
        """The camera's noise (triangular), from each pixel's own number."""
        rows, cols = np.meshgrid(row + np.arange(TILE), col + np.arange(TILE), indexing="ij")
        planes = []
        for channel in range(3):
            h = hash_lattice(rows, cols, self._salt(f"sensor-{channel}"))
            pair = (h & np.uint32(0xFFFF)).astype(np.float32) + (h >> np.uint32(16)).astype(np.float32)
            planes.append(pair * np.float32(2.0**-16) - np.float32(1))
        return np.float32(self.spec.sensor_noise) * np.stack(planes, axis=-1)


def level_shapes(shape_px: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of each pyramid level; a level's pixel covers exactly 4 x 4 of the one below."""
    shapes = [shape_px]
    while max(shapes[-1]) > TILE and min(shapes[-1]) >= 2 * _SHRINK:
        shapes.append((shapes[-1][0] // _SHRINK, shapes[-1][1] // _SHRINK))
    return shapes


def write_slide(path: Path, painter: SlidePainter, progress: Progress | None = None) -> None:
    """Write the slide with flat memory: each level leaves the next in a temporary file on disk."""
    import tifffile

    shapes = level_shapes(painter.shape_px)
    per_cm = 1e4 / painter.mpp_um
    # Three bytes a pixel before JPEG: a safe bound for what the classic format can hold.
    big = painter.shape_px[0] * painter.shape_px[1] * 3 > 2**31
    with tempfile.TemporaryDirectory(dir=path.parent) as spool, tifffile.TiffWriter(path, bigtiff=big) as tif:
        for level, shape in enumerate(shapes):
            here, above = (Path(spool) / f"level-{k}.raw" for k in (level, level + 1))
            tiles = _painted(painter, progress) if level == 0 else _cut(here, shape)
            top = level + 1 == len(shapes)
            scale = _SHRINK**level
            tif.write(
                (tile for _, _, tile in tiles) if top else _spooled(tiles, above, shape, shapes[level + 1]),
                shape=(*shape, 3),
                dtype=np.uint8,
                photometric="rgb",  # of what is given; the tiles are stored as YCbCr with 4:2:0
                tile=(TILE, TILE),
                compression="jpeg",
                compressionargs={"level": painter.spec.jpeg_quality},
                subsampling=(2, 2),
                subfiletype=0 if level == 0 else 1,
                resolution=(per_cm / scale, per_cm / scale),
                resolutionunit="CENTIMETER",
                description=f"deepfere phantom seed={painter.spec.seed}" if level == 0 else None,
                software="deepfere",
                metadata=None,
                maxworkers=1,
            )


Tiles = Iterator[tuple[int, int, NDArray[np.uint8]]]


def _painted(painter: SlidePainter, progress: Progress | None) -> Tiles:
    """Level 0, tile by tile, row after row."""
    height, width = painter.shape_px
    total = -(-height // TILE)
    for done, row in enumerate(range(0, height, TILE)):
        for col in range(0, width, TILE):
            tile = painter.tile(row, col)
            # Told before the tile is handed over: nobody asks for more after the last one.
            if progress is not None and col + TILE >= width:
                progress(done + 1, total)
            yield row, col, tile


def _cut(file: Path, shape_px: tuple[int, int]) -> Tiles:
    """Tiles of a raw image file, the last ones filled up with white; one row of tiles in memory."""
    height, width = shape_px
    with file.open("rb") as handle:
        for row in range(0, height, TILE):
            rows = min(TILE, height - row)
            band = np.full((TILE, -(-width // TILE) * TILE, 3), 243, np.uint8)
            band[:rows, :width] = np.frombuffer(handle.read(rows * width * 3), np.uint8).reshape(rows, width, 3)
            for col in range(0, width, TILE):
                yield row, col, np.ascontiguousarray(band[:, col : col + TILE])


def _spooled(
    tiles: Tiles, file: Path, shape_px: tuple[int, int], above_px: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    """Pass tiles on, appending their 4 x 4 averages, the level above, to a raw file row by row."""
    small = TILE // _SHRINK
    band = np.empty((small, -(-shape_px[1] // TILE) * small, 3), np.uint8)
    with file.open("wb") as handle:
        for row, col, tile in tiles:
            blocks = tile.reshape(small, _SHRINK, small, _SHRINK, 3).astype(np.uint16)
            mean = (blocks.sum(axis=(1, 3)) + _SHRINK**2 // 2) // _SHRINK**2
            band[:, col // _SHRINK : col // _SHRINK + small] = mean
            # Written before the tile is handed over: nobody asks for more after the last one.
            if col + TILE >= shape_px[1]:
                rows = max(0, min(small, above_px[0] - row // _SHRINK))
                handle.write(band[:rows, : above_px[1]].tobytes())
                handle.flush()
            yield tile
