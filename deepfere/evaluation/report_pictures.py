"""The report's pictures: which ions, which level, which window; resampled to the page and encoded."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from deepfere.evaluation import figures, metrics
from deepfere.evaluation.report_tables import RANK, number, table_row

LOAD_SIDE_PX = 1200
ZOOM_SIDE_PX = 480


def data_uri(data: bytes, kind: str) -> str:
    """Picture bytes as a data URI; kind is "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def page_level(shape_px: tuple[int, int], levels: int) -> int:
    """The finest level at most `LOAD_SIDE_PX` a side, or the coarsest there is."""
    needed = max(0, math.ceil(math.log2(max(shape_px) / LOAD_SIDE_PX)))
    return min(needed, max(levels, 1) - 1)


def thin(image: Any) -> Any:
    """A lazy (..., h, w) image with rows and columns left out until it is near the page's size."""
    step = -(-max(image.shape[-2:]) // (2 * LOAD_SIDE_PX))
    return image if step <= 1 else image[..., step // 2 :: step, step // 2 :: step]


def pick_ions(ions: pd.DataFrame, count: int = 3) -> tuple[list[int], list[int]]:
    """Row numbers of the most and of the least informed ions, each at most ``count``, best/worst first."""
    rank = ions["informed"].map(RANK).to_numpy(dtype=np.float64)
    score = np.nan_to_num(ions["held_out_r2"].to_numpy(dtype=np.float64), nan=-np.inf)
    order = [int(row) for row in np.lexsort((-score, rank))]
    most = order[: min(count, math.ceil(len(order) / 2))]
    least = order[len(most) :][-count:][::-1]
    return most, least


@dataclass(frozen=True)
class IonImages:
    """One ion's pictures, resampled to the page, and the reconstructed one (`fine`) as it was loaded."""

    row: dict[str, Any]
    fine: NDArray[np.float64]
    top: float
    images: list[tuple[str, NDArray[np.float64]]]
    uncertainty: NDArray[np.float64]
    uncertainty_top: float
    scores: str


def load_ion(
    result: Any, row: dict[str, Any], shape_px: tuple[int, int], truth: Mapping[float, Any] | None = None
) -> IonImages:
    """One ion's pictures of the whole section at the page's resolution."""
    mz = float(row["mz"])
    ny, nx = result.grid.shape_px
    level = page_level((ny * result.factor, nx * result.factor), result.levels)
    measured = np.asarray(result.measured(mz), dtype=np.float64)
    fine = np.asarray(thin(result.ion(mz, level=level)), dtype=np.float64)
    images = [
        ("measured", figures.area_resample(measured, shape_px)),
        ("reconstructed", figures.area_resample(fine, shape_px)),
    ]
    tops = [measured, fine]
    scores = ""
    if truth is not None and mz in truth:
        known = figures.area_resample(np.asarray(thin(truth[mz]), dtype=np.float64), shape_px)
        images.append(("truth", known))
        tops.append(known)
        scores = f"r = {number(metrics.pearson(known, images[1][1]), '.3f')} against the truth"
    spread = np.asarray(thin(result.uncertainty(mz, level=level)), dtype=np.float64)
    return IonImages(
        row,
        fine,
        figures.robust_top(*tops),
        images,
        figures.area_resample(spread, shape_px),
        figures.robust_top(spread),
        scores,
    )


def ion_row(ion: IonImages, shape_px: tuple[int, int]) -> dict[str, Any]:
    """What the template shows for one ion."""
    name = f"m/z {ion.row['mz']:.4f}"
    pictures = [
        {
            "src": data_uri(figures.ion_png(figures.area_resample(image, shape_px), ion.top), "png"),
            "alt": f"{name}, {label}, on a colour scale from 0 to {ion.top:.3g}",
            "label": label,
            "range": (f"{ion.top:.3g}", "ion"),
        }
        for label, image in ion.images
    ]
    spread = figures.ion_png(
        figures.area_resample(ion.uncertainty, shape_px), ion.uncertainty_top, figures.UNCERTAINTY_MAP
    )
    pictures.append(
        {
            "src": data_uri(spread, "png"),
            "alt": f"{name}, uncertainty, on a colour scale from 0 to {ion.uncertainty_top:.3g}",
            "label": "uncertainty (1 s.d.)",
            "range": (f"{ion.uncertainty_top:.3g}", "spread"),
        }
    )
    return {"name": name, "ion": table_row(ion.row), "pictures": pictures, "note": ion.scores}


def zoom_window(result: Any, fine: NDArray[np.float64]) -> tuple[int, int, int, int] | None:
    """The most structured window of an ion, measured pixels (i, j, rows, columns); None if all is shown.

    Structure is the squared gradient of the reconstruction ``fine`` (h, w): where there is most to see.
    """
    ny, nx = result.grid.shape_px
    side = min(max(6, round(min(ny, nx) / 4)), max(2, 800 // result.factor), ny, nx)
    if side * side > 0.5 * ny * nx:
        return None
    if not np.isfinite(fine).any() or min(fine.shape) < 2:
        return None
    slope_y, slope_x = np.gradient(metrics.fill_nearest(fine))
    energy = np.where(np.isfinite(fine), slope_y**2 + slope_x**2, 0.0)
    # Means over every window of side x side measured pixels, by its centre.
    scores = ndimage.uniform_filter(figures.area_resample(energy, (ny, nx)), side, mode="constant")
    first = side // 2
    inner = scores[first : first + ny - side + 1, first : first + nx - side + 1]
    i, j = (int(k) for k in np.unravel_index(int(np.argmax(inner)), inner.shape))
    return i, j, side, side


def zoom(result: Any, ion: IonImages) -> dict[str, Any] | None:
    """The most structured window of one ion at full resolution."""
    mz, f = float(ion.row["mz"]), int(result.factor)
    window = zoom_window(result, ion.fine)
    if window is None:
        return None
    i, j, h, w = window
    pitch = result.grid.pitch_um
    extent = h * pitch[0], w * pitch[1]
    shape = figures.fit_shape(extent, ZOOM_SIDE_PX)
    fine = (slice(i * f, (i + h) * f), slice(j * f, (j + w) * f))
    measured = np.asarray(result.measured(mz)[i : i + h, j : j + w], dtype=np.float64)
    sharp = np.asarray(result.ion(mz, level=0)[fine], dtype=np.float64)
    spread = np.asarray(result.uncertainty(mz)[fine], dtype=np.float64)
    stain = result.stain(level=0)
    tops = figures.robust_top(measured, sharp), figures.robust_top(spread)
    images = [("measured", measured), ("reconstructed", sharp)]
    shown = IonImages(ion.row, sharp, tops[0], images, spread, tops[1], "")
    ny, nx = result.grid.shape_px
    panel = ion_row(shown, shape)
    if stain is not None:
        window_rgb = np.moveaxis(np.asarray(stain[(slice(None), *fine)]), 0, -1)
        photo = figures.photo_jpeg(figures.resample_photo(window_rgb, shape))
        panel["pictures"].insert(
            0, {"src": data_uri(photo, "jpeg"), "alt": "the stain in the same window", "label": "stain"}
        )
    panel["frame"] = frame_of(extent, shape)
    panel["box"] = {"top": 100 * i / ny, "left": 100 * j / nx, "height": 100 * h / ny, "width": 100 * w / nx}
    rows, columns = (f"{a * p:.0f}–{(a + n) * p:.0f}" for a, n, p in zip((i, j), (h, w), pitch, strict=True))
    panel["where"] = f"y {rows} µm, x {columns} µm"
    return panel


def frame_of(extent_um: tuple[float, float], shape_px: tuple[int, int]) -> dict[str, Any]:
    """Aspect and scale bar of pictures that show ``extent_um``."""
    bar = figures.scale_bar_um(extent_um[1])
    return {
        "aspect": f"{shape_px[1]} / {shape_px[0]}",
        "bar_percent": round(100 * bar / extent_um[1], 3),
        "bar": figures.length_text(bar),
    }
