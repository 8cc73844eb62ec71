"""From a command as the user gave it to what is sent: settings resolved, paths absolute, and all of it checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from deepfere.config import Config, load_config
from deepfere.errors import InputError
from deepfere.places import located, place
from deepfere.submit.submission import Submission, make_submission, shipped

SETTINGS = {
    "factor": "factor",
    "mz": "ingest__mz",
    "tolerance_ppm": "ingest__tolerance_ppm",
    "representation": "ingest__representation",
    "lock_mass": "ingest__lock_mass_mz",
    "normalisation": "ingest__normalisation",
    "reference_mz": "ingest__reference_mz",
    "duplicates": "ingest__duplicates",
    "slide_backend": "slide__backend",
    "slide_icc": "slide__icc",
}
"""Options that are settings: they travel as these."""
ELSEWHERE = "--paths-on-cluster"


def prepare(command: click.Command, values: Mapping[str, Any], *, to: str, elsewhere: bool) -> Submission:
    """Resolve and check a command.

    Args:
        command: The job's own command.
        values: Its parameters as click has read them.
        to: The kind of place that it is sent to.
        elsewhere: Its files are not on this machine.

    Raises:
        InputError: A setting or path is wrong.
    """
    values = dict(values)
    slide = values.get("slide")
    if slide is not None and "=" in slide.partition("://")[0] and not os.path.exists(slide):  # noqa: PTH110 - any text, of any length
        values["overrides"], values["slide"] = (slide, *values["overrides"]), None
    guide = False if values.get("no_guide") else None
    given = {key: values.get(name) for name, key in SETTINGS.items()}
    if values.get("reference_mz") is not None:
        given["ingest__normalisation"] = given["ingest__normalisation"] or "reference"
    config = load_config(values["config"], values["overrides"], guide=guide, **given)
    if elsewhere and to in ("local", "slurm"):
        raise InputError(
            f"a job that goes to {to} sees the files of this machine", where=ELSEWHERE, remedy="leave it out"
        )
    words, paths = _words(command, values, elsewhere)
    _check(str(command.name), values, paths, config, to, elsewhere)
    study = paths["msi" if command.name == "fuse" else "study"]
    return make_submission(str(command.name), words, study, paths["out"], shipped(config, to))


def _words(command: click.Command, values: Mapping[str, Any], elsewhere: bool) -> tuple[list[str], dict[str, str]]:
    """The command's words without settings, and its paths by parameter."""
    words, options, paths = [], [], {}
    for parameter in command.params:
        name, value = str(parameter.name), values.get(str(parameter.name))
        if value in (None, False, ()) or name in SETTINGS or name in ("overrides", "config", "no_guide"):
            continue
        if isinstance(parameter.type, click.Path):
            value = paths[name] = _absolute(str(value), parameter, elsewhere)
        if isinstance(parameter, click.Option):
            for one in value if parameter.multiple else [value]:
                options += [parameter.opts[-1], *([] if parameter.is_flag else [str(one)])]
        else:
            words.append(str(value))
    return [*words, *options], paths


def _absolute(path: str, parameter: click.Parameter, elsewhere: bool) -> str:
    if "://" in path:
        return path
    if not elsewhere:
        return located(path)
    if not path.startswith("/"):
        where = parameter.opts[-1] if isinstance(parameter, click.Option) else str(parameter.name)
        raise InputError(f"{path} is relative to this machine", where=where, remedy="give the path that the nodes see")
    return path.rstrip("/")


def _check(
    job: str, values: Mapping[str, Any], paths: Mapping[str, str], config: Config, to: str, elsewhere: bool
) -> None:
    """What can be known without reading pixels."""
    from deepfere.pipeline.deep import check_patches
    from deepfere.pipeline.fuse import check_files, check_output, output
    from deepfere.pipeline.study import study_sections
    from deepfere.section import make_section
    from deepfere.tiling.plan import check_range
    from deepfere.training.registry import check_name

    check_range(config.factor)
    check_patches(config)
    if config.tracking.register_as is not None:
        check_name(config.tracking.register_as)
    if job == "fuse" and config.guide and values["slide"] is None:
        raise InputError("no slide is given", remedy="give the slide, or --no-guide")
    if elsewhere:
        return
    if job == "fuse":
        named = {key: paths.get(key) for key in ("msi", "slide", "alignment", "landmarks")}
        more = {key: values.get(key) for key in ("pitch_um", "slide_mpp_um", "region", "slide_region")}
        if not config.guide:
            named["slide"] = None
        sections = [make_section(name="section", **named, **more)]
    else:
        sections = study_sections(job, paths["study"], config)
    for section in sections:
        _exist(to, section.msi, section.slide, section.alignment, section.landmarks)
        check_files(section, config)
    check_output(output(paths["out"]))


def _exist(to: str, *paths: str | None) -> None:
    more = f", or give {ELSEWHERE}" if to in ("ray", "kuberay") else ""
    for path in paths:
        if path is not None and not place(path).exists():
            raise InputError("does not exist", where=path, remedy=f"check the path{more}")
