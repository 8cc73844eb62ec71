"""Tissue labels: what is read, how it comes onto the grid, and what is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from deepfere.errors import InputError
from deepfere.evaluation.labels import majority, read_labels

SHAPE, FACTOR = (6, 5), 4


@pytest.fixture
def picture():
    """Labels on the high-resolution grid: 0, 3 and 7."""
    return np.random.default_rng(0).choice([0, 3, 7], (SHAPE[0] * FACTOR, SHAPE[1] * FACTOR)).astype(np.uint8)


def write(path, image):
    if path.suffix == ".npy":
        np.save(path, image)
    elif path.suffix == ".png":
        Image.fromarray(image).save(path)
    else:
        tifffile.imwrite(path, image)
    return path


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [
        (".npy", np.int64),
        (".npy", np.uint8),
        (".png", np.uint8),
        (".png", np.uint16),
        (".tif", np.int32),
        (".TIFF", "u1"),
    ],
)
def test_labels_keep_their_numbers(tmp_path, picture, ending, dtype):
    labels = read_labels(write(tmp_path / f"a{ending}", picture.astype(dtype)), SHAPE, FACTOR)
    assert labels.values == [3, 7] and labels.codes.dtype == np.uint8 and labels.how == "pixel by pixel"
    np.testing.assert_array_equal(np.array([0, *labels.values])[labels.codes], picture)


def test_a_palette_counts_by_its_numbers(tmp_path, picture):
    image = Image.fromarray(picture)
    image.putpalette([9, 9, 9] * 3 + [200, 0, 0] + [0, 0, 0] * 3 + [0, 200, 0])
    assert image.mode == "P"
    image.save(tmp_path / "p.png")
    assert read_labels(tmp_path / "p.png", SHAPE, FACTOR).values == [3, 7]
    colours = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "p.tif", picture, photometric="palette", colormap=colours)
    assert read_labels(tmp_path / "p.tif", SHAPE, FACTOR).values == [3, 7]


def test_finer_labels_by_majority(tmp_path, picture):
    fine = np.repeat(np.repeat(picture, 3, 0), 3, 1)
    fine[::3, ::3] = 5  # one of nine
    labels = read_labels(write(tmp_path / "a.npy", fine), SHAPE, FACTOR)
    assert labels.how == "majority of 3 x 3"
    np.testing.assert_array_equal(np.array([0, *labels.values])[labels.codes], picture)


@pytest.mark.parametrize("per_pixel", [1, 2, 3, 5, 6])
def test_other_grids_by_the_nearest(tmp_path, per_pixel):
    coarse = 1 + np.random.default_rng(1).integers(0, 3, (SHAPE[0] * per_pixel, SHAPE[1] * per_pixel))
    labels = read_labels(write(tmp_path / "a.npy", coarse), SHAPE, FACTOR)
    assert labels.how.startswith(f"nearest of {per_pixel} per measured pixel")
    for a, b in [(0, 0), (5, 9), (23, 19), (13, 2)]:
        # The label pixel that holds the centre of fine pixel (a, b).
        expected = coarse[int((a + 0.5) / FACTOR * per_pixel), int((b + 0.5) / FACTOR * per_pixel)]
        assert labels.values[labels.codes[a, b] - 1] == expected


def test_labels_larger_than_a_measured_pixel(tmp_path):
    coarse = np.array([[1, 2], [3, 4], [5, 6]], np.uint8)
    labels = read_labels(write(tmp_path / "a.npy", coarse), (6, 4), 2)
    np.testing.assert_array_equal(labels.codes, np.kron(coarse, np.ones((4, 4), np.uint8)))


def test_majority_by_hand():
    blocks = np.array([[1, 1, 2, 0], [2, 1, 1, 0], [0, 0, 2, 1], [0, 3, 1, 2]], np.uint8)
    # Three of four; one of each with half unlabelled (the smaller number); three unlabelled; two and two.
    np.testing.assert_array_equal(majority(blocks, 2), [[1, 1], [0, 1]])
    np.testing.assert_array_equal(majority(blocks, 1), blocks)


def test_majority_does_not_depend_on_bands(monkeypatch):
    image = np.random.default_rng(2).integers(0, 4, (60, 36)).astype(np.uint8)
    whole = majority(image, 3)
    monkeypatch.setattr("deepfere.evaluation.labels.BAND_ROWS", 6)
    np.testing.assert_array_equal(majority(image, 3), whole)


def test_inside_the_measured_pixels(tmp_path, picture):
    mask = np.ones(SHAPE, bool)
    mask[2, 3] = False
    labels = read_labels(write(tmp_path / "a.npy", picture), SHAPE, FACTOR)
    inside = labels.inside(mask, FACTOR).codes
    assert not inside[8:12, 12:16].any()
    np.testing.assert_array_equal(inside[:8], labels.codes[:8])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.png", None, "no such file"),
        ("folder.png", "folder", "no label image"),
        ("a.jpg", b"x", "no label image"),
        ("a.npy", b"x", "cannot be read"),
        ("a.png", b"x", "cannot be read"),
        ("a.tif", b"x", "cannot be read"),
        ("f.npy", np.ones((24, 20)), "float64, not whole numbers"),
        ("o.npy", np.array([["a"]], object), "cannot be read"),
        ("v.npy", np.ones((2, 24, 20), int), "one plane"),
        ("e.npy", np.zeros((0, 0), int), "one plane"),
        ("c.png", np.ones((24, 20, 3), np.uint8), "colour picture"),
        ("c.tif", np.ones((24, 20, 3), np.uint8), "colour picture"),
        ("n.npy", np.full((24, 20), -1), "the label -1"),
        ("l.npy", np.full((24, 20), 2**60), "the label 1152921504606846976"),
        ("m.npy", np.arange(480).reshape(24, 20), "479 different labels"),
        ("s.npy", np.ones((20, 24), int), "has 20 x 24 pixels; the result has 24 x 20 (6 x 5 measured, x4)"),
        ("t.npy", np.ones((25, 20), int), "has 25 x 20 pixels"),
        ("u.npy", np.ones((36, 10), int), "has 36 x 10 pixels"),
    ],
)
def test_what_is_refused(tmp_path, name, content, told):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.mkdir()
    elif content is not None:
        if content.ndim == 3 and path.suffix == ".tif":
            tifffile.imwrite(path, content, photometric="rgb")
        else:
            write(path, content)
    with pytest.raises(InputError) as error:
        read_labels(path, SHAPE, FACTOR)
    text = str(error.value)
    assert told in text and text.startswith(f"{path}: ") and "\n" not in text and "; " in text
