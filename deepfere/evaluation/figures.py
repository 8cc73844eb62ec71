"""Pictures of a result: ions, overlays and histograms as arrays, PNG bytes or matplotlib figures.

The report is built from the plain pictures (its labels and scale bars are HTML, so that they follow the
reader's theme); `ion_panel` and `r2_histogram` are complete figures, for logging to MLflow or for slides.
Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import sparse

from deepfere.errors import InputError
from deepfere.frame import Points, SectionGrid

RGB = NDArray[np.uint8]

ION_MAP = "viridis"
UNCERTAINTY_MAP = "magma"
SHARE_MAP = "cividis"
NOT_MEASURED = (0x8A, 0x8F, 0x96)
"""Grey of pixels that were not measured, readable on a light and on a dark page."""
_GREY = "#8a8f96"

CLASSES = ("stain-informed", "partly", "smooth")
CLASS_COLOURS = {"stain-informed": "#1b9e77", "partly": "#d98a1f", "smooth": "#8a8f96"}


# --- resampling and ranges ---------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _overlaps(n_in: int, n_out: int) -> Any:
    """Sparse (n_out, n_in) share of each input cell that lies in each output cell."""
    edges = np.linspace(0.0, n_in, n_out + 1)
    cells = np.arange(n_in, dtype=np.float64)
    low = np.maximum(edges[:-1, None], cells)
    high = np.minimum(edges[1:, None], cells + 1)
    return sparse.csr_array(np.maximum(high - low, 0.0))


def _both(rows: Any, columns: Any, plane: NDArray[np.float64]) -> NDArray[np.float64]:
    return (columns @ (rows @ plane).T).T


def area_resample(image: ArrayLike, shape_px: tuple[int, int]) -> NDArray[np.float64]:
    """Resample to another shape by area averages: shrinking averages, enlarging shows pixels as squares.

    NaN pixels take no part; an output pixel that is mostly NaN is NaN.

    Args:
        image: (h, w) or (h, w, channels).
        shape_px: The wanted rows and columns.
    """
    values = np.asarray(image, dtype=np.float64)
    if values.shape[:2] == tuple(shape_px):
        return values
    planes = values[..., None] if values.ndim == 2 else values
    rows, columns = _overlaps(planes.shape[0], shape_px[0]), _overlaps(planes.shape[1], shape_px[1])
    full = np.outer(rows.sum(axis=1), columns.sum(axis=1))
    out = np.empty((*shape_px, planes.shape[2]))
    for channel in range(planes.shape[2]):
        plane = planes[..., channel]
        valid = np.isfinite(plane)
        weight = full if valid.all() else _both(rows, columns, valid.astype(np.float64))
        total = _both(rows, columns, np.where(valid, plane, 0.0))
        covered = weight >= 0.5 * full
        out[..., channel] = np.where(covered, total / np.maximum(weight, 1e-12), np.nan)
    return out[..., 0] if values.ndim == 2 else out


def fit_shape(extent_um: tuple[float, float], side_px: int) -> tuple[int, int]:
    """Rows and columns of a picture of this extent whose longer side is ``side_px``, pixels square."""
    longest = max(extent_um)
    return max(8, round(extent_um[0] / longest * side_px)), max(8, round(extent_um[1] / longest * side_px))


def robust_top(*images: ArrayLike, percent: float = 99.5) -> float:
    """The largest of the images' ``percent`` percentiles: the top of their shared range, always > 0."""
    tops = []
    for image in images:
        values = np.asarray(image, dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            top = float(np.percentile(values, percent))
            # An ion seen in a handful of pixels has a percentile of zero.
            tops.append(top if top > 0 else float(values.max()))
    best = max(tops, default=0.0)
    return best if best > 0 else 1.0


def scale_bar_um(width_um: float) -> float:
    """A round length (1, 2 or 5 times a power of ten), at most a quarter of the width."""
    target = width_um / 4.0
    if not (np.isfinite(target) and target > 0):
        raise InputError(f"a picture {width_um} um wide has no scale bar", remedy="give a positive width")
    power = 10.0 ** np.floor(np.log10(target))
    return float(max(step * power for step in (1.0, 2.0, 5.0) if step * power <= target * (1 + 1e-9)))


def length_text(length_um: float) -> str:
    """A length in words: ``200 µm``, ``2 mm``."""
    return f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"


# --- pictures ----------------------------------------------------------------------------------------


def _indices(values: NDArray[np.float64], top: float) -> RGB:
    """0..254 over [0, top], 255 where not measured."""
    level = np.clip(np.nan_to_num(values, nan=0.0) / top, 0.0, 1.0)
    return np.where(np.isfinite(values), np.rint(level * 254), 255).astype(np.uint8)


def _palette(colour_map: str) -> RGB:
    """(256, 3): 255 colours of the map, then the grey of pixels that were not measured."""
    colours = matplotlib.colormaps[colour_map](np.linspace(0, 1, 255))[:, :3]
    return np.vstack([np.rint(colours * 255), NOT_MEASURED]).astype(np.uint8)


def colourise(image: ArrayLike, top: float, colour_map: str = ION_MAP) -> RGB:
    """(h, w, 3) uint8 colours of an image over [0, top]; pixels that were not measured are grey."""
    return _palette(colour_map)[_indices(np.asarray(image, dtype=np.float64), top)]


def ion_png(image: ArrayLike, top: float, colour_map: str = ION_MAP) -> bytes:
    """A small palette PNG of an image over [0, top]; pixels that were not measured are transparent."""
    picture = Image.fromarray(_indices(np.asarray(image, dtype=np.float64), top))
    picture.putpalette(_palette(colour_map).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=255)
    return buffer.getvalue()


def photo_jpeg(picture: ArrayLike, quality: int = 86) -> bytes:
    """JPEG of a (h, w, 3) uint8 picture: stains have no flat colours for a PNG to save on."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture, dtype=np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def resample_photo(picture: ArrayLike, shape_px: tuple[int, int]) -> RGB:
    """A (h, w, 3) uint8 picture at another shape."""
    return np.clip(np.rint(area_resample(picture, shape_px)), 0, 255).astype(np.uint8)


def checkerboard(first: RGB, second: RGB, mask: NDArray[np.bool_], squares: int = 9) -> RGB:
    """Alternating squares of two pictures of one shape; the first alone outside the mask."""
    h, w = first.shape[:2]
    side = max(1, round(max(h, w) / squares))
    odd = (np.arange(h)[:, None] // side + np.arange(w)[None] // side) % 2 == 1
    return np.where((odd & mask)[..., None], second, first).astype(np.uint8)


# --- outlines ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A polyline to draw on a picture.

    Attributes:
        points_um: (N, 2) float64 micrometres (y, x), in the picture's frame.
        colour: Any matplotlib colour.
        dashed: Drawn with dashes.
    """

    points_um: Points
    colour: str
    dashed: bool = False


def otsu_threshold(values: ArrayLike) -> float:
    """The threshold that separates two classes best (Otsu, IEEE Trans. SMC 9, 1979, 62), 256 bins."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size or finite.min() == finite.max():
        return float("nan")
    counts, edges = np.histogram(finite, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    means = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    between = below * above * (means[0] - means[1]) ** 2
    # Over an empty valley every threshold is as good: take its middle.
    return float(edges[1:-1][between >= between.max() * (1 - 1e-12)].mean())


def contours_um(image: ArrayLike, level: float, grid: SectionGrid) -> list[Points]:
    """Closed contours of a measured image, (N, 2) section micrometres (y, x), NaN taken as zero."""
    from contourpy import contour_generator

    padded = np.pad(np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0), 1)
    y = (np.arange(padded.shape[0]) - 0.5) * grid.pitch_um[0]
    x = (np.arange(padded.shape[1]) - 0.5) * grid.pitch_um[1]
    lines: Any = contour_generator(x, y, padded).lines(level)
    # Specks of a pixel or two only hide the picture.
    return [np.asarray(line, dtype=np.float64)[:, ::-1] for line in lines if len(line) > 8]


def box_um(grid: SectionGrid, steps: int = 40) -> Points:
    """The section's outer border as a closed polyline, (N, 2) section micrometres (y, x)."""
    h, w = grid.extent_um
    t = np.linspace(0.0, 1.0, steps, endpoint=False)
    zero, one = np.zeros(steps), np.ones(steps)
    y = np.concatenate([zero, t, one, 1 - t, [0.0]]) * h
    x = np.concatenate([t, one, 1 - t, zero, [0.0]]) * w
    return np.stack([y, x], axis=1)


def overlay(
    picture: RGB,
    mpp_um: tuple[float, float],
    lines: Sequence[Line],
    window_um: tuple[float, float, float, float],
    side_px: int = 900,
) -> RGB:
    """A window of a picture with lines drawn on it, (h, w, 3) uint8.

    Args:
        picture: (h, w, 3) uint8; its first pixel's outer corner is the frame's origin.
        mpp_um: Size of a picture pixel (y, x), micrometres.
        lines: What to draw, in the same frame.
        window_um: y0, x0, y1, x1 of what is shown; parts beyond the picture are grey.
        side_px: Longer side of the output.
    """
    y0, x0, y1, x1 = window_um
    h, w = fit_shape((y1 - y0, x1 - x0), side_px)
    figure = Figure(figsize=(w / 100, h / 100), dpi=100, facecolor=_GREY)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    extent = (0.0, picture.shape[1] * mpp_um[1], picture.shape[0] * mpp_um[0], 0.0)
    axes.imshow(picture, extent=extent, interpolation="bilinear", aspect="auto")
    for line in lines:
        y, x = np.asarray(line.points_um).T
        style = (0, (5, 3)) if line.dashed else "solid"
        axes.plot(x, y, color="black", linewidth=4.5, alpha=0.45)
        axes.plot(x, y, color=line.colour, linewidth=2.4, linestyle=style)
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)
    axes.set_axis_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# --- complete figures --------------------------------------------------------------------------------


def figure_png(figure: Figure, dpi: int = 120) -> bytes:
    """PNG bytes of a figure, drawn with Agg."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def ion_panel(
    images: Sequence[tuple[str, ArrayLike]],
    extent_um: tuple[float, float],
    *,
    stain: ArrayLike | None = None,
    uncertainty: ArrayLike | None = None,
    title: str = "",
) -> Figure:
    """One ion's images in a row, on one colour range, with the stain first and the uncertainty last.

    Args:
        images: (label, (h, w) image) pairs, NaN = not measured; all cover ``extent_um``, at any
            resolution.
        extent_um: Size (y, x) of what they show, micrometres.
        stain: (h, w, 3) uint8.
        uncertainty: (h, w), one standard deviation; drawn on its own range.
        title: The figure's title.
    """
    top = robust_top(*(image for _, image in images))
    count = len(images) + (stain is not None) + (uncertainty is not None)
    aspect = min(max(extent_um[0] / extent_um[1], 0.3), 3.0)
    figure = Figure(figsize=(3.2 * count, 3.0 * aspect + 0.9), layout="constrained", facecolor="white")
    axes = figure.subplots(1, count, squeeze=False)[0]
    shown = iter(axes)
    extent = (0.0, extent_um[1], extent_um[0], 0.0)
    if stain is not None:
        ax = next(shown)
        ax.imshow(np.asarray(stain), extent=extent, interpolation="bilinear")
        ax.set_title("stain", fontsize=10)
    panels = [(label, image, top, ION_MAP) for label, image in images]
    if uncertainty is not None:
        panels.append(("uncertainty (1 s.d.)", uncertainty, robust_top(uncertainty), UNCERTAINTY_MAP))
    for label, image, limit, name in panels:
        ax = next(shown)
        colours = matplotlib.colormaps[name].with_extremes(bad=_GREY)
        values = np.ma.masked_invalid(np.asarray(image, dtype=np.float64))
        drawn = ax.imshow(values, extent=extent, cmap=colours, vmin=0, vmax=limit, interpolation="nearest")
        figure.colorbar(drawn, ax=ax, shrink=0.8, pad=0.02)
        ax.set_title(label, fontsize=10)
    bar = scale_bar_um(extent_um[1])
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
        y, x = 0.94 * extent_um[0], 0.04 * extent_um[1]
        ax.plot([x, x + bar], [y, y], color="black", linewidth=5, solid_capstyle="butt")
        ax.plot([x, x + bar], [y, y], color="white", linewidth=3, solid_capstyle="butt")
    axes[0].set_xlabel(f"bar {length_text(bar)}", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def r2_histogram(
    held_out_r2: ArrayLike,
    informed: Sequence[str],
    null_r2: ArrayLike | None = None,
    *,
    dark: bool = False,
) -> Figure:
    """Histogram of the ions' held-out R², stacked by class, with that of wrong stains as a line.

    Args:
        held_out_r2: (M,); values below -0.2 are counted in the first bin.
        informed: (M,) classes.
        null_r2: (M,) the same score with deliberately wrong stains.
        dark: Light text, for a dark page; the background is transparent either way.
    """
    ink = "#d6dae0" if dark else "#2b3038"
    edges = np.linspace(-0.2, 1.0, 37)
    scores = np.clip(np.asarray(held_out_r2, dtype=np.float64), edges[0], edges[-1])
    kinds = np.asarray(informed, dtype=object)
    finite = np.isfinite(scores)
    figure = Figure(figsize=(7.2, 2.7), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    present = [kind for kind in CLASSES if (kinds == kind).any()]
    if present:
        axes.hist(
            [scores[finite & (kinds == kind)] for kind in present],
            bins=list(edges),
            stacked=True,
            color=[CLASS_COLOURS[kind] for kind in present],
            label=present,
        )
    if null_r2 is not None:
        wrong = np.asarray(null_r2, dtype=np.float64)
        wrong = np.clip(wrong[np.isfinite(wrong)], edges[0], edges[-1])
        if wrong.size:
            counts = np.histogram(wrong, edges)[0]
            axes.stairs(counts, edges, color=ink, linewidth=1.3, linestyle=(0, (4, 2)), label="wrong stains")
    axes.set_xlabel("held-out R²", color=ink)
    axes.set_ylabel("ions", color=ink)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=ink)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(ink)
    if present:
        legend_above(axes, ink)
    else:
        axes.set_title("no ion was judged on held-out tissue", color=ink, fontsize=9)
    return figure


def legend_above(axes: Axes, ink: str) -> None:
    """A legend above the axes, in one row: looking for a free place within takes long where there is much to see."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=5,
        frameon=False,
        labelcolor=ink,
        fontsize=9,
        borderaxespad=0.0,
        columnspacing=1.2,
    )
