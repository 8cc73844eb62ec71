"""Sections of a study that failed: the others go on, and all failures are told at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepfere.errors import DeepfereError, SectionFailures
from deepfere.pipeline.workspace import Workspace


class Failures:
    """What failed so far in a study.

    Args:
        sections: Names of all that the study has; one alone fails as it does, and is not collected.
        work: Keeps the details of failures that are not the input's.

    Attributes:
        found: (section, stage, error) of each failure, in the order of the sections.
    """

    def __init__(self, sections: list[str], work: Workspace) -> None:
        self.sections, self.work = len(sections), work
        self._order = {name: n for n, name in enumerate(sections)}
        self.found: list[tuple[str, str, DeepfereError]] = []

    def of(self, section: str, stage: str, do: Callable[[], Any]) -> bool:
        """Do something for one section; False where it failed.

        Raises:
            DeepfereError: It failed, and the study has no other section.
        """
        if self.sections == 1:
            do()
            return True
        try:
            with self.work.failures(section):
                do()
        except DeepfereError as error:
            self.found.append((section, stage, error))
            self.found.sort(key=lambda failure: self._order[failure[0]])
            return False
        return True

    @property
    def names(self) -> list[str]:
        """The sections that failed, each once."""
        return list(dict.fromkeys(name for name, _, _ in self.found))

    def stop(self, why: str = "") -> None:
        """Tell the failures, if there are any.

        Args:
            why: What cannot be done for the other sections before they are mended.

        Raises:
            SectionFailures: There are.
        """
        if self.found:
            raise SectionFailures(self.found, self.sections, why)
