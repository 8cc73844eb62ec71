"""Files at a path or a URL: what a run keeps beside its Zarr stores.

A store of objects has no folders, renames or appends, and no disk to wait for: an object is there whole, or not at all,
and everybody sees it at once. `UrlPath` offers of ``Path`` what a run's own files need of it, every request asked again
where the store throttles or fails (`deepfere.remote`). What needs a real file (NumPy, PyTorch, Parquet) goes through a
local copy: `reading`, `writing`.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from deepfere.errors import InputError
from deepfere.remote import TRIES, answered, filesystem, is_there, is_url, kind_of

Answer = TypeVar("Answer")
AT_ONCE = 256
"""Small objects that are asked for together."""


class UrlPath:
    """A file, or a folder in name, at a URL.

    Errors of every method but a missing object are `deepfere.errors.InputError` (refused) and
    `deepfere.errors.StorageError` (keeps failing), in one line.

    Args:
        url: ``s3://bucket/key`` and the like.
    """

    def __init__(self, url: object) -> None:
        self._url = str(url).rstrip("/")

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"UrlPath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, part: str) -> UrlPath:
        return UrlPath(f"{self._url}/{part}")

    @property
    def name(self) -> str:
        """The last part."""
        return self._url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the last part, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> UrlPath:
        """The folder that it is in."""
        return UrlPath(self._url.rpartition("/")[0])

    def with_name(self, name: str) -> UrlPath:
        """Another name in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> UrlPath:
        """Another ending of the last part."""
        return self.parent / f"{self.stem}{suffix}"

    def resolve(self) -> UrlPath:
        """Itself: a URL is the same everywhere."""
        return self

    def exists(self) -> bool:
        """Whether an object is there, or anything below it."""
        return self._ask(lambda found, path: is_there(self._url, found, path))

    def is_file(self) -> bool:
        """Whether an object is there."""
        # `isfile` says no to every error, also of a store that throttles.
        return self._ask(lambda found, path: kind_of(found, path) == "file")

    def is_dir(self) -> bool:
        """Whether there is anything below it, and no object."""
        return not self.is_file() and self.exists()

    def read_bytes(self) -> bytes:
        """The object.

        Raises:
            FileNotFoundError: There is none.
        """

        def ask(found: object, path: str) -> bytes | None:
            try:
                return bytes(found.cat_file(path))  # type: ignore[attr-defined]
            except FileNotFoundError:
                return None

        content = self._ask(ask)
        if content is None:
            raise FileNotFoundError(2, "No such object", self._url)
        return content

    def read_text(self) -> str:
        """The object as UTF-8; see `read_bytes`."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Write the object, in the place of one that is there."""
        self._ask(lambda found, path: found.pipe_file(path, content))

    def write_text(self, text: str) -> None:
        """Write the object as UTF-8."""
        self.write_bytes(text.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object.

        Raises:
            FileNotFoundError: There is none, and that is not ``missing_ok``.
        """
        if not missing_ok and not self.exists():
            raise FileNotFoundError(2, "No such object", self._url)
        # A deletion that is asked for again finds nothing, and S3 says nothing about that.
        self._ask(lambda found, path: found.rm_file(path))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def iterdir(self) -> Iterator[UrlPath]:
        """What is in it, objects and folders in name; nothing where nothing is."""
        yield from (self / name for name in sorted(self._names()))

    def glob(self, pattern: str) -> Iterator[UrlPath]:
        """What in it has a name like this."""
        yield from (self / name for name in sorted(self._names()) if fnmatch.fnmatchcase(name, pattern))

    def below(self) -> list[UrlPath]:
        """Every object below it."""
        protocol = self._url.partition("://")[0]
        names = self._ask(lambda found, path: list(found.find(path)))
        return [UrlPath(f"{protocol}://{name}") for name in names if f"{protocol}://{name}" != self._url]

    def _names(self) -> set[str]:
        def ask(found: object, path: str) -> set[str]:
            try:
                listed = found.ls(path, detail=False)  # type: ignore[attr-defined]
            except FileNotFoundError:
                return set()
            own = path.rstrip("/") + "/"
            return {name.rstrip("/")[len(own) :] for name in listed if name.startswith(own)} - {""}

        return self._ask(ask)

    def _ask(self, ask: Callable[..., Answer]) -> Answer:
        found, path = filesystem(self._url)
        return answered(self._url, lambda: ask(found, path), TRIES)


Place = Path | UrlPath


def place(given: object) -> Place:
    """A path, or what stands for one where a URL is given.

    Raises:
        InputError: It is neither.
    """
    if isinstance(given, Path | UrlPath):
        return given
    if not isinstance(given, str | os.PathLike):
        raise InputError("is no path", where=repr(given), remedy="give a path or a URL")
    return UrlPath(given) if is_url(given) else Path(not_empty(os.fspath(given)))


def located(path: str | Path) -> str:
    """A path that stays right in another folder. A file's own link stays: what belongs to it lies beside that."""
    path = Path(not_empty(path))
    return str(path.parent.resolve() / path.name)


def not_empty(given: str | Path) -> str | Path:
    """What was given as a path; nothing would be the working folder.

    Raises:
        InputError: It is nothing, as a variable of the shell that is not set.
    """
    if not str(given).strip():
        raise InputError("is no path", where=repr(str(given)), remedy="give a path or a URL")
    return given


@contextmanager
def reading(source: Place | str) -> Iterator[Path]:
    """A local file with the content of ``source``: itself, or a copy that lasts as long as this.

    Raises:
        FileNotFoundError: There is none.
    """
    source = place(source)
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="deepfere-") as folder:
        local = Path(folder) / source.name
        local.write_bytes(source.read_bytes())
        yield local


@contextmanager
def writing(target: Place | str) -> Iterator[Path]:
    """A local file to write, which is ``target`` itself, or is sent there when this ends without an error."""
    target = place(target)
    if isinstance(target, Path):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="deepfere-") as folder:
        local = Path(folder) / target.name
        yield local
        remote = target
        remote._ask(lambda found, path: found.put_file(str(local), path))


def texts(folder: Place, pattern: str) -> Iterator[str]:
    """The texts of a folder's files of such names, in the order of their names."""
    if isinstance(folder, Path):
        yield from (path.read_text() for path in sorted(folder.glob(pattern)))
        return
    names = [path.name for path in folder.glob(pattern)]
    for first in range(0, len(names), AT_ONCE):
        some = names[first : first + AT_ONCE]
        content = folder._ask(
            lambda found, path, some=some: found.cat([f"{path}/{name}" for name in some], on_error="return")
        )
        for key in sorted(content):
            # Asked again one by one: of many objects one would fail in every try, where one request in some does.
            told = content[key]
            yield told.decode() if isinstance(told, bytes) else (folder / key.rpartition("/")[2]).read_text()


def sizes(folder: Place) -> dict[str, int]:
    """Bytes of every file below a folder, by their names in it (``0/3``); nothing where nothing is."""
    if isinstance(folder, Path):
        found: dict[str, int] = {}
        waiting = [""]
        while waiting:
            below = waiting.pop()
            with suppress(FileNotFoundError), os.scandir(folder / below) as entries:
                for entry in entries:
                    name = f"{below}{entry.name}"
                    if entry.is_dir():
                        waiting.append(f"{name}/")
                    else:
                        found[name] = entry.stat().st_size
        return found

    def ask(store: object, path: str) -> dict[str, int]:
        start = len(path.rstrip("/")) + 1
        listed = store.find(path, detail=True)  # type: ignore[attr-defined]
        return {name[start:]: int(about["size"]) for name, about in listed.items()}

    return folder._ask(ask)


def check_outside_stores(target: Place) -> None:
    """Refuse a file inside a Zarr store: whoever reads the store would find it there.

    Raises:
        InputError: It is to be in one.
    """
    if isinstance(target, Path):
        for folder in target.resolve().parents:
            if (folder / "zarr.json").exists() or (folder / ".zgroup").exists():
                raise InputError(f"lies inside the store {folder}", where=target, remedy="give a path outside of it")


def remove_tree(target: Place, but: Place | None = None) -> None:
    """Delete a file, or a folder with everything in it; nothing happens if it is absent.

    Args:
        target: What to delete.
        but: An object of a URL that stays.
    """
    if isinstance(target, Path):
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
        return
    objects = [one for one in target.below() if one != but]
    if target.is_file():
        objects.append(target)
    for first in range(0, len(objects), 1000):
        some = [str(one) for one in objects[first : first + 1000]]
        target._ask(lambda found, path, some=some: found.rm(some))
    # Of many that are deleted together some may be refused without a word: these are asked for one by one.
    for one in target.below():
        if one != but:
            one.unlink(missing_ok=True)


def copy_tree(source: Place, target: Place) -> None:
    """Copy a folder, where nothing stands yet; between URLs of one store without passing through here."""
    if isinstance(source, Path) and isinstance(target, Path):
        shutil.copytree(source, target)
        return
    if isinstance(source, Path):
        for path in sorted(source.rglob("*")):
            if path.is_file():
                copy_file(path, UrlPath(f"{target}/{path.relative_to(source).as_posix()}"))
        return
    if isinstance(target, Path):
        for one in source.below():
            local = target / str(one).removeprefix(f"{source}/")
            local.parent.mkdir(parents=True, exist_ok=True)
            copy_file(one, local)
        return
    for one in source.below():
        _copy(one, UrlPath(f"{target}{str(one).removeprefix(str(source))}"))


def copy_file(source: Place, target: Place) -> None:
    """Copy one file."""
    if isinstance(source, UrlPath) and isinstance(target, UrlPath):
        _copy(source, target)
        return
    with reading(source) as found, writing(target) as made:
        shutil.copyfile(found, made)


def _copy(source: UrlPath, target: UrlPath) -> None:
    to = filesystem(str(target))[1]
    source._ask(lambda found, path: found.cp_file(path, to))


def beside(path: str | Place, ending: str) -> Place:
    """Where what belongs to a result lies: ``liver.zarr`` and ".html" give ``liver.html``, beside it.

    Only a final ``.zarr`` is left out, so that ``liver.x4`` and ``liver.x8`` have a file each.
    """
    store = place(str(path).rstrip("/") if is_url(path) else path)
    if isinstance(store, Path) and not store.name.strip("."):
        store = store.resolve()
    return store.with_name(store.name.removesuffix(".zarr") + ending)
