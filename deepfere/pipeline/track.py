"""What a run leaves in MLflow: settings, dataset digests, losses, held-out scores, figures, the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from deepfere import __version__
from deepfere.config import Config, digest
from deepfere.errors import DeepfereError, InputError
from deepfere.measured.store import SOURCE_DIGEST, open_measured
from deepfere.pipeline.learn import load_fit, read_model
from deepfere.pipeline.workspace import SectionFolder, Workspace, write_json
from deepfere.places import reading
from deepfere.reconstruction.result import Result
from deepfere.section import Section
from deepfere.submit.submission import tags_from_environment
from deepfere.training.live import Recording
from deepfere.training.mlflow_store import (
    OFF,
    connect,
    mlflow_errors,
    probe,
    recorded,
    redact,
    resolve_uri,
    sqlite_path,
)
from deepfere.training.registry import check_name
from deepfere.training.system import SystemMetrics
from deepfere.training.tracking import Status, Tracker, has_run, log_history

SECTION, LEARNED, RESULT = "deepfere.section", "deepfere.learned", "deepfere.result"
"""Tags: whose run it is, of a study's; of which learning and of which result all is recorded."""


class Run:
    """The MLflow run of one job (or nothing, with ``tracking.uri: none``).

    What belongs to one of several sections is in a run of its own under it. That is made when there is something to
    record, and found again in the store.

    Args:
        tracker: The job's run.
        work: Unfinished work.
        config: Settings.
        sections: The job's sections.
        inputs: Digests of what the user gave, per section.
        new: Whether the run was begun just now.
    """

    def __init__(
        self,
        tracker: Tracker,
        work: Workspace,
        config: Config,
        sections: list[Section],
        inputs: list[dict[str, str]],
        new: bool,
    ) -> None:
        self._tracker, self._work, self._config = tracker, work, config
        self._sections = sections
        self._given = {s.name: (s, digests) for s, digests in zip(sections, inputs, strict=True)}
        self._below: dict[str, Tracker] | None = {} if new else None
        self._open: dict[str, Tracker] = {}
        self._new, self._failed = new, set[str]()

    @property
    def recording(self) -> Recording | None:
        """The run as training's workers get it; None where there is none."""
        if not self._tracker.run_id:
            return None
        return Recording(self._tracker.uri, self._tracker.run_id, self._config.tracking.system_metrics)

    def describe(self) -> dict[str, str]:
        """Run id and store, for the provenance."""
        if not self._tracker.run_id:
            return {}
        return {
            "run_id": self._tracker.run_id,
            "uri": redact(self._tracker.uri),
            "experiment": self._config.tracking.experiment,
        }

    def _known(self) -> dict[str, Tracker]:
        if self._below is None:
            self._below = {t.tags[SECTION]: t for t in self._tracker.children() if SECTION in t.tags}
        return self._below

    def _of(self, name: str) -> Tracker:
        """The run of a section: of the only one it is the job's."""
        if len(self._sections) == 1:
            return self._tracker
        known = self._known()
        if name not in known:
            known[name] = self._tracker.nested(name, {SECTION: name})
            _log_input(known[name], *self._given[name])
        if RESULT not in known[name].tags:
            self._open[name] = known[name]
        return known[name]

    def log_learning(self, history: list[dict[str, float]]) -> dict[str, str]:
        """Losses, held-out scores, speed and the model; returns the registered model's name and version."""
        facts = self._work.facts("learn")
        learned = {LEARNED: str(facts.get("fingerprint", ""))}
        if self._tracker.run_id and not learned.items() <= self._tracker.tags.items():
            log_history(self._tracker, history)
            scores = [self._log_section(section, learned) for section in self._sections]
            summary: dict[str, float] = {}
            if len(scores) > 1:
                summary["sections"] = len(scores)
                summary["held_out_r2_median"] = float(np.mean([score["held_out_r2_median"] for score in scores]))
                summary["held_out_r2_best"] = max(score["held_out_r2_best"] for score in scores)
            if history:
                speed = {f"training_{name}": value for name, value in facts.get("timing", {}).items()}
                log_history(self._tracker, [{"step": history[-1]["step"], **speed}])
            self._tracker.log_metrics(summary, tags=learned)
        cubes = [open_measured(str(self._work.section(section.name).measured)) for section in self._sections]
        sources = [cube.attrs.get(SOURCE_DIGEST) for cube in cubes]
        seen = {digests["msi"] for _, digests in self._given.values()}
        seen |= {source for source in sources if source is not None}
        return self._register(self._work.section(self._sections[0].name), sorted(seen))

    def _log_section(self, section: Section, learned: dict[str, str]) -> dict[str, float]:
        """Scores of a section's choices, recorded once."""
        folder = self._work.section(section.name)
        fit = load_fit(folder)
        informed = fit.informed()
        scores: dict[str, float] = {
            "held_out_r2_median": float(np.median(fit.ion_r2)),
            "held_out_r2_best": float(fit.ion_r2.max()),
            "ions_informed": informed.count("stain-informed"),
            "ions_partly": informed.count("partly"),
            "ions_smooth": informed.count("smooth"),
        }
        notes = read_model(folder)["notes"]
        scores |= {k: v for k, v in notes.items() if isinstance(v, int | float)}
        tracker = self._of(section.name)
        if not learned.items() <= tracker.tags.items():
            tracker.log_dict({**notes, "tier": notes.get("tier")}, "choice.json")
            tracker.log_metrics(scores, tags=learned if tracker is not self._tracker else None)
        return scores

    def _register(self, folder: SectionFolder, seen: list[str]) -> dict[str, str]:
        """The study's network, with the basis that any of its sections keeps."""
        model = read_model(folder)
        name = self._config.tracking.register_as
        if not self._tracker.run_id or name is None or model["state"] is None:
            return {}
        known = self._work.facts("register")
        if known.get("run_id") == self._tracker.run_id:
            return {"name": known["name"], "version": known["version"]}
        from deepfere.training.tracking import register_model

        settings = {
            "network": model["network"],
            "tier": model["tier"],
            "deepfere": __version__,
            "config": recorded(self._config),
            "mz": open_measured(str(folder.measured)).mz.tolist(),
            "basis": load_fit(folder).basis.tolist(),
            "noise_sd": model["noise_sd"],
            "seen": seen,
        }
        with reading(model["state"]) as path:
            info = register_model(self._tracker, name, path, settings)
        out = {"name": info.name, "version": str(info.version)}
        write_json(self._work.root / "done" / "register.json", {**out, "run_id": self._tracker.run_id, "seconds": 0})
        return out

    def log_result(self, result: Result, section: str) -> None:
        """Consistency, figures and the result's path."""
        from deepfere.evaluation.figures import r2_histogram

        ions, tracker = result.ions, self._of(section)
        tracker.log_figure(
            r2_histogram(ions["held_out_r2"], list(ions["informed"]), ions["null_r2"]), "held_out_r2.png"
        )
        identity = result.provenance["identity"]
        tracker.log_dict({"result": result.path, "identity": identity, "ions": len(ions)}, "result.json")
        tracker.log_metrics({"consistency_worst": float(ions["consistency"].max())}, tags={RESULT: identity})
        if tracker is not self._tracker:
            self._open.pop(section, None)
            tracker.finish()

    def lacks_result(self, name: str) -> bool:
        """Whether a section's run was begun and its result is not in it: a program was lost before it could tell."""
        if not self._tracker.run_id or self._new:
            return False
        known = self._tracker if len(self._sections) == 1 else self._known().get(name)
        return known is not None and RESULT not in known.tags

    def section_failed(self, name: str) -> None:
        """Close the run of a section that failed, if there is one."""
        self._failed.add(name)
        # That the store fails as well is told by whatever needs it next.
        with suppress(DeepfereError):
            if self._open.pop(name, None) is not None or name in self._known():
                self._known()[name].finish("FAILED")

    def end(self, status: Status) -> None:
        """Close it, and what is open below it."""
        below = dict(self._open)
        if status == "FINISHED" and not self._new and len(self._sections) > 1:
            # An earlier attempt that was lost or stopped has left them so.
            left = {n: t for n, t in self._known().items() if t.status in ("RUNNING", "KILLED")}
            below |= {n: t for n, t in left.items() if n not in self._failed}
        for tracker in below.values():
            tracker.finish(status)
        self._tracker.finish(status)


NO_STORE = "give another one (tracking.uri=sqlite:////PATH/mlflow.db), or do without (tracking.uri=none)"


def check_tracking(config: Config) -> None:
    """Refuse a tracking store that does not answer, before work starts; none is made yet.

    Raises:
        InputError: It does not.
    """
    uri = resolve_uri(config.tracking.uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"MLflow's store cannot be written ({error.strerror or error})", where=path, remedy=NO_STORE
            ) from error
        if not os.access(path.parent, os.W_OK):
            raise InputError("MLflow's store cannot be written", where=path, remedy=NO_STORE)
    elif uri != OFF:
        connect(uri)
    if config.tracking.register_as is not None:
        check_name(config.tracking.register_as)


@contextmanager
def tracked(
    work: Workspace, sections: list[Section], inputs: list[dict[str, str]], config: Config, name: str
) -> Iterator[Run]:
    """Open the job's run, or go on with it after a restart; close it with how the job ended."""
    belongs = _belongs(inputs, config)
    known = work.facts("track")
    if known.get("belongs") != belongs:
        known = {}

    def note(run_id: str, described: bool = False, ended: bool = False) -> None:
        facts = {"run_id": run_id, "belongs": belongs, "described": described, "ended": ended, "seconds": 0}
        write_json(work.root / "done" / "track.json", facts)

    try:
        if not has_run(config.tracking.uri, known.get("run_id")):
            known = {}
        tracker = Tracker.start(
            config.tracking.uri,
            config.tracking.experiment,
            name,
            config.numbered(),
            {"deepfere.config": config.digest(), **tags_from_environment()},
            run_id=known.get("run_id"),
            on_new=note,
        )
    except InputError as error:
        # It answered when the work began: what has been done since then is no worse for it.
        raise DeepfereError(str(error)) from error
    run = Run(tracker, work, config, sections, inputs, not known)
    try:
        if tracker.run_id and not known.get("described"):
            # Again, if the program was lost meanwhile.
            _describe(tracker, work, sections, inputs, config, name)
        if tracker.run_id:
            note(tracker.run_id, described=True)
        with _load_of_this_host(tracker, config):
            yield run
    except BaseException as error:
        # What stopped it is told, not that the store could not be told.
        with suppress(DeepfereError), mlflow_errors(tracker.uri):
            probe(tracker.uri)
            run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.end("FINISHED")
    if tracker.run_id:
        note(tracker.run_id, described=True, ended=True)


def _belongs(inputs: list[dict[str, str]], config: Config) -> str:
    """A run goes on only for the same inputs and settings, in the same store: MLflow's parameters are for ever."""
    where = config.tracking.model_dump(mode="json", exclude={"system_metrics"})
    return digest([inputs, config.digest(), where])


def is_open(work: Workspace, inputs: list[dict[str, str]], config: Config) -> bool:
    """Whether a run of this work was begun and never finished."""
    known = work.facts("track")
    return known.get("belongs") == _belongs(inputs, config) and not known.get("ended")


def _describe(
    tracker: Tracker,
    work: Workspace,
    sections: list[Section],
    inputs: list[dict[str, str]],
    config: Config,
    name: str,
) -> None:
    """Settings, and what the job is made from."""
    tracker.log_dict(recorded(config), "config.json")
    if len(sections) == 1:
        _log_input(tracker, sections[0], inputs[0])
        return
    rows = [
        {"section": section.name, **row}
        for section, digests in zip(sections, inputs, strict=True)
        for row in _rows(digests)
    ]
    tracker.log_dataset(name, digest(inputs), str(work.root), rows)


@contextmanager
def _load_of_this_host(tracker: Tracker, config: Config) -> Iterator[None]:
    if not (tracker.run_id and config.tracking.system_metrics):
        yield
        return
    load = SystemMetrics(tracker.uri, tracker.run_id)
    try:
        yield
    finally:
        load.close()


def _log_input(tracker: Tracker, section: Section, digests: dict[str, str]) -> None:
    tracker.log_dataset(section.name, digests["msi"], section.msi, _rows(digests))


def _rows(digests: dict[str, str]) -> list[dict[str, str]]:
    return [{"file": kind, "sha256": value} for kind, value in digests.items()]
