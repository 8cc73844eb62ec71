"""The files in ``cluster/``, as far as that can be told without a cloud: keys, rules, versions, commands."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

import deepfere
from deepfere.config import Config, load_config
from tests.test_docs import check_command

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY = {name: CLUSTER / "kuberay" / f"{name}.yaml" for name in ("rayjob", "raycluster")}
LAUNCHER = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("cluster", "ray-cluster", "kubernetes", "slurm")]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
IMAGE = re.compile(r"[\w./-]*deepfere:[\w.-]+")


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


every_file = pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
every_manifest = pytest.mark.parametrize("name", KUBERAY)
every_launcher = pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)


def commands(path: Path) -> list[list[str]]:
    """Command lines of a file: indented comments, shell blocks of a page, a job's entry point."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    else:
        lines = re.findall(r"^# {3,}(.+)$", text, re.MULTILINE)
        text = "\n".join(lines).replace("\\\n", " ")
    # A command that "ray exec" is given is one word.
    found = [shlex.split(line.replace("'", ""), comments=True) for line in text.splitlines()]
    if path == KUBERAY["rayjob"]:
        found.append(shlex.split(load(path)["spec"]["entrypoint"]))
    return [words for words in found if words]


def test_there_is_something_to_check():
    found = {path: [words for words in commands(path) if "deepfere" in words] for path in (*FILES, *PAGES)}
    assert all(found[path] for path in (*KUBERAY.values(), *PAGES))
    assert {path.name for path in FILES} >= {"Dockerfile", "aws.yaml", "gcp.yaml", "rayjob.yaml", "reconstruct.sbatch"}


def check_words(words: list[str]) -> None:
    if "deepfere" in words:
        arguments = words[words.index("deepfere") + 1 :]
        check_command(arguments)
        load_config(None, [word for word in arguments if "=" in word and not word.startswith("-")])
    for word in words:
        if word.startswith(("cluster/", "jobs/")):
            assert (ROOT / word).is_file(), word


@every_file
def test_commands_in_the_files_are_accepted(path):
    for words in commands(path):
        try:
            check_words(words)
        except (AssertionError, click.UsageError, deepfere.InputError) as error:
            pytest.fail(f"{path.name}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "ray job submit -- deepfere reconstrut study.yaml -o work",
        "deepfere reconstruct study.yaml -o work tracking.url=none",
        "ray up cluster/aws.yml",
    ],
)
def test_the_check_of_commands_can_fail(line):
    with pytest.raises((AssertionError, click.UsageError, deepfere.InputError)):
        check_words(shlex.split(line))


@every_file
def test_settings_and_paths_that_the_text_names_exist(path):
    text, resolved = path.read_text(), Config().resolved()
    sections = [name for name, value in resolved.items() if isinstance(value, dict) and name != "ray"]
    for section, key in re.findall(rf"(?<![/\w-])({'|'.join(sections)})\.([a-z_]+)", text):
        assert key in resolved[section] or key in ("sbatch", "py"), f"{section}.{key}"
    for key in re.findall(r"\bray\.([a-z_]+)=", text):
        assert key in resolved["ray"], f"ray.{key}"
    for name in re.findall(r"(?<![\w/.])((?:cluster|jobs|docs|tests)/[\w/.-]+\.\w+)", text):
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


@every_file
def test_images_are_of_this_release_and_of_the_ray_that_was_tested(path):
    text = path.read_text()
    wanted = f"registry.example.org/deepfere:{deepfere.__version__}-ray{PINS['ray']}"
    assert {image.rstrip(".") for image in IMAGE.findall(text)} <= {wanted, f"{wanted}-gpu"}
    assert set(re.findall(r"\bray:(\d[\d.]*)|RAY_VERSION=(\S+)|rayVersion: \"(.+)\"", text)) <= {
        ("", PINS["ray"], ""),
        ("", "", PINS["ray"]),
    }
    assert ":latest" not in text


def instructions() -> list[tuple[str, list[str]]]:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split()[1:]) for line in lines]


def copied() -> set[str]:
    words = [[word for word in rest if not word.startswith("--")] for name, rest in instructions() if name == "COPY"]
    return {source for sources in words for source in sources[:-1]}


def test_the_image_begins_with_the_pinned_ray_and_runs_as_its_user():
    steps = instructions()
    assert steps[:3] == [
        ("ARG", [f"RAY_VERSION={PINS['ray']}"]),
        ("ARG", ["PLATFORM=cpu"]),
        ("FROM", ["rayproject/ray:${RAY_VERSION}-py311-${PLATFORM}"]),
    ]
    assert [rest for name, rest in steps if name == "USER"] == [["ray"]]
    installs = [" ".join(rest) for name, rest in steps if name == "RUN" and "pip install" in " ".join(rest)]
    assert len(installs) == 2
    assert all("-c source/constraints.txt" in install for install in installs)


def test_the_image_gets_all_that_the_package_is_built_from():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *wheel["packages"], *wheel["force-include"]}
    assert copied() >= needed | {"constraints.txt", "jobs"}
    assert all((ROOT / source).exists() for source in copied())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()


def schema_errors(name: str, manifest: dict[str, Any]) -> list[str]:
    schema = json.loads((ROOT / "tests" / "data" / f"kuberay-{name}.schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def operator_errors(manifest: dict[str, Any]) -> list[str]:
    """Rules of the operator (KubeRay 1.7) that its schema does not state, as far as these files touch them."""
    spec, cluster, errors = manifest["spec"], cluster_of(manifest), []

    def rule(holds: bool, text: str) -> None:
        if not holds:
            errors.append(text)

    job = manifest["kind"] == "RayJob"
    meta = manifest["metadata"]
    # The server adds five characters to a generateName. The cluster of a job has the longer name.
    longest = meta.get("name") or meta["generateName"] + "xxxxx"
    rule(len(longest) <= (47 if job else 53), "name too long")
    rule(bool(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", longest)), "name is no label")
    if job:
        rule(spec.get("shutdownAfterJobFinishes", False) or not spec.get("suspend"), "suspend without shutdown")
        rule(spec.get("shutdownAfterJobFinishes", False) or not spec.get("ttlSecondsAfterFinished"), "ttl, no shutdown")
        rule(spec.get("ttlSecondsAfterFinished", 0) >= 0, "ttl is negative")
        rule(spec.get("backoffLimit", 0) >= 0, "backoffLimit is negative")
        interactive = spec.get("submissionMode") == "InteractiveMode"
        rule(not (interactive and spec.get("backoffLimit")), "backoffLimit in InteractiveMode")
        rule(spec.get("submissionMode") in (None, "K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), "mode")
        rule(not cluster.get("authOptions", {}).get("enableK8sTokenAuth"), "no Kubernetes tokens in a RayJob")
    if cluster.get("authOptions", {}).get("mode") == "token":
        release = tuple(int(part) for part in cluster.get("rayVersion", "0").split("."))
        rule(release >= (2, 52, 0), "token authentication needs Ray 2.52")
    scaling = cluster.get("enableInTreeAutoscaling", False)
    second = scaling and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        start, pod = group.get("rayStartParams", {}), group["template"]["spec"]
        both = {"num-cpus", "num-gpus", "memory", "resources"} & set(start) and group.get("resources")
        rule(not both, "resources given twice")
        rule("labels" not in start, "labels in rayStartParams")
        rule(not second or pod.get("restartPolicy", "Never") == "Never", "restartPolicy with autoscaler v2")
        variables = {v["name"] for c in pod["containers"] for v in c.get("env", [])}
        rule("RAY_enable_autoscaler_v2" not in variables or not second, "autoscaler version given twice")
        rule(bool(pod["containers"]), "no container")
    for group in cluster["workerGroupSpecs"]:
        rule(scaling or {"minReplicas", "maxReplicas"} <= set(group), "limits are needed without autoscaling")
        rule(group.get("minReplicas", 0) <= group.get("maxReplicas", 2**31 - 1), "min above max")
        rule(second or "idleTimeoutSeconds" not in group, "a group's idle time needs autoscaler v2")
    return errors


@every_manifest
def test_manifests_pass_the_schema_and_the_rules_of_the_operator(name):
    manifest = load(KUBERAY[name])
    assert schema_errors(name, manifest) == []
    assert operator_errors(manifest) == []


@every_manifest
def test_schemas_name_their_source_and_are_small(name):
    path = ROOT / "tests" / "data" / f"kuberay-{name}.schema.json"
    assert path.stat().st_size < 60_000
    schema = json.loads(path.read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    assert "v1.7.0" in schema["$comment"] and "Apache License 2.0" in schema["$comment"]


def broken(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with a key set, or with ``new <- old`` a key renamed."""
    out = copy.deepcopy(manifest)
    *parents, last = path.split("/")
    place: Any = out
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    new, arrow, old = last.partition(" <- ")
    place[new] = place.pop(old) if arrow else value
    return out


C = "spec/rayClusterSpec"
POD = f"{C}/workerGroupSpecs/1/template/spec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/shutdownAfterFinish <- shutdownAfterJobFinishes", None),
        ("spec/ttlSecondsAfterFinished", "600"),
        (f"{C}/workerGroupSpecs/0/minReplica <- minReplicas", None),
        (f"{C}/autoscalerOptions/version", "v3"),
        (f"{C}/headGroupSpec/rayStartParams/num-cpus", 0),
        (f"{POD}/toleration <- tolerations", None),
        (f"{POD}/containers/0/resources/limit <- limits", None),
        (f"{POD}/containers/0/volumeMounts/0/path <- mountPath", None),
        (f"{POD}/volumes/0/persistentVolumeClaim/claim <- claimName", None),
    ],
)
def test_misspelt_keys_and_wrong_types_are_found(path, value):
    assert schema_errors("rayjob", broken(load(KUBERAY["rayjob"]), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/shutdownAfterJobFinishes", False),
        ("spec/submissionMode", "InteractiveMode"),
        ("metadata/generateName", "deepfere-reconstruct-a-study-of-many-sections-"),
        (f"{C}/rayVersion", "2.50.1"),
        (f"{C}/headGroupSpec/resources", {"CPU": "0"}),
        (f"{C}/workerGroupSpecs/0/minReplicas", 9),
        (f"{POD}/restartPolicy", "Always"),
    ],
)
def test_rules_of_the_operator_can_fail(path, value):
    assert operator_errors(broken(load(KUBERAY["rayjob"]), path, value))


@every_manifest
def test_every_pod_has_the_image_the_shared_folder_and_its_memory(name):
    cluster, claim = cluster_of(load(KUBERAY[name])), load(CLUSTER / "kuberay" / "shared.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert IMAGE.fullmatch(container["image"])
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
        # Ray reads the limits: without them it takes the machine's memory for the pod's.
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@every_manifest
def test_roles_of_the_groups(name):
    cluster = cluster_of(load(KUBERAY[name]))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    cpu, gpu = cluster["workerGroupSpecs"]
    assert cpu["minReplicas"] == cpu["replicas"] > 0  # a stage counts the CPUs that are there when it begins
    assert (gpu["minReplicas"], gpu["replicas"]) == (0, 0)
    pod = gpu["template"]["spec"]
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["containers"][0]["image"].endswith("-gpu")
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in json.dumps(cpu)


def launch(config: dict[str, Any]) -> dict[str, Any]:
    """What ``ray up`` does with a file before it talks to the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@every_launcher
def test_the_launcher_accepts_the_file(path):
    prepared = launch(load(path))
    kinds = prepared["available_node_types"]
    assert prepared["head_node_type"] == "head"
    assert (kinds["head"]["max_workers"], kinds["head"]["resources"]["CPU"]) == (0, 0)
    assert kinds["cpu"]["min_workers"] > 0 and kinds["gpu"]["min_workers"] == 0
    assert kinds["gpu"]["resources"]["GPU"] == 1 and kinds["gpu"]["docker"]["worker_image"].endswith("-gpu")
    assert sum(kind["max_workers"] for kind in kinds.values()) <= prepared["max_workers"]
    # Ray's defaults for a machine without Ray would install another release.
    assert not any("ray" in command for command in prepared["setup_commands"])
    options = " ".join(prepared["docker"]["run_options"])
    assert "--volume /shared:/shared" in options and "--env RAY_AUTH_MODE=token" in options
    assert any("mount -t nfs" in command for command in prepared["initialization_commands"])
    assert "/home/ray/.ray/auth_token" in prepared["file_mounts"]


@every_launcher
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("idle_timeout_minute <- idle_timeout_minutes", None),
        ("docker/img <- image", None),
        ("head_node_type", "hed"),
        ("available_node_types/cpu/min_workers", 9),
        ("available_node_types/cpu/resource <- resources", None),
        ("available_node_types/gpu/docker/image <- worker_image", None),
    ],
)
def test_the_launcher_refuses_mistakes(path, place, value):
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        launch(broken(load(path), place, value))
