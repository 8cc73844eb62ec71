"""What a command tells of its progress: a log gets rate and time left, now and then."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from deepfere.cli import progress
from deepfere.cli.progress import Pace, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute_with_rate_and_time_left(clock, capsys):
    with progress_bar("reconstruct") as tell:
        for second in range(601):
            clock[0] = 1000.0 + second
            tell("tile", 0.2 + 0.5 * second / 600)  # 0.2 was there before
        tell("reconstruct", 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reconstruct: tile" and lines[-1] == "reconstruct: reconstruct" and len(lines) == 12
    assert lines[1] == "reconstruct: tile 25 %, 5 % a minute, 15 min left"
    assert lines[10] == "reconstruct: tile 70 %, 5 % a minute, 6 min left"


def test_long_work_is_told_in_hours_and_none_as_none(clock):
    pace = Pace(0.5)
    clock[0] += 600
    assert pace.text(0.5) == "50 %"
    assert pace.text(0.505) == "50 %, 0.05 % a minute, 16.5 h left"


def test_a_terminal_gets_bars_with_the_rate():
    """On a real pseudo-terminal."""
    program = (
        "import time\n"
        "from deepfere.cli.progress import progress_bar\n"
        "with progress_bar('fuse') as tell:\n"
        "    for n in range(4):\n"
        "        tell('align', n / 10)\n"
        "        time.sleep(0.3)\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=theirs, env=environment)
    os.close(theirs)
    told = b""
    try:
        while part := os.read(ours, 4096):
            told += part
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(ours)
    assert process.wait(30) == 0
    assert b"align" in told and b"30%" in told and b"%/min" in told
