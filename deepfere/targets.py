"""Target lists: m/z, some of them with windows of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class Target(BaseModel):
    """An ion of a target list with a window of its own; what it does not say is that of all."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mz: float
    tolerance_ppm: float | None = Field(None, ge=0, le=1000)
    tolerance_da: float | None = Field(None, ge=0, le=10)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"{str(value).lower()} is no value here")
        return value

    @model_validator(mode="after")
    def _some_width(self) -> Target:
        if self.tolerance_ppm == 0 and not self.tolerance_da:
            raise ValueError("tolerances of 0 leave no window: give tolerance_da, or another tolerance_ppm")
        return self


def parse_target(value: Any) -> float | Target:
    """An m/z, or what a mapping says of one.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, Mapping):
        try:
            return Target.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            name = "".join(f"{part}: " for part in first["loc"])
            raise ValueError(f"{value.get('mz')!r}: {name}{first['msg'].removeprefix('Value error, ')}") from error
    if isinstance(value, Target):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no m/z")
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{value!r} is no m/z") from error


def plain(target: float | Target) -> float | dict[str, float | None]:
    """What `parse_target` takes, of plain values."""
    return target.model_dump() if isinstance(target, Target) else target


def target_list(values: Iterable[float | Target]) -> list[float | Target]:
    """Targets in ascending order, each once: the order in which they are given says nothing.

    Raises:
        ValueError: There is none, one is not a positive number, or has two different windows.
    """
    targets: dict[float, float | Target] = {}
    for value in values:
        given = isinstance(value, Target) and (value.tolerance_ppm, value.tolerance_da) != (None, None)
        mz, one = (value.mz, value if given else value.mz) if isinstance(value, Target) else (value, value)
        if not 0 < mz < float("inf"):  # false for NaN too
            raise ValueError(f"{mz:g} is not a positive number")
        if targets.setdefault(mz, one) != one:
            raise ValueError(f"{mz:g} stands there with different tolerances")
    if not targets:
        raise ValueError("there is no m/z in it")
    return [targets[mz] for mz in sorted(targets)]
