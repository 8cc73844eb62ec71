"""`deepfere info`: what it says of good, broken and foreign things."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deepfere import inspect
from deepfere.errors import InputError
from deepfere.frame import Alignment, Displacement
from deepfere.inspect import describe, render
from deepfere.measured.store import FORMAT
from deepfere.measured.writer import write_measured
from deepfere.reconstruction.result import FORMAT_VERSION as RESULT_VERSION
from deepfere.store import create_array, open_group
from tests.imzml_bytes import simple_spectra, write_pair
from tests.realdata import real_data

MZ = np.array([100.0, 200.0, 300.0])


def facts(found):
    return dict(found.facts)


def text(found):
    return render(found)


def test_whole_imzml(tmp_path):
    found = describe(write_pair(tmp_path / "a.imzML", simple_spectra(4, 3), mode="continuous"))
    assert found.whole is True and not found.problems
    said = facts(found)
    assert said["mode"] == "continuous" and said["representation"] == "centroid"
    assert said["pitch"] == "20 x 10 um"
    assert said["m/z"] == "100.0000 to 300.0000 (one axis for all spectra)"
    assert said["spectra"] == "12" and said["measured"] == "12 pixels"
    assert said["grid"].startswith("4 x 3 pixels") and "0.08 x 0.03 mm" in said["grid"]
    assert said["region 1"] == "12 pixels, y 0 to 80 um, x 0 to 30 um"


def test_regions_with_their_boxes_and_strays_summed(tmp_path):
    spectra = [(x + 5, y + 7, list(MZ), [1.0, 2.0, 3.0]) for y in range(8) for x in range(8)]
    spectra += [(x + 20, y + 9, list(MZ), [1.0, 2.0, 3.0]) for y in range(6) for x in range(4)]
    spectra += [(30, 30, list(MZ), [1.0, 2.0, 3.0]), (34, 30, list(MZ), [0.0, 2.0, 3.0])]
    said = facts(describe(write_pair(tmp_path / "a.imzML", spectra)))
    assert said["regions"] == "2"
    # The origin of the section frame is the smallest coordinate; the pitch is 20 um in y and 10 um in x.
    assert said["region 1"] == "64 pixels, y 0 to 160 um, x 0 to 80 um"
    assert said["region 2"] == "24 pixels, y 40 to 160 um, x 150 to 190 um"
    assert said["specks"] == "2 pixels in no region"
    assert said["origin"].startswith("x 5, y 7")


def test_pitch_that_is_not_stated(tmp_path):
    found = describe(write_pair(tmp_path / "a.imzML", simple_spectra(), settings=""))
    assert found.whole is True
    assert facts(found)["pitch"].endswith("give --pitch-um")
    assert "rows 0 to 2, columns 0 to 3" in facts(found)["region 1"]


def test_truncated_and_missing_ibd_are_described_as_not_whole(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(4, 3))
    ibd = path.with_suffix(".ibd")
    ibd.write_bytes(ibd.read_bytes()[:-50])
    found = describe(path)
    assert found.whole is False and "truncated" in found.problems[0]
    assert facts(found)["cut off"] == "2 of 12 spectra end beyond the .ibd"
    assert facts(found)["region 1"].startswith("12 pixels") and facts(found)["pitch"] == "20 x 10 um"
    ibd.unlink()
    found = describe(path)
    assert found.whole is False and "missing" in found.problems[0] and "m/z" not in facts(found)


def test_foreign_ibd_checksum_empty_and_repeated_spectra(tmp_path):
    spectra = [*simple_spectra(2, 3), (1, 1, [], [])]
    path = write_pair(tmp_path / "a.imzML", spectra, uuid=bytes(16))
    found = describe(path)
    assert found.whole is False and "identifier" in found.problems[0]
    assert facts(found)["empty spectra"] == "1" and facts(found)["repeated"].startswith("1 pixel ")
    stated = '<cvParam cvRef="IMS" accession="IMS:1000091" name="ibd SHA-1" value="' + "0" * 40 + '"/></fileContent>'
    path = write_pair(tmp_path / "b.imzML", simple_spectra())
    path.write_text(path.read_text().replace("</fileContent>", stated))
    found = describe(path)
    assert facts(found)["checksum"] == "sha1 does not agree" and found.whole is False


def test_broken_xml_and_a_lone_ibd_are_refused(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    with pytest.raises(InputError, match=r"give the \.imzML"):
        describe(path.with_suffix(".ibd"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="not well-formed"):
        describe(path)


def test_real_imzml():
    said = facts(describe(real_data("bladder", "bladder_50um.imzML")))
    assert said["pitch"] == "50 um" and said["checksum"] == "sha1 agrees" and "61 per" in said["values"]
    found = describe(real_data("imzml", "imsmicrolink_no_ibd.imzML"))
    assert found.whole is False and facts(found)["spectra"] == "100"


@pytest.fixture
def slide(tmp_path):
    import tifffile

    path = tmp_path / "slide.tif"
    image = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    with tifffile.TiffWriter(path) as writer:
        options = {"tile": (128, 128), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
        writer.write(image, subifds=0, resolution=(20000, 20000), **options)
        writer.write(image[::2, ::2], subfiletype=1, resolution=(10000, 10000), **options)
    return path


def test_slide(slide):
    found = describe(slide)
    said = facts(found)
    assert found.whole is True and said["pixel size"] == "0.5 um (mpp)" and said["levels"] == "2"
    assert said["size"] == "300 x 200 pixels (height x width), 0.15 x 0.1 mm"
    assert said["level 0"].startswith("300 x 200") and said["level 1"] == "150 x 100 pixels, 2 times smaller"


def test_slide_that_was_cut_off(slide):
    data = slide.read_bytes()
    for keep in (0.99, 0.9):
        slide.write_bytes(data[: int(keep * len(data))])
        try:
            assert describe(slide).whole is False
        except InputError as error:
            assert "is cut off" in str(error) and str(error).endswith("; copy it again")
    slide.write_bytes(data)
    assert describe(slide).whole is True


def test_pages_that_are_missing(tmp_path):
    import tifffile

    path = tmp_path / "a.tif"
    image = np.zeros((64, 64, 3), np.uint8)
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
        end = writer.filehandle.tell()
        writer.write(image[:16, :16], photometric="rgb")
    path.write_bytes(path.read_bytes()[:end])
    found = describe(path)
    assert found.whole is False and "pages or their tags" in found.problems[0]


def test_picture_without_mpp_says_how_to_give_it(tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20), "pink").save(tmp_path / "a.png")
    found = describe(tmp_path / "a.png")
    assert "give --slide-mpp-um" in facts(found)["pixel size"] and facts(found)["format"] == "plain PNG"
    assert facts(found)["size"] == "20 x 30 pixels (height x width)"


def test_real_slides():
    said = facts(describe(real_data("wsi", "CMU-1-Small-Region.svs")))
    assert said["format"] == "aperio" and said["pixel size"] == "0.499 um (mpp)" and "label" in said["further pictures"]
    found = describe(real_data("wsi", "unreadable.svs"))
    assert found.whole is False and "cannot be decoded" in found.problems[0]
    assert facts(describe(real_data("wsi", "boxes_0.dcm")))["format"] == "dicom"
    assert "72-dpi" in facts(describe(real_data("wsi", "boxes.tiff")))["pixel size"]


def store(path, shape=(5, 70), **attrs):
    cube = np.random.default_rng(1).random((3, *shape)).astype(np.float32) + 1
    mask = np.ones(shape, bool)
    mask[:, -2:] = False
    return write_measured(path, cube, mask, MZ, (50.0, 40.0), {"ions": "axis", "mode": "continuous", **attrs})


def test_measured_store_whole_unfinished_and_damaged(tmp_path):
    path = tmp_path / "m.zarr"
    store(path)
    found = describe(path)
    said = facts(found)
    assert found.kind == "ingested measurement" and found.whole is True
    assert said["pitch"] == "50 x 40 um" and said["m/z"] == "3 ions, 100.0000 to 300.0000 (the file's own axis)"
    assert said["region 1"] == "340 pixels, y 0 to 250 um, x 0 to 2720 um"
    (shard,) = [p for p in (path / "ions").rglob("*") if p.is_file() and p.name != "zarr.json"]
    good = shard.read_bytes()
    shard.write_bytes(good[:-30])
    assert describe(path).whole is False and "damaged" in describe(path).problems[0]
    shard.unlink()
    assert "1 of 1 shards are missing" in describe(path).problems[0]
    shard.write_bytes(good)
    assert describe(path).whole is True
    open_group(path, "r+").attrs["complete"] = False
    assert describe(path).whole is False and "unfinished" in describe(path).problems[0]


@pytest.fixture
def result(tmp_path):
    """The smallest store that counts as a result: 2 x 3 pixels, 3 ions, x2."""
    path = tmp_path / "r.zarr"
    group = open_group(path, "w")
    mask = np.ones((2, 3), bool)
    write_measured(path / "measured", np.ones((3, 2, 3)), mask, MZ, 10.0)
    columns = {"loadings": np.ones((3, 1)), "detail_scale": np.ones(1), "positivity": np.zeros(3, np.int64)}
    columns |= {"noise_share": np.zeros(3), "chi_square": np.full(3, np.nan)}
    columns |= {"null_mean_r2": np.zeros(3), "inferred_share": np.zeros(3)}
    columns |= {name: np.full(3, 0.5) for name in ("gate", "held_out_r2", "null_r2")} | {"consistency": MZ * 1e-10}
    basis = group.create_group("basis")
    for name, values in columns.items():
        create_array(basis, name, values.shape, values.dtype, values.shape)[:] = values
    for name, channels, value in (("detail", 1, 0), ("stain", 3, 200)):
        image = group.create_group(name)
        for level, shape in enumerate([(4, 6), (2, 3)]):
            array = create_array(image, str(level), (channels, *shape), "uint8", (channels, 4, 4), (channels, 4, 4))
            array[:] = value
    Alignment(np.diag([1.0, -1.0]), np.array([5.0, 6.0]), evidence={"source": "search"}).save(path / "alignment.json")
    provenance = {
        "identity": "abc",
        "model": {"tier": "T2", "name": "deepfere", "version": "4"},
        "run": {"run_id": "r1", "uri": "https://me:secret@host/"},
        "timings_s": {"learn": 2.5},
        "versions": {"deepfere": "0.1.0"},
        "warnings": ["7 negatives"],
    }
    (path / "provenance.json").write_text(json.dumps(provenance))
    attrs = {"format": "deepfere-result", "format_version": RESULT_VERSION, "factor": 2, "levels": 2, "chunk_px": 4}
    informed = ["smooth", "partly", "smooth"]
    group.attrs.update({**attrs, "normalisation": "none", "informed": informed, "complete": True})
    return path


def test_result(result):
    found = describe(result)
    said = facts(found)
    assert found.kind == "result" and found.whole is True, found.problems
    assert said["factor"] == "2" and said["levels"] == "2" and said["pitch"] == "10 um measured, 5 um reconstructed"
    assert said["informed"] == "0 stain-informed, 1 partly, 2 smooth"
    assert said["consistency"].startswith("3.0e-08")
    assert said["model"] == "tier T2, deepfere version 4" and said["run"].startswith("r1 at https://***@host")
    assert said["alignment, mirrored"].startswith("left to right") and said["alignment, source"] == "search"
    assert said["warning"] == "7 negatives" and "secret" not in text(found)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: (p / "stain/0/c/0/0/1").unlink(), "stain/0: 1 of 2 shards are missing"),
        (lambda p: (p / "stain/1/c/0/0/0").write_bytes(b"torn"), "stain/1: shard 0/0/0 is damaged"),
        (lambda p: (p / "provenance.json").write_text("{"), "provenance.json cannot be read"),
        (lambda p: (p / "alignment.json").unlink(), "alignment.json is missing"),
        (lambda p: (p / "detail/1/zarr.json").unlink(), "detail/1 is missing"),
        (lambda p: (p / "basis/gate/zarr.json").unlink(), "cannot be opened"),
        (lambda p: (p / "measured/zarr.json").unlink(), "not a Zarr v3 group"),
        (lambda p: open_group(p, "r+").attrs.update({"complete": False}), "unfinished"),
    ],
)
def test_result_that_is_not_whole(result, spoil, says):
    spoil(result)
    found = describe(result)
    assert found.whole is False and any(says in problem for problem in found.problems), found.problems


def test_image_pyramid(tmp_path):
    from deepfere.reconstruction.ome import multiscale

    group = open_group(tmp_path / "image.zarr", "w")
    group.attrs["ome"] = multiscale("ion", (5.0, 4.0), 2, ["a"], "an ion")
    create_array(group, "0", (1, 8, 6), "float32", (1, 8, 6))
    found = describe(tmp_path / "image.zarr")
    assert facts(found)["level 0"] == "1 x 8 x 6, pixel 1 x 5 x 4, float32"
    assert found.problems == ("level 1 is missing",)


def test_unfinished_work(tmp_path):
    from deepfere.cluster import Journal
    from deepfere.pipeline.workspace import Workspace

    work = Workspace(tmp_path / "r.zarr.work")
    work.claim("abc", overwrite=False)
    with work.stage("ingest", 1, "left-lobe") as marker:
        assert marker is not None
    with work.stage("learn", 1):
        pass
    journal = Journal(work.section("left-lobe").journal / "reconstruct", "f")
    journal.record({"0/0/0": {}})
    journal.record({"0/0/1": {}, "0/0/2": {}})
    found = describe(work.root)
    said = facts(found)
    assert found.whole is False and said["identity"] == "abc" and said["sections"] == "1"
    assert said["left-lobe"].startswith("ingest done in ") and "align" not in said["left-lobe"]
    assert "reconstruct begun, 3 pieces recorded" in said["left-lobe"]
    assert said["all sections"].startswith("learn done in ")
    assert found.kind == "unfinished work of a result"


def test_the_folder_of_a_study_is_finished_with_its_results(tmp_path):
    from deepfere.pipeline.workspace import Workspace

    work = Workspace(tmp_path / "work")
    work.claim("abc", overwrite=False)
    for name in ("a", "b"):
        work.section(name).root.mkdir(parents=True)
        with work.stage("reconstruct", 1, name):
            pass
    for count, name in enumerate(("a", "b"), 1):
        assert describe(work.root).whole is False
        (work.root / "results" / f"{name}.zarr").mkdir(parents=True)
        (work.root / "results" / f"{name}.zarr" / "zarr.json").write_text("{}")
        assert facts(describe(work.root))["results"].endswith(f"results: {count} store{'s' * (count > 1)}")
    found = describe(work.root)
    assert found.whole and not found.problems and found.kind == "folder of a study"


def test_phantom(tmp_path):
    from deepfere.phantom import PhantomSpec, write_phantom

    spec = PhantomSpec(shape_px=(8, 8), factor=2, slide_mpp_um=8.0, ions_per_kind={"class": 2, "smooth": 1})
    phantom = write_phantom(tmp_path / "p", spec)
    found = describe(tmp_path / "p")
    assert found.whole is True and facts(found)["informed"].startswith("2 of 3") and facts(found)["pitch"] == "50 um"
    assert describe(phantom.imzml).whole is True and describe(phantom.slide).whole is True
    phantom.slide.unlink()
    assert describe(tmp_path / "p").problems == ("slide.tiff is missing",)


def test_alignment_in_words(tmp_path):
    turn = np.deg2rad(30.0)
    # Section x (right) goes to (sin, cos) in (y, x): y points down, so this is clockwise.
    matrix = 2.0 * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    bend = Displacement((0.0, 0.0), (100.0, 100.0), np.full((4, 5, 2), 3.0))
    Alignment(matrix, np.array([1.5, -2.0]), bend, {"source": "given", "scale": 9}).save(tmp_path / "a.json")
    found = describe(tmp_path / "a.json")
    assert found.whole is None
    assert found.facts == (
        ("mirrored", "no"),
        ("turned", "30.00 degrees clockwise, as displayed"),
        ("scale", "2"),
        ("offset", "y 1.5 um, x -2 um"),
        ("bend", "4 x 5 knots every 100 um, coefficients up to 4.243 um"),
        ("evidence, source", "given"),
    )


def test_landmarks_study_and_settings(tmp_path):
    rows = "section_y_um,section_x_um,slide_y_um,slide_x_um\n0,0,10,10\n0,100,10,110\n100,0,110,10\n"
    (tmp_path / "marks.csv").write_text(rows)
    assert facts(describe(tmp_path / "marks.csv"))["offset"] == "y 10 um, x 10 um"
    write_pair(tmp_path / "a.imzML", simple_spectra())
    (tmp_path / "study.yaml").write_text("sections:\n- {name: s1, msi: a.imzML}\n- {name: s2, msi: b.imzML}\n")
    found = describe(tmp_path / "study.yaml")
    assert found.kind == "study of 2 sections" and found.whole is False
    assert len(found.problems) == 1 and "section s2" in found.problems[0]
    (tmp_path / "study.csv").write_text("name,msi,pitch_um\ns1,a.imzML,50\n")
    found = describe(tmp_path / "study.csv")
    assert found.whole is True and "pitch 50 um" in facts(found)["s1"]
    (tmp_path / "config.yaml").write_text("factor: 8\ntrain: {steps: 5}\n")
    found = describe(tmp_path / "config.yaml")
    assert found.kind == "settings" and facts(found)["train"] == '{"steps": 5}'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "hello", "nothing that deepfere knows"),
        ("a.json", '{"a": 1}', "not an alignment"),
        ("a.yaml", "colour: red", "neither a study nor settings"),
        ("a.yaml", "{", "YAML"),
        ("a.csv", "x,y\n1,2\n", "name"),
        ("a.tif", "II", "cannot"),
        ("empty.bin", "", "nothing that deepfere knows"),
    ],
)
def test_unknown_files_are_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        describe(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_unknown_folders_and_stores_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        describe(tmp_path / "nowhere")
    (tmp_path / "a.imzML").touch()
    with pytest.raises(InputError, match=r"give one of those in it: a\.imzML"):
        describe(tmp_path)
    open_group(tmp_path / "odd.zarr", "w")
    with pytest.raises(InputError, match="no kind that deepfere knows"):
        describe(tmp_path / "odd.zarr")


def test_store_of_another_version(tmp_path):
    open_group(tmp_path / "m.zarr", "w").attrs.update({"format": FORMAT, "format_version": 99})
    found = describe(tmp_path / "m.zarr")
    assert found.whole is False and "version 99" in found.problems[0]


def test_render_of_a_description():
    found = inspect.Description("a", "thing", (("x", "1"), ("long name", "2")), False, ("bad",))
    assert render(found).splitlines() == [
        "a: thing",
        "  whole      no",
        "  problem    bad",
        "  x          1",
        "  long name  2",
    ]
    assert render(inspect.Description("a", "thing", (), None)) == "a: thing"
