"""The one place that starts or joins Ray, and the one way that planned rows are carried out on it."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from deepfere.config import RaySettings
from deepfere.errors import DeepfereError, InputError, system_text
from deepfere.places import Place, UrlPath, place, remove_tree, texts
from deepfere.stopping import current, requested, saving

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    # Ray's C++ side writes to the user's terminal, actors that are told to restart always among it
    # (ray-project/ray#53727). What fails reaches the user as an exception; RAY_BACKEND_LOG_LEVEL=info shows the rest.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
RAY_INFORMATION = re.compile(rb"\[[^]]* I \d+ \d+\] (\([^)]*\) )?\w+\.cc:\d+: ")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def connect(settings: RaySettings) -> None:
    """Join the cluster at ``settings.address`` (or ``RAY_ADDRESS``), else start a local session once.

    Threads of numerical libraries are pinned to one in every worker, so that results do not depend on the
    machine's core count.

    Raises:
        InputError: There is no cluster at the address.
        DeepfereError: A local session does not start.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    environment = {"env_vars": {**dict.fromkeys(THREADS, "1"), **ENVIRONMENT}}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": environment,
        "configure_logging": True,
    }
    with keep_signals(), _without_ray_chatter():
        if address:
            try:
                ray.init(address=address, **options)
            except ConnectionError as error:
                raise InputError(
                    f"no Ray cluster answers ({error})", where=address, remedy="check ray.address, or leave it out"
                ) from error
        else:
            try:
                ray.init(
                    address="local",
                    num_cpus=settings.num_cpus,
                    object_store_memory=settings.object_store_memory_bytes,
                    include_dashboard=False,
                    **options,
                )
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise DeepfereError(f"Ray does not start: {last_line(error)}") from error
    _quiet_ray_data()


@contextmanager
def _without_ray_chatter() -> Iterator[None]:
    """Hold back standard error while Ray starts, and drop the lines in which its C++ side talks about itself.

    Ray says there, before any setting counts, that it has read its log level; Python cannot reach that logger.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held.read().splitlines(keepends=True):
                if not RAY_INFORMATION.match(line):
                    os.write(2, line)


@contextmanager
def keep_signals() -> Iterator[None]:
    """Keep this process's handlers of SIGINT and SIGTERM: Ray puts its own there and leaves them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)


def last_line(error: BaseException) -> str:
    """What an error says in one line: of a traceback (as Ray's errors carry) only its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _quiet_ray_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    for name in ("ray.data", "ray.train", "ray.tune", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def one_thread() -> Iterator[None]:
    """One numerical thread in this process, as in every worker: sums then do not depend on the core count."""
    # Only libraries that are loaded can be limited, and SciPy brings a BLAS of its own.
    import scipy.linalg  # noqa: F401
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def shutdown() -> None:
    """Leave Ray (stops a local session)."""
    import ray

    ray.shutdown()


LINES = 256
"""Records in one object: each is sent with those before it, so a longer one would cost more."""


class Journal:
    """Record of finished units, one line each, beside the store that they fill; every writer has files of its own.

    On a disk a writer appends to its file. An object cannot be appended to: there it is written anew with every
    record, and a new one is begun now and then.

    Args:
        folder: Folder of the journal's files, or its URL.
        fingerprint: Settings token; records with another one do not count.
    """

    def __init__(self, folder: str | Place, fingerprint: str) -> None:
        self.folder, self.fingerprint = place(folder), fingerprint
        self._begin()

    def _begin(self) -> None:
        self._file = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._lines: list[str] = []

    def done(self) -> dict[str, dict[str, Any]]:
        """Finished units by key. A torn last line (a killed writer) is ignored."""
        out: dict[str, dict[str, Any]] = {}
        for text in texts(self.folder, "*.jsonl"):
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if record.get("fingerprint") == self.fingerprint:
                    out[record["unit"]] = record
        return out

    def clear(self) -> None:
        """Forget everything: the store that the records speak of is made anew."""
        if isinstance(self.folder, UrlPath):
            remove_tree(self.folder)
            return
        for path in self.folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)

    def record(self, unit: str, **values: Any) -> None:
        """Add a finished unit; it stays when this returns."""
        line = json.dumps({"unit": unit, "fingerprint": self.fingerprint, **values}) + "\n"
        if isinstance(self._file, UrlPath):
            self._file.write_text("".join([*self._lines, line]))
            self._lines.append(line)
            if len(self._lines) >= LINES:
                self._begin()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())


class RowWorker(ABC):
    """Base of the actors that carry out planned rows: one row in, a small record out.

    Subclasses implement `work`; an exception becomes an ``error`` column, never a lost block.
    """

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's entry: a batch of one row: ``row`` (JSON), and ``stop``, the file that says to begin no more."""
        import torch

        torch.set_num_threads(1)
        out: list[str] = []
        for text, stop in zip(batch["row"], batch["stop"], strict=True):
            row = json.loads(str(text))
            try:
                if requested(str(stop)):
                    out.append(json.dumps({"unit": row["unit"], "error": None, "stopped": True}))
                    continue
                out.append(json.dumps({**self.work(row), "unit": row["unit"], "error": None}))
            except InputError as error:
                parts = {"what": error.what, "where": error.where and str(error.where), "remedy": error.remedy}
                out.append(json.dumps({"unit": row["unit"], "error": str(error), "input": parts}))
            except Exception as error:
                told = str(error) if isinstance(error, DeepfereError) else f"{type(error).__name__}: {error}"
                if isinstance(error, OSError) and error.errno is not None:
                    told = system_text(error)
                out.append(json.dumps({"unit": row["unit"], "error": told}))
        import numpy as np

        return {"record": np.array(out, dtype=object)}

    @abstractmethod
    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """Carry out one row; returns plain values."""


def run_rows(
    rows: Iterable[dict[str, Any]],
    worker: type[RowWorker],
    arguments: tuple[Any, ...],
    *,
    what: str,
    on_done: Callable[[dict[str, Any]], None] | None = None,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    inline_up_to: int = 0,
) -> list[dict[str, Any]]:
    """Carry out rows on Ray Data actors; pixels stay in the actors, rows and records are small.

    Args:
        rows: Plain dicts with a key ``unit``.
        worker: A `RowWorker` class; built once per actor with ``arguments``.
        arguments: Constructor arguments.
        what: Name of the work for messages.
        on_done: Called in the driver with each record as it arrives.
        num_cpus: CPUs per actor.
        num_gpus: GPUs per actor.
        inline_up_to: So few rows are carried out right here: starting actors would cost more.

    Returns:
        The records, in no particular order.

    Raises:
        InputError: Some rows failed, all of them because of the input; the others are done.
        DeepfereError: Some rows failed for another reason.
        Stopped: The run was asked to stop; rows that had been begun are done.
    """
    stop = str(current() or "")
    items = [{"row": json.dumps(row), "stop": stop} for row in rows]
    if not items:
        return []
    records: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def collect(found: Iterable[dict[str, Any]]) -> None:
        for record in found:
            if record.get("stopped"):
                continue
            (failed if record["error"] else records).append(record)
            if on_done:
                on_done(record)

    with saving():
        if len(items) <= inline_up_to:
            here = worker(*arguments)
            collect(json.loads(str(t)) for item in items for t in here({k: [v] for k, v in item.items()})["record"])
        else:
            _on_actors(items, worker, arguments, collect, what, num_cpus, num_gpus)
    if failed:
        first = failed[0]
        if all("input" in record for record in failed):
            told = first["input"]
            raise InputError(
                f"{told['what']} ({what}: {len(failed)} of {len(items)} pieces failed)",
                where=told["where"],
                remedy=told["remedy"],
            )
        raise DeepfereError(
            f"{what}: {len(failed)} of {len(items)} pieces failed; first {first['unit']}: {first['error']}"
        )
    return records


def _on_actors(
    items: list[dict[str, str]],
    worker: type[RowWorker],
    arguments: tuple[Any, ...],
    collect: Callable[[Iterable[dict[str, Any]]], None],
    what: str,
    num_cpus: float,
    num_gpus: float,
) -> None:
    import ray
    from ray.exceptions import RayError

    available = ray.cluster_resources().get("CPU", 1.0)
    size = max(1, min(len(items), int(available / num_cpus)))
    dataset: Any = ray.data.from_items(items, override_num_blocks=min(len(items), 4 * size))
    dataset = dataset.map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
    )
    try:
        collect(_records(dataset))
    except RayError as error:
        raise DeepfereError(f"{what}: {last_line(error)}") from error


def _records(dataset: Any) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        for text in batch["record"]:
            yield json.loads(str(text))
