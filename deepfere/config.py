"""Settings: pydantic models that the YAML files in ``configs/`` mirror, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deepfere.errors import InputError
from deepfere.targets import Target, parse_target, plain, target_list


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        # YAML's yes and true would count as 1.
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{str(value).lower()} is no value here")
        return value


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which no key of a mapping stands twice: the last one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} stands twice, at line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        yaml.YAMLError: It is none, or names a thing twice.
    """
    return yaml.load(text, _EachKeyOnce)


def rising(value: tuple[float, float] | None) -> tuple[float, float] | None:
    """A range of m/z, refused where it is none.

    Raises:
        ValueError: It does not rise, or begins below zero.
    """
    if value is not None and not 0 <= value[0] < value[1]:
        raise ValueError(f"{value[0]:g} to {value[1]:g} is no range of m/z")
    return value


class IngestSettings(_Settings):
    """How the measurement is read."""

    tolerance_ppm: float = Field(5.0, gt=0, le=1000, description="half-width of an ion's m/z window")
    tolerance_da: float = Field(0.0, ge=0, le=10, description="added to that half-width, whatever the m/z")
    mz: list[Annotated[float | Target, PlainValidator(parse_target), PlainSerializer(plain)]] | None = Field(
        None, description="target list, sorted; None = the file's axis, or automatic peaks"
    )
    mz_range: tuple[float, float] | None = Field(None, description="lowest and highest m/z of automatic peaks")
    structure: Literal["auto", "none"] = Field("auto", description="none keeps automatic peaks that show none")
    normalisation: Literal["none", "tic", "rms", "median", "reference"] = "none"
    reference_mz: float | None = Field(None, gt=0, description="for normalisation: reference")
    representation: Literal["centroid", "profile"] | None = Field(None, description="where the file does not say")
    lock_mass_mz: list[float] | None = Field(None, description="true m/z of peaks that correct each spectrum's m/z")
    lock_mass_tolerance_ppm: float = Field(20.0, gt=0, le=1000, description="how far off they are looked for")
    baseline: Literal["none", "tophat", "snip"] = Field("none", description="taken away from profiles")
    baseline_width_ppm: float = Field(3000.0, gt=0, le=1e5, description="wider than any peak")
    smoothing: Literal["none", "savgol", "gaussian"] = Field("none", description="of profiles")
    smoothing_points: int = Field(9, ge=5, le=1001, description="odd")
    duplicates: Literal["error", "sum", "mean"] = Field("error", description="several spectra for one pixel")
    band_rows: int = Field(64, ge=1)

    @field_validator("mz", "lock_mass_mz")
    @classmethod
    def _targets(cls, value: list[float | Target] | None) -> list[float | Target] | None:
        return None if value is None else target_list(value)

    @field_validator("mz_range")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return rising(value)

    @model_validator(mode="after")
    def _reference(self) -> IngestSettings:
        if self.normalisation == "reference" and self.reference_mz is None:
            raise ValueError("normalisation=reference needs an m/z: give --reference-mz (ingest.reference_mz)")
        return self

    @field_validator("smoothing_points")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"{value} is even, and a point has as many before it as behind")
        return value

    def sampled(self) -> dict[str, Any]:
        """What a sample of a section's spectra depends on."""
        unused = {"mz", "mz_range", "structure", "normalisation", "reference_mz", "duplicates", "band_rows"}
        return self.model_dump(exclude=unused)


class SlideSettings(_Settings):
    """How the slide is read."""

    backend: Literal["auto", "openslide", "tiff"] = "auto"
    icc: Literal["none", "srgb"] = Field("none", description="srgb converts colours by the slide's embedded profile")


class AlignSettings(_Settings):
    """How the section is found on the slide."""

    angle_step_deg: float = Field(10.0, gt=0, le=45)
    candidates: int = Field(16, ge=2)


class ModelSettings(_Settings):
    """The fusion model."""

    max_factors: int = Field(16, ge=1, le=64)
    tier: Literal["auto", "T0", "T1", "T2", "paper"] = "auto"
    smoothing_pitch: float | None = Field(None, ge=0, le=1, description="s.d. of the features' smoothing in pixels")
    width: int = Field(32, ge=4, le=256)
    depth: int = Field(3, ge=1, le=5)
    null_guides: int = Field(20, ge=4)


def _workers(value: object) -> object:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("give a whole number from 1, or auto")
    return value


class TrainSettings(_Settings):
    """Training of the deep tier. Budgets are steps, never wall clock."""

    steps: int = Field(80, ge=1)
    batch: int = Field(4, ge=1, description="patches per step over all workers")
    patch_px: int = Field(32, ge=20, description="side of a patch in measured pixels, context included")
    rate: float = Field(2e-3, gt=0)
    rate_registration_pitch: float = Field(0.002, ge=0, description="step of the joint registration, measured pixels")
    correlation_weight: float = Field(0.1, ge=0)
    mapping_weight: float = Field(0.5, ge=0)
    report_every: int = Field(20, ge=1)
    held_out: float = Field(0.2, gt=0, lt=0.9, description="share of the spatial blocks kept from training")
    workers: Annotated[int | Literal["auto"], PlainValidator(_workers)] = Field(
        "auto", description="of Ray Train; auto = one, or without cluster and GPU none but the run's own process"
    )
    use_gpu: bool = False
    accumulate: int = Field(1, ge=1, description="parts that a worker's share of a step is split into")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the network while it trains")

    @property
    def count(self) -> int:
        """How many share a step."""
        return 1 if self.workers == "auto" else self.workers

    @property
    def resolved_precision(self) -> str:
        """What "auto" stands for: half precision on a GPU."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if self.use_gpu else "float32"


class PaperEmbedding(_Settings):
    """Training of the published model on several channels."""

    warm_up: int = Field(1000, ge=0, description="iterations of registration and mapping alone")
    iterations: int = Field(5000, ge=1, description="iterations of all parts")
    rate: float = Field(2e-5, gt=0, description="learning rate")


class PaperIon(PaperEmbedding):
    """Its training on a single ion."""

    warm_up: int = Field(0, ge=0, description="published: 1000, whose networks are then discarded")
    iterations: int = Field(500, ge=1, description="iterations of all parts")
    rate: float = Field(2e-4, gt=0, description="learning rate")


class PaperSettings(_Settings):
    """The published model (model.tier=paper)."""

    channels: int = Field(3, ge=1, le=16, description="leading factors that it works on")
    embedding: PaperEmbedding = PaperEmbedding()
    ion: PaperIon = PaperIon()
    patches: int = Field(800, ge=1, description="windows of the correlation loss per iteration")
    patch_px: int = Field(16, ge=2, le=64, description="side of such a window in high-resolution pixels")
    max_px: int = Field(400_000, ge=1, description="most high-resolution pixels of a section")
    threads: int = Field(1, ge=1, description="threads of its training")


class ReconstructSettings(_Settings):
    """Output geometry."""

    shard_px: int = Field(1024, ge=64)
    chunk_px: int = Field(256, ge=16)
    use_gpu: bool = False
    workers_per_gpu: int = Field(4, ge=1, description="workers that share one")


class RaySettings(_Settings):
    """How Ray is reached: an address, or an embedded local session."""

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1)
    object_store_memory_bytes: int = Field(256 * 2**20, ge=80 * 2**20)


class RunSettings(_Settings):
    """How a run is carried out."""

    time_limit_s: float | None = Field(None, gt=0, description="seconds after which it saves its work and stops")


class TrackingSettings(_Settings):
    """MLflow: ``uri: none`` switches tracking off."""

    uri: str | None = None
    experiment: str = "deepfere"
    register_as: str | None = Field("deepfere", description="registered model name; None = do not register")
    system_metrics: bool = Field(True, description="record the load of the machines in the run")


UNNUMBERED = ("run", "ray", "tracking")
"""Sections of the settings that change no numbers."""


class Config(_Settings):
    """Everything that a run depends on besides its inputs."""

    seed: int = Field(0, ge=0)
    factor: int | None = Field(None, description="high-resolution pixels per measured pixel and axis")
    guide: bool = True
    artefacts: Literal["auto", "none"] = Field(
        "auto", description="none uses ink, tears and folds as if they were stain"
    )
    ingest: IngestSettings = IngestSettings()
    slide: SlideSettings = SlideSettings()
    align: AlignSettings = AlignSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    paper: PaperSettings = PaperSettings()
    reconstruct: ReconstructSettings = ReconstructSettings()
    run: RunSettings = RunSettings()
    ray: RaySettings = RaySettings()
    tracking: TrackingSettings = TrackingSettings()

    def resolved(self) -> dict[str, Any]:
        """Plain values, as saved with every output."""
        return self.model_dump(mode="json")

    def numbered(self) -> dict[str, Any]:
        """Of `resolved`, what changes numbers: everything but how and on what it runs, and where Ray and MLflow are."""
        values = self.resolved()
        for name in UNNUMBERED:
            values.pop(name)
        for section, name in (("train", "use_gpu"), ("reconstruct", "use_gpu"), ("reconstruct", "workers_per_gpu")):
            values[section].pop(name)
        values["train"]["workers"] = self.train.count  # one learns the same bits wherever it is
        return values

    def digest(self) -> str:
        """Hash of what changes numbers."""
        return digest(self.numbered())


def digest(values: Any) -> str:
    """SHA-256 (hex) of plain values in a canonical form."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _assign(values: dict[str, Any], key: str, value: Any, where: object) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise InputError(f"{key!r} goes through {name!r}, which is not a section", where=where)
    values[last] = value


def _lay_over(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Put given values, section by section, in place of those that are there."""
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _lay_over(values[key], value)
        else:
            values[key] = value


def load_config(
    file: str | Path | None = None, overrides: Iterable[str] = (), base: Config | None = None, **given: Any
) -> Config:
    """Defaults, then a YAML file, then ``key=value`` overrides, then named values.

    Args:
        file: YAML that mirrors `Config`; every key is optional.
        overrides: ``section.key=value`` strings; the value is read as YAML.
        base: Settings to start from in place of the defaults.
        **given: Top-level values that are not None, or dotted keys with ``__`` for the dot.

    Raises:
        InputError: An unknown key, a value of the wrong kind or out of range, or an unreadable file.
    """
    values: dict[str, Any] = base.resolved() if base is not None else {}
    if file is not None:
        try:
            loaded = read_yaml(Path(file).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"cannot be read as settings ({error})", where=file, remedy="give a YAML file") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise InputError("does not hold key: value pairs", where=file, remedy="give a YAML mapping")
        _lay_over(values, loaded or {})
    given_by: dict[str, str | None] = {}
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise InputError(f"{text!r} is not a setting", remedy="write key=value, for example train.steps=200")
        try:
            _assign(values, key, yaml.safe_load(raw), text)
            given_by[key] = text
        except yaml.YAMLError as error:
            raise InputError(f"the value of {text!r} cannot be read ({error})") from error
    for key, value in given.items():
        if value is not None:
            _assign(values, key.replace("__", "."), value, key)
            given_by[key.replace("__", ".")] = None
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        # Of what the file does not say it is not the fault.
        by = [
            text
            for key, text in given_by.items()
            if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")
        ]
        where = file if not by else next((text for text in by if text), None)
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(first["loc"][:-1]))
            raise InputError(f"unknown setting {name!r}", where=where, remedy=f"known here: {known}") from error
        text = first["msg"].removeprefix("Value error, ")
        raise InputError(f"setting {name!r}: {text}", where=where, remedy="correct its value") from error


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        model = model.model_fields[part].annotation
    return sorted(model.model_fields)
