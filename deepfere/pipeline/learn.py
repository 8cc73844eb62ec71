"""Learning: factors over the study, the closed form per section, the joint deep model, and what is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepfere.cluster import connect
from deepfere.config import Config, digest
from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.measured.factors import Factors, factor_weight, factorise
from deepfere.measured.operator import fill_missing
from deepfere.model.detail import COVERED
from deepfere.model.features import FEATURES
from deepfere.model.fit import (
    RATIO,
    SectionFit,
    evidence,
    fit_t1,
    gate_ions,
    select_positivity,
    tier_error,
    tier_evidence,
)
from deepfere.model.fit import Evidence as Problem
from deepfere.model.network import FusionNetwork
from deepfere.model.reduced import network_rows, reduced_detail, ridge_detail
from deepfere.model.ridge import RidgeFit, null_guides
from deepfere.pipeline.prepare import Prepared, load_plan, pool, read_pooled
from deepfere.pipeline.workspace import Progress, Workspace, write_json
from deepfere.tiling.patches import PatchSource
from deepfere.tiling.plan import plan_patches
from deepfere.training.loop import LoopSettings, SectionTask
from deepfere.training.trainer import Trained, train_joint

TIER_EVIDENCE = 2.0
"""Standard errors over spatial blocks by which the deep tier must be ahead: on few pixels luck looks like skill."""

TIER_MARGIN = 0.005
"""Share of the detail's variance by which a tier must beat the one below on held-out blocks."""


@dataclass(frozen=True)
class Learned:
    """What one section's reconstruction uses.

    Attributes:
        tier: "T0", "T1" or "T2".
        alignment: The alignment kept.
        fit: Gates, weights and evidence.
        notes: Scores of the choices made, for the report and MLflow.
    """

    tier: str
    alignment: Alignment
    fit: SectionFit
    notes: dict[str, Any]


def study_factors(preps: list[Prepared], cubes: list[NDArray[np.float32]], config: Config) -> list[Factors]:
    """Factors that all sections share.

    Raises:
        InputError: The sections do not share their ions.
    """
    axis = preps[0].measured.mz
    for prep in preps[1:]:
        other = prep.measured.mz
        tolerance = prep.measured.tolerance_ppm
        if len(other) != len(axis) or (np.abs(other - axis) > axis * tolerance * 1e-6).any():
            raise InputError(
                f"section {prep.section.name} has other ions than {preps[0].section.name}",
                where=prep.section.msi,
                remedy="ingest the study with one target list (ingest.mz, or --mz)",
            )
    return factorise(cubes, [p.measured.mask for p in preps], config.model.max_factors)


def held_out_blocks(problem: Problem, share: float, seed: int) -> NDArray[np.bool_]:
    """Spatial blocks (by number) that training never sees, spread over the section."""
    names = np.unique(problem.blocks)
    count = max(2, round(share * len(names)))
    rng = np.random.default_rng([seed, 2])
    return np.isin(np.arange(names.max() + 1), rng.choice(names, count, replace=False))


def _problem(prep: Prepared, cube: NDArray[np.float32], factors: Factors, pooled: Path) -> Problem:
    features, cover = read_pooled(pooled)
    covered = cover >= COVERED
    if not (covered & prep.measured.mask).any():
        raise InputError(
            "the slide shows no measured pixel at this alignment",
            where=prep.section.slide,
            remedy="correct the alignment",
        )
    return evidence(features, prep.measured.mask, covered, cube, factors)


def _feature_scale(problems: list[Problem]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = np.concatenate([p.features[:, p.mask].T for p in problems])
    sd = rows.std(0)
    return rows.mean(0), np.where(sd > 1e-6, sd, 1.0)


@dataclass(frozen=True)
class GivenModel:
    """A registered model that takes the place of training.

    Attributes:
        network: The deep model.
        mz: (M,) ions of its basis.
        basis: (M, K) W.
        noise_sd: (M,) noise that W was weighted with.
        seen: Digests of the measurements that it was trained on.
        seed: Seed of its held-out blocks.
        held_out: Share of its held-out blocks.
        digest: Digest of its weights.
    """

    network: FusionNetwork
    mz: NDArray[np.float64]
    basis: NDArray[np.float64]
    noise_sd: NDArray[np.float64]
    seen: list[str]
    seed: int
    held_out: float
    digest: str


def given_factors(prep: Prepared, cube: NDArray[np.float32], model: GivenModel) -> Factors:
    """The section's images of a model's factors: noise-weighted least squares on its basis.

    Raises:
        InputError: The section has other ions than the model.
    """
    axis, tolerance = prep.measured.mz, prep.measured.tolerance_ppm
    if len(axis) != len(model.mz) or (np.abs(axis - model.mz) > axis * tolerance * 1e-6).any():
        raise InputError(
            f"the model knows {len(model.mz)} ions, the section has {len(axis)} others",
            where=prep.section.msi,
            remedy="ingest with the model's list of m/z (--mz)",
        )
    table = np.asarray(cube[:, prep.measured.mask], np.float64).T
    weight = 1.0 / np.maximum(model.noise_sd, 1e-6 * max(float(model.noise_sd.max()), 1e-300))
    scores = np.linalg.lstsq(model.basis * weight[:, None], ((table - table.mean(0)) * weight).T, rcond=None)[0]
    images = np.zeros((model.basis.shape[1], *prep.measured.mask.shape))
    images[:, prep.measured.mask] = scores
    residual = (table - table.mean(0) - scores.T @ model.basis.T).var(0)
    variance = np.maximum(table.var(0), 1e-300)
    return Factors(images, model.basis, model.noise_sd, np.clip(1 - residual / variance, 0, 1))


def learn_stage(
    preps: list[Prepared],
    inputs: list[dict[str, str]],
    work: Workspace,
    config: Config,
    progress: Progress,
    run_name: str,
    given: GivenModel | None = None,
) -> list[dict[str, float]]:
    """Fit every section; writes ``fit.npz``, ``arrays.npz`` and ``model.json`` per section.

    Returns:
        The training's history (empty where the deep tier was not trained).
    """
    tiles = [work.facts("tile", p.section.name).get("fingerprint") for p in preps]
    depends = [inputs, config.digest(), tiles, given.digest if given else None]
    with work.stage("learn", depends) as facts:
        if facts is None:
            return work.facts("learn").get("history", [])
        cubes = [p.cube(config) for p in preps]
        if given is None:
            factors = study_factors(preps, cubes, config)
        else:
            factors = [given_factors(p, c, given) for p, c in zip(preps, cubes, strict=True)]
        if not config.guide:
            for prep, cube, factor in zip(preps, cubes, factors, strict=True):
                _save(work, prep, factor, without_guide(cube, prep.measured.mask, factor), None)
            facts["history"] = []
            return []
        problems = [_problem(p, c, f, p.folder.pooled) for p, c, f in zip(preps, cubes, factors, strict=True)]
        closed = [fit_t1(p, config.model.null_guides, config.seed) for p in problems]
        progress("learn", 0.1)
        trained, joint, held = None, None, [np.zeros(1, bool)] * len(preps)
        if given is not None:
            joint = (given.network, [Alignment.load(p.folder.alignment) for p in preps])
            # A section that the model was trained on may only be judged on the blocks it did not see.
            held = [
                held_out_blocks(p, given.held_out, given.seed)
                if digests["msi"] in given.seen
                else np.ones(int(p.blocks.max()) + 1, bool)
                for p, digests in zip(problems, inputs, strict=True)
            ]
        elif config.model.tier in ("auto", "T2"):
            held = [held_out_blocks(p, config.train.held_out, config.seed) for p in problems]
            trained, joint = _train(preps, problems, closed, factors, held, work, config, progress, run_name)
        for n, prep in enumerate(preps):
            learned = _choose(
                prep, cubes[n], factors[n], problems[n], closed[n], held[n], joint, n, config, progress, given is None
            )
            _save(work, prep, factors[n], learned, joint[0] if joint else None)
        facts["history"] = trained.history if trained else []
        progress("learn", 1.0)
        return facts["history"]


def without_guide(cube: NDArray[np.float32], mask: NDArray[np.bool_], factors: Factors) -> Learned:
    """T0: no stain at all; only the positivity steps are selected."""
    ions, count = len(cube), factors.basis.shape[1]
    steps, variance = select_positivity(cube, mask, None, np.zeros((ions, count)))
    zero = np.zeros(ions)
    fit = SectionFit(
        np.zeros((len(FEATURES), count)),
        factors.basis,
        np.zeros(count),
        np.zeros(count),
        zero,
        zero,
        zero,
        steps,
        variance,
        np.zeros(len(FEATURES)),
        np.ones(len(FEATURES)),
    )
    return Learned("T0", Alignment.identity(), fit, {"tier": "T0"})


def _train(
    preps: list[Prepared],
    problems: list[Problem],
    closed: list[tuple[RidgeFit, list[NDArray[np.float64]]]],
    factors: list[Factors],
    held: list[NDArray[np.bool_]],
    work: Workspace,
    config: Config,
    progress: Progress,
    run_name: str,
) -> tuple[Trained, tuple[FusionNetwork, list[Alignment]]]:
    """Train the joint model on Ray Train; returns the network and the refined alignments."""
    from deepfere.training.loop import JointModel

    connect(config.ray)
    mean, sd = _feature_scale(problems)
    train = config.train
    radius = 2**config.model.depth - 1
    # Wald at ratio 4 loses the receptive field, the alignment to coarse cells and one cell of projection.
    context = radius + 4
    if train.patch_px < 2 * context + 4:
        raise InputError(
            f"patches of {train.patch_px} measured pixels are too small for a network of depth {config.model.depth}",
            where="train.patch_px",
            remedy=f"give at least {2 * context + 4}",
        )
    tasks, sources = [], []
    for n, prep in enumerate(preps):
        spec, alignment = load_plan(prep.folder), Alignment.load(prep.folder.alignment)
        gate, _ = gate_ions(problems[n], factors[n].basis, closed[n][0].predicted, closed[n][1])
        tasks.append(
            SectionTask(spec.to_dict(), alignment.to_dict(), gate.gate.tolist(), closed[n][0].weights.tolist())
        )
        weight = problems[n].mask & ~held[n][problems[n].blocks]
        np.savez(
            prep.folder.root / "training.npz",
            factors=fill_missing(factors[n].images, prep.measured.mask).astype(np.float32),
            pooled=problems[n].features.astype(np.float32),
            weight=weight.astype(np.float32),
        )
        cells = plan_patches(prep.measured.grid, problems[n].mask, train.patch_px, context)
        margin = 2 + int(0.5 * max(prep.measured.grid.pitch_um) / min(spec.spacing_um))
        sources.append(
            PatchSource(
                str(prep.folder.planes),
                str(prep.folder.root / "training.npz"),
                spec.to_dict(),
                alignment.to_dict(),
                cells.tolist(),
                context,
                radius,
                margin,
            )
        )
    settings = LoopSettings(
        network={
            "features": len(FEATURES),
            "factors": factors[0].basis.shape[1],
            "width": config.model.width,
            "depth": config.model.depth,
        },
        feature_mean=mean.tolist(),
        feature_sd=sd.tolist(),
        steps=train.steps,
        batch=train.batch,
        patch_px=train.patch_px,
        context_px=context,
        rate=train.rate,
        rate_registration_pitch=train.rate_registration_pitch,
        mapping_weight=train.mapping_weight,
        correlation_weight=train.correlation_weight,
        seed=config.seed,
    )
    trained = train_joint(
        settings=settings,
        sections=tasks,
        sources=sources,
        train=train,
        folder=work.training,
        name=run_name,
        digest=digest([config.digest(), asdict(settings), [asdict(t) for t in tasks]]),
        on_step=lambda step: progress("learn", 0.1 + 0.75 * step / train.steps),
    )
    model = JointModel(settings, tasks)
    model.load_state_dict(torch.load(trained.state, weights_only=True)["model"])
    model.network.eval()
    return trained, (model.network, [model.alignment(n) for n in range(len(preps))])


def _choose(
    prep: Prepared,
    cube: NDArray[np.float32],
    factors: Factors,
    problem: Problem,
    closed: tuple[RidgeFit, list[NDArray[np.float64]]],
    held: NDArray[np.bool_],
    joint: tuple[FusionNetwork, list[Alignment]] | None,
    number: int,
    config: Config,
    progress: Progress,
    moved: bool,
) -> Learned:
    """Decide alignment and tier by held-out blocks, then gates, positivity and uncertainty."""
    weight = factor_weight(factors) ** 2
    everywhere = np.ones(len(problem.rows.block), bool)
    alignment = Alignment.load(prep.folder.alignment)
    notes: dict[str, Any] = {"t1_left": tier_error(problem, weight, closed[0].predicted, everywhere)}
    stages = [{"stage": "search and affine", "r2": 1 - notes["t1_left"], "kept": True}]
    free = prep.section.alignment is None and prep.section.landmarks is None
    if joint is not None and moved and free:
        # The jointly refined registration stays only if the closed form, refitted with it, says so.
        trial = joint[1][number]
        spec = load_plan(prep.folder)
        pool(prep, spec, trial, lambda *_: None, prep.folder.pooled_joint)
        other = _problem(prep, cube, factors, prep.folder.pooled_joint)
        refit = fit_t1(other, config.model.null_guides, config.seed)
        left = tier_error(other, weight, refit[0].predicted, np.ones(len(other.rows.block), bool))
        notes["t1_left_joint"] = left
        # Losing rows must not look like a gain: the slide has to cover every pixel that it covered before.
        kept = left < notes["t1_left"] - 0.2 * TIER_MARGIN and bool((other.mask >= problem.mask).all())
        stages.append({"stage": "joint with the network", "r2": 1 - left, "kept": kept})
        if kept:
            alignment, problem, closed = trial, other, refit
    alignment = alignment.with_evidence(stages=stages)
    progress("learn", 0.9)
    fit, nulls = closed
    tier, network = "T1", None
    if joint is not None:
        deep = network_rows(joint[0], problem, factors)
        rows = held[problem.rows.block]
        notes["t1_left_held_out"] = tier_error(problem, weight, fit.predicted, rows)
        notes["t2_left_held_out"] = tier_error(problem, weight, deep, rows)
        notes["t2_evidence"] = tier_evidence(problem, weight, fit.predicted, deep, rows)
        ahead = notes["t2_left_held_out"] < notes["t1_left_held_out"] - TIER_MARGIN
        if config.model.tier == "T2" or (ahead and notes["t2_evidence"] > TIER_EVIDENCE):
            tier, network = "T2", joint[0]
            predicted = deep
            null_rows = [
                network_rows(network, problem, factors, features)
                for features in null_guides(problem.features, config.model.null_guides, config.seed)
            ]
            # Only rows that training never saw can judge the network.
            factor_gate, ion_gate = gate_ions(problem, factors.basis, predicted, null_rows, rows)
    if tier == "T1":
        factor_gate, ion_gate = gate_ions(problem, factors.basis, fit.predicted, nulls)
    if config.model.tier == "T0" or not ion_gate.gate.any():
        tier = "T0" if config.model.tier == "T0" else tier
    gate = np.zeros_like(ion_gate.gate) if tier == "T0" else ion_gate.gate
    loadings = gate[:, None] * factors.basis

    def detail_at(ratio: int) -> NDArray[np.float64]:
        raw = reduced_detail(network, problem, factors) if network is not None else ridge_detail(problem, fit.weights)
        return raw * factor_gate.gate[:, None, None]

    steps, variance = select_positivity(cube, prep.measured.mask, detail_at, loadings)
    mean, sd = _feature_scale([problem])
    section = SectionFit(
        fit.weights,
        factors.basis,
        factor_gate.gate,
        factor_gate.r2,
        gate,
        ion_gate.r2,
        ion_gate.null_r2,
        steps,
        variance,
        mean,
        sd,
    )
    notes["tier"] = tier
    notes["ratio"] = RATIO
    return Learned(tier, alignment, section, notes)


def _save(work: Workspace, prep: Prepared, factors: Factors, learned: Learned, network: FusionNetwork | None) -> None:
    folder = prep.folder
    learned.fit.save(folder.fit)
    np.savez(
        folder.arrays,
        factors=factors.images,
        mask=prep.measured.mask,
        weights=learned.fit.weights,
        gate=learned.fit.factor_gate,
    )
    state = None
    if network is not None:
        from safetensors.torch import save_file

        state = str(folder.root / "network.safetensors")
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, state)
    write_json(
        folder.model,
        {
            "tier": learned.tier,
            "alignment": learned.alignment.to_dict(),
            "network": network.settings if network is not None else None,
            "state": state,
            "notes": learned.notes,
            "noise_sd": factors.noise_sd.tolist(),
        },
    )


def read_model(prep: Prepared) -> dict[str, Any]:
    """What `learn_stage` decided for a section."""
    return json.loads(prep.folder.model.read_text())
