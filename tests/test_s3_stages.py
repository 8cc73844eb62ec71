"""Every stage at ``s3://``: the bytes of a local run, whatever the store does meanwhile; never a damaged store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from s3fs import S3FileSystem

import deepfere
from deepfere import cluster, locking, remote
from deepfere.cluster import Journal, records_in
from deepfere.errors import DeepfereError, InputError, StorageError
from deepfere.inspect import describe
from deepfere.pipeline.claim import attributes_of
from deepfere.pipeline.workspace import Workspace
from deepfere.places import UrlPath, copy_tree, place, reading, remove_tree, texts, writing
from deepfere.reconstruction.result import FORMAT
from deepfere.stopping import Stopped
from deepfere.store import create_array, open_group, shard_object
from deepfere.tiling.cache import is_cache

from .conftest import FACTOR, SETTINGS, contents, write_study

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)


def below(s3, url: str, *parts: str) -> dict[str, bytes]:
    """Every object below some folders of a store."""
    root = url.removeprefix("s3://")
    found = [name for part in parts for name in s3.files.find(f"{root}/{part}")]
    assert found
    return {name.removeprefix(f"{root}/"): s3.files.cat_file(name) for name in found}


def now_and_then(every: int) -> Callable[[str, str], int | None]:
    """Fails one request in so many of each method, in turn with a throttling and an error.

    Of each method for itself, and not every second one: that would fail a question of two requests for ever.
    """
    count: Counter[str] = Counter()

    def decide(method: str, path: str) -> int | None:
        count[method] += 1
        return (503, 500)[count[method] // every % 2] if count[method] % every == 0 else None

    return decide


def from_then_on(methods: tuple[str, ...], word: str, status: int = 500) -> Callable[[str, str], int | None]:
    """Fails all requests of some methods from the first one that has a word in its path."""
    begun = [False]

    def decide(method: str, path: str) -> int | None:
        begun[0] = begun[0] or (method in methods and word in path)
        return status if begun[0] and method in methods else None

    return decide


def test_files_and_folders_of_objects(s3, tmp_path):
    root = place("s3://bucket/files")
    assert isinstance(root, UrlPath) and not root.exists() and not list(root.iterdir())
    (root / "a.json").write_text("{}")
    (root / "inner" / "b.txt").write_text("b")
    s3.failing = now_and_then(3)
    assert root.exists() and [p.name for p in root.iterdir()] == ["a.json", "inner"]
    assert [p.name for p in root.glob("*.json")] == ["a.json"] and list(texts(root, "*.json")) == ["{}"]
    with writing(root / "c.npy") as path:
        np.save(path, np.arange(3))
    with reading(root / "c.npy") as path:
        assert np.load(path).tolist() == [0, 1, 2]
    copy_tree(root, place("s3://bucket/copy"))
    copy_tree(root, tmp_path / "here")
    copy_tree(tmp_path / "here", place("s3://bucket/back"))
    s3.heal()
    for copy in ("copy", "back"):
        assert below(s3, f"s3://bucket/{copy}", "") == below(s3, "s3://bucket/files", "")
    with pytest.raises(ValueError, match="half"), writing(root / "a.json"):
        raise ValueError("half")
    assert (root / "a.json").read_text() == "{}"  # nothing of it was sent
    s3.failing = now_and_then(3)
    remove_tree(root)
    s3.heal()
    assert not root.exists() and place("s3://bucket/copy").exists()
    with pytest.raises(FileNotFoundError):
        (root / "a.json").read_text()
    (root / "a.json").unlink(missing_ok=True)


@pytest.mark.parametrize("status", [500, 503])
def test_an_object_is_deleted_however_the_store_throttles(s3, status):
    one = place("s3://bucket/single/identity.json")
    one.write_text("{}")
    s3.fail(status, 2)
    assert one.is_file() and not one.is_dir()
    for left in range(2, 6):
        one.write_text("{}")
        s3.fail(status, left)
        remove_tree(one)
        s3.heal()
        assert not one.exists() and not one.is_file()


def test_one_of_many_objects_is_asked_for_again(s3):
    root = place("s3://bucket/many")
    for n in range(12):
        (root / f"{n:02}.json").write_text(str(n))
    s3.failing = now_and_then(8)
    for _ in range(3):
        assert list(texts(root, "*.json")) == [str(n) for n in range(12)]
    assert any(status is not None for *_, status in s3.asked)


def test_stores_ask_again(s3):
    group = open_group("s3://bucket/store.zarr", "w")
    array = create_array(group, "d", (2, 64, 64), "float32", (2, 16, 16), (2, 32, 32))
    s3.failing = now_and_then(3)
    array[:] = 1
    assert np.asarray(open_group("s3://bucket/store.zarr")["d"]).sum() == 2 * 64 * 64
    shard_object("s3://bucket/store.zarr", "d", 0, 0).unlink()
    assert np.asarray(array[:]).sum() == 2 * 64 * 64 - 2 * 32 * 32
    s3.fail(500, 1000, ("PUT",))
    with pytest.raises(StorageError, match=r"store.zarr/d/c/0/\d/\d: the store keeps failing \(500") as caught:
        array[:, :32, :32] = 2
    assert "\n" not in str(caught.value)
    s3.fail(403, 1000, ("PUT",))
    with pytest.raises(InputError, match="access is refused"):
        array[:, :32, :32] = 2
    s3.heal()
    del group["d"]
    assert list(below(s3, "s3://bucket/store.zarr", "")) == ["zarr.json"]
    for url in ("s3://bucket/none.zarr", "s3://nobody/none.zarr"):
        with pytest.raises(InputError, match="does not exist"):
            open_group(url)


def test_journal_of_objects(s3, monkeypatch):
    """Records are there when `record` returns, in objects of a bounded size; others' do not count."""
    monkeypatch.setattr(cluster, "LINES", 6)
    journal, other = (Journal("s3://bucket/journal", "abc") for _ in range(2))
    s3.failing = now_and_then(5)
    for n in range(9):
        journal.record({f"0/{n}": {"uncovered": n}})
        if n in (0, 1, 6):
            assert set(other.done()) == {f"0/{k}" for k in range(n + 1)}
    other.record({"other": {}})
    s3.heal()
    assert len(other.done()) == 10 and other.done()["0/7"]["uncovered"] == 7
    assert len(s3.files.find("bucket/journal")) == 3
    assert Journal("s3://bucket/journal", "def").done() == {}
    s3.fail(500, 1000, ("PUT",))
    with pytest.raises(StorageError):
        journal.record({"lost": {}})
    s3.heal()
    journal.record({"found": {}})
    assert "lost" not in other.done() and "found" in other.done()
    other.clear()
    assert journal.done() == {}


HOLD = """
import os, sys
from deepfere.locking import held
from deepfere.places import place
with held(place(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    os._exit(1)
"""


def test_one_process_at_a_time(s3, monkeypatch):
    work = Workspace("s3://bucket/locked")
    lock = work.root / "lock"
    with work.locked() as check:
        check()
        assert locking.is_held(lock)
        second = Workspace("s3://bucket/locked").locked()
        with pytest.raises(InputError, match=r"worked on by process \d+ on .* wait until it is done"), second:
            raise AssertionError
    assert not lock.exists() and not locking.is_held(lock)
    words = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on"), work.locked():
            raise AssertionError
        holder.communicate("\n")
    # It left its lease behind, but on this machine it can be seen that it is gone.
    assert lock.exists() and not locking.is_held(lock)
    with work.locked():
        pass
    with pytest.raises(ZeroDivisionError), work.locked():
        s3.fail(500, 1000, ("DELETE",))
        raise ZeroDivisionError
    s3.heal()
    assert lock.exists() and not locking.is_held(lock)  # nor does one stand in its own process's way
    with work.locked():
        pass
    # One of another machine has to run out.
    told = {"token": "x", "holder": "process 1 on far", "machine": "far 1", "pid": 1, "started": 0.0}
    lock.write_text(json.dumps(told))
    with pytest.raises(InputError, match="process 1 on far"), work.locked():
        raise AssertionError
    monkeypatch.setattr(locking, "LEASE_S", -1.0)
    with work.locked():
        pass


def test_a_lease_is_kept_and_its_loss_noticed(s3, monkeypatch):
    monkeypatch.setattr(locking, "RENEW_S", 0.05)
    lock = place("s3://bucket/kept/lock")
    with locking.held(lock) as check:
        counts = set()
        s3.failing = now_and_then(4)
        while len(counts) < 4:
            counts.add(json.loads(lock.read_text())["count"])
            check()
        s3.heal()
        lock.write_text('{"token": "another"}')
        deadline = time.monotonic() + 20
        with pytest.raises(Stopped, match="another process has taken s3://bucket/kept over"):
            while time.monotonic() < deadline:
                check()
                time.sleep(0.02)
    assert json.loads(lock.read_text()) == {"token": "another"}  # it is not ours to remove


def test_who_does_not_know_whether_it_holds_the_lease_waits(s3, monkeypatch):
    monkeypatch.setattr(locking, "RENEW_S", 0.05)
    monkeypatch.setattr(locking, "LEASE_S", 0.5)
    put, waited = locking.Lease._put, []

    def slow(lease, condition, tries):
        kept = put(lease, condition, tries)
        if waited == [0]:  # as if the answer had come late
            waited.append(1)
            time.sleep(1.5)
            kept = put(lease, condition | {"IfMatch": lease._etag}, tries)
        return kept

    monkeypatch.setattr(locking.Lease, "_put", slow)
    with locking.held(place("s3://bucket/slow/lock")) as check:
        check()
        waited.append(0)
        while len(waited) < 2:
            time.sleep(0.01)
        time.sleep(0.6)
        started = time.monotonic()
        check()
        assert time.monotonic() - started > 0.3
        s3.fail(500, 10**6, ("PUT",))
        with pytest.raises(Stopped, match=r"its lock could not be kept: .* keeps failing"):
            while time.monotonic() - started < 20:
                check()
                time.sleep(0.01)


def test_a_process_is_known_whatever_becomes_of_the_clock():
    held = {"machine": locking._here(), "pid": os.getppid(), "started": locking._started(os.getppid())}
    assert not locking._is_over(held, 1.0)
    assert locking._is_over({**held, "started": held["started"] + 1}, 1.0)
    assert locking._is_over({**held, "pid": 2**22 + 1}, 1.0)
    # Another machine of the same name.
    assert not locking._is_over({**held, "pid": 2**22 + 1, "machine": held["machine"].replace("-", "0")}, 1.0)


def test_what_does_not_answer_is_not_taken_for_nothing(s3, monkeypatch):
    """Else finished shards would be cleared away for one outage."""
    url = "s3://bucket/outage.zarr"
    open_group(url, "w", attributes={"format": FORMAT, "fingerprint": "f"})
    spec = SimpleNamespace(url=url, fingerprint="f")
    assert attributes_of(place(url))["format"] == FORMAT and is_cache(spec)
    for status, error in ((403, InputError), (500, StorageError)):
        for ask in (lambda: attributes_of(place(url)), lambda: is_cache(spec)):
            s3.fail(status, 1000)
            with pytest.raises(error):
                ask()
            s3.heal()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()
    try:
        for ask in (lambda: attributes_of(place(url)), lambda: is_cache(spec)):
            with pytest.raises(DeepfereError):
                ask()
    finally:
        monkeypatch.undo()
        S3FileSystem.clear_instance_cache()
    assert is_cache(spec) and not is_cache(SimpleNamespace(url=url, fingerprint="g"))
    assert attributes_of(place("s3://bucket/nothing.zarr")) == {}
    assert not is_cache(SimpleNamespace(url="s3://bucket/nothing.zarr", fingerprint="f"))


def test_a_store_without_conditions_is_refused(s3, monkeypatch):
    put = locking.Lease._put
    monkeypatch.setattr(locking.Lease, "_put", lambda self, condition, tries: put(self, {}, tries))
    with pytest.raises(InputError, match="does not keep conditional writes"), Workspace("s3://bucket/old").locked():
        raise AssertionError
    assert not s3.files.exists("bucket/old")


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_fuse_to_a_url(s3, fused, phantom, place, cli):
    """All stages of one section, a request in twenty failing: the shared result's bytes, and all that it offers."""
    out = "s3://bucket/results/fused.zarr"
    s3.failing = now_and_then(20)
    done = cli("fuse", phantom.imzml, phantom.slide, "-o", out, "--factor", FACTOR, *place.overrides)
    s3.heal()
    assert done.code == 0, done
    assert f"report: {out.removesuffix('.zarr')}.html" in done.out
    assert below(s3, out, *ARRAYS) == contents(place.result, *ARRAYS)
    assert s3.files.find(f"{out}.work") == []
    assert not s3.files.exists(f"{out}.work")
    result = deepfere.open(out)
    mz = float(result.ions["mz"][3])
    assert result.ions.equals(fused.ions) and result.provenance["identity"] == fused.provenance["identity"]
    np.testing.assert_array_equal(result.ion(mz).compute(), fused.ion(mz).compute())
    np.testing.assert_array_equal(result.uncertainty(mz, level=1).compute(), fused.uncertainty(mz, level=1).compute())
    np.testing.assert_array_equal(result.inferred(mz).compute(), fused.inferred(mz).compute())
    np.testing.assert_array_equal(result.stain(1).compute(), fused.stain(1).compute())
    np.testing.assert_array_equal(result.overview()[0], fused.overview()[0])
    assert result.alignment.to_dict() == fused.alignment.to_dict()
    assert result.alignment_start.to_dict() == fused.alignment_start.to_dict()
    said = describe(out)
    assert said.whole and said.kind == "result" and said.fact("identity") == result.provenance["identity"]
    asked = len(s3.asked)
    again = cli("fuse", phantom.imzml, phantom.slide, "-o", out, "--factor", FACTOR, *place.overrides)
    assert again.code == 0 and "finished already" in again.out
    assert {method for method, *_ in s3.asked[asked:]} <= {"GET", "HEAD"}
    other = cli("fuse", phantom.imzml, phantom.slide, "-o", out, "--factor", 2, *place.overrides)
    assert other.code == 2 and "holds a result of other inputs or settings" in other.errors[0]


@pytest.mark.ray
def test_outputs_that_cannot_be(s3, ray_session, phantom, place, cli, monkeypatch):
    """One line, exit 2, and nothing written."""
    words = ("fuse", phantom.imzml, phantom.slide, "--factor", FACTOR, *place.overrides, "-o")
    for out, told in {
        "s3://nobody/x.zarr": "the bucket does not exist",
        "gs://bucket/x.zarr": "is no output",
        "s3://bucket": "is no name for an output",
        "s3://bucket/x[1].zarr": "is no name for an output",
    }.items():
        done = cli(*words, out)
        assert done.code == 2 and len(done.errors) == 1 and told in done.errors[0], done
    before = s3.files.find("bucket")
    s3.fail(403, 1000, ("PUT", "POST", "DELETE"))  # may be read, may not be written
    done = cli(*words, "s3://bucket/x.zarr")
    assert done.code == 2 and len(done.errors) == 1 and "access is refused" in done.errors[0], done
    s3.fail(403, 1000, ("PUT", "POST", "DELETE", "GET", "HEAD"))
    done = cli(*words, "s3://bucket/x.zarr")
    assert done.code == 2 and len(done.errors) == 1 and "access is refused" in done.errors[0], done
    s3.heal()
    s3.files.clear_instance_cache()
    with monkeypatch.context() as bare:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            bare.delenv(name)
        done = cli(*words, "s3://bucket/x.zarr")
    s3.files.clear_instance_cache()  # a file system without credentials is remembered, too
    assert done.code == 2 and len(done.errors) == 1 and "credentials" in done.errors[0], done
    assert s3.files.find("bucket") == before


class Study:
    """A study of one section, its stages at a URL."""

    def __init__(self, cli, manifest, tracking: str, out: str) -> None:
        self.cli, self.manifest, self.out = cli, manifest, out
        self.settings = [*SETTINGS, "model.tier=T2", "reconstruct.shard_px=64", "reconstruct.chunk_px=16"]
        self.settings += [f"tracking.uri={tracking}"]

    def run(self, stage: str, *more: str):
        return self.cli(stage, self.manifest, "-o", self.out, "--factor", FACTOR, *self.settings, *more)

    def marker(self, name: str) -> dict:
        return json.loads((place(self.out) / "done" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def manifest(phantom, tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("s3"), phantom)


@pytest.fixture
def calm(cli, manifest, ray_session):
    """The arrays of an undisturbed local run."""
    out = manifest.parent / "calm"
    done = Study(cli, manifest, "none", str(out)).run("reconstruct")
    assert done.code == 0, done
    return contents(out / "results" / "one.zarr", *ARRAYS)


LASTING = {
    "ingest": (("PUT", "measured.zarr"), ("GET", "measured.zarr"), ("DELETE", "/lock")),
    "tile": (("PUT", "planes.zarr/planes/c/"), ("PUT", "journal/tile"), ("DELETE", "planes.zarr/planes/c/")),
    "train": (("PUT", "training/run-"), ("GET", "training.npz"), ("PUT", "fit.npz")),
    "reconstruct": (
        ("PUT", "detail/0/c/"),
        ("PUT", "journal/reconstruct"),
        ("GET", "detail/0/c/"),
        ("PUT", "detail/1/c/"),
        ("PUT", "provenance.json"),
        ("PUT", "basis/consistency"),
    ),
}


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_a_store_that_fails_for_good(s3, calm, cli, manifest):
    """In each stage, in each kind of request: one line and exit 1; the same command again completes."""
    out = "s3://bucket/lasting"
    study = Study(cli, manifest, "none", out)
    for stage, faults in LASTING.items():
        for method, word in faults:
            s3.failing = from_then_on((method,), word, 500)
            done = study.run(stage)
            told = (stage, method, word, done)
            met = [path for m, path, status in s3.asked if status is not None and m == method]
            s3.heal()
            if method == "DELETE" and done.code == 0:
                continue  # what could not be deleted did not matter
            assert met and done.code == 1, told
            assert len(done.errors) == 1 and "the store keeps failing (500" in done.errors[0], told
            with pytest.raises(InputError):
                deepfere.open(f"{out}/results/one.zarr")
            s3.asked.clear()
        done = study.run(stage)
        assert done.code == 0, (stage, done)
    assert below(s3, f"{out}/results/one.zarr", *ARRAYS) == calm
    assert describe(f"{out}/results/one.zarr").whole


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_store_that_fails_now_and_then(s3, calm, cli, manifest):
    """Every eighth request of all stages; and credentials that end in the middle keep the work."""
    out = "s3://bucket/shaky"
    study = Study(cli, manifest, "none", out)
    for stage in ("ingest", "tile", "train", "reconstruct"):
        s3.failing = now_and_then(8)
        done = study.run(stage)
        s3.heal()
        assert done.code == 0, (stage, done)
    assert below(s3, f"{out}/results/one.zarr", *ARRAYS) == calm
    assert {status for *_, status in s3.asked} >= {500, 503}
    s3.failing = from_then_on(("PUT",), "detail/0/c/", 403)
    done = study.run("reconstruct", "--overwrite", "reconstruct.shard_px=128")
    s3.heal()
    assert done.code == 1 and len(done.errors) == 1 and "access is refused" in done.errors[0], done
    assert study.marker("learn")
    with pytest.raises(InputError, match="is unfinished"):
        deepfere.open(f"{out}/results/one.zarr")
    done = study.run("reconstruct", "--overwrite")
    assert done.code == 0, done
    assert below(s3, f"{out}/results/one.zarr", *ARRAYS) == calm


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_driver_is_killed(s3, calm, cli, manifest):
    """While it trains and while it reconstructs: nothing that is recorded is done again, the bytes are the same."""
    out = "s3://bucket/killed"
    study = Study(cli, manifest, "none", out)

    def killed(stage: str, when: Callable[[], bool], *more: str) -> None:
        words = [sys.executable, "-m", "deepfere", stage, str(manifest), "-o", out, "--factor", str(FACTOR)]
        with subprocess.Popen([*words, *study.settings, "ray.num_cpus=2", *more], stderr=subprocess.PIPE) as process:
            while not when():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            process.kill()

    folder = place(f"{out}/training")
    # Begun by a worker of Ray Train's, gone on with by the run itself.
    killed("train", lambda: any("manager_snapshot" in str(p) for p in folder.below()), "train.workers=1")
    assert not (place(out) / "done" / "learn.json").exists()
    done = study.run("train")
    assert done.code == 0, done
    journal = place(f"{out}/sections/one/journal/reconstruct")
    killed("reconstruct", lambda: any(texts(journal, "*.jsonl")))
    assert not deepfere_is_open(f"{out}/results/one.zarr")
    recorded = [unit for record in records_in(journal) for unit in record["units"]]
    s3.asked.clear()
    done = study.run("reconstruct")
    assert done.code == 0, done
    written = {path for method, path, _ in s3.asked if method == "PUT" and "/detail/0/c/" in path}
    assert recorded and not written & {f"/bucket/killed/results/one.zarr/detail/0/c/{unit}" for unit in recorded}
    assert below(s3, f"{out}/results/one.zarr", *ARRAYS) == calm


def deepfere_is_open(url: str) -> bool:
    try:
        deepfere.open(url)
    except InputError:
        return False
    return True
