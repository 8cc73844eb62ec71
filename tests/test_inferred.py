"""How much of a picture was inferred from the stain: against a direct computation, on a result written by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepfere
from deepfere.errors import InputError
from deepfere.measured.operator import cell_means, fill_missing
from deepfere.measured.writer import write_measured
from deepfere.model.inferred import contrast, energy_root, footprint
from deepfere.reconstruction import inferred as blocks
from deepfere.reconstruction.inferred import section_shares
from deepfere.reconstruction.result import FORMAT, FORMAT_VERSION, Result
from deepfere.store import open_group

SHAPE = (9, 11)
MZ = np.array([700.0, 710.0, 720.0, 730.0])
K = 2


def make(path: Path, factor: int, gate: list[float], chunk_cells: int = 4, levels: int = 3) -> Result:
    """Four ions (the last one the same everywhere), two detail planes, a hole and a corner not measured."""
    rng = np.random.default_rng(1)
    cube = rng.gamma(2.0, [[[3.0]], [[40.0]], [[0.5]], [[1.0]]], (4, *SHAPE))
    cube[3] = 7.0
    mask = np.ones(SHAPE, bool)
    mask[:2, :2], mask[5, 6] = False, False
    detail = rng.normal(0, 1, (K, SHAPE[0] * factor, SHAPE[1] * factor))
    detail -= np.repeat(np.repeat(cell_means(detail, factor), factor, 1), factor, 2)
    detail *= np.repeat(np.repeat(mask, factor, 0), factor, 1)
    group = open_group(path, "w")
    write_measured(path / "measured", cube, mask, MZ, 50.0, {"tolerance_ppm": 5.0})
    zero = np.zeros(4)
    names = ("held_out_r2", "null_r2", "null_mean_r2", "consistency", "noise_share", "chi_square", "inferred_share")
    basis: dict[str, Any] = dict.fromkeys(names, zero)
    basis |= {"loadings": rng.normal(0, 2, (4, K)) * np.array([[3.0], [40.0], [0.5], [1.0]]), "gate": np.array(gate)}
    basis |= {"detail_scale": np.array([1.0, 0.5]), "positivity": zero.astype(int)}
    for name, values in basis.items():
        group.require_group("basis").create_array(name, data=values)
    chunk = chunk_cells * factor
    planes = detail.astype(np.float16)
    group.require_group("detail").create_array("0", data=planes, chunks=(K, chunk, chunk))
    attrs = {"format": FORMAT, "format_version": FORMAT_VERSION, "factor": factor, "levels": levels}
    attrs |= {"chunk_px": chunk, "normalisation": "none", "informed": ["smooth"] * 4, "complete": True}
    group.attrs.update(attrs | {"inferred_share": 0.0})
    (path / "provenance.json").write_text(json.dumps({"identity": path.name}))
    return Result(path)


def by_hand(result: Result, ions: list[int]) -> np.ndarray:
    """The share at every fine pixel, pixel by pixel and ion by ion, from the formula."""
    f, mask = result.factor, result.mask
    ny, nx = SHAPE
    basis = {name: np.asarray(array[:]) for name, array in result._group["basis"].arrays()}
    planes = np.asarray(result._group["detail"]["0"][:], np.float64)
    fine_mask = mask.repeat(f, 0).repeat(f, 1)
    energy, around = np.zeros((ny * f, nx * f)), np.zeros((ny, nx))
    rows, columns = np.nonzero(mask)
    for m in ions:
        y = np.asarray(result.measured(MZ[m]), np.float64)
        variance = y[mask].var()
        if variance == 0:
            continue
        added = np.tensordot(basis["gate"][m] * basis["loadings"][m] * basis["detail_scale"], planes, axes=1)
        for a in range(ny * f):
            for b in range(nx * f):
                # Overlap of every pixel, as a unit square, with one measured pixel's square centred here.
                total = count = 0.0
                for c in range(max(0, a - f), min(ny * f, a + f + 1)):
                    for d in range(max(0, b - f), min(nx * f, b + f + 1)):
                        reach = [max(0.0, min(f / 2 + 0.5 - abs(k), 1.0)) for k in (a - c, b - d)]
                        weight = reach[0] * reach[1] * fine_mask[c, d]
                        total, count = total + weight * added[c, d] ** 2, count + weight
                energy[a, b] += total / variance / count if count else 0.0
        filled = y.copy()
        for i, j in np.argwhere(~mask):
            nearest = np.argmin((rows - i) ** 2 + (columns - j) ** 2)
            # Equally near ones differ; only pixels beside a hole see them.
            filled[i, j] = y[rows[nearest], columns[nearest]]
        padded = np.pad(filled, 1, mode="edge")
        for i in range(ny):
            for j in range(nx):
                around[i, j] += padded[i : i + 3, j : j + 3].var() / variance + 0.01
    centre = (np.arange(ny * f) + 0.5) / f - 0.5, (np.arange(nx * f) + 0.5) / f - 0.5
    smooth = np.stack([np.interp(centre[1], np.arange(nx), row) for row in around])
    smooth = np.stack([np.interp(centre[0], np.arange(ny), column) for column in smooth.T], axis=1)
    return np.where(fine_mask, energy / (energy + smooth), np.nan)


def far_from_holes(mask: np.ndarray, factor: int) -> np.ndarray:
    """Fine pixels whose measured surroundings hold no filled pixel."""
    from scipy.ndimage import binary_dilation

    clear = ~binary_dilation(~mask, np.ones((5, 5)))
    return clear.repeat(factor, 0).repeat(factor, 1)


@pytest.mark.parametrize("factor", [4, 3])
def test_the_map_is_the_formula(tmp_path, factor):
    result = make(tmp_path / "r.zarr", factor, [1.0, 0.4, 0.0, 0.9])
    clear = far_from_holes(result.mask, factor)
    for ions, mz in (([0, 1, 2, 3], None), ([1], 710.0), ([2], 720.0)):
        got = result.inferred(mz).compute()
        assert got.dtype == np.float32 and got.shape == tuple(n * factor for n in SHAPE)
        want = by_hand(result, ions)
        assert (np.isnan(got) == ~result.mask.repeat(factor, 0).repeat(factor, 1)).all()
        np.testing.assert_allclose(got[clear], want[clear], rtol=1e-5, atol=1e-7)
    everything = result.inferred().compute()
    assert 0.05 < np.nanmin(everything) < np.nanmax(everything) < 1
    # The constant ion has no contrast and no unit: it counts nowhere, though its gate is open.
    alone = result.inferred(730.0).compute()
    assert np.nanmax(alone) == 0.0


def test_a_tile_is_the_whole(tmp_path):
    gate = [1.0, 0.4, 0.0, 0.9]
    small = make(tmp_path / "small.zarr", 4, gate, chunk_cells=2)
    whole = make(tmp_path / "whole.zarr", 4, gate, chunk_cells=16)
    for mz in (None, 700.0):
        tiles, one = small.inferred(mz), whole.inferred(mz)
        assert tiles.numblocks == (5, 6) and one.numblocks == (1, 1)
        np.testing.assert_allclose(tiles.compute(), one.compute(), rtol=1e-6)
    window = small.inferred()[5:23, 9:31].compute()
    np.testing.assert_array_equal(window, small.inferred().compute()[5:23, 9:31])


def test_levels_are_means_and_the_rest_is_refused(tmp_path):
    result = make(tmp_path / "r.zarr", 4, [1.0, 1.0, 1.0, 0.0])
    fine = np.pad(result.inferred().compute(), [(0, 0), (0, 0)])
    mean = np.nanmean(fine.reshape(9, 4, 11, 4), axis=(1, 3))
    np.testing.assert_allclose(result.inferred(level=2).compute(), mean, rtol=1e-5)
    with pytest.raises(InputError, match="level 3"):
        result.inferred(level=3)
    with pytest.raises(InputError, match="no ion within"):
        result.inferred(705.0)
    lazy = pickle.loads(pickle.dumps(result.inferred(700.0)))
    np.testing.assert_array_equal(lazy.compute(), result.inferred(700.0).compute())


def test_closed_gates_infer_nothing(tmp_path, monkeypatch):
    result = make(tmp_path / "r.zarr", 4, [0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(Result, "detail", lambda *_: pytest.fail("detail was read for nothing"))
    values = result.inferred().compute()
    assert np.nanmax(values) == 0.0 and np.isfinite(values).sum() == result.mask.sum() * 16
    shares, total = section_shares(result, 16)
    assert total == 0.0 and (shares == 0).all()


def test_shares_of_the_section(tmp_path, monkeypatch):
    gate = [1.0, 0.4, 0.0, 0.9]
    result = make(tmp_path / "r.zarr", 4, gate)
    shares, total = section_shares(result, 16)
    fine_mask = result.mask.repeat(4, 0).repeat(4, 1)
    planes = np.asarray(result._group["detail"]["0"][:], np.float64)[:, fine_mask]
    sums = np.zeros(2)
    for m in range(4):
        y = fill_missing(np.asarray(result.measured(MZ[m]), np.float64), result.mask)
        local, variance = contrast(y, result.mask)
        basis = result._basis
        added = (gate[m] * basis["loadings"][m] * basis["detail_scale"]) @ planes
        energy, around = (added**2).mean(), local[result.mask].mean()
        assert shares[m] == pytest.approx(energy / (energy + around) if energy else 0.0)
        if variance > 0:
            sums += np.array([energy, around]) / variance
    assert total == pytest.approx(sums[0] / sums.sum())
    assert shares[2] == 0 and 0.1 < shares[1] < shares[0] < 1
    # Of many blocks some are read: a share of the section that is near that of all of it.
    monkeypatch.setattr(blocks, "MOST_BLOCKS", 6)
    few, part = section_shares(result, 8)
    assert part == pytest.approx(total, rel=0.2) and part != total
    np.testing.assert_allclose(few, shares, rtol=0.25)


def test_the_root_stands_for_all_ions():
    rng = np.random.default_rng(2)
    loadings, variance = rng.normal(size=(50, 3)), rng.uniform(0.5, 2, 50)
    variance[7] = 0.0
    root, planes = energy_root(loadings, variance), rng.normal(size=(3, 10))
    assert root.shape == (3, 3)
    counted = variance > 0
    want = (((loadings @ planes) ** 2)[counted] / variance[counted, None]).sum(0)
    np.testing.assert_allclose(((root @ planes) ** 2).sum(0), want)
    assert energy_root(np.zeros((50, 3)), variance).shape[0] == 0
    assert [footprint(f).sum() for f in (1, 2, 3, 8)] == pytest.approx([1.0] * 4)
    assert len(footprint(8)) == 9 and len(footprint(1)) == 1


def test_a_whole_run_says_what_it_inferred(fused):
    """On the shared run: the map follows from what the reconstruction changed, ion by ion."""
    mz = float(fused.ions.sort_values("held_out_r2")["mz"].iloc[-1])
    row = fused.index(mz)
    share = float(fused.ions["inferred_share"].iloc[row])
    image = np.asarray(fused.inferred(mz))
    assert 0.02 < share < 0.9 and share == pytest.approx(np.nanmean(image), abs=0.1)
    closed = fused.ions["gate"] == 0
    assert closed.any() and (fused.ions.loc[closed, "inferred_share"] == 0).all()
    assert 0 < fused.inferred_share < fused.ions["inferred_share"].max()
    again, total = section_shares(fused, int(fused._attrs["chunk_px"]))
    np.testing.assert_allclose(again, fused.ions["inferred_share"])
    assert total == pytest.approx(fused.inferred_share)
    # What positivity steps change is small beside it.
    f, mask = fused.factor, fused.mask.repeat(fused.factor, 0).repeat(fused.factor, 1)
    decoder = fused.decoder(row)
    from deepfere.model.guide import Cells

    whole = Cells(0, fused.mask.shape[0], 0, fused.mask.shape[1])
    added = (decoder.window(whole, fused.detail) - decoder.window(whole, None))[mask]
    local, _ = contrast(fill_missing(fused.measured(mz).astype(np.float64), fused.mask), fused.mask)
    energy = (added**2).mean()
    assert energy / (energy + local[fused.mask].mean()) == pytest.approx(share, rel=0.2) and f > 1
    assert deepfere.open(fused.path).inferred_share == fused.inferred_share
