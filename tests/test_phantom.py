from __future__ import annotations

import dataclasses
import hashlib
import re
import uuid
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from deepfere.errors import InputError
from deepfere.phantom import KINDS, Phantom, PhantomSpec, write_phantom
from deepfere.phantom.__main__ import main
from deepfere.phantom.slide import STAIN_VECTORS, level_shapes
from deepfere.phantom.spec import draw_placement

openslide = pytest.importorskip("openslide")

NOISY = PhantomSpec(seed=3, shape_px=(23, 19), slide_mpp_um=2.0)
EXACT = PhantomSpec(seed=4, shape_px=(17, 21), factor=5, slide_mpp_um=2.0, mode="continuous", counts=None)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Phantom:
    return write_phantom(tmp_path_factory.mktemp("noisy"), NOISY)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Phantom:
    return write_phantom(tmp_path_factory.mktemp("exact"), EXACT)


def spectra(phantom: Phantom) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """(row, column) -> (m/z, intensity), read by pyimzML."""
    from pyimzml.ImzMLParser import ImzMLParser

    with ImzMLParser(str(phantom.imzml)) as parser:
        return {(y - 1, x - 1): parser.getspectrum(i) for i, (x, y, _) in enumerate(parser.coordinates)}


def footprint_means(phantom: Phantom) -> np.ndarray:
    """(M, ny, nx) mean of the truth over each measured pixel."""
    (ny, nx), f = phantom.spec.shape_px, phantom.spec.factor
    images = np.stack([phantom.ions(i) for i in range(len(phantom.mz()))])
    return images.reshape(-1, ny, f, nx, f).mean(axis=(2, 4), dtype=np.float64)


def density_on_section(phantom: Phantom, per_pixel: int = 3) -> np.ndarray:
    """Optical density (H, W, 3) of the slide on the section's high-resolution grid, at the true alignment."""
    spec = phantom.spec
    with openslide.OpenSlide(phantom.slide) as slide:
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"), dtype=np.float64)
    fine = spec.grid.refine(spec.factor * per_pixel)
    at = np.floor(phantom.alignment().map(fine.centres_um()) / spec.slide_mpp_um).astype(int)
    assert at.min() >= 0
    assert (at < image.shape[:2]).all(), "the slide does not hold the whole section"
    density = -np.log10(np.maximum(image[at[..., 0], at[..., 1]], 1) / 243)
    h, w = fine.shape_px
    return density.reshape(h // per_pixel, per_pixel, w // per_pixel, per_pixel, 3).mean(axis=(1, 3))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("which", ["noisy", "exact"])
def test_openslide_reads_the_slide_and_its_size(which: str, request: pytest.FixtureRequest) -> None:
    phantom: Phantom = request.getfixturevalue(which)
    shape = draw_placement(phantom.spec)[1]
    with openslide.OpenSlide(phantom.slide) as slide:
        assert slide.dimensions == shape[::-1]
        for axis in ("x", "y"):
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(2.0, rel=1e-6)
        assert slide.level_dimensions == tuple(s[::-1] for s in level_shapes(shape))
        assert slide.level_count >= 2
        assert slide.level_downsamples[1] == pytest.approx(4.0, rel=0.01)


def test_pyramid_levels_are_averages_of_level_0(noisy: Phantom) -> None:
    with openslide.OpenSlide(noisy.slide) as slide:
        base = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"), dtype=np.float64)
        w, h = slide.level_dimensions[1]
        small = np.asarray(slide.read_region((0, 0), 1, (w, h)).convert("RGB"), dtype=np.float64)
    means = base[: 4 * h, : 4 * w].reshape(h, 4, w, 4, 3).mean(axis=(1, 3))
    assert correlation(means, small) > 0.99
    assert correlation(means[:, 1:], small[:, :-1]) < 0.99


def test_large_slides_have_at_least_three_levels() -> None:
    assert len(level_shapes((2501, 2333))) >= 3
    assert len(level_shapes((100_000, 90_001))) >= 5


def test_measurement_is_the_mean_of_the_truth(exact: Phantom) -> None:
    means = footprint_means(exact)
    found = spectra(exact)
    assert set(found) == {(int(r), int(c)) for r, c in np.argwhere(exact.mask())}
    for (row, col), (mz, intensity) in found.items():
        np.testing.assert_array_equal(mz, exact.mz())
        np.testing.assert_array_equal(intensity, means[:, row, col].astype(np.float32))


def test_processed_peaks_scatter_and_counts_scatter_as_poisson(noisy: Phantom) -> None:
    means, true, amplitude = footprint_means(noisy), noisy.mz(), noisy.amplitudes()
    scores, extra, dropped = [], 0, 0
    for (row, col), (mz, intensity) in spectra(noisy).items():
        assert (np.diff(mz) > 0).all()
        assert (intensity > 0).all()
        ppm = 1e6 * (mz[:, None] - true) / true
        peak, ion = np.nonzero(np.abs(ppm) < 2)
        assert len(set(ion)) == len(ion)
        assert np.abs(ppm)[np.abs(ppm) < 10].max() < 2, "a peak that is neither an ion nor clear of them"
        extra += len(mz) - len(ion)
        dropped += len(true) - len(ion)
        counts = intensity[peak] / amplitude[ion] * 400
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
        expected = means[ion, row, col] / amplitude[ion] * 400
        bright = expected > 20
        scores += list((counts[bright] - expected[bright]) / np.sqrt(expected[bright]))
    assert extra > 0
    assert dropped > 0
    assert np.mean(scores) == pytest.approx(0, abs=0.1)
    assert np.std(scores) == pytest.approx(1, abs=0.1)


def test_imzml_states_pixel_size_polarity_and_its_own_checksum(noisy: Phantom, exact: Phantom) -> None:
    for phantom, mode in ((noisy, "processed"), (exact, "continuous")):
        text = phantom.imzml.read_text()
        for accession in ("IMS:1000046", "IMS:1000047"):
            assert re.search(rf'{accession}" name="[^"]+" value="50" [^>]*unitAccession="UO:0000017"', text)
        assert f'name="max count of pixels x" value="{phantom.spec.shape_px[1]}"' in text
        assert f'name="max count of pixels y" value="{phantom.spec.shape_px[0]}"' in text
        assert 'name="positive scan"' in text
        assert f'name="{mode}"' in text
        ibd = (phantom.folder / "section.ibd").read_bytes()
        assert hashlib.sha1(ibd).hexdigest().upper() in text
        assert str(uuid.UUID(bytes=ibd[:16])).upper() in text
        assert str(phantom.folder) not in text


def test_outline_is_irregular_touches_every_border_and_has_holes(noisy: Phantom) -> None:
    mask = noisy.mask()
    for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert side.any()
    assert not mask.all()
    f, (ny, nx) = NOISY.factor, NOISY.shape_px
    tissue = (noisy.labels() > 0).reshape(ny, f, nx, f).mean(axis=(1, 3))
    assert ((tissue == 0) & mask).sum() > 10, "no measured pixel off tissue"
    lost = (tissue > 0.5) & ~mask
    assert 1 <= lost.sum() <= np.ceil(0.01 * mask.size), "only the missing pixels lose tissue"


def test_kinds_flags_and_what_they_follow(noisy: Phantom) -> None:
    kinds = noisy.kinds()
    assert set(kinds) == set(KINDS)
    assert len(kinds) == sum(NOISY.ions_per_kind.values()) == len(noisy.mz())
    assert (np.diff(noisy.mz()) > 0.1).all()
    assert noisy.informed() == [KINDS[kind] for kind in kinds]
    labels, names = noisy.labels(), noisy.class_names()
    assert labels.dtype == np.int8
    cortex, twin = labels == names.index("cortex"), labels == names.index("cortex_twin")
    assert cortex.sum() > 200
    assert twin.sum() > 200
    for index, kind in enumerate(kinds):
        image = noisy.ions(index)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= noisy.amplitudes()[index] * (1 + 1e-6)
        ratio = image[twin].mean() / image[cortex].mean()
        if kind == "twin":
            assert max(ratio, 1 / ratio) > 3
        if kind == "matrix":
            assert image[labels == 0].mean() > 4 * image[labels > 0].mean()
        elif kind != "smooth":
            assert image[labels == 0].mean() < 0.2 * image[labels > 0].mean()


def test_the_twin_class_looks_like_its_neighbour(noisy: Phantom) -> None:
    density, labels, names = density_on_section(noisy), noisy.labels(), noisy.class_names()
    cortex, twin, medulla = (
        density[labels == names.index(name)] for name in ("cortex", "cortex_twin", "inner_medulla")
    )
    spread = cortex.std(axis=0)
    assert (np.abs(cortex.mean(axis=0) - twin.mean(axis=0)) < 0.35 * spread).all()
    assert (np.abs(cortex.mean(axis=0) - medulla.mean(axis=0)) > 0.35 * spread).any()


@pytest.mark.parametrize("which", ["noisy", "exact"])
def test_tissue_on_the_slide_lies_where_the_alignment_says(which: str, request: pytest.FixtureRequest) -> None:
    phantom: Phantom = request.getfixturevalue(which)
    density = gaussian_filter(density_on_section(phantom).mean(axis=-1), 0.7)
    assert correlation(density > 0.05, phantom.labels() > 0) > 0.95


def test_haematoxylin_follows_nuclear_ions_at_the_true_alignment_only(noisy: Phantom) -> None:
    amounts = density_on_section(noisy) @ np.linalg.pinv(STAIN_VECTORS.astype(np.float64))
    fine_um = NOISY.pitch_um / NOISY.factor
    haematoxylin = gaussian_filter(amounts[..., 0], 12.0 / fine_um)
    inside = gaussian_filter((noisy.labels() > 0).astype(float), 3) > 0.99
    offsets = []
    for index in [i for i, kind in enumerate(noisy.kinds()) if kind == "nuclear"]:
        image = noisy.ions(index)[inside]
        there = correlation(haematoxylin[inside], image)
        assert there > 0.8
        moved = {
            by: correlation(np.roll(haematoxylin, by, (0, 1))[inside], image)
            for by in ((2, 0), (-2, 0), (0, 2), (0, -2))
        }
        assert max(moved.values()) < there - 0.05
        # Where a parabola through the three values peaks, in fine pixels.
        for plus, minus in (((2, 0), (-2, 0)), ((0, 2), (0, -2))):
            offsets.append((moved[plus] - moved[minus]) / (2 * there - moved[plus] - moved[minus]))
    assert np.abs(np.mean(np.reshape(offsets, (-1, 2)), axis=0)).max() < 0.2


def test_slide_coordinates_are_exact_to_a_tenth_of_a_fine_pixel(noisy: Phantom) -> None:
    from deepfere.phantom.anatomy import Organ
    from deepfere.phantom.slide import TILE, SlidePainter
    from deepfere.phantom.tissue import Tissue

    for spec in (NOISY, PhantomSpec(seed=9, pitch_um=10.0, slide_mpp_um=0.25)):
        alignment, shape = draw_placement(spec)
        painter = SlidePainter(Tissue(Organ(spec.grid.extent_um, spec.pitch_um, 0)), alignment, shape, spec)
        y, x = painter.section_um(TILE, TILE)
        some = slice(None, None, 15)
        centres = TILE + 0.5 + np.arange(TILE)[some]
        slide = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1) * spec.slide_mpp_um
        error = np.hypot(*np.moveaxis(alignment.unmap(slide) - np.stack([y, x], -1)[some, some], -1, 0)).max()
        assert error < 0.1 * spec.pitch_um / spec.factor


def test_placement_is_drawn_within_its_ranges_and_given_values_win() -> None:
    flips, turns = set(), set()
    for seed in range(12):
        spec = PhantomSpec(seed=seed)
        alignment, shape = draw_placement(spec)
        facts = alignment.evidence
        flips.add(facts["flip"])
        turns.add(round(facts["rotation_deg"] / 90) % 4)
        assert abs((facts["rotation_deg"] + 45) % 90 - 45) <= 15
        assert np.sign(np.linalg.det(alignment.matrix)) == (-1 if facts["flip"] else 1)
        extent = np.asarray(spec.grid.extent_um)
        centre = alignment.map(extent[None] / 2)[0] - np.asarray(shape) / 2
        assert 0.1 <= np.hypot(*centre) / extent.mean() <= 0.3
        affine = dataclasses.replace(alignment, displacement=None)
        points = spec.grid.centres_um()
        bend = np.hypot(*np.moveaxis(alignment.map(points) - affine.map(points), -1, 0)).max()
        assert 0.45 * 50 <= bend <= 1.02 * 50
    assert flips == {True, False}
    assert len(turns) >= 3
    fixed = PhantomSpec(seed=1, flip=False, rotation_deg=0, scale=1, shift_fraction=0, bend_um=0)
    still = draw_placement(fixed)[0]
    np.testing.assert_allclose(still.matrix, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(still.map([[0, 0], [9, 4]]), still.offset_um + np.array([[0, 0], [9, 4]]))


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    small = PhantomSpec(seed=5, shape_px=(7, 6), factor=3, slide_mpp_um=2.0)
    one = write_phantom(tmp_path / "one", small)
    two = write_phantom(tmp_path / "two", small)
    other = write_phantom(tmp_path / "other", dataclasses.replace(small, seed=6))
    for name in ("section.ibd", "section.imzML", "slide.tiff", "truth/ions.npy", "truth/alignment.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name
        assert (one.folder / name).read_bytes() != (other.folder / name).read_bytes(), name


def test_one_chemistry_in_different_tissue(tmp_path: Path) -> None:
    def made(seed: int, chemistry: int | None) -> Phantom:
        shape = (12 + seed, 10)
        spec = PhantomSpec(seed=seed, chemistry=chemistry, shape_px=shape, factor=2, slide_mpp_um=4.0)
        return write_phantom(tmp_path / f"{seed}-{chemistry}", spec)

    one, two, other = made(1, 5), made(2, 5), made(1, 6)
    assert np.array_equal(one.mz(), two.mz()) and one.kinds() == two.kinds()
    assert np.array_equal(one.amplitudes(), two.amplitudes())
    assert not np.array_equal(one.mz(), other.mz())
    # Tissue and placement are the seed's.
    assert np.array_equal(one.labels(), other.labels())
    assert one.alignment().to_dict() == other.alignment().to_dict()
    assert not np.array_equal(one.labels()[:20, :20], two.labels()[:20, :20])


def test_truth_does_not_depend_on_its_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = PhantomSpec(seed=5, shape_px=(9, 8), factor=4, slide_mpp_um=4.0)
    whole = write_phantom(tmp_path / "whole", small)
    monkeypatch.setattr("deepfere.phantom._POINTS_AT_ONCE", 1)
    bands = write_phantom(tmp_path / "bands", small)
    differ = (whole.labels() != bands.labels()).mean()
    assert differ < 0.002
    for index, amplitude in enumerate(whole.amplitudes()):
        np.testing.assert_allclose(np.median(np.abs(whole.ions(index) - bands.ions(index))) / amplitude, 0, atol=2e-3)


def test_neighbouring_tiles_continue_one_another() -> None:
    from deepfere.phantom.anatomy import Organ
    from deepfere.phantom.slide import TILE, SlidePainter
    from deepfere.phantom.tissue import Tissue

    spec = PhantomSpec(seed=2, slide_mpp_um=0.5, sensor_noise=0.0, shift_fraction=0.0)
    alignment, shape = draw_placement(spec)
    painter = SlidePainter(Tissue(Organ(spec.grid.extent_um, 150.0, 2)), alignment, shape, spec)
    row, col = (n // 2 // TILE * TILE for n in shape)
    left, right = (painter.tile(row, c).astype(float) for c in (col, col + TILE))
    seam = np.abs(right[:, 0] - left[:, -1]).mean()
    inside = np.abs(np.diff(right[:, :40], axis=1)).mean()
    assert inside > 0.5, "nothing is painted here"
    assert seam < 1.5 * inside


def test_refuses_to_overwrite_unless_told(tmp_path: Path) -> None:
    small = PhantomSpec(shape_px=(5, 7), factor=1, slide_mpp_um=4.0, ions_per_kind={"class": 2})
    first = write_phantom(tmp_path, small)
    before = first.slide.read_bytes()
    with pytest.raises(InputError, match="exists"):
        write_phantom(tmp_path, dataclasses.replace(small, seed=1))
    assert first.slide.read_bytes() == before
    again = write_phantom(tmp_path, dataclasses.replace(small, seed=1), overwrite=True)
    assert again.spec.seed == 1
    assert again.slide.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["section.ibd", "section.imzML", "slide.tiff", "truth"]
    assert Phantom.open(tmp_path).spec == again.spec


def test_wrong_values_and_folders_are_refused(tmp_path: Path) -> None:
    for wrong in ({"shape_px": (2, 9)}, {"counts": -1.0}, {"ions_per_kind": {"protein": 1}}, {"bend_um": 900.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            PhantomSpec(**wrong)
    with pytest.raises(InputError, match="holds no phantom"):
        Phantom.open(tmp_path)


def test_command_line_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "out"), "--shape", "5", "6", "--factor", "2", "--slide-mpp-um", "4", "--counts", "0"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "section 5/5" in err
    assert re.search(r"slide (\d+)/\1\n", err), "the last tile row is told"
    assert str(tmp_path / "out" / "slide.tiff") in out
    assert Phantom.open(tmp_path / "out").spec.counts is None
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
