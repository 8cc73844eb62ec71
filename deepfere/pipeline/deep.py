"""The deep tier's training as a job: tasks and patches of all sections, carried out on Ray Train."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from deepfere.cluster import connect
from deepfere.config import Config, digest
from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.measured.factors import Factors
from deepfere.measured.operator import fill_missing
from deepfere.model.features import FEATURES
from deepfere.model.fit import RATIO, gate_ions
from deepfere.model.fit import Evidence as Problem
from deepfere.model.network import FusionNetwork
from deepfere.model.ridge import RidgeFit, detail_rows, fit_average
from deepfere.pipeline.choose import feature_scale
from deepfere.pipeline.prepare import Prepared, load_alignment
from deepfere.pipeline.tile import load_plan
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.places import writing
from deepfere.tiling.patches import PatchSource
from deepfere.tiling.plan import plan_patches
from deepfere.training.loop import JointModel, LoopSettings, SectionTask
from deepfere.training.trainer import Trained, train_joint


def context_px(depth: int) -> int:
    """Measured pixels around a patch's core: Wald at ratio 4 loses as many.

    The network's receptive field, the alignment to coarse cells and one cell of projection.
    """
    return 2**depth - 1 + 4


def check_patches(config: Config) -> None:
    """Refuse patches that are smaller than what the network looks at, before work starts.

    Raises:
        InputError: They are.
    """
    least = 2 * context_px(config.model.depth) + 4
    if config.guide and config.model.tier in ("auto", "T2") and config.train.patch_px < least:
        raise InputError(
            f"patches of {config.train.patch_px} measured pixels are too small for a network of depth "
            f"{config.model.depth}",
            where="train.patch_px",
            remedy=f"give at least {least}",
        )


def held_out_blocks(problem: Problem, share: float, seed: int) -> NDArray[np.bool_]:
    """Spatial blocks (by number) that training never sees, spread over the section."""
    names = np.unique(problem.blocks)
    count = max(2, round(share * len(names)))
    rng = np.random.default_rng([seed, 2])
    return np.isin(np.arange(names.max() + 1), rng.choice(names, count, replace=False))


def train_network(
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
    connect(config.ray)
    mean, sd = feature_scale(problems, len(FEATURES))
    train = config.train
    radius = 2**config.model.depth - 1
    context = context_px(config.model.depth)
    tasks, sources = [], []
    for n, prep in enumerate(preps):
        smoothing = problems[n].choice.smoothing_pitch
        spec = replace(load_plan(prep.folder), smoothing_pitch=smoothing)
        alignment = load_alignment(prep.folder)
        gate, _ = gate_ions(problems[n], factors[n].basis, closed[n][0].predicted, closed[n][1])
        # The network starts from what is linear in the stain alone, and finds its own way to bend.
        plain = detail_rows(problems[n].features[: len(FEATURES)], problems[n].mask, problems[n].blocks, RATIO)
        start = fit_average(plain, problems[n].factor_rows).weights
        tasks.append(SectionTask(spec.to_dict(), alignment.to_dict(), gate.gate.tolist(), start.tolist()))
        weight = problems[n].mask & ~held[n][problems[n].blocks]
        arrays = prep.folder.root / "training.npz"
        with writing(arrays) as path:
            np.savez(
                path,
                factors=fill_missing(factors[n].images, prep.measured.mask).astype(np.float32),
                pooled=problems[n].features[: len(FEATURES)].astype(np.float32),
                weight=weight.astype(np.float32),
            )
        cells = plan_patches(prep.measured.grid, problems[n].mask, train.patch_px, context)
        margin = 2 + int(0.5 * max(prep.measured.grid.pitch_um) / min(spec.spacing_um))
        sources.append(
            PatchSource(
                str(prep.folder.planes),
                str(arrays),
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
        precision=train.resolved_precision,
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
    model.load_state_dict(trained.model)
    model.network.eval()
    return trained, (model.network, [model.alignment(n) for n in range(len(preps))])
