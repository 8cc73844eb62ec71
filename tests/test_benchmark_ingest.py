"""The benchmark of imzML reading: its files are what they say, its page leaves what others wrote."""

from __future__ import annotations

import importlib
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
    for name in ("ingest", "imzml_files", "common"):
        sys.modules.pop(name, None)


def test_generated_pairs_are_what_they_say(tmp_path, load):
    files = load("imzml_files")
    for more in (False, True):
        path = tmp_path / "x.imzML"
        files.write_xml(path, 4, np.array([3, 0, 5, 7, 2]), continuous=False, more=more)
        index = read_index(path, check_ibd=False)
        assert index.mz_length.tolist() == [3, 0, 5, 7, 2] and index.mz_offset.tolist() == [16, 52, 52, 112, 196]
        assert index.x.tolist() == [1, 2, 3, 4, 1] and index.y.tolist() == [1, 1, 1, 1, 2]
    files.write_continuous(tmp_path / "c.imzML", 5, 6, 7)
    m = ingest(tmp_path / "c.imzML", tmp_path / "c.zarr")
    assert m.ions.shape == (7, 5, 6) and m.mask.all() and (m.cube() == 0).any()
    path = tmp_path / "p.imzML"
    files.write_processed(path, 5, 6, 30)
    index = read_index(path)
    assert abs(index.mz_length.mean() - 30) < 4
    with index.ibd_path.open("rb") as ibd:
        assert all((np.diff(mz) >= 0).all() for mz in read_arrays(index, ibd, np.arange(30), "mz"))
    m = ingest(path, tmp_path / "p.zarr", mz=files.targets(30))
    assert (m.cube() > 0).mean() > 0.3


def test_the_page_keeps_what_others_wrote(tmp_path, load, monkeypatch):
    bench, common = load("ingest"), load("common")
    page = tmp_path / "performance.md"
    monkeypatch.setattr(bench, "PAGE", page)
    bench.write_page([common.Row.of("a figure", 3.0, must=">= 2")])
    page.write_text(page.read_text() + "\nafter\n")
    bench.write_page([common.Row.of("another", 1.0, "that", 4.0, ">= 2")])
    text = page.read_text()
    assert text.startswith("# Performance\n") and text.endswith("after\n") and "a figure" not in text
    assert "| another | 1 | that 4 | >= 2 | missed |" in text and text.count("ingest:begin") == 1
