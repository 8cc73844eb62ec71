"""Jobs of KubeRay: the manifest of ``cluster/kuberay``, with the command written into it, given to ``kubectl``."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import threading
from collections import deque
from typing import Any

import yaml

from deepfere.config import Config
from deepfere.errors import DeepfereError, InputError
from deepfere.submit.submission import Submission
from deepfere.submit.target import Ended, Job, Target
from deepfere.submit.templates import template

FOLDER, FILE = "/etc/deepfere", "settings.yaml"
LABEL = "deepfere/submission"
NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LATE_TRIES = 3
"""How often the output of a job that is over is asked for."""
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")


class KubeJob(Job):
    """A RayJob.

    Args:
        name: Its name.
        namespace: Its namespace; None is kubectl's current one.
        work: The folder that it works in, as its pods see it.
    """

    poll_s = 3.0

    def __init__(self, name: str, namespace: str | None, work: str) -> None:
        self.name, self._namespace, self._work = name, namespace, work
        self._log: _Pipe | None = None
        self._reading = False
        self._told = self._late = 0

    def _kubectl(self, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return kubectl(self._namespace, *words, text=text)

    def _status(self) -> dict[str, Any]:
        done = self._kubectl("get", "rayjob", self.name, "--output=json")
        if done.returncode:
            if "NotFound" in done.stderr or "not found" in done.stderr:
                raise DeepfereError(f"there is no RayJob {self.name} any more; its output went with it")
            return {}  # the cluster does not answer now; it will again
        return json.loads(done.stdout).get("status", {})

    def ended(self) -> Ended | None:
        """The operator's status. Of the exit code it keeps what Ray's message says."""
        status = self._status()
        deployment, state = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        if deployment not in ("Complete", "Failed", "ValidationFailed"):
            return None
        # One that is not valid has no pod.
        waits = self._reading and deployment != "ValidationFailed" and self._late <= LATE_TRIES
        if waits and (self._log is None or self._log.broken() or not self._log.drained()):
            return None
        if state == "SUCCEEDED":
            return Ended(0)
        message = " ".join(status.get("message", "").split())
        code = re.search(r"exit code (\d+)", message)
        if state == "STOPPED":
            return Ended(1, f"{self.name} was stopped; the same command again resumes")
        return Ended(int(code.group(1)) or 1 if code else 1, f"{self.name}: {state or deployment}: {message}")

    def read(self) -> str:
        """From the pod that submits the command within the cluster; none before it is there."""
        self._reading = True
        if self._log is None or self._log.broken():
            deployment = self._status().get("jobDeploymentStatus")
            if deployment not in ("Running", "Complete", "Failed"):
                return ""
            self._late += deployment != "Running"
            if self._late > LATE_TRIES:
                return ""  # its pod is gone, or there never was one
            # All of it, less what was told: a pod that is being made gives nothing, and a connection may be lost.
            words = ["logs", "--follow", "--tail=-1", f"job/{self.name}"]
            self._log = _Pipe(_words(self._namespace, *words), skip=self._told)
        lines = self._log.read()
        self._told += len(lines)
        return "".join(lines)

    def close(self) -> None:
        """Let go of the log."""
        if self._log is not None:
            self._log.close()

    def stop(self) -> None:
        """``deepfere stop`` in the head's pod, whose folder it is."""
        cluster = self._status().get("rayClusterName")
        if not cluster:
            raise DeepfereError(f"{self.name} has no cluster yet; to take it back: kubectl delete rayjob {self.name}")
        labels = f"--selector=ray.io/cluster={cluster},ray.io/node-type=head"
        pods = self._kubectl("get", "pods", labels, "--output=name")
        if pods.returncode or not pods.stdout.split():
            raise DeepfereError(f"{self.name}: its head is not there {pods.stderr.strip()}")
        words = [
            "exec",
            pods.stdout.split()[0],
            "--container=ray-head",
            "--",
            "deepfere",
            "stop",
            "--no-wait",
            self._work,
        ]
        done = self._kubectl(*words)
        if done.returncode:
            raise DeepfereError(f"{self.name}: {' '.join(done.stderr.split())}")

    def record(self) -> dict[str, Any]:
        """The namespace."""
        return {"to": "kuberay", "name": self.name, "namespace": self._namespace, "work": self._work}


class _Pipe:
    """What a program prints, read by a thread.

    Args:
        words: The program and its arguments.
        skip: So many lines are left out first.
    """

    def __init__(self, words: list[str], skip: int = 0) -> None:
        self._lines: deque[str] = deque()
        self._skip = skip
        self._process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._process.stdout is not None
        self._lines.extend(itertools.islice(self._process.stdout, self._skip, None))

    def read(self) -> list[str]:
        """The lines since it was last asked."""
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        return lines

    def broken(self) -> bool:
        return self._process.poll() not in (None, 0)

    def drained(self) -> bool:
        return not self._thread.is_alive() and not self._lines

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


class KubeRay(Target):
    """A Kubernetes cluster with the KubeRay operator.

    Args:
        image: The image of ``cluster/Dockerfile`` in your registry.
        gpu_image: The image for GPU nodes; needed where training uses GPUs.
        namespace: Namespace; None is kubectl's current one.
    """

    def __init__(self, image: str | None, gpu_image: str | None = None, namespace: str | None = None) -> None:
        if image is None:
            raise InputError(
                "no image is given", where="--image", remedy="give the one that you built (docs/kubernetes.md)"
            )
        for flag, name in (("--image", image), ("--gpu-image", gpu_image)):
            if name is not None and not IMAGE.fullmatch(name):
                raise InputError(f"{name!r} is no name of an image", where=flag, remedy="give REGISTRY/NAME:TAG")
        if namespace is not None and not NAMESPACE.fullmatch(namespace):
            raise InputError(
                f"{namespace!r} is no name of a namespace",
                where="--namespace",
                remedy="give lower-case letters, digits and -, 63 at most",
            )
        self.image, self.gpu_image, self.namespace = image, gpu_image, namespace

    def manifests(self, submission: Submission, name: str) -> list[dict[str, Any]]:
        """A ConfigMap with the settings, and the RayJob.

        Raises:
            InputError: Training is to use GPUs and there is no image for them.
        """
        labels = {LABEL: submission.base}
        meta: dict[str, Any] = {"name": name, "labels": labels}
        if self.namespace is not None:
            meta["namespace"] = self.namespace
        job: dict[str, Any] = yaml.safe_load(template("kuberay/rayjob.yaml"))
        job["metadata"] = {
            **meta,
            "annotations": {key.replace(".", "/", 1): v for key, v in submission.metadata.items()},
        }
        spec = job["spec"]
        spec["entrypoint"] = f"deepfere {submission.command(f'{FOLDER}/{FILE}')}"
        # A job that was told to stop ends with 1: the operator would begin it again.
        spec["backoffLimit"] = 0
        spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": submission.environment(name)}, width=10_000)
        cluster = spec["rayClusterSpec"]
        self._groups(cluster, submission.config)
        head = cluster["headGroupSpec"]["template"]["spec"]
        head["volumes"].append({"name": "settings", "configMap": {"name": name}})
        head["containers"][0]["volumeMounts"].append({"name": "settings", "mountPath": FOLDER})
        config = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "data": {FILE: submission.config_text},
        }
        return [config, job]

    def _groups(self, cluster: dict[str, Any], config: Config) -> None:
        train = config.train
        for container in cluster["headGroupSpec"]["template"]["spec"]["containers"]:
            container["image"] = self.image
        kept = []
        for group in cluster["workerGroupSpecs"]:
            gpu = group["groupName"] == "gpu"
            if gpu and not (train.use_gpu or config.reconstruct.use_gpu):
                continue
            if gpu and self.gpu_image is None:
                used = "train.use_gpu" if train.use_gpu else "reconstruct.use_gpu"
                raise InputError(f"{used}=true and no image for GPUs", where="--gpu-image", remedy="give it")
            if gpu:
                # Training on more GPUs than there are is refused: all of them, from the beginning.
                count = train.count if train.use_gpu else 1
                group |= {"replicas": count, "minReplicas": count, "maxReplicas": max(count, group["maxReplicas"])}
            for container in group["template"]["spec"]["containers"]:
                container["image"] = self.gpu_image if gpu else self.image
            kept.append(group)
        cluster["workerGroupSpecs"] = kept

    def payload(self, submission: Submission, name: str) -> str:
        """The manifests, as ``kubectl create -f`` takes them."""
        parts = self.manifests(submission, name)
        return "---\n".join(yaml.dump(m, Dumper=_Readable, sort_keys=False, width=120) for m in parts)

    def attempts(self, submission: Submission) -> dict[int, Job]:
        """Those whose RayJob is still there."""
        shown = kubectl(self.namespace, "get", "rayjobs", f"--selector={LABEL}={submission.base}", "--output=json")
        if shown.returncode:
            raise DeepfereError(f"kubectl: {' '.join(shown.stderr.split())}")
        names = [item["metadata"]["name"] for item in json.loads(shown.stdout)["items"]]
        numbers = {number: name for name in names if (number := submission.number(name)) is not None}
        return {number: KubeJob(name, self.namespace, submission.work) for number, name in numbers.items()}

    def start(self, submission: Submission, name: str) -> Job:
        """``kubectl create`` of both; the settings go when the RayJob goes."""
        for manifest in self.manifests(submission, name):
            done = kubectl(self.namespace, "create", "--output=json", "-f", "-", text=json.dumps(manifest))
            if done.returncode and "AlreadyExists" not in done.stderr:
                raise DeepfereError(f"kubectl: {' '.join(done.stderr.split())}")
            made = json.loads(done.stdout) if done.returncode == 0 else {}
            if made.get("kind") == "RayJob":
                owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": made["metadata"]["uid"]}
                patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
                kubectl(self.namespace, "patch", "configmap", name, "--type=merge", f"--patch={patch}")
        return KubeJob(name, self.namespace, submission.work)


class _Readable(yaml.SafeDumper):
    """Text of several lines as lines."""


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _words(namespace: str | None, *words: str) -> list[str]:
    return ["kubectl", *([f"--namespace={namespace}"] if namespace is not None else []), *words]


def kubectl(namespace: str | None, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run kubectl.

    Raises:
        InputError: There is none on this machine.
        DeepfereError: It does not answer.
    """
    if shutil.which("kubectl") is None:
        raise InputError(
            "kubectl is not on this machine",
            where="--to kuberay",
            remedy="install it, or write the manifest with --dry-run",
        )
    try:
        return subprocess.run(_words(namespace, *words), input=text, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise DeepfereError(f"kubectl does not answer: {shlex.join(words[:3])}") from error
