"""Pieces of tissue in one measurement are told apart, and none is guessed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepfere
from deepfere.errors import InputError
from deepfere.measured.ingest import ingest
from deepfere.measured.regions import ALL, choose_region, find_regions
from deepfere.pipeline.study import each_region
from deepfere.readers.imzml import read_index
from deepfere.section import load_study

from .imzml_bytes import write_pair


def raster(*boxes, shape=(40, 50)):
    mask = np.zeros(shape, bool)
    for top, left, ny, nx in boxes:
        mask[top : top + ny, left : left + nx] = True
    return mask


def test_regions_are_numbered_in_reading_order():
    mask = raster((20, 2, 10, 8), (2, 30, 9, 9), (2, 4, 7, 6))
    numbers, regions = find_regions(mask)
    assert [(r.number, r.start_px, r.shape_px, r.pixels) for r in regions] == [
        (1, (2, 4), (7, 6), 42),
        (2, (2, 30), (9, 9), 81),
        (3, (20, 2), (10, 8), 80),
    ]
    assert (numbers > 0).sum() == mask.sum()
    assert numbers[25, 5] == 3


@pytest.mark.parametrize(("gap", "count"), [(1, 1), (2, 1), (3, 2), (8, 2)])
def test_missed_lines_do_not_part_a_region(gap, count):
    mask = raster((5, 5, 10, 12), (15 + gap, 5, 10, 12))
    assert len(find_regions(mask)[1]) == count


def test_a_diagonal_joins():
    mask = raster((5, 5, 8, 8), (13, 13, 8, 8))
    assert len(find_regions(mask)[1]) == 1


def test_specks_are_no_region_and_stay_with_a_single_piece():
    mask = raster((5, 5, 20, 20), (35, 40, 2, 2))
    numbers, (only,) = find_regions(mask)
    assert only.pixels == mask.sum()
    assert (numbers > 0).sum() == mask.sum()
    assert np.array_equal(choose_region(mask, None, (0, 0), "a"), mask)


def test_specks_are_left_out_where_one_of_several_is_chosen():
    mask = raster((5, 5, 12, 12), (5, 30, 12, 12), (35, 40, 2, 2))
    numbers, regions = find_regions(mask)
    assert len(regions) == 2
    assert numbers[36, 41] == 0
    assert np.array_equal(choose_region(mask, 2, (0, 0), "a"), raster((5, 30, 12, 12)))
    assert np.array_equal(choose_region(mask, ALL, (0, 0), "a"), mask)


def test_several_regions_are_asked_about():
    mask = raster((5, 5, 12, 12), (5, 30, 12, 12))
    with pytest.raises(
        InputError, match=r"x: holds 2 regions \(1: 12 x 12 pixels \(144 measured\) from x 8, y 12; 2: .*--region 1"
    ):
        choose_region(mask, None, (7, 3), "x")
    with pytest.raises(InputError, match=r"has no region 3 \(its regions: 1: .*correct --region"):
        choose_region(mask, 3, (0, 0), "x")
    with pytest.raises(InputError, match="has no region 0"):
        choose_region(mask, 0, (0, 0), "x")


def test_many_regions_are_not_all_listed():
    mask = raster(*[(10 * i, 10 * j, 5, 5) for i in range(4) for j in range(5)])
    with pytest.raises(InputError, match=r"20 regions.*; 6: .*; and 14 more"):
        choose_region(mask, None, (0, 0), "x")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9)), max_size=6))
def test_regions_part_the_mask(boxes):
    mask = raster(*boxes)
    numbers, regions = find_regions(mask)
    assert not numbers[~mask].any()
    assert sum(r.pixels for r in regions) == (numbers > 0).sum()
    for r in regions:
        rows, cols = np.nonzero(numbers == r.number)
        assert (rows.min(), cols.min()) == r.start_px
        assert (rows.max() - rows.min() + 1, cols.max() - cols.min() + 1) == r.shape_px
    if mask.any():
        assert regions


MZ = [100.0, 200.0, 300.0]


def two_pieces(path):
    """A 6 x 5 and, to its right, a 7 x 4 piece, and one stray; every pixel's values are its own."""
    rng = np.random.default_rng(0)
    pixels = [(x + 3, y + 2) for y in range(6) for x in range(5)] + [
        (x + 20, y + 4) for y in range(7) for x in range(4)
    ]
    spectra = [(x, y, MZ, rng.gamma(2.0, 5.0, 3).tolist()) for x, y in [*pixels, (40, 40)]]
    return write_pair(path, spectra, mode="continuous"), spectra


def test_only_the_region_is_ingested(tmp_path):
    path, spectra = two_pieces(tmp_path / "a.imzML")
    cube = ingest(path, tmp_path / "m.zarr", region=2)
    assert cube.grid.shape_px == (7, 4)
    assert cube.attrs["origin_px"] == [4, 20]
    assert cube.attrs["region"] == 2
    assert cube.mask.all()
    for x, y, _, values in spectra[30:58]:
        np.testing.assert_allclose(cube.cube()[:, y - 4, x - 20], values, rtol=1e-6)
    everything = ingest(path, tmp_path / "all.zarr", region="all")
    assert everything.grid.shape_px == (39, 38)
    assert everything.mask.sum() == len(spectra)


def test_ingest_asks_which_region(tmp_path):
    path, _ = two_pieces(tmp_path / "a.imzML")
    with pytest.raises(InputError, match=r"holds 2 regions \(1: 6 x 5 pixels \(30 measured\) from x 3, y 2; 2: 7 x 4"):
        ingest(path, tmp_path / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()


def test_a_broken_spectrum_spoils_its_own_region_only(tmp_path):
    path, spectra = two_pieces(tmp_path / "a.imzML")
    spectra[35] = (*spectra[35][:3], [1.0, float("nan"), 2.0])
    write_pair(path, spectra, mode="continuous")
    x, y = spectra[35][:2]
    with pytest.raises(InputError, match=f"x {x}, y {y} has intensities that are not finite"):
        ingest(path, tmp_path / "m.zarr", region=2)
    # The other piece does not read it.
    ingest(path, tmp_path / "m.zarr", region=1)


def test_a_part_of_an_index_keeps_the_numbers_of_the_file(tmp_path):
    path, spectra = two_pieces(tmp_path / "a.imzML")
    index = read_index(path)
    part = index.only(np.arange(30, 58))
    assert (len(part), part.number(0), part.number(27)) == (28, 31, 58)
    assert part.only(np.array([5])).number(0) == 36
    assert (part.x[0], part.y[0]) == spectra[30][:2]
    assert index.number(0) == 1


def test_each_region_becomes_a_section(tmp_path):
    two_pieces(tmp_path / "a.imzML")
    write_pair(tmp_path / "b.imzML", [(x, y, MZ, [1.0, 2.0, 3.0]) for y in range(5) for x in range(5)])
    manifest = tmp_path / "study.yaml"
    manifest.write_text(
        "sections:\n"
        "  - {name: one, msi: a.imzML, region: each}\n"
        "  - {name: two, msi: b.imzML, region: each}\n"
        "  - {name: three, msi: a.imzML, region: 1}\n"
    )
    sections = each_region(load_study(manifest).sections, manifest)
    assert [(s.name, s.region) for s in sections] == [("one-1", 1), ("one-2", 2), ("two", None), ("three", 1)]
    manifest.write_text("sections:\n  - {name: a, msi: a.imzML, region: each}\n  - {name: a-1, msi: b.imzML}\n")
    with pytest.raises(InputError, match="twice: a-1"):
        each_region(load_study(manifest).sections, manifest)
    manifest.write_text("sections:\n  - {name: a, msi: a.imzML, region: first}\n")
    with pytest.raises(InputError, match="region"):
        load_study(manifest)


def test_a_csv_manifest_names_regions(tmp_path):
    two_pieces(tmp_path / "a.imzML")
    manifest = tmp_path / "study.csv"
    manifest.write_text("name,msi,region\none,a.imzML,2\ntwo,a.imzML,each\n")
    sections = each_region(load_study(manifest).sections, manifest)
    assert [(s.name, s.region) for s in sections] == [("one", 2), ("two-1", 1), ("two-2", 2)]


def test_fuse_asks_and_takes_the_region(tmp_path, cli):
    path, spectra = two_pieces(tmp_path / "a.imzML")
    command = ["fuse", path, "--no-guide", "-o", tmp_path / "r.zarr", "--factor", 2, "tracking.uri=none"]
    told = cli(*command)
    assert told.code == 2
    assert "holds 2 regions" in told.err
    assert "--region 1" in told.err
    assert not (tmp_path / "r.zarr").exists()
    assert not (tmp_path / "r.zarr.work").exists()
    told = cli(*command, "--region", "left")
    assert told.code == 2
    assert "'left' is no region" in told.err
    told = cli(*command, "--region", 2)
    assert told.code == 0, told.err
    result = deepfere.open(tmp_path / "r.zarr")
    assert result.mask.shape == (7, 4)
    x, y, _, values = spectra[40]
    np.testing.assert_allclose([result.measured(mz)[y - 4, x - 20] for mz in MZ], values, rtol=1e-6)
    # Another region is another result.
    told = cli(*command, "--region", 1)
    assert told.code == 2
    assert "overwrite" in told.err
