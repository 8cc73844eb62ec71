"""A corrupt native tile of a slide costs its pixels, is named, and nothing else: readers, planes, fuse, studies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from deepfere.cluster import Journal
from deepfere.errors import InputError
from deepfere.inspect import describe
from deepfere.model.features import PLANES
from deepfere.pipeline.overview import stain_overview
from deepfere.readers.slide import open_slide, opened
from deepfere.readers.slide_damaged import NO_DAMAGE, DamagedTiles, ReadAround
from deepfere.tiling.cache import compute_shard, create_cache
from tests.conftest import FACTOR, SETTINGS

from .test_reader_tiff import damage, picture, write_jpeg_tiff
from .test_slide_damage import spec_of, stored, tiled

TILE = 64
BACKENDS = pytest.mark.parametrize("backend", ["tiff", "openslide"])


@pytest.fixture
def pyramid(phantom, tmp_path):
    """The phantom's slide with levels of 2, 4 and 8 um: the overview comes from the second one, planes from level 0."""
    slide = open_slide(phantom.slide)
    image = slide.read(0, 0, 0, *slide.shape_px)
    return write_jpeg_tiff(tmp_path / "pyramid.tif", image, tile=TILE, mpp=slide.mpp_um[0])


def middle_tile(phantom) -> tuple[int, int]:
    """Row and column of the native tile under the section's middle."""
    centre = np.asarray(phantom.spec.grid.extent_um)[None] / 2
    row, col = (int(v / (phantom.spec.slide_mpp_um * TILE)) for v in phantom.alignment().map(centre)[0])
    return row, col


def across(path, level=0) -> int:
    """Native tiles in a row."""
    return -(-open_slide(path).levels[level].shape_px[1] // TILE)


@BACKENDS
def test_what_lies_around_is_read(tmp_path, backend):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(320, 448), factors=(1, 2), tile=TILE)
    whole = open_slide(path, backend=backend)
    fine, coarse = (whole.read(k, 0, 0, *level.shape_px) for k, level in enumerate(whole.levels))
    damage(path, 1 * 7 + 2, "head")
    damage(path, 1 * 4 + 3, "tail", level=1)
    around = ReadAround(open_slide(path, backend=backend))
    assert around.damaged == DamagedTiles.of(whole, []) and around.first is None
    lost = np.zeros(fine.shape[:2], bool)
    lost[64:128, 128:192] = True
    got = around.read(0, -5, 0, 330, 448)
    np.testing.assert_array_equal(got[5:325], np.where(lost[..., None], 255, fine))
    assert around.damaged.places == ((0, 1, 2),) and "level 0 cannot be decoded" in str(around.first)
    # A reduced level lacks nothing: what is damaged of it is made from level 0.
    want = coarse.copy()
    want[64:128, 192:] = fine[128:256, 384:].reshape(64, 2, 32, 2, 3).mean((1, 3)) + 0.5
    np.testing.assert_array_equal(around.read(1, 0, 0, 160, 224), want)
    assert around.damaged.places == ((0, 1, 2), (1, 1, 3))
    np.testing.assert_array_equal(around.hidden((0.0, 0.0), (0.5, 0.5), (320, 448)), lost)
    # A pixel is hidden if the tile reaches into it, on any grid.
    hidden = around.hidden((20.0, 70.0), (3.0, 7.0), (30, 4))
    assert hidden[4:15, :4].all() and hidden.sum() == 11 * 4
    points = np.array([[[32.0, 64.0], [63.9, 95.9]], [[31.9, 64.0], [64.0, 70.0]], [[-1.0, 64.0], [40.0, -1.0]]])
    assert around.damaged.hide(points).tolist() == [[True, True], [False, False], [False, False]]


def test_what_is_told():
    assert not NO_DAMAGE
    places = [(0, 3, k) for k in range(9)]
    said = DamagedTiles(tuple(places[:1])).warning()
    assert "damaged in 1 native tile (level 0, row 3, column 0): their pixels count as not shown" in said
    assert "and 1 more" in DamagedTiles(tuple(places)).text() and "column 8" not in DamagedTiles(tuple(places)).text()
    assert "are read from finer levels" in DamagedTiles(((2, 0, 1),)).warning()
    assert "those of level 0 count as not shown" in DamagedTiles((places[0], (2, 0, 1))).warning()


def test_a_slide_that_was_cut_off_lacks_its_last_tiles(tmp_path):
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(256, 256), factors=(1,), tile=TILE)
    with tifffile.TiffFile(path) as file:
        last = file.pages[0].dataoffsets[13]
    want = open_slide(path).read(0, 0, 0, 256, 256)
    path.write_bytes(path.read_bytes()[: last + 20])
    around = ReadAround(open_slide(path, backend="tiff"))
    want[192:, 64:] = 255
    np.testing.assert_array_equal(around.read(0, 0, 0, 256, 256), want)
    assert around.damaged.places == ((0, 3, 1), (0, 3, 2), (0, 3, 3))


@BACKENDS
def test_planes_do_not_cover_it_and_the_journal_names_it(tmp_path, monkeypatch, backend):
    for module in ("plan", "cache"):
        monkeypatch.setattr(f"deepfere.tiling.{module}.SHARD_PX", 128)
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(256, 256), factors=(1,), tile=TILE)
    spec = spec_of(tmp_path, path)
    want = [compute_shard(spec, row, col) for row in (0, 1) for col in (0, 1)]
    assert not any(damaged for _, damaged in want)
    damage(path, 1 * 4 + 3, "head")
    opened.cache_clear()
    monkeypatch.setattr("deepfere.tiling.cache.opened", lambda *_: open_slide(path, backend=backend))
    create_cache(spec)
    assert tiled(spec, tmp_path) == (4, 4)
    known = Journal(tmp_path / "journal", spec.fingerprint).done()
    assert {unit: values.get("damaged") for unit, values in known.items() if "damaged" in values} == {
        "0/1": [[0, 1, 3]]
    }
    for place, (planes, _) in zip([(0, 0), (0, 1), (1, 0), (1, 1)], want, strict=True):
        got, _ = compute_shard(spec, *place)
        lost = np.zeros((128, 128), bool)
        lost[64:, 64:] = place == (0, 1)
        np.testing.assert_array_equal(got[:, ~lost], planes[:, ~lost])
        assert (got[PLANES.index("coverage"), lost] == 0).all()


def test_planes_of_bands_are_those_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfere.tiling.plan.SHARD_PX", 128)
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(256, 256), factors=(1,), tile=TILE)
    spec = spec_of(tmp_path, path)
    whole = [compute_shard(spec, row, col)[0] for row in (0, 1) for col in (0, 1)]
    for band_px in (1, 1000, 5000):
        monkeypatch.setattr("deepfere.tiling.cache.BAND_PX", band_px)
        parts = [compute_shard(spec, row, col)[0] for row in (0, 1) for col in (0, 1)]
        assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_overview_is_whole_or_says_what_it_lacks(phantom, pyramid):
    want, _ = stain_overview(open_slide(pyramid), 50.0)
    row, col = middle_tile(phantom)
    damage(pyramid, row * across(pyramid) + col, "head")
    same, _ = stain_overview(open_slide(pyramid), 50.0)  # from level 1, which is whole
    np.testing.assert_array_equal(same.planes, want.planes)
    assert same.reference == want.reference and not same.damaged
    damage(pyramid, row // 2 * across(pyramid, 1) + col // 2, "head", level=1)
    lacks, rgb = stain_overview(open_slide(pyramid), 50.0)  # that tile comes from level 0, where one of four is lost
    assert lacks.damaged.places == ((0, row, col), (1, row // 2, col // 2))
    y, x = ((np.arange(n) + 0.5) * s for n, s in zip(rgb.shape[:2], lacks.spacing_um, strict=True))
    lost = lacks.damaged.hide(np.stack(np.meshgrid(y, x, indexing="ij"), -1))
    assert lost.any() and (lacks.planes[PLANES.index("coverage")][lost] == 0).all()
    assert lacks.planes[PLANES.index("coverage")].mean() > 0.9 * want.planes[PLANES.index("coverage")].mean()
    for level in (0, 1, 2):
        count = across(pyramid, level) * -(-open_slide(pyramid).levels[level].shape_px[0] // TILE)
        for tile in range(count):
            damage(pyramid, tile, "head", level)
    with pytest.raises(InputError, match="cannot be decoded"):
        stain_overview(open_slide(pyramid, backend="tiff"), 50.0)


@pytest.mark.ray
@pytest.mark.timeout(600)
@BACKENDS
def test_a_study_loses_no_more_than_the_tile(phantom, pyramid, tmp_path, cli, ray_session, backend):
    section = {"msi": str(phantom.imzml), "alignment": str(phantom.truth / "alignment.json")}
    row, col = middle_tile(phantom)
    broken = tmp_path / "broken.tif"
    broken.write_bytes(pyramid.read_bytes())
    damage(broken, row * across(pyramid) + col, "head")
    sections = [{"name": name, **section, "slide": str(path)} for name, path in (("a", pyramid), ("b", broken))]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": sections}))
    quick = ["--factor", "16", "tracking.uri=none", "model.smoothing_pitch=0.3", f"slide.backend={backend}"]
    done = cli("tile", tmp_path / "study.yaml", "-o", tmp_path / "work", *quick)
    assert done.code == 0, done
    (told,) = [line for line in done.out.splitlines() if "warning" in line]
    said = f"b: warning: the slide is damaged in 1 native tile (level 0, row {row}, column {col})"
    assert told.startswith(said) and "count as not shown by it" in told
    one, other = (stored(tmp_path / "work" / "sections" / name / "planes.zarr") for name in "ab")
    shards = {name for name in one if "/c/" in name}
    assert shards == {name for name in other if "/c/" in name} and len(shards) >= 4
    assert {name for name in shards if one[name] != other[name]} == {f"planes/c/0/{row // 8}/{col // 8}"}
    facts = [json.loads((tmp_path / "work" / "done" / f"tile-{name}.json").read_text()) for name in "ab"]
    assert [f["slide"]["damaged_tiles"] for f in facts] == [[], [[0, row, col]]]
    assert [len(f.get("warnings", [])) for f in facts] == [0, 1]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_fuse_goes_on_and_says_so(phantom, pyramid, tmp_path, cli, ray_session):
    row, col = middle_tile(phantom)
    damage(pyramid, row * across(pyramid) + col, "head")
    given = ["--alignment", phantom.truth / "alignment.json", "--factor", FACTOR]
    settings = [*SETTINGS, "model.tier=T1", "tracking.uri=none"]
    out = tmp_path / "result.zarr"
    done = cli("fuse", phantom.imzml, pyramid, "-o", out, *given, *settings)
    assert done.code == 0, done
    said = f"the slide is damaged in 1 native tile (level 0, row {row}, column {col})"
    assert len([line for line in done.errors if said in line and line.startswith("warning: ")]) == 1
    slide = json.loads((out / "provenance.json").read_text())["slide"]
    assert slide["damaged_tiles"] == [[0, row, col]]
    assert said in out.with_suffix(".html").read_text()
    assert any(said in str(value) for key, value in describe(out).facts if key == "warning")


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["level 0", "cut off"])
def test_too_much_damage_is_refused(phantom, pyramid, tmp_path, cli, ray_session, how):
    """Seen in the planes, where the overview is whole; or in the overview itself, of a slide of one level."""
    row, _ = middle_tile(phantom)
    count, path = across(pyramid), pyramid
    if how == "level 0":
        for tile in range(row * count):
            damage(path, tile, "head")
    else:
        slide = open_slide(phantom.slide)
        image = slide.read(0, 0, 0, *slide.shape_px)
        path = write_jpeg_tiff(tmp_path / "cut.tif", image, factors=(1,), tile=TILE, mpp=slide.mpp_um[0])
        with tifffile.TiffFile(path) as file:
            end = int(file.pages[0].dataoffsets[row * count])
        path.write_bytes(path.read_bytes()[:end])
    reader = "slide.backend=tiff"  # OpenSlide does not open a file that was cut off
    out = tmp_path / "out"
    out.mkdir()
    given = ["--alignment", phantom.truth / "alignment.json", "--factor", FACTOR, reader, *SETTINGS]
    done = cli("fuse", phantom.imzml, path, "-o", out / "result.zarr", *given, "tracking.uri=none")
    assert done.code == 2 and len(done.errors) == 1, done
    for word in (Path(path).name, "is damaged in", "native tiles (level 0, row", "% of the measured tissue", "copy or"):
        assert word in done.errors[0]
    assert list(out.iterdir()) == []
