"""Where Ray Train keeps checkpoints: a file system of pyarrow's that asks a store at a URL again where it fails."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import PythonFile
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from deepfere.places import Place, copy_file, place
from deepfere.remote import TRIES, answered, filesystem
from deepfere.store import sync_tree

Answer = TypeVar("Answer")


class _Object(io.BytesIO):
    """What is written, kept until it is closed, and then sent as one object."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._send = send

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._send(content)


class _Handler(FSSpecHandler):
    """Checkpoints are small: they are read and written whole.

    Args:
        fs: The fsspec file system.
        protocol: Of its URLs, for errors.
    """

    def __init__(self, fs: Any, protocol: str) -> None:
        super().__init__(fs)
        self._protocol = protocol

    def _ask(self, path: str, ask: Callable[[], Answer]) -> Answer:
        return answered(f"{self._protocol}://{path}", ask, TRIES)

    def get_file_info(self, paths: list[str]) -> Any:
        asked = super().get_file_info
        return self._ask(paths[0] if paths else "", lambda: asked(paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        asked = super().get_file_info_selector
        return self._ask(selector.base_dir, lambda: asked(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: there are no folders."""

    def delete_dir(self, path: str) -> None:
        asked = super().delete_dir
        self._ask(path, lambda: asked(path))

    def delete_file(self, path: str) -> None:
        asked = super().delete_file
        self._ask(path, lambda: asked(path))

    def open_input_stream(self, path: str) -> PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> PythonFile:
        def ask() -> bytes | None:
            try:
                return bytes(self.fs.cat_file(path))
            except FileNotFoundError:
                return None

        content = self._ask(path, ask)
        if content is None:
            raise FileNotFoundError(2, "No such object", path)
        return PythonFile(io.BytesIO(content), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        def send(content: bytes) -> None:
            self._ask(path, lambda: self.fs.pipe_file(path, content))

        return PythonFile(_Object(send), mode="w")


def run_storage(folder: Place) -> tuple[FileSystem | None, str]:
    """``storage_filesystem`` and ``storage_path`` of Ray Train's RunConfig for a folder or a URL."""
    if isinstance(folder, Path):
        return None, str(folder)
    found, path = filesystem(str(folder))
    return PyFileSystem(_Handler(found, str(folder).partition("://")[0])), path


def uploader(run: str) -> Callable[[Any, str], Any]:
    """What puts a checkpoint into a run's folder, in Ray's place; on a disk it is there for good when that returns.

    Ray has Arrow copy it, which does not look at how closing a file went (seen in pyarrow 25): of a checkpoint that the
    store did not take, nobody would know. Nor does it wait for the disk before it deletes the one before.

    Args:
        run: The run's folder.
    """

    def upload(checkpoint: Any, name: str) -> Any:
        from ray.train import Checkpoint

        target = place(run) / name
        target.mkdir(parents=True, exist_ok=True)
        with checkpoint.as_directory() as folder:
            for file in sorted(Path(folder).iterdir()):
                copy_file(file, target / file.name)
        sync_tree(target)
        storage, path = run_storage(target)
        return Checkpoint(path, storage)

    return upload
