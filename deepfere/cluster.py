"""The one place that starts or joins Ray; journals of what is done."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deepfere.config import RaySettings
from deepfere.cores import limited
from deepfere.errors import DeepfereError, InputError
from deepfere.places import Place, UrlPath, place, remove_tree, texts

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_COLOR_PREFIX": "0",
    # Ray's C++ side writes to the user's terminal, actors that are told to restart always among it
    # (ray-project/ray#53727). What fails reaches the user as an exception; RAY_BACKEND_LOG_LEVEL=info shows the rest.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # By default the workers of a session give way to every other process of the machine (15).
    "RAY_worker_niceness": "0",
}
RAY_INFORMATION = re.compile(rb"\[[^]]* I \d+ \d+\] (\([^)]*\) )?\w+\.cc:\d+: ")
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20)}
"""What glibc's allocator keeps of what a worker gives back. Tensors of some megabytes come and go with every layer;
asked of the system each time, their pages took a fifth of a window's time."""
ANSWER_S = 10.0
"""So long may the address of a cluster take to answer."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


_own_session = False
"""Whether this process's Ray is a session that `connect` has started."""


def _address(settings: RaySettings) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def alone_on_machine(settings: RaySettings) -> bool:
    """Whether a run joins no cluster: it has a Ray session of its own, or none, and this machine's cores."""
    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized() and not _own_session
    return not joined and not _address(settings)


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
    global _own_session
    import ray

    if ray.is_initialized():
        return
    address = _address(settings)
    environment = {"env_vars": {**dict.fromkeys(THREADS, "1"), **MEMORY, **ENVIRONMENT}}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": environment,
        "configure_logging": True,
    }
    with keep_signals(), _no_sigterm_of_rays(), _without_ray_chatter():
        if address:
            _check_address(address)
            try:
                ray.init(address=address, **options)
            except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
                # Another version of Ray or Python, or a token that is missing, is told by one of the latter.
                raise InputError(
                    f"no Ray cluster answers ({' '.join(str(error).split())})",
                    where=address,
                    remedy="check ray.address, or leave it out",
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
            except Exception as error:  # a machine that is too busy is told by a bare one
                raise DeepfereError(f"Ray does not start: {last_line(error)}") from error
            _own_session = True
    quiet_ray_data()


def _check_address(address: str) -> None:
    """Ask the address for an answer before Ray does, which takes a quarter of an hour to give up.

    Raises:
        InputError: It is none, or nobody listens there.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isdigit()):
        raise InputError(
            "is no address of a cluster", where=address, remedy="give ray.address=HOST:PORT, or leave it out"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers ({error})",
            where=address,
            remedy="check ray.address or RAY_ADDRESS, or leave it out",
        ) from error


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


@contextmanager
def _no_sigterm_of_rays() -> Iterator[None]:
    """While Ray starts, SIGTERM goes on to be ours: Ray's own handler would end the process without a word."""
    from ray._private import utils

    kept = getattr(utils, "set_sigterm_handler", None)
    if kept is None:
        yield
        return
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = kept


def last_line(error: BaseException) -> str:
    """What an error says in one line: of a traceback (as Ray's errors carry) our own error, else only its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("deepfere.errors.")]
    if ours:
        return ours[-1].partition(": ")[2]
    return lines[-1] if lines else type(error).__name__


def quiet_ray_data() -> None:
    """Have Ray Data of this process keep the order of rows, and say nothing."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    for name in ("ray.data", "ray.train", "ray.tune", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


def cluster_gpus() -> float:
    """How many GPUs the cluster has that is connected to."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


@contextmanager
def one_thread(settings: RaySettings) -> Iterator[None]:
    """One numerical thread for all that is computed, as in every worker: sums then do not depend on the core count.

    What is computed side by side (`deepfere.cores`) may use the cores that Ray may, on a cluster one.
    """
    # Only libraries that are loaded can be limited, and SciPy brings a BLAS of its own.
    import scipy.linalg  # noqa: F401
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), limited(settings.num_cpus if alone_on_machine(settings) else 1):
            yield
    finally:
        torch.set_num_threads(before)


def shutdown() -> None:
    """Leave Ray (stops a local session)."""
    global _own_session
    import ray

    ray.shutdown()
    _own_session = False


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
        """Finished units by key, with what was recorded of each. A torn last line (a killed writer) is ignored."""
        out: dict[str, dict[str, Any]] = {}
        for record in records_in(self.folder):
            if record.get("fingerprint") == self.fingerprint:
                out.update(record["units"])
        return out

    def clear(self) -> None:
        """Forget everything: the store that the records speak of is made anew."""
        if isinstance(self.folder, UrlPath):
            remove_tree(self.folder)
            return
        for path in self.folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)

    def drop(self, units: Collection[str]) -> None:
        """Forget some units, while nobody works on the others: what was made for them is gone, or of no use.

        What stays is recorded again before the files go that hold all: whatever ends this loses no other unit.
        """
        if not units:
            return
        files: list[Place] = list(self.folder.glob("*.jsonl"))
        self._begin()
        self.record({unit: record for unit, record in self.done().items() if unit not in units})
        self._begin()
        for file in files:
            file.unlink(missing_ok=True)

    def record(self, units: Mapping[str, Mapping[str, Any]]) -> None:
        """Add finished units, each with plain values to keep; they stay when this returns: all of them, or none."""
        line = json.dumps({"fingerprint": self.fingerprint, "units": units}, separators=(",", ":")) + "\n"
        if isinstance(self._file, UrlPath):
            self._file.write_text("".join([*self._lines, line]))
            self._lines.append(line)
            if len(self._lines) >= LINES:
                self._begin()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab+") as handle:
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                # What was cut off when a disk was full is not to take the next line with it.
                if handle.read() != b"\n":
                    line = "\n" + line
            handle.write(line.encode())
            handle.flush()
            os.fsync(handle.fileno())


def records_in(folder: Place) -> Iterator[dict[str, Any]]:
    """The records of a journal's files: of any fingerprint, each with its ``units``."""
    for text in texts(folder, "*.jsonl"):
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record.get("units"), dict):
                yield record
