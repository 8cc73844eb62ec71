"""Reconstruction: create the result, fill its shards, build the pyramids, have it sealed, put it in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.cluster import Journal, connect
from deepfere.config import Config, digest
from deepfere.pipeline.claim import attributes_of, make_room, publish
from deepfere.pipeline.learn import load_fit
from deepfere.pipeline.prepare import Prepared
from deepfere.pipeline.seal import Outcome, Unsealed, detail_scale, seal_phases
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.places import Place, UrlPath
from deepfere.reconstruction.ome import AXIS_NAMES, level_shapes
from deepfere.reconstruction.pyramid import Counts, averaged_from, level_counts, pyramid_phases
from deepfere.reconstruction.result import FORMAT
from deepfere.reconstruction.shards import DetailWorker, SectionModel
from deepfere.reconstruction.whole import row_col, unsound_phases
from deepfere.rows import Phase, Phases, RowWorker
from deepfere.store import create_array, open_group
from deepfere.tiling.plan import ShardGrid


def section_model(prep: Prepared, model: dict[str, Any]) -> SectionModel:
    """The fitted section as the workers need it."""
    deep = model["tier"] == "T2"
    return SectionModel(
        model["guide"],
        model["alignment"],
        str(prep.folder.arrays),
        str(prep.folder.planes),
        model["network"] if deep else None,
        model["state"] if deep else None,
        model.get("known"),
    )


def reconstruct_phases(
    prep: Prepared, out: Place, depends: Any, outcome: Outcome, work: Workspace, config: Config, progress: Progress
) -> Phases:
    """Write the result of one section: made in its work folder, and put in its place when it is complete.

    At a URL, where nothing can be renamed, it is made in its place; its last mark says that it is complete.

    Args:
        prep: The section, learned.
        out: Where the result goes.
        depends: What the shards depend on, for the journals.
        outcome: For the provenance.
        work: Unfinished work.
        config: Settings.
        progress: Called with ("reconstruct", share).
    """
    out = out.resolve()
    made, name = out if isinstance(out, UrlPath) else prep.folder.result, prep.section.name
    model = json.loads(prep.folder.model.read_text())
    fit = load_fit(prep.folder)
    f, grid = prep.factor, prep.measured.grid
    shards = ShardGrid.plan(grid, f, config.reconstruct.chunk_px, config.reconstruct.shard_px)
    power_of_two = f & (f - 1) == 0
    shapes = level_shapes(shards.shape_px, least=(f.bit_length() if power_of_two else 1))
    parts = [model["alignment"], model["guide"], fit.weights.tolist(), fit.factor_gate.tolist()]
    gpu = config.reconstruct.use_gpu
    # Shards of both kinds of processor may differ in the last digit: they do not meet in one result.
    fingerprint = digest([depends, parts, shards.shard_px] + ["cuda"] * gpu)
    journal = Journal(prep.folder.journal / "reconstruct", fingerprint)
    stands = attributes_of(made)
    replacing = out.exists()
    # A complete one at a URL is to be replaced: else nobody would have come here. On a disk it was not moved yet.
    begun = stands.get("identity") == outcome.identity and (made != out or stands.get("complete") is not True)
    pyramid = Journal(prep.folder.journal / "pyramid", fingerprint)
    counts = level_counts(shapes, shards.shard_px, ("detail", "stain"))
    if begun:
        yield from _mended(f"checking {name}", made, journal, pyramid, counts, lambda: work.forget("reconstruct", name))
    else:
        work.forget("reconstruct", name)

    def tell(low: float, high: float) -> Callable[[float], None]:
        return lambda share: progress("reconstruct", low + (high - low) * share)

    with work.stage("reconstruct", [fingerprint], name) as facts:
        if facts is not None:
            finished = journal.done()
            if not finished or not begun:
                journal.clear()
                pyramid.clear()
                _create(made, shards, shapes, len(fit.factor_gate), config, outcome.identity)
            if config.guide:
                connect(config.ray)
                section = section_model(prep, model)
                if model["tier"] == "T0" or not fit.factor_gate.any():
                    section = replace(section, network=None, state=None)
                device = "cuda" if gpu else "cpu"
                scale = detail_scale(prep.folder)
                arguments = (section, str(made), shards, str(journal.folder), fingerprint, scale, device)
                what, mask = f"reconstructing {name}", prep.measured.mask
                yield from shard_phases(what, shards, mask, journal, DetailWorker, arguments, tell(0.0, 0.7))
            # A shard that was done twice counts once.
            facts["uncovered_px"] = sum(record["uncovered"] for record in journal.done().values())
            if config.guide:
                yield from pyramid_phases(str(made), counts, pyramid, f"pyramids of {name}", tell(0.7, 0.85))
    unsealed = Unsealed(prep, made, shards, len(shapes), outcome, work.root, config, (journal, pyramid))
    yield from seal_phases(unsealed, "synchronous" if config.guide else "threads", tell(0.85, 0.99))
    publish(made, out, replacing)
    progress("reconstruct", 1.0)


def _mended(
    what: str, made: Place, journal: Journal, pyramid: Journal, counts: Counts, forget: Callable[[], None]
) -> Phases:
    """Drop what an earlier run recorded and what is not there as it was written, and what was averaged from it."""
    wrong = yield from unsound_phases(what, made, journal)
    above = yield from unsound_phases(what, made, pyramid)
    if not wrong and not above:
        return
    forget()
    units = {unit for unit, _ in above}
    for unit, array in wrong | above:
        if array:
            units.update(averaged_from(array, *row_col(unit), counts))
    # The pyramid's first: as long as a shard below is recorded, the next run finds out about it again.
    pyramid.drop(units)
    journal.drop({unit for unit, _ in wrong})


def shard_phases(
    what: str,
    shards: ShardGrid,
    mask: NDArray[np.bool_],
    journal: Journal,
    worker: type[RowWorker],
    arguments: tuple[Any, ...],
    progress: Callable[[float], None],
) -> Phases:
    """Level 0: the shards that hold a measured pixel and are not done.

    Args:
        what: Name of the work for messages.
        shards: All of them.
        mask: (ny, nx) measured pixels.
        journal: What is done, by ``0/ROW/COLUMN``.
        worker: What fills one, for ``row`` and ``col``.
        arguments: What it is built with.
        progress: Called with the share that is done.
    """
    wanted = shards.measured(mask)
    total = int(wanted.sum())
    for unit in journal.done():
        wanted[tuple(map(int, unit.split("/")[1:]))] = False
    todo = np.argwhere(wanted)
    done = total - len(todo)

    def step(_: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        progress(done / total)

    if len(todo):
        rows = ({"unit": f"0/{r}/{c}", "row": int(r), "col": int(c)} for r, c in todo)
        yield Phase(what, worker, arguments, rows, len(todo), step)


def _create(out: Place, shards: ShardGrid, shapes: Any, count: int, config: Config, identity: str) -> None:
    """Groups and arrays, by one writer before any worker starts; the identity last, so that it stands for all."""
    make_room(out)
    group = open_group(out, "a")
    # Shards without a measured pixel are never written: no detail there, and glass as where the slide ends.
    images = [("detail", count, "float16", 0)] + ([("stain", 3, "uint8", 255)] if config.guide else [])
    for name, channels, dtype, empty in images:
        image = group.create_group(name)
        for level, shape in enumerate(shapes):
            create_array(
                image,
                str(level),
                (channels, *shape),
                dtype,
                (channels, shards.chunk_px, shards.chunk_px),
                (channels, shards.shard_px, shards.shard_px),
                fill_value=empty,
                dimension_names=AXIS_NAMES,
            )
    group.attrs.update({"format": FORMAT, "complete": False, "identity": identity})
