"""The index's cache, a disk that fills up, files that are cut or contradict themselves, and imzML opened as it is."""

from __future__ import annotations

import os
import subprocess
import warnings

import numpy as np
import pytest

import deepfere
from deepfere.errors import DeepfereError, InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.writer import MeasuredWriter
from deepfere.readers import imzml, imzml_cache
from deepfere.readers.imzml import read_index

from .imzml_bytes import simple_spectra, write_pair

COLUMNS = imzml.head.COLUMNS


def same_index(a, b):
    for name in (*vars(a), "mz_bytes", "int_bytes"):
        if name == "stated_bytes":
            assert a.stated_bytes.keys() == b.stated_bytes.keys()
        else:
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "a.imzML", simple_spectra(5, 6), note="x")


@pytest.fixture
def walks(monkeypatch):
    """How often an .imzML was walked."""
    seen = []
    walk = imzml._walk
    monkeypatch.setattr(imzml, "_walk", lambda path: seen.append(path) or walk(path))
    return seen


def test_a_cached_index_is_the_index(pair, tmp_path, walks):
    cache = tmp_path / "sub" / "index.parquet"
    first = read_index(pair, cache=cache)
    assert cache.exists() and [p.name for p in cache.parent.iterdir()] == ["index.parquet"]
    again = read_index(pair, cache=cache)
    assert len(walks) == 1
    same_index(first, again)
    same_index(first, read_index(pair))
    assert again.pitch_um == (20.0, 10.0) and again.representation == "centroid"
    # What the .ibd says is looked at every time.
    pair.with_suffix(".ibd").write_bytes(pair.with_suffix(".ibd").read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        read_index(pair, cache=cache)


def test_a_cache_of_another_file_is_written_anew(pair, tmp_path, walks):
    cache = tmp_path / "index.parquet"
    read_index(pair, cache=cache)
    stat = pair.stat()
    text = pair.read_text()
    pair.write_text(text.replace('name="position x" value="6"', 'name="position x" value="7"'))
    os.utime(pair, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as large and as old, but another
    assert read_index(pair, cache=cache).x[:].max() == 7 and len(walks) == 2
    assert read_index(pair, cache=cache).x[:].max() == 7 and len(walks) == 2
    os.utime(pair, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    read_index(pair, cache=cache)
    assert len(walks) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "old", "column"])
def test_a_damaged_cache_is_as_none(pair, tmp_path, walks, damage, monkeypatch):
    import pyarrow.parquet as pq

    cache = tmp_path / "index.parquet"
    want = read_index(pair, cache=cache)
    if damage == "old":
        monkeypatch.setattr(imzml_cache, "VERSION", 99)
    elif damage == "column":
        pq.write_table(pq.read_table(cache).drop_columns(["x"]), cache)
    else:
        whole = cache.read_bytes()
        cache.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "other": b"PAR1 not"}[damage])
    same_index(read_index(pair, cache=cache), want)
    same_index(read_index(pair, cache=cache), want)
    assert len(walks) == 2


def test_a_cache_that_cannot_be_written_is_none(pair, tmp_path, walks):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file" / "index.parquet", tmp_path):
        assert len(read_index(pair, cache=cache)) == 30
    assert len(walks) == 2
    with pytest.raises(InputError, match="cannot be read"):
        read_index(tmp_path / "absent.imzML", cache=tmp_path / "c.parquet")
    assert not (tmp_path / "c.parquet").exists()


def test_ingestion_keeps_its_index(pair, tmp_path, walks):
    cache = tmp_path / "index.parquet"
    a = ingest(pair, tmp_path / "1.zarr", index_cache=cache)
    b = ingest(pair, tmp_path / "2.zarr", index_cache=cache)
    assert len(walks) == 1
    np.testing.assert_array_equal(a.cube(), b.cube())


def noise(ny, nx, m, seed=0):
    rng = np.random.default_rng(seed)
    mz = np.sort(rng.uniform(100, 1000, m)).tolist()
    return [(x, y, mz, rng.random(m).tolist()) for y in range(ny) for x in range(nx)]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_a_full_disk_is_one_line_and_a_rerun_completes(tmp_path, small_disk, codec):
    path = write_pair(tmp_path / "a.imzML", noise(40, 40, 300), mode="continuous")
    fill = small_disk / "fill"
    fill.write_bytes(bytes(700_000))
    out = small_disk / "m.zarr"
    with pytest.raises(DeepfereError, match="No space left on device; make room") as caught:
        ingest(path, out, band_rows=10, codec=codec)
    assert "\n" not in str(caught.value) and str(out) in str(caught.value) and not isinstance(caught.value, InputError)
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    fill.unlink()
    m = ingest(path, out, band_rows=10, codec=codec)
    np.testing.assert_array_equal(m.cube(), ingest(path, tmp_path / "m.zarr").cube())


@pytest.mark.parametrize("when", ["write_images", "finish"])
def test_no_room_at_any_time_leaves_nothing(pair, tmp_path, monkeypatch, when):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(MeasuredWriter, when, full)
        with pytest.raises(DeepfereError, match="No space left"):
            ingest(pair, tmp_path / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()
    assert ingest(pair, tmp_path / "m.zarr").mask.all()


def test_an_ibd_cut_short_is_refused_before_work(pair, tmp_path):
    ibd = pair.with_suffix(".ibd")
    ibd.write_bytes(ibd.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"truncated: spectrum 29 of 30 .*copy the \.ibd again"):
        ingest(pair, tmp_path / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()


def test_another_identifier_is_warned_about_and_ingested(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), uuid=bytes(16))
    with pytest.warns(UserWarning, match="belong together"):
        m = ingest(path, tmp_path / "m.zarr")
    assert m.attrs["uuid_matches"] is False and m.mask.all()


def test_contradicting_settings_ask_for_the_pitch(tmp_path):
    size = '<cvParam accession="IMS:1000046" name="pixel size (x)" value="{0}"/>'
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), scan_settings=[size.format(10), size.format(25)])
    with pytest.raises(InputError, match=r"contradict each other.*give --pitch-um"):
        ingest(path, tmp_path / "m.zarr")
    assert ingest(path, tmp_path / "m.zarr", pitch_um=10).grid.pitch_um == (10.0, 10.0)


@pytest.mark.parametrize("mode", ["continuous", "processed"])
@pytest.mark.parametrize("compress", [False, True])
def test_an_imzml_opens_as_it_is(tmp_path, mode, compress):
    spectra = [s for k, s in enumerate(noise(6, 5, 20)) if k not in (7, 8)]
    path = write_pair(tmp_path / "a.imzML", spectra, mode=mode, compress=compress)
    raw, cube = deepfere.open_measured(path), ingest(path, tmp_path / "m.zarr", mz=spectra[0][2])
    stored = deepfere.open_measured(tmp_path / "m.zarr")
    np.testing.assert_array_equal(raw.mask, cube.mask)
    assert raw.mask.sum() == 28 and not raw.mask[1, 2]
    for mz in cube.mz[[0, 9, 19]]:
        np.testing.assert_array_equal(raw.ion_image(mz), stored.ion_image(mz))
        wide = raw.ion_image(mz, ppm=5e4)
        assert (wide[raw.mask] >= raw.ion_image(mz)[raw.mask]).all() and np.isnan(wide[1, 2])
    mz, values = raw.spectrum(5, 4)
    assert mz.tolist() == spectra[-1][2] and values.tolist() == np.float32(spectra[-1][3]).tolist()
    assert raw.ion_image(50.0)[0, 0] == 0  # nothing there is not an error
    with pytest.raises(InputError, match="the nearest is"):
        stored.ion_image(50.0)
    with pytest.raises(InputError, match="was not measured"):
        raw.spectrum(1, 2)
    with pytest.raises(InputError, match="outside the grid"):
        raw.spectrum(6, 0)
    for wrong in ((0.0, 5), (float("nan"), 5), (100, 0), (100, -1)):
        with pytest.raises(InputError, match="no window"):
            raw.ion_image(*wrong)


def test_an_imzml_with_repeats_and_without_a_representation(tmp_path):
    path = write_pair(tmp_path / "a.imzML", [*simple_spectra(), (2, 2, [100.0], [9.0])], spectrum_type="")
    raw = deepfere.open_measured(str(path))
    with pytest.raises(InputError, match="neither centroid nor profile"):
        raw.ion_image(100.0)
    assert raw.ion_image(100.0, representation="centroid")[1, 1] == 12 + 9
    with pytest.raises(InputError, match="has 2 spectra"):
        raw.spectrum(1, 1)


def test_a_profile_window_is_its_area(tmp_path):
    axis = (100 + 0.001 * np.arange(11)).tolist()
    kind = '<cvParam accession="MS:1000128" name="profile spectrum"/>'
    spectra = [(x, y, axis, [float(x)] * 11) for y in (1, 2) for x in (1, 2, 3)]
    raw = deepfere.open_measured(write_pair(tmp_path / "a.imzML", spectra, mode="continuous", spectrum_type=kind))
    np.testing.assert_allclose(raw.ion_image(100.005, ppm=20)[0], 0.0040002 * np.array([1, 2, 3]), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw.ion_image(100.005, ppm=2000)
