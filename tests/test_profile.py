"""Smoothing and baseline of profiles: analytic peaks on analytic baselines."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.profile import ProfileSpec, opening, padded_axis, snip
from deepfere.measured.tolerance import Tolerance
from deepfere.measured.treatment import Treatment
from deepfere.measured.windows import Windows

from .imzml_bytes import simple_spectra, write_pair

PROFILE = '<cvParam accession="MS:1000128" name="profile spectrum"/>'
# A time-of-flight axis: equal steps of the root of m/z, 30 ppm at 600 and 25 at 860.
AXIS = np.linspace(np.sqrt(600), np.sqrt(860), 14000) ** 2
PEAKS = (620.0, 650.0, 700.0, 850.0)
WIDTH = 1e-4
BASE = 5 + 20 * np.exp(-(AXIS - 600) / 80)


def peaks(axis, height=100.0):
    return sum(height * np.exp(-0.5 * ((axis / m - 1) / WIDTH) ** 2) for m in PEAKS)


def areas(axis, profile):
    return Windows(np.array(PEAKS), Tolerance(500)).area(axis, np.asarray(profile, np.float32)[None])[0]


TRUE = 100.0 * np.sqrt(2 * np.pi) * WIDTH * np.array(PEAKS)


@pytest.mark.parametrize(("baseline", "share"), [("tophat", 4e-3), ("snip", 1e-4)])
def test_peaks_keep_their_area_and_the_baseline_goes(baseline, share):
    spec = ProfileSpec(baseline=baseline)
    got = spec.applied(AXIS, np.stack([BASE + peaks(AXIS), BASE, peaks(AXIS)]))
    np.testing.assert_allclose(areas(AXIS, got[0]), TRUE, rtol=share)
    np.testing.assert_allclose(areas(AXIS, got[2]), TRUE, rtol=1e-4)  # nothing to take away
    assert got.min() >= 0 and got[1].max() < 0.3  # a falling baseline has no corner that is as wide
    away = np.abs(AXIS[:, None] / np.array(PEAKS) - 1).min(1) > 6 * WIDTH
    assert got[0][away].max() < 0.3
    # Untreated, the baseline is most of what a window holds.
    assert (areas(AXIS, BASE + peaks(AXIS)) > 1.15 * TRUE).all()


def test_a_straight_baseline_goes_exactly():
    line = 3 + 0.02 * (AXIS - 600)
    left = (line + peaks(AXIS)) - snip(AXIS, (line + peaks(AXIS))[None], 3000)[0]
    np.testing.assert_allclose(areas(AXIS, left), TRUE, rtol=1e-4)
    np.testing.assert_allclose(snip(AXIS, line[None], 3000)[0], line, rtol=1e-9)


@pytest.mark.parametrize("width_ppm", [50, 900, 20000])
def test_the_opening_is_that_of_its_definition(width_ppm):
    rng = np.random.default_rng(0)
    axis = np.sort(rng.uniform(600, 610, 150))
    values = rng.random((3, 150))
    near = np.abs(axis[None] - axis[:, None]) <= 0.5e-6 * width_ppm * axis[:, None]  # [i, j]: j in the window of i
    least = np.stack([np.where(near, v, np.inf).min(1) for v in values])
    want = np.stack([np.where(near.T, e, -np.inf).max(1) for e in least])
    got = opening(axis, values, width_ppm)
    np.testing.assert_array_equal(got, want)
    assert (got <= values).all()
    np.testing.assert_array_equal(opening(axis, got, width_ppm), got)  # once is enough


@pytest.mark.parametrize("smoothing", ["savgol", "gaussian"])
def test_smoothing_keeps_area_and_place_and_takes_noise(smoothing):
    rng = np.random.default_rng(1)
    axis = 600 * np.exp(np.arange(20000) * 1e-5)
    spec = ProfileSpec(smoothing=smoothing, smoothing_points=11)
    clean = peaks(axis)
    got = spec.applied(axis, clean[None])[0]
    at = np.array([m for m in PEAKS if m < axis[-1]])
    np.testing.assert_allclose(Windows(at, Tolerance(600)).area(axis, got[None])[0], TRUE[: len(at)], rtol=2e-3)
    for m in at:
        near = np.abs(axis / m - 1) < 3 * WIDTH
        assert np.average(axis[near], weights=got[near]) == pytest.approx(m, rel=1e-6)
    noisy = 50 + clean + rng.normal(0, 5, len(axis))
    away = clean < 1e-9
    assert spec.applied(axis, noisy[None])[0][away].std() < 0.5 * noisy[away].std()


@pytest.mark.parametrize("baseline", ["tophat", "snip"])
def test_a_baseline_never_adds(baseline):
    """Spikes among zeros: a parabola is negative beside them, which is no baseline to take away."""
    values = np.where(np.random.default_rng(2).random((3, len(AXIS))) < 0.05, 10.0, 0.0)
    smooth = ProfileSpec(smoothing="savgol").applied(AXIS, values)
    left = ProfileSpec(smoothing="savgol", baseline=baseline).applied(AXIS, values)
    assert (left <= smooth * (1 + 1e-6)).all() and smooth.min() == 0 and left.sum() > 0.3 * smooth.sum()


def test_nothing_reaches_across_a_gap():
    """Points that a writer left out are zero: a peak behind the gap is neither smoothed into nor a baseline."""
    step = 1e-5
    one = 600 * np.exp(np.arange(40) * step)
    two = 600 * np.exp((np.arange(40) + 90) * step)
    axis = np.concatenate([one, two])
    values = np.concatenate([np.zeros(40), np.full(40, 7.0)])
    full, kept = padded_axis(axis, 5)
    assert len(full) == 90 and (full[kept] == axis).all() and (np.diff(full) > 0).all()
    assert len(padded_axis(axis, 500)[0]) <= 80 + 50  # no more than fit
    got = ProfileSpec(smoothing="gaussian", smoothing_points=9).applied(axis, values[None])[0]
    assert got[:40].max() == 0 and got[60:].max() == pytest.approx(7.0)
    # An island over zero is signal, however flat.
    np.testing.assert_allclose(ProfileSpec(baseline="tophat").applied(axis, values[None])[0], values, atol=1e-6)


def spectra(axis, scale):
    return [
        (
            x + 1,
            y + 1,
            axis.tolist(),
            (BASE[:: len(AXIS) // len(axis)][: len(axis)] + scale(y, x) * peaks(axis)).tolist(),
        )
        for y in range(3)
        for x in range(3)
    ]


@pytest.mark.parametrize("mode", ["processed", "continuous"])
@pytest.mark.parametrize("baseline", ["tophat", "snip"])
def test_through_a_file(tmp_path, mode, baseline):
    path = write_pair(tmp_path / "a.imzML", spectra(AXIS, lambda y, x: 1 + y + x), mode=mode, spectrum_type=PROFILE)
    treatment = Treatment(profile=ProfileSpec(baseline=baseline))
    m = ingest(path, tmp_path / "m.zarr", mz=PEAKS, tolerance_ppm=500, treatment=treatment)
    y, x = np.mgrid[:3, :3]
    np.testing.assert_allclose(m.cube(), TRUE[:, None, None] * (1 + y + x), rtol=5e-3)
    assert m.attrs["profile"] == {"baseline": baseline, "smoothing": "none", "baseline_width_ppm": 3000.0}
    # Factors are of what is left: in proportion to the peaks.
    np.testing.assert_allclose(m.tic / m.tic[0, 0], 1 + y + x, rtol=5e-3)
    np.testing.assert_allclose(
        m.cube("tic"), np.broadcast_to(m.cube("tic").mean((1, 2))[:, None, None], (4, 3, 3)), rtol=5e-3
    )
    if mode == "processed":
        found = ingest(path, tmp_path / "f.zarr", tolerance_ppm=100, treatment=treatment)
        np.testing.assert_allclose(found.mz, PEAKS, rtol=2e-6)
    else:
        whole = ingest(path, tmp_path / "f.zarr", treatment=treatment)
        assert whole.attrs["ions"] == "axis" and whole.cube()[np.abs(AXIS - 640).argmin()].max() < 0.3


def test_what_is_no_profile_is_refused(tmp_path, cli):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    for spec in (ProfileSpec(baseline="snip"), ProfileSpec(smoothing="savgol")):
        with pytest.raises(InputError, match="holds centroids: baseline and smoothing are for profiles"):
            ingest(path, tmp_path / "m.zarr", treatment=Treatment(profile=spec))
    path = write_pair(tmp_path / "b.imzML", simple_spectra(), mode="continuous", spectrum_type="")
    with pytest.raises(InputError, match="says neither centroid nor profile; give --representation"):
        ingest(path, tmp_path / "m.zarr", treatment=Treatment(profile=ProfileSpec(baseline="tophat")))
    for given, why in (
        (["ingest.smoothing_points=8"], "8 is even"),
        (["ingest.baseline=rolling"], "ingest.baseline"),
        (["ingest.baseline=snip"], "holds centroids"),
    ):
        done = cli("fuse", tmp_path / "a.imzML", "-o", tmp_path / "r.zarr", "--no-guide", *given)
        assert done.code == 2 and why in done.err, done


def test_an_mz_that_stands_twice_loses_no_area():
    """As where scan segments that share a point are put together."""
    mz = np.array([100.0, 100.001, 100.002, 100.003, 100.003, 100.004, 100.005, 100.006])
    area = Windows(np.array([100.003]), Tolerance(150.0)).area(mz, np.ones((1, 8), np.float32))
    once = Windows(np.array([100.003]), Tolerance(150.0)).area(np.unique(mz), np.ones((1, 7), np.float32))
    assert once[0, 0] > 0 and area[0, 0] == pytest.approx(once[0, 0], rel=1e-6)
