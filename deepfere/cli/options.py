"""Options that several commands take, and how their values are read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from deepfere.errors import InputError

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
CONFIG = click.option("--config", type=click.Path(), help="Settings (YAML that mirrors configs/default.yaml).")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a result of other inputs or settings.")
WORK = click.option("-o", "--out", "out", required=True, type=click.Path(), help="The study's working folder.")


DECIMAL_COMMA = re.compile(r"\d+,\d+")
"""A line of a list of m/z that is no pair for certain."""
COLUMNS = ("mz", "tolerance_ppm", "tolerance_da")


def targets(context: click.Context, parameter: click.Parameter, value: str | None) -> list[Any] | None:
    """Targets of ``--mz``: a list, a file with one m/z a line, or one with columns."""
    return None if value is None else _targets(parameter, value, COLUMNS)


def plain_targets(context: click.Context, parameter: click.Parameter, value: str | None) -> list[Any] | None:
    """As `targets`, without columns."""
    return None if value is None else _targets(parameter, value, ())


def _targets(parameter: click.Parameter, value: str, columns: tuple[str, ...]) -> list[Any]:
    from deepfere.targets import target_list

    flag = parameter.opts[0]
    text, where = value, flag
    if os.path.isfile(value):  # noqa: PTH113 - a long list is no possible file name, at which Path.is_file raises
        where = f"{flag} {value}"
        try:
            text = Path(value).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("cannot be read as text", where=where, remedy="give a file with one m/z a line") from error
    remedy = "give 798.54,826.57 or a file with one a line"
    doubtful = next((line for line in text.splitlines() if DECIMAL_COMMA.fullmatch(line.strip())), None)
    if doubtful is not None and where != flag:
        raise InputError(
            f"{doubtful.strip()!r} may be two m/z, or one with a decimal comma",
            where=where,
            remedy="write a point for the comma, or one m/z a line; in columns write whole numbers as 500.0",
        )
    names = [name.strip() for name in text.split("\n", 1)[0].split(",")]
    if where != flag and len(names) > 1 and set(names) & set(columns):
        return _table(text, names, where)
    numbers = []
    for part in filter(None, (part.strip() for part in text.replace("\n", ",").split(","))):
        try:
            if "_" in part:  # which Python would read over
                raise ValueError
            numbers.append(float(part))
        except ValueError as error:
            nor = ", and no such file is there" if where == flag else ""
            raise InputError(f"{part[-40:]!r} is not an m/z{nor}", where=where, remedy=remedy) from error
    try:
        return [*target_list(numbers)]
    except ValueError as error:
        raise InputError(str(error), where=where, remedy=remedy) from error


def _table(text: str, names: list[str], where: str) -> list[Any]:
    """Targets of a file with named columns; an empty cell says nothing."""
    from deepfere.targets import parse_target, plain, target_list

    remedy = f"give the columns {','.join(COLUMNS)}, the m/z in every line"
    if "mz" not in names or len(set(names)) < len(names) or set(names) - set(COLUMNS):
        raise InputError(f"has the columns {','.join(names)[:80]}", where=where, remedy=remedy)
    found = []
    for number, line in enumerate(text.splitlines()[1:], 2):
        cells = [cell.strip() for cell in line.split(",")]
        if cells == [""]:
            continue
        if len(cells) != len(names):
            what = f"line {number} has {len(cells)} cells and not {len(names)}"
            raise InputError(what, where=where, remedy=remedy)
        try:
            if any("_" in cell for cell in cells):  # which Python would read over
                raise ValueError(f"{line.strip()[:40]!r} are no numbers")
            found.append(parse_target({name: cell for name, cell in zip(names, cells, strict=True) if cell}))
        except ValueError as error:
            raise InputError(f"line {number}: {error}", where=where, remedy=remedy) from error
    try:
        # As the settings take them.
        return [plain(one) for one in target_list(found)]
    except ValueError as error:
        raise InputError(str(error), where=where, remedy=remedy) from error


def region(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    """A region's number, or ``all``."""
    if value is None or value == "all":
        return value
    if not value.isdecimal():
        raise InputError(f"{value!r} is no region", where=parameter.opts[0], remedy="give a number, or all")
    return int(value)
