"""Reconstruction: create the result, fill its shards, build the pyramids, seal it with metadata last."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deepfere import __version__
from deepfere.cluster import Journal, connect, run_rows
from deepfere.config import Config, digest
from deepfere.frame import Alignment
from deepfere.model.artefacts import ARTEFACTS
from deepfere.model.denoise import Denoised
from deepfere.model.fit import SectionFit
from deepfere.pipeline.check import check_ions, checked_whole
from deepfere.pipeline.claim import attributes_of, make_room, publish
from deepfere.pipeline.learn import load_fit
from deepfere.pipeline.prepare import Prepared
from deepfere.pipeline.workspace import Progress, Workspace, write_json
from deepfere.places import Place, UrlPath, copy_file, copy_tree, reading, writing
from deepfere.reconstruction.inferred import section_shares
from deepfere.reconstruction.ome import AXIS_NAMES, level_shapes, multiscale
from deepfere.reconstruction.pyramid import build_pyramid
from deepfere.reconstruction.result import FORMAT, FORMAT_VERSION, Result, sealing
from deepfere.reconstruction.shards import DetailWorker, SectionModel
from deepfere.store import create_array, open_group, remove, settle, sync
from deepfere.tiling.plan import ShardGrid


@dataclass(frozen=True)
class Outcome:
    """What the provenance records besides settings.

    Attributes:
        identity: Hash of inputs and settings.
        inputs: Digests of the inputs.
        run: MLflow run: uri, id, experiment (empty when tracking is off).
        model: Registered model: name and version, or empty.
        warnings: What the user should know.
    """

    identity: str
    inputs: dict[str, str]
    run: dict[str, str]
    model: dict[str, str]
    warnings: list[str]


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


def reconstruct_stage(
    prep: Prepared, out: Place, depends: Any, outcome: Outcome, work: Workspace, config: Config, progress: Progress
) -> Result:
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
    made = out if isinstance(out, UrlPath) else prep.folder.result
    model = json.loads(prep.folder.model.read_text())
    fit = load_fit(prep.folder)
    f, grid = prep.factor, prep.measured.grid
    shards = ShardGrid.plan(grid, f, config.reconstruct.chunk_px, config.reconstruct.shard_px)
    power_of_two = f & (f - 1) == 0
    shapes = level_shapes(shards.shape_px, least=(f.bit_length() if power_of_two else 1))
    guided = config.guide and model["tier"] != "T0" and bool(fit.factor_gate.any())
    parts = [model["alignment"], model["guide"], fit.weights.tolist(), fit.factor_gate.tolist()]
    fingerprint = digest([depends, parts, shards.shard_px])
    journal = Journal(prep.folder.journal / "reconstruct", fingerprint)
    stands = attributes_of(made)
    # A complete one that stands there is to be replaced: else nobody would have come here.
    begun = stands.get("identity") == outcome.identity and stands.get("complete") is not True
    if not begun:
        work.forget("reconstruct", prep.section.name)
    with work.stage("reconstruct", [fingerprint], prep.section.name) as facts:
        if facts is not None:
            finished = journal.done()
            pyramid = Journal(prep.folder.journal / "pyramid", fingerprint)
            if not finished or not begun:
                journal.clear()
                pyramid.clear()
                _create(made, shards, shapes, len(fit.factor_gate), config, outcome.identity)
                finished = {}
            if config.guide:
                _shards(prep, made, shards, model, journal, finished, fit, config, progress, guided)
            else:
                progress("reconstruct", 0.7)
            images = ["detail", "stain"] if config.guide else ["detail"]
            facts["uncovered_px"] = sum(record["uncovered"] for record in journal.done().values())
            if config.guide:
                tell = lambda done, total: progress("reconstruct", 0.7 + 0.15 * done / max(total, 1))  # noqa: E731
                build_pyramid(str(made), images, len(shapes), pyramid, tell)
    _seal(prep, made, shards, shapes, model, fit, outcome, work, config, progress)
    publish(made, out)
    progress("reconstruct", 1.0)
    return Result(str(out))


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


def _shards(
    prep: Prepared,
    out: Place,
    shards: ShardGrid,
    model: dict[str, Any],
    journal: Journal,
    finished: dict[str, Any],
    fit: SectionFit,
    config: Config,
    progress: Progress,
    guided: bool,
) -> None:
    rows_n, cols_n = shards.shards
    rows = []
    for r in range(rows_n):
        for c in range(cols_n):
            cells = shards.cells(r, c)
            if prep.measured.mask[cells.i0 : cells.i1, cells.j0 : cells.j1].any():
                rows.append({"unit": f"0/{r}/{c}", "row": r, "col": c})
    todo = [row for row in rows if row["unit"] not in finished]
    if not todo:
        return
    connect(config.ray)
    done = len(rows) - len(todo)

    def step(_: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        progress("reconstruct", 0.7 * done / len(rows))

    section = section_model(prep, model)
    if not guided:
        section = replace(section, network=None, state=None)
    scale = detail_scale(fit)
    arguments = (section, str(out), shards, str(journal.folder), journal.fingerprint, scale)
    run_rows(todo, DetailWorker, arguments, what=f"reconstructing {prep.section.name}", on_done=step)


def detail_scale(fit: SectionFit) -> list[float]:
    """Unit of the stored detail planes (K,): factors have unit variance, so 1 fits half precision."""
    return [1.0] * len(fit.factor_gate)


def _seal(
    prep: Prepared,
    out: Place,
    shards: ShardGrid,
    shapes: Any,
    model: dict[str, Any],
    fit: SectionFit,
    outcome: Outcome,
    work: Workspace,
    config: Config,
    progress: Progress,
) -> None:
    """Write what is small, check every ion, and mark the result complete: the last thing written."""
    group: Any = open_group(out, "r+")
    remove(out / "measured")
    copy_tree(prep.folder.measured, out / "measured")
    hr = prep.measured.grid.refine(prep.factor).pitch_um
    count = len(fit.factor_gate)
    labels = [f"detail {k}" for k in range(count)]
    group["detail"].attrs["ome"] = multiscale("detail", hr, len(shapes), labels, "detail planes, factor units")
    if config.guide:
        text = "stain on the section grid"
        group["stain"].attrs["ome"] = multiscale("stain", hr, len(shapes), ["red", "green", "blue"], text)
        with reading(prep.folder.overview) as path, np.load(path) as data:
            rgb, spacing, kinds = data["rgb"], data["spacing_um"], data["artefacts"]
        for name, image in (("overview", rgb), ("artefacts", kinds)):
            if name in group:
                del group[name]
            chunk, axes = (512, 512, 3)[: image.ndim], ("y", "x", "c")[: image.ndim]
            stored = create_array(group, name, image.shape, "uint8", chunk, dimension_names=axes)
            stored[:] = image
            stored.attrs["spacing_um"] = spacing.tolist()
        stored.attrs["kinds"] = list(ARTEFACTS)
        with writing(out / "alignment.json") as path:
            Alignment.from_dict(model["alignment"]).save(path)
        copy_file(prep.folder.alignment_start, out / "alignment_start.json")
    with reading(prep.folder.denoised) as path:
        denoised = Denoised.load(path)
    side = [min(512, n) for n in denoised.images.shape[1:]]
    if "denoised" in group:
        del group["denoised"]
    stored = create_array(
        group, "denoised", denoised.images.shape, "float32", (1, *side), dimension_names=("ion", "y", "x")
    )
    stored[:] = denoised.images
    basis = group.require_group("basis")
    arrays = {
        "loadings": fit.basis,
        "gate": fit.ion_gate,
        "held_out_r2": fit.ion_r2,
        "null_r2": fit.ion_null_r2,
        "null_mean_r2": fit.ion_null_mean,
        "positivity": fit.positivity,
        "factor_gate": fit.factor_gate,
        "factor_r2": fit.factor_r2,
        "detail_scale": np.asarray(detail_scale(fit)),
        "weights": fit.weights,
        "noise_share": denoised.noise_share,
        "chi_square": denoised.chi_square,
        "consistency": np.zeros(len(fit.ion_gate)),
        "inferred_share": np.zeros(len(fit.ion_gate)),
    }
    for name, values in arrays.items():
        _small(basis, name, values)
    _small(group.require_group("uncertainty"), "noise_model", fit.uncertainty)
    series = ["detail", "stain"] if config.guide else ["detail"]
    group.require_group("OME").attrs["ome"] = {"version": "0.5", "series": series}
    attrs = {
        "ome": {"version": "0.5", "bioformats2raw.layout": 3},
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": outcome.identity,
        "factor": prep.factor,
        "levels": len(shapes),
        "chunk_px": shards.chunk_px,
        "normalisation": config.ingest.normalisation,
        "informed": fit.informed(),
        "tier": model["tier"],
        "exact": not model.get("known"),
    }
    group.attrs.update(attrs)
    whole = checked_whole(prep.measured.ions.size * prep.factor**2)
    _provenance(prep, out, model, fit, outcome, work, config, whole)
    # Checked through the public reader, which otherwise refuses unfinished results.
    with sealing(out):
        worst = check_ions(Result(str(out)), whole, config.seed, progress)
        shares, group.attrs["inferred_share"] = section_shares(Result(str(out)), shards.chunk_px)
    _small(basis, "consistency", worst)
    _small(basis, "inferred_share", shares)
    settle(out)
    group.attrs["complete"] = True
    sync(out / "zarr.json")


def _small(group: Any, name: str, values: Any) -> None:
    values = np.asarray(values)
    if name in group:
        del group[name]
    shape = values.shape
    array = create_array(group, name, shape, values.dtype, tuple(max(1, n) for n in shape))
    array[...] = values


def _provenance(
    prep: Prepared,
    out: Place,
    model: dict[str, Any],
    fit: SectionFit,
    outcome: Outcome,
    work: Workspace,
    config: Config,
    whole: bool,
) -> None:
    from importlib.metadata import version

    packages = ("ray", "torch", "zarr", "numpy", "openslide-python", "imagecodecs", "pyimzml", "mlflow")
    notes = list(outcome.warnings)
    for stage in ("ingest", "tile"):
        notes += work.facts(stage, prep.section.name).get("warnings", [])
    facts = work.facts("align", prep.section.name) if config.guide else {}
    for name, what in (("ink_share", "ink or the like"), ("damage_share", "torn or folded, by the measurement's word")):
        if facts.get(name, 0.0) > 0:
            notes.append(f"{100 * facts[name]:.1f} % of what is stained on the slide is {what}, and is not used")
    uncovered = work.facts("reconstruct", prep.section.name).get("uncovered_px", 0)
    if uncovered:
        notes.append(
            f"the slide does not show {uncovered} of {int(prep.measured.mask.sum())} measured pixels: "
            "they are plain interpolation"
        )
    if not whole:
        notes.append("agreement with the measurement was checked in one window per ion, not on all pixels")
    if model.get("known"):
        notes.append(
            "images of the published model (model.tier=paper): averaged over measured pixels they are not the "
            "measurement (ions: consistency says how far off they are), no held-out tissue judged them, and the "
            "uncertainty is that of plain interpolation"
        )
    forced = prep.section.alignment or prep.section.landmarks
    if config.guide and not fit.ion_gate.any():
        notes.append(
            "the stain informs no ion"
            + (" at the alignment that was given" if forced else "")
            + ": the result is plain interpolation"
        )
    write_json(
        out / "provenance.json",
        {
            "identity": outcome.identity,
            "section": prep.section.model_dump(mode="json"),
            "inputs": outcome.inputs,
            "slide": work.facts("tile", prep.section.name).get("slide"),
            "config": config.resolved(),
            "versions": {"deepfere": __version__, "python": platform.python_version()}
            | {name: version(name) for name in packages},
            "model": {
                "tier": model["tier"],
                **outcome.model,
                "notes": model["notes"],
                "stain_types": model["guide"] and model["guide"]["types"],
            },
            "run": outcome.run,
            "threads_per_worker": 1,
            "uncovered_px": uncovered,
            "artefacts": {"masked": facts.get("artefacts", []), "candidates_left_in": facts.get("left_in", 0)},
            "consistency_checked": "all" if whole else "windows",
            "timings_s": work.timings_s(),
            "warnings": notes,
        },
    )
