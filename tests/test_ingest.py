import pickle
import re
import warnings

import numpy as np
import pytest
import zarr
from pyimzml.ImzMLWriter import ImzMLWriter

from deepfere.errors import InputError
from deepfere.measured import ingest as ingest_module
from deepfere.measured.ingest import ingest
from deepfere.measured.normalise import spectrum_factors
from deepfere.measured.peaks import find_ions
from deepfere.measured.sampled import PeakSpec, sample_centroids, sample_profiles
from deepfere.measured.store import MeasuredWriter, open_measured, write_measured
from deepfere.measured.windows import Windows
from deepfere.store import create_array, open_group

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


def test_occupied_and_unfinished_paths(tmp_path, out):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    MeasuredWriter(out, np.array([1.0, 2.0]), (3, 3))  # a writer that was stopped
    with pytest.raises(InputError, match="unfinished"):
        open_measured(out)
    first = ingest(path, out)  # replaced without asking
    with pytest.raises(InputError, match="exists already"):
        ingest(path, out)
    assert ingest(path, out, overwrite=True, mz=[100.0]).mz.tolist() == [100.0]
    assert first.path == str(out)
    mine = tmp_path / "precious"
    mine.mkdir()
    (mine / "data.txt").write_text("x")
    with pytest.raises(InputError, match="is not an ingested measurement"):
        ingest(path, mine, overwrite=True)
    assert (mine / "data.txt").read_text() == "x"


def test_store_refusals(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_measured(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a Zarr"):
        open_measured(tmp_path / "empty")
    open_group(tmp_path / "other", "w")
    with pytest.raises(InputError, match="not an ingested measurement"):
        open_measured(tmp_path / "other")
    with pytest.raises(InputError, match="exists already"):
        open_group(tmp_path / "other", "w-")
    m = write_measured(tmp_path / "m", np.ones((1, 2, 2)), None, [5.0], 1.0)
    zarr.open_group(m.path).attrs["format_version"] = 99
    with pytest.raises(InputError, match="format version 99"):
        open_measured(m.path)


def cube_of(m=3, ny=5, nx=6, seed=1):
    rng = np.random.default_rng(seed)
    cube = rng.gamma(2.0, 10.0, (m, ny, nx)).astype(np.float32)
    mask = rng.random((ny, nx)) < 0.7
    cube[:, ~mask] = np.nan
    return cube, mask


def test_write_measured_and_normalisation(out):
    cube, mask = cube_of()
    cube[:, 1, 1], mask[1, 1] = 0, True  # a measured pixel without any signal
    m = write_measured(out, cube, mask, [100.0, 200.0, 300.0], (10, 20), {"origin_px": [4, 5], "note": "x"})
    np.testing.assert_array_equal(m.cube(), cube)
    assert m.attrs["origin_px"] == [4, 5] and m.attrs["note"] == "x" and m.grid.pitch_um == (10.0, 20.0)
    for name in ("tic", "rms", "median"):
        factor = {
            "tic": np.sum(cube, axis=0, dtype=float),
            "rms": np.sqrt(np.mean(cube.astype(float) ** 2, axis=0)),
            "median": np.median(cube.astype(float), axis=0),
        }[name]
        want = np.divide(cube, factor, where=factor > 0, out=np.zeros_like(cube)) * factor[mask].mean()
        want[:, ~mask] = np.nan
        np.testing.assert_allclose(m.cube(name), want, rtol=1e-5)
        np.testing.assert_allclose(m.ion_image(200.0, normalisation=name), want[1], rtol=1e-5)
    with pytest.raises(InputError, match="unknown normalisation"):
        m.cube("sqrt")
    with pytest.raises(InputError, match="exists already"):
        write_measured(out, cube, mask, [100.0, 200.0, 300.0], 10)


def test_shards_and_names(out):
    m = write_measured(out, np.ones((130, 100, 70), np.float32), None, np.arange(1.0, 131.0), 10)
    assert m.ions.chunks == (64, 64, 64) and m.ions.shards == (192, 64, 128)
    assert m.ions.metadata.dimension_names == ("ion", "y", "x")
    assert len([p for p in (out / "ions").rglob("*") if p.is_file()]) == 3  # two shards and the metadata
    assert (m.cube() == 1).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c, k, z: (c[0], k, z), "do not go together"),
        (lambda c, k, z: (c, k[:2], z), "mask"),
        (lambda c, k, z: (c, k, z[::-1]), "ascending"),
        (lambda c, k, z: (-c, k, z), "not negative"),
        (lambda c, k, z: (c, np.ones_like(k), z), "finite"),
        (lambda c, k, z: (c, np.zeros_like(k), z), "no pixel"),
    ],
)
def test_write_measured_refuses(out, change, why):
    cube, mask, mz = change(*cube_of(), [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=why):
        write_measured(out, cube, mask, mz, 1.0)
    assert not out.exists()


def test_ion_image_spectrum_and_pickle(out):
    cube, mask = cube_of()
    m = pickle.loads(pickle.dumps(write_measured(out, cube, mask, [100.0, 200.0, 300.0], 10)))
    np.testing.assert_array_equal(m.ion_image(200.0009), cube[1])
    np.testing.assert_array_equal(m.ion_image(200.1, ppm=600), cube[1])
    for mz in (200.0011, 150.0, float("nan"), 0.0):
        with pytest.raises(InputError, match="the nearest is"):
            m.ion_image(mz)
    y, x = np.argwhere(mask)[0]
    mz, values = m.spectrum(int(y), int(x))
    assert mz.tolist() == [100, 200, 300]
    np.testing.assert_array_equal(values, cube[:, y, x])
    y, x = np.argwhere(~mask)[0]
    with pytest.raises(InputError, match="was not measured"):
        m.spectrum(int(y), int(x))
    with pytest.raises(InputError, match="outside the grid"):
        m.spectrum(-1, 0)


def test_stores_at_urls():
    group = open_group("memory://deepfere-test/g", "w")
    array = create_array(group, "a", (10, 10), np.float32, (5, 5), (10, 10), fill_value=np.nan)
    array[:5] = 3
    again = open_group("memory://deepfere-test/g")["a"][:]
    assert (again[:5] == 3).all() and np.isnan(again[5:]).all()
    cube, mask = cube_of()
    m = write_measured("memory://deepfere-test/m", cube, mask, [1.0, 2.0, 3.0], 5)
    np.testing.assert_array_equal(m.cube(), cube)
    with pytest.raises(InputError, match="exists already"):
        write_measured("memory://deepfere-test/m", cube, mask, [1.0, 2.0, 3.0], 5)
    write_measured("memory://deepfere-test/m", cube, mask, [1.0, 2.0, 4.0], 5, overwrite=True)


def test_spectrum_factors():
    rows = np.array([[0, 1, 3, 0], [2, 4, 6, 8], [0, 0, 0, 0], [0, 0, 5, 0]], np.float32)
    tic, rms, median = spectrum_factors(rows)
    assert tic.tolist() == [4, 20, 0, 5] and median.tolist() == [2, 5, 0, 5]
    np.testing.assert_allclose(rms, np.sqrt((rows**2).mean(1)))


def test_profile_area_is_exact():
    axis = np.array([100.0, 100.01, 100.02, 100.03, 100.04])
    triangle = np.array([[0, 5, 10, 5, 0], [1, 1, 1, 1, 1]], np.float32)
    # +-200 ppm of 100.02 is [100.0 - 4e-6, 100.04 + 4e-6]: everything; +-50 ppm cuts inside the lines
    got = Windows(np.array([100.02]), 200).area(axis, triangle)
    np.testing.assert_allclose(got[:, 0], [0.2, 0.04], rtol=1e-5)
    half = 50e-6 * 100.02
    got = Windows(np.array([100.02]), 50).area(axis, triangle)
    np.testing.assert_allclose(got[:, 0], [2 * (10 * half - 500 * half**2 / 2), 2 * half], rtol=1e-5)
    # points left out between two peaks: no line across
    gap = np.array([100.0, 100.01, 100.02, 105.0, 105.01, 105.02])
    got = Windows(np.array([102.0, 105.01]), 1000).area(gap, np.ones((1, 6), np.float32))
    np.testing.assert_allclose(got, [[0, 0.02]], atol=1e-6)


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
    got = find_ions(lambda: [sample_profiles(lambda: spectra)], PeakSpec(tolerance_ppm=40))
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
