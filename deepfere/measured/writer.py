"""Writes the measured store (`deepfere.measured.store`): band by band, or a cube that is in memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from deepfere.errors import InputError
from deepfere.measured.normalise import FACTORS, spectrum_factors
from deepfere.measured.store import CHUNK_IONS, CHUNK_PX, FORMAT, FORMAT_VERSION, SHARD_BYTES, Measured, stored
from deepfere.store import Codec, StorageOptions, chunks_at_once, create_array, exists, open_group, remove


class MeasuredWriter:
    """Writes a measured store band by band; complete only once ``finish`` returns.

    A band is ``band_rows`` image rows and owns its shards, so bands may be written in any order, each once.

    Args:
        path: Where to; an unfinished store of ours is replaced, anything else is refused.
        mz: (M,) ascending.
        shape_px: (ny, nx).
        band_rows: Image rows per band; above 64 it is rounded up to a multiple of 64.
        overwrite: Replace a finished store too.
        storage_options: For URLs.
        codec: How the ions are compressed; see `create_array`.

    Raises:
        InputError: Something stands at the path.
    """

    def __init__(
        self,
        path: str | Path,
        mz: NDArray[np.float64],
        shape_px: tuple[int, int],
        *,
        band_rows: int = CHUNK_PX,
        overwrite: bool = False,
        storage_options: StorageOptions | None = None,
        codec: Codec = "zstd",
    ) -> None:
        self.path, self._options = path, storage_options
        refuse_occupied(path, overwrite, storage_options)
        remove(path, storage_options)
        m, (ny, nx) = len(mz), shape_px
        self.shape_px = shape_px
        self.band_rows = fitting_band(band_rows, shape_px)
        chunk_y = min(CHUNK_PX, self.band_rows)
        chunk = (min(CHUNK_IONS, m), chunk_y, min(CHUNK_PX, nx))
        across = -(-nx // chunk[2]) * chunk[2]
        deep = max(1, SHARD_BYTES // (4 * chunk[0] * self.band_rows * across))
        self.shard_ions = chunk[0] * min(deep, -(-m // chunk[0]))
        self.group = open_group(path, "w", storage_options)
        self.group.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, "complete": False})
        self.ions = create_array(
            self.group,
            "ions",
            (m, ny, nx),
            np.float32,
            chunk,
            (self.shard_ions, self.band_rows, across),
            fill_value=np.nan,
            dimension_names=("ion", "y", "x"),
            codec=codec,
        )
        axis = create_array(self.group, "mz", (m,), np.float64, (m,), dimension_names=("ion",))
        axis[:] = np.asarray(mz, dtype=np.float64)

    @property
    def bands(self) -> list[tuple[int, int]]:
        """Row ranges [begin, end) of the bands."""
        ny = self.shape_px[0]
        return [(r, min(r + self.band_rows, ny)) for r in range(0, ny, self.band_rows)]

    def write_band(self, begin: int, block: NDArray[np.float32]) -> None:
        """Write one band, whole shards at a time.

        Args:
            begin: First image row, a multiple of ``band_rows``.
            block: (rows, nx, M) float32, pixel-major as spectra are read; NaN where not measured.
        """
        end = begin + block.shape[0]
        for first in range(0, block.shape[2], self.shard_ions):
            part = block[:, :, first : first + self.shard_ions]
            self.ions[first : first + part.shape[2], begin:end, :] = np.ascontiguousarray(part.transpose(2, 0, 1))

    def write_images(self, begin: int, images: NDArray[np.float32]) -> None:
        """As `write_band`, of (M, rows, nx)."""
        with chunks_at_once():
            for first in range(0, len(images), self.shard_ions):
                part = images[first : first + self.shard_ions]
                self.ions[first : first + len(part), begin : begin + part.shape[1], :] = part

    def write_factors(self, begin: int, factors: Mapping[str, NDArray[Any]]) -> None:
        """The part of images of one value a pixel ("tic", "rms", "median"...) that lies in a band.

        Args:
            begin: First image row.
            factors: By their names, each (rows, nx) float32 or bool.
        """
        for name, part in factors.items():
            self._image(name, bool if part.dtype == bool else np.float32)[begin : begin + len(part)] = part

    def _image(self, name: str, dtype: type) -> zarr.Array:
        """An array (ny, nx), a chunk per band; not measured is NaN, or False."""
        if name in self.group:
            return stored(self.group, name)
        fill: Any = False if dtype is bool else np.nan
        chunk = (min(self.band_rows, self.shape_px[0]), self.shape_px[1])
        return create_array(self.group, name, self.shape_px, dtype, chunk, fill_value=fill, dimension_names=("y", "x"))

    def finish(
        self,
        mask: NDArray[np.bool_],
        pitch_um: tuple[float, float],
        attrs: Mapping[str, Any],
    ) -> Measured:
        """Write what is known at the end, mark the store complete and open it.

        Args:
            mask: (ny, nx).
            pitch_um: Pitch (y, x).
            attrs: Further attributes, plain values.
        """
        self._image("mask", bool)[:] = mask
        self.group.attrs.update(
            {
                "tolerance_ppm": 5.0,
                "origin_px": [0, 0],
                **attrs,
                "pitch_um": [float(p) for p in pitch_um],
                "axes": ["ion", "y", "x"],
            }
        )
        self.group.attrs["complete"] = True
        return Measured(self.path, self._options)


def fitting_band(band_rows: int, shape_px: tuple[int, int]) -> int:
    """The rows of a band: whole chunks, and a small image is not padded to 64 rows."""
    band_rows = max(1, min(band_rows, shape_px[0]))
    chunk = min(CHUNK_PX, band_rows)
    return -(-band_rows // chunk) * chunk


def refuse_occupied(path: str | Path, overwrite: bool = False, storage_options: StorageOptions | None = None) -> None:
    """Refuse a path where something stands that must not be replaced.

    Raises:
        InputError: A finished store (without ``overwrite``) or something that is not ours.
    """
    if not exists(path, storage_options):
        return
    try:
        attrs = dict(open_group(path, "r", storage_options).attrs)
    except InputError:
        attrs = {}
    if attrs.get("format") != FORMAT:
        raise InputError("exists and is not an ingested measurement", where=path, remedy="choose another path")
    if attrs.get("complete") is True and not overwrite:
        raise InputError("exists already", where=path, remedy="choose another path or overwrite it")


def write_measured(
    path: str | Path,
    cube: ArrayLike,
    mask: ArrayLike | None,
    mz: ArrayLike,
    pitch_um: float | tuple[float, float],
    attrs: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    storage_options: StorageOptions | None = None,
) -> Measured:
    """Write a cube that is in memory.

    Args:
        path: Where to.
        cube: (M, ny, nx); values outside the mask do not matter. Factors are computed over its ions.
        mask: (ny, nx) bool; None takes pixels where every ion is finite.
        mz: (M,), ascending.
        pitch_um: One value or (y, x).
        attrs: Further attributes, plain values (``tolerance_ppm``, ``origin_px``...).
        overwrite: Replace a finished store.
        storage_options: For URLs.

    Raises:
        InputError: Shapes disagree, m/z do not ascend, nothing is measured, or a measured value is negative
            or not finite.
    """
    values = np.asarray(cube, dtype=np.float32)
    axis = np.asarray(mz, dtype=np.float64)
    if values.ndim != 3 or axis.shape != values.shape[:1] or 0 in values.shape:
        raise InputError(f"a cube of shape {values.shape} and {axis.shape} m/z do not go together", where=path)
    inside = np.asarray(np.isfinite(values).all(axis=0) if mask is None else mask, dtype=bool)
    if inside.shape != values.shape[1:]:
        raise InputError(f"a mask of {inside.shape} does not fit a cube of shape {values.shape}", where=path)
    if not inside.any():
        raise InputError("no pixel is measured", where=path)
    if not (np.isfinite(axis).all() and (np.diff(axis) > 0).all()):
        raise InputError("m/z must be finite and ascending, each once", where=path)
    spectra = np.ascontiguousarray(values[:, inside].T)
    if not np.isfinite(spectra).all() or (spectra < 0).any():
        raise InputError("measured intensities must be finite and not negative", where=path)
    pair = pitch_um if isinstance(pitch_um, tuple | list) else (pitch_um, pitch_um)
    ny, nx = inside.shape
    factors = {name: np.full((ny, nx), np.nan, dtype=np.float32) for name in FACTORS}
    for name, factor in zip(FACTORS, spectrum_factors(spectra), strict=True):
        factors[name][inside] = factor
    writer = MeasuredWriter(path, axis, (ny, nx), overwrite=overwrite, storage_options=storage_options)
    for begin, end in writer.bands:
        block = np.ascontiguousarray(values[:, begin:end].transpose(1, 2, 0))
        block[~inside[begin:end]] = np.nan
        writer.write_band(begin, block)
        writer.write_factors(begin, {name: factor[begin:end] for name, factor in factors.items()})
    return writer.finish(inside, (float(pair[0]), float(pair[1])), attrs or {})
