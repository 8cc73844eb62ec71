"""Several pieces of tissue on one slide: found, numbered, listed; one chosen; and what is asked where two fit alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

import deepfere
from deepfere.config import Config
from deepfere.errors import InputError
from deepfere.evaluation.report_alignment import artefact_words
from deepfere.frame import Alignment
from deepfere.inspect import describe
from deepfere.pipeline.overview import MARGIN_UM, ask_which, stain_overview, unnamed_pieces
from deepfere.pipeline.study import each_piece
from deepfere.readers.slide import open_slide
from deepfere.section import load_study
from deepfere.tiling.pieces import HALO_UM, find_pieces
from deepfere.tiling.tiles import TileSpec, plan_tiles

MPP = 8.0
# Boxes of the drawn pieces, um: y, x, height, width. The third is cracked, the gap is glass.
DRAWN = [(1000, 5200, 2400, 2000), (1100, 800, 3000, 2600), (5200, 1200, 2000, 4800)]
CRACK_UM = 200.0
COARSE_UM = 32.0


def drawn(ink=False):
    """(h, w, 3) three pieces of tissue, a speck of dust, and perhaps a pen mark."""
    rng = np.random.default_rng(0)
    shape = (1000, 1000)
    image = np.full((*shape, 3), 244.0)
    y, x = (np.indices(shape) + 0.5) * MPP
    for top, left, height, width in DRAWN:
        inside = ((y - top - height / 2) / (height / 2)) ** 2 + ((x - left - width / 2) / (width / 2)) ** 2 <= 1
        amount = 1 + 0.4 * np.sin(y / 90) * np.cos(x / 130)  # of one stain: its colour varies along one line
        image[inside] = (244 * np.exp(-amount[..., None] * np.array([0.22, 0.71, 0.33])))[inside]
    image[(np.abs(x - 3600) < CRACK_UM / 2) & (y > 5000)] = 244
    image[(np.abs(x - 7000) < 60) & (np.abs(y - 6000) < 60)] = 244 * np.exp(-np.array([0.22, 0.71, 0.33]))
    if ink:
        image[(np.abs(y - 500) < 150) & (x > 300) & (x < 3300)] = (60, 140, 70)
    return (image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def written(path, image, mpp=MPP):
    tifffile.imwrite(
        path,
        image,
        photometric="rgb",
        tile=(256, 256),
        compression="deflate",
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    return path


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    return written(tmp_path_factory.mktemp("pieces") / "slide.tif", drawn())


def test_pieces_are_found_and_numbered(slide_path):
    found = find_pieces(open_slide(slide_path))
    assert [p.number for p in found.pieces] == [1, 2, 3]
    # Reading order of the upper left corners: the first begins highest, wherever it lies across.
    for piece, (y, x, h, w) in zip(found.pieces, DRAWN, strict=True):
        np.testing.assert_allclose([*piece.start_um, *piece.extent_um], [y, x, h, w], atol=2 * COARSE_UM)
        lost = CRACK_UM * h if piece.number == 3 else 0.0
        assert piece.area_um2 == pytest.approx(np.pi / 4 * h * w - lost, rel=0.03)
    again = find_pieces(open_slide(slide_path))
    assert again.pieces == found.pieces and np.array_equal(again.ground, found.ground)
    speck = found.ground[int(6000 / found.ground_um[0]), int(7000 / found.ground_um[1])]
    assert speck == 0 and found.mask.mask[int(6000 / found.mask.spacing_um[0]), int(7000 / found.mask.spacing_um[1])]
    assert found.nearest(np.array([2000.0, 6000.0])) == 1 and found.nearest(np.array([2000.0, 100.0])) == 2
    with pytest.raises(InputError) as caught:
        found.choose(4, slide_path)
    assert all(w in str(caught.value) for w in (str(slide_path), "no piece of tissue 4", "3: y ", "--slide-region"))
    with pytest.raises(InputError, match="the slide: has no piece of tissue 0"):
        found.tissue(0)


def test_ink_is_no_piece(tmp_path, slide_path):
    marked = find_pieces(open_slide(written(tmp_path / "ink.tif", drawn(ink=True)))).pieces
    plain = find_pieces(open_slide(slide_path)).pieces
    assert [p.start_um for p in marked] == [p.start_um for p in plain] and len(marked) == 3


def test_tissue_of_one_piece_restricts_tiles(slide_path):
    slide = open_slide(slide_path)
    found = find_pieces(slide)
    spec = TileSpec(32, MPP, tissue=0.2)
    everything = plan_tiles(slide, spec, found.mask)
    parts = [plan_tiles(slide, spec, found.tissue(n)) for n in (1, 2, 3)]
    assert min(len(p) for p in parts) > 50 and sum(len(p) for p in parts) == len(everything)
    top, left, height, width = DRAWN[1]
    corner = parts[1].corner_px * MPP
    assert (corner >= [top - 32 * MPP, left - 32 * MPP]).all() and (corner <= [top + height, left + width]).all()


def test_info_lists_them(slide_path, tmp_path):
    said = describe(slide_path)
    assert said.whole and said.fact("pieces") == "3 of tissue"
    text = said.fact("piece 2")
    assert text.startswith("y 1") and "mm2 of tissue" in text and " um)" in text
    assert (
        describe(written(tmp_path / "empty.tif", np.full((300, 300, 3), 244, np.uint8))).fact("pieces") == "0 of tissue"
    )


def test_the_overview_of_one_piece_reads_no_other(slide_path):
    slide = open_slide(slide_path)
    found, whole = find_pieces(slide), stain_overview(slide, 50.0)[1]
    windows, read = [], slide.read
    slide.read = lambda level, *window: windows.append(window) or read(level, *window)
    stain, rgb = stain_overview(slide, 50.0, pieces=found, number=3)
    top, left, height, width = DRAWN[2]
    low = np.array([top, left]) - MARGIN_UM - 3 * COARSE_UM
    high = np.array([top + height, left + width]) + MARGIN_UM + 3 * COARSE_UM
    for r, c, h, w in windows:
        assert (np.array([r, c]) * MPP >= low).all() and (np.array([r + h, c + w]) * MPP <= high).all()
    assert stain.spacing_um == (MPP, MPP) and rgb.shape == whole.shape
    rows, cols = slice(int(top / MPP), int((top + height) / MPP)), slice(int(left / MPP), int((left + width) / MPP))
    np.testing.assert_array_equal(rgb[rows, cols], whole[rows, cols])
    # The second piece reaches into the margin: it is hidden, as tissue and as cover.
    into = int((top - 200) / MPP), int(2100 / MPP)
    assert (rgb[: int((top - MARGIN_UM) / MPP) - 20] == 255).all()
    assert stain.elsewhere.any() and not (stain.planes[5][stain.elsewhere] > 0).any()
    assert (stain.planes[6][stain.elsewhere] == 0).all() and stain.planes[6][rows, cols].min() == 255
    assert (stain.planes[5] > 127).sum() * MPP**2 == pytest.approx(found.pieces[2].area_um2, rel=0.02)
    assert into[0] > 0 and HALO_UM < MARGIN_UM


def manifest(folder, **section):
    (folder / "study.yaml").write_text(
        json.dumps({"sections": [{"name": "a", "msi": "a.imzML"} | section]}, default=str)
    )
    return folder / "study.yaml"


def test_every_piece_becomes_a_section(slide_path, tmp_path):
    path = manifest(tmp_path, slide=slide_path, slide_region="each", region=2)
    sections = load_study(path).sections
    found = each_piece(sections, path, Config())
    assert [(s.name, s.slide_region, s.region) for s in found] == [("a-1", 1, 2), ("a-2", 2, 2), ("a-3", 3, 2)]
    bare = [s.model_copy(update={"slide": None}) for s in sections]
    assert [(s.name, s.slide_region) for s in each_piece(bare, path, Config())] == [("a", None)]
    one = written(tmp_path / "one.tif", drawn()[:, 550:][:450])
    path = manifest(tmp_path, slide=one, slide_region="each")
    assert [(s.name, s.slide_region) for s in each_piece(load_study(path).sections, path, Config())] == [("a", None)]
    glass = written(tmp_path / "glass.tif", np.full((300, 300, 3), 244, np.uint8))
    path = manifest(tmp_path, slide=glass, slide_region="each")
    with pytest.raises(InputError, match=r"glass\.tif: shows no piece of tissue"):
        each_piece(load_study(path).sections, path, Config())


def test_pieces_are_told_of_where_nothing_was_said_of_them(slide_path, tmp_path):
    section = load_study(manifest(tmp_path, slide=slide_path)).sections[0]
    told = unnamed_pieces(section, Config())
    assert told is not None and len(told.pieces) == 3
    for said in ({"slide_region": "all"}, {"slide_region": 2}, {"slide": written(tmp_path / "one.tif", drawn()[550:])}):
        assert unnamed_pieces(section.model_copy(update=said), Config()) is None
    areas = [p.area_um2 for p in told.pieces]
    with pytest.raises(InputError, match=r"slide\.tif: shows 3 pieces of tissue .*--slide-region 1 or another number"):
        ask_which(told, section, 3 * min(areas))
    ask_which(None, section, max(areas))
    ask_which(told, section, 4.01 * sorted(areas)[-2])  # no other is large enough to be what was measured


def test_pairs_are_not_guessed(slide_path, tmp_path):
    both = manifest(tmp_path, slide=slide_path, slide_region="each", region="each")
    with pytest.raises(InputError, match=r"every pair \(region: 1, slide_region: 2\), or slide_region: all"):
        load_study(both)
    with pytest.raises(InputError, match="say where the section lies; give slide_region a number"):
        load_study(manifest(tmp_path, slide=slide_path, slide_region="each", landmarks="a.csv"))
    with pytest.raises(InputError, match="slide_region: each is for the sections of a study"):
        deepfere.fuse("a.imzML", slide_path, tmp_path / "r.zarr", slide_region="each")


def beside(phantom, other):
    """The phantom's slide and, to the right of 200 pixels of glass, another picture."""
    one = open_slide(phantom.slide)
    image = one.read(0, 0, 0, *one.shape_px)
    glass = np.full((one.shape_px[0], 200, 3), np.median(image.reshape(-1, 3)[:500], axis=0), np.uint8)
    return np.concatenate([image, glass, other(image)], axis=1), one.mpp_um


POINTS_UM = np.array([[300.0, 300.0], [900.0, 300.0], [600.0, 800.0]])
QUICK = ["--factor", "4", "tracking.uri=none", "align.angle_step_deg=45", "align.candidates=2"]


@pytest.mark.long
def test_two_that_fit_alike_are_asked_about_and_one_is_taken(phantom, tmp_path, cli):
    """The phantom's tissue twice on one slide: asked about; found on the piece that was chosen."""
    image, mpp_um = beside(phantom, lambda image: image)
    path = written(tmp_path / "twice.tif", image, mpp_um[0])
    assert describe(path).fact("pieces") == "2 of tissue"
    wrong = cli("fuse", phantom.imzml, path, "-o", tmp_path / "r.zarr", "--slide-region", "3", *QUICK)
    assert wrong.code == 2 and "no piece of tissue 3" in wrong.errors[0]
    assert "--slide-region" in cli("fuse", phantom.imzml, path, "-o", "r", "--slide-region", "x").errors[0]
    assert [p.name for p in tmp_path.iterdir()] == ["twice.tif"]
    study, work = tmp_path / "study.yaml", tmp_path / "work"
    section = {"name": "right", "msi": phantom.imzml, "slide": path}
    study.write_text(json.dumps({"sections": [section]}, default=str))
    asked = cli("align", study, "-o", work, *QUICK)
    assert asked.code == 2 and len(asked.errors) == 1
    assert all(w in asked.errors[0] for w in ("twice.tif: shows 2 pieces", "mm2 of tissue", "--slide-region 1 or"))
    # Looked for on all of the slide, as was asked for, it is found twice.
    study.write_text(json.dumps({"sections": [section | {"slide_region": "all"}]}, default=str))
    refused = cli("align", study, "-o", work, *QUICK)
    assert refused.code == 2 and len(refused.errors) == 1
    assert all(w in refused.errors[0] for w in ("piece 1", "piece 2", "--slide-region", "mm2 of tissue"))
    # What is done is kept, and the manifest may be mended.
    ingested = (work / "done" / "ingest-right.json").stat().st_mtime_ns
    study.write_text(json.dumps({"sections": [section | {"slide_region": 2}]}, default=str))
    done = cli("align", study, "-o", work, *QUICK)
    assert done.code == 0, done.err
    assert (work / "done" / "ingest-right.json").stat().st_mtime_ns == ingested
    found = Alignment.load(work / "sections" / "right" / "alignment.json")
    truth = Alignment.load(phantom.truth / "alignment.json")
    shift = np.array([0.0, (image.shape[1] + 200) / 2 * mpp_um[1]])
    assert np.abs(found.map(POINTS_UM) - truth.map(POINTS_UM) - shift).max() < 40
    facts = json.loads((work / "done" / "align-right.json").read_text())
    (entry,) = [e for e in facts["artefacts"] if e["kind"] == "piece"]
    assert entry["area_um2"] > 1e5 and entry["decided_by"] == "slide_region 2"
    (words,) = artefact_words({"artefacts": {"masked": [entry]}})
    assert words.startswith("Other pieces of tissue on the slide (") and "mm²" in words


@pytest.mark.long
@pytest.mark.ray
def test_each_piece_of_a_study_is_aligned_on_its_own(phantom, tmp_path, cli, ray_session):
    image, mpp_um = beside(phantom, lambda image: image)
    path = written(tmp_path / "twice.tif", image, mpp_um[0])
    study, work = manifest(tmp_path, msi=phantom.imzml, slide=path, slide_region="each"), tmp_path / "work"
    done = cli("align", study, "-o", work, *QUICK)
    assert done.code == 0, done.err
    left, right = (Alignment.load(work / "sections" / n / "alignment.json").map(POINTS_UM) for n in ("a-1", "a-2"))
    truth = Alignment.load(phantom.truth / "alignment.json").map(POINTS_UM)
    assert np.abs(left - truth).max() < 40
    assert np.abs(right - truth - [0.0, (image.shape[1] + 200) / 2 * mpp_um[1]]).max() < 40


@pytest.mark.ray
@pytest.mark.parametrize(
    "chosen", [pytest.param([], id="none"), pytest.param(["--slide-region", "1"], id="one", marks=pytest.mark.long)]
)
def test_fuse_on_a_slide_of_two_pieces(phantom, tmp_path, cli, ray_session, chosen):
    """The other piece is too small: the place is found whether a piece is named or not, and then it is told."""

    def other(image):
        rng, (h, w) = np.random.default_rng(5), image.shape[:2]
        glass = np.median(image.reshape(-1, 3)[:500], axis=0)
        stained = image[np.abs(image - glass).max(-1) > 60]
        drawn = rng.choice(stained, (h // 16 + 1, w // 16 + 1)).repeat(16, 0).repeat(16, 1)[:h, :w]
        y, x = np.indices((h, w)) / np.array([h, w])[:, None, None]
        inside = (y - 0.7) ** 2 + (x - 0.5) ** 2 < 0.016
        return np.where(inside[..., None], drawn, glass).astype(np.uint8)

    image, mpp_um = beside(phantom, other)
    path = written(tmp_path / "two.tif", image, mpp_um[0])
    settings = [
        "--factor",
        "4",
        "tracking.uri=none",
        "align.angle_step_deg=30",
        "align.candidates=6",
        "model.tier=T1",
        "model.null_guides=8",
    ]
    done = cli("fuse", phantom.imzml, path, "-o", tmp_path / "r.zarr", *chosen, *settings)
    assert done.code == 0, done.err
    result = deepfere.open(tmp_path / "r.zarr")
    truth = Alignment.load(phantom.truth / "alignment.json")
    found = Alignment.load(tmp_path / "r.zarr" / "alignment.json")
    assert np.abs(found.map(POINTS_UM) - truth.map(POINTS_UM)).max() < 40
    told = [line for line in result.provenance["warnings"] if "pieces of tissue" in line]
    if chosen:
        assert not told
    else:
        (line,) = told
        assert f"warning: {line}" in done.err.splitlines()
        assert all(w in line for w in ("shows 2 pieces", "1: y ", "2: y ", "on piece 1;", "--slide-region"))
    masked = [entry["kind"] for entry in result.provenance["artefacts"]["masked"]]
    assert ("piece" in masked) == bool(chosen)
    # How the slide was read, in full.
    read = result.provenance["slide"]
    level = open_slide(path).levels[read["level"]]
    assert read["level_mpp_um"] == [pytest.approx(m * d) for m, d in zip(mpp_um, level.downsample, strict=True)]
    assert read["scale"] == [pytest.approx(a / b) for a, b in zip(read["mpp_um"], read["level_mpp_um"], strict=True)]
