"""What a journal records and is lost, cut off or changed before the next run is made again, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from deepfere.cluster import Journal
from deepfere.errors import Damaged, DeepfereError
from deepfere.model.guide import GuideSpec
from deepfere.pipeline import tile, write
from deepfere.places import Place, UrlPath, copy_tree, place, sizes
from deepfere.reconstruction.pyramid import averaged_from
from deepfere.reconstruction.whole import check_there, lost, object_of, unsound_phases
from deepfere.schedule import run_jobs
from deepfere.store import create_array, open_group, shard_object, write_shard
from deepfere.tiling.cache import PlaneReader, doubt_of
from tests.conftest import SETTINGS, contents, write_study

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")


def cut(path: Place) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Place) -> None:
    """One bit in the middle: no chunk need fail to be decoded."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def delete(path: Place) -> None:
    path.unlink()


def found_wrong(root, journal) -> set[tuple[str, str]]:
    out: set[tuple[str, str]] = set()

    def phases():
        out.update((yield from unsound_phases("checking", root, journal)))

    run_jobs([("one", phases())], title="whole", here=True)
    return out


@pytest.mark.parametrize("where", ["disk", "s3://bucket/whole"])
def test_every_kind_of_damage_is_found_and_nothing_else(where, tmp_path, request):
    if where == "disk":
        base: Place = tmp_path
    else:
        request.getfixturevalue("s3")
        base = place(where)
    root, journal = base / "r.zarr", Journal(base / "journal", "f")
    array = create_array(open_group(root, "w"), "d", (2, 40, 40), "uint8", (2, 4, 4), (2, 8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 2, 8, 8), dtype=np.uint8)
    pixels[3, 1:3] = 0
    for r, c in np.ndindex(5, 5):
        journal.record({f"{r}/{c}": {"wrote": {"d": write_shard(root, array, r, c, pixels[r, c])}}})
    np.testing.assert_array_equal(array[:], pixels.transpose(2, 0, 3, 1, 4).reshape(2, 40, 40))
    records = journal.done()
    assert [unit for unit, told in sorted(records.items()) if told["wrote"]["d"] is None] == ["3/1", "3/2"]
    have = sizes(root / "d" / "c" / "0")
    assert have == {unit: told["wrote"]["d"][0] for unit, told in records.items() if told["wrote"]["d"]}
    assert lost(root, records) == found_wrong(root, journal) == set()
    check_there(root, records)
    for unit, damage in {"0/0": delete, "1/2": cut, "4/4": flip}.items():
        damage(object_of(root, unit, "d"))
    shard_object(root, "d", 3, 1).write_bytes(b"nobody's")
    journal.record({"4/0": {}})  # as an earlier version did
    by_size = {("0/0", "d"), ("1/2", "d"), ("3/1", "d"), ("4/0", "")}
    assert lost(root, journal.done()) == by_size
    assert found_wrong(root, journal) == by_size | {("4/4", "d")}
    with pytest.raises(Damaged, match=r"/d/c/0/0/0: is gone or damaged, and 2 more; the same command again"):
        check_there(root, records)
    # Dropped from the journal, made again, and whole.
    units = {unit for unit, _ in found_wrong(root, journal)}
    journal.drop(units)
    assert set(Journal(journal.folder, "f").done()) == set(records) - units
    for unit in units:
        r, c = map(int, unit.split("/"))
        journal.record({unit: {"wrote": {"d": write_shard(root, array, r, c, pixels[r, c])}}})
    assert found_wrong(root, journal) == set() and journal.done() == records
    np.testing.assert_array_equal(array[:], pixels.transpose(2, 0, 3, 1, 4).reshape(2, 40, 40))


def test_a_journal_whose_units_are_dropped_loses_no_other_whenever_it_ends(tmp_path, monkeypatch):
    """Killed between the new file and the end of the old ones: dropped or still there, but nothing else is lost."""
    for n in range(3):
        Journal(tmp_path / "j", "f").record({f"0/{n}": {}, f"1/{n}": {}})
    left = [2]
    unlink = Path.unlink

    def until(self, *more, **given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        unlink(self, *more, **given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", until)
        Journal(tmp_path / "j", "f").drop({"0/0", "0/1", "0/2"})
    some, kept = set(Journal(tmp_path / "j", "f").done()), {f"1/{n}" for n in range(3)}
    assert kept < some < kept | {f"0/{n}" for n in range(3)}
    Journal(tmp_path / "j", "f").drop({"0/0", "0/1", "0/2"})
    assert set(Journal(tmp_path / "j", "f").done()) == kept
    assert len(list((tmp_path / "j").iterdir())) == 1


def test_what_is_averaged_from_a_shard():
    counts = {1: {"a": (3, 3)}, 2: {"a": (2, 2)}, 3: {"a": (1, 1)}}
    assert list(averaged_from("a/0", 5, 4, counts)) == ["a/1/2/2", "a/2/1/1", "a/3/0/0"]
    assert list(averaged_from("a/2", 1, 1, counts)) == ["a/3/0/0"]
    assert list(averaged_from("a/0", 0, 0, {})) == []


class Study:
    """A study of the phantom alone, 3 x 3 shards of level 0, fitted in closed form."""

    def __init__(self, cli, manifest: Path, out: Place, factor: int = 8) -> None:
        self.cli, self.manifest, self.out, self.factor = cli, manifest, out, factor
        self.section = out / "sections" / "one"
        self.result = out / "results" / "one.zarr"
        self.made = self.result if isinstance(out, UrlPath) else self.section / "result.zarr"

    def run(self, stage: str):
        settings = [*SETTINGS, "model.tier=T1", "model.smoothing_pitch=0.3", "tracking.uri=none"]
        settings += ["reconstruct.chunk_px=16", "reconstruct.shard_px=64", "train.patch_px=24"]
        return self.cli(stage, self.manifest, "-o", self.out, "--factor", self.factor, *settings)

    def fails(self, stage: str, words: str) -> None:
        done = self.run(stage)
        assert done.code == 1 and len(done.errors) == 1 and words in done.errors[0], done

    def completes(self, stage: str) -> None:
        done = self.run(stage)
        assert done.code == 0, done

    def records(self, stage: str) -> dict[str, dict]:
        """What all lines of a journal say of each unit."""
        return {unit: told for _, units in self._lines(stage) for unit, told in units.items()}

    def again(self, stage: str) -> set[str]:
        """Units that workers recorded since the driver, which is this process, kept what was whole."""
        return {unit for name, units in self._lines(stage) if not name.startswith(f"{os.getpid()}-") for unit in units}

    def _lines(self, stage: str):
        for file in (self.section / "journal" / stage).glob("*.jsonl"):
            for line in file.read_text().splitlines():
                yield file.name, json.loads(line)["units"]

    def arrays(self) -> dict[str, bytes]:
        return below(self.result, *ARRAYS)


def below(root: Place, *parts: str) -> dict[str, bytes]:
    if isinstance(root, Path):
        return contents(root, *parts)
    return {str(file).removeprefix(f"{root}/"): file.read_bytes() for part in parts for file in (root / part).below()}


@pytest.fixture(scope="module")
def manifest(phantom, tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("whole"), phantom)


@pytest.fixture
def begun(cli, manifest, ray_session, request):
    """Makes a study in some place, fitted; and the arrays of an undisturbed reconstruction of it."""
    fitted, calm = (Study(cli, manifest, manifest.parent / name) for name in ("fitted", "calm"))
    if not fitted.out.exists():
        fitted.completes("train")
        shutil.copytree(fitted.out, calm.out)
        calm.completes("reconstruct")

    def make(where: str):
        if where == "disk":
            out: Place = manifest.parent / request.node.name
        else:
            request.getfixturevalue("s3")
            out = place(where) / request.node.name.partition("[")[0]
        copy_tree(fitted.out, out)
        return Study(cli, manifest, out), calm.arrays()

    return make


IN_FULL = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(900)]
WHERE = [
    pytest.param("disk", marks=IN_FULL),
]


@pytest.mark.parametrize("where", WHERE)
def test_shards_and_pyramids_that_are_damaged_between_two_runs(where, begun, monkeypatch):
    """The run ends between two levels of the pyramids."""
    study, calm = begun(where)
    whole = write.pyramid_phases

    def first_level(*arguments, **given):
        yield next(whole(*arguments, **given))
        raise DeepfereError("the lights went out")

    with monkeypatch.context() as patch:
        patch.setattr(write, "pyramid_phases", first_level)
        study.fails("reconstruct", "the lights went out")
    detail = sorted(unit for unit, told in study.records("reconstruct").items() if told["wrote"]["detail/0"])
    assert len(detail) >= 4 and all(told["wrote"]["stain/0"] for told in study.records("reconstruct").values())
    pyramid = sorted(unit for unit, told in study.records("pyramid").items() if all(told["wrote"].values()))
    assert {unit.split("/")[1] for unit in pyramid} == {"1"}
    harmed = [(detail[0], "detail/0", delete), (detail[1], "stain/0", cut), (detail[2], "detail/0", flip)]
    harmed += [(pyramid[0], "detail/1", flip), (pyramid[-1], "stain/1", delete), (pyramid[-2], "stain/1", cut)]
    for unit, array, damage in harmed:
        damage(object_of(study.made, unit, array))
    study.completes("reconstruct")
    assert study.arrays() == calm
    assert study.again("reconstruct") == set(detail[:3])
    counts = {1: {}, 2: {}, 3: {}}
    above = {up for unit, array, _ in harmed for up in averaged_from(array, *map(int, unit.split("/")[-2:]), counts)}
    wanted = {unit for unit, array, _ in harmed if not array.endswith("/0")} | above
    assert study.again("pyramid") == wanted | {
        f"{image}/{level}/0/0" for image in ("detail", "stain") for level in (2, 3)
    }
    assert len(wanted) < len(study.records("pyramid"))


@pytest.mark.long
@pytest.mark.parametrize("where", WHERE)
def test_sealing_over_damage_says_one_line_and_the_next_run_mends_it(where, begun, monkeypatch):
    study, calm = begun(where)
    whole = write.seal_phases

    def harmed(unit: str, array: str, damage):
        def phases(*arguments):
            damage(object_of(study.made, unit, array))
            yield from whole(*arguments)

        return phases

    first = "the same command again makes it anew"
    for unit, array, damage in [("0/1/1", "detail/0", cut), ("stain/1/0/0", "stain/1", delete)]:
        with monkeypatch.context() as patch:
            patch.setattr(write, "seal_phases", harmed(unit, array, damage))
            study.fails("reconstruct", first)
        first = f"{object_of(study.made, 'stain/1/0/0', 'stain/1')}: is gone or damaged; {first}"
        assert (study.out / "done" / "reconstruct-one.json").exists()
    study.completes("reconstruct")
    assert study.arrays() == calm
    assert study.again("reconstruct") == {"0/1/1"}  # in the second run
    assert study.again("pyramid") == {f"stain/{level}/0/0" for level in (1, 2, 3)}


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_result_that_was_complete_but_not_in_its_place_is_moved_there(begun, monkeypatch):
    study, calm = begun("disk")

    def full(*_):
        raise DeepfereError("no place for it")

    with monkeypatch.context() as patch:
        patch.setattr(write, "publish", full)
        study.fails("reconstruct", "no place for it")
    files = [file for name in ("detail", "stain") for file in (study.made / name).rglob("[0-9]*") if file.is_file()]
    before = {file.relative_to(study.made): file.stat().st_mtime_ns for file in files}
    assert len(before) > 4 and not study.result.exists()
    study.completes("reconstruct")
    assert study.arrays() == calm
    assert {name: (study.result / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.long
@pytest.mark.parametrize("where", WHERE)
def test_planes_that_are_damaged_between_two_runs(where, cli, manifest, ray_session, tmp_path, request, monkeypatch):
    if where != "disk":
        request.getfixturevalue("s3")
    calm = Study(cli, manifest, tmp_path / "calm", factor=16)
    study = Study(cli, manifest, tmp_path / "work" if where == "disk" else place(where) / "planes", factor=16)
    calm.completes("tile")
    wanted = below(calm.section, "planes.zarr")

    def ended(*arguments):
        raise DeepfereError("the lights went out")

    with monkeypatch.context() as patch:
        patch.setattr(tile, "pool", ended)
        study.fails("tile", "the lights went out")
    units = sorted(unit for unit, told in study.records("tile").items() if told["wrote"]["planes"])
    assert len(units) >= 4
    planes = study.section / "planes.zarr"
    for unit, damage in zip(units, (delete, cut, flip), strict=False):
        damage(object_of(planes, unit, "planes"))
    study.completes("tile")
    assert below(study.section, "planes.zarr") == wanted and study.again("tile") == set(units[:3])
    # The stage is done: what is gone is seen, and what cannot be read is told to the next run by who met it.
    delete(object_of(planes, units[3], "planes"))
    study.completes("tile")
    assert below(study.section, "planes.zarr") == wanted and study.again("tile") == {units[3]}
    path = object_of(planes, units[0], "planes")
    path.write_bytes(path.read_bytes()[:-20] + bytes(20))
    spec = GuideSpec.from_dict(json.loads((study.section / "plan.json").read_text())["guide"])
    with pytest.raises(Damaged, match="the same command again makes it anew"):
        PlaneReader(str(planes), spec)(0, spec.planes_shape[0], 0, spec.planes_shape[1])
    study.completes("tile")
    assert below(study.section, "planes.zarr") == wanted and study.again("tile") == {units[0]}
    assert not doubt_of(str(planes)).exists()
