"""Hosts that share no file system: all that a study makes goes through the store of objects, and nothing else does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from tests.conftest import FACTOR, SETTINGS, contents
from tests.hosts import OUTSIDE, Hosts, missing
from tests.s3 import ENVIRONMENT, s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ARRAYS = ("basis", "denoised", "detail", "measured", "overview", "stain", "uncertainty")


def test_hosts_with_only_a_store_in_common(phantom, tmp_path):
    """Workers that see neither the study's folder nor the measurement's: the bytes of one machine."""
    if why := missing():
        pytest.skip(f"no hosts on this machine: {why}")
    settings = [*SETTINGS, "tracking.uri=none", "model.tier=T2", "reconstruct.shard_px=64", "reconstruct.chunk_px=16"]
    hidden = [tmp_path, phantom.imzml.parent]
    with Hosts(workers=2, hidden=hidden) as hosts, s3_server(host=OUTSIDE) as s3:
        s3.files.put(str(phantom.slide), "s3://bucket/slide.tif")
        section = {"name": "one", "msi": str(phantom.imzml), "slide": "s3://bucket/slide.tif"}
        section["alignment"] = str(phantom.truth / "alignment.json")
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({"sections": [section]}))
        hosts.join({**ENVIRONMENT, "AWS_ENDPOINT_URL": s3.url})
        words = ["deepfere", "reconstruct", str(tmp_path / "study.yaml"), "--factor", str(FACTOR), *settings, "-o"]
        done = hosts.run(0, [*words, "s3://bucket/work"])
        assert done.returncode == 0, done.stdout + done.stderr
        # The same hosts, told to use a folder that the workers do not have, cannot.
        bare = hosts.run(0, [*words, str(tmp_path / "work")])
        assert bare.returncode in (1, 2), bare.stdout + bare.stderr
        found = "bucket/work/results/one.zarr"
        ours = {
            name.removeprefix(f"{found}/"): s3.files.cat_file(name)
            for part in ARRAYS
            for name in s3.files.find(f"{found}/{part}")
        }
    alone = [sys.executable, "-m", *words, str(tmp_path / "alone"), "ray.num_cpus=2"]
    with s3_server() as s3:
        s3.files.put(str(phantom.slide), "s3://bucket/slide.tif")
        done = subprocess.run(alone, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert ours == contents(tmp_path / "alone" / "results" / "one.zarr", *ARRAYS)
