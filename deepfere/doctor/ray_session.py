"""Whether Ray starts here, or which nodes of a cluster answer, and with what."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepfere
from deepfere.doctor.check import Check

GIB = 1 << 30
RAY_TIMEOUT_S = 120.0
RAY_STOP_S = 20.0
CONNECT_TIMEOUT_S = 5.0

_STORES = {"memory": "memory", "object_store_memory": "object store"}
# Run in a process of its own, so that a Ray that hangs or crashes takes nothing along. The answer is the
# last line that begins with the mark: Ray prints what it likes.
_MARK = "deepfere-doctor "
_RAY_SCRIPT = """
import json, sys
from deepfere.cluster import connect, shutdown
from deepfere.config import RaySettings
connect(RaySettings(address=sys.argv[1] or None, num_cpus=None if sys.argv[1] else 1))
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote(num_cpus=0)
def look():
    import platform
    try:
        import deepfere
        return [platform.python_version(), deepfere.__version__]
    except Exception as error:
        return [platform.python_version(), "no deepfere: " + str(error)]

nodes = [n for n in ray.nodes() if n["Alive"]]
asked = [look.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote() for n in nodes]
out = {"ray": ray.__version__, "resources": ray.cluster_resources(), "nodes": [n["NodeManagerAddress"] for n in nodes]}
out["answers"] = ray.get(asked, timeout=float(sys.argv[2]))
shutdown()
print(sys.argv[3] + json.dumps(out), flush=True)
"""


def try_ray(address: str | None, timeout_s: float = RAY_TIMEOUT_S) -> Check:
    """Start a local session and run a task, or join a cluster and ask every node what it has.

    Args:
        address: Of the cluster; None takes ``RAY_ADDRESS``, else a local session of one core.
        timeout_s: After this the attempt is ended, with everything that it started.
    """
    address = address or os.environ.get("RAY_ADDRESS") or ""
    where = f"cluster at {address}" if address else "a local session"
    unheard = _unheard(address)
    if unheard:
        return Check("ray", "fail", unheard, "check the address, and start the cluster")
    root = str(Path(deepfere.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    remedy = "check the address, and that its Ray has this version" if address else "stop other sessions (`ray stop`)"
    code, text, errors = _run_bounded(
        [sys.executable, "-c", _RAY_SCRIPT, address, str(timeout_s), _MARK], environment, timeout_s
    )
    answer = next((line for line in reversed(text.splitlines()) if line.startswith(_MARK)), None)
    if answer is None:
        if code is None:
            return Check("ray", "fail", f"{where} did not come up within {timeout_s:g} s", remedy)
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit code {code}")
        return Check("ray", "fail", f"{where} did not come up: {last.strip()[:300]}", remedy)
    return _judge_ray(json.loads(answer.removeprefix(_MARK)), where, address, deepfere.__version__)


def _unheard(address: str) -> str:
    """Why nothing answers at HOST:PORT or ray://HOST:PORT; Ray itself keeps trying for minutes."""
    match = re.fullmatch(r"(?:ray://)?([^/\s]+):(\d+)", address)
    if match is None:
        return ""
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        return f"nothing answers at {address} ({error})"
    return ""


def _judge_ray(found: dict[str, Any], where: str, address: str, version: str) -> Check:
    if not address:
        return Check("ray", "ok", f"ray {found['ray']}, a local session started and ran a task")
    resources = found["resources"]
    parts = [f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name in resources]
    parts += [f"{resources[k] / GIB:.1f} GiB {text}" for k, text in _STORES.items() if k in resources]
    count = len(found["nodes"])
    text = f"ray {found['ray']}, {where}: {count} node{'' if count == 1 else 's'}, {', '.join(parts)}"
    ours = [platform.python_version(), version]
    odd = [
        f"{node} has Python {python}, deepfere {theirs}"
        for node, (python, theirs) in zip(found["nodes"], found["answers"], strict=True)
        if [python, theirs] != ours
    ]
    if odd:
        return Check(
            "ray", "fail", f"{text}; {'; '.join(odd[:4])}", f"install Python {ours[0]}, deepfere {ours[1]} there"
        )
    return Check("ray", "ok", text)


def _run_bounded(command: list[str], environment: dict[str, str], timeout_s: float) -> tuple[int | None, str, str]:
    """Exit code (None if it ran out of time), output and errors of a process that is ended with its children."""
    import psutil

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        # Files, not pipes: Ray's daemons inherit them, and a pipe would stay open as long as these live.
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, stdin=subprocess.DEVNULL)
        code: int | None = None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            children = []
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()  # Ray stops its daemons on this; what is left is ended below
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(RAY_STOP_S)
            for left in (*children, process):
                with contextlib.suppress(psutil.Error, OSError):
                    left.kill()
            process.wait()
        texts = []
        for handle in (out, errors):
            handle.seek(0)
            texts.append(handle.read())
    return code, texts[0], texts[1]
