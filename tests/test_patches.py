"""Training patches: their order, what one holds, and what their loaders keep."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepfere.frame import Alignment, SectionGrid
from deepfere.model.guide import Cells, GuideSpec
from deepfere.tiling.patches import (
    GROUP_PATCHES,
    MIXED_GROUPS,
    PatchReader,
    PatchSource,
    draw,
    order_of,
    plane_shape,
)
from deepfere.tiling.plan import plan_patches


def test_every_patch_is_drawn_before_any_is_drawn_again():
    patches = [(s, p) for s in range(2) for p in range(5)]
    rows = draw(patches, steps=15, batch=2, seed=3)
    assert rows["step"].tolist() == [n // 2 for n in range(30)]
    for begin in (0, 10, 20):
        part = slice(begin, begin + 10)
        assert sorted(zip(rows["section"][part].tolist(), rows["patch"][part].tolist(), strict=True)) == patches
    assert set(zip(rows["flip_y"].tolist(), rows["flip_x"].tolist(), strict=True)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    again, other = draw(patches, 15, 2, 3), draw(patches, 15, 2, 4)
    assert all(np.array_equal(values, again[name]) for name, values in rows.items())
    assert not np.array_equal(other["patch"], rows["patch"])
    # A longer training begins like the shorter one, in its order of patches.
    assert np.array_equal(draw(patches, 30, 2, 3)["patch"][:30], rows["patch"])


def test_rows_of_a_long_training_take_a_few_bytes():
    rows = draw([(s, p) for s in range(3) for p in range(700)], steps=20_000, batch=32, seed=0)
    assert {len(values) for values in rows.values()} == {640_000}
    assert sum(values.dtype.itemsize for values in rows.values()) <= 16


def test_a_large_study_is_shuffled_by_groups_then_locally():
    patches = [(s, p) for s in range(40) for p in range(2 * GROUP_PATCHES)]
    order = order_of(patches, np.random.default_rng(0)).tolist()
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
    assert order != order_of(patches, np.random.default_rng(1)).tolist()
    few = [(s, p) for s in range(3) for p in range(20)]
    mixed = [few[n][0] for n in order_of(few, np.random.default_rng(0))]
    assert set(mixed[:20]) == {0, 1, 2}


def test_loaders_hold_few_sections(source, monkeypatch):
    patches, _, _ = source
    from dataclasses import asdict

    from deepfere.tiling import dataset
    from deepfere.tiling import patches as reading

    opened = []

    def reader(*arguments):
        opened.append(arguments)
        return PatchReader(*arguments)

    monkeypatch.setattr(reading, "PatchReader", reader)
    load = dataset.LoadPatches([asdict(patches)] * 100, 4, plane_shape([patches], 4))
    assert not opened
    rows = {"section": np.array([3, 3, 99]), "patch": np.zeros(3, int), "step": np.zeros(3, int)}
    flips = {"flip_y": np.zeros(3, int), "flip_x": np.zeros(3, int)}
    out = load(rows | flips)
    assert len(opened) == 2 and out["section"].tolist() == [3, 3, 99]
    load({k: np.repeat(v[:1], 100) for k, v in (rows | flips).items()} | {"section": np.arange(100)})
    assert load._reader.cache_info().currsize == 2 * MIXED_GROUPS


DEALT = [(4, 1, 4), (4, 1, 1), (4, 2, 1), (4, 3, 2), (6, 4, 2), (8, 3, 1), (5, 5, 1), (27, 2, 9)]


@pytest.mark.parametrize("most_blocks", [1000, 20, 1])
@pytest.mark.parametrize(("batch", "workers", "most"), DEALT)
def test_every_step_is_dealt_whole(monkeypatch, most_blocks, batch, workers, most):
    """Whether or not its patches can be divided by the workers, and however long a training is."""
    from deepfere.tiling import dataset

    monkeypatch.setattr(dataset, "MOST_BLOCKS", most_blocks)
    steps, dealing = 7, dataset.Dealing.of(batch, workers, most)
    assert dealing.rows <= most and dealing.width >= batch > dealing.width - dealing.workers * dealing.parts
    rows = {"step": np.repeat(np.arange(3, 3 + steps), batch), "patch": np.arange(steps * batch)}
    blocks = dataset.blocks_of(rows, dealing)
    assert len(blocks) <= max(most_blocks, steps if most_blocks > 1 else 1)
    assert all(len(block) % dealing.rows == 0 for block in blocks)
    dealt = [row for block in blocks for row in block.to_pylist()]
    assert [row["step"] for row in dealt] == np.repeat(np.arange(3, 3 + steps), dealing.width).tolist()
    # The mean over what all workers load is that over the step's patches.
    counted = np.zeros(steps * batch)
    for row in dealt:
        counted[row["patch"]] += row["share"]
    assert np.allclose(counted / dealing.width, 1 / batch, rtol=1e-6)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(("most_blocks", "batch", "workers", "most"), [(1000, 4, 2, 1), (2, 5, 3, 2)])
def test_ray_gives_every_worker_its_own_turns(ray_session, source, monkeypatch, most_blocks, batch, workers, most):
    """In the order of the rows, turn by turn, also where many steps lie in one block."""
    from deepfere.tiling import dataset
    from deepfere.training.deal import Deal

    monkeypatch.setattr(dataset, "MOST_BLOCKS", most_blocks)
    patches, _, _ = source
    steps, count = 9, len(patches.cells)

    def rows_after(done):
        rows = draw([(0, n) for n in range(count)], steps, batch, seed=2)
        return {name: values[done * batch :] for name, values in rows.items()}

    settings: Any = SimpleNamespace(batch=batch, patch_px=5, network={"features": 4, "factors": 3})
    deal = Deal(rows_after, [patches], plane_shape([patches], 5), settings, most)
    dealing, wanted = dataset.Dealing.of(batch, workers, most), rows_after(2)
    dealt = deal.configure({"train": 2}, workers)
    # All at once: none gets a turn before the others have taken theirs.
    taking = [iter(one["train"].iter_batches(batch_size=dealing.rows, drop_last=True)) for one in dealt]
    with ThreadPoolExecutor(workers) as pool:
        for step in range(2, steps):
            got = [row for _ in range(dealing.parts) for batch_ in pool.map(next, taking) for row in rows_of(batch_)]
            own = slice((step - 2) * batch, (step - 1) * batch)
            assert {n for n, _, _ in got} == {step} and len(got) == dealing.width
            cells = [patches.cells[n] for n in wanted["patch"][own]]
            assert [cell for _, cell, share in got if share] == cells
    assert [next(one, None) for one in taking] == [None] * workers


def rows_of(batch):
    """Step, cell and share of every row of a batch."""
    return list(zip(batch["step"].tolist(), batch["cell"].tolist(), batch["share"].tolist(), strict=True))


@pytest.mark.ray
def test_the_executor_of_the_patches_rests_between_steps(ray_session, source):
    """Once, however many datasets a process makes; other datasets have their own."""
    import ray

    from deepfere.tiling import dataset

    patches, _, _ = source
    rows = {name: np.zeros(4, np.int32) for name in ("section", "patch", "flip_y", "flip_x")}
    rows["step"] = np.arange(4, dtype=np.int32)
    shape = plane_shape([patches], 5)
    for _ in range(2):
        made = dataset.patch_dataset(rows, [patches], 5, shape, dataset.Dealing.of(2, 1, 2), 3000)
        assert len(made.context.custom_execution_callback_classes) == 1
        assert not ray.data.DataContext.get_current().custom_execution_callback_classes
    batches = list(made.iter_batches(batch_size=2))
    assert [batch["step"].tolist() for batch in batches] == [[0, 1], [2, 3]]


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_patches_ask_for_no_processor(taken_cpus, source):
    """Training may have taken all there are."""
    from deepfere.tiling import dataset

    patches, _, _ = source
    rows = {name: np.zeros(4, np.int32) for name in ("section", "patch", "flip_y", "flip_x", "step")}
    made = dataset.patch_dataset(rows, [patches], 5, plane_shape([patches], 5), dataset.Dealing.of(2, 1, 2), 3000)
    assert len(list(made.iter_batches(batch_size=2))) == 2


def test_the_executor_rests_longer_while_nothing_moves(monkeypatch):
    from deepfere.tiling import dataset

    rests = []
    monkeypatch.setattr(dataset.time, "sleep", rests.append)
    output = SimpleNamespace(num_completed_tasks=0, output_queue=[])
    executor, rest = SimpleNamespace(_output_node=(None, output)), dataset._rest()()
    for step in range(8):
        output.num_completed_tasks += step == 6
        rest.on_execution_step(executor)
    shortest, longest = dataset.SHORTEST_REST_S, dataset.LONGEST_REST_S
    assert rests == [shortest, 2 * shortest, 4 * shortest, 8 * shortest, longest, longest, shortest, 2 * shortest]


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
