"""Teaching points: a measured area on the picture that it was drawn on, or a refusal that says why."""

from __future__ import annotations

import numpy as np
import pytest

from deepfere.errors import InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.inspect import describe
from deepfere.pipeline.fuse import with_teaching_points
from deepfere.places import located
from deepfere.readers.mis import read_mis, teaching_points_beside
from deepfere.section import make_section

MPP = 4.0
GRID = SectionGrid((20, 30), (50.0, 50.0))
CORNER_PX = (400.0, 150.0)
SIZE_PX = (GRID.extent_um[1] / MPP, GRID.extent_um[0] / MPP)


def turned(degrees, flip_y=True, mpp=MPP):
    """Stage micrometres per picture pixel: the stage counts upwards, and the picture may be a little turned."""
    a = np.deg2rad(degrees)
    return (
        mpp * np.array([[1, 0], [0, -1 if flip_y else 1]]) @ np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    )


def area(name, corner=CORNER_PX, size=SIZE_PX, raster="50,50"):
    x, y = corner
    points = f"<Point>{x},{y}</Point><Point>{x + size[0]},{y + size[1]}</Point>"
    return f'<Area Type="0" Name="{name}"><Raster>{raster}</Raster>{points}</Area>'


def write(folder, matrix=None, areas=None, image="IMG_0001.png", points=((0, 0), (900, 10), (30, 700))):
    matrix = turned(0) if matrix is None else matrix
    areas = [area("tissue")] if areas is None else areas
    teach = []
    for point in points:
        stage = matrix @ np.array(point, float) + (-20_000, 15_000)
        teach.append(f"<TeachPoint>{point[0]},{point[1]};{stage[0]:.3f},{stage[1]:.3f}</TeachPoint>")
    path = folder / "sample.mis"
    path.write_text(
        f"<ImagingSequence><ImageFile>C:\\data\\{image}</ImageFile>{''.join(teach)}{''.join(areas)}</ImagingSequence>"
    )
    return path


def test_an_upright_picture_places_the_grid_on_its_area(tmp_path):
    found = read_mis(write(tmp_path)).alignment(GRID, "img_0001.PNG", (MPP, MPP))
    # Whichever way the stage counts, the first row and column are the picture's upper left.
    np.testing.assert_allclose(found.matrix, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(found.offset_um, (CORNER_PX[1] * MPP, CORNER_PX[0] * MPP), atol=1e-6)
    assert found.evidence["source"] == "teaching points"
    assert found.evidence["area"] == "tissue"


@pytest.mark.parametrize("flip_y", [True, False])
def test_a_turned_picture_turns_the_section(tmp_path, flip_y):
    matrix = turned(3, flip_y)
    # The outline of a grid along the stage's axes, drawn on the turned picture.
    half = np.array(GRID.extent_um[::-1]) / 2
    stage = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    outline = stage @ np.linalg.inv(matrix).T + (600, 400)
    drawn = "".join(f"<Point>{x:.4f},{y:.4f}</Point>" for x, y in outline)
    areas = [f'<Area Type="3" Name="a"><Raster>50,50</Raster>{drawn}</Area>']
    found = read_mis(write(tmp_path, matrix, areas)).alignment(GRID, "IMG_0001.png", (MPP, MPP))
    middle = found.map(np.array([[GRID.extent_um[0] / 2, GRID.extent_um[1] / 2]]))[0]
    np.testing.assert_allclose(middle, np.array([400, 600]) * MPP, atol=1e-3)
    # Right along the stage is up or down the picture by the angle it was turned.
    step = found.matrix @ np.array([0.0, 1.0])
    assert np.rad2deg(np.arctan2(step[0], step[1])) == pytest.approx(-3, abs=0.01)
    assert np.linalg.det(found.matrix) == pytest.approx(1, abs=1e-6)


def test_the_area_of_the_grids_size_is_taken(tmp_path):
    other = area("agar", (10, 10), (60, 50))
    points = read_mis(write(tmp_path, areas=[other, area("tissue")]))
    assert points.alignment(GRID, "IMG_0001.png", (MPP, MPP)).evidence["area"] == "tissue"
    # Two that fit: nobody can tell.
    double = read_mis(write(tmp_path, areas=[area("one"), area("two", (10, 10))]))
    with pytest.raises(InputError, match="more than one of its areas"):
        double.alignment(GRID, "IMG_0001.png", (MPP, MPP))


def test_areas_of_one_file_are_taken_together(tmp_path):
    half = (SIZE_PX[0] / 2 - 20, SIZE_PX[1])
    left, right = area("a", CORNER_PX, half), area("b", (CORNER_PX[0] + SIZE_PX[0] - half[0], CORNER_PX[1]), half)
    found = read_mis(write(tmp_path, areas=[left, right])).alignment(GRID, "IMG_0001.png", (MPP, MPP))
    assert found.evidence["area"] == "all areas"
    np.testing.assert_allclose(found.offset_um, (CORNER_PX[1] * MPP, CORNER_PX[0] * MPP), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"slide": "HE.svs"}, "for IMG_0001.png"),
        ({"mpp_um": (0.5, 0.5)}, "um per pixel"),
        ({"grid": SectionGrid((40, 30), (50.0, 50.0))}, "none of its areas"),
        ({"grid": SectionGrid((40, 60), (25.0, 25.0))}, "none of its areas"),
    ],
)
def test_another_picture_size_or_grid_is_refused(tmp_path, given, said):
    told = {"grid": GRID, "slide": "IMG_0001.png", "mpp_um": (MPP, MPP), **given}
    with pytest.raises(InputError, match=said) as caught:
        read_mis(write(tmp_path)).alignment(**told)
    assert "CSV" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"points": ((0, 0), (10, 10))}, "2 teaching points"),
        ({"points": ((0, 0), (10, 10), (20, 20))}, "one line"),
        ({"areas": ()}, "0 areas"),
        ({"image": ""}, "no picture"),
        ({"matrix": turned(40)}, "turned against the stage"),
    ],
)
def test_what_cannot_place_is_refused_when_read(tmp_path, changed, said):
    with pytest.raises(InputError, match=said):
        read_mis(write(tmp_path, **changed))


@pytest.mark.parametrize("text", ["", "not xml", "<a><TeachPoint>1;2</TeachPoint></a>", "<a><TeachPoint/></a>"])
def test_other_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "x.mis"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_mis(path)
    assert "\n" not in str(caught.value)


def test_they_are_used_where_they_lie_beside_the_measurement(tmp_path):
    path = write(tmp_path)
    msi, slide = tmp_path / "sample.imzML", tmp_path / "IMG_0001.png"
    assert teaching_points_beside(msi, slide) == path
    assert teaching_points_beside(msi, tmp_path / "other.png") is None
    assert teaching_points_beside(tmp_path / "another.imzML", slide) is None
    section = make_section(name="s", msi=str(msi), slide=str(slide))
    assert with_teaching_points(section).landmarks == str(path)
    upper = path.rename(path.with_suffix(".MIS"))
    assert teaching_points_beside(msi, slide) == upper
    upper.rename(path)
    # A link's own name is what counts, wherever it leads.
    stored = tmp_path / "store"
    stored.mkdir()
    (stored / "0123abc").write_bytes(b"")
    msi.symlink_to(stored / "0123abc")
    assert located(msi) == str(msi)
    assert teaching_points_beside(located(msi), slide) == path
    msi.unlink()
    # What the user gave wins.
    given = make_section(name="s", msi=str(msi), slide=str(slide), landmarks="mine.csv")
    assert with_teaching_points(given).landmarks == "mine.csv"
    path.write_text("broken")
    assert with_teaching_points(section).landmarks is None


def test_info_shows_what_was_measured_where(tmp_path):
    said = dict(describe(write(tmp_path)).facts)
    assert said["picture"] == "IMG_0001.png, 4 um per pixel"
    assert "1500" in said["area, tissue"] and "1000" in said["area, tissue"]


def test_the_affine_is_that_of_landmarks(tmp_path):
    found = read_mis(write(tmp_path)).alignment(GRID, "IMG_0001.png", (MPP, MPP))
    corners = np.array([[0, 0], [GRID.extent_um[0], 0], [0, GRID.extent_um[1]]])
    table = np.column_stack([corners, found.map(corners)])
    np.testing.assert_allclose(Alignment.through(table, "here").matrix, found.matrix, atol=1e-9)
