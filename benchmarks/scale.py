"""A study as large as they come: ``python benchmarks/scale.py [CASE ...] [--quick] [--json FILE]``.

Sections of 1000 output shards are planned, scheduled on Ray's actors, recorded in their journals, given pyramids and
sealed by the code that a study is reconstructed with; only the workers do nothing, and there are no stores. Cases are
numbers of shards (of level 0; the pyramids add two thirds). What is measured is the driver: the time that it takes for
a shard (processor time too, which other work on the machine does not change as much), its memory, and the most rows
that are alive at once. In the case ``killed`` the driver is killed half-way, and the same command goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import Row, chosen, finish, parser, table

from deepfere.cluster import Journal, connect, records_in, shutdown
from deepfere.config import RaySettings
from deepfere.frame import SectionGrid
from deepfere.pipeline.workspace import Workspace
from deepfere.pipeline.write import shard_phases
from deepfere.reconstruction.ome import level_shapes
from deepfere.reconstruction.pyramid import level_counts, pyramid_phases
from deepfere.rows import Phase, Phases, RowWorker
from deepfere.schedule import MOST_ROWS, run_jobs
from deepfere.tiling.plan import ShardGrid

ROWS, COLUMNS = 25, 40
A_SECTION = ROWS * COLUMNS
FACTOR, SHARD_PX = 8, 64
SIZES = {"1e5": 10**5, "1e6": 10**6, "1e7": 10**7}
QUICK = {"1e4": 10**4, "1e5": 10**5}
KILLED, QUICK_KILLED = 10**6, 2 * 10**4
CORES = 2
FINGERPRINT = "benchmark"


class Nothing(RowWorker):
    """Records its rows, and does no more."""

    def __init__(self, out: str, journal: str, fingerprint: str) -> None:
        self.journal = Journal(journal, fingerprint)

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"uncovered": 0}


class Alive:
    """How many rows there are, and when the first one was done."""

    def __init__(self, file: Path) -> None:
        self._file, self._told = file, 0
        self.now = self.most = self.done = 0
        self.first_s = self.first_cpu_s = 0.0

    def counted(self, phases: Phases, level_0: bool) -> Phases:
        """The same phases, their rows counted."""
        for phase in phases:
            yield replace(phase, rows=self._made(phase.rows), on_done=self._gone(phase.on_done, level_0))

    def _made(self, rows: Any) -> Iterator[dict[str, Any]]:
        for row in rows:
            self.now += 1
            self.most = max(self.most, self.now)
            yield row

    def _gone(self, on_done: Any, level_0: bool) -> Any:
        def step(record: dict[str, Any]) -> None:
            self.now -= 1
            if not self.done:
                self.first_s, self.first_cpu_s = time.perf_counter(), time.process_time()
            self.done += level_0
            if self.done >= self._told + A_SECTION:
                self._told = self.done
                self._file.write_text(str(self.done))
            on_done(record)

        return step


def section(name: str, work: Workspace, mask: np.ndarray, alive: Alive) -> Phases:
    """What `reconstruct_phases` does for one section, but for stores and pixels."""
    folder = work.section(name)
    shards = ShardGrid.plan(SectionGrid(mask.shape, (50.0, 50.0)), FACTOR, SHARD_PX, SHARD_PX)
    counts = level_counts(level_shapes(shards.shape_px), shards.shard_px, ("detail", "stain"))
    level_0, pyramid = (Journal(folder.journal / stage, FINGERPRINT) for stage in ("reconstruct", "pyramid"))
    arguments = ("", str(level_0.folder), FINGERPRINT)
    tell = lambda share: None  # noqa: E731
    with work.stage("reconstruct", [FINGERPRINT], name) as facts:
        if facts is not None:
            yield from alive.counted(shard_phases(name, shards, mask, level_0, Nothing, arguments, tell), True)
            facts["uncovered_px"] = sum(record["uncovered"] for record in level_0.done().values())
            yield from alive.counted(pyramid_phases("", counts, pyramid, name, tell, Nothing), False)
    arguments = ("", str(folder.journal / "seal"), FINGERPRINT)
    yield Phase(name, Nothing, arguments, [{"unit": name}], 1)


def drive(folder: Path, shards: int) -> None:
    """The driver: all sections, and what it took, as JSON on standard output."""
    started = time.perf_counter()
    work, alive = Workspace(folder), Alive(folder / "progress")
    mask = np.ones((ROWS * SHARD_PX // FACTOR, COLUMNS * SHARD_PX // FACTOR), bool)
    connect(RaySettings(num_cpus=CORES, object_store_memory_bytes=100 * 2**20))
    jobs = ((f"s{n:05d}", section(f"s{n:05d}", work, mask, alive)) for n in range(shards // A_SECTION))
    run_jobs(jobs, title="scale")
    ended, ended_cpu = time.perf_counter(), time.process_time()
    told = {
        "seconds": ended - alive.first_s,
        "cpu_s": ended_cpu - alive.first_cpu_s,
        "until_first_s": alive.first_s - started,
        "done": alive.done,
        "most_rows": alive.most,
    }
    shutdown()
    print(json.dumps(told))


def driven(folder: Path, shards: int, kill_at: int | None = None) -> dict[str, float]:
    """Run the driver in a process of its own: what it told and its peak PSS; killed once so many shards are done."""
    command = [sys.executable, str(Path(__file__).resolve()), "--driver", str(folder), str(shards)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, start_new_session=True)
        root, peak, progress = psutil.Process(process.pid), 0, folder / "progress"
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                peak = max(peak, root.memory_full_info().pss)
            text = progress.read_text() if kill_at is not None and progress.exists() else ""
            if kill_at is not None and text.isdigit() and int(text) >= kill_at:
                below = root.children(recursive=True)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                psutil.wait_procs(below, timeout=120)  # Ray's own processes end by themselves
                return {"done": float(text), "peak": peak}
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        out.seek(0)
        log.seek(0)
        lines = out.read().splitlines()
        if process.returncode or not lines:
            sys.exit(f"the driver ended with {process.returncode}\n{log.read()[-3000:]}")
    return {**json.loads(lines[-1]), "peak": peak}


def recorded(folder: Path, shards: int) -> tuple[int, int, float, int]:
    """Of all journals of level 0: shards that are missing, shards recorded twice, seconds to read, bytes."""
    missing = twice = size = 0
    began = time.perf_counter()
    for n in range(shards // A_SECTION):
        journal = folder / "sections" / f"s{n:05d}" / "journal" / "reconstruct"
        units = [unit for record in records_in(journal) for unit in record["units"]]
        missing += A_SECTION - len(set(units))
        twice += len(units) - len(set(units))
        size += sum(file.stat().st_size for file in journal.iterdir())
    return missing, twice, time.perf_counter() - began, size


def calm(name: str, shards: int) -> tuple[list[Row], tuple[float, float]]:
    """Nothing happens; the driver's processor time and the time on the clock a shard, microseconds, beside the rows."""
    with tempfile.TemporaryDirectory(prefix="deepfere-scale-") as scratch:
        found = driven(Path(scratch), shards)
        missing, twice, read_s, size = recorded(Path(scratch), shards)
    cpu_us, wall_us = (1e6 * found[key] / shards for key in ("cpu_s", "seconds"))
    rows = [
        Row.of(f"{name}: minutes", (found["seconds"] + found["until_first_s"]) / 60, must="<= 30"),
        Row.of(f"{name}: microseconds a shard", wall_us),
        Row.of(f"{name}: of the driver's processor", cpu_us),
        Row.of(f"{name}: driver's peak PSS, MiB", found["peak"] / 2**20, must="< 4096"),
        # Two calls of an actor.
        Row.of(f"{name}: most rows alive", found["most_rows"], must=f"<= {2 * CORES * MOST_ROWS}"),
        Row.of(f"{name}: shards missing or twice", missing + twice, must="<= 0"),
        Row.of(f"{name}: journals, bytes a shard", size / shards),
        Row.of(f"{name}: journals, seconds to read all", read_s),
    ]
    return rows, (cpu_us, wall_us)


def killed(shards: int) -> list[Row]:
    """The driver is killed half-way, and the same command goes on."""
    with tempfile.TemporaryDirectory(prefix="deepfere-scale-") as scratch:
        before = driven(Path(scratch), shards, kill_at=shards // 2)
        again = driven(Path(scratch), shards)
        missing, twice, _, _ = recorded(Path(scratch), shards)
    return [
        Row.of("killed: shards", shards),
        Row.of("killed: share that the driver knew to be done", before["done"] / shards),
        Row.of("killed: share done by the second one", again["done"] / shards),
        Row.of("killed: seconds from its start to its first shard", again["until_first_s"]),
        Row.of("killed: shards missing", missing, must="<= 0"),
        Row.of("killed: shards done twice", twice, must="<= 0"),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a must is missed."""
    sizes = {**QUICK, **SIZES}
    given = parser(__doc__.splitlines()[0], [*sizes, "killed"]).parse_args(arguments)
    some = chosen(given, dict.fromkeys([*sizes, "killed"]), "killed") if given.cases else []
    names = some or [*(QUICK if given.quick else SIZES), "killed"]
    rows: list[Row] = []
    costs = []
    for name in names:
        if name == "killed":
            more = killed(QUICK_KILLED if given.quick else KILLED)
        else:
            more, cost = calm(name, sizes[name])
            costs.append(cost)
        rows += more
        print("\n" + table(name, ["what", "value"], [[row.what, f"{row.value:.4g}"] for row in more]), flush=True)
    if len(costs) > 1:
        must = "" if given.quick else "<= 1.2"
        for what, cost in zip(("driver's processor time", "time on the clock"), zip(*costs, strict=True), strict=True):
            rows.append(Row.of(f"the {what} for a shard grows by", cost[-1] / cost[0], must=must))
    return finish(rows, given.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        drive(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
