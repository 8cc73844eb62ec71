"""The folder of unfinished work: whose it is, who works in it, what a machine that went down leaves."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deepfere.errors import DeepfereError, IdentityError, InputError
from deepfere.locking import is_held
from deepfere.pipeline.workspace import Workspace, read_json, write_json
from deepfere.store import settle

HOLD = """
import sys, time
from deepfere.pipeline.workspace import Workspace
with Workspace(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def work(tmp_path):
    return Workspace(tmp_path / "r.zarr.work")


def test_a_second_process_is_refused_until_the_first_is_gone(work):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(work.root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"worked on by process {holder.pid} on .*; wait"), work.locked():
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with work.locked():
        work.claim("a", overwrite=False)
        work.remove()
    assert not work.root.exists()


def test_a_lock_in_a_folder_that_its_owner_removed_does_not_count(work):
    with work.locked():
        work.remove()
        with work.locked():
            assert (work.root / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_without_locks_a_holder_of_this_machine_is_known_by_its_process(tmp_path, monkeypatch):
    """As on Lustre without flock: who waits for a run to end waits no longer than it."""

    def unsupported(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    lock, here = tmp_path / "lock", socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    told = {
        "": False,
        f"process {os.getpid()} on {here}\n": True,
        f"process {ended.pid} on {here}\n": False,
        f"process {ended.pid} on another\n": True,
        "process": True,
    }
    for text, held in told.items():
        lock.write_text(text)
        assert is_held(lock) is held, text


def test_what_a_stage_made_is_on_disk_before_it_is_said_to_be_done(work, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(handle):
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    folder = work.section("a")
    with work.stage("ingest", [1], "a"):
        (folder.measured / "c").mkdir(parents=True)
        (folder.measured / "c" / "0").write_text("pixels")
        folder.arrays.write_text("arrays")
    made = [folder.measured / "c" / "0", folder.measured / "c", folder.arrays, folder.root]
    marker = next(n for n, path in enumerate(synced) if "ingest-a.json" in path)
    assert {str(path) for path in made} <= set(synced[:marker])
    with work.stage("learn", [1]):
        work.training.mkdir(parents=True)
        (work.training / "network.safetensors").write_text("weights")
    assert str(work.training / "network.safetensors") in synced


def test_what_a_killed_beginning_left_is_ours(work):
    work.root.mkdir()
    for name in ("lock", ".identity.json.7"):
        (work.root / name).write_text("")
    assert work.claim("a", overwrite=False) is False and work.belongs_to("a")


def test_unreadable_markers_count_as_absent(work):
    work.claim("a", overwrite=False)
    with work.stage("ingest", 1) as facts:
        assert facts is not None
    for text in ("", '{"finger', "[1]"):
        (work.root / "done" / "ingest.json").write_text(text)
        assert work.facts("ingest") == {} and work.timings_s("one") == {}
        with work.stage("ingest", 1) as facts:
            assert facts is not None
        (work.root / "identity.json").write_text(text)
        assert work.claim("a", overwrite=False) is False and work.belongs_to("a")
    assert read_json(work.root / "done" / "ingest.json") is not None


def test_overwriting_clears_work_and_nothing_else(work):
    work.claim("a", overwrite=False)
    write_json(work.root / "sections" / "one" / "model.json", {})
    write_json(work.root / "results" / "one.zarr" / "zarr.json", {})
    with pytest.raises(IdentityError, match="other inputs"):
        work.claim("b", overwrite=False)
    assert work.claim("a", overwrite=False) is True
    assert work.claim("a", overwrite=True, anew=True) is False
    assert sorted(p.name for p in work.root.iterdir()) == ["identity.json", "results"]
    assert work.claim("b", overwrite=True) is False
    work.remove()
    assert [p.name for p in work.root.iterdir()] == ["results"]
    assert (work.root / "results" / "one.zarr" / "zarr.json").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/disk/file"), "/disk/file: No space left on device"),
        (MemoryError(), "memory"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "work: No space left on device"),
        (DeepfereError("training failed"), "training failed"),
    ],
)
def test_failures_are_told_in_one_line(work, error, words):
    work.claim("a", overwrite=False)
    with pytest.raises(DeepfereError, match=words) as told, work.failures():
        raise error
    assert not isinstance(told.value, InputError) and "failure.log" in str(told.value)
    assert "Traceback" in (work.root / "failure.log").read_text()


def test_a_settled_store_holds_nothing_of_interrupted_writers(tmp_path):
    (tmp_path / "c" / "0").mkdir(parents=True)
    (tmp_path / "c" / "0" / "1.ab12.partial").write_bytes(b"half")
    (tmp_path / "c" / "0" / "1").write_bytes(b"whole")
    settle(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["1"]
