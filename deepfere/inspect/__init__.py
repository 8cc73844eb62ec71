"""What a path holds: raw files, stores, results, unfinished work, manifests; which regions; and is it whole.

Nothing is written and little is read, whatever the size: indexes, metadata, checksums of up to a GiB, and a
sample of tiles or shards. What cannot be known is said so, with the flag that tells it.
"""

from __future__ import annotations

from pathlib import Path

from deepfere.errors import InputError
from deepfere.frame import LANDMARK_COLUMNS
from deepfere.inspect.notes import Description

HEAD_BYTES = 4096

__all__ = ["Description", "describe", "render"]

KNOWN_SUFFIXES = {
    *(".imzml", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".czi", ".dcm", ".vms", ".tif", ".tiff", ".qptiff"),
    *(".png", ".jpg", ".jpeg", ".zarr", ".work", ".yaml", ".yml", ".csv", ".mis"),
}


def describe(path: str | Path) -> Description:
    """Say what a file, folder or store is.

    Args:
        path: An imzML, a table of pixels (AnnData, SpatialData), a slide, picture or store (or its URL), a
            result, a ``.work`` folder, a study manifest, settings, an alignment, landmarks, teaching points, or a
            phantom's folder.

    Raises:
        InputError: It is absent, unreadable, refused by its reader, or nothing that deepfere knows.
    """
    from deepfere.remote import is_url
    from deepfere.store import missing

    if is_url(path):
        return _remote(str(path))
    place = Path(path)
    try:
        if place.is_dir():
            return _folder(place)
        if not place.exists():
            raise missing(path)
        return _file(place)
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", where=path, remedy="check its permissions"
        ) from error


def render(description: Description) -> str:
    """The description as plain text for a terminal, without a final newline."""
    rows = [("problem", text) for text in description.problems] + list(description.facts)
    if description.whole is not None:
        rows.insert(0, ("whole", "yes" if description.whole else "no"))
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join([f"{description.path}: {description.kind}", *lines])


def _remote(url: str) -> Description:
    from deepfere.inspect import raw, stores
    from deepfere.places import UrlPath
    from deepfere.readers.ranges import first_bytes
    from deepfere.readers.slide_zarr import is_zarr

    if UrlPath(url).suffix.lower() in (".imzml", ".ibd"):
        return raw.imzml(UrlPath(url))
    if is_zarr(url):
        return stores.zarr_group(url)
    if (UrlPath(url) / "identity.json").exists():
        return stores.work(UrlPath(url))
    return raw.imzml(UrlPath(url)) if _is_mzml(first_bytes(url, HEAD_BYTES)) else raw.slide(url)


def _is_mzml(head: bytes) -> bool:
    return b"<mzML" in head or b"<indexedmzML" in head


def _file(path: Path) -> Description:
    from deepfere.inspect import files, raw

    with path.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
    suffix = path.suffix.lower()
    if suffix in (".imzml", ".ibd") or _is_mzml(head):
        return raw.imzml(path)
    if suffix == ".json":
        return files.alignment(path)
    if suffix == ".csv":
        first = head.decode("utf-8-sig", "replace").partition("\n")[0]
        if any(name in first for name in LANDMARK_COLUMNS):
            return files.landmarks(path)
        return files.study(path)
    if suffix == ".mis":
        return files.teaching_points(path)
    if suffix in (".yaml", ".yml"):
        return files.study_or_settings(path)
    try:
        return raw.slide(path)
    except InputError as error:
        if suffix in KNOWN_SUFFIXES or "is not a slide" not in error.what:
            raise
        raise InputError(
            "is nothing that deepfere knows",
            where=path,
            remedy="give an imzML, a slide or picture, a store, a result, a study or an alignment",
        ) from error


def _folder(path: Path) -> Description:
    from deepfere.inspect import raw, stores
    from deepfere.readers.slide_zarr import is_zarr
    from deepfere.readers.table import is_table

    if is_table(path):
        return raw.table(path)
    if is_zarr(path):
        return stores.zarr_group(str(path))
    if (path / "identity.json").exists():
        return stores.work(path)
    if (path / "truth" / "phantom.json").exists():
        return raw.phantom(path)
    inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in KNOWN_SUFFIXES)
    remedy = f"give one of those in it: {', '.join(inside[:6])}" if inside else "give a file, a store or a result"
    raise InputError("is a folder that deepfere did not write", where=path, remedy=remedy)
