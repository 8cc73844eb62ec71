"""What the benchmarks share: result rows with their musts, tables, the machine, JSON and the exit code.

A benchmark prints tables for people and rows for programs:
``{"machine": {...}, "rows": [{"what", "value", "against", "baseline", "ratio", "must", "ok"}]}``. Some also write
their part of docs/performance.md (`performance`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_MUST = re.compile(
    r"^(?P<op><=|>=|<|>|within)\s+(?P<number>[0-9.eE+-]+)?\s*(?P<base>(of )?baseline)?\s*(?P<off>[+-]\s*[0-9.eE-]+)?$"
)
PACKAGES = ("deepfere", "numpy", "scipy", "torch", "ray", "zarr", "opencv-python-headless")


def met(value: float, baseline: float | None, must: str) -> bool:
    """Whether a row meets its must.

    Args:
        value: What was measured; NaN meets nothing.
        baseline: What it is set against, or None.
        must: Empty (always met), ``OP NUMBER``, ``OP baseline``, ``OP baseline + NUMBER`` with OP one of
            ``<= >= < >``, or ``within NUMBER of baseline`` (both sides).

    Raises:
        ValueError: The must cannot be read, or needs a baseline that is not there.
    """
    if not must:
        return True
    found = _MUST.match(must.strip())
    if found is None or (found["op"] == "within") != bool(found["base"] and found["number"]):
        raise ValueError(f"cannot read the must {must!r}")
    if bool(found["number"]) == bool(found["base"]) and found["op"] != "within":
        raise ValueError(f"the must {must!r} needs one number or the baseline")
    if found["base"] and baseline is None:
        raise ValueError(f"the must {must!r} needs a baseline")
    if found["op"] == "within":
        return abs(value - float(baseline or 0.0)) <= float(found["number"])
    bar = float(found["number"]) if found["number"] else float(baseline or 0.0)
    if found["off"]:
        bar += float(found["off"].replace(" ", ""))
    compared = {"<=": value <= bar, ">=": value >= bar, "<": value < bar, ">": value > bar}
    return compared[found["op"]]


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark.

    Attributes:
        what: What was measured, unit included.
        value: The figure; NaN where there is none.
        against: What the baseline is.
        baseline: The figure that it is set against, or None.
        ratio: value / baseline, or None.
        must: What it must meet (see `met`); empty for information.
        ok: Whether it does.
    """

    what: str
    value: float
    against: str
    baseline: float | None
    ratio: float | None
    must: str
    ok: bool

    @classmethod
    def of(cls, what: str, value: float, against: str = "", baseline: float | None = None, must: str = "") -> Row:
        """A row with its ratio and verdict filled in."""
        value = float(value)
        base = None if baseline is None else float(baseline)
        ratio = None if base is None or base == 0 else value / base
        return cls(what, value, against, base, ratio, must, met(value, base, must))


def signed(value: float, digits: int) -> str:
    """A change with its sign; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain text table: the first column to the left, the others to the right.

    Args:
        title: Printed above.
        header: Column names.
        rows: Cells; floats should come formatted, None is left blank.
    """
    cells = [list(header), *[["" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    lines = [title]
    for number, row in enumerate(cells):
        lines.append(
            "  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], bold: str | None = None) -> str:
    """A markdown table, figures to the right; the row that begins with ``bold`` is set off."""

    def escaped(values: Sequence[str]) -> list[str]:
        return [str(value).replace("|", "\\|") for value in values]

    lines = ["| " + " | ".join(escaped(header)) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in rows:
        cells = escaped(row)
        if bold is not None and cells[0].removesuffix(" †") == bold:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "load_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
    }


def _plain(values: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_json(
    path: str | Path, about: dict[str, Any], rows: Iterable[Row], more: dict[str, Any] | None = None
) -> None:
    """Write the machine and the rows.

    Args:
        path: Where to; its folder must exist.
        about: From `machine`.
        rows: Figures; those that are not finite become null.
        more: What else the file holds.
    """
    values = {"machine": about, **(more or {}), "rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(_plain(values), indent=1, allow_nan=False) + "\n")


def tree_pss_bytes(root: psutil.Process) -> int:
    """Sum of PSS over a process and all that it started, bytes."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return total


def measured(command: Sequence[str]) -> tuple[float, int, str]:
    """Run a command: seconds, peak PSS of its process tree in bytes (sampled twice a second), what it printed.

    Ends the program where the command fails.
    """
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        root, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                peak = max(peak, tree_pss_bytes(root))
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        seconds = time.perf_counter() - started
        log.seek(0)
        printed = log.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}\n{printed[-3000:]}")
    return seconds, peak, printed


def parser(description: str, cases: Sequence[str], page: bool = False) -> argparse.ArgumentParser:
    """The command line that all benchmarks share: ``[CASE ...] [--quick] [--json FILE]``.

    With ``page`` also ``--write-docs``, which a quick run refuses: its figures are for nobody.
    """
    out = argparse.ArgumentParser(description=description, allow_abbrev=False)
    # No `choices`: argparse refuses an empty list of them.
    out.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(cases)}; all by default")
    either = out.add_mutually_exclusive_group()
    either.add_argument("--quick", action="store_true", help="within a minute on 2 cores; longer rows are left out")
    if page:
        either.add_argument("--write-docs", action="store_true", help="write its part of docs/performance.md")
    out.add_argument("--json", metavar="FILE", help="write machine and rows")
    return out


def chosen(given: argparse.Namespace, cases: dict[str, Any], *quick: str) -> list[str]:
    """Names of the cases to run: those that were asked for, else all, or those of ``quick`` alone under ``--quick``.

    Ends the program with exit code 2 where a name is not known.
    """
    unknown = [name for name in given.cases if name not in cases]
    if unknown:
        print(f"unknown case {unknown[0]!r}; known: {', '.join(cases)}", file=sys.stderr)
        sys.exit(2)
    return given.cases or (list(quick) if given.quick else list(cases))


def finish(rows: Sequence[Row], json_path: str | None = None, more: dict[str, Any] | None = None) -> int:
    """Print the musts, write the JSON and ``more`` in it, and give the exit code: 1 if a must is missed, else 0."""
    judged = [row for row in rows if row.must]
    if judged:
        cells = [
            [
                row.what,
                f"{row.value:.4g}",
                "" if row.baseline is None else f"{row.against} {row.baseline:.4g}",
                row.must,
                "ok" if row.ok else "MISSED",
            ]
            for row in judged
        ]
        print("\n" + table("musts", ["what", "value", "against", "must", ""], cells))
    if json_path:
        write_json(json_path, machine(), rows, more)
    missed = [row.what for row in rows if not row.ok]
    if missed:
        print(f"{len(missed)} of {len(judged)} musts missed", file=sys.stderr)
    return 1 if missed else 0
