import pickle
import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from deepfere.errors import InputError
from deepfere.readers.digest import content_digest
from deepfere.readers.ranges import LocalRanges
from deepfere.readers.slide import (
    Level,
    Reading,
    adequate_level,
    on_background,
    open_slide,
    read_area,
    whole_downsample,
)

from .realdata import real_data
from .test_reader_tiff import write_jpeg_tiff

RNG = np.random.default_rng(7)


class ArraySlide:
    """A slide held in memory, for exact arithmetic."""

    path, backend, icc, profile = "memory", "flat", "none", None

    def __init__(self, image, mpp_um=(0.5, 0.5), factors=(1,), background=(255, 255, 255)):
        self.images = [block_mean(image, f) for f in factors]
        self.shape_px, self.mpp_um = image.shape[:2], mpp_um
        self.background = np.array(background, np.uint8)
        self.levels = tuple(Level(i.shape[:2], (float(f), float(f))) for i, f in zip(self.images, factors, strict=True))
        self.reads = []

    def read(self, level, row, col, height, width):
        h, w = self.images[level].shape[:2]
        assert row >= 0 and col >= 0 and row + height <= h and col + width <= w
        self.reads.append(level)
        return self.images[level][row : row + height, col : col + width]

    def close(self):
        pass


def block_mean(image, f):
    h, w = image.shape[0] // f * f, image.shape[1] // f * f
    blocks = image[:h, :w].reshape(h // f, f, w // f, f, 3).astype(np.float64)
    return np.floor(blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def reference(image, mpp, origin, shape, wanted, background=255.0):
    """Area average by brute force: overlaps of every output pixel with every source pixel, float64."""

    def overlaps(n_out, n_in, start, step, size):
        edges = start + step * np.arange(n_out + 1)
        pixel = np.arange(n_in + 1) * size
        low = np.maximum(edges[:-1, None], pixel[None, :-1])
        return np.clip(np.minimum(edges[1:, None], pixel[None, 1:]) - low, 0, None) / step

    wy = overlaps(shape[0], image.shape[0], origin[0], wanted[0], mpp[0])
    wx = overlaps(shape[1], image.shape[1], origin[1], wanted[1], mpp[1])
    inside = np.einsum("ij,jkc,lk->ilc", wy, image.astype(np.float64), wx)
    coverage = np.outer(wy.sum(1), wx.sum(1))
    return inside + (1 - coverage[..., None]) * background, coverage


def noise(h, w):
    return RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize("wanted", [(0.5, 0.5), (1.0, 1.0), (0.65, 0.65), (1.3, 2.7), (0.2, 0.35), (0.5, 4.0)])
@pytest.mark.parametrize("origin", [(0.0, 0.0), (7.3, 11.9), (-3.2, -1.0), (40.0, 38.0)])
def test_area_average_is_exact(wanted, origin):
    image = noise(97, 83)
    got, coverage = read_area(ArraySlide(image), origin, (23, 19), wanted)
    want, want_coverage = reference(image, (0.5, 0.5), origin, (23, 19), wanted)
    assert np.abs(got - want).max() <= 0.502
    np.testing.assert_allclose(coverage, want_coverage, atol=2e-6)
    assert got.dtype == np.uint8 and coverage.dtype == np.float32


def test_anisotropic_source():
    image = noise(60, 50)
    slide = ArraySlide(image, mpp_um=(2.78, 2.88))
    got, _ = read_area(slide, (5.0, 9.0), (12, 14), 7.0)
    want, _ = reference(image, (2.78, 2.88), (5.0, 9.0), (12, 14), (7.0, 7.0))
    assert np.abs(got - want).max() <= 0.502


@pytest.mark.parametrize("factor", [2, 3, 4, 6, 16])
def test_whole_ratio_is_the_block_mean(factor):
    image = noise(96, 96)
    got, coverage = read_area(ArraySlide(image), (0, 0), (96 // factor,) * 2, 0.5 * factor)
    np.testing.assert_array_equal(got, block_mean(image, factor))
    assert (coverage == 1).all()
    same, _ = read_area(ArraySlide(image), (4.0, 8.0), (20, 30), 0.5)
    np.testing.assert_array_equal(same, image[8:28, 16:46])


@pytest.mark.parametrize("wanted", [0.5, 0.61, 1.0, 1.37, 3.3, 0.3])
def test_windows_agree_with_the_whole(wanted):
    slide = ArraySlide(noise(300, 280), factors=(1, 2, 4))
    origin = (-2.1, 3.3)
    whole, cover = read_area(slide, origin, (120, 110), wanted)
    for top, left, h, w in [(0, 0, 37, 41), (37, 0, 50, 41), (11, 63, 109, 47), (119, 109, 1, 1), (5, 5, 3, 100)]:
        at = (origin[0] + top * wanted, origin[1] + left * wanted)
        part, part_cover = read_area(slide, at, (h, w), wanted)
        np.testing.assert_array_equal(part, whole[top : top + h, left : left + w])
        np.testing.assert_array_equal(part_cover, cover[top : top + h, left : left + w])


def test_level_is_never_coarser_than_wanted():
    slide = ArraySlide(noise(64, 64), factors=(1, 2, 4, 8))
    wanted = [0.1, 0.5, 0.99, 1.0, 1.99, 2.0, 4.0, 50.0]
    assert [adequate_level(slide, (w, w)) for w in wanted] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert adequate_level(slide, (4.0, 1.0)) == 1
    # 0.499 um x 4 is not exactly 1.996 in binary
    odd = ArraySlide(noise(64, 64), mpp_um=(0.499, 0.499), factors=(1, 4))
    assert adequate_level(odd, (1.996, 1.996)) == 1


def test_truncated_level_reaches_the_end_of_level_0():
    image = np.full((50, 50, 3), 100, np.uint8)  # level 1 of 12 x 12 covers 48 of 50 pixels
    got, coverage = read_area(ArraySlide(image, factors=(1, 4)), (0, 0), (26, 26), 2.0)
    assert (got[:12, :12] == 100).all() and (coverage[:12, :12] == 1).all()
    assert coverage[12, 0] == 0.5 and got[12, 0, 0] == 178  # half slide, half white
    assert (coverage[13:] == 0).all() and (got[13:] == 255).all()


def test_outside_is_background_without_reading():
    slide = ArraySlide(noise(20, 20), background=(1, 2, 3))
    for origin in [(100, 0), (0, -50), (-9, -9)]:
        got, coverage = read_area(slide, origin, (4, 5), 0.5)
        assert (got == [1, 2, 3]).all() and (coverage == 0).all()
    assert slide.reads == []


def test_speed_of_area_average():
    image = noise(1500, 1500)
    slide = ArraySlide(image)
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        read_area(slide, (0, 0), (400, 400), 0.5 * 3.7)
        best = min(best, time.perf_counter() - start)
    assert 1480**2 / best > 10e6  # aim 40 Mpx/s; far below even on a busy machine something is broken


def test_whole_downsample():
    assert [whole_downsample(250, n) for n in (250, 125, 63, 62, 31, 32)] == [1, 2, 4, 4, 8, 8]
    assert whole_downsample(1000, 300) == pytest.approx(10 / 3)
    assert whole_downsample(32914, 8228) == 4


def write_pyramid(path, image, factors=(1, 2, 4), mpp=0.5, **kw):
    kw = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate", **kw}
    with tifffile.TiffWriter(path) as tif:
        for f in factors:
            level = image if f == 1 else block_mean(image, f)
            tif.write(
                level,
                resolution=(1e4 / (mpp * f), 1e4 / (mpp * f)),
                resolutionunit="CENTIMETER",
                subfiletype=0 if f == 1 else 1,
                metadata=None,
                **kw,
            )
    return path


@pytest.mark.parametrize(("shape", "backend"), [((256, 320), "openslide"), ((250, 301), "flat")])
def test_pyramidal_tiff(tmp_path, shape, backend):
    image = noise(*shape)
    slide = open_slide(write_pyramid(tmp_path / "p.tif", image))
    # OpenSlide places levels of a size that is no whole fraction approximately: those are read directly.
    assert slide.backend == backend
    assert slide.shape_px == shape and slide.mpp_um == pytest.approx((0.5, 0.5), rel=1e-6)
    assert [level.downsample for level in slide.levels] == [(1, 1), (2, 2), (4, 4)]
    for k, f in enumerate((1, 2, 4)):
        want = image if f == 1 else block_mean(image, f)
        h, w = want.shape[:2]
        np.testing.assert_array_equal(slide.read(k, 0, 0, h, w), want)
        np.testing.assert_array_equal(slide.read(k, 13, 7, 40, 50), want[13:53, 7:57])
        over = slide.read(k, h - 5, -3, 9, 10)
        np.testing.assert_array_equal(over[:5, 3:], want[h - 5 :, :7])
        assert (over[5:] == 255).all() and (over[:, :3] == 255).all()
    again = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(again.read(0, 5, 5, 9, 9), image[5:14, 5:14])
    again.close()
    slide.close()


def test_openslide_levels_that_are_no_whole_fraction_stay_consistent(tmp_path):
    import openslide

    from deepfere.readers.slide_openslide import OpenSlideSlide

    y, x = np.mgrid[:1003, :1501]
    image = np.stack([x % 251, y % 251, (x + y) // 11 % 251], -1).astype(np.uint8)
    path = write_pyramid(tmp_path / "p.tif", image)
    slide = OpenSlideSlide(path, openslide.OpenSlide(str(path)), (0.5, 0.5))
    assert not slide._exact[2] and slide.levels[2].downsample == (4, 4)
    want = block_mean(image, 4).astype(int)
    whole = slide.read(2, 0, 0, 250, 375)
    smooth = np.abs(np.diff(want, axis=1)).max(2)[:, 1:] < 9  # away from the sawtooth's jumps
    assert np.abs(whole[:, 1:-1].astype(int) - want[:, 1:-1]).max(2)[smooth].max() <= 3
    np.testing.assert_array_equal(slide.read(2, 100, 133, 77, 99), whole[100:177, 133:232])


def test_openslide_keeps_more_than_its_own_cache_holds(tmp_path):
    """48 MiB of decoded tiles, where its default is 32: read again after the file was overwritten."""
    path = write_jpeg_tiff(tmp_path / "s.tif", np.tile(noise(256, 256), (12, 16, 1)), factors=(1,), tile=256)
    with tifffile.TiffFile(path) as file:
        stored = list(zip(file.pages[0].dataoffsets, file.pages[0].databytecounts, strict=True))
    slide = open_slide(path, backend="openslide")
    want = slide.read(0, 0, 0, 3072, 4096)
    with path.open("r+b") as handle:
        for start, count in stored:
            handle.seek(start)
            handle.write(bytes(count))
    np.testing.assert_array_equal(slide.read(0, 0, 0, 3072, 4096), want)
    with pytest.raises(InputError, match="cannot be decoded"):
        open_slide(path, 0.5, backend="openslide").read(0, 0, 0, 256, 256)


def test_given_mpp_wins_and_is_checked(tmp_path):
    path = write_pyramid(tmp_path / "p.tif", noise(64, 64), factors=(1,))
    assert open_slide(path, 0.3).mpp_um == (0.3, 0.3)
    assert open_slide(path, (0.3, 400.0)).mpp_um == (0.3, 400.0)
    for bad in (0, -1.0, float("nan"), (0.5, float("inf"))):
        with pytest.raises(InputError, match="not a pixel size"):
            open_slide(path, bad)


@pytest.mark.parametrize(
    ("mpp", "why"),
    [
        (25400 / 72, "352.78 um, is only the 72-dpi default"),
        (1e4 / 28.34, "72-dpi default"),
        (25400 / 96, "264.58 um, is only the 96-dpi default"),
        (25400 / 100, "100-dpi default"),
        (25400 / 150, "150-dpi default"),
        (25400 / 200, "200-dpi default"),
        (25400 / 300, "84.67 um, is only the 300-dpi default"),
        (1e4 / 118, "300-dpi default"),  # written as whole dots per centimetre
        (25400 / 600, "42.33 um, is only the 600-dpi default"),
        (1000.0, "not plausible"),
        (0.01, "not plausible"),
        (None, "does not say how large"),
    ],
)
@pytest.mark.parametrize("tiled", [True, False])  # tiled: OpenSlide's, striped: read directly
def test_mpp_that_is_not_believed(tmp_path, mpp, why, tiled):
    path = tmp_path / "p.tif"
    kw = {"tile": (64, 64)} if tiled else {"rowsperstrip": 16}
    if mpp is not None:
        kw |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, noise(64, 64), photometric="rgb", metadata=None, **kw)
    with pytest.raises(InputError, match=why) as caught:
        open_slide(path)
    assert "give --slide-mpp-um" in str(caught.value) and str(path) in str(caught.value)
    assert open_slide(path, 0.5).mpp_um == (0.5, 0.5)


@pytest.mark.parametrize("mpp", [0.2498, 0.499, 2.88, 42.0, 85.0])
def test_mpp_near_no_print_resolution_is_believed(tmp_path, mpp):
    path = tmp_path / "p.tif"
    resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, noise(64, 64), photometric="rgb", metadata=None, rowsperstrip=16, **resolution)
    assert open_slide(path).mpp_um == pytest.approx((mpp, mpp), rel=1e-6)


def shown(stored, orientation):
    """What TIFF 6.0 says of tag 274, written out case by case."""
    t = stored.transpose(1, 0, 2)
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: t,
        6: t[:, ::-1],
        7: t[::-1, ::-1],
        8: t[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    image = noise(90, 140)
    tiff, png = tmp_path / "o.tif", tmp_path / "o.png"
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(
        tiff, image, photometric="rgb", tile=(32, 48), compression="deflate", metadata=None, extratags=tags,
        resolution=(1e4 / 0.4, 1e4 / 0.6), resolutionunit="CENTIMETER",
    )  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(image).save(png, exif=exif)
    want = shown(image, orientation)
    for slide in (open_slide(tiff), open_slide(png, 1.0)):
        assert slide.shape_px == want.shape[:2]
        h, w = want.shape[:2]
        np.testing.assert_array_equal(slide.read(0, 0, 0, h, w), want)
        np.testing.assert_array_equal(slide.read(0, 20, 30, 33, 44), want[20:53, 30:74])
    upright = open_slide(tiff).mpp_um
    assert upright == pytest.approx((0.6, 0.4) if orientation < 5 else (0.4, 0.6), rel=1e-5)


def test_png_jpeg_grey_palette_alpha(tmp_path):
    image = noise(40, 50)
    for name, picture, want in [
        ("rgb.png", Image.fromarray(image), image),
        ("grey.png", Image.fromarray(image[..., 0]), np.repeat(image[..., :1], 3, 2)),
        ("clear.png", Image.fromarray(np.dstack([image, np.zeros((40, 50), np.uint8)])), image * 0 + 255),
        ("palette.png", Image.fromarray(image).quantize(16), None),
        ("photo.jpg", Image.fromarray(image), None),
    ]:
        path = tmp_path / name
        picture.save(path)
        with pytest.raises(InputError, match="give --slide-mpp-um"):
            open_slide(path)
        got = open_slide(path, 0.5).read(0, 0, 0, 40, 50)
        expected = want if want is not None else np.asarray(Image.open(path).convert("RGB"))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("kind", "want"),
    [("minisblack", lambda g: g), ("miniswhite", lambda g: 255 - g)],
)
def test_grey_tiff(tmp_path, kind, want):
    grey = noise(70, 70)[..., 0]
    path = tmp_path / "g.tif"
    tifffile.imwrite(path, grey, photometric=kind, rowsperstrip=16, metadata=None)
    got = open_slide(path, 1.0).read(0, 0, 0, 70, 70)
    np.testing.assert_array_equal(got, np.repeat(want(grey)[..., None], 3, 2))


@pytest.mark.parametrize(("kind", "samples"), [("rgb", 3), ("minisblack", 1), ("miniswhite", 1)])
def test_one_strip_is_read_in_parts(tmp_path, monkeypatch, kind, samples):
    image = noise(70, 90) if samples == 3 else noise(70, 90)[..., 0]
    path = tmp_path / "one.tif"
    tifffile.imwrite(path, image, photometric=kind, rowsperstrip=70, metadata=None)
    whole = open_slide(path, 1.0).read(0, 0, 0, 70, 90)
    monkeypatch.setattr("deepfere.readers.slide_segments.STRIP_BYTES", 1000)
    asked, fetch = [], LocalRanges.fetch
    monkeypatch.setattr(LocalRanges, "fetch", lambda ranges, at, sizes: asked.extend(sizes) or fetch(ranges, at, sizes))
    slide = open_slide(path, 1.0)
    np.testing.assert_array_equal(slide.read(0, 0, 0, 70, 90), whole)
    np.testing.assert_array_equal(slide.read(0, 33, 5, 31, 60), whole[33:64, 5:65])
    assert max(asked) <= 1000 and sum(asked) == image.nbytes
    # Packed it cannot be cut.
    tifffile.imwrite(path, image, photometric=kind, rowsperstrip=70, compression="deflate", metadata=None)
    np.testing.assert_array_equal(open_slide(path, 1.0).read(0, 0, 0, 70, 90), whole)


def test_the_fourth_sample_is_what_the_file_says(tmp_path):
    image, path = noise(40, 50), tmp_path / "four.tif"
    alpha = np.full((40, 50, 1), 128, np.uint8)
    half = (image.astype(int) * 128 + 127) // 255
    want = {"unassalpha": (image * 128.0 + 255 * 127) / 255, "assocalpha": half + 127.0, "unspecified": image}
    for kind, expected in want.items():
        shown = half.astype(np.uint8) if kind == "assocalpha" else image
        rgba = np.concatenate([shown, alpha], 2)
        tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=[kind], rowsperstrip=16, metadata=None)
        got = open_slide(path, 1.0).read(0, 0, 0, 40, 50)
        assert np.abs(got - expected).max() <= 1, kind


def test_planar_and_jpeg_tiff(tmp_path):
    image = np.repeat(np.repeat(noise(12, 12), 8, 0), 8, 1)
    planar, jpeg = tmp_path / "planar.tif", tmp_path / "jpeg.tif"
    tifffile.imwrite(
        planar, image.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", rowsperstrip=32, metadata=None
    )
    slide = open_slide(planar, 1.0)
    np.testing.assert_array_equal(slide.read(0, 10, 20, 30, 40), image[10:40, 20:60])
    tags = [(274, "H", 1, 3, True)]
    tifffile.imwrite(jpeg, image, photometric="ycbcr", compression="jpeg", tile=(64, 64), metadata=None, extratags=tags)
    got = open_slide(jpeg, 1.0).read(0, 0, 0, 96, 96)
    assert open_slide(jpeg, 1.0).backend == "flat"
    assert np.abs(got[::-1, ::-1].astype(float) - tifffile.imread(jpeg)).max() <= 2


def test_ome_pixel_size(tmp_path):
    path = tmp_path / "a.ome.tif"
    meta = {
        "axes": "YXS",
        "PhysicalSizeX": 250.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.3,
        "PhysicalSizeYUnit": "µm",
    }
    tifffile.imwrite(path, noise(40, 50), photometric="rgb", metadata=meta)
    assert open_slide(path).mpp_um == pytest.approx((0.3, 0.25))


def test_refused_pictures(tmp_path):
    deep, cmyk, stack, text = (tmp_path / n for n in ("d.tif", "c.jpg", "s.tif", "t.tif"))
    tifffile.imwrite(deep, noise(20, 20).astype(np.uint16), photometric="rgb", metadata=None)
    Image.fromarray(noise(20, 20)).convert("CMYK").save(cmyk)
    tifffile.imwrite(stack, noise(5, 40)[..., 0].reshape(5, 4, 10), photometric="minisblack")
    text.write_text("not a picture")
    for path, why in [
        (deep, "uint16 values"),
        (cmyk, "CMYK"),
        (stack, "not an RGB picture"),
        (text, "not a slide that can be read"),
        (tmp_path / "absent.svs", "does not exist"),
    ]:
        with pytest.raises(InputError, match=why) as caught:
            open_slide(path, 0.5)
        assert "\n" not in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
@pytest.mark.parametrize("backend", ["auto", "openslide"])
def test_tiles_of_more_than_8_bits_are_not_taken_for_8(tmp_path, photometric, backend):
    """OpenSlide shows them, nearly black."""
    picture = noise(100, 90).astype(np.uint16) * 16
    picture = picture if photometric == "rgb" else picture[..., 0]
    tifffile.imwrite(tmp_path / "t.tif", picture, photometric=photometric, tile=(64, 64), metadata=None)
    with pytest.raises(InputError, match="uint16 values, not 8-bit"):
        open_slide(tmp_path / "t.tif", 0.5, backend=backend)


def test_damaged_tile_is_one_clear_line(tmp_path):
    path = tmp_path / "p.tif"
    tifffile.imwrite(path, noise(128, 128), photometric="rgb", rowsperstrip=32, compression="deflate", metadata=None)
    with tifffile.TiffFile(path) as tif:
        at = tif.pages[0].dataoffsets[2]
    data = bytearray(path.read_bytes())
    data[at : at + 40] = bytes(40)
    path.write_bytes(bytes(data))
    slide = open_slide(path, 0.5)
    slide.read(0, 0, 0, 64, 128)
    with pytest.raises(InputError, match="cannot be decoded at row 60, column 1"):
        slide.read(0, 60, 1, 10, 10)


def test_on_background():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    got = on_background(rgba, np.array([250, 250, 250], np.uint8))
    assert got.tolist() == [[[10, 20, 30], [250, 250, 250], [125, 125, 125]]]  # 250 (255 - 128) / 255 = 124.5


def test_digest_of_large_files_sees_ends_size_and_blocks(tmp_path, monkeypatch):
    import deepfere.readers.digest as digest

    monkeypatch.setattr(digest, "MIB", 16)
    monkeypatch.setattr(digest, "WHOLE_BELOW_BYTES", 1000)
    path = tmp_path / "a"
    data = bytearray(RNG.integers(0, 256, 5000, dtype=np.uint8).tobytes())
    seen = set()
    for position in (None, 0, 4999, 2500 // 16 * 16):
        changed = bytearray(data)
        if position is not None:
            changed[position : position + 80] = bytes(len(changed[position : position + 80]))
        path.write_bytes(bytes(changed))
        seen.add(content_digest(path))
    path.write_bytes(bytes(data) + b"x")
    seen.add(content_digest(path))
    assert len(seen) == 5
    path.write_bytes(b"abc")
    assert content_digest(path).startswith("ba7816bf8f01cfea")  # sha256("abc")


# Per file: (h, w), mpp and backend, or why it is refused without an mpp.
REAL = {
    "CMU-1-Small-Region.svs": ((2967, 2220), 0.499, "tiff"),
    "boxes.tiff": "72-dpi default",
    "boxes_0.dcm": ((16, 16), 0.499, "openslide"),
    "boxes_1.dcm": ((16, 16), 0.499, "openslide"),
    "grey10kx5k.tif": "72-dpi default",
    "small.svs": ((16, 16), 0.499, "tiff"),
    "small_HE_levels.tiff": "72-dpi default",
    "small_dicom.dcm": "cannot be opened",
    "small_la.tiff": "not plausible",
    "small_vectra.qptiff": "not an RGB picture",
    "test-mask.tif": ((800, 864), 4.03198, "openslide"),
    "test_orient3.tif": "72-dpi default",
    "test_orient6.tif": "72-dpi default",
    "unopenable.tiff": "cannot be opened",
    "unreadable.svs": ((16, 16), 0.499, "openslide"),
    "yb10kx5k.zstd.tiff": "72-dpi default",
}


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_slides(name):
    path, expected = real_data("wsi", name), REAL[name]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            open_slide(path)
        return
    slide = open_slide(path)
    assert (slide.shape_px, slide.backend) == (expected[0], expected[2])
    assert slide.mpp_um == pytest.approx((expected[1], expected[1]), rel=1e-5)
    if name == "unreadable.svs":
        with pytest.raises(InputError, match="cannot be decoded"):
            slide.read(0, 0, 0, 8, 8)
    else:
        assert slide.read(0, 0, 0, 8, 8).shape == (8, 8, 3)


@pytest.mark.real
def test_real_slide_pixels_and_orientation():
    import openslide

    path = real_data("wsi", "CMU-1-Small-Region.svs")
    want = np.asarray(openslide.OpenSlide(str(path)).read_region((700, 900), 0, (300, 200)))[..., :3]
    slide = open_slide(path)
    np.testing.assert_array_equal(slide.read(0, 900, 700, 200, 300), want)
    got, coverage = read_area(slide, (900 * 0.499, 700 * 0.499), (50, 75), 4 * 0.499)
    np.testing.assert_array_equal(got, block_mean(want, 4))
    assert (coverage == 1).all()
    bladder = open_slide(real_data("bladder", "bladder_stain.tif"))
    assert bladder.mpp_um == pytest.approx((2.78008, 2.87611), rel=1e-5)
    turned = open_slide(real_data("wsi", "test_orient6.tif"), 0.5)  # stored 180 x 120, shown 120 x 180
    assert turned.backend == "flat" and turned.shape_px == (120, 180)


def test_reading_says_what_is_read():
    slide = ArraySlide(noise(64, 64), factors=(1, 4))
    assert Reading.of(slide, (0.8, 0.8)) == Reading("flat", 0, (0.5, 0.5), (0.8, 0.8), (1.6, 1.6))
    assert Reading.of(slide, (2.0, 3.0)) == Reading("flat", 1, (2.0, 2.0), (2.0, 3.0), (1.0, 1.5))
