"""Several hosts on one machine: network namespaces with addresses of their own, each running its Ray node."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

NETWORK = "10.231.77"
OUTSIDE = f"{NETWORK}.254"
"""Where the hosts reach this machine itself."""
PORT = 6399
REST_S = 25.0
"""When a host has joined, Ray Train reckons with it 20 s later at the latest."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (the command ip)"
    made = subprocess.run(["ip", "netns", "add", "deepfere-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "deepfere-probe"], capture_output=True)
    return f"network namespaces are not allowed here ({made.stderr.strip()})" if made.returncode else ""


class Hosts:
    """A head without CPUs and some workers with one CPU each, joined by a bridge.

    Args:
        workers: How many workers.
        hidden: Folders that the workers see as empty: their machines share no file system with the head's.
    """

    def __init__(self, workers: int, hidden: Sequence[Path] = ()) -> None:
        self.hidden, self._joined_s = hidden, time.monotonic()
        self.names = [f"deepfere{n}" for n in range(workers + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="dfh"))  # Ray's sockets need a short path
        self.address = f"{NETWORK}.1:{PORT}"
        # One token rule for every node and client; proxies do not know these addresses.
        self.environment = {k: v for k, v in os.environ.items() if k.lower() not in PROXIES}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_ADDRESS": self.address}

    def __enter__(self) -> Hosts:
        self._remove()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def join(self, environment: dict[str, str] | None = None) -> None:
        """Start the Ray node of every host.

        Args:
            environment: Variables that its processes get.
        """
        self.environment |= environment or {}
        for n in range(len(self.names)):
            self.start(n)

    def _build(self) -> None:
        _ip("link", "add", "deepfere-br", "type", "bridge")
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", "deepfere-br")
        _ip("link", "set", "deepfere-br", "up")
        for n, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("link", "add", f"dfv{n}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"dfv{n}", "master", "deepfere-br", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{NETWORK}.{n + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def __exit__(self, *_: object) -> None:
        self._remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, n: int) -> None:
        """Start the Ray node of a host."""
        role = (
            ["--head", "--port", str(PORT), "--num-cpus", "0", "--include-dashboard", "false"]
            if n == 0
            else ["--address", self.address, "--num-cpus", "1"]
        )
        place = ["--node-ip-address", f"{NETWORK}.{n + 1}", "--temp-dir", str(self.folder / str(n))]
        memory = ["--object-store-memory", str(100 * 2**20)]
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        command = ["ray", "start", *role, *place, *memory]
        if n and self.hidden:
            # The command's own mounts (`ip netns exec` gives it some), which what it starts inherits.
            hide = "".join(f"mount -t tmpfs none {shlex.quote(str(folder))} && " for folder in self.hidden)
            command = ["sh", "-c", f"{hide}{shlex.join(command)}"]
        done = self.run(n, command, environment)
        assert done.returncode == 0, done.stdout + done.stderr
        self._joined_s = time.monotonic()

    def rest(self) -> None:
        """Wait until Ray Train reckons with every host; before that it begins a group with those that it knows."""
        time.sleep(max(0.0, self._joined_s + REST_S - time.monotonic()))

    def run(self, n: int, command: list[str], environment: dict[str, str] | None = None):
        """Run a command on a host to its end."""
        return subprocess.run(
            self._on(n, command), env=environment or self.environment, capture_output=True, text=True, timeout=400
        )

    def begin(self, n: int, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        with log.open("wb") as out:
            return subprocess.Popen(self._on(n, command), env=self.environment, stdout=out, stderr=out)

    def holds(self, n: int, title: str) -> bool:
        """Whether a process with this in its title runs on a host."""
        lines = [Path(f"/proc/{p}/cmdline") for p in _pids(self.names[n])]
        return any(title.encode() in line.read_bytes() for line in lines if line.exists())

    def kill(self, n: int) -> None:
        """End everything on a host at once."""
        for process in _pids(self.names[n]):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        while _pids(self.names[n]):
            time.sleep(0.05)

    def cut(self, n: int) -> None:
        """Take a host off the network; its processes go on, and hear nothing any more."""
        _ip("link", "set", f"dfv{n}", "down")

    def rejoin(self, n: int) -> None:
        """Put a host that was cut off back, as after a reboot: what ran there is gone, and its Ray node starts anew."""
        self.kill(n)
        _ip("link", "set", f"dfv{n}", "up")
        self.start(n)

    def _on(self, n: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[n], *command]

    def _remove(self) -> None:
        for n, name in enumerate(self.names):
            if name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split():
                self.kill(n)
                _ip("netns", "del", name)
            # The pair of interfaces outlives its namespace for as long as any process holds that.
            subprocess.run(["ip", "link", "del", f"dfv{n}"], capture_output=True)
        subprocess.run(["ip", "link", "del", "deepfere-br"], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _pids(name: str) -> list[int]:
    return [
        int(p) for p in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    ]
