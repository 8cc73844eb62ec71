"""Automatic ions of which few pixels have much, and peaks that vary from pixel to pixel as noise does."""

import numpy as np
import pytest
import yaml

from deepfere.errors import InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.peaks import find_ions
from deepfere.measured.raster import plan_raster
from deepfere.measured.sampled import Highest, PeakSpec, sample_centroids, sample_profiles
from deepfere.measured.store import open_measured
from deepfere.measured.structure import Evidence, evidence, neighbours, structured
from deepfere.readers.imzml import read_index

from .imzml_bytes import write_pair

SIDE = 30
TISSUE, WEAK, NOISE, SPOT, LONE = 300.1, 420.2, 500.3, 610.4, 720.5
PROFILE = '<cvParam accession="MS:1000128" name="profile spectrum"/>'


def images(seed=0, side=SIDE):
    """(side, side) of each: two ions of the tissue, noise that is everywhere, a spot, and pixels that lie apart."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    inside = (y - 0.5) ** 2 + (x - 0.4) ** 2 < 0.1
    spot = np.zeros((side, side))
    spot[20:23, 20:23] = 1  # one in a hundred pixels
    lone = np.zeros((side, side))
    lone[3::9, 4::9] = 1
    noise = lambda: rng.gamma(4.0, 0.25, (side, side))  # noqa: E731
    return {
        TISSUE: 100 * noise() * (0.2 + inside),
        WEAK: 10 * (1 + 0.35 * inside) * noise(),
        NOISE: 20 * noise(),
        SPOT: 500 * noise() * spot,
        LONE: 500 * noise() * lone,
    }


def centroids(path, seed=0, jitter_ppm=1.0, **given):
    rng, made = np.random.default_rng(seed), {**images(seed), **given}
    spectra = []
    for y in range(SIDE):
        for x in range(SIDE):
            here = [(m * (1 + jitter_ppm * 1e-6 * rng.uniform(-1, 1)), v[y, x]) for m, v in made.items() if v[y, x] > 0]
            spectra.append((x + 1, y + 1, [m for m, _ in here], [float(v) for _, v in here]))
    return write_pair(path, spectra)


def profiles(path, spacing=2e-5, seed=0):
    rng, made = np.random.default_rng(seed), images(seed)
    axis = np.concatenate([m * (1 + spacing * np.arange(-40, 41)) for m in made])
    shape = {m: np.exp(-0.5 * ((axis / m - 1) / 1e-4) ** 2) for m in made}
    spectra = [
        (
            x + 1,
            y + 1,
            axis.tolist(),
            (sum(v[y, x] * shape[m] for m, v in made.items()) + rng.random(len(axis))).tolist(),
        )
        for y in range(SIDE)
        for x in range(SIDE)
    ]
    return write_pair(path, spectra, spectrum_type=PROFILE)


@pytest.mark.parametrize("kind", ["centroid", "profile"])
def test_noise_that_is_everywhere_is_left_out_and_a_spot_is_not(tmp_path, kind):
    path = (centroids if kind == "centroid" else profiles)(tmp_path / "a.imzML")
    ppm = 5.0 if kind == "centroid" else 300.0
    with pytest.warns(UserWarning, match="1 automatic peaks vary from pixel to pixel as noise does and are left out"):
        m = ingest(path, tmp_path / "m.zarr", tolerance_ppm=ppm)
    np.testing.assert_allclose(m.mz, [TISSUE, WEAK, SPOT, LONE], rtol=1e-5)
    assert m.attrs["peaks"]["without_structure"] == 1
    every = ingest(path, tmp_path / "n.zarr", tolerance_ppm=ppm, structure=False)
    np.testing.assert_allclose(every.mz, [TISSUE, WEAK, NOISE, SPOT, LONE], rtol=1e-5)
    np.testing.assert_array_equal(every.cube()[[0, 1, 3, 4]], m.cube())
    assert "without_structure" not in every.attrs["peaks"] and every.attrs["peaks"]["structure"] is False


def test_what_few_pixels_have_is_found_by_its_height():
    rng = np.random.default_rng(3)
    common, rare, weak = np.array([300.1, 400.2]), 500.3, 600.4
    spectra = []
    for k in range(1500):
        mz, value = common, rng.uniform(900, 1000, 2)
        if k % 200 == 0:  # 8 spectra: too rare, and on average a two-thousandth of the others
            mz, value = np.append(mz, [rare, weak]), np.append(value, [95.0, 5.0])
        spectra.append((mz, value))
    spec = PeakSpec()
    np.testing.assert_allclose(find_ions(lambda: [sample_centroids(spectra, spec)], spec), [*common, rare], rtol=1e-6)
    plain = PeakSpec(bright_fraction=2.0)
    np.testing.assert_allclose(find_ions(lambda: [sample_centroids(spectra, plain)], plain), common, rtol=1e-6)


@pytest.mark.parametrize(("pixels", "found"), [(4, True), (2, False)])
def test_a_profile_peak_of_few_spectra_is_found_and_that_of_one_or_two_is_not(pixels, found):
    rng = np.random.default_rng(4)
    axis, wide = 300 * np.exp(np.arange(4000) * 1e-5), PeakSpec(40.0)
    shape = {m: np.exp(-0.5 * ((axis / m - 1) / 3e-5) ** 2) for m in (303.0, 308.0)}
    spectra = []
    for k in range(400):
        y = rng.random(len(axis)) + 200 * rng.gamma(3, 0.3) * shape[303.0]
        spectra.append((axis, y + (30 if k % 100 == 0 and k < 100 * pixels else 0) * shape[308.0]))
    sample = sample_profiles(lambda: spectra, wide)
    ions = find_ions(lambda: [sample], wide)
    np.testing.assert_allclose(ions, [303.0, 308.0] if found else [303.0], rtol=5e-6)


def test_the_highest_values_in_order():
    rng = np.random.default_rng(5)
    values = rng.random((20, 7))
    highest = Highest(7, 3)
    for k, row in enumerate(values):
        at = np.array([0, 2, 5]) if k % 2 else slice(None)
        highest.add(row[at], at)
        values[k, [n for n in range(7) if k % 2 and n not in (0, 2, 5)]] = 0
    np.testing.assert_array_equal(highest.least(), np.sort(values, axis=0)[-3])


def test_centroids_among_noise_stand_out_of_its_intensity():
    rng = np.random.default_rng(6)
    spectra = []
    for _ in range(400):
        mz = np.concatenate([rng.uniform(500, 505, 60), [501.0, 503.0] if rng.random() < 0.4 else []])
        faint = np.concatenate([rng.uniform(10, 12, 60), [0.01, 11.0]])[: len(mz)]
        spectra.append((mz, faint))
    spec = PeakSpec()
    np.testing.assert_allclose(find_ions(lambda: [sample_centroids(spectra, spec)], spec), [503.0], rtol=3e-6)
    plain = PeakSpec(snr=-100.0)
    assert len(find_ions(lambda: [sample_centroids(spectra, plain)], plain)) == 2


def pairs_of(side):
    at = np.arange(side * side).reshape(side, side)
    return (at[:, :-1].ravel(), at[:, 1:].ravel()), (at[:-1].ravel(), at[1:].ravel())


def test_chance_is_that_of_permutations():
    rng = np.random.default_rng(7)
    along = pairs_of(9)[0]
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    for values in (rng.gamma(2, 1, 81), (rng.random(81) < 0.2) * 1.0):
        shuffled = np.stack([rng.permutation(values) for _ in range(4000)], axis=1)
        got = evidence(shuffled, along, none)
        assert abs(got.correlation.mean()) < 0.03 and (got.pairs == 72).all()
        ranks = np.argsort(np.argsort(shuffled, axis=0), axis=0) if len(np.unique(values)) > 2 else shuffled
        one = (shuffled - shuffled.mean(0)) / shuffled.std(0)
        two = (ranks - ranks.mean(0)) / ranks.std(0)
        chance = [(z[along[0]] * z[along[1]]).mean(0) for z in (one, two)]
        want = np.maximum(*((c - c.mean()) / c.std() for c in chance))
        np.testing.assert_allclose(got.sigmas, want, atol=0.15)


def test_only_what_is_proven_is_left_out():
    rng = np.random.default_rng(8)
    noise = rng.gamma(4, 1, (900, 40))
    y, x = np.divmod(np.arange(900), 30)
    slope, stripes = 5 + x / 30 + noise[:, 0] / 4, noise[:, 1] + 2.0 * (y % 2)
    cases = np.column_stack([noise, slope, stripes, np.full(900, 3.0), rng.lognormal(0, 2, 900)])
    kept = structured([evidence(cases, *pairs_of(30))], 1)
    assert kept[:40].mean() < 0.2 and kept[40:].all()  # stripes: along the rows alone
    # Of 64 pixels nothing is proven; of many such sections together it is, if none of them shows any.
    few = [evidence(rng.gamma(4, 1, (64, 40)), *pairs_of(8)) for _ in range(40)]
    assert all(structured([one], 1).all() for one in few) and structured(few, 40).mean() < 0.2
    shown = Evidence(few[0].pairs, few[0].correlation, few[0].sigmas + 5, few[0].peaked)
    assert structured([*few, shown], 41).all()


@pytest.mark.parametrize("most", [100, 5000])
def test_a_sample_holds_neighbours_over_all_of_the_image(tmp_path, most):
    inside = [(x, y) for y in range(40) for x in range(50) if (x - 25) ** 2 + (y - 20) ** 2 < 350]
    order = np.random.default_rng(9).permutation(len(inside))
    spectra = [(inside[k][0] + 1, inside[k][1] + 1, [100.0], [1.0]) for k in order]
    raster = plan_raster(read_index(write_pair(tmp_path / "a.imzML", spectra)))
    rows, along, across = neighbours(raster, most)
    assert len(rows) == (most if most < len(spectra) else len(spectra)) and (np.diff(rows) > 0).all()
    row, col = raster.at(rows)
    for (i, j), step in ((along, (0, 1)), (across, (1, 0))):
        assert len(i) >= most // 2 or most > len(spectra)
        np.testing.assert_array_equal([row[j] - row[i], col[j] - col[i]], np.repeat([step], len(i), axis=0).T)
    assert np.ptp(row) > 30 and np.ptp(col) > 30
    np.testing.assert_array_equal(rows, neighbours(raster, most)[0])


def test_a_study_is_looked_at_together(tmp_path, cli):
    side = images(1)
    for k, name in enumerate("ab"):
        # What is noise in one section and structure in the other stays.
        other = {800.6: side[TISSUE] if name == "a" else 20 * np.random.default_rng(9).gamma(4.0, 0.25, (SIDE, SIDE))}
        made = {**images(k), **other}
        spectra = [
            (x + 1, y + 1, *map(list, zip(*((m, float(v[y, x])) for m, v in made.items() if v[y, x] > 0), strict=True)))
            for y in range(SIDE)
            for x in range(SIDE)
        ]
        write_pair(tmp_path / f"{name}.imzML", spectra)
    rows = [{"name": n, "msi": f"{n}.imzML"} for n in "ab"]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"sections": rows}))
    done = cli("ingest", tmp_path / "s.yaml", "-o", tmp_path / "w", "--no-guide")
    assert done.code == 0, done
    for name in "ab":
        m = open_measured(tmp_path / "w" / "sections" / name / "measured.zarr")
        np.testing.assert_allclose(m.mz, [TISSUE, WEAK, SPOT, LONE, 800.6], rtol=1e-6)
        assert m.attrs["peaks"]["without_structure"] == 1 and m.attrs["peaks"]["sections"] == 2
    done = cli("ingest", tmp_path / "s.yaml", "-o", tmp_path / "v", "--no-guide", "ingest.structure=none")
    assert done.code == 0 and done.out.count("6 ions") == 2


def test_nothing_but_noise_is_refused(tmp_path):
    rng = np.random.default_rng(10)
    spectra = [(x + 1, y + 1, [300.1, 400.2], rng.gamma(4, 1, 2).tolist()) for y in range(SIDE) for x in range(SIDE)]
    path = write_pair(tmp_path / "a.imzML", spectra)
    with pytest.raises(
        InputError, match=r"none of its 2 peaks shows any spatial structure; give --mz, or ingest.struct"
    ):
        ingest(path, tmp_path / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()


def test_pixels_that_lie_apart_prove_nothing(tmp_path):
    rng = np.random.default_rng(11)
    spectra = [(x + 1, 1, [300.1, 400.2], rng.gamma(4, 1, 2).tolist()) for x in range(2100)]
    m = ingest(write_pair(tmp_path / "a.imzML", spectra), tmp_path / "m.zarr")
    assert len(m.mz) == 2 and m.attrs["peaks"]["without_structure"] == 0
