"""The deep tier's training as a job: tasks and patches of all sections."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.cluster import alone_on_machine, connect
from deepfere.config import Config, digest
from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.model.features import FEATURES
from deepfere.model.network import FusionNetwork
from deepfere.pipeline.fit import context_px
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.tiling.patches import PatchSource
from deepfere.training.live import Recording
from deepfere.training.loop import JointModel, LoopSettings, SectionTask
from deepfere.training.trainer import Trained, train_joint


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


def train_network(
    sections: list[dict[str, Any]],
    work: Workspace,
    config: Config,
    progress: Progress,
    run_name: str,
    recording: Recording | None = None,
) -> tuple[Trained, tuple[FusionNetwork, list[Alignment]]]:
    """Train the joint model; returns the network and the refined alignments.

    Args:
        sections: What `FitWorker` has noted of each.
        work: Unfinished work.
        config: Settings.
        progress: Called with ("learn", share).
        run_name: Under which its checkpoints are found again.
        recording: The MLflow run that its losses go to as they come.
    """
    connect(config.ray)
    mean, sd = feature_scale(sections)
    train = config.train
    tasks = [SectionTask(**known["task"]) for known in sections]
    settings = LoopSettings(
        network={
            "features": len(FEATURES),
            "factors": len(tasks[0].gate),
            "width": config.model.width,
            "depth": config.model.depth,
        },
        feature_mean=mean.tolist(),
        feature_sd=sd.tolist(),
        steps=train.steps,
        batch=train.batch,
        patch_px=train.patch_px,
        context_px=context_px(config.model.depth),
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
        sources=[PatchSource(**known["source"]) for known in sections],
        train=train,
        folder=work.training,
        name=run_name,
        digest=digest([config.digest(), asdict(settings), [asdict(t) for t in tasks]]),
        on_step=lambda step: progress("learn", 0.1 + 0.75 * step / train.steps),
        recording=recording,
        alone=train.workers == "auto" and not train.use_gpu and alone_on_machine(config.ray),
    )
    model = JointModel(settings, tasks)
    model.load_state_dict(trained.model)
    model.network.eval()
    return trained, (model.network, [model.alignment(n) for n in range(len(tasks))])


def feature_scale(sections: list[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and s.d. (F,) of the stain features over all sections' tissue; 1 for a constant feature."""
    pixels = np.array([known["covered_px"] for known in sections], np.float64)
    share = (pixels / pixels.sum())[:, None]
    means, sds = (np.array([known[name] for known in sections]) for name in ("feature_mean", "feature_sd"))
    mean = (share * means).sum(0)
    sd = np.sqrt((share * (sds**2 + (means - mean) ** 2)).sum(0))
    return mean, np.where(sd > 1e-6, sd, 1.0)
