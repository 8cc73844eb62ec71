"""Automatic ions, and areas of profiles."""

import numpy as np
import pytest

from deepfere.measured.ingest import ingest
from deepfere.measured.peaks import find_ions
from deepfere.measured.sampled import PeakSpec, sample_centroids, sample_profiles
from deepfere.measured.tolerance import Tolerance
from deepfere.measured.windows import Windows

from .imzml_bytes import write_pair
from .test_ingest import random_file


@pytest.fixture
def out(tmp_path):
    return tmp_path / "m.zarr"


def test_profile_area_is_exact():
    axis = np.array([100.0, 100.01, 100.02, 100.03, 100.04])
    triangle = np.array([[0, 5, 10, 5, 0], [1, 1, 1, 1, 1]], np.float32)
    # +-200 ppm of 100.02 is [100.0 - 4e-6, 100.04 + 4e-6]: everything; +-50 ppm cuts inside the lines
    got = Windows(np.array([100.02]), Tolerance(200)).area(axis, triangle)
    np.testing.assert_allclose(got[:, 0], [0.2, 0.04], rtol=1e-5)
    half = 50e-6 * 100.02
    got = Windows(np.array([100.02]), Tolerance(50)).area(axis, triangle)
    np.testing.assert_allclose(got[:, 0], [2 * (10 * half - 500 * half**2 / 2), 2 * half], rtol=1e-5)
    # points left out between two peaks: no line across
    gap = np.array([100.0, 100.01, 100.02, 105.0, 105.01, 105.02])
    got = Windows(np.array([102.0, 105.01]), Tolerance(1000)).area(gap, np.ones((1, 6), np.float32))
    np.testing.assert_allclose(got, [[0, 0.02]], atol=1e-6)


WIDE = PeakSpec(tolerance_ppm=40)


def centroid_set(n, m, jitter_ppm, noise, seed, fraction=(0.05, 1.0)):
    rng = np.random.default_rng(seed)
    ions = np.sort(rng.uniform(200, 1200, m))
    present, level = rng.uniform(*fraction, m), rng.lognormal(3, 1, m)
    spectra = []
    for _ in range(n):
        on = rng.random(m) < present
        extra = rng.uniform(200, 1200, rng.poisson(noise))
        mz = np.concatenate([ions[on] * (1 + jitter_ppm * 1e-6 * rng.standard_normal(on.sum())), extra])
        value = np.concatenate([level[on] * rng.lognormal(0, 0.5, on.sum()), rng.lognormal(1, 0.5, len(extra))])
        order = np.argsort(mz)
        spectra.append((mz[order], value[order]))
    return ions, spectra


def centroid_peaks(spectra):
    return find_ions(lambda: [sample_centroids(spectra, PeakSpec())], PeakSpec())


@pytest.mark.parametrize(("jitter_ppm", "noise"), [(0.0, 0), (2.0, 0), (3.0, 0), (2.0, 200), (3.0, 600)])
def test_automatic_centroid_peaks(jitter_ppm, noise):
    ions, spectra = centroid_set(300, 200, jitter_ppm, noise, seed=3)
    got = centroid_peaks(spectra)
    ppm = np.abs(got[:, None] / ions - 1) * 1e6
    gaps = np.diff(ions) / ions[1:] * 1e6
    alone = (np.append(gaps, np.inf) > 20) & (np.insert(gaps, 0, np.inf) > 20)
    assert (ppm.min(0)[alone] <= 3).mean() >= 0.985  # found
    assert (ppm.min(1) > 5).sum() <= 1  # invented
    np.testing.assert_array_equal(got, centroid_peaks(spectra))


def test_rare_but_strong_ions_are_kept_and_rare_weak_ones_not():
    _, spectra = centroid_set(1000, 5, 1.0, 0, seed=4, fraction=(1, 1))
    weak, strong = 333.3, 666.6
    for k in range(5):
        mz, value = spectra[200 * k]
        top = max(v.max() for _, v in spectra)
        for m, v in ((weak, 1e-4 * top), (strong, 50 * top)):
            mz, value = np.append(mz, m), np.append(value, v)
        spectra[200 * k] = (mz, value)
    got = centroid_peaks(spectra)
    assert len(got) == 6 and np.abs(got - strong).min() < 0.01 and np.abs(got - weak).min() > 1


def test_automatic_profile_peaks():
    rng = np.random.default_rng(5)
    axis = 300 * np.exp(np.arange(30000) * 8e-6)
    ions = np.array([301.2, 310.0, 322.2, 333.3, 345.6, 360.1])
    spectra = []
    for _ in range(40):
        y = rng.random(len(axis)) * 0.5
        for mz in ions:
            y += 20 * rng.gamma(3, 1) * np.exp(-0.5 * ((axis / mz - 1) / 2e-5) ** 2)
        spectra.append((axis, y))
    got = find_ions(lambda: [sample_profiles(lambda: spectra, WIDE)], WIDE)
    assert len(got) == len(ions)
    np.testing.assert_allclose(got, ions, rtol=5e-6)


def test_automatic_ions_through_a_file(tmp_path, out):
    mz, truth, _ = random_file(tmp_path / "a.imzML", ny=12, nx=10, m=60, mode="processed", jitter_ppm=1.0)
    m = ingest(tmp_path / "a.imzML", out, pitch_um=10)
    np.testing.assert_allclose(m.mz, mz, rtol=2e-6)
    np.testing.assert_allclose(m.cube(), truth, rtol=1e-6)
    assert m.attrs["ions"] == "automatic" and m.attrs["tolerance_ppm"] == 5.0
    assert m.attrs["peaks"]["min_fraction"] == 0.01 and m.attrs["peaks"]["sampled_spectra"] == 120


def test_profile_spectra_through_a_file(tmp_path, out):
    axis = 500 * np.exp(np.arange(-100, 101) * 1e-5)
    peak = 100 * np.exp(-0.5 * ((axis / 500.0 - 1) / 5e-5) ** 2)
    profile = '<cvParam accession="MS:1000128" name="profile spectrum"/>'
    spectra = [
        (x, y, list(axis[k:]), [float(v) * (x + y) for v in peak[k:]])
        for k, (x, y) in enumerate((x, y) for y in (1, 2, 3) for x in (1, 2, 3))
    ]
    path = write_pair(tmp_path / "a.imzML", spectra, spectrum_type=profile)
    m = ingest(path, out, tolerance_ppm=300)
    assert m.mz == pytest.approx([500.0], rel=1e-6) and m.attrs["representation"] == "profile"
    area = 100 * np.sqrt(2 * np.pi) * 5e-5 * 500
    np.testing.assert_allclose(m.cube()[0], area * np.array([[2, 3, 4], [3, 4, 5], [4, 5, 6]]), rtol=1e-3)
