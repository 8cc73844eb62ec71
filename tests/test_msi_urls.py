"""Measurements by URL: index, ingestion, `info`, `fuse` and an ingested cube, from a server of the S3 protocol."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

import deepfere
from deepfere import remote
from deepfere.errors import InputError, StorageError
from deepfere.inspect import describe
from deepfere.measured.ingest import ingest
from deepfere.measured.store import open_measured
from deepfere.pipeline.prepare import msi_input_digest
from deepfere.places import UrlPath
from deepfere.readers.digest import tree_digest
from deepfere.readers.imzml import msi_digest, read_index

from .conftest import FACTOR, contents

FOLDER = "s3://bucket/msi"
MSI = f"{FOLDER}/section.imzML"
QUICK = ["tracking.uri=none", "model.tier=T0"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def uploaded(s3_session, phantom):
    s3_session.files.put(str(phantom.imzml), MSI)
    s3_session.files.put(str(phantom.imzml.with_suffix(".ibd")), f"{FOLDER}/section.ibd")
    return MSI


def test_index_digest_and_pixels_are_those_of_the_local_file(s3, uploaded, phantom, tmp_path):
    near, far = read_index(phantom.imzml), read_index(uploaded, cache=tmp_path / "index.parquet")
    for name in ("x", "y", "length", "mz_offset", "int_offset"):
        np.testing.assert_array_equal(getattr(near, name), getattr(far, name))
    assert (near.uuid, near.pitch_um, near.uuid_matches) == (far.uuid, far.pitch_um, far.uuid_matches)
    assert msi_digest(uploaded) == msi_digest(phantom.imzml)
    asked = len(s3.asked)
    kept = read_index(uploaded, cache=tmp_path / "index.parquet")
    np.testing.assert_array_equal(kept.int_offset, far.int_offset)
    assert len(s3.asked) - asked < 20
    here, there = deepfere.open_measured(phantom.imzml), deepfere.open_measured(uploaded)
    mz = float(phantom.mz()[0])
    np.testing.assert_array_equal(here.ion_image(mz, 5), there.ion_image(mz, 5))
    y, x = np.argwhere(here.mask)[0]
    np.testing.assert_array_equal(here.spectrum(y, x), there.spectrum(y, x))


def test_ingested_bytes_are_those_of_the_local_file(s3, uploaded, phantom, tmp_path):
    ingest(phantom.imzml, tmp_path / "near.zarr", band_rows=8)
    # One request in seven fails, and what was asked for is asked again.
    count = iter(range(10**9))
    s3.failing = lambda method, path: 503 if method == "GET" and next(count) % 7 == 3 else None
    ingest(uploaded, tmp_path / "far.zarr", band_rows=8)
    assert any(status == 503 for *_, status in s3.asked)
    assert contents(tmp_path / "near.zarr", ".") == contents(tmp_path / "far.zarr", ".")


def test_an_ibd_of_another_case_is_found(s3, phantom):
    s3.files.put(str(phantom.imzml), "s3://bucket/case/a.imzML")
    s3.files.put(str(phantom.imzml.with_suffix(".ibd")), "s3://bucket/case/a.IBD")
    assert read_index("s3://bucket/case/a.imzML").ibd_path == UrlPath("s3://bucket/case/a.IBD")


def test_info_knows_an_imzml_of_another_ending(s3, phantom):
    s3.files.put(str(phantom.imzml), "s3://bucket/xml/a.xml")
    s3.files.put(str(phantom.imzml.with_suffix(".ibd")), "s3://bucket/xml/a.ibd")
    found = describe("s3://bucket/xml/a.xml")
    assert found.whole and "imzML" in found.kind


def test_what_is_missing_or_cut_off_is_told_in_one_line(s3, phantom):
    with pytest.raises(InputError, match="does not exist") as caught:
        msi_digest(f"{FOLDER}/none.imzML")
    assert "\n" not in str(caught.value)
    s3.files.put(str(phantom.imzml), "s3://bucket/alone/a.imzML")
    with pytest.raises(InputError, match=r"its binary file a\.ibd is missing"):
        read_index("s3://bucket/alone/a.imzML")
    whole = phantom.imzml.with_suffix(".ibd").read_bytes()
    s3.files.pipe_file("s3://bucket/alone/a.ibd", whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        read_index("s3://bucket/alone/a.imzML")
    found = describe("s3://bucket/alone/a.imzML")
    assert not found.whole and any("truncated" in text for text in found.problems)
    s3.failing = lambda method, path: 500
    with pytest.raises(StorageError, match="keeps failing"):
        read_index(MSI)


def test_info(s3, uploaded, phantom):
    near, far = describe(str(phantom.imzml)), describe(uploaded)
    assert (near.kind, near.facts, near.whole) == (far.kind, far.facts, far.whole)


class Moody(http.server.SimpleHTTPRequestHandler):
    """Fails as many questions as it is told to."""

    left = 0

    def do_HEAD(self):
        self._answer(super().do_HEAD)

    def do_GET(self):
        self._answer(super().do_GET)

    def _answer(self, as_usual):
        if Moody.left > 0:
            Moody.left -= 1
            self.send_error(503)
        else:
            as_usual()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("failing", [0, 2, 4])
def test_a_web_server_that_throttles(phantom, failing, monkeypatch):
    handler = functools.partial(Moody, directory=str(phantom.imzml.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = UrlPath(f"http://127.0.0.1:{server.server_port}")
        for ask in (UrlPath.is_file, UrlPath.exists, lambda url: remote.holds(str(url.parent), url.name)):
            Moody.left = failing
            assert ask(here / "section.imzML") and not ask(here / "none.imzML")
        Moody.left = 1000
        with pytest.raises(StorageError, match="keeps failing"):
            (here / "section.imzML").is_file()
        server.shutdown()
    Moody.left = 0


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server, without its log."""

    def log_message(self, *args):
        pass


def test_a_web_server(phantom, tmp_path):
    handler = functools.partial(Quiet, directory=str(phantom.imzml.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/section.imzML"
        assert msi_digest(url) == msi_digest(phantom.imzml)
        np.testing.assert_array_equal(read_index(url).int_offset, read_index(phantom.imzml).int_offset)
        with pytest.raises(InputError, match="does not exist"):
            msi_digest(url.replace("section", "none"))
        ingest(phantom.imzml, tmp_path / "cube.zarr")
        shutil.copy(phantom.imzml, tmp_path / "a.imzML")
        shutil.copy(phantom.imzml.with_suffix(".ibd"), tmp_path / "a.IBD")
        handler.keywords["directory"] = str(tmp_path)
        here = url.rpartition("/")[0]
        assert read_index(f"{here}/a.imzML").ibd_path == UrlPath(f"{here}/a.IBD")
        with pytest.raises(InputError, match="does not say which files"):
            msi_input_digest(f"{here}/cube.zarr")
        server.shutdown()


@pytest.mark.ray
def test_fuse_and_an_ingested_cube(s3, ray_session, uploaded, phantom, tmp_path, cli):
    given = ["--no-guide", "--factor", FACTOR, *QUICK]
    assert cli("fuse", phantom.imzml, "-o", tmp_path / "near.zarr", *given).code == 0
    told = cli("fuse", uploaded, phantom.slide, "-o", tmp_path / "far.zarr", *given)
    assert told.code == 0 and "--no-guide leaves the slide out" in told.err, told.err
    near, far = (deepfere.open(tmp_path / name) for name in ("near.zarr", "far.zarr"))
    mz = float(near.ions["mz"][0])
    np.testing.assert_array_equal(near.ion(mz).compute(), far.ion(mz).compute())
    cube = "s3://bucket/cube.zarr"
    ingest(phantom.imzml, cube)
    local = tmp_path / "cube.zarr"
    s3.files.get(cube, str(local), recursive=True)
    assert tree_digest(cube) == tree_digest(local) == msi_input_digest(cube)
    told = cli("fuse", cube, "-o", tmp_path / "cubed.zarr", *given)
    assert told.code == 0, told.err
    np.testing.assert_array_equal(near.ion(mz).compute(), deepfere.open(tmp_path / "cubed.zarr").ion(mz).compute())


@pytest.mark.ray
def test_a_study_by_url(s3, ray_session, uploaded, tmp_path, cli):
    study = tmp_path / "study.csv"
    study.write_text(f"name,msi\na,{uploaded}\nb,{FOLDER}/none.imzML\n")
    told = cli("ingest", study, "-o", tmp_path / "work", *QUICK, "guide=false")
    assert told.code == 2 and f"section b, input: {FOLDER}/none.imzML: does not exist" in told.err
    told = cli("ingest", "s3://bucket/study.csv", "-o", tmp_path / "work", *QUICK)
    assert told.code == 2 and "s3://bucket/study.csv: is a URL; give the manifest as a local file" in told.err
    study.write_text(f"name,msi\na,{uploaded}\n")
    told = cli("ingest", study, "-o", tmp_path / "work", *QUICK, "guide=false")
    assert told.code == 0, told.err
    (cube,) = Path(tmp_path / "work").rglob("measured.zarr")
    assert open_measured(cube).mask.any()
