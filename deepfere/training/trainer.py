"""Ray Train adapter: any number of workers, checkpoints by steps, exact resume under the same run name."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepfere.cluster import keep_signals, last_line
from deepfere.config import TrainSettings
from deepfere.errors import DeepfereError, InputError
from deepfere.tiling.dataset import patch_dataset
from deepfere.tiling.patches import PatchSource, draw, plane_shape
from deepfere.training.loop import LoopSettings, SectionTask

CHECKPOINT = "training.pt"
HISTORY = "history.json"


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        state: Path of the checkpoint file (model, optimiser, step).
        history: Mean losses per reporting interval: {"step": int, name: float}.
    """

    state: Path
    history: list[dict[str, float]]


def preflight(settings: TrainSettings) -> None:
    """Refuse resources that the cluster does not have, before anything starts.

    Raises:
        InputError: More workers or GPUs than the cluster holds; Ray itself would wait for ever.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    if settings.use_gpu and gpus < settings.workers:
        raise InputError(
            f"{settings.workers} GPU workers are asked for and the cluster has {gpus:g} GPUs",
            where="train.workers",
            remedy="lower train.workers or set train.use_gpu=false",
        )
    # One CPU stays with Ray Data: a group that takes every CPU starves its own input.
    most = max(1, int(2 * (cpus - 0.5)))
    if not settings.use_gpu and settings.workers > most:
        raise InputError(
            f"{settings.workers} CPU workers are asked for and the cluster has {cpus:g} CPUs",
            where="train.workers",
            remedy=f"give at most {most}",
        )


def _worker_loop(config: dict[str, Any]) -> None:
    import torch
    from ray import train
    from ray.train.torch import prepare_model

    from deepfere.training.loop import JointModel, train_step

    settings = LoopSettings(**config["settings"])
    sections = [SectionTask(**s) for s in config["sections"]]
    torch.set_num_threads(config["threads"])
    model = JointModel(settings, sections)
    optimiser = model.optimiser()
    first, history = 0, []
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / CHECKPOINT, weights_only=True)
        # A checkpoint of other settings (or of fits that another version made) is no place to go on from.
        if saved["digest"] == config["digest"]:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            first, history = saved["step"], saved["history"]
    wrapped = prepare_model(model, parallel_strategy_kwargs={"find_unused_parameters": True})
    world, rank = train.get_context().get_world_size(), train.get_context().get_world_rank()
    shard = train.get_dataset_shard("train")
    batches = shard.iter_torch_batches(batch_size=settings.batch // world, drop_last=True, prefetch_batches=1)
    sums: dict[str, float] = {}
    count, step = 0, 0
    for step, batch in enumerate(batches):
        if step < first:
            continue
        losses = train_step(wrapped, optimiser, batch, step, settings)
        if rank == 0 and config["progress"]:
            Path(config["progress"]).write_text(str(step + 1))
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
        count += 1
        last = step + 1 == settings.steps
        if (step + 1) % config["report_every"] == 0 or last:
            means = _over_workers({name: value / count for name, value in sums.items()})
            history.append({"step": step + 1, **means})
            sums, count = {}, 0
            with tempfile.TemporaryDirectory() as folder:
                saved_to = None
                if rank == 0:
                    state = {
                        "model": model.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "step": step + 1,
                        "history": history,
                        "digest": config["digest"],
                    }
                    torch.save(state, Path(folder) / CHECKPOINT)
                    (Path(folder) / HISTORY).write_text(json.dumps(history))
                    saved_to = train.Checkpoint.from_directory(folder)
                train.report(dict(history[-1]), checkpoint=saved_to)
        if last:
            break


def _over_workers(losses: dict[str, float]) -> dict[str, float]:
    """Mean over the workers, each of which saw its own patches."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return losses
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    values = torch.tensor(list(losses.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(losses, (values / distributed.get_world_size()).tolist(), strict=True))


def train_joint(
    *,
    settings: LoopSettings,
    sections: list[SectionTask],
    sources: list[PatchSource],
    train: TrainSettings,
    folder: Path,
    name: str,
    digest: str,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Train on Ray: one call does a fresh run, a resumed one, or finds it finished.

    Args:
        settings: Settings of the loop.
        sections: The sections' tasks.
        sources: Where their patches come from, in the same order.
        train: Workers, reporting and resources.
        folder: Absolute path of the run storage (shared between nodes on a cluster).
        name: Run name; the same name resumes.
        digest: Hash of everything that the weights depend on.
        on_step: Called now and then with the number of steps done.

    Raises:
        InputError: Impossible resources.
        DeepfereError: Training failed.
        KeyboardInterrupt: It was interrupted; the same call goes on from the last checkpoint.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    preflight(train)
    progress = folder.resolve() / f"{name}.step"
    folder.mkdir(parents=True, exist_ok=True)
    patches = [(s, p) for s, source in enumerate(sources) for p in range(len(source.cells))]
    batch = -(-settings.batch // train.workers) * train.workers
    shape = plane_shape(sources, settings.patch_px)
    rows = draw(patches, settings.steps, batch, settings.seed)
    cpus = ray.cluster_resources().get("CPU", 1.0)
    per_worker = 1.0 if cpus - train.workers >= 1.0 else 0.5
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={
            "settings": {**asdict(settings), "batch": batch},
            "sections": [asdict(s) for s in sections],
            "digest": digest,
            "report_every": train.report_every,
            "threads": 1,
            "progress": str(progress) if on_step else None,
        },
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": per_worker, **({"GPU": 1} if train.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=2, controller_failure_limit=3),  # type: ignore[call-arg]
        ),
        datasets={"train": patch_dataset(rows, sources, settings.patch_px, shape, batch // train.workers)},
    )
    try:
        with _watch(progress, on_step), keep_signals():
            result = trainer.fit()
    except SystemExit as stop:
        # Ray's own handler of Ctrl-C ends the process with success when the controller is gone already.
        raise KeyboardInterrupt from stop
    except Exception as error:
        raise DeepfereError(f"training failed: {last_line(error)}") from error
    if result.error is not None:
        raise DeepfereError(f"training failed: {last_line(result.error)}") from result.error
    kept = folder / f"{name}.final"
    if result.checkpoint is not None:
        result.checkpoint.to_directory(str(kept))
    history = json.loads((kept / HISTORY).read_text()) if result.checkpoint is not None else []
    if not history or history[-1]["step"] != settings.steps:
        # Ray Train turns Ctrl-C into an aborted run that looks like a finished one.
        raise KeyboardInterrupt
    return Trained(kept / CHECKPOINT, history)


@contextmanager
def _watch(file: Path, on_step: Callable[[int], None] | None) -> Iterator[None]:
    """Tell ``on_step`` what the first worker last wrote to ``file``, once a second."""
    if on_step is None:
        yield
        return
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(1.0):
            if file.exists() and (text := file.read_text()).isdigit():
                on_step(int(text))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        file.unlink(missing_ok=True)
