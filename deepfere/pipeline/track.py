"""What a run leaves in MLflow: settings, dataset digests, losses, held-out scores, figures, the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
from deepfere.training.mlflow_store import OFF, connect, resolve_uri, sqlite_path
from deepfere.training.registry import check_name
from deepfere.training.tracking import Tracker, log_history


class Run:
    """One MLflow run of one job (or nothing, with ``tracking.uri: none``)."""

    def __init__(self, tracker: Tracker, work: Workspace, config: Config) -> None:
        self._tracker, self._work, self._config = tracker, work, config

    def describe(self) -> dict[str, str]:
        """Run id and store, for the provenance."""
        if not self._tracker.run_id:
            return {}
        return {
            "run_id": self._tracker.run_id,
            "uri": self._tracker.uri,
            "experiment": self._config.tracking.experiment,
        }

    def log_learning(
        self,
        sections: list[Section],
        inputs: list[dict[str, str]],
        history: list[dict[str, float]],
        timing: dict[str, float],
    ) -> dict[str, str]:
        """Losses, held-out scores, speed and the model; returns the registered model's name and version."""
        log_history(self._tracker, history)
        summary: dict[str, float] = {f"training_{name}": value for name, value in timing.items()}
        for section in sections:
            folder = self._work.section(section.name)
            fit = load_fit(folder)
            head = "" if len(sections) == 1 else f"{section.name}."
            informed = fit.informed()
            summary |= {
                f"{head}held_out_r2_median": float(np.median(fit.ion_r2)),
                f"{head}held_out_r2_best": float(fit.ion_r2.max()),
                f"{head}ions_informed": informed.count("stain-informed"),
                f"{head}ions_partly": informed.count("partly"),
                f"{head}ions_smooth": informed.count("smooth"),
            }
            notes = read_model(folder)["notes"]
            summary |= {f"{head}{k}": v for k, v in notes.items() if isinstance(v, int | float)}
            self._tracker.log_dict({**notes, "tier": notes.get("tier")}, f"{head}choice.json")
        self._tracker.log_metrics(summary)
        cubes = [open_measured(str(self._work.section(section.name).measured)) for section in sections]
        sources = [cube.attrs.get(SOURCE_DIGEST) for cube in cubes]
        seen = {digests["msi"] for digests in inputs} | {source for source in sources if source is not None}
        return self._register(self._work.section(sections[0].name), sorted(seen))

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
            "config": self._config.resolved(),
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

    def log_result(self, result: Result, section: str | None = None) -> None:
        """Consistency, figures and the result's path; of several sections each under its name."""
        from deepfere.evaluation.figures import r2_histogram

        ions = result.ions
        head = "" if section is None else f"{section}."
        self._tracker.log_metrics({f"{head}consistency_worst": float(ions["consistency"].max())})
        figure = r2_histogram(ions["held_out_r2"], list(ions["informed"]), ions["null_r2"])
        self._tracker.log_figure(figure, f"{head}held_out_r2.png")
        self._tracker.log_dict(
            {"result": result.path, "identity": result.provenance["identity"], "ions": len(ions)}, f"{head}result.json"
        )


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
    # A run goes on only for the same inputs and settings, in the same store: MLflow's parameters are for ever.
    belongs = digest([inputs, config.digest(), config.tracking.model_dump(mode="json")])
    known = work.facts("track")
    if known.get("belongs") != belongs:
        known = {}
    try:
        tracker = Tracker.start(
            config.tracking.uri,
            config.tracking.experiment,
            name,
            config.numbered(),
            {"deepfere.config": config.digest(), **tags_from_environment()},
            run_id=known.get("run_id"),
        )
    except InputError as error:
        # It answered when the work began: what has been done since then is no worse for it.
        raise DeepfereError(str(error)) from error
    if tracker.run_id and not known:
        write_json(work.root / "done" / "track.json", {"run_id": tracker.run_id, "belongs": belongs, "seconds": 0})
        tracker.log_dict(config.resolved(), "config.json")
        for section, digests in zip(sections, inputs, strict=True):
            rows = [{"file": kind, "sha256": value} for kind, value in digests.items()]
            tracker.log_dataset(section.name, digests["msi"], section.msi, rows)
    try:
        yield Run(tracker, work, config)
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")
