"""The displacement: found where the section bends, refused where only noise asks for it."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.alignment.bend import LEAST_PX, bend, least_jacobian, plan_knots
from deepfere.alignment.overview import MeasuredOverview
from deepfere.frame import Alignment, Displacement
from tests.test_alignment import GRID, error_px, measure, stain_of, truth_of


def bent_truth(size_um, seed=3):
    """A turned placement with a smooth bend of about ``size_um``."""
    rng = np.random.default_rng(seed)
    extent = GRID.extent_um
    spacing = (extent[0] / 2, extent[1] / 2)
    knots = size_um * rng.uniform(-1, 1, (5, 5, 2))
    straight = truth_of(False, 20.0)
    return Alignment(straight.matrix, straight.offset_um, Displacement((-spacing[0], -spacing[1]), spacing, knots))


def test_a_bend_is_found():
    stain, truth = stain_of(0), bent_truth(60.0)
    measured = measure(stain, truth)
    affine = Alignment(truth.matrix, truth.offset_um)
    found = bend(measured, stain, affine)
    notes = found.evidence["bend"]
    assert notes["kept"], notes
    assert found.displacement is not None
    assert np.median(error_px(found, truth)) < 0.5 * np.median(error_px(affine, truth))
    assert notes["least_jacobian"] > 0.2


def test_what_does_not_bend_stays_affine_or_nearly_so():
    stain, truth = stain_of(0), truth_of(False, 20.0)
    found = bend(measure(stain, truth), stain, truth)
    assert np.percentile(error_px(found, truth), 90) < 0.15


def test_noise_does_not_bend():
    stain, truth = stain_of(0), truth_of(False, 20.0)
    measured = measure(stain, truth)
    rng = np.random.default_rng(5)
    images = rng.standard_normal(measured.images.shape)
    noise = MeasuredOverview.build(images, measured.mask, measured.weight, measured.grid)
    found = bend(noise, stain, truth)
    assert found.displacement is None
    assert not found.evidence["bend"]["kept"]


def test_few_pixels_are_not_bent():
    stain, truth = stain_of(0), bent_truth(60.0)
    measured = measure(stain, truth)
    mask = np.zeros_like(measured.mask)
    mask[5:15, 5:15] = True
    assert mask.sum() < LEAST_PX
    few = MeasuredOverview.build(measured.images, mask, measured.weight, measured.grid)
    found = bend(few, stain, truth_of(False, 20.0))
    assert found.displacement is None
    assert "few" in found.evidence["bend"]["reason"]


def test_a_given_displacement_stays():
    truth = bent_truth(40.0)
    assert bend(measure(stain_of(0), truth), stain_of(0), truth) is truth


def test_jacobian_of_plain_and_folded():
    assert least_jacobian(truth_of(True, 30.0), GRID) == pytest.approx(1.0)
    assert least_jacobian(bent_truth(4000.0), GRID) < 0


@pytest.mark.parametrize(("shape", "knots"), [((10, 14), (3, 3)), ((40, 36), (7, 6)), ((1000, 60), (24, 10))])
def test_knots_follow_the_grid(shape, knots):
    assert plan_knots(shape) == knots
