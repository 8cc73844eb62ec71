"""`deepfere doctor`: what it says of this machine, and of one where something is missing."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from deepfere import doctor
from deepfere.doctor import Check, machine, ray_session


def test_this_machine(tmp_path):
    seen = []
    checks = doctor.diagnose(check_ray=False, tracking_uri=f"sqlite:///{tmp_path}/t.db", on_check=seen.append)
    status = {check.name: check.status for check in checks}
    assert seen == checks and "ray" not in status
    for name in ("python", "packages", "openslide", "codecs", "zarr", "mlflow"):
        assert status[name] == "ok", [c for c in checks if c.name == name]
    assert not (tmp_path / "t.db").exists()
    assert all(check.remedy for check in checks if check.status != "ok")


def test_minimums_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    stated = dict(line.split(">=") for line in project["dependencies"])
    assert {name.partition("[")[0]: least for name, least in stated.items()} == machine.MINIMUMS
    assert project["requires-python"] == ">=" + ".".join(map(str, machine.PYTHON))


def test_versions_are_compared_as_numbers():
    assert not machine._older("3.10.1", "3.9") and machine._older("2.9.0", "2.60")
    assert not machine._older("2.9.0+cu128", "2.9") and not machine._older("6", "6.0.0")
    assert machine._older("4.0.0", "4.0.1")
    found = machine.packages({"numpy": "9999.1", "no-such-package-at-all": "1", "scipy": "1.0"})
    assert found.status == "fail" and "needs 9999.1" in found.detail and "is missing" in found.detail
    assert "scipy" not in found.detail


def test_what_breaks_is_found(monkeypatch, tmp_path):
    import imagecodecs
    import openslide
    import psutil

    monkeypatch.setattr(openslide, "__library_version__", "4.0.0")
    monkeypatch.setattr(imagecodecs, "jpeg_decode", lambda data: np.zeros((64, 48, 3), np.uint8))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: 1 / 0)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: machine.shutil._ntuple_diskusage(1, 1, 5 << 30))
    monkeypatch.setattr(
        machine.tempfile, "TemporaryDirectory", lambda **k: (_ for _ in ()).throw(ImportError("no zarr"))
    )
    checks = {c.name: c for c in doctor.diagnose(check_ray=False, tracking_uri=str(tmp_path))}
    assert checks["openslide"].status == "fail" and "4.0.1" in checks["openslide"].remedy
    assert checks["codecs"].status == "fail" and "jpeg is off" in checks["codecs"].detail
    assert checks["memory"].status == "fail" and "ZeroDivisionError" in checks["memory"].detail
    assert checks["disk, here"].status == "warn" and "5.0 GiB" in checks["disk, here"].detail
    assert checks["zarr"].status == "fail" and "requirements" in checks["zarr"].remedy
    assert checks["mlflow"].status == "fail" and "folder" in checks["mlflow"].detail
    assert not doctor.is_fit(checks.values())


def test_gpu_is_named_or_its_absence_told(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = machine.torch()
    assert found.status == "warn" and "does not see" in found.detail


def test_mlflow_store_that_exists(tmp_path):
    from deepfere.training.mlflow_store import connect

    (tmp_path / "torn.db").write_text("not a database")
    torn = machine.mlflow(f"sqlite:///{tmp_path}/torn.db")
    assert torn.status == "fail" and "not a database" in torn.detail and "tracking.uri=none" in torn.remedy
    uri = f"sqlite:///{tmp_path}/t.db"
    connect(uri)
    assert machine.mlflow(uri) == Check("mlflow", "ok", f"{uri} answers")
    assert machine.mlflow("none").detail == "tracking is off"


def test_ray_that_does_not_answer():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found = ray_session.try_ray(address, 30.0)
    assert found.status == "fail" and address in found.detail
    found = ray_session.try_ray(None, 0.3) if not ray_session.os.environ.get("RAY_ADDRESS") else None
    assert found is None or (found.status == "fail" and "0.3 s" in found.detail)


def test_cluster_nodes_are_compared_with_this_one():
    found = {
        "ray": "2.60.0",
        "resources": {"CPU": 64.0, "GPU": 2.0, "memory": 2.0**34},
        "nodes": ["10.0.0.1", "10.0.0.2"],
    }
    ours = [ray_session.platform.python_version(), "1.0"]
    good = ray_session._judge_ray({**found, "answers": [ours, ours]}, "cluster at x", "x", "1.0")
    assert good.status == "ok" and "2 nodes, 64 CPU, 2 GPU, 16.0 GiB memory" in good.detail
    odd = ray_session._judge_ray({**found, "answers": [ours, ["3.9.1", "1.0"]]}, "cluster at x", "x", "1.0")
    assert odd.status == "fail" and "10.0.0.2 has Python 3.9.1" in odd.detail and "10.0.0.1" not in odd.detail


@pytest.mark.ray
def test_ray_starts_here(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = ray_session.try_ray(None, 120.0)
    assert found.status == "ok", found


def test_render_of_checks():
    checks = [Check("a", "ok", "fine"), Check("long", "fail", "broken", "mend it")]
    assert doctor.render(checks).splitlines() == [
        "ok    a     fine",
        "fail  long  broken",
        "            mend it",
        "not fit: 1 ok, 0 to improve, 1 failed",
    ]
    assert doctor.render(checks[:1]).endswith("fit: 1 ok, 0 to improve, 0 failed")
