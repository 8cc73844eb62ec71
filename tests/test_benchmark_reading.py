"""The benchmarks of tiles and pyramids, and what they write of the page of performance."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark's module; its neighbours find each other, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {file.stem for file in FOLDER.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def test_tiling_slide_holds_its_tiles_and_every_arm_sums_the_same(tmp_path, load, monkeypatch):
    from deepfere.readers.slide import open_slide

    made, arm = load("tiling_slide"), load("tiling_arm")
    rng = np.random.default_rng(0)
    tiles = [np.repeat(np.repeat(rng.integers(0, 256, (32, 32, 3), np.uint8), 8, 0), 8, 1) for _ in range(3)]
    path = tmp_path / "s.tif"
    made.write_slide(path, tiles, 1024, levels=True)
    slide = open_slide(path)
    assert slide.backend == "tiff" and [level.shape_px[0] for level in slide.levels] == [1024, 256, 64]
    assert min(np.abs(slide.read(0, 256, 512, 256, 256).astype(int) - tile).mean() for tile in tiles) < 20
    ours = arm.ours(str(path), 512, 0.5, 0.0)
    kept = tmp_path / "kept.npy"
    assert ours["tiles"] == 4
    assert ours["checksum"] == arm.loop("openslide", str(path), 512, 99, str(kept))["checksum"]
    tiling = load("tiling")
    assert tiling.arm("ours-pool", path, "--workers", 2)["checksum"] == ours["checksum"]
    total, pixels = tiling.first_tiles(path, 99)
    assert total == ours["checksum"] and np.array_equal(pixels, np.load(kept))
    # Of some tiles, in the order of rows, the sum is that of a loop that stops there.
    assert tiling.first_tiles(path, 3)[0] == arm.loop("openslide", str(path), 512, 3)["checksum"] != total
    turned = [np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 7, np.uint8)]
    assert arm.checksum(turned, [0, 1], [0, 1]) != arm.checksum(turned[::-1], [0, 1], [0, 1])


def test_tiling_states_every_ceiling(tmp_path, load):
    made, tiling = load("tiling_slide"), load("tiling")
    tiles = [np.full((256, 256, 3), value, np.uint8) for value in (50, 200)]
    made.write_slide(tmp_path / "s.tif", tiles, 2048, levels=False)
    rows = tiling.plain(tmp_path / "s.tif", 1, judged=False)
    for ceiling in ("libjpeg-turbo", "pread of the same bytes", "one memcpy of the pixels"):
        shares = [row.value for row in rows if f"share of {ceiling}, processor" in row.what]
        assert len(shares) == len(tiling.TILINGS) and min(shares) > 0
    assert {row.must for row in rows if "share" in row.what} == {""}
    head, *lines = [line for line in tiling.TABLES[0].splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {head.count("|")}


MACHINE = {"cpu": "A", "cores": 2, "memory_bytes": 2**34, "load_1min": 0.25}


def test_a_section_is_written_between_its_own_marks_only(tmp_path, load):
    page, performance = tmp_path / "performance.md", load("performance")
    tiling, pyramid = (performance.Section(name, [], {}, [], MACHINE) for name in ("tiling", "pyramid"))
    tiling.write("| first |", page=page)
    page.write_text(f"# Performance\n\nmine\n{page.read_text().partition(chr(10))[2]}\nothers'\n")
    pyramid.write("| third |", page=page)
    tiling.write("above", "| second |", page=page)
    text = page.read_text()
    assert text.startswith("# Performance\n\nmine\n") and "\nothers'\n" in text and "| first |" not in text
    assert "<!-- tiling:begin -->\nWritten by `python benchmarks/tiling.py` on " in text
    assert "\n\nabove\n\n| second |\n<!-- tiling:end -->\n" in text
    assert text.endswith("| third |\n<!-- pyramid:end -->\n")


def test_what_stands_above_the_figures_is_the_command_the_machine_and_the_versions(load):
    performance = load("performance")
    words = ["plain", "--peer-python", "/somewhere/python", "--json=/somewhere/x.json", "--write-docs"]
    packages, missing = {"one": "1.2", "two": "3"}, ["a peer (no `--peer-python`)"]
    section = performance.Section("tiling", words, packages, missing, MACHINE)
    command = "python benchmarks/tiling.py plain --peer-python PYTHON --json=FILE --write-docs"
    assert section.facts() == {"command": command, "packages": packages, "left_out": missing}
    text = section.heading()
    assert f"`{command}`" in text and "2 cores of A, 16 GiB of memory, load 0.2 at the start; one 1.2, two 3." in text
    assert text.endswith(" Left out: a peer (no `--peer-python`).")
    assert "Left out" not in performance.Section("tiling", words, packages, [], MACHINE).heading()


def test_a_python_without_the_peer_ends_the_program_before_work_starts(load, capsys):
    versions = load("performance").versions
    assert versions(["numpy", "zarr"]).keys() == {"numpy", "zarr"}
    wrong = (
        (["numpy", "there-is-no-such-package"], sys.executable),
        (["numpy"], "/no/such/python"),
        (["numpy"], "false"),
    )
    for names, python in wrong:
        with pytest.raises(SystemExit) as stopped:
            versions(names, python)
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert python in shown and names[-1] in shown and shown.count("\n") == 1


def test_quick_figures_go_to_no_page(load, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("common").parser("text", ["a"], page=True).parse_args(["--quick", "--write-docs"])
    assert stopped.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_a_pyramids_ratio_is_the_median_of_those_within_rounds(tmp_path, load, monkeypatch):
    pyramid = load("pyramid")
    # Seconds in each of five rounds: the machine is twice as slow in the third, and once for us alone.
    ours, rest = iter([1.0, 1.0, 2.0, 4.0, 1.0]), {"own": 2.0, "all": 4.0, "read": 1.0}
    slow = iter([k for k in (1, 1, 2, 1, 1) for _ in range(6)])

    def one(words):
        if words[0] == "ours":
            return [next(ours)] * 2, 10
        kind = "read" if words[0] == "read" else "own" if words[3] == "1" else "all"
        return [rest[kind] * next(slow)] * 2, 20

    monkeypatch.setattr(pyramid, "one", one)
    monkeypatch.setattr(pyramid, "make", lambda folder, name, side: folder / "x.zarr")
    monkeypatch.setattr(pyramid, "compare", lambda *paths: 0.0)
    rows, line = pyramid.case("stain", False, tmp_path)
    found = {row.what: row.value for row in rows}
    assert found["stain: times faster than ome-zarr-py"] == 3.0
    assert found["stain: times faster than ome-zarr-py, least of the rounds"] == 0.75
    assert found["stain: times faster than ome-zarr-py, most of the rounds"] == 3.0
    assert len(line) == len(pyramid.HEAD) and "0.75 to 3.00" in line
    # Where level 0 alone takes longer than all, noise has eaten what was to be measured.
    rest["own"] = 9.0
    ours, slow = iter([1.0] * 5), iter([1] * 30)
    rows, _ = pyramid.case("stain", False, tmp_path)
    assert rows[0].value != rows[0].value and not rows[0].ok


def test_tiling_and_pyramid_write_their_parts_of_the_page(load, monkeypatch):
    tiling, pyramid, pages = load("tiling"), load("pyramid"), {}
    monkeypatch.setattr(tiling, "different_tiles", lambda source: [])
    monkeypatch.setattr(tiling, "write_slide", lambda *args, **options: None)
    monkeypatch.setattr(tiling, "peers", lambda *_: tiling._show("readers", ["a", "b"], [["c", "d"]]) or [])
    monkeypatch.setattr(pyramid, "case", lambda *_: ([], ["x"] * len(pyramid.HEAD)))
    monkeypatch.setattr(
        load("performance").Section, "write", lambda self, *parts: pages.update({self.name: [self, *parts]})
    )
    monkeypatch.setattr(sys, "argv", ["tiling.py", "peers", "--write-docs"])
    assert tiling.main() == 0 and pyramid.main(["stain", "--write-docs"]) == 0
    assert pages.keys() == {"tiling", "pyramid"}
    head = pages["tiling"][0].heading()
    assert "`python benchmarks/tiling.py peers --write-docs`" in head and "imagecodecs " in head
    assert "Left out: tiffslide and ratiopath" in head and pages["tiling"][-1].endswith("| c | d |")
    head = pages["pyramid"][0].heading()
    assert "`python benchmarks/pyramid.py stain --write-docs`" in head and "ome-zarr " in head
    head, _, line = pages["pyramid"][-1].splitlines()
    assert head.count("|") == line.count("|")


def test_make_performance_hands_peers_on_where_they_are_given():
    if shutil.which("make") is None:
        pytest.skip("the Makefile is tested with GNU make, which this machine does not have")

    def lines(*words):
        done = subprocess.run(
            ["make", "-n", "-o", ".venv/.installed", "performance", *words],
            cwd=FOLDER.parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [line for line in done.stdout.splitlines() if "--write-docs" in line]

    assert [line.split()[1] for line in lines()] == [f"benchmarks/{n}.py" for n in ("ingest", "tiling", "pyramid")]
    assert not any("-python" in line for line in lines())
    ingest, tiling, _ = lines("PEER_PYTHON=/a/python", "THYRA_PYTHON=/b/python")
    assert "--thyra-python /b/python" in ingest and "--peer-python /a/python" in tiling
