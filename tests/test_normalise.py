"""Normalisation: factors stored with the measurement, applied on reading, and what becomes of pixels without."""

from __future__ import annotations

import json

import numpy as np
import pytest

import deepfere
from deepfere.errors import InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.writer import write_measured

from .imzml_bytes import write_pair

REFERENCE = 500.0
IONS = (300.0, 400.0)
PROFILE = '<cvParam accession="MS:1000128" name="profile spectrum"/>'


def level(y, x):
    return 2.0 + y + 0.5 * x


def pair(path, without=(), silent=(), side=6, mode="processed", **more):
    """Every ion in proportion to a level per pixel, the reference too; without it, or with nothing at all, in some."""
    rows = []
    for y in range(side):
        for x in range(side):
            mz, values = [*IONS, REFERENCE * (1 + 2e-6)], [level(y, x) * v for v in (10.0, 3.0, 5.0)]
            if (y, x) in without:
                values[2] = 0.0
            if (y, x) in silent:
                values = [0.0] * 3
            if mode == "processed":
                mz, values = [m for m, v in zip(mz, values, strict=True) if v > 0], [v for v in values if v > 0]
            rows.append((x + 1, y + 1, mz, values))
    return write_pair(path, rows, mode=mode, **more)


def grid(side=6):
    return np.mgrid[:side, :side]


@pytest.mark.parametrize("mode", ["processed", "continuous"])
def test_the_reference_is_stored_and_applied_on_reading(tmp_path, mode):
    path = pair(tmp_path / "a.imzML", mode=mode)
    ingest(path, tmp_path / "m.zarr", mz=IONS, reference_mz=REFERENCE)
    m = deepfere.open_measured(tmp_path / "m.zarr")
    y, x = grid()
    np.testing.assert_allclose(m.reference, 5.0 * level(y, x), rtol=1e-6)
    assert m.attrs["reference_mz"] == REFERENCE
    np.testing.assert_allclose(m.cube()[0], 10.0 * level(y, x), rtol=1e-6)  # as measured, on disk
    mean = level(y, x).mean()
    np.testing.assert_allclose(m.cube("reference")[0], 10.0 * mean, rtol=1e-6)
    np.testing.assert_allclose(m.ion_image(400.0, normalisation="reference"), 3.0 * mean, rtol=1e-6)
    assert m.normalisation_notes("reference") == [] == m.normalisation_notes("none")
    raw = deepfere.open_measured(path)
    for name in ("tic", "rms", "median"):
        np.testing.assert_array_equal(getattr(raw, name), getattr(m, name))
        np.testing.assert_allclose(m.cube(name)[1], 3.0 * mean, rtol=1e-6)
    if mode == "processed":
        plain = ingest(path, tmp_path / "p.zarr", mz=IONS)
        assert plain.reference is None
        with pytest.raises(InputError, match="ingested without a reference m/z; ingest it again with --reference-mz"):
            plain.cube("reference")
        np.testing.assert_array_equal(plain.tic, m.tic)


def test_the_axis_itself_and_profiles_have_a_reference(tmp_path):
    m = ingest(pair(tmp_path / "a.imzML", mode="continuous"), tmp_path / "m.zarr", reference_mz=REFERENCE)
    assert m.attrs["ions"] == "axis"
    np.testing.assert_array_equal(m.reference, m.cube()[2])
    axis = 500 * np.exp(np.arange(-30, 31) * 1e-5)
    rows = [
        (x + 1, y + 1, axis.tolist(), (level(y, x) * np.exp(-0.5 * ((axis / 500 - 1) / 5e-5) ** 2)).tolist())
        for y in range(3)
        for x in range(3)
    ]
    for mode in ("processed", "continuous"):
        path = write_pair(tmp_path / f"{mode}.imzML", rows, mode=mode, spectrum_type=PROFILE)
        m = ingest(path, tmp_path / f"{mode}.zarr", mz=[499.99], tolerance_ppm=60, reference_mz=500.0)
        y, x = grid(3)
        np.testing.assert_allclose(m.reference / m.reference[0, 0], level(y, x) / level(0, 0), rtol=1e-5)
        assert m.reference[0, 0] > m.cube()[0, 0, 0] > 0
    path = write_pair(tmp_path / "u.imzML", rows, mode="continuous", spectrum_type="")
    with pytest.raises(InputError, match="says neither centroid nor profile"):
        ingest(path, tmp_path / "u.zarr", reference_mz=500.0)


def test_pixels_without_it_take_that_around_them_and_silent_ones_stay_zero(tmp_path):
    lone, silent = (3, 3), (0, 5)
    m = ingest(pair(tmp_path / "a.imzML", {lone}, {silent}), tmp_path / "m.zarr", mz=IONS, reference_mz=REFERENCE)
    assert m.reference[lone] == 0 and m.reference[silent] == 0
    scale = m.factor("reference")
    around = [level(b, a) for b in range(1, 6) for a in range(1, 6) if (b, a) != lone]
    known = np.array([[level(b, a) for a in range(6)] for b in range(6)])
    known[lone], known[silent] = np.median(around), 0
    assert scale[lone] == pytest.approx(known.mean() / np.median(around), rel=1e-6)
    assert scale[silent] == 0 and (m.cube("reference")[:, 0, 5] == 0).all()
    np.testing.assert_allclose(np.delete(m.cube("reference")[0].ravel(), [5, 21]), 10 * known.mean(), rtol=1e-6)
    assert m.normalisation_notes("reference") == [
        "1 pixels have no signal to normalise by reference and stay zero",
        "1 pixels without the reference 500 took it from around them",
    ]
    assert m.normalisation_notes("tic") == ["1 pixels have no signal to normalise by tic and stay zero"]


def test_a_reference_that_is_not_everywhere_is_refused(tmp_path):
    gone = {(y, 0) for y in range(4)}
    m = ingest(pair(tmp_path / "a.imzML", gone), tmp_path / "m.zarr", mz=IONS, reference_mz=REFERENCE)
    with pytest.raises(
        InputError, match=r"the reference 500 is missing in 11\.1% of the pixels with signal; at most 10%"
    ):
        m.factor("reference")
    m = ingest(pair(tmp_path / "b.imzML"), tmp_path / "b.zarr", mz=IONS, reference_mz=777.0)
    with pytest.raises(InputError, match=r"missing in 100\.0%"):
        m.cube("reference")
    with pytest.raises(InputError, match="is no m/z"):
        ingest(tmp_path / "b.imzML", tmp_path / "c.zarr", reference_mz=-1.0)


def test_noise_that_is_raised_is_told(tmp_path):
    cube = np.full((2, 5, 5), 10.0)
    cube[:, 2, 2] = 0.1
    m = write_measured(tmp_path / "m.zarr", cube, None, [1.0, 2.0], 10)
    assert m.normalisation_notes("tic") == ["1 pixels have less than 1/20 of the mean tic, and noise raised as much"]


def test_the_command_refuses_notes_and_uses_it(tmp_path, cli):
    pair(tmp_path / "a.imzML", {(3, 3)})
    (tmp_path / "study.csv").write_text("name,msi\na,a.imzML\n")
    work = tmp_path / "w"
    stage = ("ingest", tmp_path / "study.csv", "-o", work, "--no-guide")
    wrong = cli(*stage, "ingest.normalisation=reference")
    assert wrong.code == 2 and "give --reference-mz (ingest.reference_mz)" in wrong.err
    lost = cli(*stage, "ingest.normalisation=reference", "ingest.reference_mz=777")
    assert lost.code == 2 and "the reference 777 is missing" in lost.err and not work.exists()
    done = cli(*stage, "ingest.normalisation=reference", f"ingest.reference_mz={REFERENCE}")
    assert done.code == 0, done
    told = json.loads((work / "done" / "ingest-a.json").read_text())["warnings"]
    assert len(told) == 1 and told[0].endswith("a.imzML: 1 pixels without the reference 500 took it from around them")


@pytest.mark.ray
def test_a_result_is_of_the_normalised_ion(tmp_path):
    pair(tmp_path / "a.imzML", side=8)
    result = deepfere.fuse(
        tmp_path / "a.imzML", None, tmp_path / "r.zarr", guide=False, factor=2, reference_mz=REFERENCE,
        pitch_um=20, overrides=["tracking.uri=none"],
    )  # fmt: skip
    y, x = grid(8)
    np.testing.assert_allclose(result.measured(IONS[0]), 10.0 * level(y, x).mean(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(result.ion(IONS[0])), 10.0 * level(y, x).mean(), rtol=1e-4)
