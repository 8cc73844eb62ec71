"""OME-Zarr slides (OME-NGFF 0.4 and 0.5): brightfield RGB as three uint8 channels, read chunk by chunk.

A slide is one multiscale image: the store itself, or the first image of a store in the bioformats2raw layout (the
others are labels and overviews; give ``STORE/1`` for another one). Positions come from the levels' sizes: what
writers state as translations differs too much to be relied on, and is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import DamagedPixels, InputError
from deepfere.readers.kept_tiles import KeptTiles
from deepfere.readers.slide import Backend, Icc, Level, open_slide, whole_downsample
from deepfere.readers.slide_mpp import trusted_mpp
from deepfere.readers.slide_native import NativeTile, Straight, read_native
from deepfere.remote import TRIES, answered, holds, is_passing, is_url

WHITE = np.array([255, 255, 255], dtype=np.uint8)
VERSIONS = ("0.4", "0.5")
# UDUNITS-2, as OME-NGFF asks for: micrometres per unit.
UNITS_UM = {
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "angstrom": 1e-4,
    "inch": 25400.0,
}
CACHE_BYTES = 64 << 20
SAMPLED_CHUNKS = 64
DARK, DARK_SHARE, LOOKED_AT = 64, 0.9, 16
FILES = ("zarr.json", ".zattrs", ".zgroup")
PICTURES = (".svs", ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".ndpi", ".scn", ".mrxs", ".bif", ".dcm", ".qptiff")
GIVE_RGB = "give the brightfield slide as three uint8 channels, red, green and blue"


class ZarrSlide:
    """A slide of Zarr arrays (thread-safe; opened again where it is unpickled).

    Args:
        path: Folder or URL.
        mpp_um: Micrometres per level-0 pixel (y, x).
        arrays: The pyramid, level 0 first.
        axes: Names of their axes; others than c, y and x have one element.
        version: Of OME-NGFF.
    """

    backend: Backend = "zarr"
    icc: Icc = "none"
    profile: bytes | None = None  # the format has no place for one

    def __init__(
        self, path: str, mpp_um: tuple[float, float], arrays: list[Any], axes: tuple[str, ...], version: str
    ) -> None:
        self.path, self.mpp_um, self.background = path, mpp_um, WHITE
        self.version, self._arrays, self._axes = version, arrays, axes
        y, x = axes.index("y"), axes.index("x")
        shapes = [(int(a.shape[y]), int(a.shape[x])) for a in arrays]
        self.shape_px = shapes[0]
        h0, w0 = self.shape_px
        self.levels = tuple(
            Level(
                (h, w),
                (whole_downsample(h0, h), whole_downsample(w0, w)),
                (min(int(a.chunks[y]), h), min(int(a.chunks[x]), w)),
            )
            for a, (h, w) in zip(arrays, shapes, strict=True)
        )
        self.stated: list[Any] = []
        """Scale and unit (y, x) as its metadata has them."""
        self.decoded = 0
        """Chunks decoded so far."""
        self._kept = KeptTiles(CACHE_BYTES, copy=True)

    def read(self, level: int, row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `deepfere.readers.slide.Slide.read`.

        Raises:
            InputError: A chunk is damaged, or the store does not answer.
        """
        return read_native(self, level, row, col, height, width)

    def native_tiles(
        self, level: int, first_row: int, first_col: int, use: NDArray[np.uint8], straight: Straight
    ) -> Iterator[NativeTile]:
        """See `deepfere.readers.slide_native.NativeTiles`: chunks."""
        for r, flags in enumerate(use, first_row):
            wanted = np.flatnonzero(flags)
            for c, tile in self._row(level, r, first_col + wanted).items():
                self._kept.used((level, r, c), tile, again=flags[c - first_col] > 1)
                yield r, c, tile

    def _row(self, level: int, r: int, cols: NDArray[np.int64]) -> dict[int, NDArray[np.uint8]]:
        """Some chunks of one row, by their columns; those that are not kept are asked for in runs, at once."""
        tw, wanted = self.levels[level].tile_px[1], cols.tolist()
        kept = zip(wanted, self._kept.find((level, r, c) for c in wanted), strict=True)
        found = {c: tile for c, tile in kept if tile is not None}
        absent = np.array([c for c in wanted if c not in found], np.int64)
        for run in np.split(absent, np.flatnonzero(np.diff(absent) > 1) + 1) if len(absent) else ():
            first, last = int(run[0]), int(run[-1]) + 1
            pixels = self._decode(level, r, first, last)
            found |= {c: pixels[:, (c - first) * tw : (c - first + 1) * tw] for c in range(first, last)}
        return found

    def _decode(self, level: int, r: int, first: int, last: int) -> NDArray[np.uint8]:
        """RGB of the chunks [first, last) of one row of them."""
        (h, w), (th, tw) = self.levels[level].shape_px, self.levels[level].tile_px
        window = {"y": slice(r * th, min((r + 1) * th, h)), "x": slice(first * tw, min(last * tw, w)), "c": slice(0, 3)}
        index = tuple(window.get(axis, 0) for axis in self._axes)

        def ask() -> Any:
            try:
                return self._arrays[level][index]
            except Exception as error:  # codecs raise whatever they like
                if is_url(self.path) and (isinstance(error, OSError) or is_passing(error)):
                    raise
                raise DamagedPixels(
                    f"level {level} cannot be decoded at row {r * th}, column {first * tw}: of its chunks {r}, {first} "
                    f"to {r}, {last - 1} (row, column) one is damaged ({type(error).__name__}: {error})",
                    where=self.path,
                    remedy="copy or convert the slide again",
                ) from error

        values = answered(self.path, ask, TRIES) if is_url(self.path) else ask()
        self.decoded += last - first
        kept = [axis for axis in self._axes if axis in "cyx"]
        return np.ascontiguousarray(np.asarray(values).transpose([kept.index(axis) for axis in "yxc"]))

    def digest(self) -> str:
        """sha256 (hexadecimal) over shapes, stated scale and pixels: all chunks of each level, or 64 spaced ones."""
        sha = hashlib.sha256(json.dumps(self.stated).encode())
        for k, level in enumerate(self.levels):
            sha.update(json.dumps([level.shape_px, level.tile_px]).encode())
            for pixels in self.sample(k, SAMPLED_CHUNKS):
                sha.update(b"damaged" if pixels is None else pixels.tobytes())
        return sha.hexdigest()

    def sample(self, level: int, most: int) -> Iterator[NDArray[np.uint8] | None]:
        """RGB of so many chunks of a level at most, evenly spaced; None for one that is damaged."""
        (h, w), (th, tw) = self.levels[level].shape_px, self.levels[level].tile_px
        cols = -(-w // tw)
        count = -(-h // th) * cols
        for n in np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)):
            r, c = divmod(int(n), cols)
            try:
                pixels = self._decode(level, r, c, c + 1)
            except DamagedPixels:
                yield None
            else:
                yield pixels

    def close(self) -> None:
        """See `deepfere.readers.slide.Slide.close`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.mpp_um, "zarr")


def is_zarr(path: str | Path) -> bool:
    """Whether a folder, or a URL that is not named like a picture, holds a Zarr group.

    Raises:
        InputError: A store does not answer.
    """
    if not is_url(path):
        return Path(path).is_dir() and any((Path(path) / name).exists() for name in FILES)
    suffix = PurePosixPath(str(path).partition("?")[0]).suffix.lower()
    if suffix == ".zarr" or suffix in PICTURES:
        return suffix == ".zarr"
    return any(holds(str(path), name) for name in FILES)


def zarr_digest(path: str | Path) -> str:
    """sha256 (hexadecimal) of a slide's pixels and stated scale; the same wherever and however these chunks are stored.

    Raises:
        InputError: See `open_zarr`.
    """
    return open_zarr(path, (1.0, 1.0), look=False).digest()


def open_zarr(path: str | Path, given_mpp_um: tuple[float, float] | None, look: bool = True) -> ZarrSlide:
    """Open an OME-Zarr slide.

    Args:
        path: Folder or URL of the image, or of a store in the bioformats2raw layout.
        given_mpp_um: Micrometres per level-0 pixel (y, x); None takes the image's own.
        look: Whether to look at its pixels; not where that was done before.

    Raises:
        InputError: It is no such image (says what it is), or see `deepfere.readers.slide.open_slide`.
    """
    from deepfere.store import open_foreign

    where = str(path)
    group: Any = open_foreign(path)
    ome = _ome(group)
    if "multiscales" not in ome and ome.get("bioformats2raw.layout") is not None:
        name = _first_image(group)
        where = f"{where.rstrip('/')}/{name}"
        if name not in group:
            raise InputError("is missing", where=where, remedy="convert the slide again")
        group = group[name]
        ome = _ome(group)
    try:
        image = ome["multiscales"][0]
        version = str(ome.get("version") or image.get("version"))
        if version not in VERSIONS:
            raise InputError(f"is OME-Zarr {version}, not 0.4 or 0.5", where=where, remedy="convert it anew")
        axes = tuple(axis["name"] for axis in image["axes"])
        paths = [str(dataset["path"]) for dataset in image["datasets"]]
        scales = [_scale(dataset, image, len(axes)) for dataset in image["datasets"]]
        units = [axis.get("unit") for axis in image["axes"]]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"is no OME-Zarr image ({type(error).__name__}: {error})", where=where, remedy="give an OME-Zarr slide"
        ) from error
    arrays = [_array(group, name, where) for name in paths]
    _refuse_unread(arrays, axes, ome, where)
    slide = ZarrSlide(str(path), given_mpp_um or (1.0, 1.0), arrays, axes, version)
    slide.stated = [(scales[0] and scales[0][k], units[k]) for k in map(axes.index, "yx")]
    _refuse_scales(slide, scales, axes, where)
    if look:
        _refuse_dark(slide, where)
    if given_mpp_um is None:
        stated = [None if scales[0] is None else _um(scales[0][k], units[k]) for k in map(axes.index, "yx")]
        slide.mpp_um = trusted_mpp((stated[0], stated[1]), where)
    return slide


def _ome(group: Any) -> dict[str, Any]:
    """OME metadata of a group: under a key of its own since 0.5."""
    attrs = dict(group.attrs)
    ome = attrs.get("ome")
    return ome if isinstance(ome, dict) else attrs


def _first_image(group: Any) -> str:
    series = _ome(group["OME"]).get("series") if "OME" in group else None
    return str(series[0]) if isinstance(series, list) and series else "0"


def _array(group: Any, name: str, where: str) -> Any:
    import zarr

    try:
        found = group[name]
    except KeyError as error:
        raise InputError(f"level {name} is missing", where=where, remedy="convert or copy it again") from error
    if not isinstance(found, zarr.Array):
        raise InputError(f"level {name} is no array", where=where, remedy="convert it again")
    return found


def _scale(dataset: dict[str, Any], image: dict[str, Any], axes: int) -> list[float] | None:
    """Size of an element along every axis: the level's own scale times that of all levels; None where not stated."""
    out, stated = [1.0] * axes, False
    for part in (dataset, image):
        for transformation in part.get("coordinateTransformations", []):
            if "scale" in transformation:
                values = [float(v) for v in transformation["scale"]]
                if len(values) != axes:
                    raise ValueError(f"{len(values)} scales for {axes} axes")
                out, stated = [a * b for a, b in zip(out, values, strict=True)], True
    return out if stated else None


def _um(value: float, unit: str | None) -> float | None:
    factor = UNITS_UM.get(unit or "")
    return None if factor is None else value * factor


def _refuse_unread(arrays: list[Any], axes: tuple[str, ...], ome: dict[str, Any], where: str) -> None:
    """Only three uint8 channels, which nothing calls other colours than red, green and blue."""
    shape = dict(zip(axes, arrays[0].shape, strict=False))
    told = ", ".join(f"{n} {name}" for name, n in shape.items())
    others = {name: n for name, n in shape.items() if name not in "cyx"}
    if (
        any(len(a.shape) != len(axes) for a in arrays)
        or not {"y", "x"} <= set(axes)
        or max(others.values(), default=1) > 1
    ):
        raise InputError(f"is not a picture (axes {told}; a stack?)", where=where, remedy=GIVE_RGB)
    if shape.get("c") != 3:
        raise InputError(f"is not an RGB picture (axes {told}; fluorescence?)", where=where, remedy=GIVE_RGB)
    for k, array in enumerate(arrays):
        if array.dtype != np.uint8:
            raise InputError(f"holds {array.dtype} values (level {k}), not 8-bit ones", where=where, remedy=GIVE_RGB)
    channels = (ome.get("omero") or {}).get("channels") or []
    colours = [str(channel.get("color", "")).upper().removeprefix("#") for channel in channels]
    if any(colours) and [c[:6] for c in colours] != ["FF0000", "00FF00", "0000FF"]:
        labels = ", ".join(f"{c.get('label') or n} {c.get('color', '')}".strip() for n, c in enumerate(channels))
        raise InputError(
            f"is not an RGB picture (its channels are {labels}; fluorescence?)", where=where, remedy=GIVE_RGB
        )


def _refuse_scales(slide: ZarrSlide, scales: list[list[float] | None], axes: tuple[str, ...], where: str) -> None:
    """A level's stated scale and its size have to agree to a pixel of it: else one of them is not meant."""
    first = scales[0]
    for number, (level, scale) in enumerate(zip(slide.levels, scales, strict=True)):
        for k, axis in enumerate("yx"):
            if first is None or scale is None:
                continue
            ratio = scale[axes.index(axis)] / first[axes.index(axis)]
            if not abs(slide.shape_px[k] / ratio - level.shape_px[k]) <= 1.0:
                raise InputError(
                    f"level {number} is {level.shape_px[k]} pixels along {axis}, and its scale says "
                    f"{slide.shape_px[k] / ratio:.1f}",
                    where=where,
                    remedy="convert it again",
                )


def _refuse_dark(slide: ZarrSlide, where: str) -> None:
    """Three channels may be fluorescence that says nothing of its colours: nearly all of that is dark."""
    sample = slide.sample(len(slide.levels) - 1, LOOKED_AT)
    seen = np.concatenate([np.zeros(0), *(p.mean(2).ravel() for p in sample if p is not None)])
    dark = float((seen < DARK).mean()) if len(seen) else 0.0
    if dark > DARK_SHARE:
        raise InputError(
            f"{100 * dark:.0f} % of it are dark, as in fluorescence, not in brightfield", where=where, remedy=GIVE_RGB
        )
