"""Learning: factors over the study, the closed form per section, the joint deep model, and what is kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.config import Config
from deepfere.errors import InputError
from deepfere.measured.factors import Factors, factorise
from deepfere.model.denoise import Denoised, denoise
from deepfere.model.fit import Evidence as Problem
from deepfere.model.fit import SectionFit, fit_t1
from deepfere.model.guide import GuideSpec
from deepfere.model.network import FusionNetwork
from deepfere.model.ridge import DENSITIES
from deepfere.model.transfer import LEAST_PX
from deepfere.pipeline.choose import Learned, choose, section_problem, without_guide
from deepfere.pipeline.deep import held_out_blocks, train_network
from deepfere.pipeline.given import GivenModel, given_factors
from deepfere.pipeline.ions import same_axis
from deepfere.pipeline.paper import published
from deepfere.pipeline.prepare import Prepared, load_alignment
from deepfere.pipeline.tile import pool, smoothings_pitch
from deepfere.pipeline.types import typed_spec
from deepfere.pipeline.workspace import Progress, SectionFolder, Workspace, write_json
from deepfere.places import reading, writing


def same_ions(one: Prepared, other: Prepared) -> bool:
    """Whether two sections have the same ions, within the tolerance that the second was ingested with."""
    return same_axis(one.measured.mz, other.measured.mz, other.measured.tolerance_ppm)


def study_factors(
    preps: list[Prepared], cubes: list[NDArray[np.float32]], config: Config, most: int | None = None
) -> list[Factors]:
    """Factors that all sections share; as many as the settings say, or ``most``.

    Raises:
        InputError: The sections do not share their ions.
    """
    for prep in preps[1:]:
        if not same_ions(preps[0], prep):
            raise InputError(
                f"section {prep.section.name} has other ions than {preps[0].section.name}",
                where=prep.section.msi,
                remedy="ingest the study with one target list (ingest.mz, or --mz)",
            )
    return factorise(cubes, [p.measured.mask for p in preps], most or config.model.max_factors)


def learn_stage(
    preps: list[Prepared],
    inputs: list[dict[str, str]],
    work: Workspace,
    config: Config,
    progress: Progress,
    run_name: str,
    given: GivenModel | None = None,
) -> list[dict[str, float]]:
    """Fit every section; writes ``fit.npz``, ``arrays.npz``, ``denoised.npz`` and ``model.json`` per section.

    Returns:
        The training's history (empty where the deep tier was not trained).
    """
    made = [work.facts(stage, p.section.name).get("fingerprint") for p in preps for stage in ("ingest", "tile")]
    depends = [inputs, config.digest(), made, given.digest if given else None]
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
                _save_denoised(prep, denoise(cube, prep.measured.mask, None, config.seed))
            facts["history"] = []
            return []
        if config.model.tier == "paper":
            factors = study_factors(preps, cubes, config, config.paper.channels)
            for n, (prep, cube, factor) in enumerate(zip(preps, cubes, factors, strict=True)):
                tell = lambda share, n=n: progress("learn", (n + share) / len(preps))  # noqa: E731
                _save(work, prep, factor, published(prep, cube, factor, config, tell), None)
                _save_denoised(prep, denoise(cube, prep.measured.mask, None, config.seed))
            facts["history"] = []
            return []
        smoothings = smoothings_pitch(config)
        problems, guides = [], []
        for prep, cube, factor in zip(preps, cubes, factors, strict=True):
            problem, guide = _typed(prep, cube, factor, smoothings, config)
            problems.append(problem)
            guides.append(guide)
        closed = [fit_t1(p, config.model.null_guides, config.seed) for p in problems]
        progress("learn", 0.1)
        trained, joint, held = None, None, [np.zeros(1, bool)] * len(preps)
        if given is not None and config.model.tier in ("auto", "T2"):
            joint = (given.network, [load_alignment(p.folder) for p in preps])
            # A section that the model was trained on may only be judged on the blocks it did not see.
            held = [
                held_out_blocks(p, given.held_out, given.seed)
                if digests["msi"] in given.seen
                else np.ones(int(p.blocks.max()) + 1, bool)
                for p, digests in zip(problems, inputs, strict=True)
            ]
        elif given is None and (
            config.model.tier == "T2"
            or (config.model.tier == "auto" and max(int(p.mask.sum()) for p in problems) >= LEAST_PX)
        ):
            held = [held_out_blocks(p, config.train.held_out, config.seed) for p in problems]
            trained, joint = train_network(preps, problems, closed, factors, held, work, config, progress, run_name)
        for n, prep in enumerate(preps):
            learned = choose(
                prep,
                cubes[n],
                factors[n],
                problems[n],
                guides[n],
                closed[n],
                held[n],
                joint,
                n,
                config,
                progress,
                given is None,
            )
            _save(work, prep, factors[n], learned, joint[0] if joint else None)
            # The features are filled in where the slide shows nothing.
            _save_denoised(prep, denoise(cubes[n], prep.measured.mask, problems[n].features, config.seed))
        facts["history"] = trained.history if trained else []
        facts["timing"] = trained.timing if trained else {}
        progress("learn", 1.0)
        return facts["history"]


def _typed(
    prep: Prepared,
    cube: NDArray[np.float32],
    factors: Factors,
    smoothings: tuple[float, ...],
    config: Config,
) -> tuple[Problem, GuideSpec]:
    """A section's problem with its smoothing chosen and its stain types among the features, and its guide."""
    folder = prep.folder
    problem = section_problem(prep, cube, factors, folder.pooled, smoothings)
    alignment = load_alignment(folder)
    guide = typed_spec(prep, problem, alignment, config.seed)
    if guide.types is not None:
        kept = (guide.smoothing_pitch,)
        pool(prep, guide, alignment, lambda *_: None, folder.pooled_typed, kept)
        problem = section_problem(prep, cube, factors, folder.pooled_typed, kept, problem.choice)
    return problem, guide


def _save(work: Workspace, prep: Prepared, factors: Factors, learned: Learned, network: FusionNetwork | None) -> None:
    folder = prep.folder
    with writing(folder.fit) as path:
        learned.fit.save(path)
    with writing(folder.arrays) as path:
        np.savez(
            path,
            factors=factors.images,
            mask=prep.measured.mask,
            weights=learned.fit.weights,
            gate=learned.fit.factor_gate,
            centre=learned.fit.feature_mean[list(DENSITIES)],
        )
    state = None
    if network is not None:
        from safetensors.torch import save_file

        state = str(folder.root / "network.safetensors")
        with writing(state) as path:
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    write_json(
        folder.model,
        {
            "tier": learned.tier,
            "guide": None if learned.guide is None else learned.guide.to_dict(),
            "alignment": learned.alignment.to_dict(),
            "known": str(folder.paper) if learned.tier == "paper" else None,
            "network": network.settings if network is not None else None,
            "state": state,
            "notes": learned.notes,
            "noise_sd": factors.noise_sd.tolist(),
        },
    )


def _save_denoised(prep: Prepared, denoised: Denoised) -> None:
    with writing(prep.folder.denoised) as path:
        denoised.save(path)


def load_fit(folder: SectionFolder) -> SectionFit:
    """What `learn_stage` fitted for a section."""
    with reading(folder.fit) as path:
        return SectionFit.load(path)


def read_model(prep: Prepared) -> dict[str, Any]:
    """What `learn_stage` decided for a section."""
    return json.loads(prep.folder.model.read_text())
