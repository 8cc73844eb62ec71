"""Reading imzML against what limits it and against others.

    python benchmarks/ingest.py [CASE ...] [--quick | --write-docs] [--json FILE] [--thyra-python PYTHON]

Cases: ``index`` (the XML, against pyimzML, against reading the file and looking at every byte once), ``continuous`` and
``processed`` (the .ibd to shards, against summing it, and against reading it once and writing the finished cube once;
pixels and intensities against pyimzML's; and against thyra where PYTHON has it), ``memory`` (of a process that ingests,
with and without a lock mass and of tables, as they grow a hundredfold). Files are generated from a seed in a temporary
folder. All arms run in this process or its children on one core, in turns; a figure is the best of its rounds.
``--quick``: smaller, nothing to meet in time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock
from xml.parsers import expat

import common
import numpy as np
from common import Row, markdown, measured
from imzml_files import targets, write_continuous, write_long, write_processed, write_xml
from performance import Section, versions
from table_files import write_long_table

from deepfere.measured.ingest import ingest
from deepfere.measured.store import Measured
from deepfere.measured.writer import MeasuredWriter
from deepfere.readers import imzml
from deepfere.readers.imzml import read_index

# As its command line does by default: centroids are put on a common axis. A shared axis is kept.
THYRA = (
    "import sys, time; from thyra.convert import convert_msi;"
    "axis = {'method': 'auto', 'axis_type': 'auto', 'reference_mz': 1000.0} if sys.argv[3] == 'resample' else None;"
    "t = time.perf_counter(); c = time.process_time();"
    "ok = convert_msi(sys.argv[1], sys.argv[2], pixel_size_um=10.0, resampling_config=axis);"
    "print('seconds', time.perf_counter() - t, time.process_time() - c, ok);"
    "import spatialdata; (table,) = spatialdata.read_zarr(sys.argv[2]).tables.values();"
    "print('table', table.n_obs, float(table.X.sum(dtype='f8')))"
)
WORKER = (
    "import json, re, sys; from pathlib import Path; from deepfere.measured.ingest import ingest;"
    "from deepfere.measured.lock_mass import LockMass; from deepfere.measured.treatment import Treatment;"
    "given = json.loads(sys.argv[3]); lock = given['lock'] and LockMass((given['lock'],));"
    "ingest(sys.argv[1], sys.argv[2], mz=given['mz'], treatment=Treatment(lock), codec='blosc');"
    "print(1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]))"
)


def timed(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Best seconds and best processor seconds of each arm, in turns."""
    best = {name: (float("inf"), float("inf")) for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            arm()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = (min(best[name][0], spent[0]), min(best[name][1], spent[1]))
    return best


def ratio(what: str, ours: tuple[float, float], other: tuple[float, float], must: str = "") -> list[Row]:
    """How many times faster than the other, by the clock; and by processor time, which neighbours disturb less."""
    return [
        Row.of(what, other[0] / ours[0], must=must),
        Row.of(f"{what}, processor time", other[1] / ours[1]),
    ]


def read_all(path: Path) -> None:
    """A file once, from the page cache."""
    block = bytearray(8 << 20)
    with path.open("rb", buffering=0) as handle:
        while handle.readinto(block):
            pass


def scan(path: Path) -> None:
    """A file once, from the page cache, looking (memchr) for a byte that is nowhere in it."""
    block = bytearray(1 << 20)
    with path.open("rb", buffering=0) as handle:
        while n := handle.readinto(block):
            assert block.find(0, 0, n) < 0, "the search ended early"


def mapped_sum(path: Path) -> None:
    """A file once, in order, mapped into memory: the sum of its words."""
    np.memmap(path, np.uint64, "r", shape=(path.stat().st_size // 8,)).sum()


def share(what: str, ours: tuple[float, float], floor: tuple[float, float]) -> Row:
    """How much of our time a floor takes, by processor time."""
    return Row.of(f"{what}, share of our processor time", floor[1] / ours[1])


def bare_expat(path: Path) -> None:
    """The XML parser alone, with handlers that do nothing."""
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda tag, attributes: None
    with path.open("rb") as handle:
        parser.ParseFile(handle)


def index(folder: Path, quick: bool, thyra: str | None) -> list[Row]:
    """The XML of sizes up to a million spectra."""
    from pyimzml.ImzMLParser import ImzMLParser

    rows = []
    sizes = [(20_000, False)] if quick else [(200_000, False), (200_000, True), (1_000_000, False)]
    for n, more in sizes:
        path = folder / "index.imzML"
        write_xml(path, 1000, np.random.default_rng(1).integers(50, 1500, n), continuous=False, more=more)
        read_all(path)
        arms = {
            "ours": lambda path=path: read_index(path, check_ibd=False),
            "pyimzml": lambda path=path: ImzMLParser(str(path), ibd_file=None),
        }
        rounds = 2 if n < 1_000_000 else 1
        best = timed(arms, rounds)
        floor = timed({"read": lambda path=path: read_all(path), "scan": lambda path=path: scan(path)}, 3)
        what = f"index of {n:,} spectra{', more terms' * more}"
        peer, ours = ImzMLParser(str(path), ibd_file=None), read_index(path, check_ibd=False)
        rows.append(Row.of(f"{what}: spectra", len(ours), "pyimzML", len(peer.coordinates), "within 0 of baseline"))
        theirs = [*np.array(peer.coordinates).T[:2], peer.mzOffsets, peer.mzLengths]
        pairs = zip((ours.x, ours.y, ours.mz_offset, ours.length), theirs, strict=True)
        off = sum(not np.array_equal(a[:], b) for a, b in pairs)
        rows.append(Row.of(f"{what}: columns (x, y, offset, length) unlike pyimzML's", off, must="<= 0"))
        rows += ratio(f"{what}: times pyimzML", best["ours"], best["pyimzml"], "" if quick else ">= 12")
        rows.append(share(f"{what}: looking at every byte once (memchr)", best["ours"], floor["scan"]))
        size = path.stat().st_size
        rows.append(
            Row.of(f"{what}: MB/s", size / best["ours"][0] / 1e6, "reading alone", size / floor["read"][0] / 1e6)
        )
        if n < 1_000_000 and not more:
            others = {"walk": lambda path=path: imzml._walk_all(path), "expat": lambda path=path: bare_expat(path)}
            slow = timed(others, 1)
            rows.append(Row.of(f"{what}: times our walk of all tags", slow["walk"][0] / best["ours"][0]))
            rows.append(Row.of(f"{what}: times expat with nothing to do", slow["expat"][0] / best["ours"][0]))
            cache = folder / "index.parquet"
            read_index(path, check_ibd=False, cache=cache)
            arms = {"cache": lambda path=path, cache=cache: read_index(path, check_ibd=False, cache=cache)}
            kept = timed(arms, 3)
            rows.append(Row.of(f"{what}: ms from its cache", 1e3 * kept["cache"][0]))
    return rows


def ingestion(path: Path, mz: list[float] | None, rounds: int, must: str, what: str) -> list[Row]:
    """The ratios of one pair."""
    out, known = path.with_suffix(".zarr"), read_index(path)
    rows = []
    for codec, bar in (("blosc", must), ("zstd", "")):
        options: dict[str, Any] = {"mz": mz, "codec": codec, "overwrite": True}
        store = ingest(path, out, **options)
        band, cube = store.ions.shards[1], store.cube()
        bands = [np.ascontiguousarray(cube[:, y : y + band]) for y in range(0, cube.shape[1], band)]
        axis, shape = store.mz, cube.shape[1:]
        del cube

        def write(
            codec: Any = codec, bands: Any = bands, axis: Any = axis, shape: Any = shape, band: int = band
        ) -> None:
            writer = MeasuredWriter(out, axis, shape, band_rows=band, overwrite=True, codec=codec)
            for (begin, _), images in zip(writer.bands, bands, strict=True):
                writer.write_images(begin, images)

        def floor(write: Callable[[], None] = write) -> None:
            read_all(known.ibd_path)
            write()

        # The index is measured on its own: here it is at hand, as from its cache.
        import deepfere.measured.ions as module

        at_hand = mock.Mock(return_value=known)
        module.read_index = at_hand
        try:
            arms = {"floor": floor, "write": write, "ours": lambda options=options: ingest(path, out, **options)}
            best = timed({"sum": lambda: mapped_sum(known.ibd_path), **arms}, rounds)
        finally:
            module.read_index = read_index
        assert at_hand.called, "the index was read again, and timed"
        name = "blosc-zstd 1 bit-shuffle" if codec == "blosc" else "zstd 1"
        rows += ratio(f"{what}, {name}: of reading once and writing once", best["ours"], best["floor"], bar)
        rows.append(share(f"{what}, {name}: writing the finished cube alone", best["ours"], best["write"]))
        rows.append(share(f"{what}, {name}: summing the mapped .ibd", best["ours"], best["sum"]))
        megabytes = known.ibd_path.stat().st_size / 1e6
        rows.append(Row.of(f"{what}, {name}: MB/s of the .ibd", megabytes / best["ours"][0]))
        stored = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        rows.append(Row.of(f"{what}, {name}: bytes stored per byte", stored / (4 * len(axis) * shape[0] * shape[1])))
    shutil.rmtree(out)
    return rows


def same_signal(path: Path, mz: list[float] | None, what: str) -> tuple[list[Row], Measured]:
    """Pixels and the sum of all their spectra against what pyimzML reads; and the store that they are in."""
    from pyimzml.ImzMLParser import ImzMLParser

    store = ingest(path, path.with_suffix(".zarr"), mz=mz, codec="blosc", overwrite=True)
    with ImzMLParser(str(path)) as peer:
        n = len(peer.coordinates)
        theirs = sum(float(peer.getspectrum(k)[1].sum(dtype=np.float64)) for k in range(n))
    apart = abs(signal(store) / theirs - 1)
    return [
        Row.of(f"{what}: pixels", int(store.mask.sum()), "pyimzML", n, "within 0 of baseline"),
        Row.of(f"{what}: sum of all spectra, relative difference to pyimzML's", apart, must="<= 1e-6"),
    ], store


def signal(store: Measured) -> float:
    """Sum of all spectra as read, whatever ions were kept."""
    return float(store.tic[store.mask].sum(dtype=np.float64))


def against_thyra(path: Path, mz: list[float] | None, python: str | None, judged: bool, what: str) -> list[Row]:
    """The whole of it, index included, and thyra's conversion of the same pair."""
    rows, store = same_signal(path, mz, what)
    pixels, total = int(store.mask.sum()), signal(store)
    if python is None:
        return rows
    out, peer = path.with_suffix(".zarr"), path.with_suffix(".thyra")
    best = timed({"ours": lambda: ingest(path, out, mz=mz, codec="blosc", overwrite=True)}, 2)["ours"]
    shutil.rmtree(out)
    _, peak, _ = measured([sys.executable, "-c", WORKER, str(path), str(out), worker_options(mz)])
    command = [python, "-c", THYRA, str(path), str(peer), "keep" if mz is None else "resample"]
    _, peer_peak, printed = measured(command)
    found = re.search(r"seconds (\S+) (\S+) True", printed)
    table = re.search(r"table (\d+) (\S+)", printed)
    if not found or not table:
        sys.exit(f"thyra converted nothing\n{printed[-2000:]}")
    theirs, read = (float(found[1]), float(found[2])), (float(table[1]), float(table[2]))
    shutil.rmtree(peer, ignore_errors=True)
    return [
        *rows,
        *ratio(f"{what}: times thyra, index included", best, theirs, ">= 3" if judged else ""),
        Row.of(f"{what}: peak PSS, MB", peak / 1e6, "thyra", peer_peak / 1e6),
        Row.of(f"{what}: pixels, those of thyra's table", pixels, "thyra", read[0], "within 0 of baseline"),
        # On a common axis of its own it need not keep the sum.
        Row.of(f"{what}: sum of thyra's table, over that of all spectra", read[1] / total),
    ]


def continuous(folder: Path, quick: bool, thyra: str | None) -> list[Row]:
    """Spectra on one axis: all of them are kept."""
    rows = []
    for ny in (10 if quick else 60, 100 if quick else 500):
        path = folder / f"continuous{ny}.imzML"
        write_continuous(path, ny, 500, 500)
        what = f"continuous, {ny} x 500 x 500"
        if ny <= 60:  # thyra needs some 50 bytes of memory per value
            rows += against_thyra(path, None, thyra, not quick, what)
        else:
            rows += ingestion(path, None, 2 if quick else 4, "" if quick else ">= 0.5", what)
    return rows


def processed(folder: Path, quick: bool, thyra: str | None) -> list[Row]:
    """Centroids, reduced to targets."""
    rows, mz = [], targets(300).tolist()
    for ny in (10 if quick else 60, 100 if quick else 500):
        path = folder / f"processed{ny}.imzML"
        write_processed(path, ny, 500, 300)
        what = f"processed, {ny} x 500 x ~300, 300 targets"
        if ny <= 60:
            rows += against_thyra(path, mz, thyra, not quick, what)
        else:
            rows += ingestion(path, mz, 2 if quick else 4, "" if quick else ">= 0.3", what)
    return rows


def worker_options(mz: list[float] | None, lock: float | None = None) -> str:
    """Target m/z and lock mass as `WORKER` takes them."""
    return json.dumps({"mz": mz, "lock": lock})


def memory(folder: Path, quick: bool, thyra: str | None) -> list[Row]:
    """Peak memory of a process that ingests ten and a hundred times as many rows."""
    ions = targets(300).tolist()
    arms = {
        "continuous": worker_options(None),
        "processed": worker_options(ions),
        "processed, lock mass": worker_options(ions, ions[20]),
        "table by pixel": worker_options(None),
        "table by variable": worker_options(None),
    }
    rows, small = [], 16 if quick else 128
    for what, options in arms.items():
        peaks: dict[int, int] = {}
        for times in (1, 10) if quick else (1, 10, 100):
            path, out = folder / "memory.imzML", folder / "memory.zarr"
            if what.startswith("table"):
                path = folder / "table.zarr"
                write_long_table(path, times * small, 250, 200, "csr" if what.endswith("pixel") else "csc")
            else:
                write_long(path, times * small, 250, 300, continuous=what == "continuous")
            command = [sys.executable, "-c", WORKER, str(path), str(out), options]
            # Scratch files beside the others: the folder that is usual may be memory.
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            peaks[times] = int(done.stdout.split()[-1])
            shutil.rmtree(out)
        for times, peak in peaks.items():
            told = f"{what}, {times * small} rows of 250 pixels"
            rows.append(Row.of(f"{told}: peak MB", peak / 1e6))
            if times > 1:
                must = "" if quick else "<= 1.2"
                rows.append(Row.of(f"{told}: peak memory over that of {small} rows", peak / peaks[1], must=must))
    return rows


CASES = {"index": index, "continuous": continuous, "processed": processed, "memory": memory}


def short(figure: float) -> str:
    """Three digits, or a whole number."""
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"


def figures(rows: list[Row]) -> str:
    """All of them as a table of the page."""
    lines = []
    for row in rows:
        base = "" if row.baseline is None else f"{row.against} {short(row.baseline)}"
        verdict = ("ok" if row.ok else "missed") if row.must else ""
        lines.append([row.what, short(row.value), base, row.must, verdict])
    return markdown(["figure", "value", "of", "must", ""], lines)


def main() -> int:
    parser = common.parser(__doc__ or "", list(CASES), page=True)
    parser.add_argument("--thyra-python", metavar="PYTHON", help="a Python that has thyra, to compare with")
    given = parser.parse_args()
    names = common.chosen(given, CASES, *CASES)
    packages, left_out = versions(["pyimzml", "zarr", "zarrs"]), []
    if given.thyra_python:
        packages |= versions(["thyra", "spatialdata"], given.thyra_python)
    elif {"continuous", "processed"} & set(names):
        left_out.append("thyra (no `--thyra-python`)")
    section, cores = Section.begin("ingest", sys.argv[1:], packages, left_out), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                rows += CASES[name](Path(folder), given.quick, given.thyra_python)
            print(f"{name} done", file=sys.stderr)
    os.sched_setaffinity(0, cores)  # of the machine, for the JSON
    cells = [[row.what, f"{row.value:.4g}", "" if row.baseline is None else f"{row.baseline:.4g}"] for row in rows]
    print(common.table("imzML", ["figure", "value", "of"], cells))
    if given.write_docs:
        told = "One core, files in the page cache. A figure is the best of its rounds; arms take turns."
        section.write(told, figures(rows))
    return common.finish(rows, given.json, section.facts())


if __name__ == "__main__":
    sys.exit(main())
