"""The pipeline where it is stopped, refused, run twice or sent elsewhere: what is kept, and what is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

import deepfere
from deepfere.cluster import one_thread
from deepfere.config import RaySettings
from deepfere.errors import DeepfereError, IdentityError, InputError
from deepfere.pipeline import check, claim, fuse, overview, seal, track
from deepfere.rows import RowWorker
from tests.conftest import FACTOR, contents, run_rows

pytestmark = pytest.mark.ray

# The package's attribute of this name is the function.
MODULE = sys.modules["deepfere.pipeline.fuse"]


@pytest.fixture
def plain(phantom, place, tmp_path):
    """Fuse without the stain: seconds."""

    def run(*more: str, **given):
        return fuse(phantom.imzml, None, tmp_path / "r.zarr", config=place.config(*more, guide=False), **given)

    return run


def ingested(phantom, folder):
    from deepfere.measured.ingest import ingest

    ingest(phantom.imzml, folder / "cube.zarr")
    return folder / "cube.zarr"


def full(*_):
    raise OSError(28, "No space left on device", "some/file")


def test_arguments_win_over_a_settings_object(phantom, place, tmp_path):
    mz = deepfere.open_measured(ingested(phantom, tmp_path)).mz[[2, 5, 9]]
    result = fuse(
        phantom.imzml,
        None,
        tmp_path / "r.zarr",
        config=place.config(),
        factor=2,
        guide=False,
        mz=mz,
        tolerance_ppm=7,
        overrides=["seed=3"],
    )
    told = result.provenance["config"]
    assert result.factor == 2 and len(result.ions) == 3 and not told["guide"]
    assert told["ingest"]["tolerance_ppm"] == 7 and told["seed"] == 3 and told["model"]["depth"] == 2


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ("ingest.mz=[700.1]", "--mz"),
        ("ingest.tolerance_ppm=9", "--tolerance-ppm"),
        ("ingest.representation=profile", "--representation"),
        ("ingest.duplicates=sum", "--duplicates"),
        ("ingest.mz_range=[600,700]", "ingest.mz_range"),
    ],
)
def test_settings_that_an_ingested_cube_cannot_follow(phantom, place, tmp_path, more, word):
    cube = ingested(phantom, tmp_path)
    with pytest.raises(InputError, match=word):
        fuse(cube, None, tmp_path / "r.zarr", config=place.config(more, guide=False))
    assert [p.name for p in tmp_path.iterdir()] == ["cube.zarr"]


def test_settings_that_an_ingested_cube_has_followed(phantom, place, tmp_path):
    cube = ingested(phantom, tmp_path)
    mz = [float(v) for v in deepfere.open_measured(cube).mz]
    config = place.config(f"ingest.mz={mz}", "ingest.representation=centroid", guide=False)
    assert len(fuse(cube, None, tmp_path / "r.zarr", config=config).ions) == len(mz)


@pytest.mark.parametrize(
    ("more", "files", "word"),
    [
        (["tracking.uri=http://127.0.0.1:9"], {}, "127.0.0.1"),
        (["tracking.uri=ftp://somewhere"], {}, "tracking.uri"),
        ([f"tracking.uri=sqlite:///{sys.executable}/m.db"], {}, "cannot be written"),
        (["tracking.register_as=a/b"], {}, "model's name"),
        (["train.workers=99"], {}, "train.workers: .*the cluster has 2 CPUs"),
        (["train.workers=3", "train.batch=4"], {}, "train.batch: .*multiple of 3"),
        (["train.accumulate=4"], {}, "train.batch: .*1 workers, 4 parts each"),
        ([], {"alignment": "{}"}, "not an alignment"),
        ([], {"landmarks": "a,b"}, "landmarks"),
    ],
)
def test_what_can_be_known_is_refused_before_work_starts(
    phantom, place, ray_session, tmp_path, monkeypatch, more, files, word
):
    monkeypatch.setattr(MODULE, "ingest_stage", lambda *_: pytest.fail("work began"))
    given = {}
    for name, text in files.items():
        given[name] = tmp_path / name
        given[name].write_text(text)
    with pytest.raises(InputError, match=word):
        fuse(phantom.imzml, phantom.slide, tmp_path / "out" / "r.zarr", config=place.config(*more), **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [0, 1, 65])
def test_a_factor_that_no_section_can_have_costs_no_ingestion(phantom, tmp_path, monkeypatch, factor):
    monkeypatch.setattr(MODULE, "ingest_stage", lambda *_: pytest.fail("work began"))
    with pytest.raises(InputError, match="2 to 64"):
        fuse(phantom.imzml, None, tmp_path / "r.zarr", factor=factor, overrides=["tracking.uri=none"], guide=False)
    assert not list(tmp_path.iterdir())


def test_a_tracking_store_that_stops_answering_costs_no_work(plain, tmp_path, monkeypatch):
    def gone(*_, **__):
        raise InputError("does not answer", where="http://store")

    with monkeypatch.context() as patch:
        patch.setattr(track.Tracker, "start", gone)
        with pytest.raises(DeepfereError, match="does not answer") as told:
            plain()
    assert not isinstance(told.value, InputError)
    marker = tmp_path / "r.zarr.work" / "done" / "ingest-section.json"
    before = marker.stat().st_mtime_ns
    seen = []
    plain(progress=lambda *_: seen.append(marker.stat().st_mtime_ns))
    assert set(seen) == {before}


def test_a_full_disk_is_one_line_and_resumes(plain, phantom, place, tmp_path, monkeypatch, cli):
    with monkeypatch.context() as patch:
        patch.setattr(seal, "settle", full)
        command = ["fuse", phantom.imzml, "--no-guide", "-o", tmp_path / "r.zarr", "--factor", FACTOR]
        done = cli(*command, *place.overrides)
    assert done.code == 1 and len(done.errors) == 1, done
    assert "file: No space left on device" in done.errors[0] and "resumes" in done.errors[0]
    assert plain().factor == FACTOR


def test_one_process_at_a_time(plain, tmp_path):
    refusals = []

    def meanwhile(*_):
        if not refusals:
            with pytest.raises(InputError, match="worked on by process") as told:
                plain()
            refusals.append(told.value)

    plain(progress=meanwhile)
    assert len(refusals) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]


def test_the_old_result_stands_until_the_new_one_is_complete(plain, tmp_path):
    plain()
    for factor in (2, 2):  # other settings, then the very same
        stands = deepfere.open(tmp_path / "r.zarr")
        before, seen = stands.factor, []
        plain(factor=factor, overwrite=True, progress=lambda *_: seen.append(deepfere.open(stands.path).factor))  # noqa: B023
        assert len(seen) > 2 and set(seen[:-1]) == {before}
    assert deepfere.open(tmp_path / "r.zarr").factor == 2
    assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]


def test_what_is_refused_late_costs_no_work(plain, monkeypatch, tmp_path):
    """As when credentials end, or the machine has no GPU after all."""

    def refused(*_):
        raise InputError("access is refused", where="s3://slides/a.svs")

    stages = []
    with monkeypatch.context() as patch:
        patch.setattr(seal, "settle", refused)
        with pytest.raises(InputError, match="access is refused"):
            plain()
    assert (tmp_path / "r.zarr.work").exists() and not (tmp_path / "r.zarr").exists()
    plain(progress=lambda stage, share: stages.append(stage))
    assert "ingest" not in stages and [p.name for p in tmp_path.iterdir()] == ["r.zarr"]


def runs_of(place, tmp_path):
    """Status by id of this test's runs, the newest first."""
    from mlflow import MlflowClient

    client = MlflowClient(place.tracking)
    (experiment,) = client.search_experiments(filter_string="name = 'edges'")
    return client, client.search_runs([experiment.experiment_id])


def test_a_run_that_was_not_told_of_its_result_is_told_later(plain, place, tmp_path, monkeypatch):
    def lost(*_):
        raise DeepfereError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(track.Run, "log_result", lost)
        with pytest.raises(DeepfereError, match="the server is gone"):
            plain("tracking.experiment=edges")
    stands = deepfere.open(tmp_path / "r.zarr")
    client, (run,) = runs_of(place, tmp_path)
    assert run.info.status == "FAILED" and "consistency_worst" not in run.data.metrics
    stages = []
    plain("tracking.experiment=edges", progress=lambda stage, share: stages.append(stage))
    client, (run,) = runs_of(place, tmp_path)
    assert run.info.run_id == stands.provenance["run"]["run_id"]
    assert run.info.status == "FINISHED" and run.data.metrics["consistency_worst"] <= 1e-5
    assert not stages and [p.name for p in tmp_path.iterdir()] == ["r.zarr"]
    client.delete_run(run.info.run_id)


def test_a_run_whose_beginning_fails_is_no_longer_running_and_a_deleted_one_is_replaced(
    plain, place, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(track, "_describe", full)
        with pytest.raises(DeepfereError, match="No space left"):
            plain("tracking.experiment=edges")
    client, (run,) = runs_of(place, tmp_path)
    assert run.info.status == "FAILED"
    client.delete_run(run.info.run_id)
    plain("tracking.experiment=edges")
    client, (other,) = runs_of(place, tmp_path)
    assert other.info.run_id != run.info.run_id and other.info.status == "FINISHED"
    client.delete_run(other.info.run_id)


def other_file_system(monkeypatch, copied=claim.copy_tree):
    """The work lies on another file system than the result."""
    rename = Path.rename

    def moved(path, target):
        if ".work" in path.parent.as_posix():
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", moved)
    monkeypatch.setattr(claim, "copy_tree", copied)


def test_a_result_comes_to_its_place_from_another_file_system(plain, monkeypatch, tmp_path):
    plain()
    before = contents(tmp_path / "r.zarr", "measured", "basis")
    with monkeypatch.context() as patch:
        other_file_system(patch, full)
        for _ in range(2):
            with pytest.raises(DeepfereError, match="No space left"):
                plain(factor=2, overwrite=True)
            assert deepfere.open(tmp_path / "r.zarr").factor == FACTOR
            assert contents(tmp_path / "r.zarr", "measured", "basis") == before
    with monkeypatch.context() as patch:
        other_file_system(patch)
        plain(factor=2, overwrite=True)
    assert deepfere.open(tmp_path / "r.zarr").factor == 2
    assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]


def test_what_has_come_to_the_place_meanwhile_stays(plain, tmp_path):
    other = tmp_path / "r.zarr"

    def meanwhile(stage, share):
        if stage == "reconstruct" and share < 1:
            other.mkdir(exist_ok=True)
            (other / "mine").write_text("!")

    with pytest.raises(IdentityError, match=r"has come to stand there while .* move it away"):
        plain(progress=meanwhile)
    assert [p.name for p in other.iterdir()] == ["mine"]
    shutil.rmtree(other)
    stages = []
    plain(progress=lambda stage, share: stages.append(stage))
    assert "ingest" not in stages and deepfere.open(other).factor == FACTOR


def test_overwriting_begins_anew(plain, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(seal, "settle", full)
        with pytest.raises(DeepfereError):
            plain()
        stages = []
        with pytest.raises(DeepfereError):
            plain(progress=lambda stage, share: stages.append(stage))
        assert "ingest" not in stages
    plain(overwrite=True, progress=lambda stage, share: stages.append(stage))
    assert "ingest" in stages


def test_consistency_in_windows_says_so(plain, monkeypatch):
    asked = []
    real = check.consistency

    def spy(image, y, factor, seen):
        asked.append(float(y[seen].max()))
        return real(image, y, factor, seen)

    monkeypatch.setattr(check, "CHECKED_PX", 0)
    monkeypatch.setattr(check, "consistency", spy)
    result = plain()
    assert result.provenance["consistency_checked"] == "windows"
    assert any("one window per ion" in note for note in result.provenance["warnings"])
    # Every ion was decoded, where it has signal.
    assert len(asked) == len(result.ions) and min(asked) > 0
    assert result.ions["consistency"].max() <= 1e-5


class Coarse:
    """A result of so large a factor that a check window is a few measured pixels."""

    def __init__(self, result, side):
        self.ions, self.mask, self.factor, self._result = result.ions, result.mask, 256 // side, result

    def measured(self, mz):
        return self._result.measured(mz)

    def ion(self, mz):
        import dask.array as da

        return da.zeros([n * self.factor for n in self.mask.shape], chunks=512)


def test_a_window_is_judged_against_the_whole_ion(fused, monkeypatch):
    monkeypatch.setattr(check, "consistency", lambda image, y, factor, seen: 1.0)
    found = check.check_ions(Coarse(fused, 3), False, 0)
    assert (found <= 1).all() and (found < 0.99).any()


def test_all_was_checked_and_nothing_is_black(fused, place):
    assert fused.provenance["consistency_checked"] == "all"
    assert zarr.open_group(place.result, mode="r")["stain/0"].fill_value == 255


def test_threads_are_pinned_and_given_back():
    import torch
    from threadpoolctl import threadpool_info, threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2):
            with one_thread(RaySettings()):
                assert torch.get_num_threads() == 1
                assert {pool["num_threads"] for pool in threadpool_info()} == {1}
            assert torch.get_num_threads() == 2
            assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {2}
    finally:
        torch.set_num_threads(threads)


class Failing(RowWorker):
    def work(self, row):
        if row["bad"]:
            raise InputError("is damaged", where="slide.svs", remedy="copy it again")
        if row["bad"] is None:
            raise ValueError("of our own")
        return {}


def test_damaged_input_in_a_worker_is_wrong_input():
    rows = [{"unit": str(n), "bad": bad} for n, bad in enumerate([True, False, True])]
    with pytest.raises(InputError, match=r"slide.svs: is damaged \(tiling: 2 of 3 .*; copy it again"):
        run_rows(rows, Failing, (), what="tiling", inline_up_to=9)
    with pytest.raises(DeepfereError, match="3 of 4 pieces") as told:
        run_rows([*rows, {"unit": "3", "bad": None}], Failing, (), what="tiling", inline_up_to=9)
    assert not isinstance(told.value, InputError)


@pytest.fixture
def study(phantom, tmp_path):
    def file(**more):
        section = {"name": "one", "msi": str(phantom.imzml), "slide": str(phantom.slide), **more}
        section["alignment"] = str(phantom.truth / "alignment.json")
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": [section]}))
        return tmp_path / "study.yaml"

    return file


class Watched:
    """A slide that says when it is closed."""

    def __init__(self, slide, handles):
        self._slide, self._handles = slide, handles
        handles.append(self)

    def __getattr__(self, name):
        return getattr(self._slide, name)

    def close(self):
        self._slide.close()
        self._handles.remove(self)


def test_planes_follow_the_settings_there_and_back(study, tmp_path, ray_session, monkeypatch):
    from deepfere.pipeline.study import run_stage

    handles, images, real = [], [], overview.open_slide
    monkeypatch.setattr(overview, "open_slide", lambda *given: Watched(real(*given), handles))
    for factor in (4, 2, 4):
        overrides = ["tracking.uri=none"]
        run_stage("tile", study(), tmp_path / "work", factor=factor, overrides=overrides, progress=lambda *_: None)
        images.append(np.asarray(zarr.open_group(tmp_path / "work/sections/one/planes.zarr", mode="r")["planes"][:]))
        assert handles == []
    assert images[0].shape != images[1].shape
    assert images[0].any() and np.array_equal(images[0], images[2])


def test_averages_follow_the_smoothings(study, tmp_path, ray_session):
    """The widest of those that are tried alone is another list, though the planes reach as far."""
    from deepfere.model.transfer import SMOOTHINGS_PITCH
    from deepfere.pipeline.study import run_stage

    shapes = []
    for more in ([], [f"model.smoothing_pitch={max(SMOOTHINGS_PITCH)}"], []):
        overrides = ["tracking.uri=none", *more]
        run_stage("tile", study(), tmp_path / "work", factor=2, overrides=overrides, progress=lambda *_: None)
        shapes.append(zarr.open_group(tmp_path / "work/sections/one/pooled.zarr", mode="r")["pooled"].shape[0])
    assert shapes[0] == shapes[2] and shapes[0] - 1 == len(SMOOTHINGS_PITCH) * (shapes[1] - 1)


def test_an_input_inside_the_output_is_not_cleared_away(study, tmp_path, cli):
    work = tmp_path / "work"
    assert cli("ingest", study(), "-o", work).code == 0
    cube = work / "sections" / "one" / "measured.zarr"
    for out, command in ((work, ("ingest", study(msi=str(cube)))), (work / "sections" / "one", ("fuse", cube))):
        done = cli(*command, "-o", out, "--no-guide", "--overwrite", "tracking.uri=none")
        assert done.code == 2 and f"holds the input {cube}" in done.errors[0], done
        assert (cube / "zarr.json").exists()


def test_another_piece_of_the_slide_is_another_alignment(study, tmp_path, cli):
    work, marker = tmp_path / "work", tmp_path / "work" / "done" / "align-one.json"
    prints = []
    for region in ("all", None):
        assert cli("align", study(slide_region=region), "-o", work, "--overwrite").code == 0
        prints.append(json.loads(marker.read_text())["fingerprint"])
    assert prints[0] != prints[1]


def test_planes_of_another_plan_are_not_read(tmp_path):
    from deepfere.frame import SectionGrid
    from deepfere.model.guide import GuideSpec
    from deepfere.store import create_array, open_group
    from deepfere.tiling.cache import PlaneReader

    group = open_group(tmp_path / "planes.zarr", "w")
    create_array(group, "planes", (7, 60, 50), "uint8", (7, 16, 16))
    group.attrs["spacing_um"] = [5.0, 5.0]
    white, grid = (240.0, 240.0, 240.0), SectionGrid((9, 7), (20.0, 20.0))
    assert PlaneReader(str(tmp_path / "planes.zarr"), GuideSpec(grid, 2, (5.0, 5.0), (60, 50), white, 0.1))
    for spacing, shape in (((4.0, 5.0), (60, 50)), ((5.0, 5.0), (61, 50))):
        with pytest.raises(DeepfereError, match="are wanted"):
            PlaneReader(str(tmp_path / "planes.zarr"), GuideSpec(grid, 2, spacing, shape, white, 0.1))


def test_overwriting_a_study_leaves_its_results(study, tmp_path, cli):
    work = tmp_path / "work"
    assert cli("ingest", study(), "-o", work).code == 0
    (work / "results" / "one.zarr").mkdir(parents=True)
    (work / "results" / "one.zarr" / "zarr.json").write_text("{}")
    other = study(pitch_um=40)
    assert cli("ingest", other, "-o", work).code == 2
    assert cli("ingest", other, "-o", work, "--overwrite").code == 0
    assert (work / "results" / "one.zarr" / "zarr.json").exists()


def test_refused_stages_leave_no_folder(study, phantom, tmp_path, cli):
    work = tmp_path / "work"
    done = cli("align", study(), "-o", work, "--no-guide")
    assert done.code == 2 and "needs the stain" in done.errors[0] and not work.exists()
    shutil.copy(phantom.imzml, tmp_path / "broken.imzML")
    (tmp_path / "broken.ibd").write_bytes((phantom.folder / "section.ibd").read_bytes()[:-4000])
    done = cli("ingest", study(msi=str(tmp_path / "broken.imzML")), "-o", work)
    assert done.code == 2 and not work.exists()
    # What was done before stays.
    assert cli("ingest", study(), "-o", work).code == 0
    assert cli("align", study(), "-o", work, "--factor", 1000).code == 2
    assert (work / "sections" / "one" / "measured.zarr").exists()


def test_unfinished_work_is_pointed_at(tmp_path, cli):
    (tmp_path / "r.zarr.work").mkdir()
    for command in ("info", "report"):
        told = cli(command, tmp_path / "r.zarr")
        assert told.code == 2 and "is unfinished" in told.errors[0] and "r.zarr.work" in told.errors[0], told
    assert "does not exist" in cli("info", tmp_path / "other.zarr").errors[0]


def test_a_default_store_that_cannot_be_made_is_refused_early(phantom, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nohome")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    told = cli("fuse", phantom.imzml, "-o", tmp_path / "out" / "r.zarr", "--no-guide", "--factor", 2)
    assert told.code == 2 and "MLflow" in told.errors[0] and "tracking.uri=none" in told.errors[0], told
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_missing_file_names_its_section(phantom, tmp_path, cli):
    study = tmp_path / "study.yaml"
    rows = [("good", phantom.slide), ("lost", tmp_path / "nope.tif")]
    study.write_text("sections:\n" + "".join(f"- {{name: {n}, msi: {phantom.imzml}, slide: {s}}}\n" for n, s in rows))
    told = cli("align", study, "-o", tmp_path / "work")
    assert told.code == 2 and "section lost" in told.errors[0] and "nope.tif" in told.errors[0], told
    assert not (tmp_path / "work").exists()
