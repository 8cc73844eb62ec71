"""What a result offers: exact ions, levels, uncertainty, alignment, provenance, and images that others can open."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import dask.array as da
import numpy as np
import pytest
import zarr

import deepfere
from deepfere.errors import InputError
from deepfere.measured.operator import pad_edge
from deepfere.model.decode import IonDecoder
from deepfere.model.guide import Cells
from deepfere.model.uncertainty import local_variance
from deepfere.pipeline.seal import detail_scale
from deepfere.places import beside
from deepfere.reconstruction.blocks import spread, variance_block
from tests.conftest import FACTOR, footprint_means

pytestmark = pytest.mark.ray


def test_every_ion_averages_back_to_its_measurement(fused):
    assert len(fused.ions) == 24
    for mz in fused.ions["mz"]:
        y, image = fused.measured(mz), fused.ion(mz)
        assert isinstance(image, da.Array)
        fine = image.compute()
        assert fine.dtype == np.float32 and fine.shape == (24 * FACTOR, 21 * FACTOR)
        seen = np.repeat(np.repeat(fused.mask, FACTOR, 0), FACTOR, 1)
        np.testing.assert_array_equal(np.isfinite(fine), seen)
        off = np.abs(footprint_means(fine, FACTOR) - y)[fused.mask].max()
        assert off <= 1e-5 * np.nanmax(y)
    assert fused.ions["consistency"].max() <= 1e-5
    assert fused.ions["consistency"].min() > 0  # written by the check, not left at its initial zero


def test_mask_is_the_phantoms(fused, phantom):
    np.testing.assert_array_equal(fused.mask, phantom.mask())


def test_some_ions_carry_detail_that_interpolation_does_not(fused):
    ions = fused.ions
    assert (ions["informed"] == "stain-informed").any() and (ions["informed"] == "smooth").any()
    assert (ions["gate"][ions["informed"] == "smooth"] <= 0.05).all()
    assert zarr.open_group(fused.path, mode="r")["detail/0"][:].any()


def test_levels_are_averages_and_one_is_the_measurement(fused, monkeypatch):
    mz = float(fused.ions["mz"][0])
    full = np.asarray(fused.ion(mz), np.float64)
    for level in (1, 2):
        got = fused.ion(mz, level=level).compute()
        assert got.shape == (24 * FACTOR >> level, 21 * FACTOR >> level)
        np.testing.assert_allclose(got, footprint_means(full, 2**level), rtol=1e-5, atol=1e-5 * np.nanmax(full))
    monkeypatch.setattr(IonDecoder, "window", lambda *_: pytest.fail("nothing has to be decoded"))
    np.testing.assert_array_equal(fused.ion(mz, level=2), fused.measured(mz))
    with pytest.raises(InputError, match="level 9"):
        fused.ion(mz, level=9)


def test_levels_with_odd_edges_are_averages_of_level_0(fused):
    """96 x 84 pixels: 84 is no multiple of 8, so levels 3 to 5 end in partial pixels."""
    deep = deepfere.open(fused.path)
    deep.levels = 6
    mz = float(fused.ions["mz"][0])
    for values in (deep.ion, deep.uncertainty):
        for level in (3, 4, 5):
            if values == deep.ion:
                full = values(mz).compute().astype(np.float64)
            else:
                # The variance that pixels of this size have, averaged; only then the root.
                block = partial(variance_block, level=level)
                full = deep._lazy(0, 0, block).compute().astype(np.float64)
            side = 2**level
            padded = np.pad(full, [(0, -n % side) for n in full.shape], constant_values=np.nan)
            h, w = padded.shape
            blocks = padded.reshape(h // side, side, w // side, side)
            seen = np.isfinite(blocks).any((1, 3))
            got = values(mz, level=level).compute()
            np.testing.assert_array_equal(np.isfinite(got), seen)
            wanted = np.nansum(blocks, (1, 3))[seen] / np.isfinite(blocks).sum((1, 3))[seen]
            wanted = wanted if values == deep.ion else np.sqrt(wanted)
            np.testing.assert_allclose(got[seen], wanted, rtol=1e-5)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 3e7])
def test_detail_in_any_unit_fits_half_precision(tmp_path, unit):
    images = unit * np.random.default_rng(0).standard_normal((2, 30, 30))
    images[1] = 0
    np.savez(tmp_path / "arrays.npz", factors=images, mask=np.ones((30, 30), bool))
    scale = np.array(detail_scale(SimpleNamespace(arrays=tmp_path / "arrays.npz")))
    stored = (images / scale[:, None, None]).astype(np.float16).astype(np.float64) * scale[:, None, None]
    np.testing.assert_allclose(stored, images, rtol=1e-3, atol=1e-6 * unit)
    assert scale[1] == 1.0 and np.log2(scale[0]) % 1 == 0 and (unit != 1.0 or scale[0] == 1.0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 8), (2, 3)])
def test_the_variance_around_a_window_is_that_of_the_whole(shape):
    image = np.random.default_rng(0).random(shape)
    whole = pad_edge(local_variance(image))
    for i0, i1 in combinations(range(shape[0] + 1), 2):
        for j0, j1 in combinations(range(shape[1] + 1), 2):
            part = spread(image, Cells(i0, i1, j0, j1))
            np.testing.assert_array_equal(part, whole[i0 : i1 + 2, j0 : j1 + 2])


def test_an_open_result_that_was_replaced_says_so(fused, tmp_path):
    copy = tmp_path / "r.zarr"
    shutil.copytree(fused.path, copy)
    result = deepfere.open(copy)
    mz = float(result.ions["mz"][0])
    lazy = [result.ion(mz), result.uncertainty(mz), result.inferred(mz), result.ion(mz, level=2)]
    for image in lazy:
        image.compute()
    zarr.open_group(copy, mode="r+").attrs["identity"] = "another"
    (copy / "provenance.json").touch()
    for ask in (lambda: result.measured(mz), lambda: result.ion(mz), *(image.compute for image in lazy)):
        with pytest.raises(InputError, match="was replaced by another result; open it again"):
            ask()
    assert deepfere.open(copy).measured(mz).shape == fused.mask.shape


def test_lazy_arrays_outlive_a_change_of_folder(fused, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place.result.parent)
    result = deepfere.open(place.result.name)
    assert result.path == str(place.result)
    mz = float(result.ions["mz"][0])
    lazy, stain = result.ion(mz), result.stain(0)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(lazy.compute(), fused.ion(mz).compute())
    np.testing.assert_array_equal(stain.compute(), fused.stain().compute())
    assert result.provenance == fused.provenance


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("liver.zarr", "liver.html"),
        ("a/liver.zarr/", "a/liver.html"),
        ("liver.x4", "liver.x4.html"),
        ("liver.x8.zarr", "liver.x8.html"),
        ("liver", "liver.html"),
    ],
)
def test_files_beside_a_result_have_names_of_their_own(path, file):
    assert beside(path, ".html") == Path(file)
    assert beside(".", ".html").name.endswith(".html")


def test_ions_are_found_within_the_tolerance_only(fused):
    mz = float(fused.ions["mz"][5])
    np.testing.assert_array_equal(fused.measured(mz * (1 + 3e-6)), fused.measured(mz))
    with pytest.raises(InputError, match=rf"nearest is {mz:.5f}"):
        fused.ion(mz * (1 + 50e-6))
    assert fused.ion(mz * (1 + 50e-6), ppm=60).shape == fused.ion(mz).shape
    with pytest.raises(InputError, match="no ion"):
        fused.ion(-1.0)
    for wrong in ("798.5", [mz, mz]):
        with pytest.raises(InputError, match="is no number"):
            fused.ion(wrong)
    for level in (1.5, 1.0, "a", -2000):
        for values in (fused.ion, fused.uncertainty, fused.inferred):
            with pytest.raises(InputError, match=f"level {level}"):
                values(mz, level=level)


def test_uncertainty_is_a_standard_deviation(fused):
    for mz in fused.ions["mz"][::6]:
        sd = fused.uncertainty(mz).compute()
        seen = np.repeat(np.repeat(fused.mask, FACTOR, 0), FACTOR, 1)
        assert np.isfinite(sd[seen]).all() and (sd[seen] >= 0).all() and np.isnan(sd[~seen]).all()
        # Counting noise: where nothing was counted for pixels around, nothing is the sharpest estimate.
        counted = np.repeat(np.repeat(np.nan_to_num(fused.measured(mz)) > 0, FACTOR, 0), FACTOR, 1)
        assert (sd[counted] > 0).all()
        assert np.median(sd[seen]) < np.nanmax(fused.measured(mz))


def test_the_denoised_mode_averages_back_to_less_noise(fused):
    changed = 0
    for mz in fused.ions["mz"][::5]:
        cells, image = np.asarray(fused._group["denoised"][fused.index(mz)]), fused.ion(mz, denoised=True).compute()
        assert np.nanmin(image) >= 0
        np.testing.assert_array_equal(np.isfinite(image), np.isfinite(fused.ion(mz).compute()))
        off = np.abs(footprint_means(np.nan_to_num(image), FACTOR) - cells)[fused.mask].max()
        assert off <= 1e-5 * cells.max()
        changed += not np.allclose(cells[fused.mask], fused.measured(mz)[fused.mask], rtol=1e-3)
    assert changed
    assert fused.ion(mz, denoised=True, level=1).shape == fused.ion(mz, level=1).shape
    assert fused.ions["noise_share"].between(0, 1).all()


def test_uncertainty_falls_with_the_pixel_size(fused):
    mz = float(fused.ions["mz"][0])
    medians = [float(np.nanmedian(fused.uncertainty(mz, level=k).compute())) for k in range(fused.levels)]
    assert len(medians) > 1
    assert all(fine > coarse > 0 for fine, coarse in pairwise(medians))


def test_the_alignment_is_the_true_one(fused, phantom):
    points = phantom.spec.grid.centres_um()[phantom.mask()]
    truth = phantom.alignment()
    error = np.linalg.norm(fused.alignment.map(points) - truth.map(points), axis=1) / phantom.spec.pitch_um
    assert np.median(error) < 0.35
    assert fused.alignment.evidence["flip"] == truth.evidence["flip"]
    np.testing.assert_array_equal(fused.alignment_start.matrix, np.eye(2))  # the search begins upright


def test_the_stain_lies_on_the_section_grid(fused):
    stain = fused.stain().compute()
    assert stain.shape == (3, 24 * FACTOR, 21 * FACTOR) and stain.dtype == np.uint8
    assert stain.std() > 5
    overview, mpp_um = fused.overview()
    assert overview.shape[2] == 3 and min(mpp_um) >= 2.0
    assert fused.artefacts().shape == overview.shape[:2] and not fused.artefacts().any(), "nothing is torn or folded"
    assert fused.provenance["artefacts"]["masked"] == []


def test_the_result_says_what_made_it(fused, place, phantom):
    told = fused.provenance
    assert told["run"]["uri"] == place.tracking and len(told["run"]["run_id"]) == 32
    assert told["model"]["name"] == "deepfere" and told["model"]["version"] == "1"
    assert told["config"]["train"]["steps"] == 4
    assert set(told["inputs"]) == {"msi", "slide"}
    assert told["section"]["slide"] == str(phantom.slide)
    stages = {"ingest", "align", "tile", "learn", "reconstruct"}
    assert stages <= set(told["timings_s"])


def test_generic_readers_find_images_of_the_right_size(fused):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader
    from ome_zarr_models.v05 import BioFormats2Raw, Image

    root = zarr.open_group(fused.path, mode="r")
    assert BioFormats2Raw.from_zarr(root).attributes.ome.bioformats2raw_layout == 3
    series = root["OME"].attrs["ome"]["series"]
    assert series == ["detail", "stain"]
    for name in series:
        (multiscale,) = Image.from_zarr(root[name]).attributes.ome.multiscales
        assert [(a.name, a.unit) for a in multiscale.axes] == [
            ("c", None),
            ("y", "micrometer"),
            ("x", "micrometer"),
        ]
        for level, dataset in enumerate(multiscale.datasets):
            pixel = 50.0 / FACTOR * 2**level
            scale, translation = dataset.coordinateTransformations
            assert scale.scale == [1.0, pixel, pixel]
            assert translation.translation == [0.0, pixel / 2, pixel / 2]
        (node,) = Reader(parse_url(f"{fused.path}/{name}"))()
        assert [tuple(d.shape[1:]) for d in node.data] == [(96, 84), (48, 42), (24, 21)]


def test_open_refuses_what_is_no_result(fused, phantom, tmp_path):
    with pytest.raises(InputError, match="not a result"):
        deepfere.open(f"{fused.path}/measured")
    with pytest.raises(InputError, match="does not exist"):
        deepfere.open(tmp_path / "nothing.zarr")
    with pytest.raises(InputError, match="does not exist"):
        deepfere.open("n" * 300)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    for other in (tmp_path / "folder", tmp_path / "file", f"{fused.path}/detail/0"):
        with pytest.raises(InputError, match="not a Zarr v3 group"):
            deepfere.open(other)
    for text in ("{", "[]", '{"zarr_format": 3, "node_type": "group", "attributes": {}}x'):
        (tmp_path / "folder" / "zarr.json").write_text(text)
        with pytest.raises(InputError, match=r"cannot be read|not a Zarr v3 group") as caught:
            deepfere.open(tmp_path / "folder")
        assert "\n" not in str(caught.value) and str(tmp_path / "folder") in str(caught.value)
    assert deepfere.open(fused.path).factor == FACTOR
    np.testing.assert_allclose(
        deepfere.open_measured(f"{fused.path}/measured").grid.pitch_um, phantom.spec.grid.pitch_um
    )
