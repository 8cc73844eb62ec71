"""Sealing a result on the workers: what is small is written, every ion is checked, and it is marked complete last."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from deepfere import __version__
from deepfere.cluster import Journal
from deepfere.config import Config
from deepfere.frame import Alignment
from deepfere.model.artefacts import ARTEFACTS
from deepfere.model.denoise import Denoised
from deepfere.model.fit import SectionFit
from deepfere.pipeline.check import check_ions, checked_whole
from deepfere.pipeline.learn import load_fit
from deepfere.pipeline.prepare import Prepared
from deepfere.pipeline.workspace import SectionFolder, Workspace, write_json
from deepfere.places import Place, copy_file, copy_tree, reading, writing
from deepfere.reconstruction.inferred import section_shares
from deepfere.reconstruction.ome import multiscale
from deepfere.reconstruction.result import FORMAT, FORMAT_VERSION, Result, sealing
from deepfere.reconstruction.whole import check_there
from deepfere.rows import Phase, Phases, Record, Row, RowWorker
from deepfere.store import create_array, open_group, reading_again, remove, settle, sync
from deepfere.tiling.plan import ShardGrid
from deepfere.training.mlflow_store import recorded

IONS = 8
"""Ions that are checked at a time."""


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


@dataclass(frozen=True)
class Unsealed:
    """A result whose images are written, as it travels to the workers.

    Attributes:
        prep: The section.
        out: Where the result is made.
        shards: Its shards.
        levels: Number of levels.
        outcome: For the provenance.
        root: The folder of the unfinished work.
        config: Settings.
        journals: What says which objects its images have.
    """

    prep: Prepared
    out: Place
    shards: ShardGrid
    levels: int
    outcome: Outcome
    root: Place
    config: Config
    journals: tuple[Journal, ...]

    @cached_property
    def model(self) -> dict[str, Any]:
        """What learning decided."""
        return json.loads(self.prep.folder.model.read_text())

    @cached_property
    def fit(self) -> SectionFit:
        """What learning fitted."""
        return load_fit(self.prep.folder)

    @property
    def whole(self) -> bool:
        """Whether all pixels are checked."""
        return checked_whole(self.prep.measured.ions.size * self.prep.factor**2)


def seal_phases(unsealed: Unsealed, scheduler: str, progress: Callable[[float], None]) -> Phases:
    """Write what is small, check every ion, and mark the result complete: the last thing written.

    Args:
        unsealed: The result.
        scheduler: Dask's, for the check (see `check_ions`).
        progress: Called with the share that is done.
    """
    what, count = f"sealing {unsealed.prep.section.name}", len(unsealed.prep.measured.mz)
    yield Phase(what, RestWorker, (unsealed,), [{"unit": "rest"}], 1)
    worst = np.zeros(count)

    def keep(record: Record) -> None:
        if not record["error"]:
            first = record["first"]
            worst[first : first + IONS] = record["worst"]
            progress((first + len(record["worst"])) / count)

    rows = ({"unit": f"ions/{first}", "first": first} for first in range(0, count, IONS))
    yield Phase(what, CheckWorker, (unsealed, scheduler), rows, -(-count // IONS), keep)
    yield Phase(what, CompleteWorker, (unsealed, worst), [{"unit": "complete"}], 1)


class CheckWorker(RowWorker):
    """Checks some ions per row, from number ``first`` on, through the public reader."""

    def __init__(self, unsealed: Unsealed, scheduler: str) -> None:
        self._unsealed, self._scheduler = unsealed, scheduler

    def work(self, row: Row) -> Record:
        """Consistency of the row's ions."""
        one, first = self._unsealed, row["first"]
        ions = range(first, min(first + IONS, len(one.prep.measured.mz)))
        with reading_again(one.out), sealing(one.out):  # which otherwise refuses unfinished results
            worst = check_ions(Result(str(one.out)), one.whole, one.config.seed, ions, self._scheduler)
        return {"first": first, "worst": worst.tolist()}


class CompleteWorker(RowWorker):
    """Writes what the check has found, has the store on disk, and marks it complete."""

    def __init__(self, unsealed: Unsealed, worst: np.ndarray) -> None:
        self._unsealed, self._worst = unsealed, worst

    def work(self, row: Row) -> Record:
        """The whole of it."""
        out = self._unsealed.out
        group: Any = open_group(out, "r+")
        with reading_again(out), sealing(out):
            shares, group.attrs["inferred_share"] = section_shares(Result(str(out)), self._unsealed.shards.chunk_px)
        _small(group["basis"], "consistency", self._worst)
        _small(group["basis"], "inferred_share", shares)
        settle(out)
        # Last of all: a lost shard reads as empty, and nothing else would tell.
        for journal in self._unsealed.journals:
            check_there(out, journal.done())
        group.attrs["complete"] = True
        sync(out / "zarr.json")
        return {}


class RestWorker(RowWorker):
    """Writes all but the images, the check's findings and the mark."""

    def __init__(self, unsealed: Unsealed) -> None:
        self._unsealed = unsealed

    def work(self, row: Row) -> Record:
        """The whole of it."""
        one = self._unsealed
        prep, out, model, fit, config = one.prep, one.out, one.model, one.fit, one.config
        group: Any = open_group(out, "r+")
        remove(out / "measured")
        copy_tree(prep.folder.measured, out / "measured")
        hr = prep.measured.grid.refine(prep.factor).pitch_um
        count = len(fit.factor_gate)
        labels = [f"detail {k}" for k in range(count)]
        group["detail"].attrs["ome"] = multiscale("detail", hr, one.levels, labels, "detail planes, factor units")
        if config.guide:
            text = "stain on the section grid"
            group["stain"].attrs["ome"] = multiscale("stain", hr, one.levels, ["red", "green", "blue"], text)
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
            "detail_scale": np.asarray(detail_scale(prep.folder)),
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
            "identity": one.outcome.identity,
            "factor": prep.factor,
            "levels": one.levels,
            "chunk_px": one.shards.chunk_px,
            "normalisation": config.ingest.normalisation,
            "informed": fit.informed(),
            "tier": model["tier"],
            "exact": not model.get("known"),
        }
        group.attrs.update(attrs)
        _provenance(one)
        return {}


def detail_scale(folder: SectionFolder) -> list[float]:
    """Unit of the stored detail planes (K,): each factor's s.d., so that half precision holds its detail.

    That is 1 for factors of this section or study; those of a registered model are in the intensities that it was
    trained on. A power of two changes no digit.
    """
    with reading(folder.arrays) as path, np.load(path) as data:
        sd = data["factors"][:, data["mask"]].std(1)
    return [2.0 ** round(float(np.log2(s))) if s > 0 else 1.0 for s in sd]


def _small(group: Any, name: str, values: Any) -> None:
    values = np.asarray(values)
    if name in group:
        del group[name]
    shape = values.shape
    array = create_array(group, name, shape, values.dtype, tuple(max(1, n) for n in shape))
    array[...] = values


def _version(package: str) -> str:
    """Of an installed package; a result is not lost for want of its name."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _provenance(one: Unsealed) -> None:
    packages = ("ray", "torch", "zarr", "numpy", "openslide-python", "imagecodecs", "pyimzml", "mlflow")
    prep, model, fit, config, work = one.prep, one.model, one.fit, one.config, Workspace(one.root)
    notes = list(one.outcome.warnings)
    for stage in ("ingest", "tile"):
        notes += work.facts(stage, prep.section.name).get("warnings", [])
    facts = work.facts("align", prep.section.name) if config.guide else {}
    notes += facts.get("warnings", [])
    for name, what in (("ink_share", "ink or the like"), ("damage_share", "torn or folded, by the measurement's word")):
        if facts.get(name, 0.0) > 0:
            share = f"{100 * facts[name]:.1f}" if facts[name] >= 0.0005 else "less than 0.1"
            notes.append(f"{share} % of what is stained on the slide is {what}, and is not used")
    uncovered = work.facts("reconstruct", prep.section.name).get("uncovered_px", 0)
    if uncovered:
        notes.append(
            f"the slide does not show {uncovered} of {int(prep.measured.mask.sum())} measured pixels: "
            "they are plain interpolation"
        )
    if not one.whole:
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
        one.out / "provenance.json",
        {
            "identity": one.outcome.identity,
            "section": prep.section.model_dump(mode="json"),
            "inputs": one.outcome.inputs,
            "slide": work.facts("tile", prep.section.name).get("slide"),
            "config": recorded(config),
            "versions": {"deepfere": __version__, "python": platform.python_version()}
            | {name: _version(name) for name in packages},
            "model": {
                "tier": model["tier"],
                **one.outcome.model,
                "notes": model["notes"],
                "stain_types": model["guide"] and model["guide"]["types"],
            },
            "run": one.outcome.run,
            "threads_per_worker": 1,
            "uncovered_px": uncovered,
            "artefacts": {"masked": facts.get("artefacts", []), "candidates_left_in": facts.get("left_in", 0)},
            "consistency_checked": "all" if one.whole else "windows",
            "timings_s": work.timings_s(prep.section.name),
            "warnings": notes,
        },
    )
