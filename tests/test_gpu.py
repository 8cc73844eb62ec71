"""A GPU gives what the CPU gives; without one, what asks for it is refused in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import deepfere
from deepfere.cluster import cluster_gpus
from deepfere.config import load_config
from deepfere.errors import InputError
from deepfere.model.guide import Cells, stain_of
from deepfere.model.network import FusionNetwork
from deepfere.model.paper import Recipe, Training
from deepfere.pipeline.fuse import check_resources
from deepfere.reconstruction.shards import exact_gpu
from deepfere.training.loop import JointModel, on_device, train_step
from tests.conftest import FACTOR, SETTINGS, write_study
from tests.test_detail import make, read, whole_of
from tests.test_training import (
    learnt,
    setting,  # noqa: F401  (a fixture)
)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
import sys
from deepfere.pipeline.study import run_stage

out, gpu, manifest, factor = sys.argv[1:5]
more = [f"train.use_gpu={gpu}", "train.precision=float32"]
more += [f"reconstruct.use_gpu={gpu}", "reconstruct.workers_per_gpu=2"]
run_stage("reconstruct", manifest, out, factor=int(factor), overrides=[*sys.argv[5:], *more], progress=print)
"""


def test_what_asks_for_a_gpu_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"^reconstruct.use_gpu: .* sees no GPU on {socket.gethostname()}"):
        exact_gpu()


@pytest.mark.ray
def test_a_cluster_without_gpus_is_refused_before_work_starts(ray_session):
    config = load_config(None, ["tracking.uri=none", "reconstruct.use_gpu=true"])
    with pytest.raises(InputError, match=r"^reconstruct\.use_gpu: .* the cluster has none"):
        check_resources(config, True)
    check_resources(config, True, writes=False)
    check_resources(load_config(None, ["tracking.uri=none", "reconstruct.use_gpu=true", "guide=false"]), True)
    assert cluster_gpus() == 0


def test_the_settings_of_a_gpu_do_not_make_another_result():
    more = ["train.use_gpu=true", "reconstruct.use_gpu=true", "reconstruct.workers_per_gpu=2"]
    assert load_config(None, more).digest() == load_config(None, []).digest()
    with pytest.raises(InputError, match="workers_per_gpu"):
        load_config(None, ["reconstruct.workers_per_gpu=0"])


SHARING = """
import os
import sys
import time
from pathlib import Path
import ray
from deepfere.rows import Phase, RowWorker
from deepfere.schedule import run_jobs

class Tell(RowWorker):
    def __init__(self, folder):
        self.folder, self.until = Path(folder), time.monotonic() + 60

    def work(self, row):
        # On a busy machine one worker would be through before the other one has begun.
        (self.folder / str(os.getpid())).touch()
        while len(os.listdir(self.folder)) < 2 and time.monotonic() < self.until:
            time.sleep(0.05)
        time.sleep(0.05)
        return {"pid": os.getpid(), "gpus": list(map(str, ray.get_gpu_ids()))}

if __name__ == "__main__":
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False)
    found = []
    rows = [{"unit": str(n)} for n in range(40)]
    run_jobs([("one", (p for p in [Phase("x", Tell, (sys.argv[1],), rows, 40, found.append)]))], title="t", per_gpu=2)
    print(len({record["pid"] for record in found}), {tuple(record["gpus"]) for record in found}, len(found))
"""


@pytest.mark.ray
def test_workers_that_share_a_gpu_are_as_many_as_were_asked_for(tmp_path):
    """On a cluster that says that it has a GPU: Ray's bookkeeping, no device."""
    (tmp_path / "sharing.py").write_text(SHARING)
    (tmp_path / "seen").mkdir()
    command = [sys.executable, str(tmp_path / "sharing.py"), str(tmp_path / "seen")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split("\n")[0] == "2 {('0',)} 40", done.stderr[-2000:]


@on_gpu
@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("tier", ["T1", "T2"])
def test_a_window_is_the_same(tier, bent):
    exact_gpu()
    model = make((23, 19), 4, tier, bent)
    there = replace(model, device="cuda", network=make((23, 19), 4, tier, bent).network)
    if there.network is not None:
        there.network.to("cuda")
    (detail, cover), (detail_gpu, cover_gpu) = whole_of(model), whole_of(there)
    assert detail.std() > 0.1
    np.testing.assert_allclose(detail_gpu, detail, atol=1e-4 * np.abs(detail).max())
    np.testing.assert_allclose(cover_gpu, cover, atol=1e-6)
    # Tiles are the whole there too.
    again, _ = there.window(read, Cells(5, 17, 3, 11))
    np.testing.assert_allclose(again, detail_gpu[:, 20:68, 12:44], atol=1e-4 * np.abs(detail).max())
    stain, stain_gpu = (stain_of(model.spec, read, model.alignment, Cells(0, 9, 0, 9), d)[0] for d in ("cpu", "cuda"))
    assert (stain_gpu.cpu() - stain).abs().max() < 0.01


@on_gpu
def test_a_network_in_half_precision_is_near(setting):  # noqa: F811
    """The losses of six steps: in float32 as on the CPU, in bfloat16 near them."""
    settings, sections, batch = setting
    torch.backends.cudnn.allow_tf32 = False
    here, losses = learnt(settings, sections, [[on_device(batch, "cpu")]] * 6)
    for precision, tolerance in (("float32", 1e-3), ("bfloat16", 0.05)):
        chosen = replace(settings, precision=precision)
        model = JointModel(chosen, sections).to("cuda")
        optimiser = model.optimiser()
        found = [train_step(model, optimiser, [on_device(batch, "cuda")], step, chosen) for step in range(6)]
        for ours, theirs in zip(found, losses, strict=True):
            for name, value in theirs.items():
                assert float(ours[name]) == pytest.approx(value, rel=tolerance, abs=1e-4), (precision, name)
    assert all(torch.isfinite(value).all() for value in here.values() if value.is_floating_point())


@on_gpu
def test_the_published_model_trains_there():
    rng = np.random.default_rng(0)
    cells, stain = rng.random((1, 12, 11)), rng.random((3, 96, 88))
    torch.backends.cudnn.allow_tf32 = False
    here, there = (Training(cells, stain, Recipe(0, 30, 2e-4, 20, 16, False, 0), d) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(there.images(), here.images(), atol=1e-4 * np.abs(here.images()).max())
    assert there.step() == pytest.approx(here.step(), rel=1e-4)
    # Gradients of the first iteration, of all losses together.
    gradients = [[p.grad.cpu() for p in training._nets.parameters()] for training in (there, here)]
    whole = torch.cat([g.flatten() for g in gradients[1]]).norm()
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * whole
    losses = [(there.step(), here.step()) for _ in range(29)]
    assert losses[-1][1] < losses[0][1]
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=0.1)


@on_gpu
def test_the_network_has_one_answer_on_the_gpu():
    """Twice the same, bit for bit, as shards that are done twice have to be."""
    exact_gpu()
    torch.manual_seed(0)
    network = FusionNetwork(11, 16).eval().to("cuda")
    stain, up = torch.randn(1, 11, 300, 280, device="cuda"), torch.randn(1, 16, 300, 280, device="cuda")
    with torch.inference_mode():
        assert torch.equal(network.regress(stain, up), network.regress(stain, up))


@on_gpu
@pytest.mark.ray
def test_a_section_from_files_to_a_result(phantom, tmp_path):
    """Trained with NCCL and reconstructed by workers that share the GPU; against the same on the CPU."""
    manifest = write_study(tmp_path, phantom)
    results = {}
    for gpu in ("true", "false"):
        out = tmp_path / gpu
        command = [sys.executable, "-c", STUDY, out, gpu, manifest, FACTOR]
        settings = [
            *SETTINGS,
            "tracking.uri=none",
            "model.tier=T2",
            "reconstruct.shard_px=64",
            "reconstruct.chunk_px=32",
        ]
        done = subprocess.run([*map(str, command), *settings], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[gpu] = deepfere.open(out / "results" / "one.zarr")
    apart = []
    for mz in results["true"].ions["mz"]:
        ours, theirs = (np.asarray(results[gpu].ion(mz)) for gpu in ("true", "false"))
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        apart.append(np.nanmax(np.abs(ours - theirs)) / np.nanmax(theirs))
    print("of each ion's maximum apart at most:", np.round(apart, 5))
    assert max(apart) <= 0.01
