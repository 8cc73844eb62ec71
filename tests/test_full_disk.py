"""A real disk that is full while a result is made: told in a line, nothing looks whole, and after making room it is."""

from __future__ import annotations

import shutil
import subprocess
import threading
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


class Trained:
    """A study on the small disk, learned, and elsewhere the result that it gives when nothing is in its way."""

    def __init__(self, cli, study: Path, work: Path, elsewhere: Path) -> None:
        self._cli, self._study, self._work = cli, study, work
        self.calm, self.result = (place / "results" / "one.zarr" for place in (elsewhere, work))
        self.made = work / "sections" / "one" / "result.zarr"
        assert self._run("train", work).code == 0
        shutil.copytree(work, elsewhere)
        assert self._run("reconstruct", elsewhere).code == 0

    def _run(self, stage: str, to: Path):
        settings = [*SETTINGS, "model.tier=T1", "tracking.uri=none"]
        settings += ["reconstruct.shard_px=64", "reconstruct.chunk_px=64"]
        return self._cli(stage, self._study, "-o", to, "--factor", 16, *settings)

    def fails(self) -> str:
        """The one line of a reconstruction that fails, and leaves nothing that looks whole."""
        done = self._run("reconstruct", self._work)
        assert done.code in (1, 2) and len(done.errors) == 1, done
        assert not self.result.exists()
        with pytest.raises(InputError, match="is unfinished"):
            Result(str(self.made))
        return done.errors[0]

    def completes(self) -> None:
        """The same command again, to the bytes of the calm one."""
        done = self._run("reconstruct", self._work)
        assert done.code == 0, done
        assert contents(self.result, *ARRAYS) == contents(self.calm, *ARRAYS)
        assert len(Result(str(self.result)).ions) == len(Result(str(self.calm)).ions)


@pytest.fixture
def trained(small_disk, phantom, ray_session, tmp_path, cli):
    return Trained(cli, write_study(tmp_path, phantom), small_disk / "work", tmp_path / "calm")


def test_a_full_disk_among_the_shards_and_in_the_pyramid(small_disk, trained):
    wanted = {kind: objects_of(trained.calm, *arrays) for kind, arrays in PARTS.items()}
    assert min(len(objects) for objects in wanted.values()) > 20

    def of(kind: str) -> dict[str, bytes]:
        made = objects_of(trained.made, *PARTS[kind])
        return {name: data for name, data in made.items() if wanted[kind].get(name) == data}

    def missing(kind: str) -> int:
        """Bytes, in pages of the disk."""
        return sum(-(-len(data) // 4096) * 4096 for name, data in wanted[kind].items() if name not in of(kind))

    for kind in PARTS:
        leave(small_disk, missing(kind) // 2 + (missing("shards") if kind == "pyramid" else 0))
        told = trained.fails()
        assert "No space left on device; make room" in told and "resumes" in told
        assert 0 < len(of(kind)) < len(wanted[kind])
    (small_disk / "ballast").unlink()
    trained.completes()


def test_a_folder_that_becomes_read_only_midway(trained):
    """As where a disk with errors is mounted again, or a share whose lease has ended."""
    made, over = trained.made, threading.Event()

    def seal() -> None:
        while not over.wait(0.01):
            if len(objects_of(made, "detail/0")) > 4:
                # Over itself: what has a file open for writing on a disk keeps it from being remounted.
                subprocess.run(["mount", "--bind", made, made], check=True)
                again = ["mount", "--options", "remount,bind,ro", made]
                # So does what was opened since then, for a moment.
                while subprocess.run(again, capture_output=True).returncode and not over.is_set():
                    pass
                return

    watch = threading.Thread(target=seal)
    watch.start()
    try:
        told = trained.fails()
    finally:
        over.set()
        watch.join()
        subprocess.run(["umount", str(made)], check=False)  # nothing, where it ended before
    assert "Read-only file system" in told
    trained.completes()


def test_a_full_disk_while_slides_are_tiled_and_while_training(small_disk, phantom, ray_session, tmp_path, cli):
    study, calm, work = write_study(tmp_path, phantom), tmp_path / "calm", small_disk / "work"

    def run(stage: str, to: Path):
        settings = [*SETTINGS, "model.tier=T2", "tracking.uri=none"]
        return cli(stage, study, "-o", to, "--factor", 16, *settings)

    def fails(stage: str) -> None:
        done = run(stage, work)
        assert done.code == 1 and len(done.errors) == 1, done
        assert "No space left on device" in done.errors[0] and "Traceback" not in done.errors[0]

    assert run("train", calm).code == 0
    assert run("align", work).code == 0
    planes = sum(file.stat().st_size for file in (calm / "sections" / "one" / "planes.zarr").rglob("c/*/*/*"))
    leave(small_disk, planes // 2)
    fails("tile")
    leave(small_disk, 2 * planes + (2 << 20))
    assert run("tile", work).code == 0
    leave(small_disk, 64 << 10)
    fails("train")
    assert not (work / "sections" / "one" / "network.safetensors").exists()
    (small_disk / "ballast").unlink()
    assert run("train", work).code == 0
    for name in ("fit.npz", "network.safetensors"):
        made, wanted = (folder / "sections" / "one" / name for folder in (work, calm))
        assert made.read_bytes() == wanted.read_bytes()
