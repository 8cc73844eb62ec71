"""The place of a result: what may stand there, and how a new one comes to be there."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from deepfere.errors import IdentityError, InputError, NoStore
from deepfere.places import Place, UrlPath, copy_tree, remove_tree
from deepfere.reconstruction.result import FORMAT
from deepfere.store import open_group, remove, settle, sync


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


def publish(made: Place, path: Place, replacing: bool) -> None:
    """Put a finished store in its place, where the one that it replaces stood until now; at a URL it is there.

    Args:
        made: The store.
        path: Its place.
        replacing: Whether what stands there is to go.

    Raises:
        IdentityError: Something has come to stand there meanwhile.
        OSError: It cannot be moved there; what stood there stands there.
    """
    if isinstance(made, UrlPath) or isinstance(path, UrlPath):
        return
    if path.exists() and not replacing:
        raise IdentityError(
            "has come to stand there while the result was made",
            where=path,
            remedy="move it away and give the same command again",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.old")
    if path.exists():
        remove(aside)
        path.rename(aside)
    try:
        _move(made, path)
    except BaseException:
        # Also what a run has left there that was killed between the two.
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    sync(path.parent)
    remove(aside)


def _move(made: Path, path: Path) -> None:
    """Rename a store, or where the work lies on another file system copy it beside its place first."""
    try:
        made.rename(path)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    beside = path.with_name(f".{path.name}.new")
    remove(beside)
    copy_tree(made, beside)
    settle(beside)
    beside.rename(path)
    remove(made)


def attributes_of(path: Place) -> dict[str, Any]:
    """Root attributes of what stands at a path; empty if that is no store.

    Raises:
        InputError: The place does not answer: what stands there is not known, and not to be replaced.
    """
    try:
        if isinstance(path, UrlPath) and not (path / "zarr.json").exists():
            return {}
        return dict(open_group(path, "r").attrs)
    except (NoStore, FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", where=path, remedy="choose another output, or mend the disk"
        ) from error


def make_room(out: Place) -> None:
    """Make room; at a URL what stands there is no longer complete, and nobody's, before any of it is gone."""
    if isinstance(out, UrlPath):
        begun: dict[str, Any] = {"format": FORMAT, "complete": False}
        open_group(out, "a", attributes=begun).attrs.put(begun)
        remove_tree(out, but=out / "zarr.json")
    else:
        remove(out)
