"""The result: every ion, decoded on demand from the measurement and a few detail planes.

Layout of the store (Zarr v3; root attributes hold ``format_version``; without ``complete`` it is unfinished):

* ``measured/``: the measurement as ingested (`deepfere.measured.store`).
* ``detail/``: OME multiscale, K detail planes (c, y, x), float16, times ``detail_scale`` each.
* ``basis/``: W (M, K), gates, held-out R2 (of null guides too), positivity steps, shares inferred from the stain.
* ``denoised``: (ion, y, x), the measurement without its counting noise.
* ``uncertainty/``: every ion's noise model.
* ``stain/``: OME multiscale, the stain on the section grid, uint8 RGB.
* ``overview``: the whole slide, small.
* ``artefacts``: what of it is ink, torn or folded, and not used; on the overview's grid.
* ``alignment.json``, ``provenance.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.measured.operator import fill_missing
from deepfere.measured.store import Measured, open_measured
from deepfere.measured.tolerance import Tolerance, nearest_ion
from deepfere.model.decode import IonDecoder
from deepfere.model.guide import Cells
from deepfere.places import Place, not_empty, place, reading
from deepfere.reconstruction.blocks import (
    forget,
    ion_block,
    measured_image,
    measured_means,
    same,
    stamp_of,
    variance_block,
)
from deepfere.remote import is_url
from deepfere.store import open_group

if TYPE_CHECKING:
    import dask.array
    import pandas

FORMAT, FORMAT_VERSION = "deepfere-result", 3
WHOLE_PX = 512
"""Side of the blocks, in finest pixels, in which coarser levels are computed, or that of a stored chunk."""

_SEALING: set[str] = set()


@contextmanager
def sealing(path: str | Place) -> Iterator[None]:
    """Let this process, and nobody else, open an unfinished result: to check it before it is called complete."""
    _SEALING.add(_place(path))
    forget()
    try:
        yield
    finally:
        _SEALING.discard(_place(path))
        forget()


def _place(path: str | Place) -> str:
    """An absolute path, so that lazy arrays find their store after a change of folder; a URL as it is."""
    return str(path).rstrip("/") if is_url(path) else str(Path(not_empty(str(path))).absolute())


class Result:
    """A finished reconstruction.

    Attributes:
        path: Where it is, absolute; or its URL.
        factor: High-resolution pixels per measured pixel and axis.
        grid: The measured grid.
        levels: Resolution levels; level 0 is the finest.
        exact: Whether images agree with the measurement; those of the published model (tier "paper") do not.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _place(path)
        group = open_group(self.path, "r")
        attrs: dict[str, Any] = dict(group.attrs)
        if attrs.get("format") != FORMAT:
            raise InputError("is not a result", where=path, remedy="give a store that `deepfere fuse` wrote")
        if attrs.get("complete") is not True and self.path not in _SEALING:
            raise InputError("is unfinished", where=path, remedy="run the same command again: it resumes")
        if attrs.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"has format version {attrs.get('format_version')}, this is {FORMAT_VERSION}",
                where=path,
                remedy="reconstruct it again",
            )
        self._group: Any = group
        self._attrs = attrs
        self.factor = int(attrs["factor"])
        self.levels = int(attrs["levels"])
        self.exact = attrs.get("exact", True) is True
        self.normalisation: str = attrs["normalisation"]
        self._measured: Measured = open_measured(f"{self.path}/measured")
        self.grid: SectionGrid = self._measured.grid

    def __repr__(self) -> str:
        (ny, nx), (y, x) = self.grid.shape_px, self.grid.pitch_um
        pitch = f"{y:g} um" if y == x else f"{y:g} x {x:g} um (y, x)"
        return (
            f"<deepfere result {self.path}: {len(self._measured.mz)} ions, {ny} x {nx} measured pixels of "
            f"{pitch}, x{self.factor}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Result, (self.path,)

    @property
    def identity(self) -> str | None:
        """Hash of the inputs and settings that it was made from."""
        return self._attrs.get("identity")

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """(ny, nx) True where measured."""
        return self._measured.mask

    @cached_property
    def _basis(self) -> dict[str, NDArray[Any]]:
        return {name: np.asarray(array[:]) for name, array in self._group["basis"].arrays()}

    @cached_property
    def ions(self) -> pandas.DataFrame:
        """One row per ion.

        Columns: mz, held_out_r2, gate, informed, null_r2 and null_mean_r2 (95th percentile and mean over null guides),
        consistency, nonneg_steps, noise_share, chi_square (both of the denoised mode, see
        `deepfere.model.denoise.Denoised`), inferred_share (of its contrast, see `inferred`).
        """
        import pandas as pd

        basis = self._basis
        return pd.DataFrame(
            {
                "mz": self._measured.mz,
                "held_out_r2": basis["held_out_r2"],
                "gate": basis["gate"],
                "informed": [str(v) for v in self._attrs["informed"]],
                "null_r2": basis["null_r2"],
                "null_mean_r2": basis["null_mean_r2"],
                "consistency": basis["consistency"],
                "nonneg_steps": basis["positivity"],
                "noise_share": basis["noise_share"],
                "chi_square": basis["chi_square"],
                "inferred_share": basis["inferred_share"],
            }
        )

    @property
    def alignment(self) -> Alignment | None:
        """Section to slide, micrometres; None for a run without the stain."""
        return self._alignment("alignment.json")

    @property
    def alignment_start(self) -> Alignment | None:
        """Where the search began: centred, upright."""
        return self._alignment("alignment_start.json")

    def _alignment(self, name: str) -> Alignment | None:
        try:
            with reading(place(self.path) / name) as path:
                return Alignment.load(path) if path.exists() else None
        except FileNotFoundError:
            return None

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Identity, versions, model and run, settings, timings, warnings."""
        return json.loads((place(self.path) / "provenance.json").read_text())

    def index(self, mz: float, ppm: float | None = None) -> int:
        """Row of the ion nearest to ``mz``; of ions with one m/z, or equally near, the first.

        Args:
            mz: Wanted m/z.
            ppm: How far it may be; None takes the windows that the ions were ingested with.

        Raises:
            InputError: No ion within the tolerance; names the nearest. Or another result has taken this one's place.
        """
        same(self.path, self.identity)
        if not isinstance(mz, Real):
            raise InputError(f"m/z {mz!r} is no number", where=self.path, remedy="give one number, such as 798.541")
        axis = self._measured.mz
        allowed = self._measured.tolerance if ppm is None else Tolerance(ppm)
        nearest, inside = nearest_ion(axis, float(mz), allowed)
        if not inside:
            off = abs(axis[nearest] - mz) / mz * 1e6 if mz > 0 else np.inf
            raise InputError(
                f"no ion within {allowed.of(nearest)} of m/z {mz}; "
                f"the nearest is {axis[nearest]:.5f} ({off:.1f} ppm away)",
                where=self.path,
                remedy="give its m/z, or a wider ppm",
            )
        return nearest

    def measured(self, mz: float, ppm: float | None = None) -> NDArray[np.float32]:
        """The low-resolution image (ny, nx) as measured, normalised as chosen; NaN = not measured."""
        return measured_image(self.path, self.index(mz, ppm))

    def ion(self, mz: float, *, ppm: float | None = None, level: int = 0, denoised: bool = False) -> dask.array.Array:
        """The high-resolution image (H, W) float32 of an ion, exact, decoded when computed.

        Args:
            mz: Wanted m/z.
            ppm: How far the nearest ion may be; None takes the study's tolerance.
            level: 0 is the finest; a pixel of level k is the mean of those of its 2^k x 2^k pixels of level 0
                that exist and were measured.
            denoised: The measurement without what is taken for its counting noise in place of the measurement.

        Returns:
            A lazy array; NaN where not measured. Averaged over measured pixels it is the measurement, or with
            ``denoised`` the denoised one.

        Raises:
            InputError: No such ion or level.
        """
        ion, pixels = self.index(mz, ppm), 2 ** self._level(level) // self.factor
        if not self.exact or pixels * self.factor != 2**level:
            return self._lazy(ion, level, partial(ion_block, denoised=denoised))
        import dask.array as da
        from dask import delayed

        # Means of whole measured pixels are the measurement's: nothing has to be decoded.
        shape = tuple(-(-n // pixels) for n in self.grid.shape_px)
        of = self.path, stamp_of(self.path), self.identity
        image = delayed(measured_means, pure=True)(*of, ion, pixels, denoised)
        return da.from_delayed(image, shape, np.float32)

    def uncertainty(self, mz: float, *, ppm: float | None = None, level: int = 0) -> dask.array.Array:
        """One standard deviation (H, W) float32 of what an instrument with this pixel size would have measured.

        Noise included, so that it falls from level to level. See `deepfere.model.uncertainty`.

        Args:
            mz: Wanted m/z.
            ppm: How far the nearest ion may be; None takes the study's tolerance.
            level: 0 is the finest; pixels of level k are 2^k times as large.

        Raises:
            InputError: No such ion or level.
        """
        import dask.array as da

        decode = partial(variance_block, level=level)
        # The square of a small intensity is nothing in float32.
        return da.sqrt(self._lazy(self.index(mz, ppm), level, decode, np.float64)).astype(np.float32)

    def inferred(self, mz: float | None = None, *, ppm: float | None = None, level: int = 0) -> dask.array.Array:
        """How much of the picture was inferred from the stain, 0 to 1 (H, W) float32; the rest was measured.

        The energy of the detail that the stain adds, as a share of that and of the contrast between the measured
        pixels around; see `deepfere.model.inferred`. 0 everywhere where the stain informs nothing.

        Args:
            mz: m/z of one ion; None takes all ions together, each in units of its own s.d. over the section.
            ppm: How far the nearest ion may be; None takes the study's tolerance.
            level: 0 is the finest; a pixel of level k is the mean of its pixels of level 0, as of `ion`.

        Returns:
            A lazy array; NaN where not measured.

        Raises:
            InputError: No such ion or level.
        """
        from deepfere.reconstruction.inferred import inferred_block

        return self._lazy(None if mz is None else self.index(mz, ppm), level, inferred_block)

    @property
    def inferred_share(self) -> float:
        """Share of all ions' contrast, over the whole section, that was inferred from the stain."""
        return float(self._attrs["inferred_share"])

    def _level(self, level: int) -> int:
        if not isinstance(level, int | np.integer) or level not in range(self.levels):
            raise InputError(f"level {level}", where=self.path, remedy=f"give 0 to {self.levels - 1}")
        return int(level)

    def _lazy(self, ion: int | None, level: int, decode: Any, dtype: type = np.float32) -> dask.array.Array:
        import dask.array as da

        self._level(level)
        chunk = int(self._attrs["chunk_px"])
        if level:  # of the whole section: what blocks need around them is decoded less often with larger ones
            chunk *= max(1, WHOLE_PX // chunk)
        shape = [n * self.factor for n in self.grid.shape_px]
        chunks = tuple(tuple(min(chunk, n - k) for k in range(0, n, chunk)) for n in shape)
        of = {"path": self.path, "identity": self.identity, "ion": ion}
        full = da.map_blocks(decode, chunks=chunks, dtype=dtype, meta=np.empty((0, 0), dtype), **of)
        if level == 0:
            return full
        side = 2**level
        padded = da.pad(full, [(0, -n % side) for n in shape], constant_values=np.nan)
        merged = padded.rechunk(tuple(max(1, chunk // side) * side for _ in shape))
        return da.coarsen(_nanmean, merged, {0: side, 1: side}).astype(dtype)

    def decoder(self, ion: int, denoised: bool = False) -> IonDecoder:
        """What decoding takes besides `detail`; it holds the measured image twice, in float64.

        Args:
            ion: Row of `ions` (see `index`).
            denoised: As for `ion`.
        """
        image = self._group["denoised"][ion] if denoised else measured_image(self.path, ion)
        cells = fill_missing(np.asarray(image, np.float64), self.mask)
        basis = self._basis
        loadings = basis["gate"][ion] * basis["loadings"][ion] * basis["detail_scale"]
        return IonDecoder.build(cells, loadings, self.factor, int(basis["positivity"][ion]), self.exact)

    def detail(self, cells: Cells) -> NDArray[np.float16]:
        """The detail planes (K, h f, w f) as stored, over a window of measured pixels inside the grid."""
        f, planes = self.factor, self._group["detail"]["0"]
        return np.asarray(planes[:, cells.i0 * f : cells.i1 * f, cells.j0 * f : cells.j1 * f])

    def stain(self, level: int = 0) -> dask.array.Array | None:
        """The stain (3, H, W) uint8 on the section grid; None for a run without the stain."""
        import dask.array as da

        return da.from_zarr(self._group["stain"][str(level)]) if "stain" in self._group else None

    def overview(self) -> tuple[NDArray[np.uint8], tuple[float, float]] | None:
        """The whole slide (h, w, 3), small, and its pixel size (y, x) in micrometres; None without a slide."""
        if "overview" not in self._group:
            return None
        array = self._group["overview"]
        spacing = array.attrs["spacing_um"]
        return np.asarray(array[:]), (spacing[0], spacing[1])

    def artefacts(self) -> NDArray[np.uint8] | None:
        """What of the slide is not used, (h, w) on the grid of `overview`; None without a slide.

        0 = nothing, 1 = ink, 2 = a tear, 3 = a fold.
        """
        return np.asarray(self._group["artefacts"][:]) if "artefacts" in self._group else None


def _nanmean(block: NDArray[Any], axis: Any | None = None) -> NDArray[Any]:
    count = np.isfinite(block).sum(axis=axis)
    total = np.nansum(block, axis=axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def open(path: str | Path) -> Result:
    """Open a finished result.

    Raises:
        InputError: It is not one, or is unfinished.
    """
    return Result(path)
