"""The report's sections on what was inferred from the stain, and on the denoised mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from deepfere.evaluation import figures
from deepfere.evaluation.report_pictures import data_uri, page_level, thin
from deepfere.evaluation.report_tables import number

WORTH_TAKING = 0.2
"""Share of an ion's noise that the denoised mode takes out from which the report shows it beside the exact one."""
SHOWN_IONS = 3


def percent(value: Any) -> str:
    """A share from 0 to 1 in per cent."""
    text = number(100 * value if value is not None else None, ".0f")
    return text if text == "–" else f"{text} %"


@dataclass(frozen=True)
class Inferred:
    """Maps of the share that was inferred: its share in words, how many ions have any, (name, share, map) of some."""

    share: str
    ions: int
    maps: list[tuple[str, str, NDArray[np.float64]]]


def load_inferred(result: Any, rows: list[Mapping[str, Any]], shape_px: tuple[int, int]) -> Inferred | None:
    """The maps of all ions together and of the given ones; None if nothing is inferred anywhere.

    Args:
        result: The result.
        rows: Rows of `result.ions`, the most informed first.
        shape_px: Rows and columns of the pictures.
    """
    if not result.inferred_share > 0:
        return None
    ny, nx = result.grid.shape_px
    level = page_level((ny * result.factor, nx * result.factor), result.levels)
    shown = [row for row in rows if row["inferred_share"] > 0][:SHOWN_IONS]
    lazy: list[tuple[str, str, Any]] = [("all ions", percent(result.inferred_share), result.inferred(level=level))]
    for row in shown:
        image = result.inferred(float(row["mz"]), level=level)
        lazy.append((f"m/z {row['mz']:.4f}", percent(row["inferred_share"]), image))
    maps = [
        (name, share, figures.area_resample(np.asarray(thin(image), np.float64), shape_px))
        for name, share, image in lazy
    ]
    return Inferred(percent(result.inferred_share), sum(value > 0 for value in result.ions["inferred_share"]), maps)


def inferred_section(inferred: Inferred, shape_px: tuple[int, int]) -> dict[str, Any]:
    """What the template shows of the maps, on one range, with rows and columns of the pictures."""
    images = [figures.area_resample(image, shape_px) for _, _, image in inferred.maps]
    top = min(1.0, figures.robust_top(*images))
    return {
        "share": inferred.share,
        "ions": inferred.ions,
        "pictures": [
            {
                "src": data_uri(figures.ion_png(image, top, figures.SHARE_MAP), "png"),
                "alt": f"{name}: share inferred from the stain, on a colour scale from 0 to {percent(top)}",
                "label": f"{name} · {share}",
                "range": (percent(top), "share"),
            }
            for (name, share, _), image in zip(inferred.maps, images, strict=True)
        ],
    }


def noisy_ions(ions: pd.DataFrame, count: int = SHOWN_IONS) -> list[int]:
    """Rows of the ions with most noise to take out, one of each class first; none if there is none worth it."""
    share = np.nan_to_num(ions["noise_share"].to_numpy(np.float64), nan=0.0)
    fits = np.isfinite(ions["chi_square"].to_numpy(np.float64))
    order = [int(row) for row in np.argsort(-share, kind="stable") if fits[row] and share[row] >= WORTH_TAKING]
    # Of every class one first: the noisiest are often much alike.
    kinds = list(ions["informed"])
    first = [row for n, row in enumerate(order) if kinds[row] not in {kinds[before] for before in order[:n]}]
    return (first + [row for row in order if row not in first])[:count]


@dataclass(frozen=True)
class Denoised:
    """One ion's pictures, (label, image), as measured, exact and denoised."""

    row: dict[str, Any]
    images: list[tuple[str, NDArray[np.float64]]]


def load_denoised(result: Any, shape_px: tuple[int, int]) -> list[Denoised]:
    """The noisiest ions; none where there is no noise worth taking out.

    Args:
        result: The result.
        shape_px: Rows and columns of the pictures.
    """
    ny, nx = result.grid.shape_px
    level = page_level((ny * result.factor, nx * result.factor), result.levels)
    loaded = []
    for row in result.ions.iloc[noisy_ions(result.ions)].to_dict("records"):
        mz = float(row["mz"])
        images = [("measured", figures.area_resample(result.measured(mz), shape_px))]
        for label, denoised in (("exact", False), ("denoised", True)):
            image = np.asarray(thin(result.ion(mz, level=level, denoised=denoised)), np.float64)
            images.append((label, figures.area_resample(image, shape_px)))
        loaded.append(Denoised(row, images))
    return loaded


def denoised_section(result: Any, loaded: list[Denoised], shape_px: tuple[int, int]) -> dict[str, Any]:
    """What the template shows of the ions, each on a range of its own.

    Args:
        result: The result.
        loaded: From `load_denoised`; some.
        shape_px: Rows and columns of the pictures.
    """
    shown = []
    for one in loaded:
        row, images = one.row, [(label, figures.area_resample(image, shape_px)) for label, image in one.images]
        top = figures.robust_top(*(image for _, image in images))
        name = f"m/z {row['mz']:.4f}"
        shown.append(
            {
                "name": name,
                "text": f"{percent(row['noise_share'])} of the noise taken out, "
                f"reduced chi-square {number(row['chi_square'])}",
                "pictures": [
                    {
                        "src": data_uri(figures.ion_png(image, top), "png"),
                        "alt": f"{name}, {label}, on a colour scale from 0 to {top:.3g}",
                        "label": label,
                        "range": (f"{top:.3g}", "ion"),
                    }
                    for label, image in images
                ],
            }
        )
    return {
        "ions": shown,
        "count": int((result.ions["noise_share"] >= WORTH_TAKING).sum()),
        "least": percent(WORTH_TAKING),
        "best_mz": f"{loaded[0].row['mz']:.4f}",
    }
