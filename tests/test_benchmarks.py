from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


common = load("common")


@pytest.mark.parametrize(
    ("value", "baseline", "must", "expected"),
    [
        (1e-6, None, "<= 1e-5", True),
        (2e-5, None, "<= 1e-5", False),
        (1e-5, None, "<= 1e-5", True),
        (3.0, None, "< 3", False),
        (0.98, None, ">= 0.98", True),
        (20.1, 20.0, "> baseline", True),
        (20.0, 20.0, "> baseline", False),
        (20.0, 20.0, ">= baseline", True),
        (19.96, 20.0, ">= baseline - 0.05", True),
        (19.94, 20.0, ">= baseline - 0.05", False),
        (20.04, 20.0, "> baseline + 0.05", False),
        (20.04, 20.0, "within 0.05 of baseline", True),
        (19.96, 20.0, "within 0.05 of baseline", True),
        (20.06, 20.0, "within 0.05 of baseline", False),
        (19.94, 20.0, "within 0.05 of baseline", False),
        (-1e9, None, "", True),
    ],
)
def test_musts(value: float, baseline: float | None, must: str, expected: bool) -> None:
    assert common.met(value, baseline, must) is expected


@pytest.mark.parametrize("must", ["<= 1", ">= 0", "> baseline", "within 1 of baseline", "< baseline + 5"])
def test_nan_meets_no_must(must: str) -> None:
    assert not common.met(float("nan"), 0.0, must)


@pytest.mark.parametrize("must", ["good", "<=", "== 3", "within 0.05", "within baseline", "<= 1 baseline", "3"])
def test_unreadable_musts_are_refused(must: str) -> None:
    with pytest.raises(ValueError, match="must"):
        common.met(1.0, 1.0, must)


def test_a_must_against_a_missing_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a baseline"):
        common.met(1.0, None, "> baseline")


def test_row_fills_in_ratio_and_verdict() -> None:
    row = common.Row.of("psnr", 21.0, "no-guide", 20.0, "> baseline")
    assert row.ratio == pytest.approx(1.05)
    assert row.ok
    assert common.Row.of("psnr", 19.0, "no-guide", 20.0, "> baseline").ok is False
    assert common.Row.of("gain", 1.0, "nothing", 0.0).ratio is None
    assert common.Row.of("seconds", 3.0).ratio is None


def test_signed_has_no_negative_zero() -> None:
    assert [common.signed(v, 2) for v in (0.125, -1.0, -0.004, 0.0)] == ["+0.12", "-1.00", "0.00", "0.00"]


def test_table_lines_up() -> None:
    lines = common.table("title", ["name", "value"], [["a", "1.0"], ["longer", None], ["b", "-10.25"]]).splitlines()
    assert lines[0] == "title"
    assert lines[1] == "name     value"
    assert lines[3] == "a          1.0"
    assert lines[4] == "longer"
    assert lines[5] == "b       -10.25"


def test_json_holds_what_the_contract_says(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    rows = [
        common.Row.of("gain", 2.0, "no-guide", 1.0, "> baseline"),
        common.Row.of("refused", float("nan")),
        common.Row.of("equal images", float("inf")),
    ]
    assert common.finish(rows, str(file)) == 0

    def strict(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(file.read_text(), parse_constant=strict)
    assert set(found) == {"machine", "rows"}
    assert {"cpu", "cores", "memory_bytes", "versions"} <= set(found["machine"])
    assert found["machine"]["versions"]["numpy"] != "absent"
    first, refused, equal = found["rows"]
    assert first == {
        "what": "gain",
        "value": 2.0,
        "against": "no-guide",
        "baseline": 1.0,
        "ratio": 2.0,
        "must": "> baseline",
        "ok": True,
    }
    assert refused["value"] is None and equal["value"] is None


def test_a_missed_must_gives_exit_code_one_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [common.Row.of("fine", 1.0, must="<= 2"), common.Row.of("consistency", 3.0, must="<= 2")]
    assert common.finish(rows) == 1
    shown = capsys.readouterr()
    line = next(text for text in shown.out.splitlines() if text.startswith("consistency"))
    assert line.endswith("MISSED")
    assert "1 of 2 musts missed" in shown.err
    assert common.finish(rows[:1]) == 0


def test_command_line() -> None:
    given = common.parser("text", ["a", "b"]).parse_args(["a", "--quick", "--json", "x.json"])
    assert (given.cases, given.quick, given.json) == (["a"], True, "x.json")
    assert common.parser("text", ["a"]).parse_args([]).cases == []


def test_unknown_cases_are_refused_before_work_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    fidelity = load("fidelity")
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(["nonsense"])
    assert stopped.value.code == 2
    assert "unknown case 'nonsense'; known: phantom, bladder, deepfere-example" in capsys.readouterr().err


def test_absent_real_data_end_with_code_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("DEEPFERE_REAL_DATA", str(tmp_path / "nowhere"))
    fidelity = load("fidelity")
    assert fidelity.main(["bladder"]) == 2
    assert "absent" in capsys.readouterr().err


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' modules find each other."""
    monkeypatch.syspath_prepend(str(FOLDER))


def finished_run(**changes: object) -> dict[str, object]:
    """What `fidelity.py --json` holds, with made-up figures."""
    row = {"value": 24.5, "against": "no-guide", "baseline": 20.0, "ratio": 1.2, "must": "> baseline", "ok": True}
    rows = [
        {"what": "made-up: first", **row},
        {"what": "made-up: second", **row, "value": 19.25, "ok": False},
        {"what": "made-up: for information", **row, "value": None, "must": ""},
    ]
    table = {
        "title": "made-up table",
        "header": ["", "gain | dB", "r"],
        "rows": [["auto †", "+1.23", ""], ["no-guide", "", "0.5"]],
        "notes": ["made-up note"],
        "long": False,
    }
    case = {
        "tables": [table, {**table, "title": "made-up long table", "long": True}],
        "overview": {
            "made-up, dB": {"auto": 1.234, "nearest": -0.5, "PLS": 1.3, "paper": 1.4, "oracle": 9.0},
            "made-up, mean r": {"auto": 0.01234},
        },
        "figures": [row["what"] for row in rows],
    }
    machine = {"cpu": "A", "cores": 2, "memory_bytes": 2**34, "system": "S", "python": "3", "versions": {"numpy": "2"}}
    run = {"machine": machine, "date": "2001-02-03", "quick": False, "cases": {"phantom": case}, "left_out": []}
    return {**run, "rows": rows, **changes}


@pytest.mark.usefixtures("programs")
def test_the_page_holds_what_the_json_holds() -> None:
    text = load("page").page([finished_run(left_out=["bladder"])])
    lines = text.splitlines()
    assert "| **auto** | **+1.23** | **+0.012** |" in lines
    assert "| nearest | -0.50 |  |" in lines
    assert "| **auto †** | **+1.23** |  |" in lines
    assert "|  | gain \\| dB | r |" in lines
    assert "| made-up: first | 24.5 | no-guide 20 | > baseline | met |" in lines
    assert "| made-up: second | 19.25 | no-guide 20 | > baseline | **missed** |" in lines
    assert "1 of 2 met. The program ends with 1 where one is missed." in lines
    assert "- made-up note" in lines
    assert "2001-02-03, 2 cores of A, 16 GiB" in text
    assert "made-up long table" not in text and "for information" not in text
    assert "data were absent: bladder." in text
    # Only what was run is described.
    assert "| `nearest` |" in text and "| `ridge` |" not in text
    # A baseline that is ahead is named, the published model as one of them; a ceiling is none.
    assert "- made-up, dB: `paper`, `PLS`" in lines


@pytest.mark.usefixtures("programs")
def test_of_two_runs_of_a_case_the_later_counts() -> None:
    old, new = finished_run(), finished_run()
    new["rows"] = [dict(row, value=77.0) for row in new["rows"]]
    text = load("page").page([old, new])
    assert "77" in text and "19.25" not in text
    assert "data were absent" not in text


@pytest.mark.usefixtures("programs")
def test_the_page_comes_from_stored_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, target = tmp_path / "a.json", tmp_path / "page.md"
    stored.write_text(json.dumps(finished_run()))
    fidelity = load("fidelity")
    assert fidelity.main(["--write-docs", str(target), "--from", str(stored)]) == 0
    assert target.read_text() == load("page").page([finished_run()])
    for bad in (json.dumps(finished_run(quick=True)), json.dumps({"machine": {}, "rows": []}), "[]", "no json"):
        stored.write_text(bad)
        target.unlink(missing_ok=True)
        assert fidelity.main(["--write-docs", str(target), "--from", str(stored)]) == 2
        assert not target.exists() and str(stored) in capsys.readouterr().err
    for wrong in (["--write-docs", "--quick"], ["--from", str(stored)], ["phantom", "--write-docs", "--from", "x"]):
        with pytest.raises(SystemExit):
            fidelity.main(wrong)


@pytest.mark.usefixtures("programs")
def test_methods_are_either_a_function_or_a_run_and_have_a_name_of_their_own() -> None:
    methods = load("methods")
    assert all((m.images is None) != (m.settings is None) for m in methods.METHODS)
    assert len({m.name for m in methods.ROWS}) == len(methods.ROWS)
    assert {"no-guide", "T1", "auto"} <= {m.name for m in methods.METHODS if m.settings is not None}
    assert {"guided filter", "ridge", "T1", "oracle", "paper"} <= methods.STAINED
    assert not {"nearest", "P", "no-guide"} & methods.STAINED


@pytest.fixture
def kept_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A case of two ions, an image of the second that fits it, and a result at the alignment that it was made at."""
    import numpy as np

    from deepfere.frame import Alignment, SectionGrid
    from deepfere.measured.writer import write_measured

    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "kept", raising=False)
    kept = load("kept")
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "kept")
    kept.FOLDER.mkdir()
    one = kept.Published("invented", 200.0, 8)
    monkeypatch.setattr(kept, "PUBLISHED", {one.case: one})
    rng, slide = np.random.default_rng(0), tmp_path / "slide.png"
    slide.write_bytes(b"a picture")
    cube = rng.random((2, 3, 4), np.float32)
    write_measured(tmp_path / "msi.zarr", cube, None, [100.0, 200.0], 50.0)
    whole = np.ones((6, 8), bool)
    case = SimpleNamespace(
        name="invented",
        msi=tmp_path / "msi.zarr",
        slide=slide,
        slide_mpp_um=2.0,
        factor=2,
        truth=np.zeros((2, 6, 8)),
        mz=np.array([100.0, 200.0]),
        inside=whole,
    )
    place = Alignment.identity()
    result = SimpleNamespace(alignment=place, grid=SectionGrid((3, 4), (50.0, 50.0)), mask=np.ones((3, 4), bool))
    image = rng.random((6, 8)).astype(np.float32)
    np.save(one.image, image)
    about = {
        "hash": kept.hash_of(case, one, kept.preset(), place),
        "alignment": place.to_dict(),
        "date": "2001-02-03",
        "mz": one.mz,
        "pixels": [24, 32],
        "threads": 1,
        "model": {"notes": {"iterations": 500}},
        "seconds": {"learn": 600.0},
        "consistency": 0.123,
    }
    one.about.write_text(json.dumps(about))
    return SimpleNamespace(kept=kept, case=case, one=one, result=result, image=image)


def test_a_kept_image_stands_for_its_ion_alone(kept_case) -> None:
    import numpy as np

    images, note = kept_case.kept.kept_image(kept_case.case, kept_case.result)
    assert np.isnan(images[0]).all() and np.array_equal(images[1], kept_case.image)
    assert "2001-02-03" in note and "500 iterations in 10 min" in note and "24 x 32" in note and "12 %" in note


def test_a_kept_image_of_something_else_is_not_used(kept_case, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from deepfere.measured.store import open_measured
    from deepfere.measured.writer import write_measured

    kept, case, one = kept_case.kept, kept_case.case, kept_case.one

    def refused(word: str) -> bool:
        images, note = kept.kept_image(case, kept_case.result)
        return images is None and word in note and "--recompute-paper" in note

    assert not refused("")
    # Another slide, another measurement, another preset, other code, another magnification, another place.
    case.slide.write_bytes(b"another picture")
    assert refused("stale")
    case.slide.write_bytes(b"a picture")
    cube = open_measured(case.msi).cube()
    write_measured(case.msi, cube * [[[1.0]], [[1.001]]], None, [100.0, 200.0], 50.0, overwrite=True)
    assert refused("stale")
    write_measured(case.msi, cube * [[[1.001]], [[1.0]]], None, [100.0, 200.0], 50.0, overwrite=True)
    assert not refused("")  # the other ion has no say
    with monkeypatch.context() as patch:
        preset = kept.preset(seed=1)
        patch.setattr(kept, "preset", lambda: preset)
        assert refused("stale")
    with monkeypatch.context() as patch:
        patch.setattr(kept, "model_digest", lambda: "other")
        assert refused("stale")
    with monkeypatch.context() as patch:
        patch.setitem(kept.PUBLISHED, one.case, replace(one, factor=16))
        assert refused("stale")
    start = kept_case.result.alignment
    kept_case.result.alignment = replace(start, offset_um=start.offset_um + 3.0)  # 4.2 um of 50
    assert not refused("")
    kept_case.result.alignment = replace(start, offset_um=start.offset_um + 5.0)
    assert refused("moved by 0.14")
    one.image.unlink()
    assert refused("no image is kept")


@pytest.mark.usefixtures("programs")
def test_comments_are_no_code_and_numbers_are() -> None:
    digest = load("kept").code_digest
    plain = "RATE = 0.1\ndef f(x):\n    return RATE * x\n"
    told = (
        '"""About."""\nRATE = 0.1\n"""Of learning."""\ndef f(x):  # noqa\n    """Times x."""\n    return (RATE * x)\n'
    )
    assert digest(plain) == digest(told)
    assert digest(plain) != digest(plain.replace("0.1", "0.2")) and digest(plain) != digest(plain.replace("*", "+"))


@pytest.mark.usefixtures("programs")
def test_the_kept_images_are_of_this_code_and_preset() -> None:
    import numpy as np

    kept = load("kept")
    for one in kept.PUBLISHED.values():
        about, image = json.loads(one.about.read_text()), np.load(one.image)
        assert image.dtype == np.float32 and image.shape == (40, 36) and np.isfinite(image).all()
        assert about["code"] == kept.model_digest(), f"{one.about.name} is stale: fidelity.py --recompute-paper"
        assert about["config"] == {name: kept.preset().resolved()[name] for name in about["config"]}
        assert (about["mz"], about["factor"]) == (one.mz, one.factor)
        assert about["model"]["notes"]["iterations"] == 500


def test_the_devices_benchmark_needs_torch_and_numpy_alone_and_counts_right():
    import subprocess

    code = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import torch, numpy
before = set(sys.modules)
import gpu
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print(sorted(new - {{"gpu", "deepfere", "torch", "numpy"}}))
network = gpu.FusionNetwork(11, 5, 8, 2).eval()
x, u = torch.zeros(1, 11, 20, 20), torch.zeros(1, 5, 20, 20)
# The mapping works on the context too, so the count is exact for a pixel of a large tile alone.
r = network.radius_px
f, k, w = 11, 5, 8
context = (f * k + f * w + w * w + w * k + 2 * k * w) * (20**2 - 14**2)
blocks = 9 * w * (18**2 - 14**2) + w * w * (18**2 - 14**2)
print(gpu.macs_of(network, x, u) - context - blocks, network.macs_per_px * 14**2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    others, counts = done.stdout.splitlines()
    assert others == "[]"
    counted, told = map(int, counts.split())
    assert counted == told
