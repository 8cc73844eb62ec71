"""Plans: what is read, in which pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfere.alignment.overview import NO_ARTEFACTS
from deepfere.errors import InputError
from deepfere.frame import Alignment, Displacement, SectionGrid
from deepfere.model.guide import Cells, GuideSpec
from deepfere.tiling import plan as plans
from deepfere.tiling.patches import (
    GROUP_PATCHES,
    MIXED_GROUPS,
    PatchReader,
    PatchSource,
    draw,
    order_of,
    plane_shape,
)
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


def test_every_patch_is_drawn_before_any_is_drawn_again():
    patches = [(s, p) for s in range(2) for p in range(5)]
    rows = draw(patches, steps=15, batch=2, seed=3)
    assert [(r["step"], r["slot"]) for r in rows] == [(n // 2, n % 2) for n in range(30)]
    for begin in (0, 10, 20):
        assert sorted((r["section"], r["patch"]) for r in rows[begin : begin + 10]) == patches
    assert {(r["flip_y"], r["flip_x"]) for r in rows} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert draw(patches, 15, 2, 3) == rows
    assert draw(patches, 15, 2, 4) != rows
    # A longer training begins like the shorter one, in its order of patches.
    assert [r["patch"] for r in draw(patches, 30, 2, 3)][:30] == [r["patch"] for r in rows]


def test_a_large_study_is_shuffled_by_groups_then_locally():
    patches = [(s, p) for s in range(40) for p in range(2 * GROUP_PATCHES)]
    order = order_of(patches, np.random.default_rng(0))
    assert sorted(order) == list(range(len(patches)))
    pool = MIXED_GROUPS * GROUP_PATCHES
    for begin in range(0, len(order), pool):
        part = order[begin : begin + pool]
        sections = [patches[n][0] for n in part]
        assert len(set(sections)) <= MIXED_GROUPS, "few sections are open at a time"
        # Within it no section is through before the next begins.
        assert np.mean(np.diff(sections) != 0) > 0.5
        # Neighbours are drawn together.
        assert len({(s, patches[n][1] // GROUP_PATCHES) for s, n in zip(sections, part, strict=True)}) <= MIXED_GROUPS
    firsts = [patches[order[k]][0] for k in range(0, len(order), pool)]
    assert firsts != sorted(firsts)
    assert order != order_of(patches, np.random.default_rng(1))
    few = [(s, p) for s in range(3) for p in range(20)]
    mixed = [few[n][0] for n in order_of(few, np.random.default_rng(0))]
    assert set(mixed[:20]) == {0, 1, 2}


def test_loaders_hold_few_sections(source, monkeypatch):
    patches, _, _ = source
    from dataclasses import asdict

    from deepfere.tiling import dataset

    opened = []

    def reader(*arguments):
        opened.append(arguments)
        return PatchReader(*arguments)

    monkeypatch.setattr(dataset, "PatchReader", reader)
    load = dataset.LoadPatches([asdict(patches)] * 100, 4, plane_shape([patches], 4))
    assert not opened
    rows = {"section": np.array([3, 3, 99]), "patch": np.zeros(3, int), "step": np.zeros(3, int)}
    flips = {"flip_y": np.zeros(3, int), "flip_x": np.zeros(3, int)}
    out = load(rows | flips)
    assert len(opened) == 2 and out["section"].tolist() == [3, 3, 99]
    load({k: np.repeat(v[:1], 100) for k, v in (rows | flips).items()} | {"section": np.arange(100)})
    assert load._reader.cache_info().currsize == 2 * MIXED_GROUPS


@pytest.mark.ray
def test_the_executor_of_the_patches_rests_between_steps(ray_session, source):
    """Once, however many datasets a process makes; other datasets have their own."""
    import ray

    from deepfere.tiling import dataset

    patches, _, _ = source
    rows = [{"section": 0, "patch": 0, "step": n, "flip_y": 0, "flip_x": 0} for n in range(4)]
    shape = plane_shape([patches], 5)
    for _ in range(2):
        made = dataset.patch_dataset(rows, [patches], 5, shape, 2, 1)
        (rest,) = made.context.custom_execution_callback_classes
        assert rest().on_execution_step(None) is None
        assert not ray.data.DataContext.get_current().custom_execution_callback_classes
    batches = list(made.iter_batches(batch_size=2))
    assert [batch["step"].tolist() for batch in batches] == [[0, 1], [2, 3]]


@pytest.fixture
def source(tmp_path):
    from deepfere.store import create_array, open_group

    rng = np.random.default_rng(0)
    grid = SectionGrid((9, 7), (20.0, 20.0))
    spec = GuideSpec(grid, 2, (5.0, 5.0), (60, 50), (240.0, 240.0, 240.0), 0.15)
    planes = rng.integers(0, 255, (7, 60, 50)).astype(np.uint8)
    group = open_group(str(tmp_path / "planes.zarr"), "w")
    create_array(group, "planes", planes.shape, "uint8", (7, 16, 16), (7, 32, 32))[:] = planes
    group.attrs["spacing_um"] = list(spec.spacing_um)
    arrays: dict[str, Any] = {
        "factors": rng.standard_normal((3, 9, 7)),
        "pooled": rng.standard_normal((4, 9, 7)),
        "weight": rng.random((9, 7)),
    }
    np.savez(tmp_path / "arrays.npz", **arrays)
    alignment = Alignment(np.array([[1.0, 0.1], [-0.1, 1.0]]), np.array([40.0, 50.0]))
    cells = plan_patches(grid, np.ones((9, 7), bool), 5, 1).tolist()
    patches = PatchSource(
        cache=str(tmp_path / "planes.zarr"),
        arrays=str(tmp_path / "arrays.npz"),
        spec=spec.to_dict(),
        alignment=alignment.to_dict(),
        cells=cells,
        context_px=1,
        radius_px=2,
        margin_px=2,
    )
    return patches, planes, arrays


def test_patches_hold_what_lies_there(source):
    patches, planes, arrays = source
    reader, shape = PatchReader(patches, 5), plane_shape([patches], 5)
    windows = [reader.window(n) for n in range(len(patches.cells))]
    assert shape == (max(w[1] - w[0] for w in windows), max(w[3] - w[2] for w in windows))
    for n, (i0, j0) in enumerate(patches.cells):
        patch = reader.load(n, shape)
        r0, r1, c0, c1 = windows[n]
        assert patch["planes"].shape == (*shape, 7)
        assert patch["origin"].tolist() == [r0, c0]
        assert patch["cell"].tolist() == [i0, j0]
        np.testing.assert_array_equal(patch["planes"][: r1 - r0, : c1 - c0], planes[:, r0:r1, c0:c1].transpose(1, 2, 0))
        # The planes hold all that the core and its context sample, wherever the slide has it.
        core = reader.spec.points_um(Cells(i0 + 1, i0 + 4, j0 + 1, j0 + 4), patches.radius_px)
        at = np.clip(reader.alignment.map(core) / 5.0 - 0.5, 0, [59, 49])
        assert (np.floor(at) >= [r0, c0]).all()
        assert (np.ceil(at) < [r1, c1]).all()
        for a in range(5):
            for b in range(5):
                i, j = i0 + a, j0 + b
                inside = 0 <= i < 9 and 0 <= j < 7
                near = min(max(i, 0), 8), min(max(j, 0), 6)
                assert patch["weight"][a, b] == np.float32(arrays["weight"][near] if inside else 0.0)
                for name, key in (("target", "factors"), ("pooled", "pooled")):
                    expected = arrays[key][:, near[0], near[1]].astype(np.float32)
                    np.testing.assert_array_equal(patch[name][:, a, b], expected)


@pytest.mark.parametrize("most_bytes", [1, 6 * 16 * 16 * 7, 1 << 20])
def test_kept_chunks_make_the_same_windows(source, monkeypatch, most_bytes):
    from deepfere.readers.kept_tiles import KeptTiles
    from deepfere.tiling.cache import PlaneReader, PlaneWindows

    monkeypatch.setattr("deepfere.tiling.cache.CHUNK_PX", 16)
    patches, planes, _ = source
    reader, read = PlaneReader(patches.cache, GuideSpec.from_dict(patches.spec)), []

    def counted(*window):
        read.append(window)
        return reader(*window)

    kept = KeptTiles(most_bytes)
    ours, other = (PlaneWindows(look, kept, n) for n, look in enumerate((counted, lambda *w: 255 - reader(*w))))
    rng = np.random.default_rng(1)
    for _ in range(40):
        (r0, r1), (c0, c1) = (np.sort(rng.choice(size + 1, 2, replace=False)) for size in planes.shape[1:])
        height, width = r1 - r0 + rng.integers(0, 5), c1 - c0 + rng.integers(0, 5)
        pad = [(0, height - (r1 - r0)), (0, width - (c1 - c0)), (0, 0)]
        want = np.pad(planes[:, r0:r1, c0:c1].transpose(1, 2, 0), pad, mode="edge")
        for windows, expected in ((ours, want), (other, 255 - want)):
            np.testing.assert_array_equal(windows((r0, r1, c0, c1), (height, width)), expected)
    assert kept.bytes <= max(most_bytes, 16 * 16 * 7)
    covered = np.zeros((4, 4), int)
    for r0, r1, c0, c1 in read:
        covered[r0 // 16 : r1 // 16, c0 // 16 : c1 // 16] += 1
    # Where all fit, none is asked for twice but what lies between missing ones.
    assert (len(read) <= 16) == (most_bytes == 1 << 20) and covered.min() >= 1


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
    monkeypatch.setattr(cache, "compute_shard", lambda *_: values)
    monkeypatch.setattr(cache, "sync_shard", lambda *_: seen.append((file.stat().st_size > 4, journal.done())))
    monkeypatch.setattr("deepfere.reconstruction.shards.slide_of", lambda _: SimpleNamespace(decoded=None))
    CacheWorker(spec, str(journal.folder), "abc").work({"unit": "0/0", "shards": [[0, 0]]})
    assert seen == [(True, {})] and set(journal.done()) == {"0/0"}
    assert (np.asarray(open_group(spec.url, "r")["planes"][:]) == 9).all()
