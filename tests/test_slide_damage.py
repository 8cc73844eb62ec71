"""A full disk while the slide is tiled, and a slide that was cut off: one clear line, and what a rerun makes of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from deepfere.cluster import Journal
from deepfere.errors import DeepfereError, InputError, system_text
from deepfere.inspect import describe
from deepfere.model.artefacts import Artefacts
from deepfere.model.features import StainReference
from deepfere.pipeline.tile import native_tiles
from deepfere.readers.slide import Reading, open_slide, opened
from deepfere.reconstruction.shards import CacheWorker
from deepfere.store import shard_object
from deepfere.tiling.cache import CacheSpec, create_cache, distinct_native_tiles
from deepfere.tiling.plan import SHARD_PX, PlaneGrid, group_shards
from tests.conftest import run_rows

from .test_reader_tiff import picture, write_jpeg_tiff


def stored(root: Path) -> dict[str, bytes]:
    """Every file of a store but what interrupted writers left."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".partial"]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def spec_of(folder, path):
    slide = open_slide(path)
    planes = PlaneGrid(slide.mpp_um, 1, slide.shape_px)
    reference = StainReference((240.0, 240.0, 240.0), 0.1, 0.2)
    nothing = Artefacts(np.zeros((1, 1), bool), (1.0, 1.0))
    reading = Reading.of(slide, slide.mpp_um)
    return CacheSpec(str(folder / "planes.zarr"), str(path), "abc", slide.mpp_um, planes, reference, nothing, reading)


def tiled(spec, folder):
    """The tile stage's rows that are not done yet, carried out here."""
    journal = Journal(folder / "journal", spec.fingerprint)
    done = journal.done()
    rows = [{"unit": f"{r}/{c}", "shards": [[r, c]]} for r in range(spec.planes.shards[0]) for c in (0, 1)]
    todo = [row for row in rows if row["unit"] not in done]
    arguments = (spec, str(journal.folder), spec.fingerprint)
    try:
        run_rows(todo, CacheWorker, arguments, what="tiling section", inline_up_to=100)
    finally:
        done = journal.done()
    return len(todo), len(done)


def test_a_disk_that_fills_up_while_shards_are_written(tmp_path, monkeypatch):
    """Half of the shards are written, then the system refuses: what is whole stays, what is torn is made again."""
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(2 * SHARD_PX, 2 * SHARD_PX), factors=(1,), tile=256)
    wanted, broken = (spec_of(tmp_path / name, path) for name in ("wanted", "broken"))
    for spec in (wanted, broken):
        create_cache(spec)
    assert tiled(wanted, tmp_path / "wanted") == (4, 4)
    to_place, moved = os.replace, []

    def until_full(source, target):
        if "/c/0/" in str(target):
            moved.append(target)
            if len(moved) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return to_place(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_full)
        patch.setattr(Path, "replace", lambda self, target: until_full(self, target))
        with pytest.raises(DeepfereError, match=r"2 of 4 pieces failed; .*No space left on device; make room") as told:
            tiled(broken, tmp_path / "broken")
        assert not isinstance(told.value, InputError) and "\n" not in str(told.value)
    assert set(Journal(tmp_path / "broken" / "journal", "abc").done()) == {"0/0", "0/1"}
    assert not shard_object(broken.url, "planes", 1, 1).exists()
    shard_object(broken.url, "planes", 1, 0).parent.mkdir(parents=True, exist_ok=True)
    shard_object(broken.url, "planes", 1, 0).write_bytes(b"torn")
    assert tiled(broken, tmp_path / "broken") == (2, 4)
    assert stored(Path(broken.url)) == stored(Path(wanted.url))


def test_native_tiles_are_counted_and_hardly_ever_decoded_twice(tmp_path, monkeypatch):
    """Tiles of 48 px under shards of 128: every border between shards cuts native tiles."""
    monkeypatch.setattr("deepfere.tiling.plan.SHARD_PX", 128)
    monkeypatch.setattr("deepfere.tiling.cache.SHARD_PX", 128)
    path = write_jpeg_tiff(tmp_path / "s.tif", picture(2240, 1120), factors=(1,), tile=48)
    spec = spec_of(tmp_path / "a", path)
    create_cache(spec)
    shards = np.argwhere(np.ones(spec.planes.shards, bool))
    journal = Journal(tmp_path / "journal", spec.fingerprint)
    for group in group_shards(shards, least=1):
        opened.cache_clear()  # as if another worker made it
        CacheWorker(spec, str(journal.folder), spec.fingerprint).work({"unit": "", "shards": group.tolist()})
    counted = native_tiles(spec, shards, journal.done())
    assert counted is not None and counted["distinct"] == 47 * 24
    assert counted["distinct"] <= counted["decoded"] <= 1.1 * counted["distinct"]
    one = np.array([[0, 1]])
    assert distinct_native_tiles(spec, one) == 12  # columns 128 to 256 are of tiles 2 to 5, rows of 0 to 2
    blind = replace(spec, reading=replace(spec.reading, backend="openslide"))
    CacheWorker(blind, str(journal.folder), "other").work({"unit": "", "shards": [[0, 0]]})
    assert native_tiles(blind, one - [[0, 1]], Journal(journal.folder, "other").done()) is None


@pytest.mark.ray
def test_a_full_disk_in_the_tile_stage_and_a_rerun(small_disk, phantom, ray_session, tmp_path, cli):
    """A real file system that fills up half-way through the planes; after making room the same bytes."""
    study, work = tmp_path / "study.yaml", small_disk / "work"
    section = {"name": "s", "msi": phantom.imzml, "slide": phantom.slide}
    section["alignment"] = phantom.truth / "alignment.json"
    study.write_text(json.dumps({"sections": [section]}, default=str))
    quick = ["--factor", "16", "tracking.uri=none", "model.smoothing_pitch=0.3"]
    assert cli("tile", study, "-o", tmp_path / "plain", *quick).code == 0
    planes = Path("sections") / "s" / "planes.zarr"
    wanted = stored(tmp_path / "plain" / planes)
    sizes = sorted(len(data) for name, data in wanted.items() if "/c/" in name)
    assert len(sizes) >= 4
    assert cli("align", study, "-o", work, *quick).code == 0
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free - (sum(sizes) // 2 + 64 * 1024)
    ballast.write_bytes(bytes(free))
    full = cli("tile", study, "-o", work, *quick)
    assert full.code == 1 and len(full.errors) == 1, full
    assert "No space left on device; make room" in full.errors[0] and "resumes" in full.errors[0]
    half = {name for name, data in stored(work / planes).items() if wanted.get(name) == data}
    assert 0 < len([name for name in half if "/c/" in name]) < len(sizes)
    ballast.unlink()
    again = cli("tile", study, "-o", work, *quick)
    assert again.code == 0, again
    assert stored(work / planes) == wanted


def test_what_the_system_says():
    assert system_text(OSError(errno.ENOSPC, "No space left on device", "/a/b")).endswith("device; make room")
    assert system_text(OSError(errno.EACCES, "Permission denied", "/a/b")) == "/a/b: Permission denied"


def test_a_slide_that_was_cut_off_is_told_once(tmp_path):
    """In a process of its own, where a library's logger would print by itself."""
    path = write_jpeg_tiff(tmp_path / "cut.tif", picture(512, 512), factors=(1, 2))
    with tifffile.TiffFile(path) as file:
        tile = int(file.pages[0].dataoffsets[40])
    path.write_bytes(path.read_bytes()[: tile + 100])
    code = (
        "import logging, sys\nfrom deepfere.errors import InputError\nfrom deepfere.readers.slide import open_slide\n"
        "if sys.argv[2] == 'aloud':\n    logging.getLogger('tifffile').handlers.clear()\n"
        "try:\n    open_slide(sys.argv[1], 0.5, 'tiff').read(0, 0, 0, 512, 512)\n"
        "except InputError as error:\n    print(error)\n"
    )

    def run(how):
        command = [sys.executable, "-c", code, str(path), how]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    done = run("quietly")
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert str(path) in done.stdout and "tile 5, 0" in done.stdout and "the file ends before it" in done.stdout
    assert "invalid page offset" in run("aloud").stderr


def test_a_slide_without_its_pages_is_to_be_copied_again(tmp_path):
    path = tmp_path / "cut.tif"
    path.write_bytes(b"II*\0" + (10_000).to_bytes(4, "little") + bytes(2000))  # the first page comes behind the end
    for look in (describe, open_slide):
        with pytest.raises(InputError, match=r"cut\.tif: holds no page, as one that was cut off; copy it again"):
            look(path)
