"""What the refinement looks at: all of a small section, windows of a large one, the same rows either way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepfere.alignment.looks import SIDE_PX, Looks, high_pass, plan_windows
from deepfere.alignment.refine import AFFINE_STAGES, refine
from deepfere.frame import SectionGrid
from tests.test_alignment import error_px, measure, stain_of, truth_of

LARGE = SectionGrid((90, 70), (50.0, 40.0))


def mask_of():
    mask = np.ones(LARGE.shape_px, bool)
    mask[:20, :30] = False
    return mask


def test_a_small_section_is_looked_at_whole():
    mask = np.zeros((30, 20), bool)
    mask[3:9, 4:9] = True
    looks = Looks(SectionGrid((30, 20), (50.0, 50.0)), mask, 2)
    assert looks.count == 30
    assert looks.points_um.shape == (60, 40, 2)
    images = torch.rand(3, 30, 20, dtype=torch.float64)
    torch.testing.assert_close(looks.of_grid(images, False), images[:, torch.from_numpy(mask)].T)
    torch.testing.assert_close(looks.of_samples(images, True), high_pass(images)[:, torch.from_numpy(mask)].T)


@pytest.mark.parametrize("fine", [False, True])
def test_windows_give_rows_of_the_whole(fine):
    mask = mask_of()
    looks = Looks(LARGE, mask, 2, most_px=1500)
    assert 1000 < looks.count <= 1500
    images = torch.rand(4, *LARGE.shape_px, dtype=torch.float64)
    rows = looks.of_grid(images, fine)
    assert rows.shape == (looks.count, 4)
    whole = (high_pass(images) if fine else images)[:, torch.from_numpy(mask)].T
    # Every row is a row of the whole grid: the ring gives windows the same neighbours.
    distance = torch.cdist(rows, whole).min(1).values
    assert float(distance.max()) < 1e-6
    # Sampled at the points of the windows, an image of positions gives the rows of that image.
    centres = torch.from_numpy(LARGE.centres_um()).permute(2, 0, 1)
    height, width = (n // 2 for n in looks.points_um.shape[:2])
    sampled = looks.points_um.reshape(height, 2, width, 2, 2).mean((1, 3)).permute(2, 0, 1)
    torch.testing.assert_close(looks.of_samples(sampled, fine), looks.of_grid(centres, fine))


def test_windows_are_spread_and_always_the_same():
    mask = np.ones((400, 300), bool)
    windows = plan_windows(mask, 6000)
    assert windows == plan_windows(mask, 6000)
    assert windows is not None and len(windows) == 6000 // SIDE_PX**2
    assert len(set(windows)) == len(windows)
    middle = np.array(windows).mean(0)
    assert abs(middle - [200, 150]).max() < 60


def test_refinement_through_windows_finds_the_place(monkeypatch):
    stain, truth = stain_of(5), truth_of(False, 12.0)
    measured = measure(stain, truth)
    monkeypatch.setattr("deepfere.alignment.refine.MOST_PX", 300)
    assert len(plan_windows(measured.mask, 300)) > 1, "the case must be seen through windows"
    start = truth_of(False, 12.0, shift_um=(70.0, -50.0))
    assert np.median(error_px(start, truth)) > 0.6
    found = refine(measured, stain, start, AFFINE_STAGES)
    assert np.median(error_px(found, truth)) < 0.25
