"""What `deepfere submit` sends and to whom: ids, settings, manifests, scripts; and jobs on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import deepfere
from deepfere.config import Config, load_config
from deepfere.submit.submission import VARIABLE, git_revision, tags_from_environment, write_private
from deepfere.submit.target import follow
from tests.conftest import write_study
from tests.test_cluster_files import operator_errors, schema_errors
from tests.test_docs import check_command

PROGRAM = [sys.executable, "-m", "deepfere"]
ID = re.compile(r"deepfere-[a-z]+-[0-9a-f]{12}")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without history."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def study(phantom, tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), phantom)


@pytest.fixture
def dry(cli, study, home):
    """What a dry run prints; nothing may come of it."""

    def run(to: str, *words: object, job: str = "reconstruct", out: str = "work") -> str:
        before = sorted(home.rglob("*"))
        done = cli("submit", job, study, "-o", home / out, "--to", to, "--dry-run", *words)
        assert done.code == 0 and done.errors == [], done
        assert sorted(home.rglob("*")) == before
        return done.out

    return run


def names(text: str) -> set[str]:
    return set(ID.findall(text))


# Ids.


def test_the_same_work_has_the_same_id_and_other_work_another(dry, home):
    (one,) = names(dry("local", "train.steps=9"))
    (home / "c.yaml").write_text("train:\n  steps: 9\n")
    assert names(dry("local", "--config", home / "c.yaml")) == {one}
    others = [
        dry("local", "train.steps=10"),
        dry("local", "train.steps=9", job="train"),
        dry("local", "train.steps=9", out="other"),
        dry("local", "train.steps=9", "--overwrite"),
    ]
    assert len({one}.union(*map(names, others))) == 5


def test_another_manifest_at_the_same_path_is_other_work(dry, study):
    before, text = names(dry("local")), study.read_text()
    study.write_text(text.replace("one", "two"))
    try:
        assert names(dry("local")).isdisjoint(before)
    finally:
        study.write_text(text)


# Settings.


def sent_settings(text: str) -> Config:
    return Config.model_validate(yaml.safe_load(text.partition("config.yaml\nseed:")[2].join(["seed:", ""])))


def test_settings_travel_resolved_and_complete(dry, home):
    (home / "c.yaml").write_text("train:\n  rate: 2.0e-5\nmodel:\n  tier: T1\n")
    text = dry("local", "--config", home / "c.yaml", "--factor", "4", "ingest.mz=[700.5, 600.25]", "seed=3")
    sent = sent_settings(text)
    wanted = load_config(home / "c.yaml", ["seed=3", "ingest.mz=[600.25,700.5]"], factor=4)
    assert sent.digest() == wanted.digest()
    command = shlex.split(text.splitlines()[0])
    assert str(home / "c.yaml") not in command and not any(word.startswith(("seed=", "--factor")) for word in command)
    told = json.loads(command[0].partition("=")[2])
    assert ID.fullmatch(told["deepfere.submission"]) and set(told) <= {"deepfere.submission", "deepfere.git"}
    # Where runs are recorded does not depend on who runs the job.
    assert sent.tracking.uri == f"sqlite:///{home / 'data' / 'deepfere' / 'mlflow.db'}"


def test_the_tracking_store_of_the_environment_travels(dry, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org:5000")
    assert "uri: http://mlflow.example.org:5000" in dry("ray", "--address", "http://127.0.0.1:1")


def test_paths_are_absolute_and_a_list_of_targets_is_a_setting(cli, phantom, home, monkeypatch):
    monkeypatch.chdir(phantom.imzml.parent)
    (home / "targets.txt").write_text("700.5\n600.25\n")
    words = ["fuse", phantom.imzml.name, phantom.slide.name, "-o", "r.zarr", "--mz", home / "targets.txt"]
    more = ["--pitch-um", "50,40", "--overwrite", "--alignment", phantom.truth / "alignment.json"]
    done = cli("submit", *words, *more, "--to", "local", "--dry-run")
    assert done.code == 0, done
    command = shlex.split(done.out.splitlines()[0])
    command = command[command.index("fuse") : command.index("--config")]
    assert command[:3] == ["fuse", str(phantom.imzml), str(phantom.slide)]
    assert command[command.index("--out") + 1] == str(phantom.imzml.parent / "r.zarr")
    assert command[command.index("--pitch-um") + 1] == "50,40" and "--overwrite" in command
    assert "--mz" not in command and sent_settings(done.out).ingest.mz == [600.25, 700.5]


def test_every_option_of_a_job_is_known_to_be_a_setting_or_not():
    """A new option that is a setting must travel as one: else its file, or the client's default, would be missed."""
    from deepfere.cli import main
    from deepfere.submit.prepare import SETTINGS

    others = {"msi", "slide", "study", "out", "overrides", "config", "overwrite", "no_guide", "model"}
    others |= {"pitch_um", "slide_mpp_um", "alignment", "landmarks", "region", "slide_region"}
    submit = main.commands["submit"]
    for name in submit.commands:
        assert {p.name for p in main.commands[name].params} <= others | set(SETTINGS), name
    known = {f"{k}__{n}" for k, v in Config().resolved().items() if isinstance(v, dict) for n in v} | {"factor"}
    assert set(SETTINGS.values()) <= known


# What is wrong is told before anything is sent.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.stepz=3"], "train.stepz"),
        (["train.patch_px=20", "model.depth=5"], "train.patch_px"),
        (["--factor", "65"], "factor"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--to", "slurm", "ray.address=10.0.0.5:6379"], "ray.address"),
        (["--to", "slurm", "--sbatch", "nodes=4"], "--sbatch=--nodes=4"),
        (["--to", "slurm", "--paths-on-cluster"], "--paths-on-cluster"),
        (["--to", "ray", "--address", "10.0.0.5:6379"], "http://HOST:8265"),
        (["--to", "ray", "--image", "a/b:1"], "--to kuberay"),
        (["--to", "kuberay"], "--image"),
        (["--to", "kuberay", "--image", "a/b:1", "--namespace", "A B"], "--namespace"),
        (["--to", "kuberay", "--image", "a/b:1", "train.use_gpu=true"], "--gpu-image"),
        (["--to", "kuberay", "--image", "a/b:1", "reconstruct.use_gpu=true"], "reconstruct.use_gpu=true and no image"),
        (["--to", "local", "tracking.uri=mlruns"], "tracking.uri"),
    ],
)
def test_wrong_settings_and_options_are_refused_here(cli, study, home, words, told):
    to = [] if "--to" in words else ["--to", "local"]
    done = cli("submit", "train", study, "-o", home / "work", *to, *words, "--dry-run")
    assert done.code == 2 and done.out == "" and len(done.errors) == 1, done
    assert told in done.errors[0]


@pytest.mark.parametrize("missing", ["msi", "slide", "alignment", "study"])
def test_missing_files_are_refused_here(cli, study, home, missing):
    section = yaml.safe_load(study.read_text())["sections"][0]
    section |= {} if missing == "study" else {missing: str(home / "gone")}
    (home / "mine.yaml").write_text(yaml.safe_dump({"sections": [section]}))
    path = home / ("gone.yaml" if missing == "study" else "mine.yaml")
    words = ["submit", "train", path, "-o", home / "work", "--dry-run", "--to"]
    done = cli(*words, "local")
    assert done.code == 2 and done.out == "" and len(done.errors) == 1 and "gone" in done.errors[0], done
    elsewhere = cli(*words, "ray", "--paths-on-cluster")
    assert elsewhere.code == 0 and str(path) in elsewhere.out, elsewhere


def test_paths_on_the_cluster_are_absolute(cli):
    done = cli("submit", "train", "study.yaml", "-o", "/shared/work", "--to", "ray", "--paths-on-cluster", "--dry-run")
    assert done.code == 2 and "study.yaml is relative to this machine" in done.err


# Kubernetes.


def manifests(text: str):
    config, job = yaml.safe_load_all(text)
    return config, job


def test_gpus_for_reconstruction_alone(dry, home, study):
    """The group stays, as large as the manifest says at least; training asks for none."""
    _, job = manifests(dry("kuberay", "--image", "a/b:9", "--gpu-image", "a/b:9-gpu", "reconstruct.use_gpu=true"))
    assert schema_errors("rayjob", job) == [] and operator_errors(job) == []
    gpu = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    assert gpu["groupName"] == "gpu" and [gpu["replicas"], gpu["minReplicas"]] == [1, 1]


@pytest.mark.parametrize("gpus", [0, 6])
def test_the_manifest_is_valid_and_holds_command_image_and_settings(dry, home, study, gpus):
    more = ["train.use_gpu=true", f"train.workers={gpus}", "--gpu-image", "reg/deepfere:9-gpu"] if gpus else []
    text = dry("kuberay", "--image", "reg/deepfere:9", "--namespace", "imaging", "train.steps=9", *more)
    config, job = manifests(text)
    assert schema_errors("rayjob", job) == [] and operator_errors(job) == []
    assert config["metadata"]["namespace"] == job["metadata"]["namespace"] == "imaging"
    assert config["metadata"]["name"] == job["metadata"]["name"] == min(names(text))
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["deepfere", "reconstruct", str(study), "--out"]
    head, *groups = (
        job["spec"]["rayClusterSpec"]["headGroupSpec"],
        *job["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    )
    (container,) = head["template"]["spec"]["containers"]
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == "settings")
    (volume,) = (v for v in head["template"]["spec"]["volumes"] if v["name"] == "settings")
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    folder, _, file = words[words.index("--config") + 1].rpartition("/")
    assert mount["mountPath"] == folder
    assert Config.model_validate(yaml.safe_load(config["data"][file])).train.steps == 9
    images = {g["groupName"]: g["template"]["spec"]["containers"][0]["image"] for g in groups}
    assert container["image"] == "reg/deepfere:9"
    assert images == {"cpu": "reg/deepfere:9", **({"gpu": "reg/deepfere:9-gpu"} if gpus else {})}
    if gpus:
        assert [groups[1][key] for key in ("replicas", "minReplicas", "maxReplicas")] == [6, 6, 6]
    # A job that was told to stop must not be begun again by the operator.
    assert job["spec"]["backoffLimit"] == 0
    told = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"][VARIABLE]
    assert json.loads(told)["deepfere.submission"] == job["metadata"]["name"]


@pytest.mark.parametrize("to", ["local", "slurm"])
def test_a_password_is_shown_to_nobody(dry, to, tmp_path):
    told = dry(to, "tracking.uri=http://me:secret@host:5000")
    assert "http://***@host:5000" in told and "secret" not in told
    file = tmp_path / "settings.yaml"
    file.write_text("old")
    file.chmod(0o644)
    write_private(file, "new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o600


def test_a_password_does_not_travel_in_a_config_map(cli, study, home):
    words = ["--to", "kuberay", "--image", "i", "--dry-run", "--paths-on-cluster", "tracking.uri=http://me:secret@host"]
    done = cli("submit", "train", study, "-o", "/shared/work", *words)
    assert done.code == 2 and "MLFLOW_TRACKING_PASSWORD" in done.err and "secret@" not in done.err


def test_a_path_is_not_read_by_the_clusters_shell(dry):
    told = dry("kuberay", "--image", "i", out="$(touch x)`y`")
    environment = yaml.safe_load(told.split("---")[1])["spec"]["runtimeEnvYAML"]
    assert "deepfere.submission" in environment and "touch" not in environment and "`" not in environment


def test_without_kubectl_the_dry_run_is_named(cli, study, home, monkeypatch):
    monkeypatch.setenv("PATH", str(home))
    done = cli("submit", "train", study, "-o", home / "work", "--to", "kuberay", "--image", "a/b:1")
    assert done.code == 2 and "kubectl is not on this machine" in done.err and "--dry-run" in done.err


KUBECTL = """#!{python}
import json, sys, time
from pathlib import Path

words = [w for w in sys.argv[1:] if not w.startswith("--namespace")]
store = Path({store!r})
with (store / "calls").open("a") as log:
    log.write(json.dumps(words) + "\\n")

if words[0] == "create":
    made = json.load(sys.stdin)
    made["metadata"]["uid"] = "17"
    (store / f"{{made['kind']}}.json").write_text(json.dumps(made))
    print(json.dumps(made))
elif words[:2] == ["get", "rayjobs"]:
    print(json.dumps({{"items": [json.loads(p.read_text()) for p in store.glob("RayJob.json")]}}))
elif words[:2] == ["get", "rayjob"]:
    asked = len([c for c in (store / "calls").read_text().splitlines() if '"get", "rayjob",' in c])
    status = {{}} if asked < 2 else {{"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}}
    if asked > 4:
        status = json.loads((store / "end").read_text())
    print(json.dumps({{"status": status}}))
elif words[0] == "logs":
    asked = len([c for c in (store / "calls").read_text().splitlines() if c.startswith('["logs"')])
    print("one", flush=True) if asked > {absent} else None
    sys.exit("container is creating") if asked <= {failures} else print("two")
"""


@pytest.mark.parametrize(
    ("absent", "failures"),
    [(0, 0), (2, 2), (0, 2), (10**6, 10**6)],
    ids=["there", "late", "lost midway", "never there"],
)
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "message": "Job entrypoint command failed with exit code 2, last available logs",
            },
            2,
        ),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
        ({"jobDeploymentStatus": "Failed", "message": "no nodes"}, 1),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no such field"}, 1),
    ],
)
def test_kubectl_is_told_and_asked_until_the_end(cli, study, home, monkeypatch, end, code, absent, failures):
    store = home / "store"
    store.mkdir()
    (store / "end").write_text(json.dumps(end))
    fake = KUBECTL.format(python=sys.executable, store=str(store), absent=absent, failures=failures)
    (home / "kubectl").write_text(fake)
    (home / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setattr("deepfere.submit.kuberay.KubeJob.poll_s", 0.01)
    done = cli("submit", "train", study, "-o", home / "work", "--to", "kuberay", "--image", "a/b:1")
    assert done.code == code, done
    # What is not valid has no pod whose output could come late.
    assert done.out == ("one\ntwo\n" if failures < 10 else "") or "ValidationFailed" in done.err, done
    calls = [json.loads(line) for line in (store / "calls").read_text().splitlines()]
    assert [c[0] for c in calls[:4]] == ["get", "create", "create", "patch"]
    # The settings go when the job goes.
    (owner,) = json.loads(calls[3][-1].removeprefix("--patch="))["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("RayJob", "17")


def test_a_job_of_kubernetes_is_stopped_in_its_head(home, monkeypatch):
    from deepfere.submit.kuberay import KubeJob

    (home / "calls").touch()
    (home / "kubectl").write_text(
        f"""#!{sys.executable}
import json, sys
with open({str(home / "calls")!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if "rayjob" in sys.argv:
    print(json.dumps({{"status": {{"rayClusterName": "c1", "jobDeploymentStatus": "Running"}}}}))
elif "pods" in sys.argv:
    print("pod/c1-head")
"""
    )
    (home / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    KubeJob("deepfere-train-0123456789ab", "imaging", "/shared/work").stop()
    calls = [json.loads(line) for line in (home / "calls").read_text().splitlines()]
    assert all(call[0] == "--namespace=imaging" for call in calls)
    assert "--selector=ray.io/cluster=c1,ray.io/node-type=head" in calls[1]
    exec_, command = calls[2][1:4], calls[2][calls[2].index("--") + 1 :]
    assert exec_ == ["exec", "pod/c1-head", "--container=ray-head"]
    assert command == ["deepfere", "stop", "--no-wait", "/shared/work"]
    check_command(command[1:])


# Slurm.


def test_the_script_holds_everything(dry, home, study):
    text = dry("slurm", "--sbatch=--nodes=3", "--sbatch=--time=00:10:00", "seed=7", out="my work")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = re.findall(r"^#SBATCH (.+)$", text[: text.index("\nset ")], re.MULTILINE)
    found = [tuple(shlex.split(line)[0].removeprefix("--").partition("=")[::2]) for line in lines]
    options = dict(found)  # of an option that stands twice the last one counts
    assert len(found) == text.count("#SBATCH")
    assert options["nodes"] == "3" and options["time"] == "00:10:00"
    assert options["job-name"] == min(names(text)) and options["signal"] == "B:TERM@300"
    assert options["output"].startswith(f"{home / 'my work.jobs'}/")
    # The part up to the command, run by a shell.
    part = text[text.index("# What runs") : text.index("for program in")]
    shown = subprocess.run(
        ["bash"],
        input=part + 'printf "%s\\0" "${command[@]}"; cat "$config"',
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    *command, settings = shown.split("\0")
    assert command[:-1] == ["deepfere", "reconstruct", str(study), "--out", str(home / "my work"), "--config"]
    assert Config.model_validate(yaml.safe_load(settings)).seed == 7


def test_without_slurm_the_dry_run_is_named(cli, study, home, monkeypatch):
    monkeypatch.setenv("PATH", str(home))
    done = cli("submit", "train", study, "-o", home / "work", "--to", "slurm")
    assert done.code == 2 and "Slurm's programs are not on this machine" in done.err and "--dry-run" in done.err


def test_the_revision_is_that_of_the_checkout_and_says_where_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(deepfere, "__file__", str(tmp_path / "deepfere" / "__init__.py"))
    assert git_revision() == {}  # installed, not checked out
    for name in ("HOME", "GIT_CONFIG_GLOBAL"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))

    def git(*words):
        who = ["-c", "user.name=A", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)

    git("init", "-q")
    assert git_revision() == {}  # nothing committed
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "1")
    revision = git("rev-parse", "HEAD").stdout.strip()
    assert len(revision) == 40 and git_revision() == {"deepfere.git": revision}
    (tmp_path / "a").write_text("2")
    assert git_revision() == {"deepfere.git": f"{revision}-dirty"}
    monkeypatch.setenv("PATH", "")
    assert git_revision() == {}


def test_the_run_is_tagged_with_its_submission(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert tags_from_environment() == {}
    told = {"deepfere.submission": "x", "deepfere.git": "abc-dirty", "deepfere.out": "/w"}
    monkeypatch.setenv(VARIABLE, json.dumps(told))
    assert tags_from_environment() == {"deepfere.submission": "x", "deepfere.git": "abc-dirty"}


# Jobs on this machine, really.


def test_a_job_here_is_attached_to_while_it_runs_and_returns_its_own_code(cli, phantom, home, monkeypatch):
    """The measurement is a pipe that nobody writes to yet, so that the job waits for it; then it is none."""
    os.mkfifo(home / "slow.imzML")
    study = home / "slow.yaml"
    study.write_text(yaml.safe_dump({"sections": [{"name": "one", "msi": str(home / "slow.imzML")}]}))
    words = ["submit", "ingest", study, "-o", home / "work", "--no-guide", "--to", "local"]
    first = cli(*words, "--no-wait")
    assert first.code == 0 and first.err.endswith(": submitted\n"), first
    (name,) = names(first.err)
    pipe = home / "slow.imzML"

    def feed_and_follow(*arguments):
        # Writing waits for the job to read.
        threading.Thread(target=pipe.write_text, args=["no xml"], daemon=True).start()
        return follow(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("deepfere.submit.target.follow", feed_and_follow)
        second = cli(*words)
    assert second.code == 2 and second.err == f"{name}: runs already\n", second
    assert "slow.imzML" in second.out
    assert [p.name for p in (home / "data" / "deepfere" / "jobs").iterdir()] == [name]
    (home / "slow.imzML").unlink()
    for suffix in (".imzML", ".ibd"):
        (home / f"slow{suffix}").symlink_to(phantom.imzml.with_suffix(suffix))
    again = cli(*words)
    assert again.code == 0 and again.err == f"{name}-2: submitted\n", again
    assert "one: 24 ions, 24 x 21 pixels" in again.out


def test_a_job_here_whose_process_was_killed_has_failed(home):
    from deepfere.submit import local

    folder = home / "data" / "deepfere" / "jobs" / "deepfere-train-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    ended = local.LocalJob(folder.name).ended()
    assert ended is not None and ended.code == 1 and "is gone" in ended.what


@pytest.mark.cluster
def test_interrupting_the_watcher_leaves_the_job_alone(home):
    os.mkfifo(home / "slow.imzML")
    (home / "s.yaml").write_text(yaml.safe_dump({"sections": [{"name": "one", "msi": str(home / "slow.imzML")}]}))
    words = [*PROGRAM, "submit", "ingest", str(home / "s.yaml"), "-o", str(home / "w"), "--no-guide", "--to", "local"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    name = process.stderr.readline().split(":")[0]
    folder = home / "data" / "deepfere" / "jobs" / name
    end = time.monotonic() + 30
    while not (folder / "pid").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "runs on" in err and f"deepfere stop {name}" in err, err
    job = int((folder / "pid").read_text())
    assert Path(f"/proc/{job}").exists() and not (folder / "code").exists()
    stopped = subprocess.run([*PROGRAM, "stop", name], capture_output=True, text=True, timeout=100)
    assert stopped.returncode == 0 and stopped.stdout == f"{name}: asked to stop\nstopped\n", stopped
    assert (folder / "code").read_text() == "1"
    again = subprocess.run([*PROGRAM, "stop", name], capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stdout == f"{name} has ended already\n", again
