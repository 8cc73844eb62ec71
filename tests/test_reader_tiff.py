"""The direct reader of tiled JPEG TIFFs against OpenSlide and against files that are damaged."""

import functools
import http.server
import pickle
import threading

import imagecodecs
import numpy as np
import pytest
import tifffile

from deepfere.errors import InputError
from deepfere.readers.jpeg import jpeg_damage, pixel_memory
from deepfere.readers.ranges import LocalRanges, coalesced, is_url
from deepfere.readers.slide import open_slide, read_area

from .realdata import real_data

KINDS = ["rgb", "444", "422", "420"]


def picture(h, w, seed=3):
    """Smooth shapes with noise: chroma differs from pixel to pixel, as in a stain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    base = np.stack([np.sin(y / 9 + x / 31), np.cos(x / 7 - y / 40), np.sin((x + y) / 13)], -1)
    return (127 + 90 * base + rng.normal(0, 12, (h, w, 3))).clip(0, 255).astype(np.uint8)


def tiles_of(image, tile, kind):
    """Compressed tiles of an image, row by row, edges filled up."""
    h, w = image.shape[:2]
    full = np.pad(image, ((0, -h % tile), (0, -w % tile), (0, 0)), mode="edge")
    for r in range(0, h, tile):
        for c in range(0, w, tile):
            piece = np.ascontiguousarray(full[r : r + tile, c : c + tile])
            how = {"outcolorspace": "rgb"} if kind == "rgb" else {"subsampling": kind}
            yield imagecodecs.jpeg8_encode(piece, level=80, colorspace="rgb", **how)


def write_jpeg_tiff(
    path, image, kind="420", factors=(1, 2, 4), tile=64, mpp=0.5, description=None, empty=(), profile=None
):
    """A pyramid of JPEG tiles; ``empty`` are numbers of level-0 tiles that are left out."""
    with tifffile.TiffWriter(path) as tif:
        for f in factors:
            level = np.ascontiguousarray(image[::f, ::f])
            data = list(tiles_of(level, tile, kind))
            for n in empty if f == 1 else ():
                data[n] = b""
            tif.write(
                iter(data),
                shape=level.shape,
                dtype=np.uint8,
                photometric="rgb",
                tile=(tile, tile),
                compression="jpeg",
                compressionargs={"outcolorspace": "rgb"} if kind == "rgb" else None,
                subsampling={"444": (1, 1), "422": (2, 1), "420": (2, 2)}.get(kind),
                subfiletype=0 if f == 1 else 1,
                resolution=(1e4 / (mpp * f), 1e4 / (mpp * f)),
                resolutionunit="CENTIMETER",
                description=description if f == 1 else None,
                extratags=[(34675, "B", len(profile), profile, True)] if profile and f == 1 else [],
                metadata=None,
            )
    return path


def same_everywhere(one, other):
    assert one.levels == other.levels and one.mpp_um == pytest.approx(other.mpp_um, rel=1e-6)
    assert (one.background == other.background).all()
    for k, level in enumerate(one.levels):
        h, w = level.shape_px
        for window in [(0, 0, h, w), (h // 3, w // 4, h // 2, w // 2), (-5, -7, 20, 30), (h - 9, w - 3, 20, 20)]:
            np.testing.assert_array_equal(one.read(k, *window), other.read(k, *window))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_openslide_to_the_pixel(tmp_path, kind):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(384, 512), kind)
    tiff, openslide = open_slide(path, backend="tiff"), open_slide(path, backend="openslide")
    assert (tiff.backend, openslide.backend, open_slide(path).backend) == ("tiff", "openslide", "tiff")
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].photometric.name == ("RGB" if kind == "rgb" else "YCBCR")
    same_everywhere(tiff, openslide)
    got, coverage = read_area(tiff, (3.3, 4.1), (90, 80), 0.83)
    want, want_coverage = read_area(openslide, (3.3, 4.1), (90, 80), 0.83)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(coverage, want_coverage)


def test_edge_tiles_and_levels_that_are_no_whole_fraction(tmp_path):
    """OpenSlide places such levels approximately; the plain reader is exact, and the direct one equal to it."""
    from deepfere.readers.slide_flat import open_flat

    path = write_jpeg_tiff(tmp_path / "s.tif", picture(253, 301))
    slide = open_slide(path)
    assert slide.backend == "tiff"
    same_everywhere(slide, open_flat(path, None))


def test_sparse_tiles_are_background(tmp_path):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(256, 256), empty=(0, 5))
    slide = open_slide(path)
    assert slide.backend == "tiff" and (slide.read(0, 0, 0, 64, 64) == 255).all()
    same_everywhere(slide, open_slide(path, backend="openslide"))


def test_aperio_description(tmp_path):
    text = "Aperio Image Library v1\n512x384 [0,0 512x384] (64x64) JPEG/RGB Q=80|AppMag = 20|MPP = 0.4990"
    path = write_jpeg_tiff(tmp_path / "s.svs", picture(384, 512), description=text)
    tiff, openslide = open_slide(path, backend="tiff"), open_slide(path, backend="openslide")
    assert tiff.mpp_um == openslide.mpp_um == (0.499, 0.499)
    same_everywhere(tiff, openslide)


def test_pickled_and_read_by_threads(tmp_path):
    image = picture(512, 512)
    slide = pickle.loads(pickle.dumps(open_slide(write_jpeg_tiff(tmp_path / "s.tif", image), 0.3)))
    assert slide.backend == "tiff" and slide.mpp_um == (0.3, 0.3)
    want = slide.read(0, 0, 0, 512, 512)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            r, c = rng.integers(0, 450, 2)
            if not np.array_equal(slide.read(0, r, c, 60, 61), want[r : r + 60, c : c + 61]):
                wrong.append((r, c))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_neighbours_do_not_decode_again_and_memory_is_bounded(tmp_path, monkeypatch):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(512, 512), factors=(1,))
    slide = open_slide(path, backend="tiff")
    for r in range(0, 512, 96):
        for c in range(0, 512, 96):
            slide.read(0, r, c, 96, 96)
    assert slide.decoded == 64  # misaligned windows, each native tile once
    slide.read(0, 0, 0, 512, 512)  # every native tile whole: none is wanted again
    assert not slide._kept and slide._kept.bytes == 0
    slide._kept.most_bytes = 3 * 64 * 64 * 3
    slide.read(0, 10, 10, 400, 400)
    assert slide._kept.bytes <= 3 * 64 * 64 * 3 and slide._kept.bytes == len(slide._kept) * 64 * 64 * 3


def damage(path, tile, how, level=0):
    with tifffile.TiffFile(path) as file:
        page = file.pages[level]
        at, count = page.dataoffsets[tile], page.databytecounts[tile]
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    middle = at + count // 2
    if how == "head":
        data[at : at + 40] = bytes(40)
    elif how == "tail":
        data[middle : at + count] = bytes(at + count - middle)
    elif how == "random":
        data[middle : at + count - 2] = rng.integers(0, 256, at + count - 2 - middle, dtype=np.uint8).tobytes()
    elif how == "all":
        data[at : at + count] = rng.integers(0, 256, count, dtype=np.uint8).tobytes()
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["head", "tail", "random", "all"])
@pytest.mark.parametrize("kind", ["rgb", "420"])
def test_corrupt_tile_is_named_and_nothing_else_lost(tmp_path, how, kind):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(256, 320), kind)
    want = open_slide(path).read(0, 0, 0, 256, 320)
    damage(path, 7, how)  # five tiles a row: row 1, column 2
    slide = open_slide(path)
    assert slide.backend == "tiff"
    with pytest.raises(InputError, match=r"level 0 cannot be decoded at row 64, column 128.*tile 1, 2") as caught:
        slide.read(0, 30, 100, 60, 60)
    assert str(path) in str(caught.value) and "copy or scan" in str(caught.value)
    for window in [(0, 0, 64, 320), (64, 0, 64, 128), (64, 192, 64, 128), (128, 0, 128, 320)]:
        r, c, h, w = window
        np.testing.assert_array_equal(slide.read(0, *window), want[r : r + h, c : c + w])


def test_truncated_slide_names_the_first_tile_that_is_missing(tmp_path):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(256, 256), factors=(1,))
    with tifffile.TiffFile(path) as file:
        last = file.pages[0].dataoffsets[13]
    want = open_slide(path).read(0, 0, 0, 192, 256)
    path.write_bytes(path.read_bytes()[: last + 20])
    slide = open_slide(path, backend="tiff")
    np.testing.assert_array_equal(slide.read(0, 0, 0, 192, 256), want)
    with pytest.raises(InputError, match=r"tile 3, 1 .*the file ends before it"):
        slide.read(0, 192, 0, 64, 256)


def test_pixel_memory_lies_beside_what_is_streamed():
    for h, w in [(256, 256), (240, 240), (5, 7)] * 4:
        memory = pixel_memory(h, w)
        assert memory.shape == (h, w, 3) and memory.flags.c_contiguous and memory.ctypes.data % 32 == 16


def test_jpeg_damage_passes_what_is_whole():
    image = picture(96, 96)
    for how in ({}, {"optimize": True}, {"subsampling": "444"}):
        data = imagecodecs.jpeg8_encode(image, level=90, **how)
        assert jpeg_damage(data) is None and jpeg_damage(data + b"\0\0") is None
    assert "cut off" in jpeg_damage(data[:-200]) and jpeg_damage(b"") is None


@pytest.mark.parametrize(
    ("write", "why"),
    [
        ({"compression": "deflate"}, "not JPEG"),
        ({"compression": "jpeg", "extratags": [(274, "H", 1, 6, True)]}, "upright"),
    ],
)
def test_what_is_left_to_other_readers(tmp_path, write, why):
    path = tmp_path / "s.tif"
    tags = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "metadata": None}
    tifffile.imwrite(path, picture(128, 128), photometric="rgb", tile=(64, 64), **tags, **write)
    assert open_slide(path).backend != "tiff"
    with pytest.raises(InputError, match=why):
        open_slide(path, backend="tiff")


def test_a_file_whose_pixels_differ_is_left_to_openslide(tmp_path, monkeypatch):
    """The check on the very file must be able to fail."""
    import deepfere.readers.slide_tiff_levels as module

    path = write_jpeg_tiff(tmp_path / "s.tif", picture(128, 128))
    monkeypatch.setitem(module.COLOURS, 6, "rgb")
    assert open_slide(path).backend == "openslide"


class RangeServer(http.server.BaseHTTPRequestHandler):
    """Serves one file by byte ranges, and counts."""

    def __init__(self, data, asked, *args):
        self.data, self.asked = data, asked
        super().__init__(*args)

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        data, wanted = self.data, self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last) if last else len(data) - 1, len(data) - 1)
            part = data[int(first) : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.asked.append(len(part))
            self.wfile.write(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(path):
        asked = []
        handler = functools.partial(RangeServer, path.read_bytes(), asked)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/{path.name}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_remote_slide_by_coalesced_ranges(tmp_path, serve):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(1024, 1024))
    url, asked = serve(path)
    slide, local = open_slide(url), open_slide(path)
    assert slide.backend == "tiff" and slide.mpp_um == pytest.approx((0.5, 0.5), rel=1e-6)
    before = len(asked)
    np.testing.assert_array_equal(slide.read(0, 100, 100, 600, 600), local.read(0, 100, 100, 600, 600))
    assert slide.decoded == 100 and len(asked) - before <= 2  # ten rows of ten tiles
    again = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(again.read(2, 0, 0, 99, 99), local.read(2, 0, 0, 99, 99))


def test_remote_slide_that_is_not_there(tmp_path, serve):
    url, _ = serve(write_jpeg_tiff(tmp_path / "s.tif", picture(64, 64), factors=(1,)))
    port = url.split(":")[2].split("/")[0]
    with pytest.raises(InputError, match="cannot be read") as caught:
        open_slide(f"http://127.0.0.1:{int(port)}1/none.tif" if int(port) < 6000 else "http://127.0.0.1:9/none.tif")
    assert "http://127.0.0.1" in str(caught.value)


def test_ranges(tmp_path):
    assert is_url("s3://a/b.svs") and is_url("http://x/y") and not is_url("/a/b.svs") and not is_url("C:/a.svs")
    kib = 1 << 10
    assert coalesced([0, 100, 80 * kib], [50, 200, 90 * kib]) == [(0, 200), (80 * kib, 90 * kib)]
    assert coalesced([100, 0], [200, 100]) == [(0, 200)]
    mib = 1 << 20
    assert len(coalesced([k * mib for k in range(20)], [(k + 1) * mib for k in range(20)])) == 3
    (tmp_path / "f").write_bytes(bytes(range(100)))
    ranges = LocalRanges(tmp_path / "f")
    assert ranges.fetch([0, 98], [3, 9]) == [bytes([0, 1, 2]), bytes([98, 99])] and ranges.size == 100


@pytest.mark.real
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "small.svs"])
def test_real_aperio_slides(name):
    path = real_data("wsi", name)
    assert open_slide(path).backend == "tiff"
    same_everywhere(open_slide(path, backend="tiff"), open_slide(path, backend="openslide"))
