"""The ingested cube on disk: a Zarr v3 group, one image per ion, NaN where nothing was measured.

Layout: ``ions`` (M, ny, nx) float32 in explicit shards, one row of shards per image band; ``mask`` (ny, nx)
bool; ``mz`` (M,) float64, ascending; ``tic``, ``rms``, ``median`` (ny, nx) float32, NaN where not measured.
With a reference m/z: ``reference``, alike. Where a lock mass was used: ``shift_ppm`` (ny, nx) float32, by how many
ppm m/z were off, and ``lock_mass_found`` (ny, nx) bool. Attributes hold the format's version, pitch, origin and
provenance; ``complete`` is written last, so that a store whose writer was stopped is visibly unfinished and is refused.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.frame import SectionGrid
from deepfere.measured.normalise import REFERENCE, Normalisation, multiplier, notes
from deepfere.measured.tolerance import Tolerance, nearest_ion
from deepfere.store import StorageOptions, open_group

FORMAT, FORMAT_VERSION = "deepfere-measured", 1
CHUNK_IONS, CHUNK_PX = 64, 64
SHARD_BYTES = 128 << 20
SOURCE_DIGEST = "source_digest"
"""Attribute: the digest of what the cube was ingested from, by which a model knows what it was trained on."""
SHIFT, FOUND = "shift_ppm", "lock_mass_found"


class Measured:
    """An ingested measurement, read lazily.

    Attributes:
        path: Where it is.
        grid: Measured pixels and pitch.
        mask: (ny, nx) bool, True where a pixel was measured.
        mz: (M,) float64, ascending.
        ions: Zarr array (M, ny, nx) float32, NaN where not measured.
        tic: (ny, nx) float32, sum of the pixel's whole spectrum as read.
        rms: (ny, nx) float32, root of the mean square over the spectrum's values.
        median: (ny, nx) float32, median of the spectrum's positive values.
        tolerance_ppm: Relative part of the half-width within which an m/z means an ion.
        tolerance: All of it, of each ion where they have their own.
        attrs: Everything else that is known (origin_px, mode, source, counts...).
    """

    def __init__(self, path: str | Path, storage_options: StorageOptions | None = None) -> None:
        self.path = str(path)
        self._options = storage_options
        group = open_group(path, "r", storage_options)
        self.attrs: dict[str, Any] = dict(group.attrs)
        if self.attrs.get("format") != FORMAT:
            raise InputError("is not an ingested measurement", where=path, remedy="make one with `deepfere ingest`")
        if self.attrs.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"has format version {self.attrs.get('format_version')}, not {FORMAT_VERSION}",
                where=path,
                remedy="ingest again with this version",
            )
        if self.attrs.get("complete") is not True:
            raise InputError("is unfinished (its writer was stopped)", where=path, remedy="ingest again")
        self._group = group
        self.ions = stored(group, "ions")
        self.mz: NDArray[np.float64] = np.asarray(stored(group, "mz")[:], dtype=np.float64)
        self.mask: NDArray[np.bool_] = np.asarray(stored(group, "mask")[:], dtype=bool)
        pitch = self.attrs["pitch_um"]
        self.grid = SectionGrid((self.mask.shape[0], self.mask.shape[1]), (float(pitch[0]), float(pitch[1])))
        self.tolerance_ppm = float(self.attrs["tolerance_ppm"])
        self.tolerance = Tolerance.of_attrs(self.attrs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Measured, (self.path, self._options)

    @cached_property
    def tic(self) -> NDArray[np.float32]:
        """(ny, nx) float32; see the class."""
        return self._factor("tic")

    @cached_property
    def rms(self) -> NDArray[np.float32]:
        """(ny, nx) float32; see the class."""
        return self._factor("rms")

    @cached_property
    def median(self) -> NDArray[np.float32]:
        """(ny, nx) float32; see the class."""
        return self._factor("median")

    @cached_property
    def shift_ppm(self) -> NDArray[np.float32] | None:
        """By how many ppm the m/z of each pixel were off before the lock mass corrected them, (ny, nx) float32.

        NaN where not measured; a pixel without a lock mass (see `lock_mass_found`) has that of those around it. None
        where no lock mass was used.
        """
        return self._factor(SHIFT) if SHIFT in self._group else None

    @cached_property
    def lock_mass_found(self) -> NDArray[np.bool_] | None:
        """Where a lock mass was found, (ny, nx) bool; None where none was used."""
        return np.asarray(stored(self._group, FOUND)[:], dtype=bool) if FOUND in self._group else None

    def _factor(self, name: str) -> NDArray[np.float32]:
        return np.asarray(stored(self._group, name)[:], dtype=np.float32)

    @cached_property
    def reference(self) -> NDArray[np.float32] | None:
        """(ny, nx) float32, intensity of the reference m/z (``attrs["reference_mz"]``); None where none was given."""
        return self._factor(REFERENCE) if REFERENCE in self._group else None

    def factor(self, normalisation: Normalisation) -> NDArray[np.float64] | None:
        """What an intensity is multiplied by, (ny, nx): the mean factor over the pixel's; None for "none".

        A pixel whose TIC, RMS or median is zero has no signal at all: its multiplier is zero, and it stays zero. A
        pixel with signal but without the reference takes the median reference of those around it.

        Raises:
            InputError: The normalisation is unknown, its factor is zero everywhere or was not stored, or more than a
                tenth of the pixels with signal are without the reference.
        """
        return multiplier(self, normalisation)

    def normalisation_notes(self, normalisation: Normalisation) -> list[str]:
        """What is to be known about a normalisation before its images are trusted, a line each.

        Raises:
            InputError: See `factor`.
        """
        return notes(self, normalisation)

    def cube(self, normalisation: Normalisation = "none") -> NDArray[np.float32]:
        """All ions, (M, ny, nx) float32, NaN where not measured.

        Args:
            normalisation: "none", or the factor: then ``y / factor * mean(factor)``, the mean over the
                measured pixels, so that intensities keep their scale.
        """
        cube = np.asarray(self.ions[:], dtype=np.float32)
        scale = self.factor(normalisation)
        if scale is not None:
            cube *= scale.astype(np.float32)
        return cube

    def ion_image(
        self, mz: float, ppm: float | None = None, normalisation: Normalisation = "none"
    ) -> NDArray[np.float32]:
        """The image of the ion nearest to ``mz``, (ny, nx) float32, NaN where not measured.

        Args:
            mz: Wanted m/z.
            ppm: How far the ion may be; its window by default.
            normalisation: See `cube`.

        Raises:
            InputError: No ion is that near; names the nearest.
        """
        limit = self.tolerance if ppm is None else Tolerance(ppm)
        k, inside = nearest_ion(self.mz, mz, limit)
        if not inside:
            distance = abs(self.mz[k] / mz - 1) * 1e6 if mz else float("inf")
            raise InputError(
                f"no ion within {limit.of(k)} of m/z {mz:g}; the nearest is {self.mz[k]:.6g} ({distance:.3g} ppm)",
                where=self.path,
                remedy="ask for that one or widen ppm",
            )
        image = np.asarray(self.ions[k], dtype=np.float32)
        scale = self.factor(normalisation)
        return image if scale is None else image * scale.astype(np.float32)

    def spectrum(self, y: int, x: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """m/z (M,) and intensity (M,) of one grid pixel (row, column).

        Raises:
            InputError: The pixel lies outside the grid or was not measured.
        """
        ny, nx = self.grid.shape_px
        if not (0 <= y < ny and 0 <= x < nx):
            raise InputError(
                f"pixel ({y}, {x}) is outside the grid of {ny} x {nx}",
                where=self.path,
                remedy="give another pixel",
            )
        if not self.mask[y, x]:
            raise InputError(f"pixel ({y}, {x}) was not measured", where=self.path, remedy="give another pixel")
        return self.mz, np.asarray(self.ions[:, y, x], dtype=np.float32)


def stored(group: zarr.Group, name: str) -> zarr.Array:
    """An array of the store."""
    found = group[name]
    assert isinstance(found, zarr.Array)
    return found


def sign(path: str | Path, digest: str) -> None:
    """Note in a finished store the digest of what it was ingested from: elsewhere it still is the same measurement."""
    open_group(path, "a").attrs[SOURCE_DIGEST] = digest


def open_measured(path: str | Path, storage_options: StorageOptions | None = None) -> Measured:
    """Open an ingested measurement.

    Raises:
        InputError: It is absent, not one, of another version or unfinished.
    """
    return Measured(path, storage_options)
