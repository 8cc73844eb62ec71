"""The published model on its own example, on a GPU: ``python benchmarks/paper_gpu.py [CASE ...] [--json FILE]``.

What takes hours on a CPU. The section at full size (40 x 36 measured pixels at 16 times, 640 x 576): the single ion
(`ion`) and the three channels of the embedding as channels of the model (`embedding`); how far its images, averaged
back, are from the measurement, beside plain interpolation. And the degraded cases of ``fidelity.py`` (`x2`, `x4`). Each
from several seeds: what one kept run says is then known to be the rule or not. Needs the real data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import EXAMPLE_PITCH_UM, example_case, example_cube
from kept import FOLDER, preset
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from deepfere.evaluation.metrics import psnr
from deepfere.frame import Alignment, SectionGrid
from deepfere.measured.operator import cell_means
from deepfere.model import paper
from deepfere.model.features import PLANES
from deepfere.model.guide import Cells, GuideSpec, stain_of
from deepfere.model.paper import Recipe, Training
from deepfere.pipeline.paper import recipe

FACTOR = 16
SEEDS = 5
GPU_CHUNK = 400
"""Windows of the correlation loss at a time."""
DEGRADED = {"x2": 2, "x4": 4}
FULL = {"ion": slice(3, None), "embedding": slice(3)}
"""Channels of the example's cube."""


def alignment_of(ratio: int) -> Alignment:
    """Where the kept image of a degraded case has its section: found blind, in micrometres of the whole section."""
    return Alignment.from_dict(json.loads((FOLDER / f"paper-example-x{ratio}.json").read_text())["alignment"])


def stain_at(folder: Path, ratio: int, alignment: Alignment) -> NDArray[np.float32]:
    """Colours (3, H, W) from 0 to 1 of the example's slide on the grid of a case."""
    case = example_case(folder, ratio)
    mpp = float(case.slide_mpp_um or 0.0)
    block = max(1, int(EXAMPLE_PITCH_UM * ratio / FACTOR / 2 / mpp))  # as the pipeline's planes
    with Image.open(case.slide) as picture:
        fine = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    colours = np.rint(cell_means(fine[:, : fine.shape[1] // block * block, : fine.shape[2] // block * block], block))
    planes = np.zeros((len(PLANES), *colours.shape[1:]), np.uint8)
    planes[:3], planes[-1] = colours, 255
    shape = tuple(n // ratio for n in example_cube().shape[1:])
    grid = SectionGrid((shape[0], shape[1]), (EXAMPLE_PITCH_UM * ratio,) * 2)
    spec = GuideSpec(grid, FACTOR, (mpp * block, mpp * block), planes.shape[1:], (255.0, 255.0, 255.0), 0.0)
    whole = Cells(0, shape[0], 0, shape[1])
    stain, _ = stain_of(spec, lambda r0, r1, c0, c1: planes[:, r0:r1, c0:c1].copy(), alignment, whole)
    return (stain / 255).numpy()


def trained(cells: NDArray[Any], stain: NDArray[np.float32], how: Recipe, device: str, what: str) -> tuple[Any, float]:
    """The images (K, H, W), in units of the cells, and the seconds that they took."""
    low, span = cells.min((1, 2))[:, None, None], np.ptp(cells, (1, 2))[:, None, None]
    training = Training(((cells - low) / span).astype(np.float32), stain, how, device)
    began = time.perf_counter()
    while training.done < how.total:
        training.step()
        if training.done % 500 == 0:
            took = time.perf_counter() - began
            print(f"{what}: {training.done} of {how.total}, {took:.0f} s", flush=True)
    return low + span * training.images(), time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join([*DEGRADED, *FULL])}; else all of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few iterations: to see that it runs")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--tf32", action="store_true", help="convolutions as cuDNN rounds them by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device and figures")
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - {*DEGRADED, *FULL}:
        parser.error(f"no case {', '.join(sorted(unknown))}")
    cases = given.cases or ([*DEGRADED, "ion"] if given.quick else [*DEGRADED, *FULL])
    torch.backends.cudnn.allow_tf32 = given.tf32
    if given.device == "cuda":
        # The same sums in few launches; the model's own choice fits a processor's caches.
        paper._Distances.CHUNK = GPU_CHUNK
    config = preset()
    if given.quick:
        few = {"iterations": 3, "warm_up": 0}
        told = config.paper.model_copy(update={"ion": config.paper.ion.model_copy(update=few)})
        config = config.model_copy(update={"paper": told})
    name = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    out: dict[str, Any] = {"device": name, "torch": torch.__version__, "rows": []}
    cube = example_cube()
    with tempfile.TemporaryDirectory(prefix="deepfere-paper-") as scratch:
        folder = Path(scratch)
        for mode, seed in itertools.product(cases, range(1 if given.quick else given.seeds)):
            ratio = DEGRADED.get(mode, 1)
            stain = stain_at(folder, ratio, alignment_of(max(ratio, 2)))
            if mode in DEGRADED:
                case = example_case(folder, ratio)
                truth, tissue = case.truth[3], np.asarray(case.inside)
                cells = cell_means(truth, ratio)[None]
            else:
                cells = cube[FULL[mode]]
            how = recipe(config.model_copy(update={"seed": seed}), len(cells))
            images, took_s = trained(cells, stain, how, given.device, f"{mode}, seed {seed}")
            row = {"case": mode, "seed": seed, "pixels": list(images.shape[1:]), "iterations": how.total}
            row |= {"seconds": took_s, "spread": float((images.std((1, 2)) / cells.std((1, 2))).min())}
            if mode in DEGRADED:
                row["psnr_db"] = psnr(truth, cell_means(images[0], FACTOR // ratio), tissue)
            else:
                plain = np.stack([ndimage.zoom(c, FACTOR, order=3, mode="nearest", grid_mode=True) for c in cells])
                row["consistency_db"] = psnr(cells, cell_means(images, FACTOR))
                row["cubic_consistency_db"] = psnr(cells, cell_means(plain, FACTOR))
            out["rows"].append(row)
            print(row, flush=True)
            if given.json:
                given.json.write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
