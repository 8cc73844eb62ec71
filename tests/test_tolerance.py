"""Windows with a relative and an absolute part, for all ions or for each."""

import numpy as np
import pytest

from deepfere.config import load_config
from deepfere.errors import InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.peaks import find_ions
from deepfere.measured.sampled import PeakSpec, sample_centroids, sample_profiles
from deepfere.measured.store import open_measured
from deepfere.measured.tolerance import Targets, Tolerance
from deepfere.measured.writer import write_measured
from deepfere.pipeline import fuse
from deepfere.pipeline.prepare import targets_of

from .imzml_bytes import write_pair

LOW, HIGH = 100.0, 1000.0
PPM, DA = 5.0, 0.002
EDGES = {LOW: 0.0025, HIGH: 0.007}
"""Half-widths: 0.0005 and 0.005 of the relative part, and 0.002."""


def beside_edges(shift=1e-5):
    """Pixels that hold a centroid just inside of an edge, and one just outside."""
    mz = sorted(
        m + sign * (half - shift * inside) for m, half in EDGES.items() for sign in (-1, 1) for inside in (-1, 1)
    )
    value = [float(10**k) for k in range(len(mz))]
    return [(x + 1, y + 1, mz, value) for y in range(3) for x in range(3)]


@pytest.mark.parametrize("mode", ["processed", "continuous"])
def test_the_absolute_part_counts_at_low_mz_and_the_relative_one_at_high(tmp_path, mode):
    path = write_pair(tmp_path / "a.imzML", beside_edges(), mode=mode)
    m = ingest(path, tmp_path / "m.zarr", mz=[LOW, HIGH], tolerance_ppm=PPM, tolerance_da=DA, reference_mz=LOW)
    # Of outside, inside, inside, outside those inside.
    np.testing.assert_array_equal(m.cube()[:, 0, 0], [1e1 + 1e2, 1e5 + 1e6])
    np.testing.assert_array_equal(m.reference, np.full((3, 3), 110))
    assert m.attrs["tolerance_ppm"] == PPM and m.attrs["tolerance_da"] == DA
    for mz, half in EDGES.items():
        assert m.ion_image(mz + 0.99 * half).shape == (3, 3)
        with pytest.raises(InputError, match=r"no ion within 5 ppm \+ 0.002 Da of m/z"):
            m.ion_image(mz + 1.01 * half)
    with pytest.raises(InputError, match="no ion within 20 ppm of"):  # asked for, it is what counts
        m.ion_image(LOW + 0.99 * EDGES[LOW], 20)
    with pytest.warns(UserWarning, match="2 of 2|1 of 2"):
        narrow = ingest(path, tmp_path / "n.zarr", mz=[LOW, HIGH - 0.006], tolerance_ppm=PPM)
    assert not {"tolerance_da", "own_tolerances"} & set(narrow.attrs)


def test_without_an_absolute_part_windows_are_what_they_were():
    mz = np.array([123.4567, 798.541, 1999.9])
    np.testing.assert_array_equal(Tolerance(7.3).low(mz), mz * (1 - 7.3 * 1e-6))
    np.testing.assert_array_equal(Tolerance(7.3).high(mz), mz * (1 + 7.3 * 1e-6))
    np.testing.assert_array_equal(PeakSpec().place(mz), np.log(mz))
    assert PeakSpec().step == 5.0 * 1e-6 / 6 and PeakSpec(tolerance_ppm=1.0).step == 3.5e-7


@pytest.mark.parametrize(("ppm", "da"), [(5.0, 0.004), (0.001, 0.004)])
def test_automatic_ions_of_centroids_that_scatter_by_a_constant(ppm, da):
    rng = np.random.default_rng(1)
    ions = np.array([80.1, 80.12, 150.2, 150.22, 420.3, 950.4])
    spectra = [(ions + rng.uniform(-0.003, 0.003, len(ions)), rng.uniform(5, 10, len(ions))) for _ in range(200)]
    spec = PeakSpec(ppm, tolerance_da=da)
    np.testing.assert_allclose(find_ions(lambda: [sample_centroids(spectra, spec)], spec), ions, atol=5e-4)
    plain = PeakSpec(5.0)
    assert len(find_ions(lambda: [sample_centroids(spectra, plain)], plain)) > len(ions)


def test_automatic_ions_of_profiles_whose_peaks_are_equally_wide():
    rng = np.random.default_rng(2)
    axis, ions = np.arange(100.0, 400.0, 0.004), np.array([110.0, 110.15, 250.0, 390.0])
    shape = sum(np.exp(-0.5 * ((axis - m) / 0.02) ** 2) for m in ions)
    spectra = [(axis, 50 * shape + rng.random(len(axis))) for _ in range(30)]
    spec = PeakSpec(1.0, tolerance_da=0.04)
    np.testing.assert_allclose(find_ions(lambda: [sample_profiles(lambda: spectra, spec)], spec), ions, atol=1e-3)


def own_windows(path, out):
    given = [LOW, {"mz": HIGH, "tolerance_ppm": 0, "tolerance_da": 0.0071}, {"mz": HIGH - 0.02, "tolerance_ppm": 25}]
    config = load_config(None, ["ingest.tolerance_da=0.002"], ingest__mz=given)
    return ingest(path, out, mz=targets_of(config.ingest), tolerance_ppm=PPM, tolerance_da=DA)


def test_ions_with_windows_of_their_own(tmp_path):
    m = own_windows(write_pair(tmp_path / "a.imzML", beside_edges()), tmp_path / "m.zarr")
    assert m.mz.tolist() == [LOW, HIGH - 0.02, HIGH]
    np.testing.assert_allclose(m.tolerance.half_da(m.mz), [0.0025, 0.0269995, 0.0071])
    # The window of the second ends just before that of the third.
    np.testing.assert_array_equal(m.cube()[:, 1, 1], [1e1 + 1e2, 1e4 + 1e5 + 1e6, 1e4 + 1e5 + 1e6 + 1e7])
    again = open_measured(tmp_path / "m.zarr")
    for mz, row in ((HIGH - 0.008, 1), (HIGH - 0.0069, 2), (HIGH + 0.007, 2)):
        np.testing.assert_array_equal(again.ion_image(mz), m.cube()[row])
    with pytest.raises(InputError, match=r"within 0 ppm \+ 0.0071 Da of m/z 1000.01; the nearest is 1000 "):
        again.ion_image(HIGH + 0.0072 + 0.001)


def test_an_ingested_cube_keeps_its_windows(tmp_path):
    path = write_pair(tmp_path / "a.imzML", [(x, y, m, [v + x * y for v in i]) for x, y, m, i in beside_edges()])
    own = own_windows(path, tmp_path / "m.zarr")
    plain = ingest(path, tmp_path / "p.zarr", mz=[LOW, HIGH], tolerance_da=DA)
    same = [LOW, {"mz": HIGH, "tolerance_ppm": 0, "tolerance_da": 0.0071}, {"mz": HIGH - 0.02, "tolerance_ppm": 25}]
    settings = ["ingest.tolerance_da=0.002", "tracking.uri=none"]
    done = fuse(own.path, None, tmp_path / "r.zarr", guide=False, factor=2, mz=same, overrides=settings)
    assert done.index(HIGH + 0.007) == 2 and done.index(HIGH - 0.0265) == 1
    with pytest.raises(InputError, match=r"no ion within 0 ppm \+ 0.0071 Da"):
        done.index(HIGH + 0.0072)
    other = [*same[:2], {"mz": HIGH - 0.02, "tolerance_ppm": 24}]
    for cube, words, given in (
        (own, "its mz was settled", {"mz": other}),
        (own, "its mz was settled", {"mz": other[:2]}),
        (plain, "its mz was settled", {"mz": [LOW, {"mz": HIGH, "tolerance_da": 0.003}]}),
        (plain, "its tolerance_da was settled", {"overrides": ["ingest.tolerance_da=0.003"]}),
    ):
        with pytest.raises(InputError, match=words):
            fuse(cube.path, None, tmp_path / "s.zarr", guide=False, **given)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ingest.tolerance_da=-0.1", "tolerance_da"),
        ("ingest.tolerance_da=.nan", "tolerance_da"),
        ("ingest.tolerance_da=wide", "tolerance_da"),
        ("ingest.tolerance_da=0,01", "tolerance_da"),
        ("ingest.tolerance_da=true", "tolerance_da"),
        ("ingest.mz=[{mz: 500, tolerance_ppm: -1}]", "500: tolerance_ppm: Input should be greater"),
        ("ingest.mz=[{mz: 500, tolerance_da: .nan}]", "500: tolerance_da: Input should be a finite"),
        ("ingest.mz=[{mz: 500, tolerance_da: wide}]", "500: tolerance_da: Input should be a valid number"),
        ("ingest.mz=[{mz: 500, tolerance_ppm: 0}]", "500: tolerances of 0 leave no window"),
        ("ingest.mz=[{mz: 500, tolerance: 3}]", "500: tolerance: Extra inputs"),
        ("ingest.mz=[{tolerance_ppm: 3}]", "mz: Field required"),
        ("ingest.mz=[{mz: -5, tolerance_ppm: 3}]", "-5 is not a positive number"),
        ("ingest.mz=[500, {mz: 500, tolerance_ppm: 3}]", "500 stands there with different tolerances"),
        ("ingest.mz=[[500, 3]]", "is no m/z"),
        ("ingest.mz=[true]", "True is no m/z"),
    ],
)
def test_tolerances_that_are_none(override, words):
    with pytest.raises(InputError, match="setting 'ingest") as caught:
        load_config(None, [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_store_of_a_window_that_is_none(tmp_path):
    path = write_pair(tmp_path / "a.imzML", beside_edges())
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"ingest.tolerance_da: a tolerance of (-0.1|nan|inf) Da"):
            ingest(path, tmp_path / "m.zarr", mz=[LOW], tolerance_da=bad)
        with pytest.raises(InputError, match="is no window"):
            ingest(path, tmp_path / "m.zarr", mz=Targets(np.array([LOW]), Tolerance(np.array([5.0]), np.array([bad]))))
    assert not (tmp_path / "m.zarr").exists()


def test_settings_come_back_as_they_were():
    config = load_config(None, ["ingest.mz=[600.5, {mz: 500.5, tolerance_da: 0.01}, {mz: 400.5}, 600.5]"])
    assert load_config(None, base=config) == config
    assert config.resolved()["ingest"]["mz"][::2] == [400.5, 600.5]
    other = load_config(None, ["ingest.mz=[600.5, {mz: 500.5, tolerance_da: 0.02}, 400.5]"])
    assert len({config.digest(), other.digest(), load_config(None, ["ingest.mz=[600.5, 500.5, 400.5]"]).digest()}) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mz,tolerance_pmm\n500.1,3\n", "has the columns mz,tolerance_pmm"),
        ("tolerance_ppm,tolerance_da\n5.0,3\n", "has the columns tolerance_ppm,tolerance_da"),
        ("mz,tolerance_ppm\n500.1\n", "line 2 has 1 cells and not 2"),
        ("mz,tolerance_ppm\n\n500.1,wide\n", "line 3: '500.1': tolerance_ppm: Input should be a valid number"),
        ("mz,tolerance_ppm\n500.1,-3\n", "line 2: '500.1': tolerance_ppm: Input should be greater"),
        ("mz,tolerance_da\n500.1,nan\n", "line 2: '500.1': tolerance_da: Input should be a finite"),
        ("mz,tolerance_ppm\n500,25\n", "'500,25' may be two m/z, or one with a decimal comma"),
        ("mz,tolerance_ppm\n,3\n", "line 2: None: mz: Field required"),
        ("mz,tolerance_ppm\n5_00.0,3\n", "are no numbers"),
        ("mz,tolerance_ppm\n", "there is no m/z in it"),
    ],
)
def test_columns_that_are_none(cli, tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    done = cli("fuse", tmp_path / "gone.imzML", "--mz", tmp_path / "t.csv", "--no-guide", "-o", tmp_path / "r.zarr")
    assert done.code == 2 and len(done.errors) == 1 and words in done.errors[0] and "t.csv" in done.errors[0], done


def test_a_target_list_with_columns(cli, tmp_path):
    path = write_pair(tmp_path / "a.imzML", [(x, y, m, [v + x * y for v in i]) for x, y, m, i in beside_edges()])
    text = f"tolerance_da, mz,tolerance_ppm\n0.0071,{HIGH},0\n,{LOW},\n\n,{HIGH - 0.02},25\n"
    (tmp_path / "t.csv").write_text("\ufeff" + text)
    more = ["--no-guide", "--factor", 2, "-o", tmp_path / "r.zarr", "ingest.tolerance_da=0.002"]
    done = cli("fuse", path, "--mz", tmp_path / "t.csv", *more)
    assert done.code == 0, done
    m = open_measured(tmp_path / "r.zarr" / "measured")
    np.testing.assert_allclose(m.tolerance.half_da(m.mz), [0.0025, 0.0269995, 0.0071])
    # A lock mass has no window of its own.
    done = cli("fuse", path, "--lock-mass", tmp_path / "t.csv", "--no-guide", "-o", tmp_path / "s.zarr")
    assert done.code == 2 and "'tolerance_da' is not an m/z" in done.err


def test_sections_agree_within_both_parts(tmp_path, cli):
    for name, mz in (("a", [LOW, HIGH]), ("b", [LOW + 0.002, HIGH - 0.006])):
        cube, known = np.random.default_rng(0).random((2, 4, 4)), {"tolerance_da": DA, "ions": "axis"}
        write_measured(tmp_path / f"{name}.zarr", cube, None, mz, 50.0, known)
    (tmp_path / "s.csv").write_text("name,msi\na,a.zarr\nb,b.zarr\n")
    done = cli("ingest", tmp_path / "s.csv", "-o", tmp_path / "w", "--no-guide", "ingest.tolerance_da=0.002")
    assert done.code == 0 and "note:" not in done.out, done
    done = cli("ingest", tmp_path / "s.csv", "-o", tmp_path / "v", "--no-guide")
    assert done.code == 2 and "is ingested: its ions were settled then" in done.err, done
