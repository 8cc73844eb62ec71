"""What commands take: help with examples, settings, targets, and names that cannot be."""

from __future__ import annotations

import zipfile
from types import SimpleNamespace

import click
import pytest

from deepfere.cli import main
from deepfere.errors import InputError

LONG = ",".join(f"{500 + k / 7:.3f}" for k in range(60))
"""More characters than a file name may have."""


@pytest.fixture
def refused(cli, tmp_path):
    """``deepfere fuse`` of a file that is absent: it must end in one line; returns it."""

    def check(*arguments: object) -> str:
        done = cli("fuse", tmp_path / "gone.imzML", *arguments, "--no-guide", "-o", tmp_path / "r.zarr")
        assert done.code == 2 and done.out == "", done
        assert len(done.errors) == 1 and done.errors[0].startswith("error: "), done.err
        assert not (tmp_path / "r.zarr").exists()
        return done.errors[0]

    return check


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "no m/z"),
        (" , ", "no m/z"),
        ("0", "0 is not a positive number"),
        ("500,-5", "-5 is not a positive number"),
        ("nan", "nan is not a positive number"),
        ("500,inf", "inf is not a positive number"),
        ("targets.txt", "'targets.txt' is not an m/z, and no such file is there; give"),
        ("500;600", "'500;600' is not an m/z"),
        ("5_00", "'5_00' is not an m/z"),
    ],
)
def test_targets_that_are_none(refused, value, words):
    told = refused("--mz", value)
    assert "--mz" in told and words in told and "one a line" in told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no m/z"),
        (b"mz\n500\n", "'mz' is not an m/z"),
        (b"500\n-1\n", "not a positive"),
        (b"500,2\n501,3\n", "'500,2' may be two m/z, or one with a decimal comma"),
        (bytes(range(128, 256)), "cannot be read as text"),
    ],
)
def test_files_of_targets_that_are_none(refused, tmp_path, content, words):
    (tmp_path / "targets.txt").write_bytes(content)
    told = refused("--mz", tmp_path / "targets.txt")
    assert f"--mz {tmp_path / 'targets.txt'}" in told and words in told


@pytest.mark.parametrize("value", [LONG, "600,500,600"])
def test_lists_of_targets_of_any_length_and_order(refused, value):
    assert len(LONG) > 255
    assert "gone.imzML" in refused("--mz", value)


def test_targets_of_a_file(refused, tmp_path):
    (tmp_path / "targets.txt").write_text("\ufeff600.5\r\n500.25, 700\n\n")
    assert "gone.imzML" in refused("--mz", tmp_path / "targets.txt")


def test_a_long_setting_in_the_place_of_the_slide(refused):
    assert "gone.imzML" in refused(f"ingest.mz=[{LONG}]")


@pytest.fixture
def things(tmp_path):
    """Paths at which there is no result, nor anything else of ours."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "damaged.zarr").mkdir()
    (tmp_path / "damaged.zarr" / "zarr.json").write_text("{")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("zarr.json", "{}")
    return tmp_path


@pytest.mark.parametrize("name", ["gone", "empty", "text.txt", "damaged.zarr", "a.zip"])
@pytest.mark.parametrize("command", ["info", "report", "evaluate"])
def test_what_is_nothing_of_ours_is_told_in_one_line(cli, things, command, name):
    before = sorted(things.rglob("*"))
    done = cli(command, things / name)
    assert done.code == 2 and done.out == "", done
    assert len(done.errors) == 1 and done.errors[0].startswith(f"error: {things / name}: "), done.err
    assert sorted(things.rglob("*")) == before


def test_options_of_evaluate_that_would_do_nothing_are_refused(cli, monkeypatch):
    monkeypatch.setattr("deepfere.reconstruction.result.open", lambda path: path)
    for words, told in (
        (["--against", "a=b.zarr"], "--labels"),
        (["--labels", "l.png", "model.tier=T1"], "--ratio"),
        (["--labels", "l.png", "--config", "c.yaml"], "--ratio"),
    ):
        done = cli("evaluate", "r.zarr", *words)
        assert done.code == 2 and len(done.errors) == 1 and told in done.errors[0], done


def test_choices_are_told_in_one_line_and_a_group_alone_shows_its_help(cli):
    done = cli("submit", "ingest", "s.yaml", "-o", "w")
    assert done.code == 2 and done.err.count("\n") == 1 and "local, ray, kuberay, slurm" in done.err
    done = cli("models")
    assert done.code == 2 and done.err.startswith("Usage:") and "promote" in done.err


@pytest.mark.parametrize("command", ["info", "report", "evaluate"])
def test_names_that_no_file_can_have(cli, command):
    done = cli(command, "n" * 300)
    assert done.code == 2 and len(done.errors) == 1 and done.errors[0].startswith("error: ")


def test_measurement_whose_name_no_file_can_have(cli, tmp_path):
    done = cli("fuse", "n" * 300, "--no-guide", "-o", tmp_path / "r.zarr")
    assert done.code == 2 and len(done.errors) == 1 and "too long" in done.errors[0]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_shows_an_example(cli, name):
    done = cli(name, "--help")
    assert done.code == 0 and f"deepfere {name}" in done.out.partition("Example:")[2]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_settings_come_from_a_file_wherever_they_can_be_given(cli, name, tmp_path):
    given = {p.name for p in main.commands[name].params}
    assert ("overrides" in given) == ("config" in given)
    if "config" in given:
        needed = [p for p in main.commands[name].params if p.required]
        words = ["-o" if isinstance(p, click.Option) else "thing" for p in needed]
        words = [w for word in words for w in ((word, str(tmp_path / "out")) if word == "-o" else (word,))]
        done = cli(name, *words, "--config", tmp_path / "gone.yaml")
        assert done.code == 2 and len(done.errors) == 1, done
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["tracking:\n  uri: none\nfactor: 2\nguide: false\nmodel:\n  tier: T1\n", "seed: 1\n"])
def test_the_demo_takes_settings_but_keeps_its_truth(cli, tmp_path, monkeypatch, file):
    seen = []

    def fuse(*_, config, **__):
        seen.append(config)
        raise InputError("far enough")

    phantom = SimpleNamespace(imzml="a.imzML", slide="a.tiff")
    monkeypatch.setattr("deepfere.demo.write_phantom", lambda *_, **__: phantom)
    monkeypatch.setattr("deepfere.demo.fuse", fuse)
    (tmp_path / "c.yaml").write_text(file)
    done = cli("demo", "-o", tmp_path / "demo", "--config", tmp_path / "c.yaml", "train.steps=3")
    assert done.code == 2 and "far enough" in done.err
    (config,) = seen
    assert config.factor == 8 and config.guide and config.train.steps == 3
    if "tracking" in file:
        assert config.tracking.uri == "none" and config.model.tier == "T1"
    else:
        assert config.tracking.uri == f"sqlite:///{tmp_path / 'demo' / 'mlflow' / 'mlflow.db'}" and config.seed == 1
