"""Plans in files, jobs over tiles that go on: equal bytes, no other slide, what is missing alone, bad tiles named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import deepfere
from deepfere.errors import InputError
from deepfere.readers.slide import open_slide, slide_digest
from deepfere.tiling.tiles import TilePlan, TileSpec, plan_tiles

from .test_reader_tiff import damage, picture, write_jpeg_tiff

SPEC = TileSpec(64, 0.6, stride_px=48, offset_px=(3, 5), tissue=0.2)


def stained(path):
    """A slide of glass with tissue on a part of it."""
    image = np.full((768, 1024, 3), 243, np.uint8)
    image[200:700, 300:900] = picture(500, 600) // 4 + np.array([120, 40, 110], np.uint8)
    return write_jpeg_tiff(path, image)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    return stained(tmp_path_factory.mktemp("tiles") / "s.tif")


def same(one, other):
    for part in fields(TilePlan):
        np.testing.assert_array_equal(getattr(one, part.name), getattr(other, part.name))
    assert one.key == other.key and one.reading == other.reading


def test_a_plan_is_read_as_it_was_written(tmp_path, slide_path):
    slide = open_slide(slide_path, (0.5, 0.4))
    plans = [plan_tiles(slide, SPEC), plan_tiles(slide, TileSpec(100, 0.5)), plan_tiles(slide, TileSpec(64, 2.3))]
    assert 0 < len(plans[0]) < plans[0].candidates and len({plan.key for plan in plans}) == 3
    for plan in plans:
        plan.to_parquet(tmp_path / "made" / "p.parquet")
        same(TilePlan.from_parquet(tmp_path / "made" / "p.parquet"), plan)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["p.parquet"]
    assert plans[0].take(np.arange(3)).key != plans[0].key


def test_the_slide_may_lie_elsewhere_and_may_not_be_another(tmp_path, slide_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(slide_path, "s.tif")
    plan = plan_tiles(open_slide("s.tif"), SPEC)
    assert plan.path == str(tmp_path / "s.tif")  # a worker may stand in another folder
    plan.to_parquet("p.parquet")
    (tmp_path / "s.tif").rename(tmp_path / "t.tif")
    with pytest.raises(InputError, match=r"s\.tif: cannot be read"):
        TilePlan.from_parquet("p.parquet")
    moved = TilePlan.from_parquet("p.parquet", slide="t.tif")
    assert moved.path == str(tmp_path / "t.tif") and moved.key == plan.key
    damage(tmp_path / "t.tif", 0, "head")
    (tmp_path / "t.tif").rename(tmp_path / "s.tif")
    with pytest.raises(InputError, match=r"s\.tif: is not the slide that p\.parquet was made for.*plan anew"):
        TilePlan.from_parquet("p.parquet")


def test_a_slide_in_several_files_is_another_when_one_of_them_is(tmp_path):
    one, copy = tmp_path / "one", tmp_path / "copy"
    (one / "s").mkdir(parents=True)
    for name, content in (("s.mrxs", b"names the others"), ("s/Slidedat.ini", b"1"), ("s/Data0000.dat", b"12")):
        (one / name).write_bytes(content)
    known = slide_digest(one / "s.mrxs")
    shutil.copytree(one, copy)
    assert slide_digest(copy / "s.mrxs") == known
    (copy / "s" / "Data0000.dat").write_bytes(b"123")
    assert slide_digest(copy / "s.mrxs") != known


def test_what_is_no_plan(tmp_path, slide_path):
    plan, path = plan_tiles(open_slide(slide_path), SPEC), tmp_path / "p.parquet"
    with pytest.raises(InputError, match="does not exist"):
        TilePlan.from_parquet(path)
    plan.to_parquet(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole.replace(b'"version": 1', b'"version": 9')):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"p\.parquet: cannot be read as a plan of tiles"):
            TilePlan.from_parquet(path)
    pq.write_table(pa.table({"tile": [1]}), path)
    with pytest.raises(InputError, match="cannot be read as a plan of tiles"):
        TilePlan.from_parquet(path)
    with pytest.raises(InputError, match="cannot be written"):
        plan.to_parquet(slide_path / "p.parquet")


def test_plans_go_through_a_store(slide_path, s3):
    plan = plan_tiles(open_slide(slide_path), SPEC)
    plan.to_parquet("s3://bucket/plans/p.parquet")
    same(TilePlan.from_parquet("s3://bucket/plans/p.parquet"), plan)


PLAN = """
import sys, deepfere
slide = deepfere.open_slide(sys.argv[1])
plan = deepfere.plan_tiles(slide, deepfere.TileSpec(64, 0.6, stride_px=48, tissue=0.2))
plan.to_parquet(sys.argv[2])
deepfere.TilePlan.from_parquet(sys.argv[2])
deepfere.tiles_done(sys.argv[2] + ".rows")
assert len(plan) and "ray" not in sys.modules, "Ray was imported"
"""


def test_equal_plans_are_equal_bytes_and_need_no_ray(tmp_path, slide_path):
    made = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.parquet"
        command = [sys.executable, "-c", PLAN, str(slide_path), str(path)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        made.append(path.read_bytes())
    assert made[0] == made[1]


def features(tiles):
    """What a network would make of them; only what is needed goes on."""
    return {name: tiles[name] for name in ("plan", "slide", "tile", "error")} | {
        "mean": tiles["pixels"].mean((1, 2, 3), dtype=np.float32)
    }


def rows_in(folder):
    """All rows of a folder, as a user reads them."""
    return pq.read_table(folder).to_pandas()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:.*tiles are bad:UserWarning")
@pytest.mark.parametrize("where", ["apply", "map_batches"])
def test_an_interrupted_job_makes_what_is_missing_alone(tmp_path, monkeypatch, ray_session, where):
    import deepfere.tiling.tile_source as source
    from deepfere.tiling.groups import group_tiles

    monkeypatch.setattr(source, "group_tiles", lambda plan: group_tiles(plan, block_px=(64, 256)))
    monkeypatch.setattr(source, "BLOCK_BYTES", 200_000)
    one, two = stained(tmp_path / "one.tif"), stained(tmp_path / "two.tif")
    damage(two, 16 * 6 + 8, "head")  # row 6, column 8
    folder, counts = tmp_path / "rows", tmp_path / "counts"
    counts.mkdir()

    def count(tiles):
        assert not (stop and 40 in tiles["tile"]), "killed"
        with (counts / f"{os.getpid()}").open("a") as log:
            log.write("x" * len(tiles["tile"]))
        return features(tiles)

    def run():
        plans = [plan_tiles(open_slide(path), SPEC) for path in (one, two)]
        done = deepfere.tiles_done(folder)
        if where == "apply":
            tiles = deepfere.tile_dataset(plans, tasks=12, done=done, apply=count)
        else:
            tiles = deepfere.tile_dataset(plans, tasks=12, done=done).map_batches(count, batch_size=None)
        deepfere.write_tiles(tiles, folder)
        return plans, len(done)

    stop = True
    with pytest.raises(Exception, match="killed"):
        run()
    assert not [p for p in folder.iterdir() if p.suffix != ".parquet"]
    for log in counts.iterdir():
        log.unlink()
    stop = False
    plans, before = run()
    total = sum(len(plan) for plan in plans)
    assert 0 < before < total
    assert sum(log.stat().st_size for log in counts.iterdir()) == total - before
    done, rows = deepfere.tiles_done(folder), rows_in(folder)
    for plan in plans:
        assert sorted(done["tile"][done["plan"] == plan.key]) == list(range(len(plan)))
        assert sorted(rows["tile"][rows["slide"] == plan.path]) == list(range(len(plan)))
    # Bad tiles: how many, which, and why; without their pixels.
    bad = done[done["error"].notna()]
    hit = np.flatnonzero([a <= 6 < b and c <= 8 < d for a, b, c, d in plans[1].native])
    assert 0 < len(hit) < len(plans[1]) and sorted(bad["tile"]) == hit.tolist()
    assert set(bad["slide"]) == {str(two)} and bad["error"].str.contains("tile 6, 8 (row, column)", regex=False).all()
    assert (rows["mean"][rows["error"].notna()] == 255).all()
    # Nothing is left: nothing is read, and the folder stays as it is.
    names = sorted(folder.iterdir())
    assert run()[1] == total and sorted(folder.iterdir()) == names
    assert sum(log.stat().st_size for log in counts.iterdir()) == total - before


def test_rows_that_nobody_could_go_on_from(tmp_path, slide_path):
    from deepfere.tiling.tile_source import SlideTiles

    assert len(deepfere.tiles_done(tmp_path / "none")) == 0
    slide = open_slide(slide_path)
    plan, other = plan_tiles(slide, SPEC), plan_tiles(slide, TileSpec(64, 0.7))
    table = pa.table({"tile": [0, 1], "error": [None, "bad"], "plan": [plan.key] * 2, "slide": [plan.path] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    done = deepfere.tiles_done(tmp_path)
    assert done["tile"].tolist() == [0, 1] and done["error"].notna().tolist() == [False, True]
    left = SlideTiles([plan, other], done=done)
    assert left.estimate_inmemory_data_size() == (len(plan) - 2 + len(other)) * 64 * 64 * 3
    again = SlideTiles([plan], done=done[done["error"].isna()])  # bad ones once more
    assert again.estimate_inmemory_data_size() == (len(plan) - 1) * 64 * 64 * 3
    with pytest.raises(InputError, match=r"s\.tif: 2 of its tiles that are done are of another plan.*another folder"):
        SlideTiles([other], done=done)
    # Tried again: the one without an error counts, whichever file comes first.
    for k, errors in enumerate((["still bad", None], ["bad", None])):
        tried = {"tile": [2, 1], "error": errors, "plan": [plan.key] * 2, "slide": [plan.path] * 2}
        pq.write_table(pa.table(tried), tmp_path / f"{'0z'[k]}.parquet")
    done = deepfere.tiles_done(tmp_path)
    assert dict(zip(done["tile"], done["error"].notna(), strict=True)) == {0: False, 1: False, 2: True}
    assert len(done) == 3 and done.index.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no plan is given"):
        SlideTiles([])
    pq.write_table(table.drop_columns(["plan"]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: has no column plan; pass plan, slide, tile, error on"):
        deepfere.tiles_done(tmp_path)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as Parquet .*delete it"):
        deepfere.tiles_done(tmp_path)


def test_what_cannot_be_written_or_was_replaced_is_told_before_a_tile_is_read(tmp_path, slide_path):
    from deepfere.tiling.tile_source import apply_tiles, read_tiles

    shutil.copy(slide_path, tmp_path / "s.tif")
    plan = plan_tiles(open_slide(tmp_path / "s.tif"), SPEC)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "file.parquet").mkdir()
    with pytest.raises(InputError, match=r"file/rows: cannot be written \(Not a directory\); choose another place"):
        deepfere.write_tiles(None, tmp_path / "file" / "rows")
    for target in ("file/p.parquet", "file.parquet"):
        with pytest.raises(InputError, match=r"cannot be written \(.*\); choose another place"):
            plan.to_parquet(tmp_path / target)
    write_jpeg_tiff(tmp_path / "s.tif", picture(512, 1024))
    part = plan, plan.key, np.arange(len(plan))
    for rows in (read_tiles(*part), apply_tiles(*part, features)):
        with pytest.raises(InputError, match=r"s\.tif: has changed since its tiles were planned; plan anew"):
            next(iter(rows))


def test_bad_tiles_are_counted_and_named(tmp_path):
    from types import SimpleNamespace

    from deepfere.tiling.tile_sink import TileFiles

    files, written = TileFiles(tmp_path), []
    for task, errors in enumerate(([None, None], [None, "s.tif: tile 1, 2 is damaged"], ["another"])):
        count = len(errors)
        table = pa.table({"plan": ["a"] * count, "slide": ["s"] * count, "tile": range(count), "error": errors})
        written.append(files.write([table], SimpleNamespace(task_idx=task)))
    with pytest.warns(UserWarning, match=r"^2 of 5 tiles are bad, first s\.tif: tile 1, 2 is damaged$"):
        files.on_write_complete(SimpleNamespace(write_returns=written))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.on_write_complete(SimpleNamespace(write_returns=[*written[:1], files.write([], None)]))
        files.on_write_complete(SimpleNamespace(write_returns=[]))
    assert len(deepfere.tiles_done(tmp_path)) == 2  # they were tried again


@pytest.mark.ray
def test_rows_go_to_a_store_and_name_their_tile(tmp_path, slide_path, s3, ray_session):
    plan = plan_tiles(open_slide(slide_path), SPEC)
    with pytest.raises(Exception, match="has no column plan, slide, tile, error"):
        deepfere.write_tiles(
            deepfere.tile_dataset([plan], apply=lambda tiles: {"mean": features(tiles)["mean"]}), tmp_path / "rows"
        )
    deepfere.write_tiles(deepfere.tile_dataset([plan], apply=features), "s3://bucket/rows")
    done = deepfere.tiles_done("s3://bucket/rows")
    assert sorted(done["tile"]) == list(range(len(plan))) and set(done["plan"]) == {plan.key}


def test_what_rows_are_written_with_is_imported_before_any():
    """A worker in whose first row the import of fsspec is interrupted could write none any more."""
    code = "import sys; import deepfere.tiling.tile_sink; sys.exit('fsspec' not in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
