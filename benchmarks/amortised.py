"""A registered model on sections it never saw: ``python benchmarks/amortised.py [CASE ...] [--quick] [--json FILE]``.

Case: ``unseen``. Generated sections of one chemistry, each another tissue, placement and noise. A network is trained on
some of them as a study and registered in MLflow. Sections that it never saw are then reconstructed without the stain,
by the closed form, with a network trained on themselves, and with the registered one: its last layer is fitted to each
section, and it needs no training. All start from the alignment that the search finds. The truth scores only.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from cases import Case, phantom_case
from common import Row, chosen, finish, parser, table
from joint import KINDS, section_psnr

from deepfere.phantom import PhantomSpec
from deepfere.pipeline.study import run_stage
from deepfere.reconstruction.result import Result

CHEMISTRY = 7
TRAINED, UNSEEN = (20, 21, 22, 23), (30, 31, 32)
SHAPE_PX, SLIDE_MPP_UM = (64, 60), 2.0


def manifest(path: Path, cases: list[Case]) -> Path:
    """A study of these sections."""
    rows = [{"name": case.name, "msi": str(case.msi), "slide": str(case.slide)} for case in cases]
    path.write_text(yaml.safe_dump({"sections": rows}))
    return path


def unseen(folder: Path, quick: bool) -> list[Row]:
    """Every unseen section by every way, as gains over no-guide."""
    shape = (40, 36) if quick else SHAPE_PX
    specs = [
        PhantomSpec(seed=seed, chemistry=CHEMISTRY, shape_px=shape, slide_mpp_um=SLIDE_MPP_UM)
        for seed in (*(TRAINED[:2] if quick else TRAINED), *(UNSEEN[:1] if quick else UNSEEN))
    ]
    cases = [phantom_case(folder, spec) for spec in specs]
    trained = [case for case, spec in zip(cases, specs, strict=True) if spec.seed in TRAINED]
    others = [case for case in cases if case not in trained]
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mz = [round(float(m), 4) for m in cases[0].mz]
    common = [f"ingest.mz={mz}", *(["train.steps=20"] if quick else [])]

    def run(stage: str, name: str, sections: list[Case], more: list[str], **given: object) -> Path:
        out = folder / f"work-{name}"
        study = manifest(folder / f"{name}.yaml", sections)
        settings = [*common, *more]
        tell = lambda *_: None  # noqa: E731
        run_stage(stage, study, out, overrides=settings, factor=specs[0].factor, progress=tell, **given)  # type: ignore[arg-type]
        return out

    run("train", "trained", trained, [f"tracking.uri={uri}", "model.tier=T2"])
    plain = ["tracking.uri=none"]
    ways = {
        "no-guide": run("reconstruct", "no-guide", others, plain, guide=False),
        "closed form": run("reconstruct", "closed", others, [*plain, "model.tier=T1"]),
        "its own network": run("reconstruct", "own", others, plain),
        "registered": run("reconstruct", "registered", others, [f"tracking.uri={uri}"], model="models:/deepfere/1"),
    }
    rows, lines = [], []
    for case in others:
        kinds, base = np.array(case.labels), None
        for way, out in ways.items():
            result = Result(out / "results" / f"{case.name}.zarr")
            found = section_psnr(case, result)
            base = found if base is None else base
            gain = {kind: float(np.nanmean((found - base)[kinds == kind])) for kind in KINDS}
            notes = result.provenance["model"]["notes"]
            lines.append(
                [case.name, way, result.provenance["model"]["tier"], str(notes.get("t2_factors", ""))]
                + [f"{gain[kind]:+.2f}" for kind in KINDS]
            )
            about = f"{case.name}, {way}: "
            rows += [Row.of(f"{about}gain over no-guide, {kind}, dB", value) for kind, value in gain.items()]
            rows.append(Row.of(about + "consistency", float(result.ions["consistency"].max()), must="<= 1e-5"))
    header = ["section", "by", "tier", "factors by the network", *(f"{kind}, dB" for kind in KINDS)]
    print("\n" + table("sections that the registered model never saw: PSNR over no-guide", header, lines))
    return rows


CASES = {"unseen": unseen}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; nothing but consistency must be met, the figures say what a model of other sections is worth."""
    given = parser(__doc__.splitlines()[0], list(CASES)).parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deepfere-amortised-") as scratch:
        for name in chosen(given, CASES, "unseen"):
            rows += CASES[name](Path(scratch), given.quick)
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
