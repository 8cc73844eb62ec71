"""Columns of an index: what comes out is what went in, however it is asked for, in a few bytes a spectrum."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfere.readers import columns
from deepfere.readers.columns import Column, blocks, reach, same

LONG = np.iinfo(np.int64)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "BLOCK", 16)
        yield


values = st.lists(st.integers(int(LONG.min), int(LONG.max)) | st.integers(-3, 300), max_size=70)


@settings(max_examples=200, deadline=None)
@given(values, st.lists(st.integers(0, 69), max_size=40), st.integers(-80, 80), st.integers(-80, 80), st.integers(1, 9))
def test_what_comes_out_is_what_went_in(numbers, rows, begin, end, step):
    array, column = np.array(numbers, np.int64), Column()
    column.extend(array[: len(array) // 2])
    for value in array[len(array) // 2 :].tolist():
        column.append(value)
    assert len(column) == len(array)
    np.testing.assert_array_equal(column[:], array)
    np.testing.assert_array_equal(column[begin:end:step], array[begin:end:step])
    np.testing.assert_array_equal(np.asarray(column), array)
    np.testing.assert_array_equal(np.concatenate([*blocks(column), array[:0]]), array)
    chosen = np.array([row for row in rows if row < len(array)], np.int64)
    for _ in range(2):  # blocks stay unpacked for a while
        np.testing.assert_array_equal(column[chosen], array[chosen])
    np.testing.assert_array_equal(column[array > 5], array[array > 5])
    if numbers:
        assert (
            column[0] == numbers[0]
            and column[-1] == numbers[-1]
            and column[len(numbers) // 2] == array[len(array) // 2]
        )
        assert same(column) == same(array) == (len(set(numbers)) == 1)
        assert reach(column) == reach(array) == (min(numbers), max(numbers))
    for beyond in (len(numbers), -len(numbers) - 1):
        with pytest.raises(IndexError):
            column[beyond]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 60), max_size=70), st.integers(-9, 70))
def test_how_many_values_are_not_above_one(numbers, value):
    array = np.sort(np.array(numbers, np.int64))
    assert Column.of(array).count_up_to(value) == np.searchsorted(array, value, side="right")


def test_what_was_read_does_not_change_the_column_and_more_can_be_added():
    column = Column.of(np.arange(100) ** 2)
    column[:5][:] = 0
    column[np.array([3])][:] = 0
    column.extend(np.array([7]))
    assert column[100] == 7 and column[3] == 9 and column[4] == 16


def test_a_few_bytes_a_spectrum(monkeypatch):
    monkeypatch.setattr(columns, "BLOCK", 1 << 16)
    n, rng = 500_000, np.random.default_rng(1)
    lengths = rng.poisson(300, n)
    offsets = 16 + np.cumsum(12 * lengths) - 12 * lengths
    tracemalloc.start()
    begin = tracemalloc.get_traced_memory()[0]
    held = [Column.of(np.arange(n) % 500), Column.of(np.arange(n) // 500), Column.of(lengths), Column.of(offsets)]
    for column in held:
        column[n // 3]  # what stays unpacked is counted
    size = tracemalloc.get_traced_memory()[0] - begin
    tracemalloc.stop()
    assert len(held[3]) == n and held[3][n - 1] == offsets[-1]
    assert size < 12 * n, size  # as arrays: 32
