"""Stain types of a section: found on a sample of its fine pixels, and averaged over footprints like every feature."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.frame import Alignment
from deepfere.model.fit import Evidence
from deepfere.model.guide import Cells, GuideSpec, features_of
from deepfere.model.stain_types import StainTypes, type_count
from deepfere.pipeline.prepare import Prepared
from deepfere.pipeline.tile import load_plan
from deepfere.tiling.cache import PlaneReader

SAMPLED_CELLS = 256
"""Measured pixels whose fine pixels are looked at, drawn from those that the slide covers."""
SAMPLED_PX = 16_384
"""Fine pixels that are kept of them."""


def typed_spec(prep: Prepared, problem: Evidence, alignment: Alignment, seed: int) -> GuideSpec:
    """The section's guide at the smoothings that were chosen, with its stain types if it supports some.

    Args:
        prep: The section, its planes cached.
        problem: Its reduced-scale problem without types.
        alignment: Section to slide.
        seed: Of the types' first centres.
    """
    first, *more = problem.choice.distinct
    spec = replace(load_plan(prep.folder), smoothing_pitch=first, more_pitch=tuple(more))
    count = type_count(int(problem.mask.sum()))
    if count == 0:
        return spec
    samples = _samples(spec, alignment, PlaneReader(str(prep.folder.planes), spec), problem.mask, seed)
    return replace(spec, types=StainTypes.find(samples, count, seed))


def _samples(
    spec: GuideSpec, alignment: Alignment, planes: PlaneReader, mask: NDArray[np.bool_], seed: int
) -> NDArray[np.float64]:
    """Features (N, F) of fine pixels inside some covered measured pixels."""
    where = np.argwhere(mask)
    # Drawn, not every n-th: on a full grid a stride that divides its width would look at a few columns alone.
    drawn = np.random.default_rng([seed, 12]).permutation(len(where))[:SAMPLED_CELLS]
    chosen = where[np.sort(drawn)]
    each = max(1, SAMPLED_PX // len(chosen))
    step = max(1, spec.factor**2 // each)
    out = []
    with torch.inference_mode():
        for n, (i, j) in enumerate(chosen.tolist()):
            features, _ = features_of(replace(spec, more_pitch=()), planes, alignment, Cells(i, i + 1, j, j + 1))
            # Another offset in every cell: with the same one a stride would pick the same columns.
            out.append(features.flatten(1)[:, n % step :: step].T.double().numpy())
    return np.concatenate(out)
