"""Lock mass: m/z that drift come back, pixel by pixel, and what was done is known afterwards."""

from __future__ import annotations

import errno
import json
import warnings

import numpy as np
import pytest

from deepfere.errors import DeepfereError, InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.lock_mass import LockMass, percentiles
from deepfere.measured.store import open_measured
from deepfere.measured.treatment import Treatment

from .imzml_bytes import write_pair

LOCK = 798.541
IONS = (400.2, 600.3, LOCK, 900.4)
PROFILE = '<cvParam accession="MS:1000128" name="profile spectrum"/>'
SIDE = 12
LOCKED = Treatment(LockMass((LOCK,)))


def drift(y, x):
    """From -6 to +13 ppm over the section."""
    return -6 + 1.0 * y + 0.7 * x


def drifting(path, spectrum, skip=lambda y, x: False, **more):
    """A file whose m/z drift; ``spectrum(y, x)`` gives true m/z and intensity, without the lock mass if skipped."""
    rows = []
    for y in range(SIDE):
        for x in range(SIDE):
            mz, values = (np.asarray(a, float) for a in spectrum(y, x))
            if skip(y, x):
                keep = np.abs(mz / LOCK - 1) > 60e-6
                mz, values = mz[keep], values[keep]
            rows.append((x + 1, y + 1, (mz * (1 + drift(y, x) * 1e-6)).tolist(), values.tolist()))
    return write_pair(path, rows, **more)


def centroids(y, x):
    # A weak neighbour of the lock mass within its tolerance: the strongest counts.
    return [400.2, 600.3, LOCK * (1 - 4e-6), LOCK, 900.4], [10.0 + y, 20.0 + x, 1.0, 50.0, 5.0]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lock mass .* found in")
        yield


def test_drift_is_measured_and_taken_away(tmp_path):
    path = drifting(tmp_path / "a.imzML", centroids)
    plain = ingest(path, tmp_path / "plain.zarr", mz=IONS)
    assert (plain.ion_image(400.2)[-1, 1:] == 0).all() and plain.shift_ppm is None and "lock_mass" not in plain.attrs
    m = ingest(path, tmp_path / "m.zarr", mz=IONS, treatment=LOCKED, band_rows=5)
    y, x = np.mgrid[:SIDE, :SIDE]
    np.testing.assert_allclose(m.shift_ppm, drift(y, x), atol=1e-4)
    assert m.lock_mass_found.all()
    np.testing.assert_array_equal(m.cube()[0], 10.0 + y)
    np.testing.assert_array_equal(m.cube()[1], 20.0 + x)
    np.testing.assert_array_equal(m.cube()[3], np.full((SIDE, SIDE), 5.0))
    told = m.attrs["lock_mass"]
    assert told["mz"] == [LOCK] and told["tolerance_ppm"] == 20.0 and told["found"] == 1.0
    assert told["median_ppm"] == pytest.approx(np.median(drift(y, x)), abs=1e-3)
    assert told["range_ppm"] == pytest.approx(np.percentile(drift(y, x), [5, 95]).tolist(), abs=1e-3)


def test_automatic_peaks_are_those_without_drift(tmp_path):
    path = drifting(tmp_path / "a.imzML", centroids)
    m = ingest(path, tmp_path / "m.zarr", treatment=LOCKED)
    strong = m.mz[np.abs(m.mz / LOCK - 1) > 10e-6]
    np.testing.assert_allclose(strong, [400.2, 600.3, 900.4], rtol=1e-9)
    plain = ingest(path, tmp_path / "p.zarr")
    assert plain.mz[0] / 400.2 - 1 > 3e-6
    assert (m.ion_image(m.mz[0]) > 0).all() and (plain.ion_image(plain.mz[0]) == 0).any()


def test_where_it_is_missing_its_surroundings_say(tmp_path):
    # A hole in a smooth drift: filled by the median around it; a large one: by the section's.
    lone = {(5, 5), (5, 6), (0, 0)}
    path = drifting(tmp_path / "a.imzML", centroids, lambda y, x: (y, x) in lone)
    m = ingest(path, tmp_path / "m.zarr", mz=IONS, treatment=LOCKED)
    assert {tuple(p) for p in np.argwhere(~m.lock_mass_found).tolist()} == lone
    assert m.attrs["lock_mass"]["found"] == pytest.approx(1 - 3 / 144)
    for y, x in lone:
        around = [
            drift(b, a)
            for b in range(max(0, y - 2), min(SIDE, y + 3))
            for a in range(max(0, x - 2), min(SIDE, x + 3))
            if (b, a) not in lone
        ]
        assert m.shift_ppm[y, x] == pytest.approx(np.median(around), abs=1e-4)
    assert m.ion_image(400.2)[5, 5] == 15.0
    path = drifting(tmp_path / "b.imzML", centroids, lambda y, x: y < 8)
    m = ingest(path, tmp_path / "b.zarr", mz=IONS, treatment=LOCKED)
    whole = np.median([drift(y, x) for y in range(8, SIDE) for x in range(SIDE)])
    np.testing.assert_allclose(m.shift_ppm[:6], whole, atol=1e-4)
    assert (np.abs(m.shift_ppm[7] - whole) > 0.3).any()


def test_band_rows_do_not_matter(tmp_path):
    path = drifting(tmp_path / "a.imzML", centroids, lambda y, x: (y + x) % 3 == 0)
    a, b = (ingest(path, tmp_path / f"{n}.zarr", mz=IONS, treatment=LOCKED, band_rows=n) for n in (1, 64))
    np.testing.assert_array_equal(a.cube(), b.cube())
    np.testing.assert_array_equal(a.shift_ppm, b.shift_ppm)


def test_the_order_of_acquisition_does_not_matter(tmp_path):
    rows = [(x + 1, y + 1, [m * (1 + drift(y, x) * 1e-6) for m in centroids(y, x)[0]], centroids(y, x)[1])
            for y in range(SIDE) for x in range(SIDE)]  # fmt: skip
    orders = rows, sorted(rows), [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    files = [write_pair(tmp_path / f"{k}.imzML", order) for k, order in enumerate(orders)]
    found = [ingest(f, f.with_suffix(".zarr"), mz=IONS, treatment=LOCKED, band_rows=5) for f in files]
    for other in found[1:]:
        np.testing.assert_array_equal(other.cube(), found[0].cube())
        np.testing.assert_array_equal(other.shift_ppm, found[0].shift_ppm)


def test_no_room_for_what_waits(tmp_path, monkeypatch):
    import tempfile

    path = drifting(tmp_path / "a.imzML", centroids)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deepfere.scratch.os.pwrite", full)
    with pytest.raises(DeepfereError, match=r"No space left on device; make room, or set TMPDIR"):
        ingest(path, tmp_path / "m.zarr", mz=IONS, treatment=LOCKED)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (tmp_path / "none" / "file").open())
    with pytest.raises(DeepfereError, match=r"no temporary file can be made \(No such file or directory\); set TMPDIR"):
        ingest(path, tmp_path / "m.zarr", mz=IONS, treatment=LOCKED)
    assert not (tmp_path / "m.zarr").exists()


def test_pixels_with_several_spectra_shift_each_by_its_own(tmp_path):
    """Two spectra of a pixel that drift apart; of some neither shows the lock mass, of some one."""
    rows = []
    for y in range(SIDE):
        for x in range(SIDE):
            for k in (0, 1):
                off = 1 + (drift(y, x) + 8 * k) * 1e-6
                mz, values = centroids(y, x)
                if (x + k) % 6 < 2 and y % 2:
                    mz, values = mz[:2], values[:2]
                rows.append((x + 1, y + 1, [m * off for m in mz], values))
    path = write_pair(tmp_path / "a.imzML", rows)
    found = {}
    for band in (3, 64):
        m = ingest(path, tmp_path / f"{band}.zarr", mz=IONS, treatment=LOCKED, band_rows=band, duplicates="sum")
        found[band] = m.cube(), m.shift_ppm, m.lock_mass_found, m.attrs["lock_mass"]
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_equal(one, other)
    cube, shift, seen, told = found[64]
    y, x = np.mgrid[:SIDE, :SIDE]
    both, neither = (y % 2 == 0) | (x % 6 > 1) & (x % 6 < 5), (y % 2 == 1) & (x % 6 == 0)
    np.testing.assert_array_equal(seen, ~neither)
    np.testing.assert_allclose(shift[both], (drift(y, x) + 4)[both], atol=1e-4)
    np.testing.assert_array_equal(cube[0][both], 2 * (10.0 + y)[both])
    assert told["found"] == pytest.approx(1 - (6 * 2 * 4) / (2 * SIDE**2))
    expected = np.percentile(shift[seen], [5, 50, 95])
    assert [*told["range_ppm"], told["median_ppm"]] == pytest.approx(expected[[0, 2, 1]].tolist(), abs=1e-5)


@pytest.mark.parametrize("count", [1, 4, 97, 5000])
def test_percentiles_are_those_of_all_values_without_holding_them(monkeypatch, count):
    monkeypatch.setattr("deepfere.measured.lock_mass.BINS", 16)
    rng = np.random.default_rng(count)
    wanted = [0.0, 5.0, 50.0, 95.0, 100.0]
    for values in (rng.normal(size=count), rng.integers(0, 3, count).astype(float), np.full(count, 2.5)):
        parts = np.array_split(values, 7)
        expected = np.percentile(values, wanted).tolist()
        assert percentiles(lambda parts=parts: iter(parts), wanted) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_several_lock_masses_take_the_median(tmp_path):
    path = drifting(tmp_path / "a.imzML", centroids, lambda y, x: y == 0)
    lock = Treatment(LockMass((600.3, LOCK, 900.4 * (1 + 5e-6))))  # the last one is wrong by 5 ppm
    m = ingest(path, tmp_path / "m.zarr", mz=IONS, treatment=lock)
    y, x = np.mgrid[:SIDE, :SIDE]
    np.testing.assert_allclose(m.shift_ppm[1:], drift(y, x)[1:], atol=1e-4)
    np.testing.assert_allclose(m.shift_ppm[0], drift(y, x)[0] - 2.5, atol=1e-3)  # of two
    assert m.lock_mass_found.all()


def gaussians(axis):
    def spectrum(y, x):
        values = 0.01 + np.zeros(len(axis))
        for mz, height in zip((798.0, LOCK, 800.0), (30.0, 100.0, 40.0 + y), strict=True):
            values = values + height * np.exp(-0.5 * ((axis / mz - 1) / 15e-6) ** 2)
        return axis, values

    return spectrum


@pytest.mark.parametrize("mode", ["processed", "continuous"])
def test_profiles(tmp_path, mode):
    """Points of 8 ppm, peaks of 15 ppm (s.d.): the centroid is better than a fifth of a point."""
    axis = 797.5 * np.exp(np.arange(420) * 8e-6)
    if mode == "processed":
        path = drifting(tmp_path / "a.imzML", gaussians(axis), spectrum_type=PROFILE)
    else:  # one axis, peaks that move on it
        rows = [
            (x + 1, y + 1, axis.tolist(), gaussians(axis / (1 + drift(y, x) * 1e-6))(y, x)[1].tolist())
            for y in range(SIDE)
            for x in range(SIDE)
        ]
        path = write_pair(tmp_path / "a.imzML", rows, mode="continuous", spectrum_type=PROFILE)
    m = ingest(path, tmp_path / "m.zarr", mz=[798.0, 800.0], tolerance_ppm=15, treatment=LOCKED)
    y, x = np.mgrid[:SIDE, :SIDE]
    np.testing.assert_allclose(m.shift_ppm, drift(y, x), atol=0.5)
    # The window holds one s.d. to either side of the peak, wherever it drifted to.
    area = (40.0 + y) * 800.0 * 15e-6 * np.sqrt(2 * np.pi) * 0.6827
    np.testing.assert_allclose(m.ion_image(800.0), area, rtol=0.02)
    plain = ingest(path, tmp_path / "p.zarr", mz=[798.0, 800.0], tolerance_ppm=15)
    assert np.abs(plain.ion_image(800.0) / area - 1).max() > 0.1


def test_what_it_cannot_do_is_refused(tmp_path):
    path = drifting(tmp_path / "a.imzML", centroids, lambda y, x: y > 0)
    with pytest.raises(InputError, match=r"lock mass 798.541 is within 20 ppm in 8.3% of its spectra; at least 10%"):
        ingest(path, tmp_path / "m.zarr", treatment=LOCKED)
    with pytest.raises(InputError, match=r"in 0\.0% of its spectra"):
        ingest(path, tmp_path / "m.zarr", mz=IONS, treatment=Treatment(LockMass((500.0,))))
    rows = [(x, y, [400.0, LOCK], [1.0, 2.0]) for x in (1, 2) for y in (1, 2)]
    path = write_pair(tmp_path / "c.imzML", rows, mode="continuous")
    for mz in (None, [400.0]):
        with pytest.raises(InputError, match="one m/z axis for all its centroids"):
            ingest(path, tmp_path / "m.zarr", mz=mz, treatment=LOCKED)
    path = write_pair(tmp_path / "d.imzML", rows, mode="continuous", spectrum_type=PROFILE)
    with pytest.raises(InputError, match="whose points are its ions"):
        ingest(path, tmp_path / "m.zarr", treatment=LOCKED)
    assert not (tmp_path / "m.zarr").exists()


def test_noise_is_no_lock_mass_of_a_profile(tmp_path):
    axis = 797.5 * np.exp(np.arange(420) * 8e-6)
    rng = np.random.default_rng(0)
    path = drifting(tmp_path / "a.imzML", lambda y, x: (axis, 10 + rng.random(len(axis))), spectrum_type=PROFILE)
    with pytest.raises(InputError, match=r"in 0\.0% of its spectra"):
        ingest(path, tmp_path / "m.zarr", mz=[798.0], treatment=LOCKED)


def test_the_command_and_a_study(tmp_path, cli):
    for name in "ab":
        drifting(tmp_path / f"{name}.imzML", centroids)
    (tmp_path / "study.csv").write_text("name,msi\na,a.imzML\nb,b.imzML\n")
    done = cli("ingest", tmp_path / "study.csv", "-o", tmp_path / "w", "--no-guide", f"ingest.lock_mass_mz=[{LOCK}]")
    assert done.code == 0, done
    m = open_measured(tmp_path / "w" / "sections" / "b" / "measured.zarr")
    assert m.attrs["peaks"]["sections"] == 2 and m.attrs["lock_mass"]["found"] == 1.0
    np.testing.assert_allclose(m.mz[[0, 1, -1]], [400.2, 600.3, 900.4], rtol=1e-9)
    marker = json.loads((tmp_path / "w" / "done" / "ingest-a.json").read_text())
    assert "lock mass 798.541 found in 100.0% of the spectra; m/z shifted by 3.35 ppm" in marker["warnings"][0]
    info = cli("info", tmp_path / "w" / "sections" / "a" / "measured.zarr").out
    assert "798.541 found in 100.0% of the spectra" in info and "automatic peaks of 2 sections" in info
    wrong = cli("fuse", tmp_path / "a.imzML", "-o", tmp_path / "r.zarr", "--no-guide", "--lock-mass", "0,5")
    assert wrong.code == 2 and "--lock-mass" in wrong.err
    gone = cli("fuse", tmp_path / "a.imzML", "-o", tmp_path / "r.zarr", "--no-guide", "--lock-mass", "512.3")
    assert gone.code == 2 and "lock mass 512.3 is within 20 ppm in 0.0%" in gone.err
    assert not (tmp_path / "r.zarr").exists() and not (tmp_path / "r.zarr.work").exists()
