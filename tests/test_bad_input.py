"""Wrong input ends with one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tifffile

from deepfere.measured.ingest import ingest
from deepfere.readers.slide import open_slide, read_area
from tests.conftest import FACTOR, SETTINGS

from .imzml_bytes import write_pair

pytestmark = pytest.mark.ray

MZ = [700.0, 750.0, 800.0]


@pytest.fixture(scope="module")
def rgb(phantom):
    """The phantom's slide as a picture (h, w, 3)."""
    slide = open_slide(phantom.slide)
    return read_area(slide, (0.0, 0.0), slide.shape_px, slide.mpp_um)[0]


@pytest.fixture
def refused(cli, tmp_path, ray_session):
    """Run ``deepfere fuse``; it must be refused in one line that holds all of ``words``, leaving nothing."""

    def check(*arguments: object, words: tuple[str, ...], out: object = None, factor: int | None = FACTOR) -> str:
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        target = out if out is not None else folder / "result.zarr"
        given = ["--factor", factor] if factor is not None else []
        settings = [*SETTINGS, f"tracking.uri=sqlite:///{tmp_path / 'm.db'}"]
        settings += [a for a in arguments if isinstance(a, str) and "=" in a]
        files = [a for a in arguments if a not in settings]
        done = cli("fuse", *files, "-o", target, *given, *settings)
        assert done.code == 2, done
        assert len(done.errors) == 1 and done.errors[0].startswith("error: "), done.err
        for word in words:
            assert word in done.errors[0], done.errors
        assert done.out == ""
        assert list(folder.iterdir()) == []
        return done.errors[0]

    return check


def copy_msi(phantom, folder):
    for name in ("section.imzML", "section.ibd"):
        shutil.copy(phantom.folder / name, folder / name)
    return folder / "section.imzML"


def raster(path, shape=(12, 12), values=lambda i, j: [1.0, 2.0, 3.0], settings=None):
    """A small imzML with 10 x 20 um pixels whose intensities are ``values(i, j)``."""
    spectra = [(j + 1, i + 1, MZ, values(i, j)) for i in range(shape[0]) for j in range(shape[1])]
    given = {} if settings is None else {"settings": settings}
    return write_pair(path, spectra, mode="continuous", **given) or path


def test_ibd_that_is_missing(refused, phantom, tmp_path):
    shutil.copy(phantom.imzml, tmp_path / "section.imzML")
    refused(tmp_path / "section.imzML", phantom.slide, words=("section", ".ibd"))


def test_ibd_that_is_truncated(refused, phantom, tmp_path):
    msi = copy_msi(phantom, tmp_path)
    ibd = msi.with_suffix(".ibd")
    ibd.write_bytes(ibd.read_bytes()[:-4000])
    refused(msi, phantom.slide, words=("section.ibd",))


def test_imzml_without_a_pixel_size(refused, phantom, tmp_path):
    msi = raster(tmp_path / "bare.imzML", settings="")
    refused(msi, phantom.slide, words=("bare.imzML", "--pitch-um"))


def test_slide_without_a_pixel_size(refused, phantom, rgb, tmp_path):
    tifffile.imwrite(tmp_path / "bare.tif", rgb, photometric="rgb")
    refused(phantom.imzml, tmp_path / "bare.tif", words=("bare.tif", "--slide-mpp-um"))


def test_slide_that_states_72_dpi(refused, phantom, rgb, tmp_path):
    tifffile.imwrite(tmp_path / "dpi.tif", rgb, photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    refused(phantom.imzml, tmp_path / "dpi.tif", words=("dpi.tif", "352.78", "--slide-mpp-um"))


def test_slide_that_covers_half_of_the_tissue(refused, phantom, rgb, tmp_path):
    centre = np.asarray(phantom.spec.grid.extent_um)[None] / 2
    row = int(phantom.alignment().map(centre)[0, 0] / 2.0)
    tifffile.imwrite(tmp_path / "half.tif", rgb[:row], photometric="rgb")
    place = ["--alignment", phantom.truth / "alignment.json", "--slide-mpp-um", "2"]
    refused(phantom.imzml, tmp_path / "half.tif", *place, words=("half.tif", "70 %", "covers"))


def test_foreign_slide(refused, phantom, tmp_path):
    from deepfere.phantom import PhantomSpec, write_phantom

    other = write_phantom(tmp_path / "other", PhantomSpec(seed=11, shape_px=(24, 21), slide_mpp_um=4.0, factor=2))
    refused(phantom.imzml, other.slide, words=("landmarks",))


def test_blank_slide(refused, phantom, rgb, tmp_path):
    noise = np.random.default_rng(0).normal(243, 2, rgb.shape)
    tifffile.imwrite(tmp_path / "blank.tif", noise.astype(np.uint8), photometric="rgb")
    refused(phantom.imzml, tmp_path / "blank.tif", "--slide-mpp-um", "2", words=("blank.tif", "tissue"))


def test_ions_that_are_all_zero(refused, phantom, tmp_path):
    msi = raster(tmp_path / "zero.imzML", values=lambda i, j: [0.0, 0.0, 0.0])
    refused(msi, phantom.slide, words=("zero.imzML", "zero"), factor=2)


def test_intensities_that_are_not_numbers(refused, phantom, tmp_path):
    msi = raster(tmp_path / "nan.imzML", values=lambda i, j: [1.0, float("nan") if i == j == 3 else 2.0, 3.0])
    refused(msi, phantom.slide, words=("nan.ibd", "x 4, y 4", "finite"), factor=2)


def test_intensities_whose_squares_are_not_numbers(refused, phantom, tmp_path):
    msi = raster(tmp_path / "r.imzML", values=lambda i, j: [1.0, 2.0, 3e38 if (i, j) == (3, 4) else 3.0])
    words = ("the spectrum at x 5, y 4 has intensities", "beyond 1e+18")
    refused(msi, phantom.slide, words=words, factor=None)


def test_an_empty_imzml(refused, phantom, tmp_path):
    (tmp_path / "empty.imzML").write_bytes(b"")
    refused(tmp_path / "empty.imzML", phantom.slide, words=("empty.imzML: is empty",))


@pytest.mark.parametrize("name", ["", "/", " "])
def test_an_output_without_a_name(refused, phantom, name):
    refused(phantom.imzml, phantom.slide, words=("is no name for an output",), out=name)


def test_a_page_of_somebody_else_beside_the_output(refused, phantom, tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    words = ("mine.html: is no report of deepfere", "stays as it is")
    refused(phantom.imzml, phantom.slide, words=words, out=tmp_path / "mine.zarr")
    assert (tmp_path / "mine.html").read_text() == "mine" and not (tmp_path / "mine.zarr.work").exists()


def test_an_output_inside_the_input(refused, phantom, tmp_path):
    cube = tmp_path / "cube.zarr"
    ingest(phantom.imzml, cube)
    before = sorted(cube.rglob("*"))
    refused(cube, phantom.slide, words=("lies inside the input", "choose another output"), out=cube / "x.zarr")
    assert sorted(cube.rglob("*")) == before


def test_one_measured_pixel(refused, phantom, tmp_path):
    msi = raster(tmp_path / "one.imzML", shape=(1, 1))
    refused(msi, phantom.slide, words=("one.imzML", "pixel"), factor=2)
    refused(msi, "--no-guide", words=("one.imzML", "pixel"), factor=2)


def test_setting_that_does_not_exist(refused, phantom):
    refused(phantom.imzml, phantom.slide, "train.stepz=3", words=("train.stepz", "steps"))


def test_settings_that_do_not_fit_each_other(refused, phantom):
    refused(phantom.imzml, phantom.slide, "model.depth=4", "train.patch_px=20", words=("train.patch_px", "at least"))


def test_output_below_a_file(refused, phantom, tmp_path):
    (tmp_path / "file").write_text("here")
    refused(phantom.imzml, phantom.slide, out=tmp_path / "file" / "result.zarr", words=("file", "cannot be written"))
    assert (tmp_path / "file").read_text() == "here"


def test_output_that_is_a_file(refused, phantom, tmp_path):
    (tmp_path / "file").write_text("here")
    refused(phantom.imzml, phantom.slide, out=tmp_path / "file", words=("is a file",))
    assert (tmp_path / "file").read_text() == "here"


def test_output_in_proc(refused, phantom):
    refused(phantom.imzml, phantom.slide, out="/proc/deepfere/result.zarr", words=("/proc", "cannot be written"))


@pytest.mark.parametrize(("factor", "word"), [(0, "factor 0"), (1000, "factor 1000"), (-3, "factor -3")])
def test_factor_that_is_absurd(refused, phantom, factor, word):
    refused(phantom.imzml, phantom.slide, factor=factor, words=(word, "2 to 64"))


def test_factor_finer_than_the_slide(refused, phantom):
    refused(phantom.imzml, phantom.slide, factor=32, words=("finer than the slide", "at most 25"))


def test_slide_that_is_missing(refused, phantom, tmp_path):
    refused(phantom.imzml, tmp_path / "gone.svs", words=("gone.svs", "does not exist"))


def test_measurement_that_is_missing(refused, phantom, tmp_path):
    refused(tmp_path / "gone.imzML", phantom.slide, words=("gone.imzML", "check the path"))


def test_slide_that_was_forgotten(refused, phantom):
    refused(phantom.imzml, words=("no slide", "--no-guide"))


def test_two_landmarks(refused, phantom, tmp_path):
    file = tmp_path / "points.csv"
    file.write_text("section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,10,10\n100,50,110,60\n")
    refused(phantom.imzml, phantom.slide, "--landmarks", file, words=("points.csv", "three"))


def test_slide_cut_off_in_the_middle_of_its_bytes(refused, phantom, tmp_path):
    (tmp_path / "cut.tiff").write_bytes(phantom.slide.read_bytes()[:9000])
    refused(phantom.imzml, tmp_path / "cut.tiff", words=("cut.tiff",))


def test_slide_and_measurement_swapped(refused, phantom):
    refused(phantom.slide, phantom.imzml, words=(str(phantom.slide), "no imzML", "then the slide"))


def test_slide_that_is_a_folder(refused, phantom, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    refused(phantom.imzml, folder, words=(str(folder), "is a folder", "file of the slide"))


def test_slide_of_a_few_pixels(refused, phantom, rgb, tmp_path):
    tiny = tmp_path / "tiny.tif"
    middle = [n // 2 for n in rgb.shape[:2]]
    tifffile.imwrite(tiny, rgb[middle[0] : middle[0] + 5, middle[1] : middle[1] + 5], photometric="rgb")
    refused(phantom.imzml, tiny, "--slide-mpp-um", "3", words=("slide",))


def test_measurement_without_any_difference(refused, phantom, tmp_path):
    same = raster(tmp_path / "same.imzML")
    refused(same, phantom.slide, words=(str(same), "differs from pixel to pixel", "--no-guide"))


def test_an_mz_twice_on_the_axis(refused, phantom, tmp_path):
    spectra = [(j + 1, i + 1, [700.0, 700.0, 800.0], [1.0, i, j]) for i in range(12) for j in range(12)]
    path = tmp_path / "twice.imzML"
    write_pair(path, spectra, mode="continuous")
    refused(path, "--no-guide", words=(str(path), "700.0 twice", "--mz"), factor=2)


def test_pitch_that_is_no_number(refused, phantom):
    refused(phantom.imzml, phantom.slide, "--pitch-um", "abc", words=("pitch_um", "'abc'", "50,40"))


def test_landmarks_in_other_units(refused, phantom, tmp_path):
    marks = tmp_path / "marks.csv"
    rows = ["section_y_um,section_x_um,slide_y_um,slide_x_um", "0,0,0,0", "1000,0,10,0", "0,1000,0,10", "900,900,9,9"]
    marks.write_text("\n".join(rows))
    refused(phantom.imzml, phantom.slide, "--landmarks", marks, words=(str(marks), "0.01", "micrometres"))
