"""A real disk that is full while a result is made: told in a line, nothing looks whole, and after making room it is."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from deepfere.errors import InputError
from deepfere.reconstruction.result import Result
from tests.conftest import SETTINGS, contents, write_study

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")
PARTS = {"shards": ("detail/0", "stain/0"), "pyramid": ("detail/[1-9]", "stain/[1-9]")}


def objects_of(result: Path, *arrays: str) -> dict[str, bytes]:
    """Shards on the disk, below ``arrays`` (patterns)."""
    files = [file for array in arrays for file in result.glob(f"{array}/c/*/*/*")]
    return {str(file.relative_to(result)): file.read_bytes() for file in files}


def leave(disk: Path, free: int) -> None:
    """Fill a disk but for so many bytes."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - free))


def test_a_full_disk_among_the_shards_and_in_the_pyramid(small_disk, phantom, ray_session, tmp_path, cli):
    study, work = write_study(tmp_path, phantom), small_disk / "work"
    settings = [*SETTINGS, "model.tier=T1", "tracking.uri=none", "reconstruct.shard_px=64", "reconstruct.chunk_px=64"]

    def run(stage: str, to: Path):
        return cli(stage, study, "-o", to, "--factor", 16, *settings)

    assert run("train", work).code == 0
    shutil.copytree(work, tmp_path / "calm")
    assert run("reconstruct", tmp_path / "calm").code == 0
    calm = tmp_path / "calm" / "results" / "one.zarr"
    result, made = work / "results" / "one.zarr", work / "sections" / "one" / "result.zarr"
    wanted = {kind: objects_of(calm, *arrays) for kind, arrays in PARTS.items()}
    assert min(len(objects) for objects in wanted.values()) > 20

    def of(kind: str) -> dict[str, bytes]:
        return {name: data for name, data in objects_of(made, *PARTS[kind]).items() if wanted[kind].get(name) == data}

    def missing(kind: str) -> int:
        """Bytes, in pages of the disk."""
        return sum(-(-len(data) // 4096) * 4096 for name, data in wanted[kind].items() if name not in of(kind))

    for kind in PARTS:
        leave(small_disk, missing(kind) // 2 + (missing("shards") if kind == "pyramid" else 0))
        full = run("reconstruct", work)
        assert full.code == 1 and len(full.errors) == 1, full
        assert "No space left on device; make room" in full.errors[0] and "resumes" in full.errors[0]
        assert 0 < len(of(kind)) < len(wanted[kind])
        assert not result.exists()
        with pytest.raises(InputError, match="is unfinished"):
            Result(str(made))
    (small_disk / "ballast").unlink()
    again = run("reconstruct", work)
    assert again.code == 0, again
    assert contents(result, *ARRAYS) == contents(calm, *ARRAYS)
    assert len(Result(str(result)).ions) == len(Result(str(calm)).ions)


def test_a_disk_that_becomes_read_only_midway(small_disk, phantom, ray_session, tmp_path, cli):
    """As a disk with errors is mounted again, or a share whose lease has ended."""
    study, work = write_study(tmp_path, phantom), small_disk / "work"
    settings = [*SETTINGS, "model.tier=T1", "tracking.uri=none", "reconstruct.shard_px=64", "reconstruct.chunk_px=64"]

    def run(stage: str, to: Path):
        return cli(stage, study, "-o", to, "--factor", 16, *settings)

    assert run("train", work).code == 0
    shutil.copytree(work, tmp_path / "calm")
    assert run("reconstruct", tmp_path / "calm").code == 0
    calm = tmp_path / "calm" / "results" / "one.zarr"
    result, made = work / "results" / "one.zarr", work / "sections" / "one" / "result.zarr"
    over = threading.Event()

    def remount() -> None:
        while not over.is_set():
            if len(objects_of(made, "detail/0")) > 4:
                # Over itself: what has a file open for writing on a disk keeps it from being remounted.
                mount("--bind", made, made)
                mount("--options", "remount,bind,ro", made)
                return
            time.sleep(0.01)

    watch = threading.Thread(target=remount)
    watch.start()
    try:
        stopped = run("reconstruct", work)
    finally:
        over.set()
        watch.join()
        subprocess.run(["umount", str(made)], check=True)
    assert stopped.code in (1, 2) and len(stopped.errors) == 1 and "Read-only file system" in stopped.errors[0], stopped
    assert not result.exists()
    with pytest.raises(InputError, match="is unfinished"):
        Result(str(made))
    again = run("reconstruct", work)
    assert again.code == 0, again
    assert contents(result, *ARRAYS) == contents(calm, *ARRAYS)


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)
