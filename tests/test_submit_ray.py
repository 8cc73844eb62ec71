"""Jobs of a real Ray cluster with its dashboard: ids, exit codes, logs, stopping."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from .conftest import FACTOR, SETTINGS, contents

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
PROGRAM = [sys.executable, "-m", "deepfere"]
ROOT = Path(__file__).parents[1]


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses, outside those that Ray gives to its workers."""
    found: list[int] = []
    port = 21000 + os.getpid() % 8000
    while len(found) < count:
        port += 1
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    more = {"XDG_DATA_HOME": str(home), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    more["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | more | {"PATH": path}


@pytest.fixture(scope="module")
def dashboard(environment):
    """The address of a head's dashboard."""
    folder = Path(tempfile.mkdtemp(prefix="dfr"))  # Ray's sockets need a short path
    gcs, http, agent, client = free_ports(4)
    options = {
        "--node-ip-address": "127.0.0.1",
        "--port": gcs,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": http,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--num-cpus": 2,
        "--object-store-memory": 100 * 2**20,
        "--temp-dir": folder / "ray",
    }
    words = ["ray", "start", "--head", "--block", *(f"{key}={value}" for key, value in options.items())]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        from ray.job_submission import JobSubmissionClient

        end = time.monotonic() + 90
        while True:
            try:
                JobSubmissionClient(f"http://127.0.0.1:{http}").list_jobs()
                break
            except (OSError, RuntimeError):
                assert time.monotonic() < end and head.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{http}"
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(environment, dashboard):
    def start(*words: object) -> subprocess.Popen[str]:
        command = [*PROGRAM, "submit", *map(str, words), "--to", "ray", "--address", dashboard]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def info(dashboard: str, name: str):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(dashboard).get_job_info(name)


def finished(process: subprocess.Popen[str], most_s: float = 200) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=most_s)
    return process.returncode, out, err


def test_one_job_is_followed_attached_to_and_begun_again(phantom, submit, dashboard, tmp_path):
    os.mkfifo(tmp_path / "slow.imzML")
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"sections": [{"name": "one", "msi": "slow.imzML"}]}))
    words = ["ingest", study, "-o", tmp_path / "work", "--no-guide", "ingest.band_rows=7"]
    code, out, err = finished(submit(*words, "--no-wait"))
    assert code == 0 and re.fullmatch(r"deepfere-ingest-[0-9a-f]{12}: submitted\n", err), err
    name = err.split(":")[0]
    told = info(dashboard, name)
    assert told.metadata["deepfere.study"] == str(study)
    assert re.fullmatch(r"[0-9a-f]{64}", told.metadata["deepfere.config"])
    second = submit(*words)
    assert second.stderr is not None and second.stderr.readline() == f"{name}: runs already\n"
    # The measurement comes at last, and it is none: the job's own exit code is 2.
    with (tmp_path / "slow.imzML").open("w") as pipe:
        pipe.write("no xml")
    code, out, err = finished(second)
    assert code == 2 and "slow.imzML" in out, (out, err)
    assert info(dashboard, name).driver_exit_code == 2
    (tmp_path / "slow.imzML").unlink()
    for suffix in (".imzML", ".ibd"):
        (tmp_path / f"slow{suffix}").symlink_to(phantom.imzml.with_suffix(suffix))
    code, out, err = finished(submit(*words))
    assert code == 0 and err == f"{name}-2: submitted\n", (out, err)
    # All that it printed, once.
    assert out.count("one: 24 ions, 24 x 21 pixels") == 1 and out.count("Running entrypoint") == 1


@pytest.mark.timeout(1200)
def test_a_study_goes_through_in_jobs_of_either_kind(phantom, submit, dashboard, environment, tmp_path):
    from mlflow import MlflowClient
    from ray.job_submission import JobStatus, JobSubmissionClient

    section = {"msi": str(phantom.imzml), "slide": str(phantom.slide)}
    section |= {"name": "one", "alignment": str(phantom.truth / "alignment.json")}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": [section]}))
    tracking, client = f"sqlite:///{tmp_path}/mlflow.db", JobSubmissionClient(dashboard)
    settings = ["--factor", str(FACTOR), *SETTINGS, "model.tier=T2", f"tracking.uri={tracking}"]
    names = {}
    for stage in ("tile", "train", "reconstruct"):
        words = [tmp_path / "study.yaml", "-o", tmp_path / "submitted", *settings]
        code, out, err = finished(submit(stage, *words), 600)
        assert code == 0, (stage, out, err)
        names[stage] = err.split(":")[0]
        # The entry points, as Ray's own client starts them.
        words = [
            sys.executable,
            ROOT / "jobs" / f"{stage}.py",
            tmp_path / "study.yaml",
            "-o",
            tmp_path / "plain",
            *settings,
        ]
        job = client.submit_job(
            entrypoint=" ".join(map(str, words)), runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
        )
        while not (status := client.get_job_status(job)).is_terminal():
            time.sleep(0.5)
        assert status == JobStatus.SUCCEEDED, (stage, client.get_job_logs(job))
    results = (tmp_path / work / "results" / "one.zarr" for work in ("submitted", "plain"))
    one, other = (contents(result, "basis", "detail", "measured", "stain", "uncertainty") for result in results)
    assert one == other
    # The record, which goes on from stage to stage, says which job was the last.
    store = MlflowClient(tracking)
    runs = store.search_runs([e.experiment_id for e in store.search_experiments()])
    assert names["reconstruct"] in {run.data.tags.get("deepfere.submission") for run in runs}


def test_a_job_that_is_stopped_is_no_success(submit, dashboard, tmp_path):
    from ray.job_submission import JobSubmissionClient

    os.mkfifo(tmp_path / "slow.imzML")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": [{"name": "one", "msi": "slow.imzML"}]}))
    process = submit("ingest", tmp_path / "study.yaml", "-o", tmp_path / "work", "--no-guide")
    assert process.stderr is not None and process.stdout is not None
    name = process.stderr.readline().split(":")[0]
    while "Running entrypoint" not in process.stdout.readline():
        pass
    JobSubmissionClient(dashboard).stop_job(name)
    code, _, err = finished(process)
    assert code == 1 and "was stopped" in err, err


def test_no_dashboard_is_told_in_one_line(cli, tmp_path, phantom):
    (port,) = free_ports(1)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"sections": [{"name": "one", "msi": str(phantom.imzml)}]}))
    words = ["submit", "ingest", tmp_path / "s.yaml", "-o", tmp_path / "w", "--no-guide", "--to", "ray"]
    done = cli(*words, "--address", f"http://127.0.0.1:{port}")
    assert done.code == 2 and len(done.errors) == 1 and "no Ray dashboard answers" in done.errors[0], done
