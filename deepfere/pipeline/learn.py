"""Learning: factors over the study, the closed form per section, the joint deep model, and what is kept of it.

Sections meet in two places only: their ions' moments add up to the factors, and their patches train one network. All
else is done for one section at a time, by whichever worker is free; the driver holds small facts of each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from deepfere.config import Config, digest
from deepfere.frame import Alignment
from deepfere.measured.factors import Factors
from deepfere.model.denoise import Denoised, denoise
from deepfere.model.fit import SectionFit
from deepfere.model.network import FusionNetwork
from deepfere.model.ridge import DENSITIES
from deepfere.model.transfer import LEAST_PX, SmoothingChoice
from deepfere.pipeline.choose import Learned, choose, without_guide
from deepfere.pipeline.deep import train_network
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.fit import (
    Fitted,
    FitWorker,
    MomentsWorker,
    fitted,
    held_out_blocks,
    section_factors,
    study_factoring,
)
from deepfere.pipeline.given import GivenModel
from deepfere.pipeline.paper import published
from deepfere.pipeline.prepare import Prepared, load_alignment, prepared
from deepfere.pipeline.side_by_side import SectionWorker, SideBySide
from deepfere.pipeline.workspace import Progress, SectionFolder, Workspace, write_json
from deepfere.places import reading, writing
from deepfere.schedule import pool
from deepfere.section import Section
from deepfere.training.live import Recording


def learn_stage(
    sections: list[Section],
    inputs: list[dict[str, str]],
    work: Workspace,
    config: Config,
    progress: Progress,
    run_name: str,
    failures: Failures,
    given: GivenModel | None = None,
    recording: Recording | None = None,
) -> list[dict[str, float]]:
    """Fit every section; writes ``fit.npz``, ``arrays.npz``, ``denoised.npz`` and ``model.json`` per section.

    Losses go to ``recording`` while the network trains; what does not reach it is in the history.

    Returns:
        The training's history (empty where the deep tier was not trained).

    Raises:
        SectionFailures: Sections of several failed.
    """
    made = [work.facts(stage, s.name).get("fingerprint") for s in sections for stage in ("ingest", "tile")]
    depends = [inputs, config.digest(), made, given.digest if given else None]
    with work.stage("learn", depends) as facts:
        if facts is None:
            return work.facts("learn").get("history", [])
        study = digest(depends)
        beside = SideBySide(work, config, failures, files=False)
        alone = len(sections) == 1
        kept: dict[str, Fitted] | None = {} if alone else None

        def each(
            worker: type[SectionWorker], low: float, high: float, arguments: Callable[[int], tuple[Any, ...]]
        ) -> None:
            """One step of all sections; the only one tells on the way how far it is."""
            both = zip(sections, inputs, strict=True)
            tell = progress if alone else lambda *_: None
            beside.each(worker, both, lambda share: progress("learn", low + (high - low) * share), arguments, tell)
            failures.stop("learning takes all of them: mend or remove these")

        known: list[dict[str, Any]] = []
        with pool("learn"):
            each(MomentsWorker, 0.0, 0.02, lambda n: ())
            if given is None:
                most = config.paper.channels if config.model.tier == "paper" else config.model.max_factors
                factoring = study_factoring(sections, work, most)
                with writing(work.factoring) as path:
                    factoring.save(path)
            if given is None and config.guide and config.model.tier in ("auto", "T2"):
                each(FitWorker, 0.02, 0.1, lambda n: (study, kept))
                known = [work.facts("fit", s.name) for s in sections]
        trained, joint = None, None
        if known and (config.model.tier == "T2" or max(one["covered_px"] for one in known) >= LEAST_PX):
            # The pool's workers are gone: training takes the processors.
            trained, joint = train_network(known, work, config, progress, run_name, recording)
        with pool("learn"):
            each(ChooseWorker, 0.85, 1.0, lambda n: (study, given, joint and (joint[0], joint[1][n]), kept))
        facts["history"] = trained.history if trained else []
        facts["timing"] = trained.timing if trained else {}
        progress("learn", 1.0)
        return facts["history"]


class ChooseWorker(SectionWorker):
    """What is kept of a section's learning: tier, gates, positivity, uncertainty, the denoised ions.

    Args:
        root: The study's folder or URL.
        config: Settings.
        study: What all of the study's learning depends on.
        given: A registered model in the place of training.
        trained: The network, and the section's alignment after training; None where there was none.
        kept: Of the only section of a study: its closed form from the stage before.
    """

    stage = "learn"

    def __init__(
        self,
        root: str,
        config: Config,
        study: str,
        given: GivenModel | None,
        trained: tuple[FusionNetwork, Alignment] | None,
        kept: dict[str, Fitted] | None,
    ) -> None:
        super().__init__(root, config)
        self.study, self.given, self.trained, self.kept = study, given, trained, kept

    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """See `SectionWorker`."""
        depends = [self.study, [_digest(self.trained[0]), self.trained[1].to_dict()] if self.trained else None]
        with self.folder.stage("choose", depends, section.name) as facts:
            if facts is None:
                return
            prep = prepared(section, self.folder, self.config)
            if self.config.guide and self.config.model.tier != "paper":
                self._fused(prep, inputs, progress)
                return
            cube, mask, config = prep.cube(self.config), prep.measured.mask, self.config
            factors = section_factors(prep, cube, self.folder, self.given)
            if config.guide:
                tell = lambda share: progress("learn", share)  # noqa: E731
                learned = published(prep, cube, factors, config, tell)
            else:
                learned = without_guide(cube, mask, factors)
            _save(prep, factors, learned, None)
            _save_denoised(prep, denoise(cube, mask, None, config.seed))

    def _fused(self, prep: Prepared, inputs: dict[str, str], progress: Progress) -> None:
        config, given, alone = self.config, self.given, self.kept is not None
        fit = self.kept.pop(prep.section.name, None) if self.kept is not None else None
        # The smoothing that training took, of these inputs and settings and no others.
        known = (self.folder.done("fit", digest(self.study), prep.section.name) or {}).get("choice")
        choice = SmoothingChoice(**known) if known else None
        fit = fit or fitted(prep, self.folder, config, given, alone, choice)
        problem, network, held = fit.problem, self.trained, np.zeros(1, bool)
        if given is not None and config.model.tier in ("auto", "T2"):
            network = (given.network, load_alignment(prep.folder))
            # A section that the model was trained on may only be judged on the blocks it did not see.
            seen = given.saw(inputs["msi"], prep.measured)
            held = (
                held_out_blocks(problem, given.held_out, given.seed)
                if seen
                else np.ones(int(problem.blocks.max()) + 1, bool)
            )
        elif network is not None:
            held = held_out_blocks(problem, config.train.held_out, config.seed)
        learned = choose(
            prep,
            fit.cube,
            fit.factors,
            problem,
            fit.guide,
            fit.closed,
            held,
            network,
            config,
            progress,
            given is None,
            spread=alone,
        )
        _save(prep, fit.factors, learned, network[0] if network else None)
        # The features are filled in where the slide shows nothing.
        shown = problem.features[: fit.guide.count]
        _save_denoised(prep, denoise(fit.cube, prep.measured.mask, shown, config.seed))


def _digest(network: FusionNetwork) -> str:
    out = hashlib.sha256()
    for value in network.state_dict().values():
        out.update(value.contiguous().numpy().tobytes())
    return out.hexdigest()


def _save(prep: Prepared, factors: Factors, learned: Learned, network: FusionNetwork | None) -> None:
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


def read_model(folder: SectionFolder) -> dict[str, Any]:
    """What `learn_stage` decided for a section."""
    return json.loads(folder.model.read_text())
