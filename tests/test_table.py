"""Tables of pixels by m/z bins: AnnData and SpatialData stores, written by hand, and by thyra where it is there."""

import json
import os
import pickle
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import zarr
from pyimzml.ImzMLWriter import ImzMLWriter
from scipy import sparse

import deepfere
from deepfere.errors import InputError
from deepfere.inspect import describe
from deepfere.measured.ingest import ingest
from deepfere.pipeline.study import each_region
from deepfere.readers.columns import Column
from deepfere.readers.table import is_table, open_table, table_digest
from deepfere.readers.table_rows import RowReader
from deepfere.section import load_study

from .imzml_bytes import write_pair

ENCODINGS = ["csc", "csr", "dense"]
PITCH = {"pixel_size_x_um": 10.0, "pixel_size_y_um": 20.0, "pixel_size_units": "micrometers"}
NAME = "tables/msi_dataset_z0"


def write_table(
    path, values, x, y, mz, *, encoding="csc", name=NAME, kind="centroid spectrum", attrs=PITCH, zarr_format=3, chunk=7
):
    """A store as converters write it, in small chunks; ``name`` empty for a plain AnnData store."""
    root = zarr.open_group(path, mode="a", zarr_format=zarr_format)
    root.attrs.update({**attrs, **({"spatialdata_attrs": {"version": "0.2"}} if name else {})})
    group = root.require_group(name) if name else root
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})

    def put(name, array, chunks=None):
        array = np.asarray(array)
        made = group.create_array(
            name, shape=array.shape, dtype=array.dtype, chunks=chunks or tuple(max(1, n) for n in array.shape)
        )
        made[...] = array

    put("obs/x", np.asarray(x, np.int32))
    put("obs/y", np.asarray(y, np.int32))
    put("var/mz", mz)
    if encoding == "dense":
        put("X", values, (chunk, 5))
        group["X"].attrs["encoding-type"] = "array"
    else:
        matrix = sparse.csc_matrix(values) if encoding == "csc" else sparse.csr_matrix(values)
        for part in ("data", "indices", "indptr"):
            put(f"X/{part}", getattr(matrix, part), (chunk,))
        group["X"].attrs.update({"encoding-type": f"{encoding}_matrix", "shape": list(values.shape)})
    if kind:
        text = group.create_array("uns/essential_metadata/spectrum_type", shape=(), dtype=str)
        text[...] = kind
    return path


def spectra(ny=9, nx=7, m=11, seed=0, keep=0.7, filled=0.5):
    """Pixels in random order, with gaps, values (N, A) with zeros, x, y and m/z."""
    rng = np.random.default_rng(seed)
    values = (rng.gamma(2.0, 50.0, (ny * nx, m)) * (rng.random((ny * nx, m)) < filled)).astype(np.float32)
    values[:, 0] += 1
    at = rng.permutation(ny * nx)
    inside = (rng.random(ny * nx) < keep) | np.isin(np.arange(ny * nx), [0, nx - 1, ny * nx - 1, ny * nx - nx])
    at = at[inside[at]]
    return values[at], at % nx + 5, at // nx + 2, np.sort(rng.uniform(200, 1200, m))


def as_imzml(path, values, x, y, mz, mode="continuous"):
    """The same spectra as an imzML; processed ones are written without their zeros."""
    kept = [np.arange(len(mz)) if mode == "continuous" else np.flatnonzero(v) for v in values]
    rows = [(int(a), int(b), mz[k].tolist(), v[k].tolist()) for a, b, v, k in zip(x, y, values, kept, strict=True)]
    return write_pair(path, rows, mode=mode)


def assert_same(table, imzml, rms=True):
    np.testing.assert_array_equal(table.mz, imzml.mz)
    np.testing.assert_array_equal(table.mask, imzml.mask)
    np.testing.assert_allclose(table.cube(), imzml.cube(), rtol=1e-6)
    for name in ("tic", "rms", "median") if rms else ("tic", "median"):
        np.testing.assert_allclose(getattr(table, name), getattr(imzml, name), rtol=1e-6)
    assert table.grid.pitch_um == imzml.grid.pitch_um == (20.0, 10.0)
    assert table.attrs["origin_px"] == imzml.attrs["origin_px"]
    assert table.attrs["ions"] == imzml.attrs["ions"]
    assert table.attrs["representation"] == imzml.attrs["representation"]


@pytest.fixture(params=["at once", "a piece at a time"])
def memory(request, monkeypatch):
    """Room for everything, or for next to nothing."""
    if request.param == "a piece at a time":
        monkeypatch.setattr("deepfere.readers.table_rows.PIECE_VALUES", 14)
        monkeypatch.setattr("deepfere.readers.table_rows.HELD_VALUES", 20)
        monkeypatch.setattr("deepfere.readers.table_rows.MOST_HELD", 20)
        monkeypatch.setattr("deepfere.measured.raster.BATCH_VALUES", 25)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("band_rows", [2, 64])
def test_equals_the_same_spectra_as_imzml(tmp_path, memory, encoding, band_rows):
    data = spectra()
    table = ingest(write_table(tmp_path / "t.zarr", *data, encoding=encoding), tmp_path / "a.zarr", band_rows=band_rows)
    assert_same(table, ingest(as_imzml(tmp_path / "b.imzML", *data), tmp_path / "b.zarr", band_rows=band_rows))
    assert table.attrs["ions"] == "axis"
    assert table.attrs["source"] == ["t.zarr", NAME]
    assert table.attrs["encoding"] == encoding


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_targets_are_sums_of_bins(tmp_path, memory, encoding):
    values, x, y, _ = spectra(m=40)
    mz = 500 * (1 + 4e-6 * np.arange(40))
    targets = [mz[3], mz[20] * (1 + 1e-6)]
    table = ingest(
        write_table(tmp_path / "t.zarr", values, x, y, mz, encoding=encoding), tmp_path / "a.zarr", mz=targets
    )
    imzml = ingest(as_imzml(tmp_path / "b.imzML", values, x, y, mz, "processed"), tmp_path / "b.zarr", mz=targets)
    assert_same(table, imzml, rms=False)
    np.testing.assert_allclose(table.cube()[0][y - 2, x - 5], values[:, 2:5].sum(1), rtol=1e-6)
    # Windows that part the bins share out all of the signal, and no more, whatever the spectra are said to be.
    parts = ingest(tmp_path / "t.zarr", tmp_path / "c.zarr", mz=mz[1::3], tolerance_ppm=4.5, representation="profile")
    np.testing.assert_allclose(parts.cube().sum(0)[y - 2, x - 5], values[:, :39].sum(1), rtol=1e-5)


def test_many_variables_give_the_same_peaks_as_imzml(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfere.measured.table.MAX_VARIABLES", 100)
    rng = np.random.default_rng(1)
    mz = 400 * (1 + 1e-6) ** np.arange(4000)
    near = np.exp(-0.5 * ((np.arange(4000)[:, None] - np.arange(300, 4000, 400)) / 1.5) ** 2)
    values = (rng.gamma(2.0, 50.0, (64, near.shape[1])) @ near.T).astype(np.float32)
    values[values < 1] = 0
    x, y = np.arange(64) % 8 + 5, np.arange(64) // 8 + 2
    write_table(tmp_path / "t.zarr", values, x, y, mz, chunk=5000)
    as_imzml(tmp_path / "b.imzML", values, x, y, mz, "processed")
    table = ingest(tmp_path / "t.zarr", tmp_path / "a.zarr", tolerance_ppm=8)
    assert table.attrs["ions"] == "automatic"
    assert len(table.mz) == near.shape[1]
    assert_same(table, ingest(tmp_path / "b.imzML", tmp_path / "b.zarr", tolerance_ppm=8), rms=False)
    profile = ingest(tmp_path / "t.zarr", tmp_path / "c.zarr", tolerance_ppm=8, representation="profile")
    np.testing.assert_allclose(profile.mz, table.mz, rtol=1e-6)
    np.testing.assert_allclose(profile.cube().sum(0), profile.tic, rtol=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_come_as_they_are_stored(tmp_path, memory, encoding):
    values, x, y, mz = spectra(m=23, filled=0.2, seed=3)
    table = open_table(write_table(tmp_path / "t.zarr", values, x, y, mz, encoding=encoding))
    order = np.random.default_rng(0).permutation(len(table))[:-5]
    reader = RowReader(table, order)
    for _ in range(2):
        for k in range(0, len(order), 4):
            columns, found, lengths = reader.read(order[k : k + 4])
            for row, c, v in zip(
                order[k : k + 4],
                np.split(columns, np.cumsum(lengths)[:-1]),
                np.split(found, np.cumsum(lengths)[:-1]),
                strict=True,
            ):
                np.testing.assert_array_equal(c, np.flatnonzero(values[row]))
                np.testing.assert_array_equal(v, values[row][c])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pixels_without_values_were_not_measured(tmp_path, encoding):
    values, x, y, mz = spectra(keep=1.0)
    values[[3, 17]] = 0
    path = write_table(tmp_path / "t.zarr", values, x, y, mz, encoding=encoding)
    cube = ingest(path, tmp_path / "m.zarr")
    assert not cube.mask[y[[3, 17]] - 2, x[[3, 17]] - 5].any()
    assert cube.mask.sum() == len(x) - 2
    assert cube.attrs["empty_rows"] == 2
    assert "2, taken as not measured" in describe(path).fact("empty rows")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", ["", NAME])
def test_plain_anndata_and_older_zarr(tmp_path, zarr_format, name):
    data = spectra()
    path = write_table(tmp_path / "t.zarr", *data, name=name, zarr_format=zarr_format, encoding="csr")
    assert is_table(path)
    table = ingest(path, tmp_path / "a.zarr")
    assert_same(table, ingest(as_imzml(tmp_path / "b.imzML", *data), tmp_path / "b.zarr"))
    assert describe(path).fact("pitch") == "20 x 10 um"
    # Inside a SpatialData store the table itself may be given; the pixel size is the store's.
    assert ingest(path / name, tmp_path / "c.zarr").grid == table.grid


def test_one_of_several_tables_is_asked_for(tmp_path, cli):
    one, two = spectra(), spectra(seed=1)
    path = write_table(tmp_path / "t.zarr", *one)
    alone = table_digest(path)
    write_table(path, *two, name="tables/b")
    told = cli("info", path)
    assert told.code == 2
    assert f"holds 2 tables (b, msi_dataset_z0); give one of them: {path}/tables/b" in told.err
    assert ingest(path / "tables" / "b", tmp_path / "m.zarr").mask.sum() == len(two[1])
    assert table_digest(path / NAME) == alone
    assert table_digest(path / "tables" / "b") != alone


def test_order_of_variables_negatives_and_duplicates(tmp_path):
    values, x, y, mz = spectra(keep=1.0)
    values[5, 2] = -3
    x[8], y[8] = x[9], y[9]
    shuffled = np.random.default_rng(0).permutation(len(mz))
    path = write_table(tmp_path / "t.zarr", values[:, shuffled], x, y, mz[shuffled])
    with pytest.raises(InputError, match="1 pixels with several spectra"):
        ingest(path, tmp_path / "a.zarr")
    imzml = as_imzml(tmp_path / "b.imzML", values, x, y, mz)
    for policy in ("sum", "mean"):
        with pytest.warns(UserWarning, match="1 negative intensities set to zero"):
            table = ingest(path, tmp_path / "a.zarr", duplicates=policy, overwrite=True)
        with pytest.warns(UserWarning, match="1 negative"):
            assert_same(table, ingest(imzml, tmp_path / "b.zarr", duplicates=policy, overwrite=True))


def two_pieces(path, encoding="csc"):
    rng = np.random.default_rng(0)
    at = [(x, y) for y in range(6) for x in range(5)] + [(x + 20, y + 4) for y in range(7) for x in range(4)]
    x, y = np.array(at).T
    return write_table(path, rng.gamma(2.0, 5.0, (len(x), 3)), x, y, np.array([100.0, 200.0, 300.0]), encoding=encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_regions(tmp_path, encoding):
    path = two_pieces(tmp_path / "t.zarr", encoding)
    with pytest.raises(InputError, match="holds 2 regions"):
        ingest(path, tmp_path / "m.zarr")
    cube = ingest(path, tmp_path / "m.zarr", region=2)
    assert cube.grid.shape_px == (7, 4)
    assert cube.mask.all()
    whole = ingest(path, tmp_path / "all.zarr", region="all")
    np.testing.assert_array_equal(whole.cube()[:, 4:, 20:], cube.cube())
    assert describe(path).fact("regions") == "2"
    manifest = tmp_path / "study.yaml"
    manifest.write_text("sections:\n  - {name: one, msi: t.zarr, region: each}\n")
    assert [s.region for s in each_region(load_study(manifest).sections, manifest)] == [1, 2]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_looked_at_as_it_is(tmp_path, memory, encoding):
    values, x, y, mz = spectra()
    path = write_table(tmp_path / "t.zarr", values, x, y, mz, encoding=encoding)
    raw, cube = deepfere.open_measured(path), ingest(path, tmp_path / "m.zarr")
    np.testing.assert_array_equal(raw.mask, cube.mask)
    np.testing.assert_allclose(raw.ion_image(mz[4]), cube.ion_image(mz[4]), rtol=1e-6)
    found_mz, found = raw.spectrum(int(y[0]) - 2, int(x[0]) - 5)
    np.testing.assert_array_equal(found_mz, mz[values[0] > 0])
    np.testing.assert_array_equal(found, values[0][values[0] > 0])
    np.testing.assert_allclose(raw.tic, cube.tic, rtol=1e-6)
    # Again, from several threads, and in another process.
    with ThreadPoolExecutor(4) as pool:
        for m, image in zip(mz, pool.map(raw.ion_image, mz), strict=True):
            np.testing.assert_array_equal(image, cube.ion_image(m))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(raw)).ion_image(mz[4]), cube.ion_image(mz[4]))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("change", ["more", "fewer"])
def test_a_table_that_changes_while_it_is_read(tmp_path, memory, encoding, change):
    values, x, y, mz = spectra()
    table = open_table(write_table(tmp_path / "t.zarr", values, x, y, mz, encoding=encoding))
    k = 5  # of a pixel
    lengths = table.length[:].copy()
    lengths[k] += 1 if change == "fewer" else -1
    other = replace(table, length=Column.of(lengths))
    with pytest.raises(InputError, match=r"its table cannot be read \(it changes while it is read\)"):
        reader = RowReader(other, np.random.default_rng(0).permutation(len(table)))
        for row in reader.order[:]:
            reader.read(np.array([row]))


def test_fuse_and_study_take_a_table(tmp_path, cli):
    values, x, y, mz = spectra(keep=1.0, filled=1.0)
    path = write_table(tmp_path / "t.zarr", values, x, y, mz)
    command = ["fuse", path, "--no-guide", "-o", tmp_path / "r.zarr", "--factor", 2, "tracking.uri=none"]
    told = cli(*command)
    assert told.code == 0, told.err
    result = deepfere.open(tmp_path / "r.zarr")
    np.testing.assert_allclose(result.measured(mz[3])[y - 2, x - 5], values[:, 3], rtol=1e-6)
    # What else is in the store does not matter; what the table is, and how large its pixels, does.
    zarr.open_group(path, mode="r+").create_group("images")
    assert "finished already" in cli(*command).out
    zarr.open_group(path, mode="r+").attrs["pixel_size_x_um"] = 12.0
    told = cli(*command)
    assert told.code == 2
    assert "overwrite" in told.err
    manifest = tmp_path / "study.yaml"
    manifest.write_text(f"sections:\n  - {{name: one, msi: {path}}}\n")
    told = cli("ingest", manifest, "-o", tmp_path / "work", "--no-guide", "tracking.uri=none")
    assert told.code == 0, told.err
    assert "one: 11 ions, 9 x 7 pixels" in told.out


def no_pitch(group):
    del group.attrs["pixel_size_x_um"], group.attrs["pixel_size_y_um"]


def half_pitch(group):
    del group.attrs["pixel_size_y_um"]


def other_unit(group):
    group.attrs["pixel_size_units"] = "nanometers"


def other_source(group):
    group.attrs["pixel_size_detection_info"] = {"detected_x_um": 10.0, "detected_y_um": 10.0}


def no_x(group):
    del group[f"{NAME}/obs/x"]


def no_mz(group):
    del group[f"{NAME}/var/mz"]


def fractions(group):
    count = group[f"{NAME}/obs/y"].shape
    del group[f"{NAME}/obs/y"]
    group.create_array(f"{NAME}/obs/y", shape=count, dtype=float, chunks=count, fill_value=0.5)


def bad_mz(group):
    group[f"{NAME}/var/mz"][3] = np.nan


def not_finite(group):
    group[f"{NAME}/X/data"][3] = np.inf


def beyond(group):
    group[f"{NAME}/X/indices"][3] = 500


def cut(group):
    group[f"{NAME}/X/data"].resize((20,))


def other_matrix(group):
    group[f"{NAME}/X"].attrs["encoding-type"] = "coo_matrix"


def short(group):
    group[f"{NAME}/obs/x"].resize((20,))


def no_table(group):
    del group[NAME]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_pitch, "states no pixel size; give --pitch-um"),
        (half_pitch, "states a pixel size for x alone; give --pitch-um"),
        (other_unit, "states its pixel size in 'nanometers', not in micrometres; give --pitch-um"),
        (other_source, "states pixels of 20 x 10 um, but its source's were 10 x 10 um; give --pitch-um"),
        (no_x, "does not state the position x of its pixels (obs/x)"),
        (no_mz, "does not state the m/z of its variables (var/mz)"),
        (fractions, "positions (obs/y) that are not whole numbers"),
        (bad_mz, "m/z that are not positive numbers"),
        (not_finite, "has intensities that are not finite numbers"),
        (beyond, "its table cannot be read"),
        (cut, "its table cannot be read"),
        (other_matrix, "its values (X) are coo_matrix"),
        (short, "obs/x holds int32 of shape (20,)"),
        (no_table, "holds no table of a measurement"),
    ],
)
def test_refusals(tmp_path, cli, spoil, words):
    path = write_table(tmp_path / "t.zarr", *spectra())
    spoil(zarr.open_group(path, mode="r+"))
    told = cli("fuse", path, "--no-guide", "-o", tmp_path / "r.zarr", "--factor", 2, "tracking.uri=none")
    assert told.code == 2
    assert words in told.err
    assert told.err.strip().splitlines()[-1].startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.zarr"]


def test_a_given_pitch_wins(tmp_path):
    path = write_table(tmp_path / "t.zarr", *spectra(), attrs={})
    assert "give --pitch-um" in describe(path).fact("pitch")
    assert ingest(path, tmp_path / "m.zarr", pitch_um=(30, 40)).grid.pitch_um == (30.0, 40.0)


def test_targets_and_bins_that_miss_each_other(tmp_path, monkeypatch):
    values, x, y, mz = spectra()
    path = write_table(tmp_path / "t.zarr", values, x, y, mz, kind="processed")
    with pytest.raises(InputError, match="no variable within 5 ppm of a target; the nearest is"):
        ingest(path, tmp_path / "m.zarr", mz=[50.0])
    with pytest.warns(UserWarning, match="1 of 2 targets have no variable within 5 ppm"):
        cube = ingest(path, tmp_path / "m.zarr", mz=[50.0, mz[2]])
    assert not np.nan_to_num(cube.cube()[0]).any()
    monkeypatch.setattr("deepfere.measured.table.MAX_VARIABLES", 10)
    with pytest.raises(InputError, match="neither centroid nor profile; give --representation"):
        ingest(path, tmp_path / "n.zarr")
    # Maxima between two bins of 40 ppm: no bin is near enough.
    mz = 500 * (1 + 40e-6 * np.arange(60))
    values = np.zeros((64, 60)) + np.exp(-0.5 * ((np.arange(60) - 30.4) / 1.2) ** 2)
    wide = write_table(tmp_path / "w.zarr", values, np.arange(64) % 8, np.arange(64) // 8, mz, kind="profile spectrum")
    with pytest.raises(InputError, match=r"bins that are up to 40 ppm wide.*give --tolerance-ppm 40"):
        ingest(wide, tmp_path / "n.zarr")
    assert len(ingest(wide, tmp_path / "n.zarr", tolerance_ppm=40).mz) == 1


def test_weak_ions_have_an_mz(tmp_path):
    rng = np.random.default_rng(0)
    spectra = [
        (k % 6, k // 6, [300.0, 600.0], [float(rng.uniform(1e9, 2e9)), float(rng.uniform(1e-20, 2e-20))])
        for k in range(36)
    ]
    cube = ingest(write_pair(tmp_path / "a.imzML", spectra), tmp_path / "m.zarr")
    np.testing.assert_allclose(cube.mz, [300.0, 600.0], rtol=1e-9)


def thyra(source, out, *options):
    """Convert with thyra, which lives in an environment of its own; skip where it is not there."""
    command = shutil.which(os.environ.get("DEEPFERE_THYRA", "thyra"))
    if command is None:
        pytest.skip("thyra is not installed (pip install thyra in its own environment, and set DEEPFERE_THYRA)")
    told = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=300).stdout
    if options and options[0] not in told:
        if "csc" not in options:  # what newer ones write, without an option
            pytest.skip(f"this thyra has no {options[0]}")
        options = ()
    done = subprocess.run([command, source, out, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return out


def for_thyra(path, spectra, pixel_um):
    """An imzML that thyra's parser takes; ``pixel_um`` is (x, y)."""
    with ImzMLWriter(str(path), mode="processed", spec_type="centroid") as writer:
        for x, y, mz, values in spectra:
            writer.addSpectrum(mz, values, (x, y, 1))
    terms = zip(("46", "47"), ("pixel size (x)", "pixel size y"), pixel_um, strict=True)
    sizes = "".join(
        f'<cvParam cvRef="IMS" accession="IMS:10000{term}" name="{name}" value="{size}" unitCvRef="UO" '
        'unitAccession="UO:0000017" unitName="micrometer"/>'
        for term, name, size in terms
    )
    path.write_text(path.read_text().replace("</scanSettings>", sizes + "</scanSettings>"))
    return path


@pytest.mark.parametrize("layout", ["csc", "csr"])
def test_what_thyra_writes(tmp_path, layout):
    rng = np.random.default_rng(0)
    mz = np.array([220.05, 310.2, 455.123, 680.4, 901.7])
    spectra = [
        (x + 1, y + 1, mz * (1 + 1e-6 * rng.standard_normal(5)), rng.gamma(2.0, 50.0, 5).astype(np.float32))
        for y in range(6)
        for x in range(7)
        if (x, y) != (3, 3)
    ]
    source = for_thyra(tmp_path / "a.imzML", spectra, (20, 20))
    path = thyra(source, tmp_path / "t.zarr", "--sparse-format", layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = ingest(path, tmp_path / "t_m.zarr", mz=mz, tolerance_ppm=30)
    imzml = ingest(source, tmp_path / "a_m.zarr", mz=mz, tolerance_ppm=30)
    np.testing.assert_array_equal(table.mask, imzml.mask)
    assert table.grid == imzml.grid
    assert table.attrs["representation"] == "centroid"
    assert table.attrs["encoding"] == layout
    np.testing.assert_allclose(table.cube(), imzml.cube(), rtol=1e-5)
    np.testing.assert_allclose(table.tic, imzml.tic, rtol=1e-5)
    found = ingest(path, tmp_path / "auto.zarr")
    assert found.attrs["ions"] == "automatic"
    np.testing.assert_allclose(found.mz, mz, rtol=5e-6)


def test_the_pixel_height_that_older_thyras_lose(tmp_path):
    spectra = [(x + 1, y + 1, [300.0, 500.0], [1.0, 2.0 + x + y]) for y in range(4) for x in range(4)]
    path = thyra(for_thyra(tmp_path / "a.imzML", spectra, (10, 20)), tmp_path / "t.zarr")
    if zarr.open_group(path, mode="r").attrs["pixel_size_y_um"] == 20:
        assert open_table(path).pitch_um == (20.0, 10.0)
        return
    with pytest.raises(InputError, match="states pixels of 10 x 10 um, but its source's were 20 x 10 um"):
        ingest(path, tmp_path / "m.zarr")


def test_a_table_and_an_imzml_share_the_ions_of_a_study(tmp_path, cli):
    """The table's own variables are ions no longer: the other section has another m/z too."""
    values, x, y, mz = spectra(filled=0.9)
    write_table(tmp_path / "t.zarr", values, x, y, mz)
    more = np.insert(mz, 5, (mz[4] + mz[5]) / 2)
    as_imzml(tmp_path / "i.imzML", np.insert(values, 5, 7.0, axis=1), x, y, more, mode="processed")
    (tmp_path / "study.csv").write_text("name,msi,pitch_um\ntable,t.zarr,\nfile,i.imzML,10\n")
    done = cli("ingest", tmp_path / "study.csv", "-o", tmp_path / "w", "--no-guide")
    assert done.code == 0 and done.out.count("12 ions, 9 x 7 pixels") == 2, done
    table, file = (deepfere.open_measured(tmp_path / "w" / "sections" / s / "measured.zarr") for s in ("table", "file"))
    np.testing.assert_allclose(table.mz, more, rtol=1e-8)
    np.testing.assert_array_equal(table.mz, file.mz)
    np.testing.assert_array_equal(np.delete(table.cube(), 5, 0), np.delete(file.cube(), 5, 0))
    assert (table.cube()[5][table.mask] == 0).all() and (file.cube()[5][file.mask] == 7).all()
    told = json.loads((tmp_path / "w" / "done" / "ingest-table.json").read_text())["warnings"]
    assert len(told) == 1 and "1 of 12 ions of the study have no variable within 5 ppm and are zero" in told[0]
    # A bin, not a peak of its own, cannot be shifted.
    lost = cli("ingest", tmp_path / "study.csv", "-o", tmp_path / "l", "--no-guide", f"ingest.lock_mass_mz=[{mz[0]}]")
    assert lost.code == 2 and "section table, sample" in lost.err and "holds bins of m/z" in lost.err
