"""A real Slurm on one machine: munge, controller and node daemon in folders of the test's own, on free ports."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
PATHS = "/usr/sbin:/usr/local/sbin"
CONFIG = """
ClusterName=deepfere
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=60
SlurmctldPort={ctld}
SlurmdPort={d}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd
SlurmctldTimeout=600
SlurmdTimeout=600
MessageTimeout=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there is no Slurm here; empty where there is."""
    path = f"{os.environ['PATH']}:{PATHS}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "its daemons are started as root"


class SlurmCluster:
    """One node with two CPUs.

    Attributes:
        environment: What its programs need to find it.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dfs"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{PATHS}",
        }

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        munge = self.folder / "munge"
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (munge / "key").write_bytes(os.urandom(256))
        (munge / "key").chmod(0o400)
        host = socket.gethostname().split(".")[0]
        ctld, d = _free_ports(2)
        (self.folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=self.folder, ctld=ctld, d=d))
        (self.folder / "cgroup.conf").touch()
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run("munged", "--foreground", "--force", *(f"--{key}={munge / name}" for key, name in places.items()))
        self._wait("munge", f"--socket={munge / 'socket'}", "--no-input")
        self._run("slurmctld", "-D")
        self._run("slurmd", "-D", "-N", host)
        self._wait("srun", "--immediate=5", "true")

    def _run(self, *words: str) -> None:
        with (self.folder / "log" / f"{words[0]}.out").open("wb") as out:
            process = subprocess.Popen(
                words, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._processes.append(process)

    def _wait(self, *words: str) -> None:
        """Until a command succeeds."""
        end = time.monotonic() + 120
        while subprocess.run(words, env=self.environment, capture_output=True).returncode:
            logs = "\n".join(path.read_text()[-2000:] for path in (self.folder / "log").iterdir())
            assert time.monotonic() < end and all(p.poll() is None for p in self._processes), logs
            time.sleep(0.3)

    def run(self, *words: str) -> str:
        """Output of one of its programs."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True).stdout

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
