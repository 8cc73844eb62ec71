"""Checks of one machine: versions, codecs, GPU, memory, storage and the tracking store."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from deepfere.cores import usable_cores
from deepfere.doctor.check import Check, error_line
from deepfere.errors import DeepfereError

PYTHON = (3, 11)
# The project's own requirements, here because an unpacked source tree has no metadata to read them from.
MINIMUMS = {
    "click": "8.1",
    "contourpy": "1.3",
    "dask": "2025.1",
    "fsspec": "2024.6",
    "imagecodecs": "2025.3",
    "jinja2": "3.1",
    "matplotlib": "3.9",
    "mlflow": "3.13",
    "numcodecs": "0.16",
    "numpy": "2.0",
    "openslide-bin": "4.0.1",
    "openslide-python": "1.4",
    "pandas": "2.2",
    "pillow": "11",
    "psutil": "6",
    "pyarrow": "17",
    "pydantic": "2.10",
    "pyimzml": "1.5.5",
    "pyyaml": "6",
    "ray": "2.60",
    "rich": "13",
    "safetensors": "0.5",
    "scipy": "1.13",
    "threadpoolctl": "3.5",
    "tifffile": "2025.5",
    "torch": "2.9",
    "zarr": "3.1.6",
    "zarrs": "0.2.3",
}
OPENSLIDE = "4.0.1"  # the first without CVE-2026-54604 (uninitialised pixels)
GIB = 1 << 30
LEAST_MEMORY_GIB, GOOD_MEMORY_GIB = 1.0, 4.0
LEAST_DISK_GIB, GOOD_DISK_GIB = 1.0, 10.0
GOOD_WRITE_MB_PER_S = 50.0
WRITTEN_BYTES = 32 << 20


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version before any suffix: "2.9.0+cu128" -> (2, 9, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _older(version: str, least: str) -> bool:
    have, want = _release(version), _release(least)
    return have + (0,) * (len(want) - len(have)) < want


def python() -> Check:
    """The interpreter."""
    text = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if sys.version_info[:2] < PYTHON:
        return Check("python", "fail", text, f"use Python {'.'.join(map(str, PYTHON))} or newer")
    return Check("python", "ok", text)


def packages(minimums: dict[str, str] | None = None) -> Check:
    """Every requirement, at least as new as needed."""
    bad, named = [], []
    for name, least in (MINIMUMS if minimums is None else minimums).items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            bad.append(f"{name} is missing (needs {least})")
            continue
        if _older(version, least):
            bad.append(f"{name} is {version} (needs {least})")
        elif name in ("numpy", "ray", "torch", "zarr", "mlflow"):
            named.append(f"{name} {version}")
    if bad:
        return Check("packages", "fail", "; ".join(bad), "pip install --upgrade deepfere, or these packages")
    return Check("packages", "ok", "all new enough: " + ", ".join(named))


def openslide() -> Check:
    """The library behind OpenSlide."""
    import openslide

    version = openslide.__library_version__
    if _older(version, OPENSLIDE):
        return Check("openslide", "fail", f"library {version}", f"pip install 'openslide-bin>={OPENSLIDE}'")
    return Check("openslide", "ok", f"library {version}")


def codecs() -> Check:
    """Encode and decode a smooth picture with every codec that slides and stores use."""
    import imagecodecs
    import numpy as np

    y, x = np.mgrid[:64, :48]
    picture = np.stack([2 * y, 3 * x, y + x], axis=-1).astype(np.uint8)
    # Largest error in grey levels: JPEG is not exact, the others must be.
    allowed = {"jpeg": 12, "jpeg2k": 0, "lzw": 0, "zlib": 0, "zstd": 0}
    bad = []
    for name, limit in allowed.items():
        try:
            encode, decode = (getattr(imagecodecs, f"{name}_{way}") for way in ("encode", "decode"))
            packed = encode(picture, level=95) if name == "jpeg" else encode(picture)
            back = decode(packed)
            if isinstance(back, bytes | bytearray):
                back = np.frombuffer(back, np.uint8)
            error = np.abs(np.asarray(back, np.int64).reshape(picture.shape) - picture).max()
            if error > limit:
                bad.append(f"{name} is off by {error}")
        except Exception as error:
            bad.append(f"{name} ({error_line(error)})")
    if bad:
        return Check("codecs", "fail", "; ".join(bad), "pip install --force-reinstall imagecodecs")
    return Check("codecs", "ok", f"{', '.join(allowed)} decode")


def zarr() -> Check:
    """Write sharded, zstd-compressed data, read it back, exactly."""
    import numpy as np

    from deepfere.store import create_array, open_group

    values = np.random.default_rng(0).normal(size=(3, 100, 70)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="deepfere-doctor-") as folder:
        array = create_array(
            open_group(folder, "w"), "values", values.shape, "float32", (3, 32, 32), (3, 64, 64), fill_value=np.nan
        )
        array[:] = values
        back: Any = open_group(folder, "r")["values"]
        same = np.array_equal(np.asarray(back[:]), values)
    if not same:
        return Check(
            "zarr", "fail", "a sharded array came back changed", "pip install --force-reinstall zarr numcodecs"
        )
    return Check("zarr", "ok", "a sharded zstd array came back as written")


def torch() -> Check:
    """PyTorch, and whether it sees a GPU and computes on it."""
    import torch

    driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    if not torch.cuda.is_available():
        if driver:
            build = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
            text = f"torch {torch.__version__} ({build}) does not see this machine's NVIDIA GPU"
            return Check("torch", "warn", text, "install a torch build that fits the GPU's driver")
        return Check("torch", "ok", f"torch {torch.__version__}, no GPU: training and reconstruction use the CPU")
    ones = torch.ones((64, 64), device="cuda")
    if float((ones @ ones).sum()) != 64.0**3:
        return Check("torch", "fail", "a product on the GPU is wrong", "check the GPU and its driver")
    names = []
    for k in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(k)
        names.append(f"{device.name} ({device.total_memory / GIB:.0f} GiB)")
    return Check("torch", "ok", f"torch {torch.__version__}, CUDA {torch.version.cuda}: {', '.join(names)}")


def cpu() -> Check:
    """Cores that may be used, the container's quota counted."""
    count = usable_cores()
    text = f"{count} usable"
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        share = int(quota[0]) / int(quota[1])
        if share < count:
            text, count = f"{text}, {share:g} of them by the container's quota", max(1, int(share))
    if count < 2:
        return Check("cpu", "warn", text, "give it two cores or more: reading and computing overlap")
    return Check("cpu", "ok", text)


def memory() -> Check:
    """Free memory, the container's limit counted."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / GIB, memory.available / GIB
    text = f"{free:.1f} of {total:.1f} GiB free"
    limit = _cgroup("memory.max")
    if limit.isdigit() and int(limit) < memory.total:
        used = _cgroup("memory.current")
        free = min(free, (int(limit) - int(used or 0)) / GIB)
        text = f"{free:.1f} GiB free within the container's limit of {int(limit) / GIB:.1f} GiB"
    return _graded("memory", free, (LEAST_MEMORY_GIB, GOOD_MEMORY_GIB), text, "close other programs or use more memory")


def _cgroup(name: str) -> str:
    """A limit of this container, cgroup version 2; empty where there is none."""
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def _graded(name: str, value: float, bounds: tuple[float, float], text: str, remedy: str) -> Check:
    if value >= bounds[1]:
        return Check(name, "ok", text)
    return Check(name, "warn" if value >= bounds[0] else "fail", text, remedy)


def disk(name: str, folder: Path) -> Check:
    """Free space in a folder, and whether it can be written."""
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.1f} GiB free at {folder}"
    remedy = "choose another folder (TMPDIR)" if name.endswith("temporary") else "work in another folder"
    if not os.access(folder, os.W_OK):
        needed = name.endswith("temporary")
        return Check(name, "fail" if needed else "warn", f"{folder} cannot be written", remedy)
    return _graded(name, free, (LEAST_DISK_GIB, GOOD_DISK_GIB), text, f"free some space, or {remedy}")


def write_speed() -> Check:
    """How fast temporary files are written to disk, roughly."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(prefix="deepfere-doctor-") as handle:
        started = time.perf_counter()
        for _ in range(WRITTEN_BYTES // len(block)):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
        speed = WRITTEN_BYTES / (time.perf_counter() - started) / 1e6
    text = f"about {speed:,.0f} MB/s to {tempfile.gettempdir()}"
    return _graded("write speed", speed, (0.0, GOOD_WRITE_MB_PER_S), text, "set TMPDIR to a faster disk")


def shared_memory() -> Check:
    """Room for Ray's objects."""
    from deepfere.config import RaySettings

    needed = RaySettings().object_store_memory_bytes
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", "ok", "no /dev/shm here: Ray keeps its objects in temporary files")
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**20:,.0f} MiB free in {folder}, {needed / 2**20:,.0f} wanted for Ray's objects"
    if free < needed:
        return Check("shared memory", "warn", text, "start the container with a larger --shm-size")
    return Check("shared memory", "ok", text)


def mlflow(uri: str | None) -> Check:
    """Whether the tracking store answers; nothing is created in it."""
    from deepfere.training.mlflow_store import OFF, connect, redact, resolve_uri, sqlite_path

    remedy = "correct MLFLOW_TRACKING_URI or tracking.uri; tracking.uri=none goes without"
    try:
        resolved = resolve_uri(uri)
        if resolved == OFF:
            return Check("mlflow", "ok", "tracking is off")
        path = sqlite_path(resolved)
        if path is not None and not path.exists():
            parent = next(p for p in path.parents if p.exists())
            if parent.is_dir() and os.access(parent, os.W_OK):
                return Check("mlflow", "ok", f"{path} will be made by the first run")
            return Check("mlflow", "fail", f"{path} cannot be made: {parent} cannot be written", remedy)
        connect(resolved, create=False)
    except DeepfereError as error:
        return Check("mlflow", "fail", error_line(error), remedy)
    if path is not None and not os.access(path, os.W_OK):
        return Check("mlflow", "fail", f"{path} cannot be written", remedy)
    return Check("mlflow", "ok", f"{redact(resolved)} answers")
