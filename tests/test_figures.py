"""Figures: resampling, ranges, outlines, overlays and complete pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from deepfere.evaluation import figures
from deepfere.frame import SectionGrid
from tests.reports import FakeResult


def test_area_resample_is_an_average_and_knows_holes():
    image = np.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(figures.area_resample(image, (1, 1)), [[image.mean()]])
    np.testing.assert_array_equal(figures.area_resample(image, (6, 8)), image.repeat(2, 0).repeat(2, 1))
    np.testing.assert_allclose(figures.area_resample(image, (3, 2)), image.reshape(3, 2, 2).mean(2))
    holed = image.copy()
    holed[:, 0], holed[1, 1] = np.nan, np.nan
    out = figures.area_resample(holed, (3, 2))
    np.testing.assert_array_equal(out[:, 0], [1.0, np.nan, 9.0])
    colours = figures.area_resample(np.stack([image, 2 * image], -1), (5, 7))
    np.testing.assert_allclose(colours[..., 1], 2 * colours[..., 0])
    np.testing.assert_allclose(colours.mean((0, 1)), [image.mean(), 2 * image.mean()])


def test_ranges_bars_and_thresholds():
    assert figures.robust_top(np.arange(1001.0), np.array([np.nan])) == pytest.approx(995.0)
    rare = np.zeros(10_000)
    rare[7] = 3.0
    assert figures.robust_top(rare) == 3.0
    assert figures.robust_top(np.zeros(3)) == 1.0
    assert [figures.scale_bar_um(w) for w in (40, 79, 2000, 4000, 9e4)] == [10, 10, 500, 1000, 20000]
    assert figures.length_text(200.0) == "200 µm" and figures.length_text(2000.0) == "2 mm"
    two = np.concatenate([np.full(50, 1.0), np.full(30, 9.0), [np.nan]])
    assert 4 < figures.otsu_threshold(two) < 6
    assert np.isnan(figures.otsu_threshold(np.ones(4)))


def test_contours_lie_where_the_tissue_ends():
    image = np.zeros((20, 30))
    image[5:15, 10:20] = 1.0
    image[0, 29] = np.nan
    (line,) = figures.contours_um(image, 0.5, SectionGrid((20, 30), (50.0, 20.0)))
    # Half-way between the centres of the last pixel in and the first out: the pixels' border.
    np.testing.assert_allclose([line.min(0), line.max(0)], [[250.0, 200.0], [750.0, 400.0]])


def test_overlay_draws_where_it_is_told():
    picture = np.full((50, 100, 3), 255, np.uint8)
    line = figures.Line(np.array([[0.0, 500.0], [500.0, 500.0]]), "#00ff00")
    drawn = figures.overlay(picture, (10.0, 10.0), [line], (0.0, 0.0, 500.0, 1000.0), 200)
    assert drawn.shape == (100, 200, 3)
    green = (drawn[..., 1] > 200) & (drawn[..., 0] < 100)
    assert green.any() and set(np.nonzero(green)[1]) <= {98, 99, 100, 101}
    beyond = figures.overlay(picture, (10.0, 10.0), [], (-250.0, 0.0, 250.0, 1000.0), 200)
    assert (beyond[10, 100] == figures.NOT_MEASURED).all() and (beyond[90, 100] == 255).all()


def test_ion_png_marks_unmeasured_as_transparent():
    png = figures.ion_png(np.array([[0.0, 1.0], [2.0, np.nan]]), 1.0)
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert rgba[1, 1, 3] == 0 and (rgba[..., 3] == 255).sum() == 3
    assert (rgba[0, 1] == rgba[1, 0]).all() and (rgba[0, 0] != rgba[0, 1]).any()
    assert (figures.colourise(np.array([[np.nan]]), 1.0)[0, 0] == figures.NOT_MEASURED).all()


def test_complete_figures_are_png():
    result = FakeResult(ions=1)
    mz = float(result.ions["mz"].iloc[0])
    images = [("measured", result.measured(mz)), ("reconstructed", np.asarray(result.ion(mz)))]
    stain = np.moveaxis(result._stain, 0, -1)
    figure = figures.ion_panel(
        images, result.grid.extent_um, stain=stain, uncertainty=np.asarray(result.uncertainty(mz)), title="<m/z>"
    )
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["stain", "measured", "reconstructed", "uncertainty (1 s.d.)"]
    limits = {ax.images[0].get_clim() for ax in figure.axes if ax.get_title() in ("measured", "reconstructed")}
    assert len(limits) == 1
    assert Image.open(io.BytesIO(figures.figure_png(figure, dpi=60))).format == "PNG"
    bare = figures.ion_panel(images[:1], result.grid.extent_um)
    assert figures.figure_png(bare, dpi=40).startswith(b"\x89PNG")
