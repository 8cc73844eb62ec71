"""Tables of pixels by m/z bins as converters write them (AnnData), from a seed, for ``ingest.py``; made in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepfere.store import open_group

CHUNK = 1 << 20


def write_long_table(path: Path, ny: int, nx: int, bins: int, by: str, seed: int = 0) -> None:
    """A table whose image rows are all like the first one; some 0.7 of its values are not zero.

    Args:
        path: The store.
        ny: Image rows.
        nx: Image columns.
        bins: Variables.
        by: "csr", by pixel, or "csc", by variable.
        seed: Of the first row.
    """
    rng = np.random.default_rng(seed)
    row = rng.standard_gamma(1.0, (nx, bins), dtype=np.float32) * 1000
    row[rng.random((nx, bins)) < 0.3] = 0
    pixels, columns = np.nonzero(row)
    if by == "csr":
        indices, data = np.tile(columns.astype(np.int32), ny), np.tile(row[pixels, columns], ny)
        lengths = np.tile(np.bincount(pixels, minlength=nx), ny)
    else:
        starts = np.arange(ny, dtype=np.int32)[:, None] * nx
        parts = [(starts + np.flatnonzero(values).astype(np.int32)).ravel() for values in row.T]
        indices, data = np.concatenate(parts), np.concatenate([np.tile(values[values > 0], ny) for values in row.T])
        lengths = np.array([len(part) for part in parts])
    root = open_group(path, "w")
    size = {"pixel_size_x_um": 10.0, "pixel_size_y_um": 10.0, "pixel_size_units": "micrometers"}
    root.attrs.update({**size, "encoding-type": "anndata", "encoding-version": "0.1.0"})
    arrays = {"obs/x": np.tile(np.arange(nx), ny), "obs/y": np.repeat(np.arange(ny), nx)}
    arrays |= {"var/mz": np.sort(rng.uniform(100, 1000, bins)), "X/indices": indices, "X/data": data}
    arrays["X/indptr"] = np.concatenate([[0], np.cumsum(lengths)])
    for name, values in arrays.items():
        root.create_array(name, data=values, chunks=(min(CHUNK, len(values)),))
    root["X"].attrs.update({"encoding-type": f"{by}_matrix", "shape": [ny * nx, bins]})
