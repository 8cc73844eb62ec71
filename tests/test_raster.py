"""Which spectra are where: the same whatever the order of acquisition, however many blocks the coordinates fill."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.measured.raster import by_band, first_of_pixels, in_image_order, plan_raster
from deepfere.readers import columns
from deepfere.readers.columns import Column


@pytest.fixture(params=["rows", "columns", "there and back", "any order", "several a pixel"])
def spectra(request, monkeypatch):
    """Spectra of a raster with holes, in blocks of 32."""
    monkeypatch.setattr(columns, "BLOCK", 32)
    y, x = np.divmod(np.arange(23 * 17), 17)
    kept = (y - 11) ** 2 + (x - 8) ** 2 < 90
    y, x, rng = y[kept], x[kept], np.random.default_rng(3)
    if request.param == "several a pixel":
        y, x = (np.concatenate([v, v[::3], v[::6]]) for v in (y, x))
    if request.param == "columns":
        order = np.lexsort((y, x))
    elif request.param == "there and back":
        order = np.lexsort((np.where(y % 2, -x, x), y))
    else:
        order = np.arange(len(y)) if request.param == "rows" else rng.permutation(len(y))
    y, x = y[order] + 5, x[order] - 2
    return SimpleNamespace(path=Path("a.imzML"), x=Column.of(x), y=Column.of(y)), y, x


def test_every_spectrum_is_in_its_pixel(spectra):
    source, y, x = spectra
    raster = plan_raster(source, "sum")
    row, col = y - y.min(), x - x.min()
    counts = np.zeros(raster.shape_px, int)
    np.add.at(counts, (row, col), 1)
    np.testing.assert_array_equal(raster.counts, counts)
    assert raster.counts.dtype == np.uint8 and raster.origin_px == (y.min(), x.min())
    np.testing.assert_array_equal(raster.mask, counts > 0)
    some = np.array([0, 40, 7, len(y) - 1])
    np.testing.assert_array_equal(raster.at(some), [row[some], col[some]])
    found = np.concatenate([places for _, places in raster.pixels()])
    np.testing.assert_array_equal(found, row * raster.shape_px[1] + col)


@pytest.mark.parametrize("band", [1, 4, 23, 100])
def test_bands_hold_their_spectra_and_no_other(spectra, band):
    source, y, _ = spectra
    found = list(by_band(plan_raster(source, "sum"), band))
    assert len(found) == -(-(np.ptp(y) + 1) // band)
    for k, rows in enumerate(found):
        np.testing.assert_array_equal(rows, np.flatnonzero((y - y.min()) // band == k))


@pytest.mark.parametrize("count", [1, 5, 60, 10**6])
def test_spectra_in_the_order_of_the_image(spectra, count):
    source, y, x = spectra
    raster, order = plan_raster(source, "sum"), np.lexsort((x, y))  # stable: of one pixel as in the file
    numbers = np.unique(np.linspace(0, len(y) - 1, min(count, len(y))).astype(np.int64))
    np.testing.assert_array_equal(in_image_order(raster, numbers), order[numbers])
    assert not len(in_image_order(raster, numbers[:0])) and not len(first_of_pixels(raster, numbers[:0]))
    pixels = np.flatnonzero(raster.mask)[:: max(1, len(y) // count)]
    places = np.concatenate([places for _, places in raster.pixels()])
    np.testing.assert_array_equal(first_of_pixels(raster, pixels), [np.flatnonzero(places == p)[0] for p in pixels])


def test_steps_and_repeats_are_refused_in_the_words_of_the_file(monkeypatch):
    monkeypatch.setattr(columns, "BLOCK", 8)
    y, x = np.divmod(np.arange(36), 6)
    for step, other in ((2, 2), (3, 5)):
        with pytest.raises(InputError, match=f"steps of {'2' if step == 2 else '5 and 3'}"):
            plan_raster(SimpleNamespace(path=Path("a"), x=Column.of(x * other), y=Column.of(y * step)))
    plan_raster(SimpleNamespace(path=Path("a"), x=Column.of(x), y=Column.of(y * 2)))
    twice = SimpleNamespace(path=Path("a"), x=Column.of(np.append(x, 4) + 10), y=Column.of(np.append(y, 3) + 20))
    with pytest.raises(InputError, match="1 pixels with several spectra, first x 14, y 23"):
        plan_raster(twice)


def test_more_spectra_of_a_pixel_than_a_byte_counts():
    x = np.concatenate([np.zeros(300, np.int64), np.arange(8)])
    raster = plan_raster(SimpleNamespace(path=Path("a"), x=Column.of(x), y=Column.of(np.zeros_like(x))), "sum")
    assert raster.counts[0, 0] == 301 and raster.counts.sum() == 308
