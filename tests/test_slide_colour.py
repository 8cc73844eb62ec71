"""Colours by the embedded profile: what comes out, that windows still agree, and what is said where there is none."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from deepfere.errors import InputError
from deepfere.inspect import describe
from deepfere.readers.slide import Reading, open_slide, read_area
from deepfere.readers.slide_colour import SrgbSlide, profile_text
from deepfere.tiling.groups import TileReader, group_tiles
from deepfere.tiling.tiles import TileSpec, plan_tiles

from .realdata import real_data
from .test_reader_slide import block_mean
from .test_reader_tiff import picture, write_jpeg_tiff

GAMMA = 1.8
# Primaries of an invented scanner as XYZ under D50, columns R, G, B; they add up to its white.
WHITE_XYZ = np.array([0.9642, 1.0, 0.8249])
SHARES = np.array([[0.50, 0.35, 0.15], [0.25, 0.65, 0.10], [0.02, 0.12, 0.86]])
PRIMARIES = SHARES / SHARES.sum(1, keepdims=True) * WHITE_XYZ[:, None]
# sRGB to XYZ under D50 (ICC's adapted primaries).
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def profile(space=b"RGB "):
    """A matrix and gamma profile, version 2.4, byte by byte (ICC.1:2001-04)."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(fixed(v) for v in values)

    name = b"invented scanner\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(4 + 4 + 2 + 1 + 67)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + bytes(2)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(WHITE_XYZ)}
    tags |= {n: xyz(PRIMARIES[:, k]) for k, n in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", tag, at + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"scnr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(24) + struct.pack(">I", 1) + b"".join(fixed(v) for v in WHITE_XYZ)
    return head + bytes(128 - len(head)) + table + body


def expected(image):
    """The definition, in float64: gamma, primaries, sRGB's primaries, its curve, cut off."""
    linear = (image / 255.0) ** GAMMA
    rgb = np.clip(linear @ PRIMARIES.T @ np.linalg.inv(SRGB).T, 0, 1)
    curve = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return 255 * curve


def tagged(path, image, icc, jpeg=False):
    tag = [(34675, "B", len(icc), icc, True)] if icc else []
    how = {"compression": "jpeg", "compressionargs": {"level": 95}} if jpeg else {"compression": "deflate"}
    tifffile.imwrite(
        path,
        image,
        photometric="rgb",
        tile=(64, 64),
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
        metadata=None,
        extratags=tag,
        **how,
    )
    return path


@pytest.fixture(scope="module")
def image():
    return picture(253, 301)


def test_colours_are_those_of_the_definition(tmp_path, image):
    icc = profile()
    assert profile_text(icc).startswith("invented scanner (sha256 ")
    Image.fromarray(image).save(tmp_path / "p.png", icc_profile=icc)
    for path, backend in [
        (tagged(tmp_path / "d.tif", image, icc), "openslide"),
        (tagged(tmp_path / "d.tif", image, icc), "flat"),
        (tagged(tmp_path / "j.tif", image, icc, jpeg=True), "tiff"),
        (tmp_path / "p.png", "auto"),
    ]:
        stored = open_slide(path, 0.5, backend)
        slide = open_slide(path, 0.5, backend, "srgb")
        assert stored.profile == slide.profile == icc and (stored.icc, slide.icc) == ("none", "srgb")
        assert slide.backend == stored.backend and slide.levels == stored.levels
        raw, got = stored.read(0, 0, 0, 253, 301), slide.read(0, 0, 0, 253, 301)
        assert np.abs(got - expected(raw)).max() <= 2 and np.abs(got.astype(int) - raw).mean() > 5
        np.testing.assert_array_equal(stored.read(0, 0, 0, 253, 301), raw)  # what is kept is not converted


def test_windows_agree_and_outside_stays_background(tmp_path, image):
    slide = open_slide(tagged(tmp_path / "j.tif", image, profile(), jpeg=True), icc="srgb")
    whole = slide.read(0, 0, 0, 253, 301)
    rng = np.random.default_rng(0)
    for _ in range(20):
        r, c = rng.integers(0, 200), rng.integers(0, 240)
        h, w = rng.integers(1, 50), rng.integers(1, 60)
        np.testing.assert_array_equal(slide.read(0, r, c, h, w), whole[r : r + h, c : c + w])
    out = slide.read(0, -10, 290, 30, 30)
    assert (out[:10] == 255).all() and (out[:, 11:] == 255).all()
    np.testing.assert_array_equal(out[10:, :11], whole[:20, 290:])
    again = pickle.loads(pickle.dumps(slide))
    assert isinstance(again, SrgbSlide)
    np.testing.assert_array_equal(again.read(0, 5, 6, 70, 80), whole[5:75, 6:86])
    # Resampled, in two halves and as one.
    one = read_area(slide, (3.0, 4.0), (60, 80), 0.83)[0]
    low = read_area(slide, (3.0 + 31 * 0.83, 4.0), (29, 80), 0.83)[0]
    np.testing.assert_array_equal(one[31:], low)


def test_tiles_are_the_whole(tmp_path, image):
    path = write_jpeg_tiff(tmp_path / "s.tif", image)
    with tifffile.TiffFile(path, mode="r+") as file:
        assert file.pages[0].tags.get(34675) is None
    path = tagged(tmp_path / "t.tif", image, profile(), jpeg=True)
    slide = open_slide(path, icc="srgb")
    whole = slide.read(0, 0, 0, 253, 301)
    for mpp, want in ((0.5, whole), (1.0, block_mean(whole, 2))):
        plan = plan_tiles(slide, TileSpec(40, mpp, stride_px=32))
        assert plan.reading.icc == "srgb" and plan.reading.profile == profile_text(profile())
        reader = TileReader(plan)
        for group in group_tiles(plan):
            tiles, errors = reader.read(group)
            assert not any(errors)
            for tile, number in zip(tiles, group.tiles, strict=True):
                r, c = plan.corner_px[number]
                part = want[r : r + 40, c : c + 40]
                np.testing.assert_array_equal(tile[: part.shape[0], : part.shape[1]], part)


def test_no_profile_changes_nothing(tmp_path, image):
    slide = open_slide(tagged(tmp_path / "n.tif", image, b""), icc="srgb")
    assert slide.icc == "none" and slide.profile is None
    np.testing.assert_array_equal(slide.read(0, 0, 0, 253, 301), image)
    assert Reading.of(slide, (0.5, 0.5)).profile is None


def test_profiles_that_cannot_be_used(tmp_path, image):
    for icc, words in ((profile(b"GRAY"), "GRAY colours"), (b"nonsense" * 30, "cannot be used")):
        path = tagged(tmp_path / "b.tif", image, icc)
        with pytest.raises(InputError, match=words) as caught:
            open_slide(path, icc="srgb")
        assert "slide.icc=none" in str(caught.value) and "\n" not in str(caught.value)
        assert open_slide(path).read(0, 0, 0, 10, 10).shape == (10, 10, 3)
        describe(path)


def test_info_names_the_profile(tmp_path, image):
    said = describe(tagged(tmp_path / "j.tif", image, profile(), jpeg=True))
    assert said.fact("colour profile") == profile_text(profile())
    assert describe(tagged(tmp_path / "n.tif", image, b"")).fact("colour profile") == "none"


@pytest.mark.ray
def test_the_pipeline_uses_and_records_it(phantom, ray_session, tmp_path, cli):
    """Colours of what is cached are converted; the slide without a profile is used as it is, with a warning."""
    stored = open_slide(phantom.slide)
    image = stored.read(0, 0, 0, *stored.shape_px)
    slides = {name: tmp_path / f"{name}.tif" for name in ("with", "without")}
    tags = {"with": [(34675, "B", len(profile()), profile(), True)], "without": []}
    for name, path in slides.items():
        how = {"photometric": "rgb", "tile": (256, 256), "metadata": None, "extratags": tags[name]}
        resolution = [1e4 / m for m in stored.mpp_um[::-1]]
        tifffile.imwrite(path, image, resolution=resolution, resolutionunit="CENTIMETER", **how)
    sections = [
        {"name": n, "msi": phantom.imzml, "slide": s, "alignment": phantom.truth / "alignment.json"}
        for n, s in slides.items()
    ]
    study, work = tmp_path / "study.yaml", tmp_path / "work"
    study.write_text(json.dumps({"sections": sections}, default=str))
    done = cli("tile", study, "-o", work, "--factor", "4", "tracking.uri=none", "slide.icc=srgb")
    assert done.code == 0, done
    facts = {n: json.loads((work / "done" / f"tile-{n}.json").read_text()) for n in slides}
    assert facts["with"]["slide"]["icc"] == "srgb" and "warnings" not in facts["with"]
    assert facts["with"]["slide"]["profile"] == profile_text(profile())
    assert facts["without"]["slide"]["icc"] == "none"
    assert facts["without"]["warnings"] == ["slide.icc=srgb: the slide carries no profile; its colours are as stored"]
    import zarr

    wanted = {"with": open_slide(slides["with"], icc="srgb").read(0, 0, 0, *stored.shape_px), "without": image}
    for name, pixels in wanted.items():
        planes = zarr.open_group(work / "sections" / name / "planes.zarr")["planes"][:]
        means = block_mean(pixels, 3)
        h, w = means.shape[:2]
        read = planes[6, :h, :w] == 255
        assert read.mean() > 0.5
        assert np.abs(planes[:3, :h, :w].transpose(1, 2, 0).astype(int) - means)[read].max() <= 1


@pytest.mark.real
def test_a_real_profile():
    path = real_data("wsi", "boxes_0.dcm")
    stored, slide = open_slide(path), open_slide(path, icc="srgb")
    assert slide.icc == "srgb" and len(stored.profile) == 456
    assert slide.read(0, 0, 0, *slide.shape_px).shape == (*slide.shape_px, 3)
