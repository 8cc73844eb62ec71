"""Spectra to the measured store: windows, axes, duplicates, representations, and what is refused."""

import re
import warnings

import numpy as np
import pytest
from pyimzml.ImzMLWriter import ImzMLWriter

from deepfere.errors import InputError
from deepfere.measured import ingest as ingest_module
from deepfere.measured.ingest import ingest

from .imzml_bytes import simple_spectra, write_pair
from .realdata import real_data


@pytest.fixture
def out(tmp_path):
    return tmp_path / "m.zarr"


def random_file(path, ny=9, nx=7, m=11, mode="continuous", jitter_ppm=0.0, seed=0, keep=1.0):
    """An imzML of pyimzML's writer, scanned in random order, with its truth (m, ny, nx)."""
    rng = np.random.default_rng(seed)
    mz = np.sort(rng.uniform(200, 1200, m))
    truth = rng.gamma(2.0, 50.0, (m, ny, nx)).astype(np.float32)
    mask = rng.random((ny, nx)) < keep
    mask[0, 0] = mask[-1, -1] = mask[0, -1] = mask[-1, 0] = True
    with ImzMLWriter(str(path), mode=mode, spec_type="centroid", intensity_dtype=np.float32) as writer:
        for k in rng.permutation(ny * nx):
            y, x = divmod(int(k), nx)
            if mask[y, x]:
                here = mz if mode == "continuous" else mz * (1 + jitter_ppm * 1e-6 * rng.standard_normal(m))
                writer.addSpectrum(here, truth[:, y, x], (x + 5, y + 2, 1))
    truth[:, ~mask] = np.nan
    return mz, truth, mask


@pytest.mark.parametrize("band_rows", [1, 4, 64, 70])
def test_continuous_keeps_the_axis(tmp_path, out, band_rows):
    mz, truth, mask = random_file(tmp_path / "a.imzML", keep=0.6)
    seen = []
    m = ingest(tmp_path / "a.imzML", out, pitch_um=(40, 50), band_rows=band_rows, progress=lambda *a: seen.append(a))
    np.testing.assert_array_equal(m.mz, mz)
    np.testing.assert_array_equal(m.cube(), truth)
    np.testing.assert_array_equal(m.mask, mask)
    assert m.grid.shape_px == (9, 7) and m.grid.pitch_um == (40.0, 50.0)
    assert m.attrs["origin_px"] == [2, 5] and m.attrs["ions"] == "axis" and m.attrs["complete"] is True
    assert seen[-1][0] == seen[-1][1] == -(-9 // min(band_rows, 9))
    inside = truth[:, mask].astype(float)
    np.testing.assert_allclose(m.tic[mask], inside.sum(0), rtol=1e-6)
    np.testing.assert_allclose(m.rms[mask], np.sqrt((inside**2).mean(0)), rtol=1e-6)
    np.testing.assert_allclose(m.median[mask], np.median(inside, axis=0), rtol=1e-6)
    assert np.isnan(m.tic[~mask]).all()


def test_same_bytes_twice_and_small_batches(tmp_path, monkeypatch):
    random_file(tmp_path / "a.imzML", mode="processed", jitter_ppm=2)
    first = ingest(tmp_path / "a.imzML", tmp_path / "1.zarr", pitch_um=10, band_rows=4)
    monkeypatch.setattr("deepfere.measured.raster.BATCH_VALUES", 25)
    second = ingest(tmp_path / "a.imzML", tmp_path / "2.zarr", pitch_um=10, band_rows=4)
    files = sorted(p.relative_to(first.path) for p in (tmp_path / "1.zarr").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second.path) for p in (tmp_path / "2.zarr").rglob("*") if p.is_file())
    for name in files:
        assert (tmp_path / "1.zarr" / name).read_bytes() == (tmp_path / "2.zarr" / name).read_bytes(), name


def test_large_bands_are_cut_to_memory(tmp_path, out, monkeypatch):
    _, truth, _ = random_file(tmp_path / "a.imzML")
    monkeypatch.setattr(ingest_module, "BAND_BYTES", 4 * 11 * 7 * 2)
    m = ingest(tmp_path / "a.imzML", out, pitch_um=10)
    assert m.ions.shards[1] == 2
    np.testing.assert_array_equal(m.cube(), truth)


def test_processed_list_sums_centroids_in_the_window(tmp_path, out):
    spectra = [
        (1, 1, [99.9994, 100.0, 100.0006, 200.0], [1.0, 2.0, 4.0, 8.0]),  # +-6 ppm, outside 5
        (2, 1, [99.9996, 100.0004, 150.0], [1.0, 2.0, 16.0]),
        (1, 2, [200.0, 100.0], [3.0, 5.0]),  # not ascending
        (2, 2, [], []),  # an empty spectrum is a measured pixel without signal
    ]
    path = write_pair(tmp_path / "a.imzML", spectra)
    m = ingest(path, out, mz=[200.0, 100.0, 100.0005, 777.0])
    assert m.mz.tolist() == [100.0, 100.0005, 200.0, 777.0] and m.attrs["ions"] == "list"
    cube = m.cube()
    np.testing.assert_array_equal(cube[0], [[2, 3], [5, 0]])
    np.testing.assert_array_equal(cube[1], [[6, 2], [5, 0]])  # 5 ppm around 100.0005 overlaps 100's window
    np.testing.assert_array_equal(cube[2], [[8, 0], [3, 0]])
    assert (cube[3] == 0).all()  # one all-zero ion is kept
    np.testing.assert_array_equal(m.tic, [[15, 19], [8, 0]])
    np.testing.assert_array_equal(m.median, [[3, 2], [4, 0]])
    assert m.mask.all()


def test_continuous_with_a_list_agrees_with_processed(tmp_path):
    mz, _, _ = random_file(tmp_path / "a.imzML", m=40)
    random_file(tmp_path / "b.imzML", m=40, mode="processed")
    wanted = [*mz[[3, 5, 30]], 0.5 * (mz[7] + mz[8])]
    for ppm in (5.0, 2e4):
        a = ingest(tmp_path / "a.imzML", tmp_path / f"a{ppm}", pitch_um=1, mz=wanted, tolerance_ppm=ppm)
        b = ingest(tmp_path / "b.imzML", tmp_path / f"b{ppm}", pitch_um=1, mz=wanted, tolerance_ppm=ppm)
        np.testing.assert_allclose(a.cube(), b.cube(), rtol=1e-6)
        assert a.attrs["mode"] == "continuous" and b.attrs["mode"] == "processed"


def test_processed_file_with_one_shared_array_keeps_its_axis(tmp_path, out):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), mode="continuous")
    path.write_text(path.read_text().replace("IMS:1000030", "IMS:1000031"))
    m = ingest(path, out)
    assert m.attrs["ions"] == "axis" and m.mz.tolist() == [100, 200, 300]


def test_continuous_that_repeats_its_axis(tmp_path, out):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    path.write_text(path.read_text().replace("IMS:1000031", "IMS:1000030"))
    assert ingest(path, out).mz.tolist() == [100, 200, 300]
    spectra = simple_spectra()
    spectra[4][2][1] = 201.0
    path = write_pair(tmp_path / "b.imzML", spectra)
    path.write_text(path.read_text().replace("IMS:1000031", "IMS:1000030"))
    with pytest.raises(InputError, match="spectrum 5 has other m/z"):
        ingest(path, tmp_path / "b.zarr")


def test_descending_axis_is_sorted_with_its_intensities(tmp_path, out):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(mz=(300.0, 100.0, 200.0)), mode="continuous")
    m = ingest(path, out)
    assert m.mz.tolist() == [100, 200, 300]
    assert m.cube()[:, 1, 2].tolist() == [14, 15, 13]
    got = ingest(path, tmp_path / "l.zarr", mz=[100.0, 300.0]).cube()
    assert got[:, 1, 2].tolist() == [14, 13]


@pytest.mark.parametrize("mode", ["continuous", "processed"])
def test_hand_written_zlib_nanometres_crlf_latin1_zero_based(tmp_path, out, mode):
    nm = ' unitCvRef="UO" unitAccession="UO:0000018" unitName="nanometer"'
    path = write_pair(
        tmp_path / "a.imzML",
        [(x, y, mz, [int(v) for v in values]) for x, y, mz, values in simple_spectra(3, 2, first=0)],
        mode=mode,
        compress=True,
        encoding="ISO-8859-1",
        newline="\r\n",
        note="5 µm",
        int_type=("MS:1000519", "i"),
        settings=f'<cvParam accession="IMS:1000046" name="pixel size (x)" value="4406.25"{nm}/>'
        f'<cvParam accession="IMS:1000047" name="pixel size y" value="8000"{nm}/>',
    )
    m = ingest(path, out)
    assert m.attrs["origin_px"] == [0, 0] and m.grid.shape_px == (3, 2)
    assert m.grid.pitch_um == pytest.approx((8.0, 4.40625))
    np.testing.assert_allclose(m.mz, [100, 200, 300])
    np.testing.assert_array_equal(m.cube()[2], [[3, 4], [13, 14], [23, 24]])


def test_sparse_raster_keeps_its_mask(tmp_path, out):
    spectra = [(2 * x + 4, 3 * y + 1, mz, v) for x, y, mz, v in simple_spectra(3, 3, first=0)]
    m = ingest(write_pair(tmp_path / "a.imzML", spectra), out)
    assert m.grid.shape_px == (7, 5) and m.attrs["origin_px"] == [1, 4]
    assert m.mask.sum() == 9 and m.mask[::3, ::2].all()
    np.testing.assert_array_equal(np.isnan(m.cube()[0]), ~m.mask)


@pytest.mark.parametrize(("policy", "value", "tic"), [("sum", 111.0, 339.0), ("mean", 55.5, 169.5)])
def test_duplicates(tmp_path, out, policy, value, tic):
    spectra = [*simple_spectra(), (2, 2, [100.0, 200.0, 300.0], [99.0, 100.0, 101.0])]
    path = write_pair(tmp_path / "a.imzML", spectra)
    with pytest.raises(InputError, match=r"1 pixels with several spectra, first x 2, y 2; give --duplicates"):
        ingest(path, out)
    m = ingest(path, out, duplicates=policy)
    cube = m.cube()
    assert cube[0, 1, 1] == value and cube[0, 0, 0] == 1
    assert m.tic[1, 1] == tic and m.attrs["duplicate_spectra"] == 1
    with pytest.raises(InputError, match="unknown policy"):
        ingest(path, tmp_path / "x", duplicates="first")


@pytest.mark.parametrize("mode", ["continuous", "processed"])
def test_negative_intensities_become_zero_and_are_counted(tmp_path, out, mode):
    spectra = simple_spectra()
    spectra[1][3][0] = -5.0
    spectra[2][3][2] = -0.5
    path = write_pair(tmp_path / "a.imzML", spectra, mode=mode)
    with pytest.warns(UserWarning, match="2 negative intensities set to zero"):
        m = ingest(path, out)
    assert m.attrs["negative_intensities"] == 2
    assert m.cube()[0, 0, 1] == 0 and m.cube()[2, 0, 2] == 0 and m.cube().min() == 0
    assert m.tic[0, 1] == 3 + 4


@pytest.mark.parametrize("mode", ["continuous", "processed"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_intensities_that_are_not_finite_name_the_pixel(tmp_path, out, mode, bad):
    spectra = simple_spectra()
    spectra[4][3][1] = bad
    path = write_pair(tmp_path / "a.imzML", spectra, mode=mode)
    for kw in ({}, {"mz": [100.0]}):
        with pytest.raises(InputError, match=r"spectrum at x 2, y 2 has intensities that are not finite"):
            ingest(path, out, **kw)
        assert not out.exists()


@pytest.mark.parametrize(
    ("spectra", "kw", "why"),
    [
        ([(1, 1, [100.0], [1.0])], {}, "one measured pixel"),
        (simple_spectra(1, 3), {}, "only 3 measured pixels"),
        ([(x, y, mz, [0.0] * 3) for x, y, mz, _ in simple_spectra()], {"mz": [100.0]}, "every ion is zero"),
        (simple_spectra(), {"mz": [150.0, 160.0]}, "every ion is zero"),
        (simple_spectra(), {"mz": [100.0, 100.0]}, "not a list of different"),
        (simple_spectra(), {"mz": [-1.0]}, "not a list of different"),
        (simple_spectra(), {"mz": []}, "not a list of different"),
        (simple_spectra(), {"tolerance_ppm": 0.0}, "tolerance of 0.0 ppm"),
        (simple_spectra(), {"pitch_um": 0.0}, "not a pixel pitch"),
        (simple_spectra(), {"representation": "both"}, "unknown representation"),
        ([(30 * x, 50 * y, mz, v) for x, y, mz, v in simple_spectra(6, 5)], {}, "in steps of 30 and 50 (x, y)"),
        ([(10**5 * x, 10**5 * y, mz, v) for x, y, mz, v in simple_spectra()], {}, "coordinates span"),
        ([(x, y, [float("nan"), 2.0, 3.0], v) for x, y, _, v in simple_spectra()], {}, "not positive numbers"),
        ([(x, y, [90.0 + x + 3 * y], [1.0]) for x, y, _, _ in simple_spectra()], {}, "no m/z recurs"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, out, spectra, kw, why):
    path = write_pair(tmp_path / "a.imzML", spectra)
    with pytest.raises(InputError, match=re.escape(why)) as caught:
        ingest(path, out, **kw)
    assert "\n" not in str(caught.value) and caught.value.remedy
    assert not out.exists()


def test_targets_that_are_nowhere_are_told(tmp_path, out):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    with pytest.warns(UserWarning, match=r"1 of 2 targets are zero in every pixel, first m/z 150"):
        ingest(path, out, mz=[100.0, 150.0])


def test_all_zero_continuous_is_refused(tmp_path, out):
    spectra = [(x, y, mz, [0.0] * 3) for x, y, mz, _ in simple_spectra()]
    with pytest.raises(InputError, match="every ion is zero"):
        ingest(write_pair(tmp_path / "a.imzML", spectra, mode="continuous"), out)


def test_pitch_must_be_known_and_given_wins(tmp_path, out):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), settings="")
    with pytest.raises(InputError, match=r"states no pixel size; give --pitch-um"):
        ingest(path, out)
    m = ingest(path, out, pitch_um=30)
    assert m.grid.pitch_um == (30.0, 30.0) and m.attrs["pitch_source"] == "given"
    path = write_pair(tmp_path / "b.imzML", simple_spectra())
    assert ingest(path, tmp_path / "b").attrs["pitch_source"] == "file"
    assert ingest(path, tmp_path / "c", pitch_um=(3, 4)).grid.pitch_um == (3.0, 4.0)


def test_representation_is_asked_for_where_it_matters(tmp_path, out):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), spectrum_type="")
    with pytest.raises(InputError, match=r"neither centroid nor profile; give --representation"):
        ingest(path, out)
    assert ingest(path, out, representation="centroid").mz.tolist() == [100, 200, 300]
    path = write_pair(tmp_path / "b.imzML", simple_spectra(), spectrum_type="", mode="continuous")
    assert ingest(path, tmp_path / "b.zarr").attrs["representation"] is None


REAL = {
    "Example_Continuous": ({}, (8399, 3, 3), 9, "axis"),
    "Example_Processed": ({"tolerance_ppm": 500.0}, None, 9, "automatic"),
    "MatrixTests_N2": ({"pitch_um": 100.0}, None, 4, "automatic"),
    "Untreated_3_434_tiny": ({"pitch_um": 100.0}, None, 8, "automatic"),
    "iontof_sparse": ({"mz": [100.0, 200.0], "representation": "centroid"}, (2, 4, 4), 6, "list"),
    "msbackend_test_image": ({"pitch_um": 5.477, "representation": "centroid"}, None, 6, "automatic"),
    "pym2aia_test": ({}, (10463, 4, 5), 20, "axis"),
    "simple_imzml": ({}, (3, 3, 2), 5, "automatic"),
    "two_precision_terms": ({"mz": [100.0, 101.0]}, (2, 2, 2), 4, "list"),
    "two_scansettings": ({"mz": [100.0, 101.0], "pitch_um": 10.0}, (2, 2, 2), 4, "list"),
    "unit_nanometre": ({"mz": [100.0, 101.0]}, (2, 2, 2), 4, "list"),
}


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_files(name, out):
    from pyimzml.ImzMLParser import ImzMLParser

    path = real_data("imzml", f"{name}.imzML")
    kw, shape, pixels, how = REAL[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m, peer = ingest(path, out, **kw), ImzMLParser(str(path))
    assert m.mask.sum() == pixels and m.attrs["ions"] == how
    assert shape is None or m.ions.shape == shape
    assert len(m.mz) and np.nanmax(m.cube()) > 0
    y0, x0 = m.attrs["origin_px"]
    for i, (x, y, _) in enumerate(peer.coordinates):
        values = np.maximum(peer.getspectrum(i)[1].astype(float), 0)
        assert m.tic[y - y0, x - x0] == pytest.approx(values.sum(), rel=1e-6)
        if how == "axis":
            np.testing.assert_array_equal(m.spectrum(y - y0, x - x0)[1], values)


@pytest.mark.real
def test_real_bladder(out):
    from pyimzml.ImzMLParser import ImzMLParser, getionimage

    path = real_data("bladder", "bladder_50um.imzML")
    m = ingest(path, out)
    assert m.grid.shape_px == (26, 36) and m.grid.pitch_um == (50.0, 50.0) and m.ions.shape[0] == 61
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = getionimage(ImzMLParser(str(path)), m.mz[7], tol=1e-3)
    np.testing.assert_allclose(m.ion_image(m.mz[7]), want, rtol=1e-6)


class Counted:
    """An .ibd that notes what is read of it."""

    def __init__(self, file, seen):
        self.file, self.seen = file, seen

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size=-1):
        at, data = self.file.tell(), self.file.read(size)
        self.seen.append((at, at + len(data)))
        return data


@pytest.mark.parametrize("mode", ["continuous", "processed"])
@pytest.mark.parametrize("band_rows", [2, 64])
def test_the_ibd_is_read_once(tmp_path, out, monkeypatch, mode, band_rows):
    y, x = np.divmod(np.arange(12 * 9), 9)
    axis = np.linspace(100, 900, 40)
    spectra = [(int(a), int(b), axis, np.full(40, 1.0 + a)) for a, b in zip(x, y, strict=True)]
    path, seen = write_pair(tmp_path / "a.imzML", spectra, mode=mode), []
    real = ingest_module.open_binary
    monkeypatch.setattr(ingest_module, "open_binary", lambda path: Counted(real(path), seen))
    ingest(path, out, mz=axis[::3].tolist(), band_rows=band_rows)
    size, read = path.with_suffix(".ibd").stat().st_size, np.zeros(path.with_suffix(".ibd").stat().st_size, int)
    for begin, end in seen:
        read[begin:end] += 1
    assert (read[16:] == 1).all() and size > 12 * 9 * 40 * 4
