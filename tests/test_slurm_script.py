"""The logic of the Slurm script, with stand-ins for Slurm and Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deepfere.config import load_config
from tests.test_docs import check_command

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
SBATCH = CLUSTER / "slurm" / "reconstruct.sbatch"
STUB = """#!/usr/bin/env bash
log() {{ (IFS=$'\\x1f'; printf '%s\\n' "$*" >>"$STUB_LOG"); }}
log {name} "$@"
{body}
"""
BODIES = {
    # Options first, then a command: the command runs here.
    "srun": 'while [[ $1 == --* ]]; do shift; done\n[[ $1 == rm ]] || exec "$@"',
    "scontrol": 'printf "%s\\n" $STUB_HOSTS',
    "getent": "echo '127.0.1.1 STREAM node1'; exit 2",
    "hostname": 'echo "fe80::1 10.1.2.3 10.9.9.9"',
    # Stands for the wait until all nodes are there: here, until all Rays are.
    "python": 'until (($(grep -c ^ray-up "$STUB_LOG") >= ($3 > 1 ? 2 : 1))); do sleep 0.02; done\n'
    'exit "${STUB_PYTHON:-0}"',
    "ray": "trap 'log ray-ended; exit 143' TERM\n"
    'log ray-up "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" "${RAY_ADDRESS-unset}"\nwhile :; do sleep 0.05; done',
    "deepfere": "trap 'sleep 0.3; log unwound; exit 1' TERM\n"
    'log env-deepfere "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" "${RAY_ADDRESS-unset}" "$OMP_NUM_THREADS"\n'
    'if [[ -n ${STUB_SLEEP-} ]]; then for _ in $(seq 200); do sleep 0.05; done; fi\nexit "${STUB_CODE:-0}"',
}


@dataclass
class Slurm:
    """A folder that stands for a Slurm job."""

    folder: Path

    def start(self, *arguments: str, hosts: str = "node1 node2 node3", **more: str) -> subprocess.Popen[str]:
        programs = self.folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, body in BODIES.items():
            (programs / name).write_text(STUB.format(name=name, body=body))
            (programs / name).chmod(0o755)
        variables = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "STUB_LOG": str(self.folder / "log"),
            "STUB_HOSTS": hosts,
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_CPUS_ON_NODE": "32",
            "SLURM_GPUS_ON_NODE": "2",
            "RAY_ADDRESS": "10.0.0.1:6379",
            **more,
        }
        return subprocess.Popen(
            ["bash", str(SBATCH), *arguments],
            cwd=self.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def log(self) -> list[list[str]]:
        path = self.folder / "log"
        return [line.split("\x1f") for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self, name: str) -> list[list[str]]:
        return [line[1:] for line in self.log() if line[0] == name]

    def run(self, *arguments: str, **more: Any) -> int:
        process = self.start(*arguments, **more)
        try:
            self.output, _ = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def directives() -> dict[str, str]:
    text = SBATCH.read_text()
    head = text[: text.index("\nset ")]
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.MULTILINE)
    assert len(found) == text.count("#SBATCH")  # Slurm reads none after the first command
    return dict(found)


def test_slurm_options():
    found = directives()
    assert found["ntasks-per-node"] == "1" and "exclusive" in found
    # "B:": to the script alone, which passes it on to deepfere and not to Ray.
    assert re.fullmatch(r"B:TERM@\d+", found["signal"])
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_runs_the_study_and_returns_its_exit_code(slurm, code):
    arguments = ["my study.yaml", "/shared/my work", "train.workers=4", "ingest.mz=[734.57, 760.59]"]
    assert slurm.run(*arguments, STUB_CODE=str(code)) == code, slurm.output
    (given,) = slurm.calls("deepfere")
    assert given == ["reconstruct", arguments[0], "-o", *arguments[1:]]
    check_command(given)
    load_config(None, given[4:])
    first, others, *cleaning = slurm.calls("srun")
    assert {"--nodes=1", "--ntasks=1", "--nodelist=node1", "--head", "--num-cpus=15", "--block"} <= set(first)
    assert {"--port=24567", "--node-ip-address=10.1.2.3", "--temp-dir=/tmp/ray-1234567"} <= set(first)
    assert {"--nodes=2", "--ntasks=2", "--exclude=node1", "--address=10.1.2.3:24567", "--num-cpus=16"} <= set(others)
    for call in (first, others):
        assert {"--ntasks-per-node=1", "--cpus-per-task=16", "--num-gpus=2", "ray", "start"} <= set(call)
    assert [call[2] for call in slurm.calls("python")] == ["1", "3"]  # nodes that are waited for
    assert len(slurm.calls("ray-ended")) == 2
    assert [call[-4:] for call in cleaning] == ([] if code else [["rm", "-rf", "--", "/tmp/ray-1234567"]])


def test_slurm_gives_all_the_same_token_and_the_program_one_thread(slurm):
    assert slurm.run("study.yaml", "work") == 0, slurm.output
    (mode, token, address, threads), *more = slurm.calls("env-deepfere")
    assert not more
    assert (mode, address, threads) == ("token", "10.1.2.3:24567", "1")
    assert len(token) == 64
    # A cluster that the environment names is not joined.
    assert slurm.calls("ray-up") == [["token", token, "unset"]] * 2
    assert token not in slurm.output


def test_slurm_keeps_a_token_and_an_address_that_are_given(slurm):
    assert slurm.run("study.yaml", "work", RAY_AUTH_TOKEN="secret", DEEPFERE_HEAD_IP="192.168.7.7") == 0
    assert {call[1] for call in slurm.calls("ray-up")} == {"secret"}
    assert slurm.calls("env-deepfere")[0][2] == "192.168.7.7:24567"


def test_slurm_on_one_node(slurm):
    assert slurm.run("study.yaml", "work", hosts="node1", SLURM_CPUS_PER_TASK="1") == 0, slurm.output
    assert [call[call.index("ray")] for call in slurm.calls("srun")[:-1]] == ["ray"]
    assert "--num-cpus=1" in slurm.calls("srun")[0]


def test_slurm_lets_deepfere_put_its_work_in_order_before_ray_ends(slurm):
    process = slurm.start("study.yaml", "work", STUB_SLEEP="1")
    end = time.monotonic() + 20
    while not slurm.calls("env-deepfere") and time.monotonic() < end:
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1, output
    names = [line[0] for line in slurm.log()]
    assert names.index("unwound") < names.index("ray-ended")
    assert names.count("ray-ended") == 2


def test_slurm_does_not_start_the_study_where_ray_does_not_come_up(slurm):
    assert slurm.run("study.yaml", "work", STUB_PYTHON="1") == 1
    assert "Ray does not come up" in slurm.output
    assert not slurm.calls("deepfere")
    assert len(slurm.calls("ray-ended")) == len(slurm.calls("ray"))


@pytest.mark.parametrize("arguments", [(), ("study.yaml",)])
def test_slurm_says_how_it_is_used(slurm, arguments):
    assert slurm.run(*arguments) == 2
    assert slurm.output.startswith("usage: sbatch")
    assert not slurm.log()


def test_a_folder_with_a_percent_sign(tmp_path):
    """Slurm reads %j and its like in the name of the log; the folder is told to it as it is."""
    from deepfere.submit import slurm
    from deepfere.submit.submission import Submission

    out = tmp_path / "100%j"
    submission = Submission("fuse", ("a.imzML",), load_config(None, []), "a.imzML", str(out), "job", {})
    script = slurm.Slurm().script(submission, "job")
    *_, log = re.findall(r"^#SBATCH '?--output=([^'\n]*)", script, re.MULTILINE)  # Slurm takes the last
    assert log == f"{tmp_path}/100%%j.jobs/job-%j.out"
    *_, folder = re.findall(r"^#SBATCH '?--chdir=([^'\n]*)", script, re.MULTILINE)
    assert folder == f"{out}.jobs"
