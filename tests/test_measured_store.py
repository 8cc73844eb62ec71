"""The measured store: what may be written where, normalisation, ion images, URLs."""

import pickle

import numpy as np
import pytest
import zarr

from deepfere.errors import InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.normalise import spectrum_factors
from deepfere.measured.store import open_measured
from deepfere.measured.writer import MeasuredWriter, write_measured
from deepfere.store import create_array, open_group

from .imzml_bytes import simple_spectra, write_pair


@pytest.fixture
def out(tmp_path):
    return tmp_path / "m.zarr"


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
        (lambda c, k, z: (c, k, [z[0], *z[:-1]]), "each once"),
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
