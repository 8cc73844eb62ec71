"""Ingestion and learning of a study as it grows: time per section, and memory of the process that drives it.

    python benchmarks/many_sections.py [--quick] [--json FILE]

Sections of 8 x 8 pixels with some 40 centroids each, written here. Every study is ingested by the command line without
a target list, so that peaks are found over all of its sections. One section has a damaged .ibd and fails; it is mended,
and the same command is run again; then all of them are learned from together, without a stain. Memory is the sum of PSS
over the process tree, sampled twice a second; what the interpreter and its libraries take is in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import yaml
from common import Row, finish, parser, tree_pss_bytes
from pyimzml.ImzMLWriter import ImzMLWriter

SIDE, IONS = 8, 40
SIZES, QUICK = (100, 1000), (10, 40)


def write_section(path: Path, ions: np.ndarray, seed: int) -> None:
    """One imzML pair: an intensity of each ion in each pixel, m/z off by 1 ppm (s.d.), and some noise."""
    rng = np.random.default_rng(seed)
    with ImzMLWriter(str(path), mode="processed", spec_type="centroid", intensity_dtype=np.float32) as writer:
        for y in range(SIDE):
            for x in range(SIDE):
                mz = np.concatenate([ions * (1 + 1e-6 * rng.standard_normal(len(ions))), rng.uniform(300, 1000, 5)])
                order = np.argsort(mz)
                writer.addSpectrum(mz[order], rng.gamma(2.0, 10.0, len(mz))[order], (x + 1, y + 1, 1))


def write_study(folder: Path, sections: int) -> Path:
    """The sections and their manifest."""
    ions = np.sort(np.random.default_rng(0).uniform(300, 1000, IONS))
    names = [f"s{n:04d}" for n in range(sections)]
    for n, name in enumerate(names):
        write_section(folder / f"{name}.imzML", ions, n)
    rows = [{"name": name, "msi": f"{name}.imzML", "pitch_um": 50} for name in names]
    (folder / "study.yaml").write_text(yaml.safe_dump({"sections": rows}))
    return folder / "study.yaml"


def run(stage: str, manifest: Path, out: Path) -> tuple[int, float, int, str]:
    """Up to a stage: exit code, seconds, peak PSS in bytes, what it printed."""
    command = [
        sys.executable,
        "-m",
        "deepfere",
        stage,
        str(manifest),
        "-o",
        str(out),
        "--no-guide",
        "tracking.uri=none",
    ]
    with tempfile.TemporaryFile("w+") as log:
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=log, stderr=log)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                peak = max(peak, tree_pss_bytes(root))
            time.sleep(0.5)
        seconds = time.perf_counter() - started
        log.seek(0)
        return process.returncode, seconds, peak, log.read()


def case(sections: int) -> tuple[list[Row], dict[str, tuple[float, int]]]:
    """Rows of a study of so many sections; of both stages, seconds a section and peak PSS."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, out = write_study(folder, sections), folder / "work"
        bad = folder / f"s{sections // 2:04d}.ibd"
        whole = bad.read_bytes()
        bad.write_bytes(whole[:-64])
        code, sampled, _, printed = run("ingest", manifest, out)
        told = [line for line in printed.splitlines() if line.startswith("error: ")]
        bad.write_bytes(whole)
        again, seconds, peak, printed = run("ingest", manifest, out)
        if again:
            sys.exit(printed[-3000:])
        failed, learned, most, printed = run("train", manifest, out)
        if failed:
            sys.exit(printed[-3000:])
        ions = json.loads((out / "done" / "ions.json").read_text())["mz"]
        over = f"{sections} sections"
        rows = [
            Row.of(f"{over}: exit code with one damaged", code, must=">= 2"),
            Row.of(f"{over}: lines of errors", len(told), must="<= 1"),
            Row.of(f"{over}: ions found, of {IONS}", len(ions), must=f">= {IONS}"),
            Row.of(f"{over}: sampled, s a section", sampled / sections),
            Row.of(f"{over}: ingested, s a section", seconds / sections),
            Row.of(f"{over}: peak PSS of ingestion, MiB", peak / 2**20),
            Row.of(f"{over}: learned, s a section", learned / sections),
            Row.of(f"{over}: peak PSS of learning, MiB", most / 2**20),
        ]
        return rows, {"ingestion": (seconds / sections, peak), "learning": (learned / sections, most)}


def main(arguments: list[str] | None = None) -> int:
    """All rows."""
    options = parser("A study as it grows.", cases=("study",)).parse_args(arguments)
    rows: list[Row] = []
    took: list[dict[str, tuple[float, int]]] = []
    for sections in QUICK if options.quick else SIZES:
        more, figures = case(sections)
        rows += more
        took.append(figures)
        for row in more:
            print(f"{row.what}: {row.value:.4g}", flush=True)
    must = "" if options.quick else "<= 1.2"
    for stage in took[0]:
        (before_s, before), (after_s, after) = took[0][stage], took[1][stage]
        rows.append(Row.of(f"peak PSS of {stage} grows by", after / before, must=must))
        rows.append(Row.of(f"time of a section's {stage} grows by", after_s / before_s, must=must))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
