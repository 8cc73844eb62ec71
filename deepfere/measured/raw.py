"""An imzML pair, or a table of pixels, looked at without ingesting it: images of any m/z, spectra, measured pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured import store
from deepfere.measured.normalise import FACTORS
from deepfere.measured.raster import batches, plan_raster
from deepfere.measured.reduce import Reduce, Reducer, put, shared_axis
from deepfere.measured.table import TableReducer
from deepfere.measured.tolerance import Tolerance
from deepfere.places import place
from deepfere.readers.imzml import read_index
from deepfere.readers.imzml_arrays import spectrum
from deepfere.readers.ranges import open_binary
from deepfere.readers.table import Table, is_table, open_table
from deepfere.readers.table_rows import RowReader
from deepfere.store import StorageOptions


class RawMeasured:
    """An imzML pair or a table of pixels, read when asked.

    Pixels with several spectra hold their sum; their spectrum is refused.

    Attributes:
        path: The .imzML, or the table's store.
        mask: (ny, nx) bool, True where a pixel was measured.
        tolerance_ppm: Half-width of an ion's window where none is given.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.tolerance_ppm = 5.0
        self._source = open_table(path) if is_table(path) else read_index(path)
        self._raster = plan_raster(self._source, "sum")
        self.mask: NDArray[np.bool_] = self._raster.mask

    def ion_image(self, mz: float, ppm: float | None = None, representation: str | None = None) -> NDArray[np.float32]:
        """What the window of one m/z holds in every pixel, (ny, nx) float32, NaN where not measured.

        The sum of the centroids (of a table: the variables) in the window, or the area under the profile in it; reads
        all of the file once.

        Args:
            mz: Wanted m/z.
            ppm: Half-width of the window; 5 by default.
            representation: "centroid" or "profile", where the file does not say or is wrong.

        Raises:
            InputError: No positive m/z or width; nothing says whether spectra are centroids or profiles.
            DeepfereError: There is no room to sort a table.
        """
        width = self.tolerance_ppm if ppm is None else ppm
        if not (math.isfinite(mz) and mz > 0 and math.isfinite(width) and 0 < width < 1e5):
            raise InputError(f"no window of {width:g} ppm around m/z {mz:g}", where=self.path, remedy="give another")
        ny, nx = self.mask.shape
        out = np.zeros((1, ny * nx), dtype=np.float32)
        repeated = bool(self._raster.counts.max() > 1)
        with self._reduce(np.array([float(mz)]), width, representation) as reduce:
            for rows in batches(self._source.length, np.arange(len(self._source)), 1):
                row, col = self._raster.at(rows)
                put(out, row * nx + col, reduce(rows)[0], repeated)
        image = out.reshape(ny, nx)
        image[~self.mask] = np.nan
        return image

    @cached_property
    def _rows(self) -> RowReader:
        assert isinstance(self._source, Table)
        return RowReader(self._source, np.arange(len(self._source)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    @cached_property
    def _factors(self) -> dict[str, NDArray[np.float32]]:
        """Factors of normalisation (ny, nx), NaN where not measured; reads all of the file once."""
        out = np.zeros((len(FACTORS), *self.mask.shape))
        # They are of the whole spectrum: of which window, and of what kind, does not matter.
        kind = self._source.representation or "centroid"
        with self._reduce(np.array([1.0]), self.tolerance_ppm, kind) as reduce:
            for rows in batches(self._source.length, np.arange(len(self._source)), 1):
                at = self._raster.at(rows)
                for image, factor in zip(out, reduce(rows)[1], strict=True):
                    np.add.at(image, at, factor)
        out[:, ~self.mask] = np.nan
        return dict(zip(FACTORS, out.astype(np.float32), strict=True))

    @property
    def tic(self) -> NDArray[np.float32]:
        """(ny, nx) float32, sum of the pixel's whole spectrum; NaN where not measured."""
        return self._factors["tic"]

    @property
    def rms(self) -> NDArray[np.float32]:
        """(ny, nx) float32, root of the mean square over the spectrum's values."""
        return self._factors["rms"]

    @property
    def median(self) -> NDArray[np.float32]:
        """(ny, nx) float32, median of the spectrum's positive values."""
        return self._factors["median"]

    @contextmanager
    def _reduce(self, ions: NDArray[np.float64], width: float, representation: str | None) -> Iterator[Reduce]:
        source = self._source
        if isinstance(source, Table):
            # A reader of its own for each call, of values that are sorted once.
            yield TableReducer(copy(self._rows), ions, "list", Tolerance(width))
            return
        kind = representation or source.representation
        if kind not in ("centroid", "profile"):
            raise InputError("says neither centroid nor profile", where=self.path, remedy="give representation")
        with open_binary(source.ibd_path) as ibd:
            yield partial(Reducer(source, shared_axis(source, ibd), ions, "list", kind, Tolerance(width)), ibd)

    def spectrum(self, y: int, x: int) -> tuple[NDArray[np.float64], NDArray[np.float32] | NDArray[np.float64]]:
        """m/z and intensity of one pixel (row, column) of the grid, as they are in the file.

        Raises:
            InputError: The pixel lies outside the grid, was not measured, or has several spectra.
        """
        ny, nx = self.mask.shape
        if not (0 <= y < ny and 0 <= x < nx):
            what = f"pixel ({y}, {x}) is outside the grid of {ny} x {nx}"
            raise InputError(what, where=self.path, remedy="give another pixel")
        found = np.concatenate([k + np.flatnonzero(at == y * nx + x) for k, at in self._raster.pixels()])
        if len(found) != 1:
            what = f"has {len(found)} spectra" if len(found) else "was not measured"
            raise InputError(f"pixel ({y}, {x}) {what}", where=self.path, remedy="give another pixel")
        if isinstance(self._source, Table):
            columns, values, _ = RowReader(self._source, found).read(found)
            mz = self._source.mz[columns]
            order = np.argsort(mz, kind="stable")
            return mz[order], values[order]
        with open_binary(self._source.ibd_path) as ibd:
            return spectrum(self._source, ibd, int(found[0]))


def open_measured(path: str | Path, storage_options: StorageOptions | None = None) -> store.Measured | RawMeasured:
    """Open a measurement: one that was ingested, or an .imzML or a table of pixels as it is.

    All have ``ion_image(mz, ppm)``, ``spectrum(y, x)``, ``mask`` and the factors of normalisation ``tic``, ``rms`` and
    ``median``; an ingested one also ``reference``, ``factor(normalisation)`` and ``shift_ppm``. Of an ingested one an
    ion image is that of the stored ion nearest to the m/z; of the others it is the window around the m/z itself.

    Raises:
        InputError: It is absent, none of these, or unfinished; see `read_index`, `open_table` and `plan_raster`.
    """
    if place(path).suffix.lower() in (".imzml", ".ibd") or is_table(path):
        return RawMeasured(path)
    return store.open_measured(path, storage_options)
