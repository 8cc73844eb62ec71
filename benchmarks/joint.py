"""Registration frozen, and joint with the network: ``python benchmarks/joint.py [CASE ...] [--quick] [--json FILE]``.

Case: ``displaced``. Generated sections are started from their true alignment, shifted by 0.05 and by 0.4 measured
pixel, as if the search had found that. The deep tier is trained with the registration frozen, jointly with it at the
default step, and jointly at five times that step. Compared are how far the alignment is off before and after, the
held-out R2 of the closed form that decides whether the joint alignment is kept, and PSNR against the truth by
kind of ion, with the joint alignment kept whatever was decided. The truth scores, it never chooses.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cases import Case, phantom_case
from common import Row, chosen, finish, parser, table
from methods import decode, fused
from numpy.typing import NDArray

import deepfere.pipeline.choose as choosing
from deepfere.config import TrainSettings
from deepfere.evaluation.metrics import psnr
from deepfere.frame import Alignment, apart_px
from deepfere.phantom import PhantomSpec
from deepfere.pipeline.prepare import align_stage
from deepfere.reconstruction.result import Result

SHIFTS_PX = (0.05, 0.4)
SLIDE_MPP_UM = 2.0
SEEDS = (0, 1)
STEP = TrainSettings().rate_registration_pitch
STEPS = {"frozen": 0.0, "joint": STEP, "joint, 5 x step": 5 * STEP}
KINDS = ("nuclear", "mixed", "matrix", "class", "twin")


def displaced(true: Alignment, pitch_um: float, shift_px: float, seed: int) -> Alignment:
    """An alignment that is off by ``shift_px`` measured pixels, in a direction that follows from the seed."""
    angle = np.random.default_rng([seed, 11]).uniform(0, 2 * np.pi)
    size = shift_px * pitch_um * np.sqrt(abs(np.linalg.det(true.matrix)))
    return replace(true, offset_um=true.offset_um + size * np.array([np.sin(angle), np.cos(angle)]))


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        start_px: Median error of the alignment that it starts from, measured pixels.
        end_px: And of the one that it ends with.
        frozen_r2: Held-out R2 of the closed form with the first.
        joint_r2: And with the second.
        psnr: (M,) dB.
        wanted: Whether the joint alignment would have been kept.
    """

    start_px: float
    end_px: float
    frozen_r2: float
    joint_r2: float
    psnr: NDArray[np.float64]
    wanted: bool


def attempt(case: Case, target: Path, start: Alignment, step: float, more: list[str]) -> Trial:
    """Train the deep tier from a given start, as if the search had found it; what comes out is kept."""
    assert case.alignment is not None
    path = target.with_suffix(".json")
    start.save(path)

    def placed(prep: Any, *given: Any) -> None:
        align_stage(replace(prep, section=prep.section.model_copy(update={"alignment": str(path)})), *given)

    settings = ["model.tier=T2", f"train.rate_registration_pitch={step}", *more]
    with (
        mock.patch("deepfere.pipeline.fuse.align_stage", placed),
        # Ahead or not, it is used: its worth is what is asked.
        mock.patch.object(choosing, "ALIGNMENT_MARGIN", -np.inf),
    ):
        result = fused(case, target, settings)
    notes = result.provenance["model"]["notes"]
    assert result.alignment is not None
    off = [apart_px(found, case.alignment, result.grid, result.mask) for found in (start, result.alignment)]
    left, joint = notes["t1_left"], notes.get("t1_left_joint", notes["t1_left"])
    return Trial(
        off[0], off[1], 1 - left, 1 - joint, section_psnr(case, result), joint < left - choosing.ALIGNMENT_MARGIN
    )


def section_psnr(case: Case, result: Result) -> NDArray[np.float64]:
    """PSNR (M,) of every true ion, dB; NaN where the result does not hold it."""
    images = decode(case, result)
    return np.array(
        [
            psnr(t, e, case.inside, float(t[case.inside].max())) if np.isfinite(e[case.inside]).all() else np.nan
            for t, e in zip(case.truth, images, strict=True)
        ]
    )


def displaced_sections(folder: Path, quick: bool) -> list[Row]:
    """Every shift on every seed, with each step of the registration."""
    seeds, shifts = (SEEDS[:1], SHIFTS_PX[1:]) if quick else (SEEDS, SHIFTS_PX)
    more = ["train.steps=20"] if quick else []
    rows, lines = [], []
    for seed in seeds:
        case = phantom_case(folder, PhantomSpec(seed=seed, slide_mpp_um=SLIDE_MPP_UM))
        assert case.alignment is not None
        pitch = PhantomSpec(seed=seed).pitch_um
        kinds = np.array(case.labels)
        for shift in shifts:
            start, frozen = displaced(case.alignment, pitch, shift, seed), None
            for name, step in STEPS.items():
                if quick and name == "joint, 5 x step":
                    continue
                trial = attempt(case, folder / f"{case.name}-{shift}-{step}.zarr", start, step, more)
                frozen = frozen or trial
                gain = [float(np.nanmean((trial.psnr - frozen.psnr)[kinds == kind])) for kind in KINDS]
                what = f"seed {seed}, off by {shift} px, {name}"
                lines.append(
                    [
                        what,
                        f"{trial.end_px:.3f}",
                        f"{trial.joint_r2:.4f}",
                        "" if name == "frozen" else "yes" if trial.wanted else "no",
                        *(f"{g:+.2f}" for g in gain),
                    ]
                )
                print(f"  {' | '.join(lines[-1])}", file=sys.stderr, flush=True)
                if name == "frozen":
                    continue
                about = f"{what}: "
                rows.append(Row.of(about + "alignment error, measured pixels", trial.end_px, "frozen", trial.start_px))
                rows.append(Row.of(about + "held-out R2", trial.joint_r2, "frozen", trial.frozen_r2))
                rows += [Row.of(f"{about}gain over frozen, {kind}, dB", g) for kind, g in zip(KINDS, gain, strict=True)]
    header = ["", "error, px", "held-out R2", "would be kept", *(f"{kind}, dB" for kind in KINDS)]
    print(
        "\n" + table("alignment after training, and PSNR against the run with the registration frozen", header, lines)
    )
    return rows


CASES = {"displaced": displaced_sections}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; nothing must be met, the figures decide about the default."""
    given = parser(__doc__.splitlines()[0], list(CASES)).parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deepfere-joint-") as scratch:
        for name in chosen(given, CASES, "displaced"):
            rows += CASES[name](Path(scratch), given.quick)
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
