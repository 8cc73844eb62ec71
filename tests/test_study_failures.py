"""A study goes on where one of its sections cannot: damaged slides, placements that are refused, missing files."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from deepfere.errors import InputError, SectionFailures
from deepfere.frame import Alignment
from deepfere.measured.store import open_measured
from deepfere.pipeline.study import run_stage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def study(phantom, tmp_path, cli, ray_session):
    """A phantom four times, placed by hand: one on a damaged slide, one placed beside its slide."""
    truth = Alignment.load(phantom.truth / "alignment.json")
    truth.save(tmp_path / "right.json")
    Alignment(truth.matrix, truth.offset_um + [90_000.0, 0.0]).save(tmp_path / "beside.json")
    (tmp_path / "damaged.tiff").write_bytes(phantom.slide.read_bytes()[-5000:])
    right = {"msi": str(phantom.imzml), "slide": str(phantom.slide), "alignment": "right.json"}

    class Study:
        manifest, work, whole = tmp_path / "study.yaml", tmp_path / "work", right

        def write(self, **sections):
            rows = [{"name": name, **right, **other} for name, other in sections.items()]
            self.manifest.write_text(yaml.safe_dump({"sections": rows}))

        def run(self, stage, *more):
            return cli(stage, self.manifest, "-o", self.work, "--factor", 4, "tracking.uri=none", *more)

        def made(self, stage):
            return sorted(p.stem.removeprefix(f"{stage}-") for p in (self.work / "done").glob(f"{stage}-*.json"))

    return Study()


def test_the_others_go_on_and_each_failure_is_one_line(study):
    study.write(a={}, b={"slide": "damaged.tiff"}, c={"alignment": "beside.json"}, d={})
    done = study.run("align")
    assert done.code == 2, done
    errors = [line for line in done.err.splitlines() if line.startswith(("error: ", "failed: "))]
    assert len(errors) == 2
    assert errors[0].startswith("error: section b, ingest: ") and "damaged.tiff" in errors[0]
    assert errors[1].startswith("error: section c, align: ") and "covers 0 % of the measured tissue" in errors[1]
    assert "2 of 4 sections failed; the others are done; the same command again goes on" in done.err
    assert study.made("align") == ["a", "d"] and study.made("ingest") == ["a", "c", "d"]
    before = {p.name: p.stat().st_mtime_ns for p in (study.work / "done").glob("*.json")}
    # Learning takes all of them: what can be prepared is, and then it stops.
    done = study.run("train")
    assert done.code == 2 and "learning takes all of them: mend or remove these" in done.err
    # Mended: the slide is another one, the placement too. What was done stays.
    study.write(a={}, b={}, c={}, d={})
    done = study.run("align")
    assert done.code == 0, done
    after = {p.name: p.stat().st_mtime_ns for p in (study.work / "done").glob("*.json")}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) >= {"align-b.json", "align-c.json", "ingest-b.json"}
    assert study.made("align") == ["a", "b", "c", "d"]


def test_all_missing_files_are_told_before_anything_is_begun(study):
    study.write(a={}, b={"slide": "gone.svs"}, c={"msi": "gone.imzML"})
    done = study.run("ingest")
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 2 and not study.work.exists()
    assert "section b, input: " in errors[0] and "gone.svs" in errors[0]
    assert "section c, input: " in errors[1] and "gone.imzML" in errors[1]
    assert "2 of 3 sections failed; nothing was begun" in done.err


@pytest.mark.long
def test_a_failure_that_is_not_the_inputs_makes_it_exit_1(study):
    """One section's work cannot be written: something stands where its folder is to be."""
    study.write(a={}, b={"slide": "damaged.tiff"}, c={})
    assert study.run("ingest").code == 2
    ions = f"ingest.mz={open_measured(study.work / 'sections' / 'a' / 'measured.zarr').mz[:2].tolist()}"
    shutil.rmtree(study.work)
    assert study.run("ingest", ions).code == 2 and study.made("ingest") == ["a", "c"]
    folder = study.work / "sections" / "c"
    shutil.rmtree(folder)
    folder.write_text("in the way")
    (study.work / "done" / "ingest-c.json").unlink()
    with pytest.raises(SectionFailures) as caught:
        settings = ["tracking.uri=none", ions]
        run_stage("ingest", study.manifest, study.work, overrides=settings, factor=4, progress=lambda *_: None)
    assert not caught.value.all_input and [f[0] for f in caught.value.found] == ["b", "c"]
    assert isinstance(caught.value.found[0][2], InputError)
    assert "section c, ingest: " in caught.value.lines[1] and "Not a directory" in caught.value.lines[1]
    assert json.loads((study.work / "identity.json").read_text())["failed"] == ["b", "c"]
    done = study.run("ingest", ions)
    assert done.code == 1 and done.err.count("failed: ") == 1 and done.err.count("error: ") == 1


def test_a_study_that_can_do_nothing_leaves_nothing(study, tmp_path):
    for name in ("one", "two"):
        shutil.copy(study.whole["msi"], tmp_path / f"{name}.imzML")
        (tmp_path / f"{name}.ibd").write_bytes(b"not much")
    study.write(a={"msi": "one.imzML"}, b={"msi": "two.imzML"})
    done = study.run("ingest")
    assert done.code == 2 and done.err.count("error: section ") == 2 and not study.work.exists()
