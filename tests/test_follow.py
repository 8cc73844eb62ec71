"""Following a job wherever it runs: what it prints, how it ends, Ctrl-C; and a log that grows."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from deepfere.submit.target import Ended, Job, Tail, follow


@dataclass
class Scripted(Job):
    """A job whose story is known."""

    texts: list[str]
    ending: Ended
    name: str = "deepfere-train-0123456789ab"
    stops: int = 0
    seen: list[str] = field(default_factory=list)

    def ended(self):
        return None if self.texts else self.ending

    def read(self):
        return self.texts.pop(0) if self.texts else ""

    def stop(self):
        self.stops += 1
        self.texts, self.ending = ["saving\n"], Ended(1, "it was stopped")

    def record(self):
        return {}


def interrupted_at(*times: int):
    """A sleep that Ctrl-C ends at the given calls."""
    calls = iter(range(1000))

    def sleep(_: float) -> None:
        if next(calls) in times:
            raise KeyboardInterrupt

    return sleep


@pytest.mark.parametrize(
    ("interrupts", "code", "stops", "printed", "told"),
    [
        ((), 7, 0, "abc", []),
        ((0,), 1, 0, "a", ["Ctrl-C again", "runs on"]),
        ((0, 1), 1, 1, "asaving\n", ["Ctrl-C again", "saves its work", "it was stopped"]),
    ],
)
def test_following_and_ctrl_c(interrupts, code, stops, printed, told):
    job, out, messages = Scripted(["a", "b", "c"], Ended(7)), [], []
    assert follow(job, out.append, messages.append, "the same command", interrupted_at(*interrupts)) == code
    assert (job.stops, "".join(out)) == (stops, printed)
    assert len(messages) == len(told)
    assert all(words in message for words, message in zip(told, messages, strict=True))


def test_a_log_is_read_as_it_grows(tmp_path):
    tail = Tail(tmp_path / "log")
    assert tail.read() == ""
    data = "µm: 1\n".encode()
    (tmp_path / "log").write_bytes(data[:1])
    assert tail.read() == ""
    (tmp_path / "log").write_bytes(data)
    assert (tail.read(), tail.read()) == ("µm: 1\n", "")
