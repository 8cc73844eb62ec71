"""One list of ions for all sections of a study, and what becomes of sections that cannot have it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

from deepfere.config import load_config
from deepfere.errors import InputError
from deepfere.measured.peaks import find_ions
from deepfere.measured.sampled import PeakSpec, load_sample, sample_centroids, sample_profiles, save_sample
from deepfere.measured.store import open_measured
from deepfere.section import load_study

from .imzml_bytes import write_pair

COMMON = (200.1, 350.2, 500.3, 900.4)
PROFILE = '<cvParam accession="MS:1000128" name="profile spectrum"/>'
NEGATIVE = '<cvParam accession="MS:1000129" name="negative scan"/>'
POSITIVE = '<cvParam accession="MS:1000130" name="positive scan"/>'
CENTROID = '<cvParam cvRef="MS" accession="MS:1000127" name="centroid spectrum"/>'


def spectra(mz, side=4, seed=0, scale=1.0, jitter_ppm=1.0):
    """Centroids of some m/z in side x side pixels."""
    rng = np.random.default_rng(seed)
    return [
        (
            x + 1,
            y + 1,
            sorted(m * (1 + jitter_ppm * 1e-6 * rng.uniform(-1, 1)) for m in mz),
            (scale * rng.uniform(5, 10, len(mz))).tolist(),
        )
        for y in range(side)
        for x in range(side)
    ]


@pytest.fixture
def study(tmp_path, cli):
    """Writes a manifest of sections (name -> m/z, or keywords of `write_pair`), and runs a stage on it."""
    (tmp_path / "in").mkdir()

    class Study:
        folder, work = tmp_path / "in", tmp_path / "work"
        manifest = tmp_path / "in" / "study.yaml"

        def write(self, **sections):
            for name, given in sections.items():
                write_pair(self.folder / f"{name}.imzML", **given)
            self.list(*sections)

        def list(self, *names, **more):
            rows = [{"name": n, "msi": f"{n}.imzML", **more.get(n, {})} for n in names]
            self.manifest.write_text(yaml.safe_dump({"sections": rows}))

        def ingest(self, *more, work=None):
            return cli("ingest", self.manifest, "-o", work or self.work, "--no-guide", *more)

        def measured(self, name, work=None):
            return open_measured((work or self.work) / "sections" / name / "measured.zarr")

        def markers(self):
            return {p.name: p.stat().st_mtime_ns for p in (self.work / "done").glob("*.json")}

    return Study()


def of(spectra, **more):
    return {"spectra": spectra, **more}


def test_sections_share_their_ions_whatever_their_order(study, tmp_path):
    study.write(
        a=of(spectra([*COMMON, 610.5], seed=1)),
        b=of(spectra(COMMON, side=5, seed=2, scale=1e-4)),
        c=of(spectra([*COMMON[:3], COMMON[3] * (1 + 1e-6)], seed=3)),
    )
    done = study.ingest()
    assert done.code == 0, done
    assert "note:" not in done.out and done.out.count("5 ions") == 3
    a, b, c = (study.measured(n) for n in "abc")
    np.testing.assert_allclose(a.mz, sorted([*COMMON, 610.5]), rtol=1.2e-6)
    for other in (b, c):
        np.testing.assert_array_equal(other.mz, a.mz)
        # Measured there, and nothing found: zero, not missing.
        assert (other.ion_image(610.5) == 0).all()
    assert (a.ion_image(610.5) > 0).all() and (b.ion_image(350.2) > 0).all()
    assert a.attrs["ions"] == "automatic" and a.attrs["peaks"]["sections"] == 3
    assert a.attrs["peaks"]["sampled_spectra"] == 16 + 25 + 16
    study.list("c", "a", "b")
    assert study.ingest(work=tmp_path / "turned").code == 0
    for name in "abc":
        here, there = study.measured(name), study.measured(name, tmp_path / "turned")
        np.testing.assert_array_equal(here.cube(), there.cube())
        assert here.mz.tolist() == there.mz.tolist() and here.attrs["peaks"] == there.attrs["peaks"]


def test_tiny_sections_find_together_what_none_finds_alone():
    rng = np.random.default_rng(0)
    sections = [[rng.uniform(600, 680, 4) for _ in range(4)] for _ in range(30)]
    for section in sections:
        section[0] = np.append(section[0], 640.0)
    samples = [sample_centroids([(mz, np.ones(len(mz))) for mz in s], PeakSpec()) for s in sections]
    assert all(len(find_ions(lambda s=s: [s], PeakSpec())) == 0 for s in samples[:5])
    np.testing.assert_allclose(find_ions(lambda: samples, PeakSpec()), [640.0], rtol=1e-6)


def test_an_ion_of_one_section_of_many_is_kept():
    samples = [
        sample_centroids([(np.array(COMMON), np.full(4, 100.0))] * 50, PeakSpec()),
        sample_centroids([(np.array([*COMMON, 950.0]), np.array([1.0, 1, 1, 1, 0.01]))] * 4, PeakSpec()),
    ] + [sample_centroids([(np.array(COMMON), np.full(4, 100.0))] * 200, PeakSpec()) for _ in range(3)]
    # 4 of 654 spectra, a millionth of the strongest ion; in its section, all spectra and a hundredth.
    found = find_ions(lambda: samples, PeakSpec())
    np.testing.assert_allclose(found, [*COMMON, 950.0], rtol=1e-6)
    assert find_ions(lambda: samples, PeakSpec(mz_range=(300.0, 940.0))).tolist() == found[1:4].tolist()


def test_samples_are_small_and_come_back_as_they_were(tmp_path):
    sample = sample_centroids([(m, v) for _, _, m, v in map(as_arrays, spectra(COMMON, side=30))], PeakSpec())
    save_sample(sample, tmp_path / "s.npz")
    assert (tmp_path / "s.npz").stat().st_size < 3000  # 900 spectra in four windows
    again = load_sample(tmp_path / "s.npz")
    assert again.spectra == 900 and again.mz_range == sample.mz_range
    for name in ("at", "hits", "total", "moment", "high"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sample, name))


def as_arrays(spectrum):
    x, y, mz, values = spectrum
    return x, y, np.asarray(mz), np.asarray(values)


def profile(axis, peaks, seed):
    rng = np.random.default_rng(seed)
    y = rng.random(len(axis)) * 0.02
    for mz, height in peaks:
        y = y + height * np.exp(-0.5 * ((axis / mz - 1) / 2e-5) ** 2)
    return y


def test_profiles_of_sections_on_different_axes():
    coarse = 300 * np.exp(np.arange(9000) * 12e-6)
    fine = 299.9 * np.exp(np.arange(16000) * 8e-6)
    spec = PeakSpec(tolerance_ppm=40)
    # The second ion stands out in one weak section alone.
    sections = [
        [(coarse, profile(coarse, [(310.0, 50), (330.0, 20)], k)) for k in range(9)],
        [(fine, 1e-3 * profile(fine, [(310.0, 50), (320.0, 30)], k)) for k in range(4)],
    ]
    samples = [sample_profiles(lambda s=s: s, spec) for s in sections]
    for order in (samples, samples[::-1]):
        np.testing.assert_allclose(find_ions(lambda o=order: o, spec), [310.0, 320.0, 330.0], rtol=4e-6)


def test_an_ion_beyond_what_a_section_measured_is_refused(study):
    study.write(wide=of(spectra([*COMMON, 950.0], seed=1)), narrow=of(spectra(COMMON[:3], seed=2)))
    done = study.ingest()
    assert done.code == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "section narrow, sample" in line and "2 of the study's 5 ions, first 900.4, lie outside" in line
    assert "mz_range" in line and not (study.work / "sections" / "wide" / "measured.zarr").exists()
    # Left out of the study:
    assert study.ingest("ingest.mz_range=[100,800]").out.count("3 ions") == 2
    # Or the manifest says that they were measured there: the section failed, so that it may be mended.
    study.list("wide", "narrow", narrow={"mz_range": [100, 1000]})
    refused = study.ingest()
    assert refused.code == 2 and "other inputs or settings" in refused.err  # all is done by now
    shutil.rmtree(study.work)
    assert study.ingest().code == 0
    assert (study.measured("narrow").ion_image(950.0) == 0).all()


def test_the_range_in_a_table_and_ranges_that_are_none(tmp_path):
    (tmp_path / "s.csv").write_text('name,msi,mz_range\na,a.imzML,"100,1000"\nb,b.imzML,\n')
    assert [s.mz_range for s in load_study(tmp_path / "s.csv").sections] == [(100.0, 1000.0), None]
    (tmp_path / "s.csv").write_text('name,msi,mz_range\na,a.imzML,"1000,100"\n')
    with pytest.raises(InputError, match="1000 to 100 is no range of m/z"):
        load_study(tmp_path / "s.csv")
    with pytest.raises(InputError, match="no range of m/z"):
        load_config(None, ["ingest.mz_range=[5,5]"])


def test_a_mended_section_is_gone_on_with_and_nothing_else_is_done_again(study):
    study.write(a=of(spectra(COMMON, seed=1)), b=of(spectra(COMMON, seed=2)), c=of(spectra(COMMON, seed=3)))
    whole = (study.folder / "b.ibd").read_bytes()
    (study.folder / "b.ibd").write_bytes(whole[:-100])
    done = study.ingest()
    assert done.code == 2 and "section b, look" in done.err and "copy the .ibd again" in done.err
    assert "1 of 3 sections failed; the ions are common" in done.err
    before = study.markers()
    assert {"sample-a.json", "sample-c.json"} <= set(before) and "ions.json" not in before
    # Not mended, and a section that did not fail is another one.
    other = (study.folder / "a.ibd").read_bytes()
    write_pair(study.folder / "a.imzML", spectra(COMMON, seed=9))
    assert "other inputs or settings" in study.ingest().err
    (study.folder / "a.ibd").write_bytes(other)
    write_pair(study.folder / "b.imzML", spectra(COMMON, seed=2))
    write_pair(study.folder / "a.imzML", spectra(COMMON, seed=1))
    assert study.ingest().code == 0
    after = study.markers()
    assert {k: after[k] for k in before} == before and "ingest-b.json" in after
    # One more section is another study.
    write_pair(study.folder / "d.imzML", spectra(COMMON, seed=4))
    study.list(*"abcd")
    assert "other inputs or settings" in study.ingest().err
    done = study.ingest("--overwrite")
    assert done.code == 0 and study.measured("a").attrs["peaks"]["sections"] == 4


def test_a_section_that_failed_may_be_taken_out(study):
    study.write(a=of(spectra(COMMON, seed=1)), b=of(spectra(COMMON, seed=2)), c=of(spectra(COMMON, seed=3)))
    (study.folder / "c.ibd").write_bytes(b"short")
    assert study.ingest().code == 2
    study.list("a", "b")
    assert study.ingest().code == 0 and study.measured("a").attrs["peaks"]["sections"] == 2


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"spectrum_type": PROFILE}, "centroid (a) and profile (b)"),
        ({"spectrum_type": CENTROID + NEGATIVE}, "positive (a) and negative (b)"),
    ],
)
@pytest.mark.parametrize("ions", ["automatic", "list", "axis"])
def test_sections_without_a_common_quantity_are_refused(study, given, why, ions):
    kind = {"mode": "continuous"} if ions == "axis" else {}
    rows = [(x, y, list(COMMON), [1.0 + x, 2, 3, y]) for x in (1, 2) for y in (1, 2)] if kind else spectra(COMMON)
    study.write(a=of(rows, spectrum_type=CENTROID + POSITIVE, **kind), b=of(rows, **given, **kind))
    done = study.ingest(*([f"ingest.mz={list(COMMON)}"] if ions == "list" else []))
    assert done.code == 2 and why in done.err, done


def test_an_ingested_section_brings_its_ions_or_is_refused(study):
    study.write(a=of(spectra(COMMON, seed=1)), b=of(spectra(COMMON, seed=2)))
    assert study.ingest().code == 0
    shutil.copytree(study.work / "sections" / "a" / "measured.zarr", study.folder / "a.zarr")
    study.list("a", "b", a={"msi": "a.zarr"})
    done = study.ingest(work=study.folder / "again")
    assert done.code == 2 and "section a, sample" in done.err and "is ingested: its ions were settled then" in done.err
    shutil.copytree(study.work / "sections" / "b" / "measured.zarr", study.folder / "b.zarr")
    study.list("a", "b", a={"msi": "a.zarr"}, b={"msi": "b.zarr"})
    done = study.ingest(work=study.folder / "third")
    assert done.code == 0 and done.out.count("4 ions") == 2


def test_axes_that_agree_are_kept_and_others_become_peaks(study):
    rows = [(x, y, list(COMMON), [1.0 + x, 2, 3, 0]) for x in (1, 2) for y in (1, 2)]
    study.write(a=of(rows, mode="continuous"), b=of(rows, mode="continuous"))
    assert study.ingest().code == 0
    assert study.measured("a").attrs["ions"] == "axis" and not (study.work / "done" / "sample-a.json").exists()
    shutil.rmtree(study.work)
    other = [(x, y, list(COMMON[:3]), v[:3]) for x, y, _, v in rows]
    study.write(a=of(rows, mode="continuous"), b=of(other, mode="continuous"))
    assert study.ingest().code == 0
    for name in "ab":
        measured = study.measured(name)
        assert measured.attrs["ions"] == "automatic"
        # The fourth is zero in every pixel: no ion.
        np.testing.assert_allclose(measured.mz, COMMON[:3], rtol=1e-7)
        np.testing.assert_allclose(measured.cube()[:, 0, 1], [3, 2, 3])


def test_what_is_to_be_said_of_a_file_is_said_once(study, recwarn):
    study.write(a=of(spectra(COMMON, seed=1), uuid=bytes(16)), b=of(spectra(COMMON, seed=2)))
    done = study.ingest()
    assert done.code == 0 and not [w for w in recwarn if "identifier" in str(w.message)]
    assert (done.out + done.err).count("a.ibd does not begin with the identifier") == 1


def test_failures_of_the_machine_and_of_the_input_are_told_apart(study, monkeypatch):
    import deepfere.pipeline.sections as module

    study.write(a=of(spectra(COMMON, seed=1)), b=of(spectra(COMMON, seed=2)), c=of(spectra(COMMON, seed=3)))
    ingest = module.ingest_stage

    def fails(section, *rest):
        if section.name == "b":
            raise RuntimeError("the disk controller caught fire")
        ingest(section, *rest)

    monkeypatch.setattr(module, "ingest_stage", fails)
    done = study.ingest("ingest.mz=[200.1,350.2]")
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("failed: ")]
    assert "section b, ingest: RuntimeError: the disk controller caught fire" in line
    assert "in fails" in (study.work / "sections" / "b" / "failure.log").read_text()
    assert "1 of 3 sections failed; the others are done" in done.err
    assert study.measured("c").mz.tolist() == [200.1, 350.2]
    monkeypatch.setattr(module, "ingest_stage", ingest)
    before = study.markers()
    assert study.ingest("ingest.mz=[200.1,350.2]").code == 0
    after = study.markers()
    assert {k: after[k] for k in before} == before and set(after) - set(before) == {"ingest-b.json"}
    assert json.loads((study.work / "identity.json").read_text())["failed"] == []
