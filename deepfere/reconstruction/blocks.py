"""What the lazy arrays of a result compute: blocks of ions and of their variances, from caches of this process."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.measured.operator import expand
from deepfere.model.decode import IonDecoder
from deepfere.model.guide import Cells
from deepfere.model.uncertainty import NoiseModel, local_variance
from deepfere.places import place
from deepfere.remote import is_url

if TYPE_CHECKING:
    from deepfere.reconstruction.result import Result

STAMP_S = 5.0
"""A result at a URL that was overwritten by another process may be served from the cache for so long."""
_stamps: dict[str, tuple[float, bytes]] = {}


def stamp_of(path: str) -> object:
    """Differs once a result was overwritten in place, so that none is served from a cache afterwards."""
    if not is_url(path):
        return (Path(path) / "provenance.json").stat().st_mtime
    asked_s, stamp = _stamps.get(path, (-STAMP_S, b""))
    if time.monotonic() - asked_s >= STAMP_S:
        stamp = (place(path) / "provenance.json").read_bytes()
        _stamps[path] = time.monotonic(), stamp
    return stamp


@lru_cache(maxsize=8)
def _opened(path: str, stamp: object) -> Result:
    from deepfere.reconstruction.result import Result

    return Result(path)


def at(path: str) -> Result:
    """The result at a path, opened once."""
    return _opened(path, stamp_of(path))


def same(path: str, identity: object) -> Result:
    """`at`, if it is still the result that an ion's row was looked up in.

    Raises:
        InputError: Another one has taken its place.
    """
    result = at(path)
    if result.identity != identity:
        raise InputError("was replaced by another result", where=path, remedy="open it again")
    return result


@lru_cache(maxsize=32)
def _decoder(path: str, stamp: object, ion: int, denoised: bool = False) -> IonDecoder:
    return _opened(path, stamp).decoder(ion, denoised)


def measured_image(path: str, ion: int) -> NDArray[np.float32]:
    """An ion (ny, nx) as measured, in the result's normalisation; NaN = not measured."""
    return measured_images(path, slice(ion, ion + 1))[0]


def measured_images(path: str, ions: slice) -> NDArray[np.float32]:
    """Ions (n, ny, nx) as measured, in the result's normalisation; NaN = not measured."""
    measured = at(path)._measured
    images = np.asarray(measured.ions[ions], np.float64)
    factor = measured.factor(at(path).normalisation)  # type: ignore[arg-type]
    return (images if factor is None else images * factor).astype(np.float32)


def forget() -> None:
    """Open every result anew: this process has changed one."""
    _stamps.clear()
    _opened.cache_clear()
    _decoder.cache_clear()


def window(block_info: Any, factor: int) -> Cells:
    """The measured pixels under one of dask's blocks of fine pixels."""
    (y0, y1), (x0, x1) = block_info[None]["array-location"]
    return Cells(y0 // factor, y1 // factor, x0 // factor, x1 // factor)


def hide(image: NDArray[np.float64], result: Result, cells: Cells) -> NDArray[np.float64]:
    """Fine pixels (h f, w f) with NaN where nothing was measured."""
    f = result.factor
    mask = result.mask[cells.i0 : cells.i1, cells.j0 : cells.j1]
    return np.where(np.repeat(np.repeat(mask, f, 0), f, 1), image, np.nan)


def ion_block(*, path: str, identity: object, ion: int, denoised: bool, block_info: Any = None) -> NDArray[np.float32]:
    """One block of `Result.ion` at level 0."""
    result = same(path, identity)
    cells = window(block_info, result.factor)
    stamp = stamp_of(path)
    return hide(_decoder(path, stamp, ion, denoised).window(cells, result.detail), result, cells).astype(np.float32)


def measured_means(
    path: str, stamp: object, identity: object, ion: int, pixels: int, denoised: bool
) -> NDArray[np.float32]:
    """Means over squares of ``pixels`` measured pixels, of those that were measured; NaN where none was."""
    result = same(path, identity)
    image = result._group["denoised"][ion] if denoised else measured_image(path, ion)
    image = np.where(result.mask, np.asarray(image, np.float64), np.nan)
    ny, nx = image.shape
    padded = np.pad(image, ((0, -ny % pixels), (0, -nx % pixels)), constant_values=np.nan)
    squares = padded.reshape(-(-ny // pixels), pixels, -(-nx // pixels), pixels)
    known = np.isfinite(squares)
    count = known.sum((1, 3))
    total = np.where(known, squares, 0.0).sum((1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def variance_block(*, path: str, identity: object, ion: int, level: int, block_info: Any = None) -> NDArray[np.float64]:
    """One block of the square of `Result.uncertainty`: at level 0's pixels, for pixels of the given level."""
    result = same(path, identity)
    f, cells = result.factor, window(block_info, result.factor)
    stamp = stamp_of(path)
    decoder = _decoder(path, stamp, ion)
    model = NoiseModel.of_row(np.asarray(result._group["uncertainty"]["noise_model"][ion]))
    intensity = np.maximum(decoder.window(cells, None), 0.0)
    return hide(
        model.variance(intensity, expand(spread(decoder.cells, cells), f, "linear"), f / 2**level), result, cells
    )


def spread(image: NDArray[np.float64], cells: Cells) -> NDArray[np.float64]:
    """`local_variance` of some measured pixels and one around them (h + 2, w + 2), edges repeated as in the whole."""
    begin, end = (cells.i0, cells.j0), (cells.i1, cells.j1)
    # Neighbours of those around are two pixels away; where the section ends, there are none.
    low = [max(0, b - 2) for b in begin]
    window = tuple(slice(a, min(n, e + 2)) for a, e, n in zip(low, end, image.shape, strict=True))
    around = local_variance(image[window])
    inner = tuple(
        slice(max(0, b - 1) - a, min(n, e + 1) - a) for a, b, e, n in zip(low, begin, end, image.shape, strict=True)
    )
    edges = [(int(b == 0), int(e == n)) for b, e, n in zip(begin, end, image.shape, strict=True)]
    return np.pad(around[inner], edges, mode="edge")
