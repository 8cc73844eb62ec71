"""OME-Zarr and OME-TIFF slides: pixels, pixel sizes, what is refused, and `info`, on disk and by URL."""

from __future__ import annotations

import functools
import http.server
import json
import pickle
import shutil
import threading

import numpy as np
import pytest
import tifffile
import zarr

from deepfere import remote
from deepfere.errors import InputError
from deepfere.inspect import describe
from deepfere.readers.slide import open_slide, read_area, slide_digest
from deepfere.readers.slide_damaged import ReadAround
from deepfere.readers.slide_zarr import is_zarr
from deepfere.tiling.groups import TileReader, group_tiles
from deepfere.tiling.tiles import TileSpec, TissueMask, plan_tiles

from .test_reader_slide import block_mean
from .test_reader_tiff import picture, same_everywhere

UM = {"type": "space", "unit": "micrometer"}
AXES = [{"name": "c", "type": "channel"}, {"name": "y", **UM}, {"name": "x", **UM}]
RGB = [{"color": c, "label": n} for n, c in {"R": "FF0000", "G": "00FF00", "B": "0000FF"}.items()]


def levels_of(image, factors=(1, 2, 4)):
    return [image if f == 1 else block_mean(image, f) for f in factors]


def write_ome_zarr(
    root, image, version="0.5", factors=(1, 2, 4), chunk=(3, 64, 64), mpp=(0.5, 0.4), axes=AXES, shards=None, **more
):
    """One multiscale image (c, y, x), written as the specification says, by nothing of ours."""
    v2 = version == "0.4"
    group = zarr.open_group(root, mode="w", zarr_format=2 if v2 else 3)
    extra = len(axes) - 3
    datasets = []
    for k, (level, f) in enumerate(zip(levels_of(image, factors), factors, strict=True)):
        values = level.transpose(2, 0, 1)[(None,) * extra]
        array = group.create_array(
            str(k),
            shape=values.shape,
            chunks=(1,) * extra + chunk,
            shards=None if shards is None else (1,) * extra + shards,
            dtype="u1",
            fill_value=0,
            chunk_key_encoding={"name": "v2", "separator": "/"} if v2 else None,
        )
        array[:] = values
        scale = [1.0] * (extra + 1) + [mpp[0] * f, mpp[1] * f]
        datasets.append({"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    ome = {"version": version, "multiscales": [{"axes": axes, "datasets": datasets}], **more}
    if v2:
        ome["multiscales"][0]["version"] = ome.pop("version")
    group.attrs.update(ome if v2 else {"ome": ome})
    return root


def in_layout(root, image, version):
    """The layout of bioformats2raw: images 0 and 1 (a label), and OME/ that says so."""
    v2 = version == "0.4"
    top = zarr.open_group(root, mode="w", zarr_format=2 if v2 else 3)
    layout, series = {"bioformats2raw.layout": 3}, {"series": ["0", "1"]}
    top.attrs.update(layout if v2 else {"ome": {"version": version, **layout}})
    top.create_group("OME").attrs.update(series if v2 else {"ome": {"version": version, **series}})
    write_ome_zarr(root / "0", image, version, omero={"channels": RGB})
    write_ome_zarr(root / "1", image[:40, :30], version, factors=(1,))
    return root


def equal(slide, image, factors=(1, 2, 4)):
    for k, level in enumerate(levels_of(image, factors)):
        h, w = level.shape[:2]
        assert slide.levels[k].shape_px == (h, w)
        for r, c, a, b in [(0, 0, h, w), (h // 3, w // 4, h // 2, w // 2), (h - 9, w - 3, 9, 3), (5, 7, 1, 1)]:
            np.testing.assert_array_equal(slide.read(k, r, c, a, b), level[r : r + a, c : c + b])
    out = slide.read(0, -5, -7, 20, 30)
    assert (out[:5] == 255).all() and (out[5:, 7:] == image[:15, :23]).all()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("layout", [False, True])
def test_pixels_are_those_of_the_array(tmp_path, version, layout):
    image = picture(253, 301)
    root = (in_layout if layout else write_ome_zarr)(tmp_path / "slide.zarr", image, version)
    slide = open_slide(root)
    assert slide.backend == "zarr" and slide.mpp_um == (0.5, 0.4) and slide.levels[0].tile_px == (64, 64)
    assert [level.downsample for level in slide.levels] == [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]
    equal(slide, image)
    equal(pickle.loads(pickle.dumps(slide)), image)
    assert open_slide(root, 0.3).mpp_um == (0.3, 0.3)
    with pytest.raises(InputError, match="cannot be opened"):
        open_slide(root, backend="tiff")


@pytest.mark.parametrize(
    ("chunk", "shards"), [((1, 50, 70), None), ((3, 300, 400), None), ((3, 32, 64), (3, 128, 128))]
)
def test_chunks_of_any_form(tmp_path, chunk, shards):
    image = picture(253, 301)
    axes = [{"name": "t", "type": "time"}, AXES[0], {"name": "z", **UM}, *AXES[1:]]
    plain = open_slide(write_ome_zarr(tmp_path / "a.zarr", image, chunk=chunk, shards=shards))
    equal(plain, image)
    assert plain.levels[0].tile_px == (min(chunk[1], 253), min(chunk[2], 301))
    long = zarr.open_group(tmp_path / "b.zarr", mode="w")
    long.create_array("full", shape=(1, 3, 1, 253, 301), chunks=(1, *chunk[:1], 1, *chunk[1:]), dtype="u1")
    long["full"][0, :, 0] = image.transpose(2, 0, 1)
    dataset = {"path": "full", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1, 250.0, 250.0]}]}
    for axis in axes[-2:]:
        axis["unit"] = "nanometer"
    long.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}
    slide = open_slide(tmp_path / "b.zarr")
    assert slide.mpp_um == pytest.approx((0.25, 0.25))
    equal(slide, image, factors=(1,))
    for axis in axes[-2:]:
        axis["unit"] = "micrometer"


def test_the_scale_of_all_levels_counts(tmp_path):
    root = write_ome_zarr(tmp_path / "s.zarr", picture(64, 64), mpp=(1.0, 1.0))
    group = zarr.open_group(root)
    ome = dict(group.attrs["ome"])
    ome["multiscales"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [1.0, 0.22, 0.23]}]
    group.attrs["ome"] = ome
    assert open_slide(root).mpp_um == pytest.approx((0.22, 0.23))


def test_what_ome_zarr_py_writes(tmp_path):
    from ome_zarr.writer import write_image

    image = picture(256, 320)
    group = zarr.open_group(tmp_path / "w.zarr", mode="w")
    units = {"y": "micrometer", "x": "micrometer"}
    scale = {"c": 1.0, "y": 0.5, "x": 0.4}
    write_image(image.transpose(2, 0, 1), group, axes="cyx", scale_factors=[2], scale=scale, axes_units=units)
    slide = open_slide(tmp_path / "w.zarr")
    assert slide.backend == "zarr" and slide.mpp_um == (0.5, 0.4) and len(slide.levels) == 2
    np.testing.assert_array_equal(slide.read(0, 10, 20, 200, 256), image[10:210, 20:276])


def test_neighbours_decode_a_chunk_once_and_memory_is_bounded(tmp_path, monkeypatch):
    slide = open_slide(write_ome_zarr(tmp_path / "s.zarr", picture(512, 512), factors=(1,)))
    slide.decoded = 0
    for r in range(0, 512, 96):
        for c in range(0, 512, 96):
            slide.read(0, r, c, 96, 96)
    assert slide.decoded == 64
    slide.read(0, 0, 0, 512, 512)
    assert not slide._kept and slide._kept.bytes == 0
    slide._kept.most_bytes = 3 * 64 * 64 * 3
    slide.read(0, 10, 10, 400, 400)
    assert slide._kept.bytes <= 3 * 64 * 64 * 3 and slide._kept.bytes == len(slide._kept) * 64 * 64 * 3


def test_a_damaged_chunk_is_named_and_costs_its_tiles_alone(tmp_path):
    image = picture(256, 256)
    root = write_ome_zarr(tmp_path / "s.zarr", image, factors=(1,))
    whole = slide_digest(root)
    (root / "0" / "c" / "0" / "1" / "2").write_bytes(b"nothing")
    assert slide_digest(root) != whole
    slide = open_slide(root, 0.5)
    with pytest.raises(InputError, match=r"level 0 cannot be decoded at row 64, column 128: .*chunk") as caught:
        slide.read(0, 60, 130, 20, 20)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)
    plan = plan_tiles(slide, TileSpec(64, 0.5))
    (group,) = group_tiles(plan)
    tiles, errors = TileReader(plan, slide).read(group)
    assert [k for k, e in enumerate(errors) if e] == [1 * 4 + 2]
    np.testing.assert_array_equal(tiles[5], image[64:128, 64:128])
    # The damage is a part of what the slide is known by.
    assert plan.slide_sha256 != slide_digest(write_ome_zarr(tmp_path / "whole.zarr", image, factors=(1,)))
    around = ReadAround(slide)
    image[64:128, 128:192] = 255
    np.testing.assert_array_equal(around.read(0, 0, 0, 256, 256), image)
    assert around.damaged.places == ((0, 1, 2),)


def changed(root, how):
    group = zarr.open_group(root)
    ome = dict(group.attrs["ome"])
    image = ome["multiscales"][0]
    how(group, ome, image)
    group.attrs["ome"] = ome


def no_unit(group, ome, image):
    image["axes"] = [{k: v for k, v in axis.items() if k != "unit"} for axis in image["axes"]]


def fluorescence(group, ome, image):
    names = {"DAPI": "0000FF", "GFP": "00FF00", "Cy5": "FF0000"}
    ome["omero"] = {"channels": [{"label": n, "color": c} for n, c in names.items()]}


def wrong_scale(group, ome, image):
    image["datasets"][1]["coordinateTransformations"][0]["scale"] = [1.0, 1.5, 0.8]


def old(group, ome, image):
    ome["version"] = "0.3"


def lost(group, ome, image):
    image["datasets"][1]["path"] = "none"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (no_unit, ("does not say how large", "--slide-mpp-um")),
        (fluorescence, ("DAPI", "fluorescence")),
        (wrong_scale, ("level 1", "scale says")),
        (old, ("OME-Zarr 0.3", "0.4 or 0.5")),
        (lost, ("level none is missing",)),
    ],
)
def test_refused_metadata(tmp_path, how, words):
    root = write_ome_zarr(tmp_path / "s.zarr", picture(128, 128))
    changed(root, how)
    with pytest.raises(InputError) as caught:
        open_slide(root)
    assert all(word in str(caught.value) for word in (str(root), *words)), caught.value
    said = describe(root)
    assert words[0] in (said.fact("as a slide") or said.fact("pixel size"))


def test_refused_arrays(tmp_path):
    dark = np.random.default_rng(0).poisson(5, (128, 128, 3)).astype(np.uint8)
    with pytest.raises(InputError, match="dark, as in fluorescence"):
        open_slide(write_ome_zarr(tmp_path / "d.zarr", dark), 0.5)
    for name, shape, dtype, axes, words in [
        ("four", (4, 64, 64), "u1", "cyx", "4 c"),
        ("deep", (3, 64, 64), "u2", "cyx", "uint16"),
        ("stack", (3, 5, 64, 64), "u1", "czyx", "5 z"),
        ("grey", (64, 64), "u1", "yx", "RGB"),
    ]:
        group = zarr.open_group(tmp_path / name, mode="w")
        group.create_array("0", shape=shape, dtype=dtype, chunks=shape)
        image = {"axes": [{"name": a} for a in axes], "datasets": [{"path": "0"}]}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
        with pytest.raises(InputError, match=words) as caught:
            open_slide(tmp_path / name, 0.5)
        assert "red, green and blue" in str(caught.value)
    empty = tmp_path / "plain"
    empty.mkdir()
    assert not is_zarr(empty)
    zarr.open_group(empty, mode="a")
    with pytest.raises(InputError, match="is no OME-Zarr image"):
        open_slide(empty)


def test_another_stated_scale_is_another_slide(tmp_path):
    root = write_ome_zarr(tmp_path / "a.zarr", picture(200, 200), version="0.4")
    one = slide_digest(root)
    attrs = root / ".zattrs"
    told = json.loads(attrs.read_text())
    for dataset in told["multiscales"][0]["datasets"]:
        for part in dataset["coordinateTransformations"]:
            part["scale"] = [v if n == 0 else v / 2 for n, v in enumerate(part["scale"])]
    attrs.write_text(json.dumps(told))
    assert slide_digest(root) != one


def test_digest_is_of_pixels_and_size(tmp_path):
    image = picture(200, 200)
    one = slide_digest(write_ome_zarr(tmp_path / "a.zarr", image))
    assert slide_digest(write_ome_zarr(tmp_path / "b.zarr", image, version="0.4")) == one
    other = image.copy()
    other[130, 140, 1] ^= 1
    assert slide_digest(write_ome_zarr(tmp_path / "c.zarr", other)) != one


def test_tissue_tiles_and_info(tmp_path, phantom):
    """Of the phantom's slide as OME-Zarr: the same mask, the same tiles, the same facts."""
    tiff = open_slide(phantom.slide)
    image = tiff.read(0, 0, 0, *tiff.shape_px)
    root = in_layout(tmp_path / "slide.zarr", image, "0.5")
    slide = open_slide(root, tiff.mpp_um)
    mask, wanted = TissueMask.of(slide), TissueMask.of(tiff)
    assert mask.mask.shape == wanted.mask.shape and (mask.mask == wanted.mask).mean() > 0.99 and mask.mask.any()
    got, want = (read_area(s, (11.0, 7.0), (50, 60), 2.7)[0] for s in (slide, tiff))
    np.testing.assert_array_equal(got, want)
    plan = plan_tiles(slide, TileSpec(64, 2.0, tissue=0.3), mask)
    reader = TileReader(plan)
    for group in group_tiles(plan):
        tiles, errors = reader.read(group)
        assert not any(errors)
        for k, number in enumerate(group.tiles):
            r, c = plan.corner_px[number]
            h, w = plan.valid_px[number]
            np.testing.assert_array_equal(tiles[k, :h, :w], image[r : r + h, c : c + w])
    said = describe(root)
    assert said.whole and said.kind == "slide" and said.fact("format") == "OME-Zarr 0.5"
    assert said.fact("pixel size") == "0.5 x 0.4 um (mpp)" and said.fact("levels") == "3"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_by_url(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    image = picture(253, 301)
    root = in_layout(tmp_path / "slide.zarr", image, "0.5")
    s3.files.put(str(root), "s3://bucket/slide.zarr", recursive=True)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for url in ("s3://bucket/slide.zarr", f"http://127.0.0.1:{server.server_address[1]}/slide.zarr"):
            slide = open_slide(url)
            assert slide.mpp_um == (0.5, 0.4)
            equal(slide, image)
            assert slide_digest(url) == slide_digest(root)
            said = describe(url)
            assert said.whole and said.fact("levels") == "3"
    finally:
        server.shutdown()
        server.server_close()
    slide = open_slide("s3://bucket/slide.zarr/0")
    s3.fail(500, 2)
    np.testing.assert_array_equal(slide.read(0, 0, 0, 100, 100), image[:100, :100])
    s3.fail(403, 1000)
    with pytest.raises(InputError, match="access is refused"):
        slide.read(0, 128, 128, 100, 100)
    s3.heal()
    s3.files.pipe("s3://bucket/slide.zarr/0/0/c/0/1/2", b"nothing")
    with pytest.raises(InputError, match=r"one is damaged .*copy or convert"):
        open_slide("s3://bucket/slide.zarr", backend="zarr").read(0, 64, 128, 10, 10)
    with pytest.raises(InputError, match="does not exist"):
        open_slide("s3://bucket/none.zarr")


def write_ome_tiff(path, image, factors=(1, 2, 4), planar=False, um=("0.25", "µm"), **how):
    size = {f"PhysicalSize{a}{k}": v for a in "XY" for k, v in {"": float(um[0]), "Unit": um[1]}.items()}
    options = {"photometric": "rgb", "tile": (64, 64), **({"planarconfig": "separate"} if planar else {}), **how}
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for k, level in enumerate(levels_of(image, factors)):
            stored = np.ascontiguousarray(level.transpose(2, 0, 1)) if planar else level
            meta = {"axes": "SYX" if planar else "YXS", **size}
            extra = {"subifds": len(factors) - 1, "metadata": meta} if k == 0 else {"subfiletype": 1}
            # The resolution tags say something else: what OME-XML says is exact.
            tif.write(stored, resolution=(3e4, 3e4), resolutionunit="CENTIMETER", **options, **extra)
    return path


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("compression", ["deflate", "lzw", None])
def test_ome_tiff_pyramids(tmp_path, compression, planar):
    image = picture(253, 301)
    path = write_ome_tiff(tmp_path / "s.ome.tif", image, planar=planar, compression=compression, um=("250", "nm"))
    slide = open_slide(path)
    assert slide.backend == "flat" and slide.mpp_um == pytest.approx((0.25, 0.25), rel=1e-12)
    assert slide.levels[0].tile_px == (64, 64)
    equal(slide, image)
    said = describe(path)
    assert said.whole and said.kind == "slide" and said.fact("format") == "OME-TIFF" and said.fact("levels") == "3"


@pytest.mark.parametrize("how", [{}, {"subsampling": (1, 1)}, {"compressionargs": {"outcolorspace": "rgb"}}])
def test_ome_tiff_of_jpeg_tiles(tmp_path, how):
    """Read by the direct reader, equal to OpenSlide at level 0 and to tifffile at all of them."""
    image = picture(256, 320)
    path = write_ome_tiff(tmp_path / "s.ome.tif", image, compression="jpeg", **how)
    slide = open_slide(path)
    assert slide.backend == "tiff" and len(slide.levels) == 3 and slide.mpp_um == (0.25, 0.25)
    from deepfere.readers.slide_flat import open_flat

    same_everywhere(slide, open_flat(path, None))
    other = open_slide(path, 0.25, "openslide")
    np.testing.assert_array_equal(slide.read(0, 30, 40, 200, 250), other.read(0, 30, 40, 200, 250))
    for k in range(3):
        want = tifffile.imread(path, level=k)
        h, w = want.shape[:2]
        assert np.abs(slide.read(k, 0, 0, h, w).astype(int) - want).max() <= 3


def test_ome_tiff_refused(tmp_path):
    path = tmp_path / "c.ome.tif"
    tifffile.imwrite(path, picture(64, 64).transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"})
    with pytest.raises(InputError, match=r"is not an RGB picture .*CYX"):
        open_slide(path, 0.5)
    bare = tmp_path / "b.ome.tif"
    tifffile.imwrite(bare, picture(64, 64), photometric="rgb", metadata={"axes": "YXS"}, resolution=(3e4, 3e4))
    with pytest.raises(InputError, match="does not say how large"):
        open_slide(bare)


@pytest.mark.ray
def test_fuse_takes_an_ome_zarr_slide(phantom, ray_session, tmp_path, cli):
    """Up to the planes, which are means over its pixels."""
    import json

    tiff = open_slide(phantom.slide)
    image = tiff.read(0, 0, 0, *tiff.shape_px)
    root = write_ome_zarr(tmp_path / "slide.zarr", image, factors=(1,), mpp=tiff.mpp_um)
    section = {"name": "zarr", "msi": phantom.imzml, "slide": root, "alignment": phantom.truth / "alignment.json"}
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"sections": [section]}, default=str))
    done = cli("tile", study, "-o", tmp_path / "work", "--factor", "4", "tracking.uri=none")
    assert done.code == 0, done
    planes = zarr.open_group(tmp_path / "work" / "sections" / "zarr" / "planes.zarr")["planes"][:]
    means = block_mean(image, 3)
    read = planes[6, : means.shape[0], : means.shape[1]] == 255
    off = planes[:3, : means.shape[0], : means.shape[1]].transpose(1, 2, 0).astype(int) - means
    assert read.mean() > 0.5 and np.abs(off[read]).max() <= 1
    facts = json.loads((tmp_path / "work" / "done" / "tile-zarr.json").read_text())
    assert facts["slide"]["backend"] == "zarr"
    shutil.rmtree(root)
    gone = cli("tile", study, "-o", tmp_path / "work", "--factor", "4", "tracking.uri=none")
    assert gone.code == 2 and "does not exist" in gone.errors[0]
