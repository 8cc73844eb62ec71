"""Pyramids: every level is the average of level 0, at odd edges too, and whatever shard it is computed in."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.cluster import Journal
from deepfere.reconstruction.ome import level_shapes
from deepfere.reconstruction.pyramid import halve, level_counts, pixels_below, pyramid_phases
from deepfere.schedule import run_jobs
from deepfere.store import create_array, open_group


def direct(image, level):
    """Means over the pixels of level 0 that exist below each pixel of a level, in float64."""
    side = 2**level
    c, h, w = image.shape
    padded = np.full((c, -(-h // side) * side, -(-w // side) * side), np.nan)
    padded[:, :h, :w] = image
    return np.nanmean(padded.reshape(c, padded.shape[1] // side, side, padded.shape[2] // side, side), axis=(2, 4))


def halved(image, level):
    """`halve` from level 0 up to a level, each level as a whole."""
    out, (h, w) = image, image.shape[1:]
    for k in range(level):
        out = halve(out, pixels_below(0, out.shape[1], k, h), pixels_below(0, out.shape[2], k, w))
    return out


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (13, 16), (1, 3), (33, 17), (64, 32)])
def test_levels_are_direct_averages_at_odd_sizes(shape):
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    for level in range(1, 6):
        np.testing.assert_allclose(halved(image, level), direct(image, level), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (1, 3), (2, 5), (3, 1), (64, 32), (515, 1031)])
def test_half_precision_is_the_single_precision_mean_rounded(shape):
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float16)
    expected = halved(image.astype(np.float32), 1).astype(np.float16)
    found = halved(image, 1)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, expected)


def test_a_pixel_over_three_rows_is_their_mean():
    image = np.array([0, 0, 0, 0, 0, 0, 1], np.float32).reshape(1, 7, 1)
    assert halved(image, 2).ravel() == pytest.approx([0, 1 / 3])


def test_a_tile_gives_what_the_whole_gives():
    image = np.random.default_rng(1).normal(size=(1, 21, 19)).astype(np.float32)
    level_1 = halved(image, 1)
    whole = halved(image, 2)
    rows, cols = pixels_below(4, 11, 1, 21), pixels_below(2, 10, 1, 19)
    np.testing.assert_array_equal(halve(level_1[:, 4:11, 2:10], rows, cols), whole[:, 2:, 1:])


def test_detail_and_stain_on_disk(tmp_path):
    rng = np.random.default_rng(2)
    shape, levels = (71, 53), 5
    shapes = level_shapes(shape, least=levels)
    assert shapes == [(71, 53), (36, 27), (18, 14), (9, 7), (5, 4)]
    group = open_group(tmp_path / "r.zarr", "w")
    full = {
        "detail": rng.normal(size=(2, *shape)).astype(np.float16),
        "stain": rng.integers(0, 256, (3, *shape)).astype(np.uint8),
    }
    for name, image in full.items():
        parent, c = group.create_group(name), len(image)
        for k, s in enumerate(shapes):
            create_array(parent, str(k), (c, *s), image.dtype, (c, 16, 16), (c, 32, 32))
        parent["0"][:] = image
    journal, told = Journal(tmp_path / "journal", "x"), []
    for _ in range(2):  # the second time nothing is left to do
        phases = pyramid_phases(
            str(tmp_path / "r.zarr"), level_counts(shapes, 32, list(full)), journal, progress=told.append
        )
        run_jobs([("r", phases)], title="pyramid", here=True)
    assert len(told) == len(journal.done()) == 10 and told[-1] == 1.0
    for k in range(1, levels):
        # Every level is rounded when it is stored: half precision, and whole grey values.
        np.testing.assert_allclose(group["detail"][str(k)][:], direct(full["detail"], k), rtol=2e-3, atol=2e-3)
        assert np.abs(group["stain"][str(k)][:] - direct(full["stain"], k)).max() <= 0.5 * k


def test_a_line_that_a_full_disk_cut_off_takes_no_other_with_it(tmp_path):
    journal = Journal(tmp_path / "journal", "x")
    journal.record({"a": {"wrote": 1}})
    (file,) = (tmp_path / "journal").glob("*.jsonl")
    with file.open("a") as handle:
        handle.write(file.read_text().replace('"a"', '"b"')[:-9])
    journal.record({"c": {"wrote": 3}})
    journal.record({"d": {"wrote": 4}})
    assert set(Journal(tmp_path / "journal", "x").done()) == {"a", "c", "d"}
