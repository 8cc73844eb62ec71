"""The stages as commands on a study: each does what comes before it where that is missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deepfere.cluster import pin_threads
from deepfere.config import Config, digest, load_config
from deepfere.errors import DeepfereError, InputError
from deepfere.frame import Alignment
from deepfere.model.network import network_from_config
from deepfere.pipeline.deep import check_patches
from deepfere.pipeline.fuse import check_output, identity_of, input_digests
from deepfere.pipeline.given import GivenModel
from deepfere.pipeline.learn import learn_stage
from deepfere.pipeline.prepare import Prepared, align_stage, ingest_stage, prepared, tile_stage
from deepfere.pipeline.track import tracked
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.pipeline.write import Outcome, claim_result, reconstruct_stage
from deepfere.reconstruction.result import open
from deepfere.section import load_study

STAGES = ("ingest", "align", "tile", "train", "reconstruct")


def given_model(uri: str, config: Config) -> tuple[GivenModel, dict[str, str]]:
    """Load a registered model (``models:/NAME@ALIAS``, ``models:/NAME/VERSION``).

    Returns:
        The model, and its name and version for the provenance.

    Raises:
        InputError: There is no such model.
    """
    from safetensors.torch import load_file

    from deepfere.training.tracking import load_registered

    loaded = load_registered(uri, config.tracking.uri)
    settings = loaded.config
    network = network_from_config(settings["network"])
    network.load_state_dict(load_file(str(loaded.weights_path)))
    network.eval()
    trained = settings["config"]
    model = GivenModel(
        network,
        np.asarray(settings["mz"], np.float64),
        np.asarray(settings["basis"], np.float64),
        np.asarray(settings["noise_sd"], np.float64),
        list(settings["seen"]),
        int(trained["seed"]),
        float(trained["train"]["held_out"]),
        loaded.weights_sha256,
    )
    return model, {"name": loaded.name, "version": str(loaded.version)}


def run_stage(
    stage: str,
    study: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    factor: int | None = None,
    guide: bool | None = None,
    model: str | None = None,
    overwrite: bool = False,
    progress: Progress,
) -> list[str]:
    """Run a study up to and including one stage; what is done already is not done again.

    Args:
        stage: One of `STAGES`.
        study: Manifest, YAML or CSV.
        out: Working folder; results go to ``OUT/results/NAME.zarr``.
        config: Settings file.
        overrides: ``section.key=value`` strings.
        factor: High-resolution pixels per measured pixel and axis.
        guide: False works without the stain.
        model: Registered model instead of training.
        overwrite: Replace results of other inputs or settings.
        progress: Called with (stage and section, share).

    Returns:
        One line per section on what there is now.

    Raises:
        InputError: The input is wrong.
        DeepfereError: Sections failed; the others are done.
    """
    settings = load_config(config, overrides, factor=factor, guide=guide)
    check_patches(settings)
    sections = load_study(study).sections
    if settings.guide:
        bare = [s.name for s in sections if s.slide is None]
        if bare:
            raise InputError(f"no slide for {', '.join(bare)}", where=study, remedy="give slide, or --no-guide")
    else:
        sections = [s.model_copy(update={"slide": None}) for s in sections]
    target = Path(out).resolve()
    check_output(target)
    inputs = [input_digests(s, settings) for s in sections]
    work = Workspace(target)
    # The folder belongs to these inputs; settings may change from stage to stage (each stage knows its own).
    work.claim(digest([[s.model_dump(mode="json") for s in sections], inputs]), overwrite)
    pin_threads()
    if stage in ("align", "tile") and not settings.guide:
        raise InputError(f"{stage} needs the stain", where="--no-guide", remedy="leave it out")
    depth = STAGES.index(stage)
    lines, failed, preps = [], [], []
    for section, digests in zip(sections, inputs, strict=True):
        tell = _labelled(progress, section.name if len(sections) > 1 else "")
        try:
            ingest_stage(section, digests, work, settings, tell)
            prep = prepared(section, work, settings)
            if settings.guide and depth >= 1:
                align_stage(prep, digests, work, settings, tell)
            if settings.guide and depth >= 2:
                tile_stage(prep, digests, work, settings, tell)
            preps.append(prep)
            lines.append(_line(stage, prep))
        except InputError as error:
            if len(sections) == 1:
                raise
            failed.append(f"{section.name}: {error}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(sections)} sections cannot be used: " + "; ".join(failed),
            remedy="mend or remove them; the others are done",
        )
    if depth < 3:
        return lines
    return _learn_and_write(preps, inputs, work, settings, progress, model, overwrite, stage, target)


def _learn_and_write(
    preps: list[Prepared],
    inputs: list[dict[str, str]],
    work: Workspace,
    config: Config,
    progress: Progress,
    model: str | None,
    overwrite: bool,
    stage: str,
    target: Path,
) -> list[str]:
    sections = [p.section for p in preps]
    identity = identity_of(sections, inputs, config)
    given, named = given_model(model, config) if model else (None, {})
    lines, failed = [], []
    with tracked(work, sections, inputs, config, target.name) as run:
        name = f"run-{identity[:12]}"
        history = learn_stage(preps, inputs, work, config, progress, name, given)
        registered = named or run.log_learning(preps, inputs, history)
        if stage == "train":
            where = f" (registered as {registered['name']} {registered['version']})" if registered else ""
            return [f"{p.section.name}: fitted{where}" for p in preps]
        for prep, digests in zip(preps, inputs, strict=True):
            out = target / "results" / f"{prep.section.name}.zarr"
            own = identity_of([prep.section], [digests, {"study": identity, "model": str(named)}], config)
            if not claim_result(out, own, overwrite):
                outcome = Outcome(own, digests, run.describe(), registered, [])
                tell = _labelled(progress, prep.section.name if len(preps) > 1 else "")
                depends = [digests, config.digest(), given.digest if given else None]
                try:
                    run.log_result(reconstruct_stage(prep, out, depends, outcome, work, config, tell))
                except InputError:
                    raise
                except DeepfereError as error:
                    failed.append(f"{prep.section.name}: {error}")
                    continue
            lines.append(f"{prep.section.name}: {open(out)!r}")
    if failed:
        raise DeepfereError(f"{len(failed)} of {len(preps)} sections failed: " + "; ".join(failed))
    return lines


def _labelled(progress: Progress, name: str) -> Progress:
    return (lambda stage, share: progress(f"{stage} {name}", share)) if name else progress


def _line(stage: str, prep: Prepared) -> str:
    ny, nx = prep.measured.grid.shape_px
    text = f"{prep.section.name}: {len(prep.measured.mz)} ions, {ny} x {nx} pixels"
    if stage == "align":
        evidence = Alignment.load(prep.folder.alignment).evidence
        text += f"; flip {evidence['flip']}, rotation {evidence['rotation_deg']} degrees, from {evidence['source']}"
    return text
