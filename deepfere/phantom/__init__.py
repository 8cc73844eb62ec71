"""Writes a real imzML and a real pyramidal H&E slide of one invented tissue, with the truth.

The tissue is a function of section micrometres, so everything agrees by construction: the slide is
that tissue seen through the true alignment, the measurement is the exact mean of the true ions over
each pixel's footprint, then counting noise.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.phantom.spec import KINDS, PhantomSpec, draw_placement

if TYPE_CHECKING:
    from deepfere.phantom.tissue import Tissue

__all__ = ["KINDS", "Phantom", "PhantomSpec", "write_phantom"]

_NAMES = ("section.imzML", "section.ibd", "slide.tiff", "truth")
_POINTS_AT_ONCE = 1_000_000  # bounds the memory of a band of truth

#: Called with the stage's name, how much of it is done, and its total.
Progress = Callable[[str, int, int], None]


class Phantom:
    """A phantom on disk: the files a user would have, and what is true about them.

    Args:
        folder: Where `write_phantom` wrote it.

    Attributes:
        folder: That folder.
        imzml: The measurement (its .ibd lies beside it).
        slide: The slide, a pyramidal tiled TIFF.
        truth: Folder of the truth.
        spec: What it was made from.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.imzml, _, self.slide, self.truth = (self.folder / name for name in _NAMES)
        try:
            self._facts = json.loads((self.truth / "phantom.json").read_text())
        except OSError as error:
            raise InputError(
                "holds no phantom", where=folder, remedy="write one with deepfere.phantom.write_phantom"
            ) from error
        self.spec = PhantomSpec.from_dict(self._facts["spec"])

    @classmethod
    def open(cls, folder: str | Path) -> Phantom:
        """The phantom in a folder.

        Raises:
            InputError: The folder holds none.
        """
        return cls(folder)

    def alignment(self) -> Alignment:
        """The true alignment, section micrometres to slide micrometres."""
        return Alignment.load(self.truth / "alignment.json")

    def mz(self) -> NDArray[np.float64]:
        """True m/z of the ions, (M,) float64, ascending."""
        return np.array([ion["mz"] for ion in self._facts["ions"]], dtype=np.float64)

    def kinds(self) -> list[str]:
        """Kind of each ion, one of `KINDS`."""
        return [ion["kind"] for ion in self._facts["ions"]]

    def informed(self) -> list[bool]:
        """Whether the stain explains each ion, at least in part ("twin": all but one border)."""
        return [ion["informed"] for ion in self._facts["ions"]]

    def amplitudes(self) -> NDArray[np.float64]:
        """Intensity at full scale of each ion, (M,) float64: `spec.counts` counts stand for this much."""
        return np.array([ion["amplitude"] for ion in self._facts["ions"]], dtype=np.float64)

    def ions(self, index: int) -> NDArray[np.float32]:
        """True image of one ion before noise, (H, W) float32 on pixels of pitch / factor.

        Its mean over a measured pixel's footprint is the measurement without noise.
        """
        return np.array(np.load(self.truth / "ions.npy", mmap_mode="r")[index])

    def labels(self) -> NDArray[np.int8]:
        """Tissue class at each high-resolution pixel's centre, (H, W) int8; 0 is no tissue."""
        return np.load(self.truth / "labels.npy")

    def class_names(self) -> list[str]:
        """Names of the values of `labels`."""
        return list(self._facts["classes"])

    def mask(self) -> NDArray[np.bool_]:
        """Which measured pixels the file holds, (ny, nx)."""
        return np.load(self.truth / "mask.npy")


def write_phantom(
    folder: str | Path,
    spec: PhantomSpec | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> Phantom:
    """Write ``section.imzML``, ``section.ibd``, ``slide.tiff`` and ``truth/`` into a folder.

    Memory does not grow with the slide. The same spec gives the same bytes.

    Args:
        folder: Made if need be.
        spec: What to write; the default is a section of seconds.
        progress: Called with (stage, done, total) as the work goes on.
        overwrite: Replace a phantom that stands there.

    Raises:
        InputError: One of the files exists and `overwrite` is not set.
    """
    from deepfere.phantom.anatomy import Organ
    from deepfere.phantom.slide import SlidePainter, write_slide
    from deepfere.phantom.tissue import Tissue

    spec = spec if spec is not None else PhantomSpec()
    folder = Path(folder)
    standing = [name for name in _NAMES if (folder / name).exists()]
    if standing and not overwrite:
        raise InputError(
            f"{standing[0]} exists", where=folder, remedy="give another folder, or overwrite=True (--overwrite)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    alignment, slide_shape = draw_placement(spec)
    extent = spec.grid.extent_um
    organ = Organ(extent, min(3.0 * spec.pitch_um, 0.12 * min(extent)), spec.seed)
    tissue = Tissue(organ)
    # Everything is written aside first: what bears a final name is whole.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".phantom-") as scratch:
        work = Path(scratch)
        (work / "truth").mkdir()
        alignment.save(work / "truth" / "alignment.json")
        _write_section(work, spec, tissue, progress)
        painter = SlidePainter(tissue, alignment, slide_shape, spec)
        write_slide(work / "slide.tiff", painter, progress and (lambda done, n: progress("slide", done, n)))
        for name in standing:
            old = folder / name
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for name in _NAMES:
            (work / name).rename(folder / name)
    return Phantom(folder)


def _write_section(work: Path, spec: PhantomSpec, tissue: Tissue, progress: Progress | None) -> None:
    """The truth on the section's grids and the measurement, band by band."""
    from deepfere.phantom.anatomy import CLASSES
    from deepfere.phantom.chemistry import draw_ions, ion_image, window_of
    from deepfere.phantom.measurement import SpectrumWriter, measured_mask

    f, (ny, nx) = spec.factor, spec.shape_px
    fine = spec.grid.refine(f)
    ions = draw_ions(spec, tissue)
    mask = measured_mask(spec, tissue.organ)
    truth = work / "truth"
    np.save(truth / "mask.npy", mask)
    open_npy = np.lib.format.open_memmap
    open_npy(truth / "ions.npy", "w+", np.float32, (len(ions), *fine.shape_px))
    open_npy(truth / "labels.npy", "w+", np.int8, fine.shape_px)
    band = max(1, _POINTS_AT_ONCE // (9 * f * f * nx))
    with SpectrumWriter(work / "section.imzML", spec, ions) as writer:
        for top in range(0, ny, band):
            rows = min(band, ny - top)
            window = window_of(tissue, fine, (top * f, 0), (rows * f, nx * f))
            # Opened anew for each band: what is mapped counts as memory for as long as it is.
            images, labels = (open_npy(truth / name, "r+") for name in ("ions.npy", "labels.npy"))
            labels[top * f : (top + rows) * f] = window.labels
            means = np.empty((len(ions), rows, nx))
            for m, ion in enumerate(ions):
                image = ion_image(ion, window, spec.grid.extent_um)
                images[m, top * f : (top + rows) * f] = image
                means[m] = image.reshape(rows, f, nx, f).mean(axis=(1, 3), dtype=np.float64)
            del images, labels
            for row in range(rows):
                writer.write_row(top + row, means[:, row], mask[top + row])
            if progress is not None:
                progress("section", top + rows, ny)
    facts = {
        "spec": spec.to_dict(),
        "classes": list(CLASSES),
        "ions": [
            {"mz": ion.mz, "kind": ion.kind, "informed": ion.informed, "amplitude": ion.amplitude} for ion in ions
        ],
    }
    (truth / "phantom.json").write_text(json.dumps(facts, indent=1) + "\n")
