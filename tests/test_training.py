"""The training step without Ray: parts of a batch, precision, devices, the clock of the input; and shared by four."""

from __future__ import annotations

import errno
import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from deepfere import cores
from deepfere.config import TrainSettings
from deepfere.errors import DeepfereError, InputError
from deepfere.frame import Alignment, SectionGrid
from deepfere.model.features import FEATURES, PLANES
from deepfere.model.guide import GuideSpec
from deepfere.store import create_array, open_group
from deepfere.tiling.dataset import Dealing, blocks_of
from deepfere.tiling.patches import PatchReader, PatchSource, core_window
from deepfere.training.alone import train_alone
from deepfere.training.checkpoint import CHECKPOINT, begin_at, drop_torn, note_begin, read_state
from deepfere.training.loop import INDICES, JointModel, LoopSettings, SectionTask, on_device, train_step
from deepfere.training.steps import Clock
from deepfere.training.trainer import preflight
from deepfere.training.worker import _state, _to_come
from tests.conftest import FACTOR, SETTINGS, write_study

K, PATCH, CONTEXT, DEPTH = 2, 20, 5, 1
F = len(FEATURES)


@pytest.fixture(scope="module")
def setting():
    """Settings, a section and a batch of four invented patches on the CPU."""
    rng = np.random.default_rng(0)
    spec = GuideSpec(SectionGrid((20, 24), (40.0, 40.0)), 4, (5.0, 5.0), (170, 200), (240.0, 235.0, 245.0), 0.3)
    alignment = Alignment(np.eye(2), np.array([6.0, -4.0]))
    cells = [[0, 0], [4, 3], [6, 9], [2, 7]]
    source = PatchSource("", "", spec.to_dict(), alignment.to_dict(), cells, CONTEXT, 2**DEPTH - 1, 4)
    windows = [core_window(source, spec, alignment, n, PATCH) for n in range(4)]
    shape = max(r1 - r0 for r0, r1, _, _ in windows), max(c1 - c0 for _, _, c0, c1 in windows)
    batch = {
        "planes": torch.from_numpy(rng.integers(40, 255, (4, *shape, len(PLANES)), dtype=np.uint8)),
        "origin": torch.tensor([[r0, c0] for r0, _, c0, _ in windows]),
        "cell": torch.tensor(cells),
        "section": torch.zeros(4, dtype=torch.int64),
        "flip": torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]),
        "pooled": torch.from_numpy(rng.normal(size=(4, F, PATCH, PATCH)).astype(np.float32)),
        "target": torch.from_numpy(rng.normal(size=(4, K, PATCH, PATCH)).astype(np.float32)),
        "weight": torch.ones(4, PATCH, PATCH),
        "share": torch.ones(4),
    }
    batch["planes"][..., PLANES.index("coverage")] = 255
    network = {"features": F, "factors": K, "width": 8, "depth": DEPTH}
    settings = LoopSettings(
        network, [0.0] * F, [1.0] * F, steps=6, batch=4, patch_px=PATCH, context_px=CONTEXT, rate=2e-3,
        rate_registration_pitch=2e-3, mapping_weight=0.5, correlation_weight=0.1, seed=0,
    )  # fmt: skip
    weights = (0.1 * rng.normal(size=(F, K))).tolist()
    return settings, [SectionTask(spec.to_dict(), alignment.to_dict(), [0.8, 0.0], weights)], batch


def learnt(settings, sections, steps):
    """Weights and losses after the steps, each a list of batches."""
    model = JointModel(settings, sections)
    optimiser = model.optimiser()
    losses = [train_step(model, optimiser, parts, step, settings) for step, parts in enumerate(steps)]
    return model.state_dict(), [{name: float(value) for name, value in step.items()} for step in losses]


def halves(batch):
    return [{name: values[k : k + 2] for name, values in batch.items()} for k in (0, 2)]


def test_a_step_in_parts_is_the_step(setting):
    settings, sections, batch = setting
    whole, losses = learnt(settings, sections, [[on_device(batch, "cpu")]] * 3)
    split, theirs = learnt(settings, sections, [[on_device(part, "cpu") for part in halves(batch)]] * 3)
    for ours, other in zip(losses, theirs, strict=True):
        assert ours == pytest.approx(other, rel=1e-5)
    start = JointModel(settings, sections).state_dict()
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    assert moved > 1e-3
    for name, value in whole.items():
        assert float((value - split[name]).abs().max()) <= 1e-4, name


def test_the_same_steps_give_the_same_bits(setting):
    settings, sections, batch = setting
    one, losses = learnt(settings, sections, [[on_device(batch, "cpu")]] * 2)
    two, again = learnt(settings, sections, [[on_device(batch, "cpu")]] * 2)
    assert losses == again
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("threads", "precision"), [(2, "float32"), (4, "float32"), (4, "bfloat16")])
def test_threads_do_not_change_a_bit(setting, monkeypatch, threads, precision):
    settings, sections, batch = setting
    settings = replace(settings, precision=precision)
    monkeypatch.setattr(cores, "usable_cores", lambda: threads)
    many, losses = learnt(settings, sections, [[on_device(batch, "cpu")]] * 2)
    with cores.limited(1):
        one, alone = learnt(settings, sections, [[on_device(batch, "cpu")]] * 2)
    assert losses == alone
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("workers", [3, 4, 5])
def test_a_step_that_cannot_be_dealt_evenly_is_the_step(setting, workers):
    """The mean over what each of them makes of all its patches at once, of which the last ones count for nothing."""
    settings, sections, batch = setting
    rows = {"step": np.zeros(4, np.int64), "patch": np.arange(4)}
    model = JointModel(settings, sections)
    whole = model(on_device(batch, "cpu"))
    whole["total"].backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    sums = dict.fromkeys(whole, 0.0)
    for block in blocks_of(rows, Dealing.of(4, workers, 4)):
        dealt = block.to_pydict()
        part = {name: values[dealt["patch"]] for name, values in batch.items()}
        losses = model(on_device({**part, "share": torch.tensor(dealt["share"])}, "cpu"))
        (losses["total"] / workers).backward()
        sums = {name: sums[name] + value.item() / workers for name, value in losses.items()}
    assert sums == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-5)
    for name, value in model.named_parameters():
        if value.grad is not None:
            assert float((value.grad - gradients[name]).abs().max()) <= 1e-4 * float(gradients[name].abs().max()), name


@pytest.mark.parametrize(
    ("first", "came", "told"),
    [
        (0, [[[0, 0], [0, 0]], [[1, 1], [1, 1]]], None),
        (1, [[[0, 0], [0, 0]], [[1, 1], [1, 1]]], None),
        (0, [[[1, 1], [1, 1]]], "patches of step 2 came, not those of step 1"),
        (0, [[[0, 0], [0, 0]], [[2, 2], [2, 2]]], "patches of step 3 came, not those of step 2"),
        (0, [[[0, 0], [0, 1]]], "patches of other steps came with those of step 1"),
        (0, [[[0, 0], [0, 0]], [[1, 1], [2, 2]]], "patches of other steps came with those of step 2"),
    ],
)
def test_patches_of_other_steps_are_refused(first, came, told):
    """Also in a later step, and in any of its parts."""
    lost = []
    steps = [[{"step": torch.tensor(part)} for part in parts] for parts in came]
    taken = _to_come(steps, first, Clock(), lambda: lost.append(1), lambda step: False)
    if told is None:
        assert [int(parts[0]["step"][0]) for parts in taken] == list(range(first, len(came))) and not lost
        return
    with pytest.raises(DeepfereError, match=told):
        list(taken)
    assert lost == [1]


def test_half_precision_is_near_and_leaves_the_registration_in_double(setting):
    settings, sections, batch = setting
    _, full = learnt(settings, sections, [[on_device(batch, "cpu")]])
    state, half = learnt(replace(settings, precision="bfloat16"), sections, [[on_device(batch, "cpu")]])
    assert half[0] != full[0]
    assert half[0] == pytest.approx(full[0], rel=0.03)
    assert {value.dtype for name, value in state.items() if "registrations" in name} == {torch.float64}
    assert {value.dtype for name, value in state.items() if name.startswith("network")} == {torch.float32}


def test_nothing_stays_behind_on_another_device(setting):
    """PyTorch's `meta` device refuses to meet the CPU as a GPU does, and shows that no value is read back."""
    settings, sections, batch = setting
    moved = on_device(batch, "meta")
    assert all(isinstance(moved[name], list) for name in INDICES)
    losses = JointModel(settings, sections).to("meta")(moved)
    assert {value.device.type for value in losses.values()} == {"meta"}
    losses["total"].backward()


def test_patches_are_read_as_the_registration_asks(setting, tmp_path):
    """The windows that the batch above has are those of the reader that training uses."""
    _, sections, batch = setting
    spec = GuideSpec.from_dict(sections[0].spec)
    group = open_group(tmp_path / "planes.zarr", "w")
    planes = np.random.default_rng(1).integers(0, 255, (len(PLANES), *spec.planes_shape), dtype=np.uint8)
    create_array(group, "planes", planes.shape, "uint8", (len(PLANES), 64, 64))[...] = planes
    group.attrs["spacing_um"] = list(spec.spacing_um)
    shape = spec.grid.shape_px
    np.savez(
        tmp_path / "arrays.npz", factors=np.zeros((K, *shape)), pooled=np.zeros((F, *shape)), weight=np.ones(shape)
    )
    source = PatchSource(
        str(tmp_path / "planes.zarr"), str(tmp_path / "arrays.npz"), sections[0].spec, sections[0].alignment,
        batch["cell"].tolist(), CONTEXT, 2**DEPTH - 1, 4,
    )  # fmt: skip
    size = tuple(batch["planes"].shape[1:3])
    for n in range(4):
        loaded = PatchReader(source, PATCH).load(n, size)
        row, col = batch["origin"][n].tolist()
        assert loaded["origin"].tolist() == [row, col]
        expected = planes[:, row : row + size[0], col : col + size[1]].transpose(1, 2, 0)
        h, w = expected.shape[:2]
        np.testing.assert_array_equal(loaded["planes"][:h, :w], expected)


class Alone:
    """A training of six steps in this process, on the halves of one batch."""

    def __init__(self, setting, folder):
        self.settings, self.sections, batch = setting
        self.parts = [{name: values.numpy() for name, values in part.items()} for part in halves(batch)]
        self.folder, self.loaded, self.told = folder, [], []
        folder.mkdir(exist_ok=True)

    def load(self, done):
        for step in range(done, self.settings.steps):
            self.loaded.append(step)
            yield from self.parts

    def train(self, *, digest="one", stop="", load=None, on_step=None):
        given = {"parts": 2, "report_every": 2, "run": self.folder, "digest": digest, "stop": str(stop)}
        return train_alone(
            self.settings, self.sections, load or self.load, **given, on_step=on_step or self.told.append
        )


def test_a_process_alone_trains_goes_on_and_finds_itself_finished(setting, tmp_path):
    settings, sections, batch = setting
    alone = Alone(setting, tmp_path / "run")
    state = alone.train()
    parts = [[on_device(part, "cpu") for part in halves(batch)]] * settings.steps
    weights, losses = learnt(settings, sections, parts)
    assert all(torch.equal(state["model"][name], value) for name, value in weights.items())
    assert [entry["step"] for entry in state["history"]] == [2, 4, 6]
    totals = [step["total"] for step in losses]
    assert [entry["total"] for entry in state["history"]] == pytest.approx(np.mean(np.reshape(totals, (3, 2)), 1))
    assert 0 <= state["timing"]["input_wait"] <= 1 and state["timing"]["steps_per_s"] > 0

    finished = Alone(setting, tmp_path / "run").train()
    assert finished["history"] == state["history"] and finished["timing"] == state["timing"]
    again = Alone(setting, tmp_path / "run")
    assert again.train()["step"] == settings.steps and again.loaded == []
    # Of other settings or fits, it is no place to go on from.
    other = Alone(setting, tmp_path / "run")
    other.train(digest="two")
    assert other.loaded == list(range(settings.steps))


def test_a_process_alone_that_is_stopped_or_fails_goes_on_from_what_it_kept(setting, tmp_path):
    calm = Alone(setting, tmp_path / "calm").train()
    stop, run = tmp_path / "stop", Alone(setting, tmp_path / "run")

    def at_the_third(done):
        for n, part in enumerate(run.load(done)):
            if n == 4:
                stop.touch()
            yield part

    state = run.train(stop=stop, load=at_the_third)
    # Between two reports, once the steps that were loaded before are done.
    assert 0 < state["step"] < 4 and read_state(run.folder / CHECKPOINT)["step"] == state["step"]
    stop.unlink()

    def broken(done):
        yield from run.parts
        raise ValueError("the cache is gone")

    with pytest.raises(ValueError, match="the cache is gone"):
        run.train(load=broken)
    begun = Alone(setting, tmp_path / "run")
    ended = begun.train()
    assert begun.loaded[0] >= state["step"]
    assert all(torch.equal(ended["model"][name], value) for name, value in calm["model"].items())
    assert ended["history"] == calm["history"]


def test_a_torn_state_of_a_process_alone_is_none(setting, tmp_path):
    run = Alone(setting, tmp_path / "run")
    run.train()
    file = run.folder / CHECKPOINT
    for spoilt in (b"", bytes(2000), b"not a state at all", file.read_bytes()[:1000]):
        file.write_bytes(spoilt)
        assert read_state(file) is None
    again = Alone(setting, tmp_path / "run")
    assert again.train()["step"] == 6 and again.loaded == list(range(6))


def test_a_torn_checkpoint_of_a_group_is_forgotten(setting, tmp_path):
    """Ray would give up over it, in every attempt."""
    run = tmp_path / "run"
    state = Alone(setting, tmp_path / "alone").train()
    theirs, snapshot = run / "checkpoint_000003", run / "checkpoint_manager_snapshot.json"
    theirs.mkdir(parents=True)
    told = {"checkpoint_results": [{"checkpoint_dir_name": theirs.name}], "latest_checkpoint_result": None}
    told["latest_checkpoint_result"] = told["checkpoint_results"][0]

    def forgotten(checkpoint, text):
        (theirs / CHECKPOINT).unlink(missing_ok=True)
        if checkpoint is not None:
            (theirs / CHECKPOINT).write_bytes(checkpoint)
        snapshot.write_text(text)
        note_begin(run, "one", 5)
        drop_torn(run)
        assert snapshot.exists() == (begin_at(run, "one") == 5)
        return not snapshot.exists()

    torch.save(state, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    assert not forgotten(whole, json.dumps(told))
    for checkpoint in (None, b"", whole[:1000], bytes(len(whole))):
        assert forgotten(checkpoint, json.dumps(told))
    for text in ("", json.dumps(told)[:50], "[]", "{}"):
        assert forgotten(whole, text)
    snapshot.unlink(missing_ok=True)
    drop_torn(run)
    # What Ray hands over all the same is no place to go on from either.
    (theirs / CHECKPOINT).write_bytes(b"")
    assert _state(Handed(theirs), run, "one") == {}
    (theirs / CHECKPOINT).write_bytes(whole)
    assert _state(Handed(theirs), run, "one")["step"] == state["step"]


class Handed:
    """A checkpoint as Ray hands it over."""

    def __init__(self, folder):
        self.folder = folder

    @contextmanager
    def as_directory(self):
        yield str(self.folder)


def test_a_disk_that_is_full_leaves_the_state_before(setting, tmp_path, monkeypatch):
    run = Alone(setting, tmp_path / "run")
    state = run.train()

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        Alone(setting, tmp_path / "run").train(digest="two")
    assert [file.name for file in run.folder.iterdir()] == [CHECKPOINT]
    assert read_state(run.folder / CHECKPOINT)["digest"] == state["digest"] == "one"


def test_of_two_states_the_further_one_of_the_same_run_is_gone_on_from(setting, tmp_path):
    calm, run = Alone(setting, tmp_path / "calm").train(), Alone(setting, tmp_path / "run")
    stop = tmp_path / "stop"
    stop.touch()
    first = run.train(stop=stop)
    assert first["step"] == 1
    theirs = run.folder / "checkpoint_000001"
    theirs.mkdir()
    torch.save({**calm, "digest": "another"}, theirs / CHECKPOINT)
    second = Alone(setting, tmp_path / "run")
    assert second.train(stop=stop)["step"] == 2 and second.loaded[0] == 1
    torch.save(calm, theirs / CHECKPOINT)
    third = Alone(setting, tmp_path / "run")
    assert third.train()["history"] == calm["history"] and third.loaded == []


def test_the_clock_tells_waiting_from_work():
    def slow(count):
        for n in range(count):
            time.sleep(0.03)
            yield n

    clock, seen = Clock(), []
    for step in clock.steps(slow(9), 2):
        seen.append(step)
        time.sleep(0.06)
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]]
    reading = clock.reading()
    assert 0.3 < reading["input_wait"] < 0.7
    assert Clock().reading() == {}


@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_more_workers_and_parts_learn_what_one_learns(phantom, ray_session, tmp_path, cli):
    """The same global batch by one, by four, and by two in two parts each: the same losses and weights, to rounding."""
    study = write_study(tmp_path, phantom)
    settings = [s for s in SETTINGS if not s.startswith(("train.batch", "train.steps"))]
    settings += ["train.batch=4", "train.steps=24", "model.tier=T2", "tracking.uri=none"]

    def train(workers, parts=1):
        work = tmp_path / f"work-{workers}"
        given = [f"train.workers={workers}", f"train.accumulate={parts}"]
        shutil.copytree(tmp_path / "tiled", work)
        done = cli("train", study, "-o", work, "--factor", FACTOR, *settings, *given)
        assert done.code == 0, done
        facts = json.loads((work / "done" / "learn.json").read_text())
        history = facts["history"]
        assert facts["timing"]["workers"] == workers
        return history, load_file(work / "sections" / "one" / "network.safetensors")

    done = cli("tile", study, "-o", tmp_path / "tiled", "--factor", FACTOR, *settings)
    assert done.code == 0, done
    history, one = train(1)
    assert [entry["step"] for entry in history] == list(range(2, 25, 2))
    for theirs, weights in (train(4), train(2, parts=2)):
        for entry, other in zip(history, theirs, strict=True):
            assert entry == pytest.approx(other, rel=1e-4)
        for name, value in one.items():
            assert np.abs(value - weights[name]).max() <= 1e-3 * max(np.abs(value).max(), 1e-6), name


@pytest.mark.long
@pytest.mark.ray
def test_a_loaders_error_is_told_in_its_own_words(ray_session, tmp_path):
    """Ray's message for the group is a piece of the worker's, and without the line that says what is wrong."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from deepfere.errors import StorageError
    from deepfere.training.trainer import _why

    said = "s3://bucket/training.npz: the store keeps failing (500: no); run it again later"

    class Loader:
        def __call__(self, batch):
            raise StorageError(said)

    def work(config):
        from ray import train

        for _ in train.get_dataset_shard("train").iter_batches(batch_size=1):
            pass

    rows = ray.data.from_items([{"row": 1}]).map_batches(Loader, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0)
    trainer = TorchTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(storage_path=str(tmp_path), name="one"),
        datasets={"train": rows},
    )
    with pytest.raises(Exception, match="UDF") as caught:
        trainer.fit()
    assert _why(caught.value) == said
    assert _why(ValueError("first\n\nlast")) == "last"


@pytest.mark.parametrize(
    ("hosts", "wanted", "told"),
    [
        ([(8, 0)], {"use_gpu": True}, "1 GPU workers are asked for and the cluster has 0 GPUs"),
        ([(8, 3)], {"use_gpu": True, "workers": 4}, "4 GPU workers are asked for and the cluster has 3 GPUs"),
        ([(8, 2), (8, 2)], {"use_gpu": True, "workers": 4, "batch": 8}, None),
        ([(1, 4)], {"use_gpu": True, "workers": 4, "batch": 8}, "have room for 2 .a GPU and 0.5 CPUs each"),
        ([(16, 0), (0, 4)], {"use_gpu": True, "workers": 2, "batch": 8}, "have room for 0"),
        ([(2, 9)], {"workers": 5}, "5 CPU workers are asked for and the cluster has 2 CPUs"),
        ([(0, 4)], {}, "1 CPU workers are asked for and the cluster has 0 CPUs; have its workers up first"),
        ([(1, 0), (1, 0)], {"workers": 4, "batch": 8}, None),
        ([(2, 0)], {"workers": 2, "accumulate": 3, "batch": 8}, "8 patches cannot be dealt evenly to 2 workers, 3"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_at_once(monkeypatch, hosts, wanted, told):
    alive = [{"Alive": True, "Resources": {"CPU": float(cpu), "GPU": float(gpu)}} for cpu, gpu in hosts]
    lost = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    monkeypatch.setattr("ray.nodes", lambda: [*alive, lost])
    settings = TrainSettings(**wanted)
    if told is None:
        preflight(settings)
    else:
        with pytest.raises(InputError, match=told):
            preflight(settings)
