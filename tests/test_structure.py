"""The rules of the house that a machine can check: what loads what, and what is done in one place only."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import deepfere

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("deepfere", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
MODEL = [f"deepfere.model.{module.name}" for module in pkgutil.iter_modules([str(ROOT / "deepfere" / "model")])]


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def called(path: Path) -> list[str]:
    """Dotted names of what a file calls."""
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_the_package_is_light():
    assert Path(deepfere.__file__).parent == ROOT / "deepfere"
    heavy = {"ray", "torch", "zarr", "dask", "mlflow", "openslide", "pandas", "scipy", "numpy", "matplotlib"}
    assert loaded("import deepfere") & heavy == set()


def test_help_is_light():
    assert loaded("import deepfere.cli") & {"ray", "torch", "zarr", "dask", "mlflow", "pandas"} == set()


def test_the_model_needs_no_pipeline():
    """All of it at once; what a single module loads is less."""
    assert len(MODEL) > 10
    found = loaded("import " + ", ".join(MODEL))
    assert "torch" in found
    assert found & {"ray", "zarr", "openslide", "dask", "mlflow"} == set()


@pytest.mark.parametrize("module", ["deepfere.tiling.plan", "deepfere.section", "deepfere.frame", "deepfere.config"])
def test_planning_needs_no_engine(module):
    assert loaded(f"import {module}") & {"ray", "zarr"} == set()


def test_readers_and_measurement_need_no_engine():
    found = loaded("import deepfere.readers.imzml, deepfere.readers.slide, deepfere.measured.ingest")
    assert found & {"ray", "torch"} == set()


def test_one_module_starts_ray():
    # The benchmark's arm also runs in a peer's environment, where there is no deepfere.
    assert [path.name for path in SOURCES if "ray.init" in called(path)] == ["tiling_arm.py", "cluster.py"]


def test_one_module_opens_stores():
    names = {"zarr.open", "zarr.open_group", "zarr.open_array", "zarr.create", "zarr.group", "zarr.create_group"}
    found = {str(path.relative_to(ROOT)) for path in SOURCES if names & set(called(path))}
    # The benchmark's other arm has nothing of deepfere in it.
    assert found == {"deepfere/store.py", "benchmarks/pyramid.py"}
