"""The benchmark of imzML reading: its files are what they say, its page leaves what others wrote."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from deepfere.measured.ingest import ingest
from deepfere.readers.imzml import read_index
from deepfere.readers.imzml_arrays import read_arrays

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("ingest", "imzml_files", "table_files", "performance", "common"):
        sys.modules.pop(name, None)


def test_generated_pairs_are_what_they_say(tmp_path, load):
    files = load("imzml_files")
    for more in (False, True):
        path = tmp_path / "x.imzML"
        files.write_xml(path, 4, np.array([3, 0, 5, 7, 2]), continuous=False, more=more)
        index = read_index(path, check_ibd=False)
        assert index.length[:].tolist() == [3, 0, 5, 7, 2] and index.mz_offset[:].tolist() == [16, 52, 52, 112, 196]
        assert index.x[:].tolist() == [1, 2, 3, 4, 1] and index.y[:].tolist() == [1, 1, 1, 1, 2]
    files.write_continuous(tmp_path / "c.imzML", 5, 6, 7)
    m = ingest(tmp_path / "c.imzML", tmp_path / "c.zarr")
    assert m.ions.shape == (7, 5, 6) and m.mask.all() and (m.cube() == 0).any()
    path = tmp_path / "p.imzML"
    files.write_processed(path, 5, 6, 30)
    index = read_index(path)
    assert abs(index.length[:].mean() - 30) < 4
    with index.ibd_path.open("rb") as ibd:
        assert all((np.diff(mz) >= 0).all() for mz in read_arrays(index, ibd, np.arange(30), "mz"))
    m = ingest(path, tmp_path / "p.zarr", mz=files.targets(30))
    assert (m.cube() > 0).mean() > 0.3


def test_generated_tables_hold_the_same_by_pixel_and_by_variable(tmp_path, load):
    tables = load("table_files")
    found = []
    for by in ("csr", "csc"):
        tables.write_long_table(tmp_path / f"{by}.zarr", 5, 6, 7, by)
        found.append(ingest(tmp_path / f"{by}.zarr", tmp_path / f"{by}_m.zarr"))
        assert found[-1].attrs["encoding"] == by and found[-1].ions.shape == (7, 5, 6) and found[-1].mask.all()
    np.testing.assert_array_equal(found[0].cube(), found[1].cube())
    np.testing.assert_array_equal(found[0].cube()[:, 0], found[0].cube()[:, 4])
    assert 0.1 < (found[0].cube() == 0).mean() < 0.5


def test_the_page_states_value_baseline_and_verdict(load):
    bench, common = load("ingest"), load("common")
    rows = [common.Row.of("a figure", 3.0, must=">= 2"), common.Row.of("another", 1.0, "that", 4.0, ">= 2")]
    lines = bench.figures(rows).splitlines()
    assert lines[-2:] == ["| a figure | 3 |  | >= 2 | ok |", "| another | 1 | that 4 | >= 2 | missed |"]


@pytest.mark.parametrize("kind", ["continuous", "processed"])
def test_signal_is_held_against_pyimzml_and_every_floor_is_stated(tmp_path, load, kind):
    files, bench = load("imzml_files"), load("ingest")
    path = tmp_path / "x.imzML"
    mz = files.targets(20).tolist() if kind == "processed" else None
    (files.write_processed if mz else files.write_continuous)(path, 12, 16, 20)
    rows, measured = bench.same_signal(path, mz, kind)
    assert all(row.ok and row.must for row in rows) and rows[0].value == rows[0].baseline == 12 * 16
    # A store that misses a part of the signal is told from one that has it all.
    measured.tic[0, 0] = 0
    bench.ingest = lambda *args, **options: measured
    assert not all(row.ok for row in bench.same_signal(path, mz, kind)[0])
    bench.ingest = ingest
    rows = bench.ingestion(path, mz, 1, "", kind)
    for floor in ("reading once and writing once", "writing the finished cube alone", "summing the mapped .ibd"):
        values = [row.value for row in rows if floor in row.what]
        assert len(values) >= 2 and min(values) > 0
    bench.scan(path)


def test_thyras_row_is_time_pixels_and_signal(tmp_path, load):
    files, bench = load("imzml_files"), load("ingest")
    path = tmp_path / "x.imzML"
    files.write_continuous(path, 3, 4, 20)
    _, measured = bench.same_signal(path, None, "few")
    thyra = tmp_path / "python"
    told = f"seconds 1000 900 True\ntable 12 {2 * bench.signal(measured)!r}"
    thyra.write_text(f"#!/bin/sh\necho '{told}'\n")
    thyra.chmod(0o755)
    rows = {row.what: row for row in bench.against_thyra(path, None, str(thyra), True, "few")}
    assert rows["few: times thyra, index included"].value > 3
    pixels = rows["few: pixels, those of thyra's table"]
    assert (pixels.value, pixels.baseline, pixels.ok) == (12, 12, True)
    peak = rows["few: peak PSS, MB"]
    assert peak.value > 20 and peak.against == "thyra" and peak.baseline >= 0
    assert rows["few: sum of thyra's table, over that of all spectra"].value == pytest.approx(2)
    # One that fails is no success.
    for told, code, words in (
        ("broken", 1, "ended with 1\nbroken"),
        ("table 12 3.0", 0, "converted nothing\ntable 12"),
    ):
        thyra.write_text(f"#!/bin/sh\necho {told} >&2\nexit {code}\n")
        with pytest.raises(SystemExit, match=words):
            bench.against_thyra(path, None, str(thyra), True, "few")


def test_a_run_without_thyra_says_so_on_the_page(load, monkeypatch):
    bench, common, pages = load("ingest"), load("common"), {}
    monkeypatch.setattr(bench, "CASES", {"continuous": lambda *_: [common.Row.of("a figure", 3.0, must=">= 2")]})
    monkeypatch.setattr(bench.Section, "write", lambda self, *parts: pages.update({self.heading(): parts}))
    monkeypatch.setattr(sys, "argv", ["ingest.py", "continuous", "--write-docs"])
    cores = os.sched_getaffinity(0)
    assert bench.main() == 0 and os.sched_getaffinity(0) == cores
    ((page, (_, table)),) = pages.items()
    assert "`python benchmarks/ingest.py continuous --write-docs`" in page and f" {len(cores)} cores of " in page
    assert "Left out: thyra" in page and "pyimzml " in page and "| a figure | 3 |" in table
