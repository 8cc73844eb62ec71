"""Is this machine, or the cluster it can reach, fit for deepfere: versions, codecs, GPU, storage, Ray, MLflow.

Every check stands alone: whatever goes wrong in one becomes its result, and the others still run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from deepfere.doctor import machine
from deepfere.doctor.check import Check, Status, error_line
from deepfere.doctor.ray_session import RAY_TIMEOUT_S, try_ray

__all__ = ["Check", "Status", "diagnose", "is_fit", "render"]


def diagnose(
    ray_address: str | None = None,
    *,
    check_ray: bool = True,
    tracking_uri: str | None = None,
    ray_timeout_s: float = RAY_TIMEOUT_S,
    on_check: Callable[[Check], None] | None = None,
) -> list[Check]:
    """Look at everything that deepfere needs. Never raises; takes some seconds, most of them for Ray.

    Args:
        ray_address: Cluster to join; None takes ``RAY_ADDRESS``, else starts a local session for a moment.
        check_ray: Whether to do so.
        tracking_uri: MLflow store; None takes the default one. Nothing is created in it.
        ray_timeout_s: How long Ray may take.
        on_check: Called with each result as it arrives.
    """
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", machine.python),
        ("packages", machine.packages),
        ("openslide", machine.openslide),
        ("codecs", machine.codecs),
        ("zarr", machine.zarr),
        ("torch", machine.torch),
        ("cpu", machine.cpu),
        ("memory", machine.memory),
        ("disk, here", lambda: machine.disk("disk, here", Path.cwd())),
        ("disk, temporary", lambda: machine.disk("disk, temporary", Path(tempfile.gettempdir()))),
        ("write speed", machine.write_speed),
        ("shared memory", machine.shared_memory),
        ("mlflow", lambda: machine.mlflow(tracking_uri)),
    ]
    if check_ray:
        checks.append(("ray", lambda: try_ray(ray_address, ray_timeout_s)))
    out = []
    for name, check in checks:
        found = _guarded(name, check)
        out.append(found)
        if on_check is not None:
            on_check(found)
    return out


def is_fit(checks: Iterable[Check]) -> bool:
    """Whether nothing failed; warnings do not count."""
    return all(check.status != "fail" for check in checks)


def render(checks: Iterable[Check]) -> str:
    """The checks as plain text for a terminal, without a final newline."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<{width + 8}}{check.remedy}")
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    verdict = "fit" if is_fit(checks) else "not fit"
    lines.append(f"{verdict}: {counts['ok']} ok, {counts['warn']} to improve, {counts['fail']} failed")
    return "\n".join(lines)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except ImportError as error:
        return Check(name, "fail", error_line(error), "install deepfere's requirements into this environment")
    except Exception as error:
        return Check(name, "fail", error_line(error), "mend what the detail says")
