"""What a benchmark writes of docs/performance.md: its own section, under the command, the machine and the versions."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
#: What stands for a path on this machine where a command is shown.
PATHS = {"--thyra-python": "PYTHON", "--peer-python": "PYTHON", "--tiles": "SLIDE", "--json": "FILE"}


@dataclass(frozen=True)
class Section:
    """A benchmark's part of the page; made before the work starts.

    Attributes:
        name: Of the benchmark; its part lies between marks of that name.
        words: Its command line.
        packages: Versions of what it measures.
        left_out: What it does not measure here, and why.
        about: The machine at the start, from `common.machine`.
    """

    name: str
    words: Sequence[str]
    packages: dict[str, str]
    left_out: Sequence[str]
    about: dict[str, Any]

    @classmethod
    def begin(cls, name: str, words: Sequence[str], packages: dict[str, str], left_out: Sequence[str] = ()) -> Section:
        """Note the machine as it is now, and tell what is left out."""
        for what in left_out:
            print(f"left out: {what}", file=sys.stderr)
        return cls(name, words, packages, left_out, machine())

    @property
    def command(self) -> str:
        """The command as it was given; where things lie on this machine is nobody else's."""
        return asked(f"{self.name}.py", self.words)

    def facts(self) -> dict[str, Any]:
        """For the JSON."""
        return {"command": self.command, "packages": self.packages, "left_out": list(self.left_out)}

    def heading(self) -> str:
        """What stands above the figures."""
        about, packages = self.about, ", ".join(f"{name} {number}" for name, number in self.packages.items())
        text = (
            f"Written by `{self.command}` on {time.strftime('%Y-%m-%d')}; do not edit what is between the marks. "
            f"{about['cores']} cores of {about['cpu']}, {about['memory_bytes'] / 2**30:.0f} GiB of memory, load "
            f"{about['load_1min']:.1f} at the start; {packages}."
        )
        return text + (f" Left out: {'; '.join(self.left_out)}." if self.left_out else "")

    def write(self, *parts: str, page: Path = PAGE) -> None:
        """Put the heading and some paragraphs and tables between the benchmark's own marks; the rest stays."""
        begin, end = f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->"
        whole = page.read_text() if page.exists() else "# Performance\n"
        if begin not in whole:
            whole = f"{whole.rstrip()}\n\n{begin}\n{end}\n"
        head, _, rest = whole.partition(begin)
        text = "\n\n".join([self.heading(), *parts])
        page.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def versions(names: Sequence[str], python: str = sys.executable) -> dict[str, str]:
    """Versions of packages that this interpreter or another has.

    Ends the program with exit code 2 where one is not there.
    """
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    try:
        done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True)
        found, told = done.stdout.split(), (done.stderr.strip().splitlines() or ["it told no versions"])[-1]
    except OSError as error:
        found, told = [], str(error)
    if len(found) != len(names):
        print(f"{python} must be a Python with {', '.join(names)}: {told}", file=sys.stderr)
        sys.exit(2)
    return dict(zip(names, found, strict=True))


def asked(program: str, words: Sequence[str]) -> str:
    """The command that a benchmark was run with; where things lie on this machine is nobody else's."""
    shown, before = [f"python benchmarks/{program}"], ""
    for word in words:
        name, equals, _ = word.partition("=")
        if before in PATHS:
            shown.append(PATHS[before])
        else:
            shown.append(f"{name}={PATHS[name]}" if equals and name in PATHS else word)
        before = "" if before in PATHS else word
    return " ".join(shown)
