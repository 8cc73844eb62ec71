"""Sections of a study prepared side by side by workers: the same as one after another in the driver."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from deepfere.config import load_config
from deepfere.measured.store import open_measured
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.side_by_side import SectionWorker, SideBySide, Together
from deepfere.pipeline.workspace import Workspace
from deepfere.section import make_section


class Noting(SectionWorker):
    """Says how far it is."""

    stage = "note"

    def do(self, section, inputs, progress):
        progress("note", 0.5)


def side_by_side(root: str, names: list[str], **settings: object) -> SideBySide:
    work = Workspace(root)
    return SideBySide(work, load_config(None, **settings), Failures(names, work))


@pytest.mark.parametrize(
    ("root", "names", "settings", "files", "in_driver"),
    [
        ("/somewhere/work", ["a", "b"], {}, "", False),
        ("/somewhere/work", ["a"], {}, "", True),  # it tells how far it is
        ("/somewhere/work", ["a", "b"], {"guide": False}, "", True),  # nothing there needs Ray
        ("s3://bucket/work", ["a", "b"], {}, "", True),  # the files may be on the driver's disk alone
        ("s3://bucket/work", ["a", "b"], {}, "s3://bucket/", False),
    ],
)
def test_where_a_stage_is_carried_out(root, names, settings, files, in_driver):
    told = []
    beside = side_by_side(root, names, **settings)
    section = make_section(name="a", msi=f"{files}a.imzML", slide=f"{files}a.svs")
    phases = list(beside.stage(Noting, section, {}, lambda stage, share: told.append((stage, share))))
    assert told == ([("note", 0.5)] if in_driver else [])
    assert [phase.count for phase in phases] == ([] if in_driver else [1])


def test_progress_of_many_is_one():
    told = []
    together = Together(lambda stage, share: told.append(share), 2)
    one, two = together.of("one"), together.of("two")
    one("prepare", 0.5)
    two("prepare", 0.5)
    together.end("one")
    two("prepare", 1.0)
    assert told == [0.25, 0.5, 1.0]


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_workers_find_what_the_driver_finds(phantom, tmp_path, cli, ray_session):
    """Cube and searched alignment of a section alone, and of the same one twice."""

    def align(*names: str) -> list[tuple[np.ndarray, dict]]:
        rows = [{"name": name, "msi": str(phantom.imzml), "slide": str(phantom.slide)} for name in names]
        manifest = tmp_path / "study.yaml"
        manifest.write_text(yaml.safe_dump({"sections": rows}))
        work = tmp_path / f"work-{len(names)}"
        done = cli("align", manifest, "-o", work, "--factor", 4, "tracking.uri=none")
        assert done.code == 0, done
        assert [line.split(":")[0] for line in done.out.splitlines()] == list(names)
        folders = [work / "sections" / name for name in names]
        return [
            (open_measured(f / "measured.zarr").cube(), json.loads((f / "alignment.json").read_text())) for f in folders
        ]

    (alone,) = align("a")
    for cube, alignment in align("a", "b"):
        np.testing.assert_array_equal(cube, alone[0])
        assert alignment == alone[1]
