"""The stage that decodes the slide: base planes into the cache, and their averages over measured pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.alignment.score import tissue_shown
from deepfere.cluster import Journal
from deepfere.config import Config, digest
from deepfere.frame import Alignment
from deepfere.model.artefacts import Artefacts
from deepfere.model.features import StainReference
from deepfere.model.guide import GuideSpec
from deepfere.model.transfer import SMOOTHINGS_PITCH
from deepfere.pipeline.overview import section_slide
from deepfere.pipeline.prepare import Prepared, check_cover, load_alignment, measured_overview
from deepfere.pipeline.workspace import Progress, SectionFolder, Workspace, write_json
from deepfere.places import Place, reading
from deepfere.readers.slide import Reading
from deepfere.readers.slide_damaged import NO_DAMAGE, DamagedTiles
from deepfere.reconstruction.shards import CacheWorker, PoolWorker
from deepfere.reconstruction.whole import check_there, lost, unsound_phases
from deepfere.rows import Phase, Phases
from deepfere.store import create_array, open_group
from deepfere.tiling.cache import CacheSpec, create_cache, distinct_native_tiles, doubt_of, is_cache, slide_of
from deepfere.tiling.plan import group_shards, needed_shards, plan_planes, plan_windows

POOL_PX = 1024
FEW = 2
"""So few windows are averaged in the process that asks: starting workers would cost more."""


def guide_spec(prep: Prepared, inputs: dict[str, str], work: Workspace, config: Config) -> tuple[GuideSpec, CacheSpec]:
    """Geometry of the section's guide and the cache of its planes, from the slide and the alignment stage.

    Its smoothing is the widest that learning may choose: what is cached reaches far enough for all.
    """
    hr = prep.measured.grid.refine(prep.factor).pitch_um
    with closing(section_slide(prep.section, config)) as slide:
        mpp_um = slide.mpp_um
        planes = plan_planes(slide.shape_px, mpp_um, hr)
        # Workers take the reader that was chosen here: what was proven equal once is not proven again.
        chosen = Reading.of(slide, planes.fine_mpp_um)
    reference = StainReference.from_dict(work.facts("align", prep.section.name)["reference"])
    with reading(prep.folder.overview) as file, np.load(file) as data:
        spacing = data["spacing_um"]
        artefacts = Artefacts(data["artefacts"] > 0, (float(spacing[0]), float(spacing[1])))
    marks = hashlib.sha256(np.packbits(artefacts.mask).tobytes()).hexdigest()
    fingerprint = digest([inputs["slide"], mpp_um, planes.to_dict(), reference.to_dict(), marks, chosen.icc])
    url, path = str(prep.folder.planes), str(prep.section.slide)
    cache = CacheSpec(url, path, fingerprint, mpp_um, planes, reference, artefacts, chosen)
    spec = GuideSpec(
        prep.measured.grid,
        prep.factor,
        planes.spacing_um,
        planes.shape_px,
        reference.white,
        max(smoothings_pitch(config)),
    )
    return spec, cache


def tile_phases(
    prep: Prepared,
    inputs: dict[str, str],
    work: Workspace,
    config: Config,
    progress: Progress,
    depth: int | None = None,
) -> Phases:
    """Plan, then decode the slide once into the plane cache, then average over footprints.

    Args:
        prep: The section, aligned.
        inputs: Digests of what the user gave.
        work: Unfinished work.
        config: Settings.
        progress: Called with ("tile", share).
        depth: Of a model that takes the place of training; None takes that of the settings.
    """
    folder, name = prep.folder, prep.section.name
    alignment = load_alignment(folder)
    spec, cache = guide_spec(prep, inputs, work, config)
    margin = reach_um(spec, alignment, 2 ** (depth or config.model.depth) - 1)
    # The published model looks at everything, measured or not.
    wanted = np.ones_like(prep.measured.mask) if config.model.tier == "paper" else prep.measured.mask
    shards = needed_shards(cache.planes, alignment, prep.measured.grid, wanted, margin)
    smoothings = smoothings_pitch(config)
    depends = [inputs, spec.to_dict(), cache.fingerprint, alignment.to_dict(), shards.tolist(), smoothings]
    # Planes do not depend on the alignment: another one, or a wider reach, adds the shards that it needs.
    journal = Journal(folder.journal / "tile", cache.fingerprint)
    units = ["{}/{}".format(*shard) for shard in shards.tolist()]
    doubt = doubt_of(cache.url)
    if work.done("tile", digest(depends), name) is not None and (
        not is_cache(cache) or doubt.exists() or lost(cache.url, _of(journal, units))
    ):
        work.forget("tile", name)
    with work.stage("tile", depends, name) as facts:
        if facts is None:
            return
        write_json(folder.plan, {"guide": spec.to_dict(), "planes": cache.planes.to_dict()})
        if not is_cache(cache):
            journal.clear()
            create_cache(cache)
        wrong = yield from unsound_phases(f"checking {name}", cache.url, journal)
        journal.drop({unit for unit, _ in wrong})
        doubt.unlink(missing_ok=True)
        finished = journal.done()
        todo = shards[np.array([unit not in finished for unit in units], bool)]
        groups = group_shards(todo)
        rows = ({"unit": f"{group[0, 0]}/{group[0, 1]}", "shards": group.tolist()} for group in groups)
        counter = _Counter(progress, "tile", len(shards), len(shards) - len(todo), 0.0, 0.7)
        arguments = (cache, str(journal.folder), cache.fingerprint)
        yield Phase(f"tiling {name}", CacheWorker, arguments, rows, len(groups), counter.step)
        made = _of(journal, units)
        damaged = damaged_tiles(cache, shards, made, work.facts("align", name).get("damaged_tiles", []))
        if damaged:
            slide = slide_of(cache)
            extent = slide.shape_px[0] * slide.mpp_um[0], slide.shape_px[1] * slide.mpp_um[1]
            shown = tissue_shown(measured_overview(prep, config), alignment, extent, damaged)
            check_cover(shown, prep.section, damaged)
        yield pool(prep, spec, alignment, progress, folder.pooled, smoothings)
        facts["shards"] = len(shards)
        check_there(cache.url, made)
        facts["slide"] = asdict(cache.reading) | {"native_tiles": native_tiles(cache, shards, made)}
        facts["slide"]["damaged_tiles"] = damaged.places
        told = [damaged.warning()] if damaged else []
        if config.slide.icc != cache.reading.icc:
            told.append(f"slide.icc={config.slide.icc}: the slide carries no profile; its colours are as stored")
        if told:
            facts["warnings"] = told


def _of(journal: Journal, units: list[str]) -> dict[str, dict[str, Any]]:
    """What a journal says of the units that are wanted; one that it does not know has no record to hold."""
    finished = journal.done()
    return {unit: finished.get(unit, {}) for unit in units}


def native_tiles(
    cache: CacheSpec, shards: NDArray[np.int64], finished: dict[str, dict[str, Any]]
) -> dict[str, int] | None:
    """How many native tiles the shards took, and how many different ones; None where the reader does not count.

    Args:
        cache: The slide and its planes.
        shards: (n, 2).
        finished: Their journal.
    """
    told = [finished["{}/{}".format(*shard)].get("decoded") for shard in shards.tolist()]
    decoded = [int(count) for count in told if count is not None]
    if not decoded or len(decoded) < len(told):
        return None
    return {"decoded": sum(decoded), "distinct": distinct_native_tiles(cache, shards)}


def damaged_tiles(
    cache: CacheSpec, shards: NDArray[np.int64], finished: dict[str, dict[str, Any]], known: Iterable[Any]
) -> DamagedTiles:
    """Native tiles that the shards lack, and those that are known already.

    Args:
        cache: The slide and its planes.
        shards: (n, 2).
        finished: Their journal.
        known: Level, row and column of each.
    """
    told = [finished["{}/{}".format(*shard)].get("damaged", []) for shard in shards.tolist()]
    places = list(chain(known, *told))
    return DamagedTiles.of(slide_of(cache), places) if places else NO_DAMAGE


def reach_um(spec: GuideSpec, alignment: Alignment, network_px: int) -> float:
    """How far on the slide the detail of a measured pixel depends on the stain, slide micrometres.

    One pixel of projection, the network's and the smoothing's context, at the corner, stretched by the
    alignment; half a pixel for the joint registration to move; and the planes' own interpolation.
    """
    context = 1.5 + (network_px + spec.radius_px + 1) / spec.factor
    pitch = float(np.hypot(*spec.grid.pitch_um))
    return context * pitch * alignment.max_stretch(spec.grid.extent_um) + 3 * max(spec.spacing_um)


def smoothings_pitch(config: Config) -> tuple[float, ...]:
    """Smoothings of the stain features that are tried, in measured pixels; one if the settings fix it."""
    fixed = config.model.smoothing_pitch
    return SMOOTHINGS_PITCH if fixed is None else (fixed,)


def pool(
    prep: Prepared,
    spec: GuideSpec,
    alignment: Alignment,
    progress: Progress,
    out: Place,
    smoothings: tuple[float, ...],
) -> Phase:
    """Footprint averages of the stain features, types included, under an alignment -> ``out`` (S F + 1, ny, nx)."""
    folder, grid = prep.folder, prep.measured.grid
    side = max(1, POOL_PX // spec.factor)
    group = open_group(out, "w")
    count = len(smoothings) * spec.count + 1
    create_array(
        group,
        "pooled",
        (count, *grid.shape_px),
        "float64",
        (count, side, side),
        fill_value=0.0,
        dimension_names=("feature", "y", "x"),
    )
    windows = plan_windows(grid, prep.measured.mask, side)
    rows = [{"unit": f"{c.i0}/{c.j0}", "cells": [c.i0, c.i1, c.j0, c.j1]} for c in windows]
    arguments = (spec.to_dict(), alignment.to_dict(), str(folder.planes), str(out), list(smoothings))
    counter = _Counter(progress, "tile", len(rows), 0, 0.7, 1.0)
    return Phase(f"averaging {prep.section.name}", PoolWorker, arguments, rows, len(rows), counter.step)


def read_pooled(path: Place, smoothings: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pooled features (S, F, ny, nx) at every one of so many smoothings, and cover (ny, nx)."""
    array: Any = open_group(path, "r")["pooled"]
    values = np.asarray(array[:])
    return values[:-1].reshape(smoothings, -1, *values.shape[1:]), values[-1]


def load_plan(folder: SectionFolder) -> GuideSpec:
    """The guide geometry that the plane cache was made for."""
    return GuideSpec.from_dict(json.loads(folder.plan.read_text())["guide"])


class _Counter:
    def __init__(self, progress: Progress, stage: str, total: int, done: int, low: float, high: float) -> None:
        self._tell = lambda n: progress(stage, low + (high - low) * n / max(total, 1))
        self._done = done

    def step(self, record: dict[str, Any]) -> None:
        self._done += record.get("shards", 1)
        self._tell(self._done)
