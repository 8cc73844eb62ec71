"""The alignment inside the model: the same numbers as outside, with gradients that are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from deepfere.frame import Alignment, Displacement, SectionGrid
from deepfere.model.registration import Registration, bilinear, mapped_grid, plane_window, sample_window
from tests.test_frame import EXTENT, alignments, some_points

quick = settings(max_examples=25, deadline=None)
SPACING = (EXTENT[0] / 3, EXTENT[1] / 4)


def bent_start(seed=0, size=20.0):
    rng = np.random.default_rng(seed)
    matrix = np.array([[0.9, -0.3], [0.35, -1.1]])
    spline = Displacement((-SPACING[0], -SPACING[1]), SPACING, rng.uniform(-size, size, (6, 7, 2)))
    return Alignment(matrix, np.array([300.0, 4000.0]), spline, {"source": "test"})


def moved(registration, seed=0):
    """Give every parameter a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in registration.parameters():
            parameter.copy_(15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return registration


@quick
@given(alignment=alignments(), seed=st.integers(0, 100))
def test_start_equals_the_plain_alignment(alignment, seed):
    points = some_points(seed)
    out = Registration(alignment, tuple(EXTENT))(torch.from_numpy(points))
    assert out.dtype == torch.float64
    np.testing.assert_allclose(out.detach().numpy(), alignment.map(points), rtol=1e-13, atol=1e-8)


@pytest.mark.parametrize("knots", [None, (4, 5)])
@quick
@given(seed=st.integers(0, 100))
def test_forward_equals_the_alignment_it_exports(knots, seed):
    start = bent_start(seed)
    registration = moved(Registration(start, tuple(EXTENT), knots), seed)
    points = some_points(seed + 1)
    exported = registration.alignment()
    np.testing.assert_allclose(registration(torch.from_numpy(points)).detach().numpy(), exported.map(points), atol=1e-8)
    assert exported.evidence == {"source": "test"}
    assert np.abs(exported.map(points) - start.map(points)).max() > 1
    again = Alignment.from_dict(exported.to_dict())
    np.testing.assert_array_equal(again.map(points), exported.map(points))


@pytest.mark.parametrize("knots", [None, (4, 5)])
@quick
@given(seed=st.integers(0, 100))
def test_a_grid_equals_its_points(knots, seed):
    """With gradients; also where it reaches beyond the knots, or lies beyond them."""
    rng = np.random.default_rng(seed)
    registration = moved(Registration(bent_start(seed), tuple(EXTENT), knots), seed)
    low = rng.uniform(-1.5, 1.2, 2) * EXTENT
    y, x = (torch.from_numpy(first + np.arange(n) * rng.uniform(1, 60)) for first, n in zip(low, (23, 17), strict=True))
    points = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
    whole = registration.grid(y, x)
    one_by_one = registration(points.reshape(-1, 2)).reshape(points.shape)
    np.testing.assert_allclose(whole.detach().numpy(), one_by_one.detach().numpy(), atol=1e-8)
    alignment = registration.alignment()
    np.testing.assert_allclose(mapped_grid(alignment, y, x).numpy(), alignment.map(points.numpy()), atol=1e-8)
    weight = torch.from_numpy(rng.standard_normal(points.shape))
    parameters = list(registration.parameters())
    ours, theirs = (torch.autograd.grad((out * weight).sum(), parameters) for out in (whole, one_by_one))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-9, atol=1e-7)


def test_parameters_are_micrometres_about_the_centre():
    registration = Registration(Alignment.identity(), tuple(EXTENT))
    centre = torch.from_numpy(EXTENT[None] / 2)
    with torch.no_grad():
        registration.shear_um[0, 1] = 10.0
    np.testing.assert_allclose(registration(centre).detach().numpy(), EXTENT[None] / 2, atol=1e-9)
    edge = centre + torch.tensor([[0.0, EXTENT.max() / 2]])
    np.testing.assert_allclose((registration(edge) - edge).detach().numpy(), [[10.0, 0.0]], atol=1e-9)
    with torch.no_grad():
        registration.shift_um[:] = torch.tensor([3.0, -4.0])
    np.testing.assert_allclose((registration(centre) - centre).detach().numpy(), [[3.0, -4.0]], atol=1e-9)


@pytest.mark.parametrize("knots", [None, (4, 5)])
def test_gradients_by_finite_differences(knots):
    registration = moved(Registration(bent_start(), tuple(EXTENT), knots), 3)
    points = torch.from_numpy(some_points(5, n=12))
    names = [name for name, _ in registration.named_parameters()]
    assert names == ["shift_um", "shear_um"] + (["knots_um"] if knots else [])

    def call(p, *values):
        return torch.func.functional_call(registration, dict(zip(names, values, strict=True)), (p,))

    values = [p.detach().clone().requires_grad_(True) for p in registration.parameters()]
    assert torch.autograd.gradcheck(call, (points, *values), eps=1e-3, atol=1e-6)


def test_a_start_on_another_grid_of_knots_is_refused():
    start = bent_start()
    with pytest.raises(ValueError, match="another grid of knots"):
        Registration(start, tuple(EXTENT), (5, 5))
    # The same number of knots over another extent would silently move them.
    with pytest.raises(ValueError, match="another grid of knots"):
        Registration(start, tuple(1.5 * EXTENT), (4, 5))
    kept = Registration(start, tuple(EXTENT), (4, 5)).alignment()
    np.testing.assert_allclose(kept.map(some_points()), start.map(some_points()), atol=1e-9)


@quick
@given(seed=st.integers(0, 1000), shape=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_bilinear_equals_scipy_with_edges_repeated(seed, shape):
    rng = np.random.default_rng(seed)
    image = rng.random((*shape, 2))
    at = rng.uniform(-3, max(shape) + 3, (60, 2))
    at[:3] = [[0, 0], [shape[0] - 1, shape[1] - 1], [shape[0] - 0.5, -0.5]]
    found = bilinear(torch.from_numpy(image), (0, 0), torch.from_numpy(at)).numpy()
    for c in range(2):
        expected = map_coordinates(image[..., c], at.T, order=1, mode="nearest")
        np.testing.assert_allclose(found[:, c], expected, atol=1e-12)


def test_bilinear_on_a_window_equals_the_whole_far_from_the_origin():
    rng = np.random.default_rng(0)
    window = torch.from_numpy(rng.random((20, 20, 3))).float()
    far = (150_000, 90_000)
    at = torch.from_numpy(rng.uniform(2, 17, (200, 2)))
    near = bilinear(window, (0, 0), at)
    # Float64 coordinates: no loss 150 000 pixels away, where float32 would keep 1/64 pixel.
    np.testing.assert_allclose(bilinear(window, far, at + torch.tensor(far)).numpy(), near.numpy(), atol=1e-6)
    part = bilinear(window[1:19, 2:19], (1, 2), at.clamp(min=2))
    np.testing.assert_allclose(part.numpy(), bilinear(window, (0, 0), at.clamp(min=2)).numpy(), atol=1e-6)


def test_sample_window_averages_areas_of_a_ramp():
    # On a linear image the area average is the value at the centre, whatever the affine.
    spacing = (2.0, 3.0)
    y, x = np.meshgrid((np.arange(80) + 0.5) * 2, (np.arange(70) + 0.5) * 3, indexing="ij")
    planes = torch.from_numpy(np.stack([0.5 * y - 0.2 * x, x], -1))
    alignment = Alignment(np.array([[0.8, 0.3], [-0.2, 1.1]]), np.array([30.0, 40.0]))
    grid = SectionGrid((6, 5), (9.0, 11.0))
    for s in (1, 2, 3):
        points = torch.from_numpy(alignment.map(grid.refine(s).centres_um()))
        out = sample_window(planes[4:], (4, 0), spacing, points, s).numpy()
        centres = alignment.map(grid.centres_um())
        assert out.shape == (2, 6, 5)
        np.testing.assert_allclose(out[0], 0.5 * centres[..., 0] - 0.2 * centres[..., 1], atol=1e-9)
        np.testing.assert_allclose(out[1], centres[..., 1], atol=1e-9)


def test_gradient_of_samples_with_respect_to_the_alignment():
    rng = np.random.default_rng(2)
    planes = torch.from_numpy(rng.random((40, 40, 2)))
    grid = SectionGrid((4, 4), (10.0, 10.0))
    registration = Registration(Alignment(np.eye(2) * 1.1, np.array([20.3, 31.7])), grid.extent_um)
    points = torch.from_numpy(grid.refine(2).centres_um())

    def loss():
        slide = registration(points.reshape(-1, 2)).reshape(points.shape)
        return (sample_window(planes, (0, 0), (3.0, 3.0), slide, 2) ** 2).sum()

    loss().backward()
    assert registration.shift_um.grad is not None
    gradient = registration.shift_um.grad.clone()
    step = 1e-6
    for axis in (0, 1):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                registration.shift_um[axis] += sign * step
                values.append(float(loss()))
                registration.shift_um[axis] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[axis]), rel=1e-5)


@quick
@given(seed=st.integers(0, 1000))
def test_plane_window_holds_all_that_sampling_touches(seed):
    rng = np.random.default_rng(seed)
    shape, spacing = (30, 40), (2.0, 3.0)
    planes = torch.from_numpy(rng.random((*shape, 1)))
    # Anywhere, also partly or wholly beyond the slide.
    corner = rng.uniform(-40, 140, 2)
    points = corner + rng.uniform(0, rng.uniform(1, 60), (50, 2))
    r0, r1, c0, c1 = plane_window(points, spacing, shape)
    assert 0 <= r0 < r1 <= shape[0]
    assert 0 <= c0 < c1 <= shape[1]
    at = torch.from_numpy(points / np.array(spacing) - 0.5)
    part = bilinear(planes[r0:r1, c0:c1], (r0, c0), at).numpy()
    np.testing.assert_allclose(part, bilinear(planes, (0, 0), at).numpy(), atol=1e-9)
