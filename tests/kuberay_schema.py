"""Make the trimmed JSON schemas in ``tests/data`` from KubeRay's resource definitions.

    python tests/kuberay_schema.py KUBERAY_CHECKOUT/ray-operator/config/crd/bases VERSION

Descriptions go, and so do parts that the files in ``cluster/kuberay`` do not use. Objects take no other keys than
those that are left, so that a misspelt key is an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "data"
KINDS = {"rayjob": "RayJob", "raycluster": "RayCluster"}
UNUSED = {
    "clusterSelector", "deletionStrategy", "gcsFaultToleranceOptions", "headService", "headServiceAnnotations",
    "historyServerOptions", "ingressOptions", "networkPolicy", "scaleStrategy", "status",
    "submitterPodTemplate", "tlsOptions", "upgradeStrategy",
}  # fmt: skip
POD = {
    "containers", "imagePullSecrets", "nodeSelector", "priorityClassName", "restartPolicy", "securityContext",
    "serviceAccountName", "tolerations", "volumes",
}  # fmt: skip
CONTAINER = {
    "args", "command", "env", "image", "imagePullPolicy", "name", "ports", "resources", "securityContext",
    "volumeMounts", "workingDir",
}  # fmt: skip
VOLUME = {"configMap", "emptyDir", "name", "nfs", "persistentVolumeClaim", "secret"}
KEPT = ("type", "enum", "minimum", "maximum", "minLength", "maxLength", "pattern", "required")


def trim(node: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The part of an OpenAPI node that is kept, as draft 7."""
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: node[key] for key in KEPT if key in node}
    if "properties" in node:
        names = set(node["properties"]) - UNUSED
        # Pod, container and volume are recognised by what stands around them.
        if path[-2:] == ("template", "spec"):
            names &= POD
        elif path[-1:] == ("containers",):
            names &= CONTAINER
        elif path[-1:] == ("volumes",):
            names &= VOLUME
        out["properties"] = {name: trim(node["properties"][name], (*path, name)) for name in sorted(names)}
        out["required"] = [name for name in out.get("required", []) if name in names]
        out["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = trim(node["additionalProperties"], path)
    if "items" in node:
        out["items"] = trim(node["items"], path)
    return out


def schema(definition: dict[str, Any], version: str) -> dict[str, Any]:
    """The trimmed schema of one custom resource definition, version v1."""
    (v1,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    kind = definition["spec"]["names"]["kind"]
    out = trim(v1["schema"]["openAPIV3Schema"])
    # The API server knows the metadata of every object; the definition does not repeat it.
    text = {"type": "object", "additionalProperties": {"type": "string"}}
    names = {name: {"type": "string"} for name in ("name", "generateName", "namespace")}
    out["properties"]["metadata"] = {
        "type": "object",
        "properties": {**names, "labels": text, "annotations": text},
        "additionalProperties": False,
    }
    out["properties"]["apiVersion"] = {"const": f"ray.io/{v1['name']}"}
    out["properties"]["kind"] = {"const": kind}
    out["required"] = ["apiVersion", "kind", "metadata", "spec"]
    source = f"https://github.com/ray-project/kuberay, {version}, ray-operator/config/crd/bases"
    comment = f"{kind} of {source}; Apache License 2.0, trimmed by tests/kuberay_schema.py."
    return {"$schema": "http://json-schema.org/draft-07/schema#", "$comment": comment, **out}


def main(folder: Path, version: str) -> None:
    for name in KINDS:
        definition = yaml.load((folder / f"ray.io_{name}s.yaml").read_text(), yaml.CSafeLoader)
        text = json.dumps(schema(definition, version), separators=(",", ":"), sort_keys=True)
        (DATA / f"kuberay-{name}.schema.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
