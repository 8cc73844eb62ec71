"""Sections of a study side by side: a stage of a section is one row, carried out on whatever machine is free.

The driver decides what comes next and collects what failed; files are read, spectra ingested and slides searched by the
pool's workers, each of which holds one section at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from deepfere.config import Config
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.places import UrlPath
from deepfere.rows import Phase, Phases, Record, Row, RowWorker
from deepfere.schedule import run_jobs
from deepfere.section import Section
from deepfere.stopping import current, following, looking


class SectionWorker(RowWorker):
    """Carries out one stage of sections.

    Args:
        root: The study's folder or URL.
        config: Settings.

    Attributes:
        stage: What it is called where it fails.
    """

    stage: str

    def __init__(self, root: str, config: Config) -> None:
        self.folder, self.config = Workspace(root), config

    def work(self, row: Row) -> Record:
        """One section: ``section``, and ``inputs``, the digests of what the user gave for it."""
        self.do(row["section"], row["inputs"], looking(lambda *_: None))
        return {}

    @abstractmethod
    def do(self, section: Section, inputs: dict[str, str], progress: Progress) -> None:
        """The stage; calling ``progress`` now and then lets it be stopped."""


class SideBySide:
    """Runs the sections of a study through stages.

    Files of the user at a path are where the driver is. Other machines see them, too, where they share the work folder;
    with work at a URL they need not, and the driver carries out what reads such files. Files at URLs all machines see.

    Args:
        work: Unfinished work.
        config: Settings.
        failures: Gets the sections that fail.
        files: Whether the stages read the user's files.
    """

    def __init__(self, work: Workspace, config: Config, failures: Failures, files: bool = True) -> None:
        self._work, self._config, self._failures = work, config, failures
        self._apart = files and isinstance(work.root, UrlPath)
        self._here = not config.guide or failures.sections == 1
        self._at: dict[str, str] = {}

    def stage(
        self,
        worker: type[SectionWorker],
        section: Section,
        inputs: dict[str, str],
        progress: Progress,
        *arguments: object,
    ) -> Phases:
        """One stage of one section; ``progress`` is called on the way where it is carried out in the driver."""
        self.begin(section, worker.stage)
        given: tuple[Any, ...] = (str(self._work.root), self._config, *arguments)
        if self._here or (self._apart and not section.everywhere):
            with following(str(current() or "")):
                worker(*given).do(section, inputs, looking(progress))
        else:
            row = {"unit": section.name, "section": section, "inputs": inputs}
            yield Phase("", worker, given, [row], 1)

    def begin(self, section: Section, stage: str) -> None:
        """What the section is at, for its failures."""
        self._at[section.name] = stage

    def run(self, jobs: Iterable[tuple[str, Phases]]) -> None:
        """Carry out the phases of all sections; one that fails does not keep the others."""
        run_jobs(jobs, title="prepare", here=not self._config.guide, failed=self._failed)

    def each(
        self,
        worker: type[SectionWorker],
        sections: Iterable[tuple[Section, dict[str, str]]],
        done: Callable[[float], None],
        arguments: Callable[[int], tuple[Any, ...]] = lambda n: (),
        progress: Progress = lambda *_: None,
    ) -> None:
        """One stage of all of them.

        Args:
            worker: Of the stage.
            sections: Each with the digests of what the user gave for it.
            done: Called with the share of them that is done.
            arguments: What else the worker of the n-th one is built with.
            progress: See `stage`.
        """
        todo = list(sections)
        count = 0

        def only(n: int, section: Section, inputs: dict[str, str]) -> Phases:
            nonlocal count
            yield from self.stage(worker, section, inputs, progress, *arguments(n))
            count += 1
            done(count / len(todo))

        self.run((section.name, only(n, section, inputs)) for n, (section, inputs) in enumerate(todo))

    def _failed(self, name: str, error: Exception) -> None:
        def fail() -> None:
            raise error

        self._failures.of(name, self._at[name], fail)


class Together:
    """Progress of sections that are worked on at the same time."""

    def __init__(self, progress: Progress, sections: int) -> None:
        self._progress, self._sections, self._ended = progress, sections, 0
        self._shares: dict[str, float] = {}

    def of(self, section: str) -> Progress:
        """What one of them tells."""

        def tell(stage: str, share: float) -> None:
            self._shares[section] = share
            self._progress(stage, (self._ended + sum(self._shares.values())) / self._sections)

        return tell

    def end(self, section: str) -> None:
        """It is done."""
        self._shares.pop(section, None)
        self._ended += 1
