"""Ink on a slide is found by its colour; stains and their variation are not ink."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.model.artefacts import Artefacts, find_artefacts
from deepfere.model.features import stain_reference
from deepfere.pipeline.overview import stain_overview
from deepfere.readers.slide import open_slide

from .realdata import real_data

PITCH_UM = 50.0
INKS = {"green": (20, 140, 60), "blue": (30, 40, 160), "black": (25, 25, 25)}


@pytest.fixture(scope="module")
def overview(phantom):
    slide = open_slide(phantom.slide)
    stain, rgb = stain_overview(slide, PITCH_UM)
    return rgb, stain


def found(rgb, spacing_um, pitch_um=PITCH_UM):
    cover = np.ones(rgb.shape[:2])
    return find_artefacts(rgb, cover, stain_reference(rgb, cover), spacing_um, pitch_um)


def test_a_clean_slide_has_none(overview):
    rgb, stain = overview
    assert not found(rgb, stain.spacing_um).mask.any()
    assert not stain.artefacts.mask.any()


@pytest.mark.parametrize("ink", INKS)
def test_ink_is_found_and_little_else(overview, ink):
    rgb, stain = overview
    rows, cols = (int(v.mean()) for v in np.nonzero(stain.planes[5] > 127))
    mark = np.zeros(rgb.shape[:2], bool)
    mark[rows - 5 : rows + 9, cols - 40 : cols + 40] = True
    marked = rgb.copy()
    marked[mark] = INKS[ink]
    mask = found(marked, stain.spacing_um).mask
    assert mask[mark].mean() > 0.97
    # Beyond the mark: its blurred border, no more.
    assert (mask & ~mark).sum() < 1.2 * mark.sum()


def test_marks_become_glass_for_the_search(phantom, overview, tmp_path):
    import tifffile

    rgb, stain = overview
    marked = rgb.copy()
    rows, cols = (int(v.mean()) for v in np.nonzero(stain.planes[5] > 127))
    marked[rows : rows + 12, cols - 30 : cols + 30] = INKS["green"]
    path = tmp_path / "marked.tif"
    tifffile.imwrite(path, marked, photometric="rgb")
    again, picture = stain_overview(open_slide(path, stain.spacing_um), PITCH_UM)
    inner = (slice(rows + 2, rows + 10), slice(cols - 28, cols + 28))
    assert again.artefacts.mask[inner].all()
    assert (again.planes[6][inner] == 0).all() and (again.planes[5][inner] == 0).all()
    assert (picture[inner] == INKS["green"]).all(), "the picture shows the slide as it is"


def test_lookup_on_another_grid():
    mask = np.zeros((10, 8), bool)
    mask[2:4, 3:5] = True
    marks = Artefacts(mask, (10.0, 20.0))
    fine = marks.at((0.0, 0.0), (5.0, 5.0), (20, 32))
    np.testing.assert_array_equal(fine, np.repeat(np.repeat(mask, 2, 0), 4, 1))
    # A window, and what lies beyond the overview.
    np.testing.assert_array_equal(marks.at((20.0, 60.0), (5.0, 5.0), (4, 8)), np.ones((4, 8), bool))
    assert not marks.at((95.0, 150.0), (5.0, 5.0), (10, 10)).any()
    assert not Artefacts(np.zeros((0, 0), bool), (1.0, 1.0)).at((0.0, 0.0), (1.0, 1.0), (3, 3)).any()


@pytest.mark.real
@pytest.mark.parametrize(
    ("parts", "mpp", "pitch"),
    [
        (("bladder", "bladder_stain.tif"), None, 80.0),
        (("wsi", "CMU-1-Small-Region.svs"), None, 50.0),
        (("her2st", "C2.jpg"), (1.0, 1.0), 100.0),
        (("her2st", "C4.jpg"), (1.0, 1.0), 100.0),
    ],
)
def test_real_stains_are_not_ink(parts, mpp, pitch):
    stain, _ = stain_overview(open_slide(real_data(*parts), mpp), pitch)
    assert stain.artefacts.mask.mean() < 1e-3
