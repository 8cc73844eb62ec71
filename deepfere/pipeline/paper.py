"""The published model as a tier: trained for one section whole, its images taken as they are.

What the pipeline does about it: the slide comes in through the section's alignment, and leading factors stand in the
place of the published embedding, or the ion itself where there is one. What it does not do: project, gate, or keep
positive. Unfinished training goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.config import Config, digest
from deepfere.frame import Alignment
from deepfere.measured.factors import Factors
from deepfere.measured.operator import fill_missing, upsample
from deepfere.model.features import FEATURES
from deepfere.model.fit import SectionFit, select_positivity
from deepfere.model.guide import Cells, GuideSpec, stain_of
from deepfere.model.paper import Recipe, Training
from deepfere.pipeline.choose import Learned
from deepfere.pipeline.prepare import Prepared, load_alignment
from deepfere.pipeline.tile import load_plan
from deepfere.places import Place, UrlPath, reading, writing
from deepfere.reconstruction.shards import tiles
from deepfere.store import sync
from deepfere.tiling.cache import PlaneReader

CHECKPOINT_EVERY = 20


def recipe(config: Config, channels: int) -> Recipe:
    """The published training for so many channels: its single ion mode for one, its embedding mode for several."""
    one, paper = channels == 1, config.paper
    chosen = paper.ion if one else paper.embedding
    return Recipe(chosen.warm_up, chosen.iterations, chosen.rate, paper.patches, paper.patch_px, not one, config.seed)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many numerical threads of PyTorch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    cells: NDArray[np.float32],
    stain: NDArray[np.float32],
    recipe: Recipe,
    state: Place,
    tell: Callable[[float], None],
    device: str = "cpu",
) -> Training:
    """Train to the end, going on from a checkpoint of the same training.

    Args:
        cells: (K, ny, nx) measured channels, 0 to 1.
        stain: (3, H, W) colours, 0 to 1.
        recipe: How.
        state: Where checkpoints go.
        tell: Called with the share of iterations that is done.
        device: Where.
    """
    content = [hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest() for a in (cells, stain)]
    fingerprint = digest([content, list(astuple(recipe))])
    training = Training(cells, stain, recipe, device)
    known = _checkpoint(state)
    if known is not None and known["fingerprint"] == fingerprint:
        training.load_state(known["training"])
    while training.done < recipe.total:
        training.step()
        if training.done % CHECKPOINT_EVERY == 0 or training.done == recipe.total:
            _save(state, {"fingerprint": fingerprint, "training": training.state()})
        tell(training.done / recipe.total)
    return training


def _save(state: Place, values: dict[str, Any]) -> None:
    if isinstance(state, UrlPath):
        with writing(state) as path:
            torch.save(values, path)
        return
    temporary = state.with_name(f".{state.name}.{os.getpid()}")
    torch.save(values, temporary)
    sync(temporary)
    temporary.replace(state)


def _checkpoint(state: Place) -> dict[str, Any] | None:
    """What `train` saved; None if it is absent or torn."""
    try:
        with reading(state) as path:
            return torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError):
        return None


def section_stain(
    spec: GuideSpec, planes_at: Any, alignment: Alignment
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours (3, H, W) from 0 to 1 of the whole section, and how far the slide covers them (H, W)."""
    f, (ny, nx) = spec.factor, spec.grid.shape_px
    stain, cover = np.ones((3, ny * f, nx * f), np.float32), np.zeros((ny * f, nx * f), np.float32)
    for cells in tiles(Cells(0, ny, 0, nx), f):
        at = (slice(cells.i0 * f, cells.i1 * f), slice(cells.j0 * f, cells.j1 * f))
        colours, seen = stain_of(spec, planes_at, alignment, cells)
        stain[:, *at], cover[at] = colours.numpy() / 255, seen.numpy()
    return stain, cover


def published(
    prep: Prepared, cube: NDArray[np.float32], factors: Factors, config: Config, tell: Callable[[float], None]
) -> Learned:
    """Train the published model on a section; its detail, what it says less P y, goes to ``paper.npz``.

    Args:
        prep: The section, tiled.
        cube: (M, ny, nx) ions.
        factors: The channels.
        config: Settings.
        tell: Called with the share of iterations that is done.
    """
    folder, mask = prep.folder, prep.measured.mask
    spec, alignment = load_plan(folder), load_alignment(folder)
    stain, cover = section_stain(spec, PlaneReader(str(folder.planes), spec), alignment)
    low = factors.images[:, mask].min(1)[:, None, None]
    span = factors.images[:, mask].max(1)[:, None, None] - low
    span = np.where(span > 0, span, 1.0)
    cells = ((fill_missing(factors.images, mask) - low) / span).astype(np.float32)
    how = recipe(config, len(cells))
    # Sums of more threads come out in another order; the pipeline has one.
    with threads(config.paper.threads):
        device = "cuda" if config.train.use_gpu else "cpu"
        training = train(cells, stain, how, folder.paper_state, tell, device)
        images = low + span * training.images()
        affine = training.affine()
    measured = np.repeat(np.repeat(mask, prep.factor, 0), prep.factor, 1)
    detail = (images - upsample(factors.images, prep.factor, mask)) * measured
    with writing(folder.paper) as path:
        np.savez(path, detail=detail.astype(np.float32), cover=cover)
    return Learned("paper", alignment, spec, _fit(cube, mask, factors), _notes(how, affine))


def _fit(cube: NDArray[np.float32], mask: NDArray[np.bool_], factors: Factors) -> SectionFit:
    """All gates open and nothing judged; the uncertainty is that of plain interpolation."""
    ions, count = factors.basis.shape
    _, uncertainty = select_positivity(cube, mask, None, np.zeros((ions, count)))
    unknown = np.full(ions, np.nan)
    return SectionFit(
        weights=np.zeros((len(FEATURES), count)),
        basis=factors.basis,
        factor_gate=np.ones(count),
        factor_r2=np.full(count, np.nan),
        ion_gate=np.ones(ions),
        ion_r2=unknown,
        ion_null_r2=unknown,
        ion_null_mean=unknown,
        positivity=np.zeros(ions, np.int64),
        uncertainty=uncertainty,
        feature_mean=np.zeros(len(FEATURES)),
        feature_sd=np.ones(len(FEATURES)),
    )


def _notes(how: Recipe, affine: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "tier": "paper",
        "mode": "embedding" if how.stain_guides else "ion",
        "warm_up": how.warm_up,
        "iterations": how.iterations,
        "registration": affine.tolist(),
    }
