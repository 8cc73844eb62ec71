"""The demo as a benchmark: wall time, peak memory of the whole process tree, and what its report must show.

    python benchmarks/demo.py [--json FILE]

Memory is the sum of PSS over the process tree, sampled twice a second. There is no `--quick` form: the demo is
minutes long, so under `--quick` the table is empty.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import Row, finish, measured, parser


def run() -> list[Row]:
    """All rows."""
    from deepfere.alignment.placement import describe
    from deepfere.phantom import Phantom
    from deepfere.reconstruction.result import Result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "deepfere", "demo", "-o", str(folder / "demo")]
        seconds, peak, printed = measured(command)
        print(printed)
        result = Result(folder / "demo" / "result.zarr")
        scores = json.loads((folder / "demo" / "result.evaluation.json").read_text())
        phantom = Phantom.open(folder / "demo" / "section")
        found, true = describe(result.alignment), describe(phantom.alignment())
        turn = abs((found[1] - true[1] + 180) % 360 - 180)
        rows = [
            Row.of("demo, wall time, s", seconds, must="<= 300"),
            Row.of("demo, peak PSS of the process tree, GiB", peak / 2**30, must="<= 6"),
            Row.of("flip found (1 = right)", float(found[0] == true[0]), must=">= 1"),
            Row.of("rotation error, degrees", turn, must="<= 3"),
            Row.of("alignment error, median, measured pixels", scores["alignment"]["alignment_median_px"]),
            Row.of("alignment error, P90, measured pixels", scores["alignment"]["alignment_p90_px"]),
            Row.of("consistency, worst ion", float(result.ions["consistency"].max()), must="<= 1e-5"),
        ]
        for row in scores["truth"]:
            must = "> baseline" if row["informed"] else "within 0.05 of baseline"
            rows.append(Row.of(f"{row['kind']} ions, PSNR, dB", row["ours_db"], "no-guide", row["no_guide_db"], must))
        print(json.dumps(result.provenance["timings_s"]))
        return rows


if __name__ == "__main__":
    options = parser("The demo: time, memory and what its report must show.", cases=("demo",)).parse_args()
    sys.exit(finish([] if options.quick else run(), options.json))
