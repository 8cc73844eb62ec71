"""Tiles: the plan, groups that decode each native tile once, and pixels equal to the exact area reading."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deepfere.tiling.tiles as tiles_module
from deepfere.errors import InputError
from deepfere.readers.slide import open_slide, opened, read_area
from deepfere.tiling.groups import TileReader, group_tiles
from deepfere.tiling.tile_source import tasks_for
from deepfere.tiling.tiles import TileSpec, TissueMask, plan_tiles

from .test_reader_tiff import damage, picture, write_jpeg_tiff
from .test_slide_colour import profile
from .test_slide_zarr import write_ome_zarr


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    return write_jpeg_tiff(tmp_path_factory.mktemp("tiles") / "s.tif", picture(700, 900), profile=profile())


@pytest.fixture(scope="module")
def zarr_path(tmp_path_factory):
    return write_ome_zarr(tmp_path_factory.mktemp("tiles") / "s.zarr", picture(700, 900), factors=(1,), mpp=(0.5, 0.5))


def read_all(plan, slide, block_px=(256, 256)):
    reader = TileReader(plan, slide)
    out = np.empty((len(plan), plan.spec.tile_px, plan.spec.tile_px, 3), np.uint8)
    errors = [None] * len(plan)
    seen = np.zeros(len(plan), int)
    for group in group_tiles(plan, block_px=block_px):
        pixels, wrong = reader.read(group)
        out[group.tiles] = pixels
        seen[group.tiles] += 1
        for number, error in zip(group.tiles, wrong, strict=True):
            errors[number] = error
    assert (seen == 1).all()
    return out, errors


@pytest.mark.parametrize(("backend", "icc"), [("tiff", "none"), ("openslide", "none"), ("tiff", "srgb")])
@pytest.mark.parametrize(
    "spec",
    [
        TileSpec(128, 0.5),
        TileSpec(100, 0.5, offset_px=(17, 33)),
        TileSpec(128, 0.5, stride_px=64),
        TileSpec(90, 0.54),
        TileSpec(90, 0.8, stride_px=45, offset_px=(20, 5)),
        TileSpec(64, 1.0),
        TileSpec(64, 1.3),
        TileSpec(50, 5.0),
    ],
    ids=str,
)
def test_tiles_are_the_exact_area_reading_whatever_they_are_grouped_with(slide_path, spec, backend, icc):
    slide = open_slide(slide_path, backend=backend, icc=icc)
    plan = plan_tiles(slide, spec)
    got, errors = read_all(plan, slide)
    assert not any(errors) and len(plan) == plan.candidates
    small, _ = read_all(plan, slide, block_px=(64, 64))
    np.testing.assert_array_equal(got, small)
    for tile, corner, valid in zip(got, plan.corner_px, plan.valid_px, strict=True):
        side = (spec.tile_px, spec.tile_px)
        want, coverage = read_area(slide, (corner[0] * spec.mpp_um, corner[1] * spec.mpp_um), side, spec.mpp_um)
        np.testing.assert_array_equal(tile, want)
        assert (np.argwhere(coverage > 0).max(axis=0) + 1 == valid).all()


@pytest.mark.parametrize(
    "spec",
    [
        TileSpec(128, 0.5),
        TileSpec(128, 0.5, offset_px=(30, 50)),
        TileSpec(128, 0.5, stride_px=64),
        TileSpec(100, 0.5, stride_px=37),
        TileSpec(128, 0.54),
        TileSpec(128, 0.8),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "icc"), [("tiff", "none"), ("tiff", "srgb"), ("zarr", "none")])
def test_every_native_tile_is_decoded_once_and_no_other(slide_path, zarr_path, spec, share, kind, icc):
    slide = open_slide({"tiff": slide_path, "zarr": zarr_path}[kind], backend=kind, icc=icc)
    assert slide.icc == icc
    rng = np.random.default_rng(1)
    mask = TissueMask(rng.random((7, 9)) < 0.4, (50.0, 50.0))
    spec = TileSpec(spec.tile_px, spec.mpp_um, spec.stride_px, spec.offset_px, share)
    plan = plan_tiles(slide, spec, mask)
    assert 0 < len(plan) < plan.candidates or share == 0
    read_all(plan, slide)
    assert slide.decoded == plan.distinct()
    part = np.flatnonzero(np.arange(len(plan)) % 3 == 0)
    before = slide.decoded
    reader = TileReader(plan, slide)
    for group in group_tiles(plan, part, block_px=(64, 256)):
        reader.read(group)
    touched = {(r, c) for a, b, d, e in plan.native[part] for r in range(a, b) for c in range(d, e)}
    assert slide.decoded - before == len(touched)


@pytest.mark.parametrize("spec", [TileSpec(64, 0.5, stride_px=32), TileSpec(64, 0.54), TileSpec(64, 0.5)], ids=str)
@pytest.mark.parametrize(("backend", "icc"), [("tiff", "none"), ("openslide", "none"), ("tiff", "srgb")])
def test_a_corrupt_native_tile_costs_its_tiles_alone(tmp_path, spec, backend, icc):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(512, 512), profile=profile())
    whole = open_slide(path, backend="tiff", icc=icc)
    plan = plan_tiles(whole, spec)
    want, _ = read_all(plan, whole)
    damage(path, 3 * 8 + 5, "tail")  # row 3, column 5
    got, errors = read_all(plan, open_slide(path, backend=backend, icc=icc))
    hit = np.array([a <= 3 < b and c <= 5 < d for a, b, c, d in plan.native])
    assert 0 < hit.sum() < len(plan)
    assert [error is not None for error in errors] == hit.tolist()
    np.testing.assert_array_equal(got[~hit], want[~hit])
    assert (got[hit] == 255).all()
    for error in np.array(errors, object)[hit]:
        assert "level 0 cannot be decoded at row" in error and str(path) in error
        assert backend == "openslide" or "tile 3, 5 (row, column)" in error


def test_shares_of_tissue_are_exact_areas():
    rng = np.random.default_rng(2)
    mask = rng.random((23, 31)) < 0.5
    tissue = TissueMask(mask, (2.0, 3.0))
    fine = np.repeat(np.repeat(mask, 20, 0), 30, 1).astype(float)  # 0.1 um
    corners = np.array([[0.0, 0.0], [3.1, 7.7], [30.0, 60.0], [-4.0, -2.0], [44.0, 90.0], [100.0, 100.0]])
    side = 9.3
    for corner, share in zip(corners, tissue.shares(corners, side), strict=True):
        (y0, x0), (y1, x1) = np.rint(corner * 10).astype(int), np.rint((corner + side) * 10).astype(int)
        window = fine[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
        assert share == pytest.approx(window.sum() / 93**2, abs=1e-6)


def test_tissue_is_found_and_glass_left_out(tmp_path):
    image = np.full((1200, 1600, 3), 243, np.uint8)
    stained = (picture(600, 800) // 4 + np.array([120, 40, 110], np.uint8)).astype(np.uint8)
    image[300:900, 400:1200] = stained
    slide = open_slide(write_jpeg_tiff(tmp_path / "s.tif", image))
    plan = plan_tiles(slide, TileSpec(64, 1.0, tissue=0.5))
    assert slide.decoded < 40  # the mask comes from the pyramid
    centre = (plan.corner_px + 32) * 2
    inside = (centre >= (300, 400)).all(1) & (centre < (900, 1200)).all(1)
    assert inside.mean() > 0.95 and len(plan) >= 25 and len(plan) < plan.candidates / 2


@pytest.mark.parametrize("backend", ["tiff", "openslide"])
def test_damage_does_not_keep_tissue_from_being_found(tmp_path, backend):
    """A slide of one level, read whole to see tissue: a bad tile costs its tiles, wherever it lies."""
    image = np.full((1024, 1024, 3), 243, np.uint8)
    image[256:768, 320:704] = picture(512, 384) // 4 + np.array([120, 40, 110], np.uint8)
    path = write_jpeg_tiff(tmp_path / "s.tif", image, factors=(1,))
    spec = TileSpec(64, 1.0, tissue=0.2)  # a damaged native tile is a quarter of one
    whole = open_slide(path, backend=backend)
    want = plan_tiles(whole, spec)
    there = dict(zip(map(tuple, want.corner_px.tolist()), read_all(want, whole)[0], strict=True))
    for row, col in ((0, 1), (8, 8)):  # glass, and in the middle of the tissue; native tiles of 64 px, 0.5 um
        damage(path, 16 * row + col, "head")
    slide = open_slide(path, backend=backend)
    plan = plan_tiles(slide, spec)
    corners = list(map(tuple, plan.corner_px.tolist()))
    assert set(corners) == {*there, (0, 0)} and (256, 256) in there
    for corner, tile, error in zip(corners, *read_all(plan, slide), strict=True):
        assert (error is not None) == (corner in ((0, 0), (256, 256)))
        np.testing.assert_array_equal(tile, np.full_like(tile, 255) if error else there[corner])
    for native in range(256):
        damage(path, native, "head")
    with pytest.raises(InputError, match="level 0 cannot be decoded"):
        plan_tiles(open_slide(path, backend=backend), spec)


def test_what_is_no_damage_ends_the_job(slide_path, monkeypatch):
    """A store that lets nobody in any more: not asked tile by tile, and no tile is given out as damaged."""
    slide = open_slide(slide_path, backend="openslide")
    plan, asked = plan_tiles(slide, TileSpec(64, 0.5)), []

    def refuse(*window):
        asked.append(window)
        raise InputError("access is refused", where="s3://bucket/s.tif")

    monkeypatch.setattr(slide, "read", refuse)
    with pytest.raises(InputError, match="access is refused"):
        TissueMask.of(slide)
    with pytest.raises(InputError, match="access is refused"):
        read_all(plan, slide)
    assert len(asked) == 2


@pytest.mark.ray
def test_ray_rows_are_the_tiles(tmp_path, monkeypatch, ray_session):
    import deepfere.tiling.tile_source as source

    path = write_jpeg_tiff(tmp_path / "s.tif", picture(512, 640))
    plan = plan_tiles(open_slide(path), TileSpec(64, 0.6))
    want, _ = read_all(plan, open_slide(path))
    damage(path, 0, "head")
    monkeypatch.setattr(source, "group_tiles", lambda plan: group_tiles(plan, block_px=(64, 256)))
    tasks = source.SlideTiles([plan]).get_read_tasks(3)
    assert len(tasks) == 3 and sum(task.metadata.num_rows for task in tasks) == len(plan)
    rows = source.tile_dataset([plan], tasks=3).take_all()
    assert sorted(row["tile"] for row in rows) == list(range(len(plan)))
    for row in rows:
        assert (row["row_px"], row["col_px"]) == tuple(plan.corner_px[row["tile"]])
        assert (row["error"] is None) == (row["tile"] != 0) and row["slide"] == str(path)
        np.testing.assert_array_equal(row["pixels"], want[row["tile"]] if row["error"] is None else 255)


@pytest.mark.ray
def test_a_function_in_the_task_that_reads(tmp_path, monkeypatch, ray_session):
    """Rows of its own; what it returns of the pixels stays as it was when it returned it."""
    import deepfere.tiling.tile_source as source

    path = write_jpeg_tiff(tmp_path / "s.tif", picture(512, 640))
    plan = plan_tiles(open_slide(path), TileSpec(64, 0.6))
    want, _ = read_all(plan, open_slide(path))

    middle = float(np.median([tile.mean() for tile in want]))

    def apply(tiles):
        bright = tiles["pixels"].mean((1, 2, 3)) > middle
        return {"tile": tiles["tile"][bright], "corner": tiles["pixels"][bright, :2, :3]}

    monkeypatch.setattr(source, "group_tiles", lambda plan: group_tiles(plan, block_px=(64, 256)))
    monkeypatch.setattr(source, "BLOCK_BYTES", 100)
    rows = source.tile_dataset([plan], tasks=3, apply=apply).take_all()
    expected = [n for n in range(len(plan)) if want[n].mean() > middle]
    assert 0 < len(expected) < len(plan) and sorted(row["tile"] for row in rows) == expected
    for row in rows:
        np.testing.assert_array_equal(row["corner"], want[row["tile"]][:2, :3])

    def mixed(tiles):
        return {"sum": [int(tiles["pixels"].sum()) if 0 in tiles["tile"] else 2**64 - 1]}

    blocks = list(source.apply_tiles(plan, plan.key, np.arange(len(plan)), apply))
    assert len(blocks) > 1 and sum(block.num_rows for block in blocks) == len(expected)
    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="column sum is of the types int64, uint64"):
        list(source.apply_tiles(plan, plan.key, np.arange(len(plan)), mixed))

    def uneven(tiles):
        return {"first" if 0 in tiles["tile"] else "other": tiles["tile"]}

    with pytest.raises(ValueError, match="columns differ"):
        list(source.apply_tiles(plan, plan.key, np.arange(len(plan)), uneven))

    def broken(tiles):
        raise ValueError("not today")

    with pytest.raises(Exception, match="not today"):
        source.tile_dataset([plan], apply=broken).take_all()


def test_refused(slide_path):
    slide = open_slide(slide_path)
    with pytest.raises(InputError, match=r"its pixels are 0\.5 um, tiles of 0\.4 um"):
        plan_tiles(slide, TileSpec(64, 0.4))
    wrong = [("tile_px", 0), ("mpp_um", -1.0), ("mpp_um", np.nan), ("stride_px", 0), ("tissue", 1.5)]
    wrong += [("tile_px", 64.5), ("stride_px", 8.5), ("tile_px", "64"), ("mpp_um", (0.5, 0.5)), ("offset_px", (3.5, 0))]
    wrong += [("tissue", "a little")]
    for name, value in [*wrong, ("offset_px", (-1, 0))]:
        with pytest.raises(InputError, match="no tiling"):
            TileSpec(**{"tile_px": 64, "mpp_um": 0.5} | {name: value})


def test_a_grid_that_begins_outside_has_no_tiles(slide_path):
    slide = open_slide(slide_path)
    h, w = slide.shape_px
    for offset, tissue in (((h, 0), 0.0), ((0, w + 9), 0.0), ((h, w), 0.1)):
        assert len(plan_tiles(slide, TileSpec(64, 0.5, offset_px=offset, tissue=tissue))) == 0
    assert len(plan_tiles(slide, TileSpec(64, 0.5, offset_px=(h - 1, w - 1)))) == 1


@pytest.mark.parametrize(("backend", "icc"), [("tiff", "none"), ("flat", "srgb"), ("openslide", "none")])
def test_few_slides_stay_open_and_none_is_closed_in_use(tmp_path, backend, icc):
    paths = [write_jpeg_tiff(tmp_path / f"{k}.tif", picture(128, 128), profile=profile()) for k in range(10)]

    def held():
        """How many of the files are mapped, or open."""
        links = [p.readlink() for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
        return {p for p in paths if p in links or str(p) in Path("/proc/self/maps").read_text()}

    opened.cache_clear()
    assert not held()
    first = opened(str(paths[0]), (0.5, 0.5), backend, icc, "0")
    want = first.read(0, 0, 0, 128, 128)
    assert opened(str(paths[0]), (0.5, 0.5), backend, icc, "0") is first
    for path in paths[1:]:
        opened(str(path), (0.5, 0.5), backend, icc, "0").read(0, 0, 0, 64, 64)
        assert len(held()) <= 5
    np.testing.assert_array_equal(first.read(0, 0, 0, 128, 128), want)
    assert opened(str(paths[0]), (0.5, 0.5), backend, icc, "0") is not first
    del first
    opened.cache_clear()
    assert not held()


def test_the_plan_says_what_is_read(slide_path):
    plan = plan_tiles(open_slide(slide_path), TileSpec(64, 1.3))
    assert plan.reading.level == 1 and plan.reading.scale == pytest.approx((1.3, 1.3))
    assert plan.reading.backend == "tiff" and plan.reading.mpp_um == (1.3, 1.3)


def test_planning_needs_no_ray():
    code = f"import sys, {tiles_module.__name__}; sys.exit(any(m in sys.modules for m in ('ray', 'zarr', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("groups", "cpus", "tasks"), [(30, 1, 2), (200, 2, 8), (200, 16, 16), (800, 16, 64), (5, 8, 8)]
)
def test_tasks_are_many_but_not_small(groups, cpus, tasks):
    assert tasks_for(groups, cpus) == tasks


@pytest.mark.parametrize("backend", ["tiff", "openslide"])
def test_another_slide_at_the_same_path_is_read_anew(tmp_path, backend):
    """In one process: what was opened before is not served for what took its place."""
    path, tiles = tmp_path / "slide.tif", []
    for k in (0, 1):
        write_jpeg_tiff(path, np.roll(picture(128, 128), 32 * k, axis=0))
        slide = open_slide(path, (0.5, 0.5), backend)
        plan = plan_tiles(slide, TileSpec(64, 0.5))
        group = next(iter(group_tiles(plan)))
        tiles.append(TileReader(plan).read(group)[0])
        at = plan.window_px[group.tiles[0]]
        np.testing.assert_array_equal(tiles[-1][0], slide.read(0, at[0], at[2], 64, 64))
    assert np.abs(tiles[0].astype(int) - tiles[1]).mean() > 1
