"""``fuse``: one section through all stages; and the same stages over a study."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from deepfere.cluster import alone_on_machine, cluster_gpus, connect, one_thread
from deepfere.config import Config, digest, load_config
from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.pipeline.claim import claim_result
from deepfere.pipeline.deep import check_patches
from deepfere.pipeline.failures import Failures
from deepfere.pipeline.given import GivenModel, given_model
from deepfere.pipeline.learn import learn_stage
from deepfere.pipeline.overview import section_pieces
from deepfere.pipeline.prepare import align_stage, ingest_stage, is_ingested, msi_input_digest, prepared
from deepfere.pipeline.seal import Outcome
from deepfere.pipeline.tile import tile_phases
from deepfere.pipeline.track import check_tracking, is_open, tracked
from deepfere.pipeline.workspace import Progress, Workspace
from deepfere.pipeline.write import reconstruct_phases
from deepfere.places import Place, UrlPath, located, place
from deepfere.readers.digest import content_digest
from deepfere.readers.mis import MIS, read_mis, teaching_points_beside
from deepfere.readers.slide import slide_digest
from deepfere.readers.slide_zarr import is_zarr
from deepfere.reconstruction.result import Result, open
from deepfere.remote import filesystem, is_url
from deepfere.schedule import FEW, run_jobs
from deepfere.section import EACH, Section, make_section
from deepfere.stopping import looking, watched
from deepfere.tiling.plan import check_range
from deepfere.training.trainer import preflight

RESULT_FORMAT = 1


def quiet(stage: str, share: float) -> None:
    """Progress that says nothing."""


def input_digests(section: Section, config: Config) -> dict[str, str]:
    """Content digests of everything that the user gave for a section.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    out = {"msi": msi_input_digest(section.msi)}
    for name, path in {"alignment": section.alignment, "landmarks": section.landmarks}.items():
        if path is not None:
            if is_url(path):
                raise InputError("is a URL", where=path, remedy=f"give the {name} as a local file")
            _check_file(path, name)
            out[name] = content_digest(path)
    if config.guide and section.slide is not None:
        if not (is_url(section.slide) or is_zarr(section.slide)):
            _check_file(section.slide, "slide")
        out["slide"] = slide_digest(section.slide)
    return out


def _check_file(path: str, name: str) -> None:
    if Path(path).is_dir():
        raise InputError("is a folder", where=path, remedy=f"give the file of the {name}")
    if not Path(path).is_file():
        raise InputError("does not exist", where=path, remedy="check the path")


def identity_of(sections: list[Section], inputs: list[dict[str, str]], config: Config) -> str:
    """Hash of inputs and resolved settings: what makes a result what it is."""
    stated = [[s.name, s.pitch_um, s.slide_mpp_um, s.region, s.slide_region, s.mz_range] for s in sections]
    return digest([RESULT_FORMAT, stated, inputs, config.digest()])


def output(given: str | Path) -> Place:
    """Where a command is to write: an absolute path, or a URL, with nothing at its end.

    Raises:
        InputError: It is no path, or has no name.
    """
    name = str(place(given)).rstrip("/") if str(given).strip() else ""
    if not name:
        raise InputError(
            "is no name for an output", where=repr(str(given)), remedy="give -o a path or s3://BUCKET/NAME"
        )
    return place(name).resolve()


def check_output(path: Place) -> None:
    """Refuse an output that cannot be written, before work starts.

    Whether a bucket may be written to shows when the lock is put there, also before work starts.
    """
    if isinstance(path, UrlPath):
        if not str(path).startswith(("s3://", "s3a://")):
            raise InputError(
                "is no output: of the stores at a URL, those of the S3 protocol can keep a lock",
                where=path,
                remedy="give s3://BUCKET/NAME, or a path",
            )
        if not path.name or str(path).count("/") < 3 or set("*?[]#") & set(str(path)):
            raise InputError(
                "is no name for an output", where=path, remedy="give s3://BUCKET/NAME, without any of * ? [ ] #"
            )
        filesystem(str(path))
        path.exists()
        return
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if path.is_file():
        raise InputError("is a file", where=path, remedy="choose another output")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError("cannot be written", where=path, remedy="choose an output in a folder that you may write to")


def check_apart(target: Place, sections: Iterable[Section]) -> None:
    """Refuse an output inside one of the inputs, or around one: it would be read, or removed, as a part of the other.

    Raises:
        InputError: One lies in the other.
    """
    for section in sections:
        for given in (section.msi, section.slide, section.alignment, section.landmarks):
            if given is None or is_url(given) != isinstance(target, UrlPath):
                continue
            source = place(given) if is_url(given) else Path(given).resolve()
            if _inside(target, source):
                raise InputError(f"lies inside the input {source}", where=target, remedy="choose another output")
            if any(_inside(source, ours) for ours in (target, target.with_name(f"{target.name}.work"))):
                raise InputError(
                    f"holds the input {source}, which would go with what stood there",
                    where=target,
                    remedy="choose another output",
                )


def _inside(one: Place, other: Place) -> bool:
    return f"{str(one).rstrip('/')}/".startswith(f"{str(other).rstrip('/')}/")


def check_files(section: Section, config: Config) -> None:
    """Refuse a slide, an alignment or landmarks that cannot be read, before work starts.

    Raises:
        InputError: One of them cannot be.
    """
    if section.slide is None:
        return
    section_pieces(section, config)
    if section.alignment is not None:
        Alignment.load(section.alignment)
    if section.landmarks is not None:
        if Path(section.landmarks).suffix.lower() == MIS:
            read_mis(section.landmarks)
        else:
            Alignment.from_landmarks(section.landmarks)


def with_teaching_points(section: Section) -> Section:
    """The section, placed by the teaching points beside its measurement if they are for its slide.

    An alignment or landmarks that were given win.
    """
    if section.slide is None or section.alignment is not None or section.landmarks is not None:
        return section
    found = teaching_points_beside(section.msi, section.slide)
    return section if found is None else section.model_copy(update={"landmarks": str(found)})


def _located(path: str | Path) -> str:
    """A path that stays right in another folder; a URL as it is."""
    return str(path) if is_url(path) else located(path)


def check_resources(config: Config, on_ray: bool, writes: bool = True) -> None:
    """Refuse a tracking store, a cluster or a number of workers that cannot be had, before work starts.

    Args:
        config: Settings.
        on_ray: Whether the work to come runs on Ray.
        writes: Whether it reconstructs.

    Raises:
        InputError: One of them cannot be had.
        DeepfereError: Ray does not start.
    """
    check_tracking(config)
    if config.guide and config.model.tier == "paper" and config.train.use_gpu and not torch.cuda.is_available():
        raise InputError(
            "the published model is trained where the command runs, and PyTorch sees no GPU there",
            where="train.use_gpu",
            remedy="set it to false, or run it on a machine with a GPU",
        )
    if on_ray:
        connect(config.ray)
        if config.guide and config.model.tier in ("auto", "T2"):
            preflight(config.train)
        if writes and per_gpu(config) and not cluster_gpus():
            raise InputError(
                "reconstruction is to use GPUs and the cluster has none",
                where="reconstruct.use_gpu",
                remedy="set it to false, or check that Ray sees the GPU (deepfere doctor)",
            )


def per_gpu(config: Config) -> int | None:
    """How many of the workers that reconstruct share a GPU; None = they use none."""
    return config.reconstruct.workers_per_gpu if config.guide and config.reconstruct.use_gpu else None


def fuse(
    msi: str | Path,
    slide: str | Path | None,
    out: str | Path,
    *,
    factor: int | None = None,
    mz: Iterable[float | Mapping[str, float]] | None = None,
    tolerance_ppm: float | None = None,
    representation: str | None = None,
    lock_mass: Iterable[float] | None = None,
    normalisation: str | None = None,
    reference_mz: float | None = None,
    duplicates: str | None = None,
    pitch_um: Any = None,
    slide_mpp_um: Any = None,
    slide_backend: str | None = None,
    slide_icc: str | None = None,
    alignment: str | Path | None = None,
    landmarks: str | Path | None = None,
    region: int | str | None = None,
    slide_region: int | str | None = None,
    guide: bool | None = None,
    model: str | None = None,
    config: str | Path | Config | None = None,
    overrides: Iterable[str] = (),
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Result:
    """Register and fuse one section: every stage, from files to a result.

    The same call again resumes unfinished work and leaves a finished result as it is.

    Args:
        msi: The .imzML file, the store of a table (AnnData, SpatialData), or a cube that was ingested before.
        slide: The stained slide, or the URL of one; None with ``guide=False``.
        out: Where the result store goes, a path or ``s3://BUCKET/NAME.zarr``; unfinished work lies in ``OUT.work/``.
        factor: High-resolution pixels per measured pixel and axis; None lets the data choose.
        mz: Target list, an ion with a window of its own as ``{"mz": 798.54, "tolerance_ppm": 8, "tolerance_da": 0}``;
            None takes the file's axis or automatic peaks.
        tolerance_ppm: Half-width of an ion's m/z window.
        representation: "centroid" or "profile", where the file does not say.
        lock_mass: True m/z of peaks that correct the m/z of each spectrum.
        normalisation: "none", "tic", "rms", "median" or "reference".
        reference_mz: Ion to normalise by; without another ``normalisation`` it means "reference".
        duplicates: Several spectra for one pixel: "error", "sum" or "mean".
        pitch_um: Measured pixel size, where the file does not state it.
        slide_mpp_um: Slide pixel size, where the file does not state it.
        slide_backend: Reader of the slide: "auto", "openslide" or "tiff".
        slide_icc: "srgb" converts colours by the slide's embedded profile, "none" takes them as they are stored.
        alignment: Alignment JSON to use as it is.
        landmarks: Landmark CSV, or sequence file with teaching points (.mis), that fixes the affine.
        region: Which of the measurement's regions, from 1, or "all"; None where there is only one.
        slide_region: Which of the slide's pieces of tissue, from 1, or "all", to search all of the slide; None where
            one alone is large enough to be what was measured.
        guide: False reconstructs without the stain: the baseline of everything.
        model: Registered model in the place of training (``models:/NAME@ALIAS``, ``models:/NAME/VERSION``); its m/z are
            the targets where none are given.
        config: Settings file (YAML) or object; what else is given here wins over it.
        overrides: ``section.key=value`` strings.
        overwrite: Replace a result or work of other inputs or settings, and begin anew with these.
        progress: Called with (stage, share done).

    Returns:
        The opened result.

    Raises:
        InputError: The input is wrong; nothing was left behind.
        DeepfereError: A stage failed; the same call resumes.
    """
    file = None if isinstance(config, Config) else config
    paths = {"msi": msi, "slide": slide, "config": file, "landmarks": landmarks, "alignment": alignment}
    for name, path in paths.items():
        if not isinstance(path, str | os.PathLike | None):
            raise InputError(f"{name}={path!r} is no path", remedy="give a path")
    targets, lock = _numbers("mz", mz), _numbers("lock_mass", lock_mass)
    settings = load_config(
        file,
        overrides,
        base=config if isinstance(config, Config) else None,
        factor=factor,
        guide=guide,
        ingest__mz=targets,
        ingest__tolerance_ppm=tolerance_ppm,
        ingest__representation=representation,
        ingest__lock_mass_mz=lock,
        ingest__normalisation=normalisation or (None if reference_mz is None else "reference"),
        ingest__reference_mz=reference_mz,
        ingest__duplicates=duplicates,
        slide__backend=slide_backend,
        slide__icc=slide_icc,
    )
    check_range(settings.factor)
    check_patches(settings)
    if settings.guide and slide is None:
        raise InputError("no slide is given", remedy="give the slide, or --no-guide")
    named, trained = dict[str, str](), None
    if model is not None:
        if not settings.guide:
            raise InputError("a model is about the stain", where=model, remedy="leave out the model, or --no-guide")
        trained, named = given_model(model, settings)
        if settings.ingest.mz is None and not is_ingested(str(msi)):
            settings = load_config(None, (), base=settings, ingest__mz=trained.mz.tolist())
    section = make_section(
        name="section",
        msi=_located(msi),
        slide=None if slide is None or not settings.guide else _located(slide),
        pitch_um=pitch_um,
        slide_mpp_um=slide_mpp_um,
        alignment=None if alignment is None else located(alignment),
        landmarks=None if landmarks is None else located(landmarks),
        region=region,
        slide_region=slide_region,
    )
    for option in ("region", "slide_region"):
        if getattr(section, option) == EACH:
            raise InputError("each is for the sections of a study", where=option, remedy="give a number, or a study")
    if alignment is not None and landmarks is not None:
        raise InputError("both an alignment and landmarks are given", remedy="give one of them")
    section = with_teaching_points(section)
    target = output(out)
    check_apart(target, [section])
    check_output(target)
    inputs = input_digests(section, settings)
    check_files(section, settings)
    identity = identity_of([section], [inputs | {"model": str(named)} if named else inputs], settings)
    work = Workspace(target.with_name(target.name + ".work"))
    if claim_result(target, identity, overwrite):
        if work.belongs_to(identity):
            # Stopped between the result's last byte and the removal of its work; or somebody is making it anew.
            with suppress(InputError), work.locked():
                if is_open(work, [inputs], settings):
                    with tracked(work, [section], [inputs], settings, target.name) as run:
                        run.log_result(Result(str(target)), section.name)
                work.remove()
        return open(str(target))
    work.check(identity, overwrite)
    with work.locked() as check, watched(work.root, settings.run.time_limit_s, check):
        check_resources(settings, settings.guide)
        resumed = work.claim(identity, overwrite, anew=overwrite)
        try:
            with work.failures():
                result = _run(section, inputs, identity, target, work, settings, looking(progress), trained, named)
        except InputError:
            # What can be wrong at first is what the files hold: leave nothing behind that this call made. Later it is
            # credentials that ended or a machine without its GPU, and the work is worth hours.
            if not (resumed or work.facts("tile", section.name) or work.facts("learn")):
                work.remove()
            raise
        work.remove()
    return result


def _numbers(name: str, given: Iterable[Any] | None) -> list[Any] | None:
    try:
        return None if given is None else [v if isinstance(v, Mapping) else float(v) for v in given]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{given!r} is not a list of m/z", where=name, remedy="give numbers: [798.54, 826.57]"
        ) from error


def _run(
    section: Section,
    inputs: dict[str, str],
    identity: str,
    target: Place,
    work: Workspace,
    config: Config,
    progress: Progress,
    given: GivenModel | None,
    named: dict[str, str],
) -> Result:
    with one_thread(config.ray):
        few = FEW if alone_on_machine(config.ray) else 0
        ingest_stage(section, inputs, work, config, progress)
        prep = prepared(section, work, config)
        if config.guide:
            align_stage(prep, inputs, work, config, progress)
            tiling = tile_phases(prep, inputs, work, config, progress)
            run_jobs([(section.name, tiling)], title="tile", few=few)
        with tracked(work, [section], [inputs], config, target.name) as run:
            alone, name = Failures([section.name], work), f"run-{identity[:12]}"
            history = learn_stage([section], [inputs], work, config, progress, name, alone, given, run.recording)
            outcome = Outcome(identity, inputs, run.describe(), named or run.log_learning(history), [])
            depends = [inputs, config.digest(), *([given.digest] if given else [])]
            phases = reconstruct_phases(prep, target, depends, outcome, work, config, progress)
            here, gpus = not config.guide, per_gpu(config)
            few = 0 if gpus else few
            run_jobs([(section.name, phases)], title="reconstruct", here=here, per_gpu=gpus, few=few)
            result = Result(str(target))
            run.log_result(result, section.name)
        return result
