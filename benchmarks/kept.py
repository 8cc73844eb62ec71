"""Images of the published model that are computed once and kept: its training takes longer than all other methods.

Kept are the image averaged to the case's grid (``kept/NAME.npy``) and what it was made from (``kept/NAME.json``), with
a hash. An image whose hash does not fit any more is not used, nor one of a section that is found elsewhere on the slide
now.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from common import machine
from numpy.typing import NDArray

from deepfere.config import Config, digest, load_config
from deepfere.frame import Alignment, apart_px
from deepfere.measured.operator import cell_means
from deepfere.measured.store import open_measured
from deepfere.measured.writer import write_measured
from deepfere.model import paper
from deepfere.pipeline import fuse
from deepfere.readers.digest import content_digest
from deepfere.reconstruction.result import Result

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent / "kept"
APART_PX = 0.1
"""Measured pixels (median) by which the alignment may have moved since."""
REPORT_S = 60.0


@dataclass(frozen=True)
class Published:
    """One ion of one case, as the published model is run on it.

    Attributes:
        case: Name of the case.
        mz: The ion.
        factor: Magnification that it is trained at: a whole multiple of the case's, averaged afterwards.
    """

    case: str
    mz: float
    factor: int

    @property
    def image(self) -> Path:
        """Where the averaged image is kept."""
        return FOLDER / f"paper-{self.case}.npy"

    @property
    def about(self) -> Path:
        """Where is kept what it was made from."""
        return self.image.with_suffix(".json")


# At the magnification of the published example: 320 x 288 and 160 x 144 pixels.
PUBLISHED = {p.case: p for p in (Published("example-x2", 505.0, 16), Published("example-x4", 505.0, 16))}


def preset(seed: int = 0) -> Config:
    """The settings of the kept runs: those of ``configs/paper.yaml``."""
    return load_config(ROOT / "configs" / "paper.yaml", [f"seed={seed}", "tracking.uri=none"])


def code_digest(source: str) -> str:
    """Hash of what a module does: comments, docstrings and layout left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def model_digest() -> str:
    """Hash of the published model's code."""
    return code_digest(Path(paper.__file__).read_text())


def ion_of(case: Case, one: Published) -> NDArray[np.float32]:
    """The ion (ny, nx) as the case measured it."""
    measured = open_measured(case.msi)
    row = int(np.abs(np.asarray(measured.mz) - one.mz).argmin())
    return np.asarray(measured.cube()[row], np.float32)


def hash_of(case: Case, one: Published, config: Config, alignment: Alignment) -> str:
    """Hash of inputs, preset, seed and the model's code."""
    told = config.resolved()
    settings = {name: told[name] for name in ("seed", "paper")} | {"tier": told["model"]["tier"]}
    place = {key: value for key, value in alignment.to_dict().items() if key != "evidence"}
    ion = np.ascontiguousarray(ion_of(case, one))
    parts = [hashlib.sha256(ion.tobytes()).hexdigest(), list(ion.shape), content_digest(case.slide), case.slide_mpp_um]
    return digest([parts, one.factor, settings, place, model_digest()])


def compute(case: Case, one: Published, alignment: Alignment, folder: Path) -> None:
    """Run the published model on a case's ion and keep what comes out. Finished work in ``folder`` is taken as it is.

    Args:
        case: The case.
        one: Which ion, and at which magnification.
        alignment: Where the section lies.
        folder: Where files and the result go.
    """
    config = preset()
    measured = open_measured(case.msi)
    msi, place = folder / f"{case.name}-ion.zarr", folder / f"{case.name}-paper-alignment.json"
    mask = np.asarray(measured.mask)
    write_measured(msi, np.nan_to_num(ion_of(case, one))[None], mask, [one.mz], measured.grid.pitch_um, overwrite=True)
    alignment.save(place)
    tell = _teller(f"{case.name}: published model")
    target = folder / f"{case.name}-paper.zarr"
    result = fuse(
        msi,
        case.slide,
        target,
        factor=one.factor,
        config=config,
        alignment=place,
        slide_mpp_um=case.slide_mpp_um,
        progress=tell,
    )
    image = np.asarray(result.ion(one.mz).compute(scheduler="threads"), np.float64)
    provenance = result.provenance
    about = {
        "case": case.name,
        "mz": one.mz,
        "factor": one.factor,
        "pixels": list(image.shape),
        "hash": hash_of(case, one, config, alignment),
        "code": model_digest(),
        "config": {name: config.resolved()[name] for name in ("seed", "paper")},
        "model": provenance["model"],
        "consistency": float(result.ions["consistency"].iloc[0]),
        "seconds": provenance["timings_s"],
        "threads": config.paper.threads,
        "date": date.today().isoformat(),
        "machine": machine(),
        "alignment": alignment.to_dict(),
    }
    FOLDER.mkdir(exist_ok=True)
    np.save(one.image, cell_means(image, one.factor // case.factor).astype(np.float32))
    one.about.write_text(json.dumps(about, indent=1) + "\n")


def _teller(what: str) -> Callable[[str, float], None]:
    """Progress on standard error once a minute, with the time that is left."""
    began, told = time.perf_counter(), -np.inf
    at: float | None = None

    def tell(stage: str, share: float) -> None:
        nonlocal told, at, began
        now = time.perf_counter()
        if stage != "learn":
            return
        if at is None:
            began, at = now, share
        if now - told >= REPORT_S and share > at:
            left = (now - began) / (share - at) * (1 - share)
            print(f"  {what}: {100 * share:.0f} %, {left / 60:.0f} min left", file=sys.stderr, flush=True)
            told = now

    return tell


def kept_image(case: Case, found: Result) -> tuple[NDArray[np.float64] | None, str]:
    """The published model's images (M, H, W) of a case, NaN for ions that it was not run on; or None, and why.

    Args:
        case: The case.
        found: A result of it at the alignment that is found now.
    """
    one, again = PUBLISHED[case.name], "(--recompute-paper)"
    if not (one.image.exists() and one.about.exists()):
        return None, f"paper: no image is kept {again}"
    about: dict[str, Any] = json.loads(one.about.read_text())
    alignment = Alignment.from_dict(about["alignment"])
    if about["hash"] != hash_of(case, one, preset(), alignment):
        return None, f"paper: the kept image is stale: inputs, preset or code have changed {again}"
    assert found.alignment is not None
    apart = apart_px(alignment, found.alignment, found.grid, found.mask)
    if apart > APART_PX:
        return None, f"paper: the kept image is stale: the alignment has moved by {apart:.2f} measured pixels {again}"
    image = np.asarray(np.load(one.image), np.float64)
    out = np.full(case.truth.shape, np.nan)
    out[int(np.abs(case.mz - one.mz).argmin())] = image[: out.shape[1], : out.shape[2]]
    return out, describe(about)


def describe(about: dict[str, Any]) -> str:
    """A kept image in words."""
    (height, width), threads = about["pixels"], about["threads"]
    iterations, minutes = about["model"]["notes"]["iterations"], about["seconds"]["learn"] / 60
    return (
        f"paper: kept from {about['date']} (hash {about['hash'][:12]}): m/z {about['mz']:g} alone, {height} x {width} "
        f"pixels, averaged; {iterations} iterations in {minutes:.0f} min on {threads} "
        f"thread{'s' if threads > 1 else ''} of a machine with other work; at its own resolution "
        f"{100 * about['consistency']:.0f} % of the maximum off the measurement"
    )
