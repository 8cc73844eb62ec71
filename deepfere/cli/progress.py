"""Progress of a command, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

LINE_EVERY_S = 60.0
"""A log gets a line so often: enough to see that a job of days goes on, and how fast."""


class Pace:
    """How fast a stage goes on in this run: what an earlier one had done does not count."""

    def __init__(self, share: float) -> None:
        self._began_s, self._first = time.monotonic(), share
        self.told_s = self._began_s

    def rate(self, share: float) -> float:
        """Of the whole, a minute."""
        minutes = (time.monotonic() - self._began_s) / 60
        return (share - self._first) / minutes if minutes > 0 else 0.0

    def text(self, share: float) -> str:
        """Share, rate and time left, as ``37 %, 2.1 % a minute, 30 min left``."""
        rate, done = self.rate(share), f"{100 * share:.0f} %"
        return f"{done}, {100 * rate:.2g} % a minute, {_left((1 - share) / rate)} left" if rate > 0 else done


def _left(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


@contextmanager
def progress_bar(total_hint: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar per stage on a terminal; elsewhere a line per stage, and one a minute; on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        paces: dict[str, Pace] = {}

        def line(stage: str, share: float) -> None:
            if stage not in paces:
                paces[stage] = Pace(share)
                click.echo(f"{total_hint}: {stage}", err=True)
            elif (now := time.monotonic()) - paces[stage].told_s >= LINE_EVERY_S:
                paces[stage].told_s = now
                click.echo(f"{total_hint}: {stage} {paces[stage].text(share)}", err=True)

        yield line
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(show_speed=False),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}
        begun: dict[str, Pace] = {}

        def tell(stage: str, share: float) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=1.0)
                tasks[stage] = bar.add_task(stage, total=1.0, pace="")
                begun[stage] = Pace(share)
            pace = f"{100 * rate:.2g} %/min" if (rate := begun[stage].rate(share)) > 0 else ""
            bar.update(tasks[stage], completed=share, pace=pace)

        yield tell
