"""Training as a job: on Ray Train with any number of workers, or in this process; exact resume under the same name."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deepfere.cluster import keep_signals, last_line
from deepfere.config import TrainSettings
from deepfere.errors import DeepfereError, InputError
from deepfere.places import Place
from deepfere.stopping import Stopped, current, saving
from deepfere.tiling.dataset import LoadPatches
from deepfere.tiling.patches import PatchSource, draw, plane_shape
from deepfere.training.alone import train_alone
from deepfere.training.checkpoint import CHECKPOINT, HISTORY, begin_at, drop_torn, note_begin, read_folder, read_state
from deepfere.training.live import Live, Recording
from deepfere.training.loop import LoopSettings, SectionTask
from deepfere.training.storage import run_storage
from deepfere.training.worker import TELL_EVERY_S, work

if TYPE_CHECKING:
    from ray.train import DataConfig

LATEST_POINTS_S = 60.0
"""So long may points be on their way to MLflow when training ends in this process, which then sends the rest."""
ABORT_S = 20.0
"""So long may Ray Train take to end its workers when another process has taken the run over."""
MOST_FAILURES = 2
"""Workers that may be lost before it counts whether training got any further."""


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        model: The state of the joint model.
        history: Mean losses per reporting interval: {"step": int, name: float}.
        timing: Of the last attempt: ``input_wait``, the share of the time in which the first worker waited for
            patches, and ``steps_per_s``, both only where there was a second step; and ``workers``, how many there were.
    """

    model: dict[str, Tensor]
    history: list[dict[str, float]]
    timing: dict[str, float]


def preflight(settings: TrainSettings) -> None:
    """Refuse resources that the cluster does not have, before anything starts.

    Raises:
        InputError: More workers or GPUs than the cluster holds, where Ray itself would wait for ever; a step's patches
            cannot be dealt to them evenly.
    """
    import ray

    have = [host["Resources"] for host in ray.nodes() if host["Alive"]]
    hosts = [(one.get("CPU", 0.0), one.get("GPU", 0.0)) for one in have]
    cpus, gpus = (sum(kind) for kind in zip(*hosts, strict=True))
    if settings.use_gpu and gpus < settings.count:
        raise InputError(
            f"{settings.count} GPU workers are asked for and the cluster has {gpus:g} GPUs",
            where="train.workers",
            remedy="lower train.workers or set train.use_gpu=false",
        )
    share = cpu_share(cpus, settings.count)
    most = sum(int(min(gpu, cpu / share)) for cpu, gpu in hosts)
    if settings.use_gpu and most < settings.count:
        raise InputError(
            f"{settings.count} GPU workers are asked for and the cluster's hosts have room for {most} "
            f"(a GPU and {share:g} CPUs each)",
            where="train.workers",
            remedy="give hosts with GPUs more CPUs, lower train.workers, or set train.use_gpu=false",
        )
    most = sum(int(2 * cpu) for cpu, _ in hosts)
    if not settings.use_gpu and settings.count > most:
        raise InputError(
            f"{settings.count} CPU workers are asked for and the cluster has {cpus:g} CPUs",
            where="train.workers",
            remedy=f"give at most {most}" if most else "have its workers up first, or leave ray.address out",
        )
    # Some of them would compute for nothing.
    slots = settings.count * settings.accumulate
    if settings.batch % slots:
        of = f"{settings.count} workers" + f", {settings.accumulate} parts each" * (settings.accumulate > 1)
        raise InputError(
            f"a step of {settings.batch} patches cannot be dealt evenly to {of}",
            where="train.batch",
            remedy=f"give a multiple of {slots}",
        )


def cpu_share(cpus: float, workers: int) -> float:
    """CPUs that a worker asks for."""
    return 1.0 if cpus >= workers else 0.5


def train_joint(
    *,
    settings: LoopSettings,
    sections: list[SectionTask],
    sources: list[PatchSource],
    train: TrainSettings,
    folder: Place,
    name: str,
    digest: str,
    on_step: Callable[[int], None] | None = None,
    recording: Recording | None = None,
    alone: bool = False,
) -> Trained:
    """Train: one call does a fresh run, a resumed one, or finds it finished.

    Args:
        settings: Settings of the loop.
        sections: The sections' tasks.
        sources: Where their patches come from, in the same order.
        train: Workers, reporting and resources.
        folder: The run's storage: a URL, or an absolute path (shared between nodes on a cluster).
        name: Run name; the same name resumes.
        digest: Hash of everything that the weights depend on.
        on_step: Called now and then with the number of steps done.
        recording: The run that losses are sent to as they come.
        alone: In this process, without Ray Train: what one worker of its learns, to the bit.

    Raises:
        InputError: Impossible resources.
        DeepfereError: Training failed.
        OSError: Alone, a disk is full or cannot be written to.
        MemoryError: Alone, the memory does not suffice.
        KeyboardInterrupt: It was interrupted; the same call goes on from the last checkpoint.
        Stopped: It was asked to stop; the same call goes on from the step that it had reached.
    """
    preflight(train)
    folder.mkdir(parents=True, exist_ok=True)
    patches = [(s, p) for s, source in enumerate(sources) for p in range(len(source.cells))]
    shape = plane_shape(sources, settings.patch_px)

    def left(done: int) -> dict[str, Any]:
        """Rows of the patches of all steps but the first ``done``."""
        rows = draw(patches, settings.steps, settings.batch, settings.seed)
        return {column: values[done * settings.batch :] for column, values in rows.items()}

    def load(done: int) -> Iterator[dict[str, Any]]:
        loader, rows = LoadPatches([asdict(s) for s in sources], settings.patch_px, shape), left(done)
        each = settings.batch // train.accumulate
        for k in range(0, len(rows["step"]), each):
            yield loader({column: values[k : k + each] for column, values in rows.items()})

    if alone:
        live = Live(recording) if recording else None
        try:
            with saving():
                state = train_alone(
                    settings,
                    sections,
                    load,
                    parts=train.accumulate,
                    report_every=train.report_every,
                    run=folder / name,
                    digest=digest,
                    stop=str(current() or ""),
                    on_step=on_step,
                    live=live,
                )
        except (DeepfereError, OSError, MemoryError):
            raise
        except Exception as error:
            raise DeepfereError(f"training failed: {last_line(error)}") from error
        finally:
            if live is not None:
                live.close(LATEST_POINTS_S)
        if state.get("step") != settings.steps:
            raise KeyboardInterrupt  # it was asked to stop, by a file that is gone
        return Trained(state["model"], state["history"], state["timing"])

    kept = read_state(folder / name / CHECKPOINT)
    if kept is not None and kept["digest"] == digest and kept["step"] == settings.steps:
        return Trained(kept["model"], kept["history"], {"workers": 1.0, **kept.get("timing", {})})

    drop_torn(folder / name)

    def begin() -> int:
        """Steps that are not loaded again, whenever a group of workers is begun."""
        return min(begin_at(folder / name, digest), settings.steps - 1)

    from deepfere.training.deal import Deal

    deal = Deal(left, sources, shape, settings, settings.batch // (train.count * train.accumulate))
    return _on_ray(settings, sections, begin, deal, train, folder, name, digest, on_step, recording)


def _on_ray(
    settings: LoopSettings,
    sections: list[SectionTask],
    begin: Callable[[], int],
    deal: DataConfig,
    train: TrainSettings,
    folder: Place,
    name: str,
    digest: str,
    on_step: Callable[[int], None] | None,
    recording: Recording | None,
) -> Trained:
    """See `train_joint`; ``begin`` gives the steps that are not loaded again, ``deal`` what workers get of the rest."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from deepfere.training.group import GroupConfig

    progress = folder / f"{name}.step"
    storage, path = run_storage(folder)
    cpus = ray.cluster_resources().get("CPU", 1.0)
    per_worker = cpu_share(cpus, train.count)

    def trainer() -> TorchTrainer:
        return TorchTrainer(
            work,
            train_loop_config={
                "settings": asdict(settings),
                "sections": [asdict(s) for s in sections],
                "digest": digest,
                "most": settings.batch // (train.count * train.accumulate),
                "report_every": train.report_every,
                "threads": 1,
                "progress": str(progress) if on_step else None,
                "stop": str(current() or ""),
                "run": str(folder / name),
                "recording": recording,
                "node": ray.get_runtime_context().get_node_id(),
            },
            torch_config=GroupConfig(timeout_s=300),
            scaling_config=ScalingConfig(
                # Where hosts are lost and not replaced, fewer workers go on.
                num_workers=(1, train.count) if train.count > 1 else 1,  # type: ignore[arg-type]
                use_gpu=train.use_gpu,
                resources_per_worker={"CPU": per_worker, **({"GPU": 1} if train.use_gpu else {})},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=storage,
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                failure_config=FailureConfig(  # type: ignore[call-arg]
                    max_failures=MOST_FAILURES, controller_failure_limit=3
                ),
            ),
            # Not the rows: Ray would hold them for as long as it trains.
            datasets={"train": begin},  # type: ignore[dict-item]
            dataset_config=deal,
        )

    reached, result = _Reached(on_step), None
    while result is None:
        before = reached.step
        try:
            with saving(), _watch(progress, reached if on_step else None), keep_signals():
                result = trainer().fit()
                # Ray has that checkpoint for certain, whether the run is finished or was asked to stop.
                with suppress(Exception), result.checkpoint.as_directory() as kept:  # type: ignore[union-attr]
                    note_begin(folder / name, digest, json.loads((Path(kept) / HISTORY).read_text())["step"])
        except SystemExit as stop:
            # Ray's own handler of Ctrl-C ends the process with success when the controller is gone already.
            raise KeyboardInterrupt from stop
        except Exception as error:
            # Machines that are lent may go often; what fails at the same step again is no such thing.
            if reached.step <= before:
                raise DeepfereError(f"training failed: {_why(error)}") from error
    if result.error is not None:
        raise DeepfereError(f"training failed: {_why(result.error)}") from result.error
    found: dict[str, Any] = {"step": 0}
    if result.checkpoint is not None:
        try:
            with result.checkpoint.as_directory() as kept:
                found = json.loads((Path(kept) / HISTORY).read_text())
                state = read_folder(Path(kept))
        except Exception as error:  # of whatever keeps it
            raise DeepfereError(f"the last checkpoint of training cannot be read: {last_line(error)}") from error
    if found["step"] != settings.steps:
        # Ray Train turns Ctrl-C into an aborted run that looks like a finished one.
        raise KeyboardInterrupt
    return Trained(state["model"], found["losses"], found["timing"])


class _Reached:
    """The furthest step that a run has told of; every step is passed on."""

    def __init__(self, on_step: Callable[[int], None] | None) -> None:
        self.step, self._on_step = 0, on_step

    def __call__(self, step: int) -> None:
        self.step = max(self.step, step)
        if self._on_step is not None:
            self._on_step(step)


@contextmanager
def _watch(file: Place, on_step: Callable[[int], None] | None) -> Iterator[None]:
    """Tell ``on_step`` what the first worker last wrote to ``file``, every second or few.

    Raises:
        Stopped: What ``on_step`` raises, because the run may not go on; waiting for training is interrupted.
    """
    if on_step is None:
        yield
        return
    stop, lost = threading.Event(), list[Stopped]()
    waiting = threading.current_thread() is threading.main_thread()
    ours = signal.getsignal(signal.SIGINT)

    def leave(number: int, frame: Any) -> None:
        # Ray's own handler of Ctrl-C, if it is there by now, ends its workers: in a session that lives on they would
        # train to the end.
        if callable(handler := signal.getsignal(signal.SIGINT)) and handler is not ours:
            ending = threading.Thread(target=handler, args=(signal.SIGINT, frame), daemon=True)
            ending.start()
            ending.join(ABORT_S)  # of a cluster that is out of reach nothing comes back
        raise KeyboardInterrupt

    # SIGINT may be ignored: in what a shell has put into the background it is.
    before = signal.signal(signal.SIGUSR2, leave) if waiting else None

    def poll() -> None:
        while not stop.wait(1.0 if isinstance(file, Path) else TELL_EVERY_S):
            # What cannot be seen now is seen later.
            with suppress(FileNotFoundError, DeepfereError):
                try:
                    if (text := file.read_text()).isdigit():
                        on_step(int(text))
                except Stopped as reason:
                    lost.append(reason)
                    # Only a signal reaches whoever waits for Ray.
                    if waiting:
                        os.kill(os.getpid(), signal.SIGUSR2)
                    return

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not lost:
            raise
    finally:
        stop.set()
        thread.join()
        if waiting:
            signal.signal(signal.SIGUSR2, before or signal.SIG_DFL)
        # Of another run's, the file is not ours to remove.
        if not lost:
            with suppress(DeepfereError):
                file.unlink(missing_ok=True)
    if lost:
        raise lost[0]


def _why(error: BaseException) -> str:
    """In one line why training failed: of a worker's error Ray shows a piece, and our own line may not be in it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    return last_line(failures[0] if failures else error)
