"""Registered models side by side: what each explains of the same held-out blocks of a study's sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepfere.cluster import one_thread
from deepfere.config import Config
from deepfere.errors import InputError
from deepfere.measured.factors import Factoring, Moments
from deepfere.model import gate as gates
from deepfere.model.fit import Evidence as Problem
from deepfere.model.reduced import fit_deep
from deepfere.model.ridge import fit_own
from deepfere.pipeline.choose import section_problem
from deepfere.pipeline.fit import held_out_blocks
from deepfere.pipeline.fuse import input_digests
from deepfere.pipeline.given import GivenModel, given_factoring, given_model
from deepfere.pipeline.prepare import Prepared, prepared
from deepfere.pipeline.study import each_piece, each_region, study_sections
from deepfere.pipeline.tile import smoothings_pitch
from deepfere.pipeline.workspace import Progress, Workspace

CLOSED_FORM = "closed form"


@dataclass(frozen=True)
class Score:
    """What one model explains.

    Attributes:
        model: ``models:/NAME/VERSION``, or `CLOSED_FORM`.
        r2: Held-out R2 of the detail at reduced scale, one (M,) array per section by name; the gain is free per ion.
        blocks: How many held-out blocks judged, by section.
    """

    model: str
    r2: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    def median(self) -> float:
        """Median over all ions of all sections."""
        return float(np.median(np.concatenate(list(self.r2.values()))))

    def informed(self) -> int:
        """Ions, over all sections, of whose detail it explains a tenth or more."""
        return int(sum((r2 >= gates.INFORMED_R2).sum() for r2 in self.r2.values()))


def compare_models(
    uris: Sequence[str], study: str | Path, out: str | Path, config: Config, progress: Progress
) -> list[Score]:
    """Judge registered models by the same held-out blocks of a tiled study.

    A section that some of the models were trained on is judged on the blocks that none of those has seen, any other on
    all of its blocks. Beside them the closed form, fitted to each section alone, without stain types.

    Args:
        uris: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        study: Manifest.
        out: Working folder in which the study was tiled.
        config: Settings; those of the tracking store and of the factor count.
        progress: Called with ("compare", share).

    Returns:
        The closed form, then the models in their order.

    Raises:
        InputError: There is no such model, it has other ions, or no block is held out from all of them.
    """
    models = [given_model(uri, config) for uri in uris]
    scores = [Score(CLOSED_FORM), *(Score(f"models:/{named['name']}/{named['version']}") for _, named in models)]
    sections = each_piece(each_region(study_sections("tile", study, config), study), study, config)
    work = Workspace(out)
    with one_thread(config.ray):
        for n, section in enumerate(sections):
            prep = prepared(section, work, config)
            digest = input_digests(section, config)["msi"]
            _judge(prep, digest, [model for model, _ in models], scores, config)
            progress("compare", (n + 1) / len(sections))
    return scores


def _judge(prep: Prepared, digest: str, models: list[GivenModel], scores: list[Score], config: Config) -> None:
    """Add one section's figures to all scores."""
    cube = prep.cube(config)
    smoothings = smoothings_pitch(config)
    moments = Moments.of(cube, prep.measured.mask)
    factors = Factoring.of(moments, config.model.max_factors).factors(cube, prep.measured.mask)
    problem = section_problem(prep, cube, factors, prep.folder.pooled, smoothings)
    held = np.ones(int(problem.blocks.max()) + 1, bool)
    for model in models:
        if model.saw(digest, prep.measured):
            held &= held_out_blocks(problem, model.held_out, model.seed)
    rows = held[problem.rows.block]
    if not rows.any():
        raise InputError(
            "these models were trained on blocks that together leave none to judge them by",
            where=f"section {prep.section.name}",
            remedy="compare them on a section that they have not seen",
        )
    judging = len(np.unique(problem.rows.block[rows]))
    predictions = [(problem, factors.basis, fit_own(problem.rows, problem.factor_rows, problem.group).predicted)]
    for model in models:
        axis = (prep.measured.mz, prep.measured.tolerance)
        own = given_factoring(model, moments, *axis, prep.section.msi).factors(cube, prep.measured.mask)
        posed = section_problem(prep, cube, own, prep.folder.pooled, smoothings)
        closed = fit_own(posed.rows, posed.factor_rows, posed.group)
        predictions.append((posed, own.basis, fit_deep(model.network, posed, own, closed).predicted))
    for score, (posed, basis, predicted) in zip(scores, predictions, strict=True):
        score.r2[prep.section.name] = _ion_r2(posed, basis, predicted, rows)
        score.blocks[prep.section.name] = judging


def _ion_r2(
    problem: Problem, basis: NDArray[np.float64], predicted: NDArray[np.float64], rows: NDArray[np.bool_]
) -> NDArray[np.float64]:
    found = gates.moments(problem.ion_rows[rows], predicted[rows], problem.rows.block[rows])
    return gates.gains(found, basis).r2
