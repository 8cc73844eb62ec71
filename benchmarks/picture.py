"""The README's picture, from a finished demo: ``python benchmarks/picture.py demo -o docs/images/demo.png``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import deepfere
from deepfere.phantom import Phantom

ROWS = {"nuclear": "ion that the stain shows\n(nuclear density)", "smooth": "ion that it does not show\n(gradient)"}
COLUMNS = ("stain", "measured", "without the stain", "fused", "truth")
SCALE_UM = 200.0


def picture(demo: Path, out: Path) -> None:
    """Two ions of a demo: stain, measured, without the stain, fused, truth.

    Args:
        demo: Folder of a finished ``deepfere demo``.
        out: PNG to write.
    """
    phantom = Phantom.open(demo / "section")
    fused, plain = deepfere.open(demo / "result.zarr"), deepfere.open(demo / "no-guide.zarr")
    kinds, f = phantom.kinds(), fused.factor
    hidden = np.repeat(np.repeat(~fused.mask, f, 0), f, 1)
    stain = np.asarray(fused.stain()).transpose(1, 2, 0)
    side = fused.grid.pitch_um[1] / f
    figure, axes = plt.subplots(len(ROWS), len(COLUMNS), figsize=(13, 6), layout="constrained")
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#8a8f96")
    for row, (kind, label) in zip(axes, ROWS.items(), strict=True):
        m = kinds.index(kind)
        mz = float(fused.ions["mz"].iloc[int(np.abs(fused.ions["mz"] - phantom.mz()[m]).argmin())])
        truth = np.where(hidden, np.nan, np.asarray(phantom.ions(m), np.float64))
        images: list[NDArray] = [fused.measured(mz), plain.ion(mz).compute(), fused.ion(mz).compute(), truth]
        top = np.nanpercentile(truth, 99.5)
        row[0].imshow(stain)
        row[0].set_ylabel(label)
        for axis, image in zip(row[1:], images, strict=True):
            axis.imshow(image, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title)
    left, bottom = 0.06 * stain.shape[1], 0.94 * stain.shape[0]
    axes[0, 0].plot([left, left + SCALE_UM / side], [bottom, bottom], color="black", lw=3, solid_capstyle="butt")
    axes[0, 0].text(left, bottom - 0.03 * stain.shape[0], f"{SCALE_UM:.0f} µm", va="bottom")
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(out, dpi=100)
    # 256 colours are enough for it, and a third of the size.
    with Image.open(out) as picture:
        picture.convert("RGB").quantize(256).save(out, optimize=True)


def main() -> int:
    """Read the command line."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("demo", type=Path)
    command.add_argument("-o", "--out", type=Path, required=True)
    given = command.parse_args()
    picture(given.demo, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
