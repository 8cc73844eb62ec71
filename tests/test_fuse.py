"""`fuse` from files to a result: identity, interruption, bytes, tracking, and the run without the stain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

import deepfere
from deepfere.errors import IdentityError, InputError
from deepfere.evaluation.report import report_identity
from deepfere.pipeline import fuse
from tests.conftest import FACTOR, SETTINGS, contents, footprint_means

from .imzml_bytes import write_pair
from .realdata import real_data

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[1]


def stamps(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in [root, *root.rglob("*")]}


def test_no_work_is_left(fused, place):
    assert list(place.result.parent.glob("*.work")) == []


def test_a_finished_run_is_left_alone(fused, place, phantom, cli):
    before, started = stamps(place.result), time.perf_counter()
    done = cli("fuse", phantom.imzml, phantom.slide, "-o", place.result, "--factor", FACTOR, *place.overrides)
    assert done.code == 0 and "finished already" in done.out
    assert stamps(place.result) == before
    assert time.perf_counter() - started < 60  # the report is written, nothing else


def test_a_report_that_another_result_left_is_replaced(fused, place, phantom, cli, tmp_path):
    import shutil

    copy, page = tmp_path / "liver.x4", tmp_path / "liver.x4.html"
    shutil.copytree(place.result, copy)
    other = '<html><meta name="deepfere-identity" content="other">'
    page.write_text(other)
    assert report_identity(page) == "other"
    command = ["fuse", phantom.imzml, phantom.slide, "-o", copy, "--factor", FACTOR, *place.overrides]
    done = cli(*command)
    assert done.code == 0 and "finished already" in done.out and f"report: {page}" in done.out
    assert report_identity(page) == fused.provenance["identity"]
    written = page.stat().st_mtime_ns
    assert cli(*command).code == 0 and page.stat().st_mtime_ns == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["liver.x4", "liver.x4.html"]


def test_other_settings_at_that_path_are_refused(fused, place, phantom, cli):
    before = stamps(place.result)
    command = ["fuse", phantom.imzml, phantom.slide, "-o", place.result, "--factor", FACTOR, *place.overrides]
    done = cli(*command, "seed=1")
    assert done.code == 2 and len(done.errors) == 1 and "--overwrite" in done.errors[0]
    assert stamps(place.result) == before


def test_a_refused_overwrite_costs_nothing(fused, place, phantom, tmp_path):
    before = stamps(place.result)
    with pytest.raises(InputError, match="finer than the slide"):
        fuse(phantom.imzml, phantom.slide, place.result, factor=32, overrides=place.overrides, overwrite=True)
    assert stamps(place.result) == before
    assert not place.result.with_name("result.zarr.work").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["foreign", "foreign.zarr.work"])
def test_a_foreign_folder_is_never_touched(phantom, place, tmp_path, name, overwrite):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    target = tmp_path / name.removesuffix(".work")
    with pytest.raises(IdentityError, match=r"did not write|not a deepfere result"):
        fuse(phantom.imzml, None, target, config=place.config(guide=False), overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_without_the_stain(phantom, place, tmp_path, cli):
    target = tmp_path / "plain.zarr"
    command = ["fuse", phantom.imzml, "--no-guide", "-o", target, "--factor", FACTOR, *place.overrides]
    done = cli(*command)
    assert done.code == 0, done
    result = deepfere.open(target)
    assert result.stain() is None and result.overview() is None and result.alignment is None
    assert (result.ions["informed"] == "smooth").all() and result.ions["consistency"].max() <= 1e-5
    page = (tmp_path / "plain.html").read_text()
    assert "Alignment of slide" not in page and 'aria-label="the stain' not in page
    # Another factor at that path: refused, and done when asked to; the old result stands until then.
    command[command.index("--factor") + 1] = 2
    assert cli(*command).code == 2
    assert deepfere.open(target).factor == FACTOR
    assert cli(*command, "--overwrite").code == 0
    assert deepfere.open(target).factor == 2


def test_an_ion_that_is_zero_everywhere_is_kept(phantom, place, ray_session, tmp_path):
    """On odd sizes, a cropped section with given alignment, with the closed form alone and small shards."""
    measured = deepfere.open_measured(ingested(phantom, tmp_path))
    axis, cube, mask = np.asarray(measured.mz), measured.cube("none"), measured.mask
    rows = [0, 3, 6, 9, 12, 15, 18, 21]
    spectra = [
        (j + 1, i + 1, [*axis[rows], 1500.0], [*(float(cube[m, i, j]) for m in rows), 0.0])
        for i, j in np.argwhere(mask)
    ]
    pixel = "".join(
        f'<cvParam cvRef="IMS" accession="IMS:100004{n}" name="pixel size" value="50" '
        'unitCvRef="UO" unitAccession="UO:0000017" unitName="micrometer"/>'
        for n in (6, 7)
    )
    msi = tmp_path / "zero.imzML"
    write_pair(msi, spectra, mode="continuous", settings=pixel)
    config = place.config("model.tier=T1", "reconstruct.shard_px=64", "reconstruct.chunk_px=16")
    result = fuse(msi, phantom.slide, tmp_path / "zero.zarr", config=config, alignment=phantom.truth / "alignment.json")
    assert result.provenance["model"]["tier"] == "T1"
    row = result.ions.iloc[-1]
    assert row["mz"] == 1500.0 and row["informed"] == "smooth" and row["gate"] == 0
    image = result.ion(1500.0).compute()
    assert np.nanmax(np.abs(image)) == 0 and np.isfinite(image).any()
    assert result.ions["consistency"].max() <= 1e-5
    assert len(list((tmp_path / "zero.zarr" / "stain" / "0" / "c").rglob("*"))) > 4  # several shards
    y = result.measured(float(axis[0]))
    whole = footprint_means(result.ion(float(axis[0])).compute(), FACTOR)
    assert np.nanmax(np.abs(whole - y)) <= 1e-5 * np.nanmax(y)


def ingested(phantom, folder: Path) -> Path:
    from deepfere.measured.ingest import ingest

    ingest(phantom.imzml, folder / "cube.zarr")
    return folder / "cube.zarr"


class Interrupted:
    """A ``deepfere fuse`` in a process of its own."""

    def __init__(self, phantom, place, target: Path) -> None:
        self.target, self.work = target, target.with_name(target.name + ".work")
        self.command = [sys.executable, "-m", "deepfere", "fuse", phantom.imzml, phantom.slide, "-o", target]
        self.command += ["--factor", FACTOR, *SETTINGS, "ray.num_cpus=2", "ray.object_store_memory_bytes=100000000"]
        self.command += [f"tracking.uri={place.tracking}", "train.workers=1"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(part) for part in self.command],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def stop(self, number: signal.Signals, when) -> tuple[int, str]:
        """Send a signal as soon as ``when()`` holds; exit code and standard error."""
        process, limit = self.start(), time.monotonic() + 200
        while not when():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.02)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    def done(self) -> dict[str, int]:
        """Finished stages and when they finished."""
        return {p.stem: p.stat().st_mtime_ns for p in (self.work / "done").glob("*.json")}


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_interrupted_twice_and_the_same_bytes(fused, phantom, place, tmp_path, cli):
    """Stopped in training, killed in the reconstruction: nothing looks finished, the same command goes on."""
    run = Interrupted(phantom, place, tmp_path / "again.zarr")

    code, err = run.stop(signal.SIGTERM, lambda: any((run.work / "training").glob("*.step")))
    assert code == 1 and "stopped (by SIGTERM); the same command again resumes" in err and "Traceback" not in err
    first = run.done()
    assert "tile-section" in first and "learn" not in first
    assert not run.target.exists()
    shown = cli("info", run.work)
    assert "unfinished" in shown.out

    made = run.work / "sections" / "section" / "result.zarr"
    root = made / "zarr.json"
    code, _ = run.stop(signal.SIGKILL, lambda: root.exists() and '"identity"' in root.read_text())
    assert code == -signal.SIGKILL
    second = run.done()
    assert "learn" in second and "reconstruct-section" not in second
    assert {name: second[name] for name in first if name != "track"} == {
        name: first[name] for name in first if name != "track"
    }
    # Nothing stands at the result's place before it is complete.
    assert not run.target.exists()
    with pytest.raises(InputError, match="unfinished"):
        deepfere.open(made)
    assert "unfinished" in cli("info", made).out

    process = run.start()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    # What a user sees: the stages, nothing of Ray.
    assert {line.split(": ")[0] for line in err.splitlines()} == {"fuse"}, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.html", "again.zarr"]
    again = deepfere.open(run.target)
    assert again.provenance["identity"] == fused.provenance["identity"]
    folders = ("measured", "denoised", "detail", "stain", "basis", "uncertainty")
    ours, theirs = contents(run.target, *folders), contents(place.result, *folders)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert again.alignment.to_dict() == fused.alignment.to_dict()


def test_a_result_that_is_being_sealed_is_not_finished(fused, place, tmp_path):
    import shutil

    copy = tmp_path / "copy.zarr"
    shutil.copytree(place.result, copy)
    zarr.open_group(copy, mode="r+").attrs["complete"] = False
    with pytest.raises(InputError, match="unfinished"):
        deepfere.open(copy)


def test_mlflow_holds_the_run(fused, place):
    from mlflow import MlflowClient

    client = MlflowClient(place.tracking)
    told = fused.provenance["run"]
    run = client.get_run(told["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "4" and run.data.params["factor"] == str(FACTOR)
    assert "ray.num_cpus" not in run.data.params
    history = client.get_metric_history(told["run_id"], "reconstruction")
    assert [point.step for point in history] == [2, 4] and all(np.isfinite(p.value) for p in history)
    assert run.data.metrics["consistency_worst"] <= 1e-5
    assert run.data.metrics["ions_informed"] == (fused.ions["informed"] == "stain-informed").sum()
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == fused.provenance["inputs"]["msi"][:36]
    names = {f.path for f in client.list_artifacts(told["run_id"])}
    assert {"held_out_r2.png", "config.json"} <= names
    version = client.get_model_version("deepfere", fused.provenance["model"]["version"])
    assert version.run_id == told["run_id"]


def test_the_registered_model_is_a_plain_pyfunc(fused, place, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.tracking)
    mlflow.set_tracking_uri(place.tracking)
    try:
        model = mlflow.pyfunc.load_model("models:/deepfere/1")
    finally:
        mlflow.set_tracking_uri(None)
    shapes = {spec.name: spec.shape for spec in model.metadata.signature.inputs}
    count = zarr.open_group(fused.path, mode="r")["detail/0"].shape[0]
    assert shapes["upsampled"][1] == count
    r = 3  # the radius of a network of depth 2
    stain = np.zeros((1, shapes["stain"][1], 8 + 2 * r, 8 + 2 * r), np.float32)
    out = model.predict({"stain": stain, "upsampled": np.zeros((1, count, 8 + 2 * r, 8 + 2 * r), np.float32)})
    assert np.asarray(out).shape[1] == count and np.isfinite(out).all()


@pytest.mark.real
@pytest.mark.timeout(900)
def test_bladder(ray_session, place, tmp_path):
    msi, stain = real_data("bladder", "bladder_80um.imzML"), real_data("bladder", "bladder_stain.tif")
    result = fuse(
        msi, stain, tmp_path / "b.zarr", config=place.config("model.tier=T1").model_copy(update={"factor": 8})
    )
    assert result.ions["consistency"].max() <= 1e-5
    assert (result.ions["informed"] == "stain-informed").any()
    assert result.ion(float(result.ions["mz"][0])).shape == tuple(8 * n for n in result.grid.shape_px)
