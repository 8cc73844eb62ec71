from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

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
