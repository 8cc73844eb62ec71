"""Plans: what is read, in which pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfere.alignment.overview import NO_ARTEFACTS
from deepfere.errors import InputError
from deepfere.frame import Alignment, Displacement, SectionGrid
from deepfere.model.guide import GuideSpec
from deepfere.tiling import plan as plans
from deepfere.tiling.plan import (
    GROUP_SHARDS,
    SHARD_PX,
    PlaneGrid,
    ShardGrid,
    check_factor,
    group_shards,
    needed_shards,
    plan_patches,
    plan_planes,
    plan_windows,
)
from tests.test_frame import matrices

quick = settings(max_examples=30, deadline=None)
sides = st.integers(1, 40)


@st.composite
def masks(draw):
    shape = draw(sides), draw(sides)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return rng.random(shape) < draw(st.sampled_from([0.05, 0.5, 1.0]))


@pytest.mark.parametrize("mpp", [(0.25, 0.25), (0.2263, 0.2263), (0.5, 0.4), (2.0, 2.0), (0.11, 0.11)])
@pytest.mark.parametrize("hr", [2.5, 6.25, 25.0, 100.0])
def test_plane_pixels_are_whole_and_small_enough(mpp, hr):
    planes = plan_planes((20_001, 33_333), mpp, (hr, 1.2 * hr))
    multiple = planes.fine_mpp_um[0] / mpp[0]
    assert multiple == pytest.approx(round(multiple))
    assert planes.fine_mpp_um[1] / mpp[1] == pytest.approx(multiple)
    assert max(planes.fine_mpp_um) <= max(1.0, *mpp) + 1e-9
    if planes.block > 1:
        assert max(planes.spacing_um) <= hr / 2 + 1e-9
    assert max(planes.fine_mpp_um) * (planes.block + 1) > hr / 2, "larger blocks would do"
    step = round(multiple) * planes.block
    assert (planes.shape_px[0] - 1) * step < 20_001 <= planes.shape_px[0] * step
    assert (planes.shape_px[1] - 1) * step < 33_333 <= planes.shape_px[1] * step
    assert PlaneGrid.from_dict(planes.to_dict()) == planes


def test_shard_windows_tile_the_plane_grid():
    planes = PlaneGrid((1.0, 1.0), 2, (SHARD_PX * 2 + 1, SHARD_PX))
    assert planes.shards == (3, 1)
    count = np.zeros(planes.shape_px, int)
    for row in range(3):
        r0, r1, c0, c1 = planes.shard_window(row, 0)
        count[r0:r1, c0:c1] += 1
    assert (count == 1).all()


GRID = SectionGrid((20, 20), (50.0, 80.0))


@pytest.mark.parametrize("factor", [0, 1, -3, 65])
def test_factors_out_of_range_are_refused(factor):
    with pytest.raises(InputError, match="from 2 to 64"):
        check_factor(factor, GRID, (0.25, 0.25))


def test_factors_and_the_slide():
    assert check_factor(64, GRID, (0.25, 0.5)) == 64
    assert check_factor(2, GRID, None) == 2
    assert check_factor(50, GRID, (1.0, 1.0)) == 50
    with pytest.raises(InputError, match=r"1\.00 um, finer than the slide's 1\.50 um.*at most 33"):
        check_factor(50, GRID, (1.0, 1.5))
    assert check_factor(33, GRID, (1.0, 1.5)) == 33


@pytest.mark.parametrize(("pitch", "mpp", "expected"), [
    (200.0, 0.25, 16), (80.0, 0.25, 16), (79.0, 0.25, 8), (40.0, 0.5, 8), (20.0, 0.5, 4), (10.0, 0.5, 2),
    (100.0, 10.0, 8), (10.0, 4.0, 2),
])  # fmt: skip
def test_default_factor(pitch, mpp, expected):
    assert check_factor(None, SectionGrid((9, 9), (pitch, pitch)), (mpp, mpp)) == expected


def test_no_factor_is_chosen_that_the_slide_cannot_support():
    with pytest.raises(InputError, match="finer than the slide"):
        check_factor(None, SectionGrid((9, 9), (10.0, 10.0)), (8.0, 8.0))


def lattice(context):
    """Points over a pixel (in pixels from its corner) grown by a context."""
    along = np.linspace(-context, 1 + context, 17)
    return np.stack(np.meshgrid(along, along, indexing="ij"), -1).reshape(-1, 2)


@quick
@given(
    matrix=matrices(),
    seed=st.integers(0, 10_000),
    bent=st.booleans(),
    factor=st.sampled_from([2, 5, 64]),
    context=st.integers(0, 3),
)
def test_needed_shards_hold_every_measured_pixels_window(matrix, seed, bent, factor, context):
    """Whatever a measured pixel that the slide shows samples lies in a needed shard."""
    rng = np.random.default_rng(seed)
    grid = SectionGrid((14, 11), (50.0, 70.0))
    hr = grid.refine(factor).pitch_um
    planes = plan_planes((9000, 8000), (0.5, 0.5), hr)
    extent = np.array(grid.extent_um)
    displacement = None
    if bent:
        spacing = tuple(extent / 3)
        displacement = Displacement((-spacing[0], -spacing[1]), spacing, rng.uniform(-20, 20, (6, 6, 2)))
    target = rng.uniform(0, 1, 2) * np.array(planes.shape_px) * np.array(planes.spacing_um)
    alignment = Alignment(matrix, target - matrix @ (extent / 2), displacement)
    mask = rng.random(grid.shape_px) < 0.3
    # Context: whole measured pixels, the smoothing, and the plane pixels that bilinear sampling adds.
    spec = GuideSpec(grid, factor, planes.spacing_um, planes.shape_px, (240, 240, 240), 0.15)
    reach = (context + 0.5 + spec.radius_px / factor) * np.hypot(*grid.pitch_um)
    margin = reach * alignment.max_stretch(grid.extent_um) + 3 * max(planes.spacing_um) + 5.0
    needed = {(int(r), int(c)) for r, c in needed_shards(planes, alignment, grid, mask, margin)}
    size = np.array(planes.spacing_um)
    high = np.array(planes.shape_px) * size
    # A lattice of points over the pixel and its context stands for all sample points.
    for index in np.argwhere(mask)[:15]:
        own = alignment.map((index + lattice(0.0)) * grid.pitch_um)
        if not ((own >= 0) & (own <= high)).all(-1).any():
            continue
        wide = alignment.map((index + lattice(context + spec.radius_px / factor)) * grid.pitch_um)
        pixels = np.clip(wide / size - 0.5, 0, np.array(planes.shape_px) - 1)
        for rounded in (np.floor(pixels), np.ceil(pixels)):
            shards = np.unique(rounded.astype(int) // SHARD_PX, axis=0)
            assert {(int(r), int(c)) for r, c in shards} <= needed


def test_needed_shards_are_ordered_and_not_all():
    planes = PlaneGrid((1.0, 1.0), 1, (SHARD_PX * 6, SHARD_PX * 5))
    grid = SectionGrid((10, 10), (20.0, 20.0))
    place = Alignment(np.eye(2), np.array([2.0 * SHARD_PX + 100, 3.0 * SHARD_PX - 100]))
    mask = np.ones(grid.shape_px, bool)
    assert needed_shards(planes, place, grid, mask, 0.0).tolist() == [[2, 2], [2, 3]]
    assert needed_shards(planes, place, grid, mask, 101.0).tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    # A margin of several shards leaves no hole in the middle.
    wide = needed_shards(planes, place, grid, mask, 2.5 * SHARD_PX)
    assert wide.tolist() == [[r, c] for r in range(6) for c in range(5)]
    far = Alignment(np.eye(2), np.array([1e6, 0.0]))
    assert needed_shards(planes, far, grid, mask, 10.0).shape == (0, 2)
    assert needed_shards(planes, place, grid, np.zeros(grid.shape_px, bool), 10.0).shape == (0, 2)


@quick
@given(mask=masks(), side=st.integers(1, 17))
def test_windows_are_disjoint_and_complete(mask, side):
    count = np.zeros(mask.shape, int)
    for cells in plan_windows(SectionGrid(mask.shape, (10.0, 10.0)), mask, side):
        assert 0 <= cells.i0 < cells.i1 <= mask.shape[0]
        assert 0 <= cells.j0 < cells.j1 <= mask.shape[1]
        assert max(cells.shape) <= side
        assert mask[cells.i0 : cells.i1, cells.j0 : cells.j1].any()
        count[cells.i0 : cells.i1, cells.j0 : cells.j1] += 1
    assert (count[mask] == 1).all()
    assert count.max(initial=0) <= 1


@quick
@given(mask=masks(), core=st.integers(1, 15), context=st.integers(0, 4))
def test_patch_cores_tile_the_section(mask, core, context):
    patches = plan_patches(SectionGrid(mask.shape, (10.0, 10.0)), mask, core + 2 * context, context)
    assert patches.shape[1] == 2
    count = np.zeros(mask.shape, int)
    for i0, j0 in patches + context:
        assert mask[i0 : i0 + core, j0 : j0 + core].any()
        count[i0 : i0 + core, j0 : j0 + core] += 1
    assert (count[mask] == 1).all()
    assert count.max(initial=0) <= 1


@quick
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    factor=st.integers(2, 64),
    chunk=st.integers(16, 512),
    shard=st.integers(64, 2048),
)
def test_output_shards_are_whole_cells_and_cover_the_grid(shape, factor, chunk, shard):
    out = ShardGrid.plan(SectionGrid(shape, (10.0, 10.0)), factor, chunk, shard)
    assert out.chunk_px % factor == 0
    assert out.shard_px % out.chunk_px == 0
    assert out.chunk_px <= max(chunk, factor)
    assert out.shard_px <= max(shard, out.chunk_px)
    count = np.zeros(shape, int)
    for row in range(out.shards[0]):
        for col in range(out.shards[1]):
            cells = out.cells(row, col)
            assert cells.shape[0] > 0
            assert cells.shape[1] > 0
            count[cells.i0 : cells.i1, cells.j0 : cells.j1] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [0, 1, 7, 60, 700])
def test_groups_hold_every_shard_once_and_are_compact(seed, count):
    rng = np.random.default_rng(seed)
    shards = np.argwhere(rng.permutation(900).reshape(30, 30) < count)
    groups = group_shards(shards)
    assert np.array_equal(np.unique(np.concatenate([*groups, shards[:0]]), axis=0), shards)
    assert sum(map(len, groups)) == len(shards) and len(groups) >= min(8, len(shards))
    for group in groups:
        assert (np.ptp(group, axis=0) < GROUP_SHARDS).all()
        assert group.tolist() == sorted(group.tolist())
    if count == 700:
        assert max(map(len, groups)) > 32


def test_planning_needs_no_ray():
    import subprocess
    import sys

    code = f"import sys, {plans.__name__}; sys.exit(any(m in sys.modules for m in ('ray', 'zarr', 'openslide')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_shard_of_planes_is_whole_and_on_disk_before_it_is_recorded(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from deepfere.cluster import Journal
    from deepfere.model.features import StainReference
    from deepfere.readers.slide import Reading
    from deepfere.readers.slide_damaged import NO_DAMAGE
    from deepfere.reconstruction.shards import CacheWorker
    from deepfere.store import open_group, shard_object
    from deepfere.tiling import cache

    planes = PlaneGrid((5.0, 5.0), 1, (60, 50))
    reference = StainReference((240.0, 240.0, 240.0), 0.1, 0.2)
    reading = Reading("openslide", 0, (5.0, 5.0), (5.0, 5.0), (1.0, 1.0))
    url = str(tmp_path / "planes.zarr")
    spec = cache.CacheSpec(url, "slide", "abc", (5.0, 5.0), planes, reference, NO_ARTEFACTS, reading)
    cache.create_cache(spec)
    assert cache.is_cache(spec) and not cache.is_cache(replace(spec, fingerprint="another"))
    file, journal, seen = shard_object(spec.url, "planes", 0, 0), Journal(tmp_path / "journal", "abc"), []
    file.parent.mkdir(parents=True)
    file.write_bytes(b"torn")
    values = np.full((7, 60, 50), 9, np.uint8)
    monkeypatch.setattr(cache, "compute_shard", lambda *_: (values, NO_DAMAGE))
    monkeypatch.setattr("deepfere.store.sync_shard", lambda *_: seen.append((file.stat().st_size > 4, journal.done())))
    monkeypatch.setattr("deepfere.reconstruction.shards.slide_of", lambda _: SimpleNamespace(decoded=None))
    CacheWorker(spec, str(journal.folder), "abc").work({"unit": "0/0", "shards": [[0, 0]]})
    assert seen == [(True, {})] and set(journal.done()) == {"0/0"}
    assert (np.asarray(open_group(spec.url, "r")["planes"][:]) == 9).all()
