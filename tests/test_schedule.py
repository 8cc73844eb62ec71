"""Rows on a pool of actors: in order where it matters, few at a time, whatever becomes of the actors."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from deepfere import rows as module
from deepfere import schedule
from deepfere.cluster import MEMORY, THREADS, Journal
from deepfere.errors import DeepfereError, InputError
from deepfere.rows import Phase, RowWorker, Stream
from deepfere.schedule import run_jobs
from deepfere.stopping import Stopped, look, watched
from deepfere.stopping import request as ask
from tests.conftest import run_rows


class Noting(RowWorker):
    """Notes each row in its job's journal, and does what the row says."""

    def __init__(self, folder: str, job: str) -> None:
        self.journal = Journal(Path(folder) / job, "f")
        self.folder = Path(folder)
        (self.folder / f"built-{job}-{os.getpid()}").touch()

    def work(self, row):
        if row.get("bad"):
            raise InputError("is damaged", where=row["unit"], remedy="mend it")
        victim = Path(str(row.get("dies_while")))
        if victim.exists():
            if not row.get("always"):
                victim.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        while row.get("in_company") and len({f.name.split("-")[-1] for f in self.folder.glob("built-*")}) < 2:
            time.sleep(0.01)
        time.sleep(row.get("seconds", 0.0))
        return {"pid": os.getpid()}


@pytest.fixture
def made(tmp_path):
    """Jobs of two phases each, what they have told, and how many rows were alive at most."""

    class Made:
        told: list[str]
        alive = most = 0

        def __init__(self):
            self.told = []

        def rows(self, name, count, **more):
            for n in range(count):
                self.alive += 1
                self.most = max(self.most, self.alive)
                yield {"unit": f"{name}/{n}", **more}

        def step(self, record):
            self.alive -= 1

        def phases(self, name, first=5, second=3, **more):
            self.told.append(f"{name} begins")
            arguments = (str(tmp_path), name)
            rows = self.rows(f"{name}-1", first, **more)
            yield Phase(f"first of {name}", Noting, arguments, rows, first, self.step)
            assert len(self.done(name)) == first
            yield Phase(f"second of {name}", Noting, arguments, self.rows(f"{name}-2", second), second, self.step)
            self.told.append(f"{name} ends")

        def done(self, name):
            return Journal(tmp_path / name, "f").done()

    return Made()


def test_a_phase_begins_when_the_one_before_is_done_and_failures_are_those_of_a_job(made):
    failed: list[tuple[str, Exception]] = []
    jobs = [("a", made.phases("a")), ("b", made.phases("b", bad=True)), ("c", made.phases("c", first=0))]
    run_jobs(jobs, title="test", here=True, failed=lambda name, error: failed.append((name, error)))
    assert made.told == ["a begins", "a ends", "b begins", "c begins", "c ends"]
    assert [name for name, _ in failed] == ["b"] and isinstance(failed[0][1], InputError)
    assert str(failed[0][1]) == "b-1/0: is damaged (first of b: 5 of 5 pieces failed); mend it"
    assert (len(made.done("a")), len(made.done("b")), len(made.done("c"))) == (8, 0, 3)


def test_without_anybody_to_tell_the_first_failure_ends_all(made):
    jobs = ((name, made.phases(name, bad=name == "b")) for name in "abc")
    with pytest.raises(InputError, match="first of b"):
        run_jobs(jobs, title="test", here=True)
    assert made.told == ["a begins", "a ends", "b begins"]


def test_what_a_journal_cannot_take_is_not_done(tmp_path):
    (tmp_path / "job").touch()  # where the folder should be
    records = Noting(str(tmp_path), "job").carry_out([{"unit": "1"}, {"unit": "2"}])
    assert [record["unit"] for record in records] == ["1", "2"]
    assert all("exists" in record["error"] for record in records)


def test_jobs_and_rows_are_made_when_their_turn_comes(made):
    """An actor keeps to its job; another one opens the next. Nothing is made ahead."""
    stream = Stream((f"j{n}", made.phases(f"j{n}", first=100)) for n in range(1000))
    assert stream.fill(2) >= 2 and made.told == ["j0 begins"]
    one, rows = stream.take(None, lambda phase: 4, 2)
    one.users += 1
    assert (one.name, len(rows)) == ("j0", 4)
    other, _ = stream.take(None, lambda phase: 4, 2)
    other.users += 1
    assert other.name == "j1" and made.told == ["j0 begins", "j1 begins"]
    assert stream.take(one, lambda phase: 256, 2)[0] is one
    # Its job has no rows left for now: it opens another one, but no more than there are actors for.
    third, _ = stream.take(one, lambda phase: 4, 2)
    assert third.name == "j2" and len(stream.open) == 3
    third.users += 1
    assert stream.take(None, lambda phase: 1, 2)[0] in (other, third)
    assert made.alive == 4 + 4 + 96 + 4 + 1
    stream.close()


@pytest.mark.ray
def test_two_actors_share_many_jobs(made, ray_session):
    jobs = ((f"j{n:02d}", made.phases(f"j{n:02d}", first=40, in_company=True)) for n in range(20))
    run_jobs(jobs, title="test")
    assert sorted(made.told) == sorted(f"j{n:02d} {what}" for n in range(20) for what in ("begins", "ends"))
    assert all(len(made.done(f"j{n:02d}")) == 43 for n in range(20))
    pids = {record["pid"] for n in range(20) for record in made.done(f"j{n:02d}").values()}
    assert len(pids) == 2 and os.getpid() not in pids
    # Of 860 rows.
    assert made.most <= 4 * 43


@pytest.mark.ray
def test_few_rows_of_a_job_alone_are_carried_out_without_actors_until_there_are_more(made, ray_session):
    run_jobs([("a", made.phases("a", first=3, second=2))], title="test", few=3)
    assert {record["pid"] for record in made.done("a").values()} == {os.getpid()} and len(made.done("a")) == 5
    run_jobs([("s", made.phases("s", first=3, second=2, seconds=2.0))], title="test", few=3)
    assert len({record["pid"] for record in made.done("s").values()} - {os.getpid()}) > 0
    assert os.getpid() in {record["pid"] for record in made.done("s").values()} and len(made.done("s")) == 5
    run_jobs([("b", made.phases("b", first=4, second=2))], title="test", few=3)
    assert os.getpid() not in {record["pid"] for record in made.done("b").values()} and len(made.done("b")) == 6
    jobs = [(name, made.phases(name, first=2, second=3)) for name in ("c", "d")]
    with pytest.raises(InputError, match="first of e: 2 of 2"):
        run_jobs([("e", made.phases("e", first=2, bad=True))], title="test", few=3)
    run_jobs(jobs, title="test", few=3)
    assert made.told[-1].endswith("ends") and [len(made.done(name)) for name in "cd"] == [5, 5]


@pytest.mark.ray
def test_rows_of_an_actor_that_is_lost_are_done_by_others(made, ray_session, tmp_path):
    (tmp_path / "deadly").touch()
    more = {"dies_while": str(tmp_path / "deadly"), "seconds": 0.02}
    run_jobs([("a", made.phases("a", first=30, **more)), ("b", made.phases("b"))], title="test")
    assert not (tmp_path / "deadly").exists()
    assert len(made.done("a")) == 33 and len(made.done("b")) == 8


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_who_waits_for_room_on_the_cluster_is_told(made, taken_cpus, monkeypatch):
    import ray

    monkeypatch.setattr(schedule, "PATIENCE_S", 0.5)
    cpus = ray.cluster_resources()["CPU"]
    told = []

    class Leaving(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())
            ray.kill(taken_cpus)

    handler = Leaving()
    logging.getLogger(schedule.__name__).addHandler(handler)
    try:
        run_jobs([("a", made.phases("a"))], title="test")
    finally:
        logging.getLogger(schedule.__name__).removeHandler(handler)
    assert len(told) == 1
    assert told[0].startswith(f"test: no worker could start for 0.5 s; the cluster has {cpus:g} CPUs, 0 of them free")
    assert len(made.done("a")) == 8


@pytest.mark.ray
def test_waiting_for_workers_begins_when_they_are_asked_for(made, ray_session, monkeypatch):
    """Not with a long row that this process carried out before."""
    monkeypatch.setattr(schedule, "PATIENCE_S", 1.0)
    monkeypatch.setattr(schedule, "START_S", 0.5)
    asked, told = [], []
    grow = schedule.Pool._grow

    def growing(self, stream):
        asked.append(time.monotonic())
        grow(self, stream)

    monkeypatch.setattr(schedule.Pool, "_grow", growing)
    monkeypatch.setattr(schedule.Pool, "_tell_what_is_awaited", lambda self: told.append(time.monotonic()))
    run_jobs([("a", made.phases("a", first=3, second=1, seconds=1.5))], title="test", few=3)
    assert len(made.done("a")) == 4 and asked
    assert not told or told[0] - asked[0] >= 1.0


@pytest.mark.ray
def test_a_row_that_kills_its_actors_is_named(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_LOSSES", 3)
    (tmp_path / "deadly").touch()
    rows = [{"unit": "1"}, {"unit": "2", "dies_while": str(tmp_path / "deadly"), "always": True}]
    with pytest.raises(DeepfereError, match=r"rows: 1 of 2 pieces failed; first 2: .* lost 3 times"):
        run_rows(rows, Noting, (str(tmp_path), "job"), what="rows")
    assert set(Journal(tmp_path / "job", "f").done()) == {"1"}


class Environment(RowWorker):
    """Tells what its process was begun with."""

    def work(self, row):
        return {name: os.environ.get(name) for name in (*THREADS, *MEMORY)}


@pytest.mark.ray
def test_workers_have_one_thread_and_keep_their_memory(ray_session):
    found = []
    run_rows([{"unit": "1"}], Environment, (), what="rows", on_done=found.append)
    wanted = {**dict.fromkeys(THREADS, "1"), **MEMORY}
    assert [{name: record[name] for name in wanted} for record in found] == [wanted]


@pytest.mark.ray
def test_a_pool_is_kept_for_all_that_is_carried_out_inside(made, ray_session, tmp_path):
    with schedule.pool("kept"):
        run_rows([{"unit": "1"}, {"unit": "2"}], Noting, (str(tmp_path), "a"), what="rows")
        # What is left of a run that failed is not gone on with.
        jobs = ((name, made.phases(name, first=500, bad=name == "x", seconds=0.01)) for name in "xyz")
        with pytest.raises(InputError, match="first of x: 500 of 500"):
            run_jobs(jobs, title="unused")
        run_rows([{"unit": "1"}, {"unit": "2"}], Noting, (str(tmp_path), "b"), what="rows")
        assert len(made.done("y")) < 500
    records = [Journal(tmp_path / job, "f").done() for job in ("a", "b")]
    assert [set(done) for done in records] == [{"1", "2"}] * 2
    assert len({record["pid"] for record in records[0].values()}) <= 2


class Following(RowWorker):
    """Fails, or works until it is asked to stop."""

    def work(self, row):
        if row.get("broken"):
            raise RuntimeError("the disk controller caught fire")
        Path(row["begun"]).touch()
        while True:
            time.sleep(0.01)
            look()


@pytest.mark.parametrize("inline", [0, 9])
def test_a_workers_own_traceback_is_kept_for_the_log(request, inline):
    if not inline:
        request.getfixturevalue("ray_session")
    with pytest.raises(DeepfereError) as caught:
        run_rows([{"unit": "1", "broken": True}], Following, (), what="", inline_up_to=inline)
    assert str(caught.value) == "RuntimeError: the disk controller caught fire"
    (note,) = caught.value.__notes__
    assert "in work\n" in note and 'raise RuntimeError("the disk' in note


@pytest.mark.parametrize("inline", [0, 9])
def test_a_long_row_that_looks_is_stopped_within(request, tmp_path, inline):
    if not inline:
        request.getfixturevalue("ray_session")
    told = []

    def stop() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        ask(tmp_path / "stop", "enough")

    asking = threading.Thread(target=stop)
    with pytest.raises(Stopped, match="enough"), watched(tmp_path):
        asking.start()
        row = {"unit": "1", "begun": str(tmp_path / "begun")}
        run_rows([row], Following, (), what="rows", on_done=told.append, inline_up_to=inline)
    asking.join()
    assert told == []
