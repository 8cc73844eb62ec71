"""Frames and alignments: geometry that every other module relies on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfere.errors import InputError
from deepfere.frame import Alignment, Displacement, SectionGrid, cubic_basis

quick = settings(max_examples=30, deadline=None)
EXTENT = np.array([1500.0, 2300.0])


@st.composite
def matrices(draw):
    """A flip or not, any rotation, scales from 0.5 to 2, some shear."""
    angle = draw(st.floats(0, 2 * np.pi))
    flip = draw(st.sampled_from([1.0, -1.0]))
    sy, sx = draw(st.floats(0.5, 2.0)), draw(st.floats(0.5, 2.0))
    shear = draw(st.floats(-0.3, 0.3))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ np.array([[sy, shear], [0.0, sx * flip]])


@st.composite
def alignments(draw, bent=True):
    """A random affine and, sometimes, a displacement gentle enough to be invertible."""
    matrix = draw(matrices())
    offset = np.array([draw(st.floats(-1e5, 1e5)), draw(st.floats(-1e5, 1e5))])
    displacement = None
    if bent and draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**31)))
        knots = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
        spacing = EXTENT / np.array(knots)
        limit = 0.05 * spacing.min() * np.linalg.svd(matrix, compute_uv=False)[-1]
        coefficients = rng.uniform(-limit, limit, (knots[0] + 2, knots[1] + 2, 2))
        displacement = Displacement((-spacing[0], -spacing[1]), (spacing[0], spacing[1]), coefficients)
    return Alignment(matrix, offset, displacement)


def some_points(seed=0, n=50):
    return np.random.default_rng(seed).uniform(-0.2, 1.2, (n, 2)) * EXTENT


def test_centres_are_half_a_pitch_from_the_corner():
    grid = SectionGrid((3, 4), (10.0, 20.0))
    assert grid.extent_um == (30.0, 80.0)
    assert grid.centres_um().shape == (3, 4, 2)
    np.testing.assert_array_equal(grid.centres_um()[2, 1], [25.0, 30.0])
    np.testing.assert_array_equal(grid.centres_um((-1, 2), (1, 1))[0, 0], [-5.0, 50.0])


@quick
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pitch=st.tuples(st.floats(1, 200), st.floats(1, 200)),
    factor=st.integers(1, 16),
)
def test_refined_pixels_average_to_their_measured_pixel(shape, pitch, factor):
    grid = SectionGrid(shape, pitch)
    fine = grid.refine(factor)
    assert fine.extent_um == pytest.approx(grid.extent_um, rel=1e-12)
    means = fine.centres_um().reshape(shape[0], factor, shape[1], factor, 2).mean((1, 3))
    np.testing.assert_allclose(means, grid.centres_um(), rtol=1e-12)
    # HR pixel (a, b) has its centre at ((a + 1/2) p / f, (b + 1/2) p / f).
    np.testing.assert_allclose(
        fine.centres_um()[-1, 0], [(shape[0] * factor - 0.5) * pitch[0] / factor, 0.5 * pitch[1] / factor], rtol=1e-12
    )


@quick
@given(alignment=alignments(), seed=st.integers(0, 1000))
def test_unmap_inverts_map(alignment, seed):
    points = some_points(seed)
    np.testing.assert_allclose(alignment.unmap(alignment.map(points)), points, atol=1e-5)
    slide = alignment.map(points)
    np.testing.assert_allclose(alignment.map(alignment.unmap(slide)), slide, atol=1e-5)


@quick
@given(alignment=alignments())
def test_map_takes_any_leading_shape(alignment):
    points = some_points(n=24)
    whole = alignment.map(points)
    np.testing.assert_array_equal(alignment.map(points.reshape(4, 6, 2)).reshape(-1, 2), whole)
    np.testing.assert_allclose(np.stack([alignment.map(p) for p in points]), whole, rtol=1e-13, atol=1e-8)


def test_map_orders_y_before_x():
    alignment = Alignment(np.array([[0.0, 2.0], [-1.0, 0.0]]), np.array([5.0, 7.0]))
    np.testing.assert_array_equal(alignment.map([[10.0, 20.0]]), [[45.0, -3.0]])


@quick
@given(alignment=alignments())
def test_json_holds_every_bit(alignment, tmp_path_factory):
    path = tmp_path_factory.mktemp("alignment") / "a.json"
    alignment.with_evidence(source="here", pairs=3).save(path)
    again = Alignment.load(path)
    np.testing.assert_array_equal(again.matrix, alignment.matrix)
    np.testing.assert_array_equal(again.offset_um, alignment.offset_um)
    assert again.evidence == {"source": "here", "pairs": 3}
    points = some_points()
    np.testing.assert_array_equal(again.map(points), alignment.map(points))


def write_landmarks(path, section, slide):
    lines = ["section_y_um,section_x_um,slide_y_um,slide_x_um"]
    lines += [",".join(repr(float(v)) for v in (*a, *b)) for a, b in zip(section, slide, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


@quick
@given(alignment=alignments(bent=False), count=st.integers(3, 12))
def test_landmarks_recover_an_affine(alignment, count, tmp_path_factory):
    section = np.concatenate([[[0, 0], [EXTENT[0], 10], [30, EXTENT[1]]], some_points(count)[: count - 3]])
    path = write_landmarks(tmp_path_factory.mktemp("marks") / "m.csv", section, alignment.map(section))
    found = Alignment.from_landmarks(path)
    np.testing.assert_allclose(found.matrix, alignment.matrix, atol=1e-9)
    np.testing.assert_allclose(found.map(some_points(9)), alignment.map(some_points(9)), atol=1e-6)
    assert found.evidence["pairs"] == count
    assert found.evidence["residual_um"] < 1e-6


def test_landmarks_report_their_residual(tmp_path):
    section = np.array([[0.0, 0], [0, 100], [100, 0], [100, 100]])
    # A saddle cannot be fitted by an affine: every pair is left 10 um away.
    slide = section + np.array([[10.0, 0], [-10, 0], [-10, 0], [10, 0]])
    found = Alignment.from_landmarks(write_landmarks(tmp_path / "m.csv", section, slide))
    assert found.evidence["residual_um"] == pytest.approx(10.0)
    np.testing.assert_allclose(found.matrix, np.eye(2), atol=1e-12)


def test_landmarks_from_a_spreadsheet_with_a_byte_order_mark(tmp_path):
    path = write_landmarks(tmp_path / "m.csv", [[0, 0], [0, 9], [9, 0]], [[1, 1], [1, 10], [10, 1]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_allclose(Alignment.from_landmarks(path).offset_um, [1, 1], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "KeyError"),
        ("section_y_um,section_x_um,slide_y_um,slide_x_um\n" + "0,5,1,2,3\n" * 3, "more fields"),
        ("section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,0,0\n0,1,0,1\n", "2 landmarks"),
        ("section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,0,0\n1,1,1,1\n2,2,2,2\n", "on one line"),
        ("section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,0,0\n1,1,1,1\n2,2,2,2.0001\n3,3,3,3\n", "on one line"),
        ("section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,0,0\n1,x,1,1\n2,2,2,2\n", "ValueError"),
        ("section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,0,0\n1,nan,1,1\n2,0,2,2\n", "finite"),
        ("section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,0\n1,2,1,1\n2,0,2,2\n", "TypeError"),
    ],
)
def test_bad_landmarks_are_refused(tmp_path, text, message):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        Alignment.from_landmarks(path)
    assert str(path) in str(caught.value)


GOOD = {"matrix": [[1, 0], [0, 1]], "offset_um": [0, 0]}
SPLINE = {"origin_um": [0, 0], "spacing_um": [1, 1], "coefficients_um": [[[0, 0]]]}


@pytest.mark.parametrize(
    "values",
    [
        {},
        [],
        {"matrix": [[1, 0], [0, 1]]},
        {**GOOD, "matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]},
        {**GOOD, "matrix": [[1, 2], [2, 4]]},
        {**GOOD, "offset_um": [0, float("nan")]},
        {**GOOD, "offset_um": ["a", 0]},
        {**GOOD, "displacement": {"origin_um": [0, 0]}},
        {**GOOD, "displacement": {**SPLINE, "spacing_um": [0, 1]}},
        {**GOOD, "displacement": {**SPLINE, "origin_um": [float("inf"), 1]}},
        {**GOOD, "displacement": {**SPLINE, "coefficients_um": [[[0, float("nan")]]]}},
        {**GOOD, "displacement": {**SPLINE, "coefficients_um": [0, 1]}},
    ],
)
def test_bad_alignments_are_refused(tmp_path, values):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        Alignment.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_minimal_alignment_and_unreadable_files(tmp_path):
    np.testing.assert_array_equal(Alignment.from_dict(GOOD).map([[3.0, 4.0]]), [[3.0, 4.0]])
    with pytest.raises(InputError, match="cannot be read as an alignment"):
        Alignment.load(tmp_path / "absent.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as an alignment"):
        Alignment.load(tmp_path / "b.json")


@quick
@given(u=st.floats(0, 1))
def test_cubic_basis_is_a_partition_of_unity(u):
    w = cubic_basis(np.array(u))
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1.0, abs=1e-14)
    # First moment: the spline through linear coefficients is the same line.
    assert w @ np.array([-1.0, 0, 1, 2]) == pytest.approx(u, abs=1e-14)


def test_displacement_reproduces_lines_and_vanishes_outside():
    origin, spacing = np.array([-10.0, 5.0]), np.array([7.0, 4.0])
    knots = origin + spacing * np.stack(np.meshgrid(np.arange(8), np.arange(9), indexing="ij"), -1)
    slope = np.array([[0.3, -0.1], [0.05, 0.2]])
    spline = Displacement(tuple(origin), tuple(spacing), knots @ slope.T + 1.0)
    inner = np.random.default_rng(0).uniform(origin + spacing, origin + spacing * np.array([6, 7]), (40, 2))
    np.testing.assert_allclose(spline.at(inner), inner @ slope.T + 1.0, atol=1e-12)
    far = np.array([[2.0, 2], [-2.001, 3], [3, -2.001], [9.001, 4], [3, 10.001]]) * spacing + origin
    values = spline.at(far)
    assert np.abs(values[0]).max() > 0.1
    np.testing.assert_array_equal(values[1:], 0.0)


def test_displacement_is_smooth_across_knots():
    rng = np.random.default_rng(1)
    spline = Displacement((0.0, 0.0), (10.0, 10.0), rng.standard_normal((5, 5, 2)))
    step = 1e-4
    at = lambda y: spline.at(np.array([[y, 17.0]]))[0]  # noqa: E731
    for knot in (-20.0, -10.0, 0.0, 10.0, 30.0, 60.0):
        left = (at(knot) - at(knot - step)) / step
        right = (at(knot + step) - at(knot)) / step
        np.testing.assert_allclose(left, right, atol=1e-5)


@quick
@given(matrix=matrices())
def test_max_stretch_bounds_every_small_step(matrix):
    rng = np.random.default_rng(0)
    spacing = (EXTENT[0] / 3, EXTENT[1] / 3)
    bent = Displacement((-spacing[0], -spacing[1]), spacing, rng.uniform(-40, 40, (6, 6, 2)))
    alignment = Alignment(matrix, np.zeros(2), bent)
    assert Alignment(matrix, np.zeros(2)).max_stretch(tuple(EXTENT)) == pytest.approx(np.linalg.norm(matrix, 2))
    points = rng.uniform(0, 1, (400, 2)) * EXTENT
    angle = rng.uniform(0, 2 * np.pi, 400)
    step = 0.5 * np.stack([np.sin(angle), np.cos(angle)], -1)
    stretch = np.linalg.norm(alignment.map(points + step) - alignment.map(points - step), axis=1)
    assert stretch.max() <= 1.02 * alignment.max_stretch(tuple(EXTENT))
