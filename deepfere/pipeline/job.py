"""What a command on a study is to do, and what its results depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from deepfere.config import Config
from deepfere.pipeline.claim import claim_result
from deepfere.pipeline.fuse import identity_of
from deepfere.pipeline.given import GivenModel
from deepfere.places import Place
from deepfere.section import Section

STAGES = ("ingest", "align", "tile", "train", "reconstruct")


@dataclass(frozen=True)
class Job:
    """One stage of a study, with everything that it depends on.

    Attributes:
        stage: One of `STAGES`.
        config: Settings.
        sections: The manifest's sections.
        inputs: Digests of what the user gave, per section.
        target: Working folder.
        given: A registered model in the place of training.
        named: Its name, version and digest.
        overwrite: Replace results of other inputs or settings.
    """

    stage: str
    config: Config
    sections: list[Section]
    inputs: list[dict[str, str]]
    target: Place
    given: GivenModel | None
    named: dict[str, str]
    overwrite: bool

    @property
    def depth(self) -> int:
        """How many stages come before."""
        return STAGES.index(self.stage)

    @cached_property
    def identity(self) -> str:
        """Hash of all inputs and settings."""
        return identity_of(self.sections, self.inputs, self.config)

    def own(self, n: int) -> str:
        """Identity of one section's result: it depends on the whole study."""
        told = [self.inputs[n], {"study": self.identity, "model": str(self.named)}]
        return identity_of([self.sections[n]], told, self.config)

    def result(self, n: int) -> Place:
        """Where one section's result goes."""
        return self.target / "results" / f"{self.sections[n].name}.zarr"

    def finished(self, n: int) -> bool:
        """Whether one section's result stands there and is to stay; refuses another one."""
        return claim_result(self.result(n), self.own(n), self.overwrite)
