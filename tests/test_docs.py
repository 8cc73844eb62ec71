"""The documents and settings files keep up with the code: commands, options, keys, names and links exist."""

from __future__ import annotations

import ast
import csv
import io
import re
import shlex
import tomllib
import warnings
from pathlib import Path

import click
import pytest
import yaml

import deepfere
from deepfere.cli import main
from deepfere.config import Config, load_config
from deepfere.frame import LANDMARK_COLUMNS
from deepfere.reconstruction.result import Result
from deepfere.section import Section, Study

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of a page in some languages."""
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def shell_lines(page: Path) -> list[list[str]]:
    """Commands of a page: the lines of its shell blocks, and its code spans that begin with a program of ours."""
    lines = [line for body in blocks(page, "bash", "sh", "console") for line in body.splitlines()]
    lines += re.findall(r"`((?:deepfere|make|python) [^`]+)`", re.sub(r"\s+", " ", prose(page)))
    # "deepfere ... --config FILE" stands for any command.
    return [words for line in lines if (words := shlex.split(line, comments=True)) and "..." not in words]


def check_command(words: list[str]) -> None:
    """Refuse a ``deepfere`` command that the CLI would not take (nothing is run)."""
    if words[:1] in (["--version"], ["--help"]):
        return
    command: click.Command | None = main
    while isinstance(command, click.Group):
        command, named, words = command.commands.get(words[0]), words[0], words[1:]
        assert command is not None, f"no command {named!r}"
        if isinstance(command, click.Group) and not words:
            return
    assert command is not None
    words = [named, *words]
    context = click.Context(command, info_name=words[0])
    parser = command.make_parser(context)
    values, _, order = parser.parse_args(list(words[1:]))
    for parameter in order:
        if parameter.name in ("factor", "ratios"):
            parameter.type_cast_value(context, values[parameter.name])
    overrides = [word for word in words[1:] if re.match(r"^[a-z_]+(\.[a-z_]+)*=", word)]
    load_config(None, overrides)
    for word in words:
        if word.startswith("configs/"):
            load_config(ROOT / word)
    required = {p.name for p in command.params if p.required and isinstance(p, click.Option)}
    if len(words) > 1:
        assert required <= {name for name, value in values.items() if value is not None}, "a required option is missing"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_settings_file_loads(path):
    load_config(path)
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(r"^\s*\w+:\s*\S", line):
            assert "#" in line, f"line {number} explains nothing: {line}"


def test_default_yaml_is_the_defaults_all_of_them():
    path = ROOT / "configs" / "default.yaml"
    assert load_config(path) == Config()
    stated, resolved = yaml.safe_load(path.read_text()), Config().resolved()
    assert stated == resolved  # also that no key is left out
    assert list(stated) == list(resolved)
    assert all(list(stated[k]) == list(resolved[k]) for k, v in resolved.items() if isinstance(v, dict))


def test_there_is_something_to_check():
    # Guards the checks below against a pattern that silently finds nothing.
    assert {"default.yaml", "quick.yaml"} <= {path.name for path in CONFIGS}
    words = [w for page in PAGES for w in shell_lines(page)]
    assert {w[1] for w in words if w[0] == "deepfere"} >= {"fuse", "demo", "evaluate", "reconstruct", "info", "doctor"}
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 5
    assert len(PAGES) >= 10


@pytest.mark.parametrize(
    "line",
    [
        "fuze a b -o c",
        "fuse a b -o c --facto 8",
        "fuse a b -o c --factor many",
        "fuse a b",
        "fuse a b -o c train.stepz=3",
        "demo -o demo --quick",
        "submit retrain study.yaml -o work --to ray",
        "submit train study.yaml -o work --too ray",
        "submit train study.yaml -o work",
    ],
)
def test_the_check_of_commands_can_fail(line):
    with pytest.raises((AssertionError, click.UsageError, deepfere.InputError)):
        check_command(shlex.split(line))


@every_page
def test_commands_and_options_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in shell_lines(page):
        try:
            if words[0] == "deepfere":
                check_command(words[1:])
            elif words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= set(targets), "no such target"
            elif words[0] == "python" and words[1] != "-m":
                assert (ROOT / words[1]).is_file(), "no such file"
            elif words[:2] == ["ray", "job"]:
                assert all((ROOT / word).is_file() for word in words if word.endswith(".py")), "no such file"
        except (AssertionError, click.UsageError, deepfere.InputError) as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error}")


def test_every_command_is_documented():
    shown = {words[1] for page in PAGES for words in shell_lines(page) if words[0] == "deepfere" and len(words) > 1}
    assert set(main.commands) <= shown


@every_page
def test_option_names_in_the_text_exist(page):
    commands = [c for one in main.commands.values() for c in (one, *getattr(one, "commands", {}).values())]
    known = {option for command in commands for p in command.params for option in p.opts}
    foreign = {"--working-dir", "--backend-store-uri", "--quick", "--json", "--help"}
    foreign |= {"--seed", "--shape"}  # of the phantom's own program
    foreign |= {"--write-docs", "--from", "--work", "--recompute-paper", "--paper"}  # of the benchmarks
    foreign |= {"--thyra-python", "--peer-python"}
    foreign |= {"--address", "--generate", "--head", "--no-wait", "--port"}  # Ray
    foreign |= {"--batch", "--signal"}  # Slurm
    foreign |= {"--build-arg", "--cpus-per-task", "--gpus-per-node", "--nodes", "--time", "--version"}  # others
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", page.read_text()))
    assert named <= known | foreign


@every_page
def test_setting_names_in_the_text_exist(page):
    resolved = Config().resolved()
    sections = [name for name, value in resolved.items() if isinstance(value, dict)]
    for section, key in re.findall(rf"\b({'|'.join(sections)})\.([a-z_]+)\b(?!\()", page.read_text()):
        # What is Ray's own, and files called like a section, are no settings.
        names = ("data", "init", "npz", "py", "sbatch", "svs", "tiff", "yaml", "zarr")
        assert key in resolved[section] or key in names, f"{section}.{key}"


@every_page
def test_python_snippets_compile_and_use_what_exists(page):
    members = set(dir(Result)) | {"path", "factor", "grid", "levels", "normalisation"}
    for source in blocks(page, "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "deepfere":
                    assert node.attr in deepfere.__all__, f"deepfere.{node.attr}"
                elif node.value.id == "result":
                    assert node.attr in members, f"result.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepfere"):
                module = __import__(str(node.module), fromlist=["x"])
                assert all(hasattr(module, alias.name) for alias in node.names)


@every_page
def test_tables_and_manifests_in_the_text_are_accepted(page):
    for source in blocks(page, "csv"):
        rows = list(csv.DictReader(io.StringIO(source)))
        if set(rows[0]) == set(LANDMARK_COLUMNS):
            assert len(rows) >= 3
            assert all(float(value) >= 0 for row in rows for value in row.values())
        else:
            Study.model_validate({"sections": [{k: v for k, v in row.items() if v} for row in rows]})
            assert set(rows[0]) <= set(Section.model_fields)
    for source in blocks(page, "yaml"):
        values = yaml.safe_load(source)
        (Study if "sections" in values else Config).model_validate(values)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_is_in_the_index_and_pictures_are_small():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 400_000, picture.name
        assert any(picture.name in page.read_text() for page in PAGES), f"{picture.name} is shown nowhere"


@every_page
def test_files_of_the_code_that_the_text_names_exist(page):
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|yaml|toml))`", prose(page)):
        assert (ROOT / name).exists() or (ROOT / "deepfere" / name).exists(), name


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    section = (ROOT / "docs" / "decisions.md").read_text().partition("## Dependencies")[2]
    for requirement in wanted:
        name = re.split(r"[<>=!~ ]", requirement)[0]
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", section), name


def test_the_conditions_of_the_deep_tier_are_those_of_the_code():
    from deepfere.pipeline import choose

    assert choose.TIER_EVIDENCE == 1.0  # else the two pages are out of date
    for name, begin in (("design.md", "T2 replaces T1"), ("settings.md", "T2 is used for a section")):
        text = re.sub(r"\s+", " ", (ROOT / "docs" / name).read_text())
        told = text.partition(begin)[2][:250]
        assert "one standard error" in told, name
