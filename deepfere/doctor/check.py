"""The form of a check's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepfere.errors import DeepfereError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: "ok", "warn" (works, worse than it could) or "fail" (some command will not work).
        detail: What was found.
        remedy: What to do about it; empty where it is ok.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def error_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, DeepfereError) else f"{type(error).__name__}: {text}"
