"""The place of a result: what may stand there, and how a new one comes to be there."""

from __future__ import annotations

from typing import Any

from deepfere.errors import IdentityError, InputError
from deepfere.places import Place, UrlPath, remove_tree
from deepfere.reconstruction.result import FORMAT
from deepfere.store import open_group, remove, sync


def claim_result(path: Place, identity: str, overwrite: bool) -> bool:
    """Whether a finished result of this identity stands at ``path`` and is to stay.

    Nothing is changed: with ``overwrite`` what stands there stays until the new result is written (at a URL: until the
    first shard of it is to be), so that a run that is refused costs nothing.

    Raises:
        IdentityError: Something else stands there.
    """
    if not path.exists():
        return False
    attrs = attributes_of(path)
    if attrs.get("format") != FORMAT:
        raise IdentityError("is not a deepfere result", where=path, remedy="choose another output")
    if isinstance(path, UrlPath) and attrs.get("complete") is not True:
        return False  # made in its place, and stopped; who works here now holds the lock, and goes on or begins anew
    if attrs.get("identity") == identity:
        return attrs.get("complete") is True and not overwrite
    if not overwrite:
        raise IdentityError(
            "holds a result of other inputs or settings", where=path, remedy="choose another output or give --overwrite"
        )
    return False


def publish(made: Place, path: Place) -> None:
    """Put a finished store in its place, where the one that it replaces stood until now; at a URL it is there."""
    if isinstance(made, UrlPath) or isinstance(path, UrlPath):
        return
    aside = path.with_name(f".{path.name}.old")
    remove(aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(aside)
    made.rename(path)
    sync(path.parent)
    remove(aside)


def attributes_of(path: Place) -> dict[str, Any]:
    """Root attributes of what stands at a path; empty if that is no store."""
    try:
        # A store that refuses to answer holds something all the same.
        if isinstance(path, UrlPath) and not (path / "zarr.json").exists():
            return {}
        return dict(open_group(path, "r").attrs)
    except (InputError, OSError, ValueError):
        return {}


def make_room(out: Place) -> None:
    """Make room; at a URL what stands there is no longer complete, and nobody's, before any of it is gone."""
    if isinstance(out, UrlPath):
        begun: dict[str, Any] = {"format": FORMAT, "complete": False}
        open_group(out, "a", attributes=begun).attrs.put(begun)
        remove_tree(out, but=out / "zarr.json")
    else:
        remove(out)
