"""Chunks: what zarrs reads and what is written are what zarr itself reads and writes."""

import os
import pickle
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

from deepfere.codecs import Pipeline, ReadInRust
from deepfere.errors import InputError
from deepfere.measured.writer import MeasuredWriter
from deepfere.store import create_array, open_group

ZARR_ALONE = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
SHAPE, CHUNKS, SHARDS = (2, 37, 50), (2, 8, 8), (2, 16, 24)


def values_of(dtype, seed=0):
    """Chunks of every kind: full, empty, all but one value empty, with both zeros, with and of NaN."""
    rng = np.random.default_rng(seed)
    values = (rng.random(SHAPE) * 200).astype(dtype)
    values[:, :16, :24] = 0
    values[1, 15, 23] = 7
    values[:, 16:24, :8] = 0
    if values.dtype.kind == "f":
        values[:, 24:32, 8:16] = -0.0
        values[:, 16:24, 24:32] = np.nan
        values[0, 17, 40] = np.nan
    return values


def filled(folder, dtype, fill, sharded, codec="zstd"):
    group = open_group(folder, "w")
    array = create_array(
        group, "a", SHAPE, dtype, CHUNKS, SHARDS if sharded else None, fill_value=fill, codec=codec
    )  # fmt: skip
    array[:, :32] = values_of(dtype)[:, :32]
    array[:, 3:5, 7:30] = values_of(dtype, 1)[:, 3:5, 7:30]
    array[:, 16:24, 8:16] = fill
    return array


def objects(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = [("uint8", 0), ("int32", -3), ("float16", 0), ("float32", 0), ("float32", np.nan), ("float64", 1.5)]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("dtype", "fill"), CASES)
def test_what_is_written_is_what_zarr_writes(tmp_path, dtype, fill, sharded):
    assert isinstance(filled(tmp_path / "ours", dtype, fill, sharded).async_array.codec_pipeline, ReadInRust)
    with zarr.config.set(ZARR_ALONE):
        filled(tmp_path / "zarr", dtype, fill, sharded)
    ours, theirs = objects(tmp_path / "ours"), objects(tmp_path / "zarr")
    assert ours == theirs
    assert len(ours) > 4


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("dtype", "fill"), CASES)
def test_what_is_read_is_what_zarr_reads(tmp_path, dtype, fill, sharded, codec):
    filled(tmp_path / "s", dtype, fill, sharded, codec)
    with zarr.config.set(ZARR_ALONE):
        theirs = zarr.open_group(LocalStore(tmp_path / "s"), mode="r")["a"]
    ours = open_group(tmp_path / "s")["a"]
    assert type(ours.async_array.codec_pipeline) is ReadInRust
    assert type(theirs.async_array.codec_pipeline) is not ReadInRust

    @settings(max_examples=25, deadline=None)
    @given(st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in SHAPE)))
    def same(window):
        index = tuple(slice(start, start + length) for start, length in window)
        a, b = ours[index], theirs[index]
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))

    same()
    np.testing.assert_array_equal(ours[1, 5], theirs[1, 5])
    np.testing.assert_array_equal(ours.oindex[:, [3, 30, 31], 4:9], theirs.oindex[:, [3, 30, 31], 4:9])
    np.testing.assert_array_equal(ours.vindex[[0, 1], [3, 30], [4, 44]], theirs.vindex[[0, 1], [3, 30], [4, 44]])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_selection_of_any_grid_is_zarrs(data):
    """Single indices, steps, lists and coordinates too; shards and chunks of which the last is a pixel wide."""
    side = st.integers(1, 5)
    chunks = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    shards = [c * data.draw(st.integers(1, 2)) for c in chunks]
    shape = [data.draw(side) for _ in chunks]
    values = np.arange(1, 1 + np.prod(shape), dtype="int16").reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        group = open_group(folder, "a")
        array = create_array(group, "a", shape, "int16", chunks, shards if data.draw(st.booleans()) else None)
        array[...] = values
        for _ in range(6):
            box = tuple(data.draw(st.one_of(st.integers(0, n - 1), st.slices(n).filter(forward))) for n in shape)
            np.testing.assert_array_equal(array[box], values[box])
            lists = tuple(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3)) for n in shape)
            np.testing.assert_array_equal(array.oindex[lists], values[np.ix_(*lists)])
            points = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in shape)), min_size=1, max_size=4))
            where = tuple(list(axis) for axis in zip(*points, strict=True))
            np.testing.assert_array_equal(array.vindex[where], values[where])


def forward(part):
    return part.step is None or part.step > 0


def test_ion_images_of_two_bands_of_which_one_is_a_row(tmp_path):
    writer = MeasuredWriter(tmp_path / "m.zarr", np.array([100.0, 200.0]), (65, 80), band_rows=64)
    cube = np.random.default_rng(0).random((2, 65, 80)).astype(np.float32)
    for begin, end in writer.bands:
        writer.write_images(begin, cube[:, begin:end])
    np.testing.assert_array_equal(writer.ions[1], cube[1])


@pytest.mark.parametrize("damage", [lambda b: bytes(50) + b[50:], lambda b: b[:-60], lambda b: b""])
@pytest.mark.parametrize("how", [lambda a: a[...], lambda a: a[1], lambda a: a[:, ::2], lambda a: a.vindex[0, 20, 30]])
def test_damage_is_one_line_however_it_is_read(tmp_path, damage, how):
    array = filled(tmp_path / "s", "uint8", 0, True)
    shard = tmp_path / "s" / "a" / "c" / "0" / "1" / "1"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(InputError, match=r"s/a.*: holds a chunk that cannot be read \(.*\); copy or make it again"):
        how(array)


def test_a_part_is_not_written_into_what_is_cut_to_nothing(tmp_path):
    array = filled(tmp_path / "s", "uint8", 0, True)
    (tmp_path / "s" / "a" / "c" / "0" / "1" / "1").write_bytes(b"")
    with pytest.raises(InputError, match="nothing is in it"):
        array[:, 20:22, 30:32] = 1
    array[:, 16:32, 24:48] = 1  # all of it is new
    assert (array[:, 16:32, 24:48] == 1).all()


@pytest.mark.parametrize("left", [0, 10, -60, -3])
def test_a_shard_that_is_cut_off_is_no_fill_value(tmp_path, left):
    array = filled(tmp_path / "s", "uint8", 0, True)
    shard = tmp_path / "s" / "a" / "c" / "0" / "1" / "1"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:left])
    with pytest.raises(InputError, match=r"s/a/c/0/1/1: holds a chunk that cannot be read \(.*copy or make it again"):
        array[:, 16:32, 24:48]
    with pytest.raises(InputError, match="s/a: holds a chunk that cannot be read"):
        array[...]
    shard.write_bytes(whole)
    assert array[...].any()


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_forked_process_reads(tmp_path, threads):
    """Readers of a training program may be such: zarrs' threads are not among what is forked."""
    filled(tmp_path / "s", "uint8", 0, True)
    code = (
        "import os, signal, sys; from deepfere.store import open_group; a = open_group(sys.argv[1])['a']; x = a[...]\n"
        "if not (pid := os.fork()):\n"
        "    signal.alarm(30); os._exit((a[...] == x).all() and (open_group(sys.argv[1])['a'][...] == x).all() and 7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "s"], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )  # fmt: skip
    assert done.stdout.strip() == "7"


def test_an_array_travels(tmp_path):
    array = filled(tmp_path / "s", "float32", np.nan, True)
    other = pickle.loads(pickle.dumps(array))
    assert type(other.async_array.codec_pipeline) is ReadInRust
    np.testing.assert_array_equal(other[...], array[...])
    other[:, :16, :24] = 5
    assert (array[:, :16, :24] == 5).all()


def test_what_zarrs_does_not_know_is_read_by_zarr(tmp_path):
    group = open_group(tmp_path / "s", "w")
    group.create_array("names", shape=(5,), chunks=(2,), dtype=str)
    group["names"][:] = np.array(list("abcde"))
    assert list(open_group(tmp_path / "s")["names"][1:4]) == ["b", "c", "d"]


def test_a_choice_of_the_users_is_left(tmp_path):
    code = (
        "import zarr; zarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'}); import deepfere.store;"
        "print(zarr.config.get('codec_pipeline.path'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "zarrs.ZarrsCodecPipeline"


def test_other_stores_are_zarrs_own():
    array = zarr.create_array({}, shape=(4, 4), chunks=(2, 2), dtype="uint8")
    array[...] = np.arange(16).reshape(4, 4)
    assert type(array.async_array.codec_pipeline) is Pipeline
    np.testing.assert_array_equal(array[1:, 1:], np.arange(16).reshape(4, 4)[1:, 1:])
