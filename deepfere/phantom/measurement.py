"""Measures the truth as an instrument would and writes it as imzML through pyimzML's own writer."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepfere.phantom.anatomy import Organ
from deepfere.phantom.chemistry import Ion
from deepfere.phantom.noise import gradient_noise, salt_of
from deepfere.phantom.spec import PhantomSpec

_PPM = 1e-6


def measured_mask(spec: PhantomSpec, organ: Organ) -> NDArray[np.bool_]:
    """Which pixels the file holds, (ny, nx): the tissue and an irregular margin, less a few.

    Every side of the raster keeps at least one pixel, because readers take the section frame's origin
    from the smallest coordinates they find.
    """
    centres = spec.grid.centres_um()
    depth = organ.depth_um(centres[..., 0], centres[..., 1])
    rough = gradient_noise(centres[..., 0], centres[..., 1], 5.0 * spec.pitch_um, salt_of(spec.seed, "margin"))
    mask = depth > -(1.8 + 0.5 * rough) * spec.pitch_um
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    for image, found in ((mask, rows), (mask.T, cols)):
        # A tongue from the outermost pixels to the border, where the outline does not reach it.
        image[: found[0], image[found[0]]] = True
        image[found[-1] + 1 :, image[found[-1]]] = True
    missing = mask.copy()
    missing[[0, -1]] = False
    missing[:, [0, -1]] = False
    places = np.argwhere(missing)
    number = min(int(np.ceil(spec.missing_fraction * mask.sum())), len(places))
    gone = places[spec.rng(4).permutation(len(places))[:number]]
    mask[gone[:, 0], gone[:, 1]] = False
    return mask


class SpectrumWriter:
    """Writes spectra row by row into one imzML + ibd pair (a context manager).

    Args:
        path: The imzML to write.
        spec: The phantom's spec.
        ions: Its ions, in order of m/z.
    """

    def __init__(self, path: Path, spec: PhantomSpec, ions: list[Ion]) -> None:
        from pyimzml.ImzMLWriter import ImzMLWriter

        self.path = path
        self.spec = spec
        self.mz = np.array([ion.mz for ion in ions])
        self.amplitude = np.array([ion.amplitude for ion in ions])
        self._writer = ImzMLWriter(
            str(path), mz_dtype=np.float64, intensity_dtype=np.float32, mode=spec.mode, polarity="positive"
        )
        # pyimzML draws its uuid at random and names the run after the file's path; a phantom's bytes
        # follow from its spec alone.
        name = uuid.uuid5(uuid.NAMESPACE_URL, "deepfere-phantom:" + json.dumps(spec.to_dict(), sort_keys=True))
        self._writer.run_id = path.stem
        self._writer.uuid = name
        self._writer.ibd.seek(0)
        self._writer.ibd.truncate()
        self._writer.ibd.write(name.bytes)
        self._writer.sha1 = hashlib.sha1(name.bytes)

    def __enter__(self) -> SpectrumWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._writer.ibd.close()
            self._writer.xml.close()
            return
        self._writer.finish()
        _complete_header(self.path, self.spec)

    def write_row(self, row: int, means: NDArray[np.float64], mask: NDArray[np.bool_]) -> None:
        """Measure and write one row of pixels.

        Args:
            row: Which row of the measured grid.
            means: (M, nx) mean of the truth over each pixel, intensity.
            mask: (nx,) which pixels exist.
        """
        for col, spectrum in self._measure(row, means, mask):
            mz, intensity = self.mz, spectrum.astype(np.float32)
            if self.spec.mode == "processed":
                mz, intensity = self._peaks(row, col, intensity)
            self._writer.addSpectrum(mz, intensity, (col + 1, row + 1))

    def _measure(
        self, row: int, means: NDArray[np.float64], mask: NDArray[np.bool_]
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        counts = self.spec.counts
        if counts is not None:
            unit = (self.amplitude / counts)[:, None]
            means = self.spec.rng(5, row).poisson(means / unit) * unit
        for col in np.flatnonzero(mask):
            yield int(col), means[:, col]

    def _peaks(
        self, row: int, col: int, intensity: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """A centroided spectrum: peaks off by a little, none of height zero, some that mean nothing."""
        rng = self.spec.rng(6, row, col)
        jitter = np.clip(rng.normal(0, 0.6, len(self.mz)), -1.9, 1.9) * _PPM
        seen = intensity > 0
        # Chemical noise lies near the borders between ions' parts of the m/z range, clear of every ion.
        number = int(rng.integers(3, 9))
        low, high = 0.985 * self.mz[0], 1.015 * self.mz[-1]
        noise = rng.uniform(low, high, number)
        nearest = np.abs(noise[:, None] - self.mz[None]).min(axis=1) / noise
        noise = noise[nearest > 30 * _PPM]
        if not len(noise) and not seen.any():
            noise = np.array([low])  # a spectrum is never empty
        height = rng.exponential(0.004 * float(np.median(self.amplitude)), len(noise)) + 0.05
        mz = np.concatenate([(self.mz * (1 + jitter))[seen], noise])
        order = np.argsort(mz)
        return mz[order], np.concatenate([intensity[seen], height.astype(np.float32)])[order]


def _complete_header(path: Path, spec: PhantomSpec) -> None:
    """Add what pyimzML leaves out: size of pixels and raster in micrometres, the imaging vocabulary."""
    text = path.read_text()
    rows, cols = spec.shape_px
    entries = (
        ("IMS:1000044", "max dimension x", cols * spec.pitch_um),
        ("IMS:1000045", "max dimension y", rows * spec.pitch_um),
        ("IMS:1000046", "pixel size (x)", spec.pitch_um),
        ("IMS:1000047", "pixel size y", spec.pitch_um),
    )
    lines = "".join(
        f'      <cvParam cvRef="IMS" accession="{accession}" name="{name}" value="{value:g}" '
        'unitCvRef="UO" unitAccession="UO:0000017" unitName="micrometer"/>\n'
        for accession, name, value in entries
    )
    vocabulary = (
        '    <cv uri="https://raw.githubusercontent.com/imzML/imzML/master/imagingMS.obo" '
        'fullName="Mass Spectrometry Imaging Ontology" id="IMS" version="1.1.0"/>\n'
    )
    head, end, tail = text.partition("    </scanSettings>")
    head = head.replace('<cvList count="2">', '<cvList count="3">').replace("  </cvList>", vocabulary + "  </cvList>")
    path.write_text(head + lines + end + tail)
