"""The cases of the fidelity benchmark, as the files that a user would have, and what is true about them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.evaluation.metrics import degrade
from deepfere.frame import Alignment
from deepfere.measured.store import open_measured
from deepfere.measured.writer import write_measured
from deepfere.phantom import Phantom, PhantomSpec, write_phantom

BLADDER_PITCH_UM, TRUTH_PITCH_UM = 80.0, 10.0
EXAMPLE_PITCH_UM, EXAMPLE_MPP_UM = 100.0, 5.2
EXAMPLE_MZ = (101.0, 102.0, 103.0, 505.0)
"""The example's file gives no m/z: three stand for the embedding's channels, then the ion."""
TISSUE_SUM = 0.05
PRESENT = 0.3
"""Ions count where more than this share of the truth's pixels are not zero."""


class AbsentDataError(InputError):
    """The real data of a case are not on this machine."""


@dataclass(frozen=True)
class Case:
    """One reconstruction with a known answer.

    Attributes:
        name: For tables and folders.
        msi: The measurement: an imzML, or an ingested cube.
        slide: The stained picture.
        factor: f.
        truth: (M, H, W) float64 on the section's high-resolution grid.
        mz: (M,) of the truth's images.
        inside: (H, W) high-resolution pixels that are scored.
        slide_mpp_um: Pixel size of the picture where its file does not state it.
        labels: (M,) kind or name of each image.
        alignment: The true one, where it is known.
    """

    name: str
    msi: Path
    slide: Path
    factor: int
    truth: NDArray[np.float64]
    mz: NDArray[np.float64]
    inside: NDArray[np.bool_]
    slide_mpp_um: float | None = None
    labels: list[str] = field(default_factory=list)
    alignment: Alignment | None = None

    def given(self) -> dict[str, Any]:
        """What a user must tell besides the files."""
        return {} if self.slide_mpp_um is None else {"slide_mpp_um": self.slide_mpp_um}


def real_data(*parts: str) -> Path:
    """Path of a real file under ``../shared/data`` or DEEPFERE_REAL_DATA.

    Raises:
        AbsentDataError: It is not there.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("DEEPFERE_REAL_DATA", default)).joinpath(*parts)
    if not path.exists():
        raise AbsentDataError("the real data of this case are absent", where=path, remedy="set DEEPFERE_REAL_DATA")
    return path


def repeat(mask: NDArray[Any], factor: int) -> NDArray[Any]:
    """Measured pixels (ny, nx) on the high-resolution grid."""
    return np.repeat(np.repeat(mask, factor, 0), factor, 1)


def present_ions(case: Case) -> list[int]:
    """Ions that are not zero in more than `PRESENT` of the truth's pixels."""
    return [m for m, t in enumerate(case.truth) if (t[case.inside] > 0).mean() > PRESENT]


def phantom_case(folder: Path, spec: PhantomSpec) -> Case:
    """A generated section with its truth (written once per folder)."""
    name = f"phantom-{spec.seed}" + ("" if spec.counts == PhantomSpec().counts else f"-{spec.counts:g}-counts")
    source = folder / name
    phantom = Phantom.open(source) if (source / "truth").exists() else write_phantom(source, spec)
    if phantom.spec != spec:
        phantom = write_phantom(source, spec, overwrite=True)
    truth = np.stack([phantom.ions(m) for m in range(len(phantom.mz()))]).astype(np.float64)
    return Case(
        name,
        phantom.imzml,
        phantom.slide,
        spec.factor,
        truth,
        phantom.mz(),
        repeat(phantom.mask(), spec.factor),
        labels=phantom.kinds(),
        alignment=phantom.alignment(),
    )


def bladder_case(folder: Path, factor: int) -> Case:
    """The bladder at 80 um (factor 8) or averaged once more to 160 um (factor 16), truth at 10 um.

    The truth is cropped to whole measured pixels; its ions are those of the measurement, by m/z.
    """
    msi = real_data("bladder", "bladder_80um.imzML")
    ratio = int(factor * TRUTH_PITCH_UM / BLADDER_PITCH_UM)
    with np.load(real_data("bladder", "bladder_10um.npz")) as data:
        truth, mz = data["cube"].astype(np.float64), data["mz"].astype(np.float64)
    if ratio > 1:
        fine, msi = msi, folder / f"bladder-{factor}.zarr"
        if not msi.exists():
            from deepfere.measured.ingest import ingest

            cube = ingest(fine, folder / "bladder-80um.zarr", overwrite=True)
            coarse, mask = degrade(cube.cube(), cube.mask, ratio)
            pitch = (cube.grid.pitch_um[0] * ratio, cube.grid.pitch_um[1] * ratio)
            write_measured(msi, np.nan_to_num(coarse), mask, cube.mz, pitch)
        mask = open_measured(msi).mask
    else:
        mask = np.ones([n // factor for n in truth.shape[1:]], bool)
    inside = repeat(mask, factor)
    truth = truth[:, : inside.shape[0], : inside.shape[1]]
    slide = real_data("bladder", "bladder_stain.tif")
    return Case(f"bladder-x{factor}", msi, slide, factor, truth, mz, inside)


def example_cube() -> NDArray[np.float64]:
    """The paper's example: three embedding channels and one ion, (4, 40, 36), 0 to 1."""
    ion = np.loadtxt(real_data("deepfere-example", "mouse_brain_ion505.txt"))
    embedding = np.loadtxt(real_data("deepfere-example", "mouse_brain_umap.txt"))
    return np.concatenate([embedding.T.reshape(3, *ion.shape), ion[None]])


def example_case(folder: Path, ratio: int) -> Case:
    """The paper's example degraded by ``ratio`` (footprint means), truth as measured; 1 = not degraded.

    The files state no sizes: a pitch of 100 um and 5.2 um per pixel of the picture are put in here, and
    the alignment finds the rest. Scored on tissue: embedding sum of the full measurement above 0.05.
    """
    cube = example_cube()
    coarse, mask = degrade(cube, None, ratio)
    msi = folder / f"example-{ratio}.zarr"
    if not msi.exists():
        write_measured(msi, coarse, mask, EXAMPLE_MZ, EXAMPLE_PITCH_UM * ratio)
    shape = [n * ratio for n in mask.shape]
    cube = cube[:, : shape[0], : shape[1]]
    return Case(
        f"example-x{ratio}",
        msi,
        real_data("deepfere-example", "HE.png"),
        ratio,
        cube,
        np.array(EXAMPLE_MZ),
        (cube[:3].sum(0) > TISSUE_SUM) & repeat(mask, ratio),
        slide_mpp_um=EXAMPLE_MPP_UM,
        labels=["embedding", "embedding", "embedding", "ion 505"],
    )
