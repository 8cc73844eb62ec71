"""One process at a time works in a folder: it holds the folder's lock.

On a disk the kernel keeps the lock (``flock``) and lets go of it when the process dies. A store of objects keeps none:
there the lock is a lease, an object that only one can create (``If-None-Match: *``) and that its holder writes anew
now and then, each time only if it is as he left it (``If-Match``). A lease that nobody has written for `LEASE_S`, by
the store's own clock, or whose holder was a process of this machine and is gone, may be taken over, again by one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import psutil

from deepfere.errors import DeepfereError, InputError, StorageError
from deepfere.places import Place, UrlPath
from deepfere.remote import FIRST_TRIES, TRIES, answered, filesystem
from deepfere.stopping import Stopped

LEASE_S, RENEW_S = 90.0, 20.0
"""How long a lease is good for, and how often its holder writes it anew."""
_held: set[object] = set()


def unwritable(place: Place, error: OSError) -> InputError:
    """That an output cannot be written, and why."""
    return InputError(f"cannot be written ({error.strerror or error})", where=place, remedy="choose another output")


def _held_by(place: Place, holder: str) -> InputError:
    return InputError(
        f"is being worked on by {holder}", where=place, remedy="wait until it is done, or choose another output"
    )


@contextmanager
def held(lock: Place) -> Iterator[Callable[[], None]]:
    """Hold a lock; gives a function that raises if another process has taken it over.

    Raises:
        InputError: Another process holds it, or it cannot be written.
    """
    if isinstance(lock, UrlPath):
        lease = Lease(lock)
        lease.take()
        try:
            yield lease.check
        finally:
            lease.release()
        return
    handle = _flock(lock)
    try:
        yield lambda: None
    finally:
        os.close(handle)


def is_held(lock: Place) -> bool:
    """Whether a process holds a lock; on a file system without locks, whether the last one to take it may be there."""
    if isinstance(lock, UrlPath):
        return Lease(lock).is_held()
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return not _gone(os.pread(handle, 1000, 0).decode(errors="replace"))
    finally:
        os.close(handle)
    return False


def _gone(holder: str) -> bool:
    """Whether what a lock file says is nobody, or a process of this machine that has ended."""
    found = re.fullmatch(r"process (\d+) on (.*)\n", holder)
    if found is None or found[2] != socket.gethostname():
        return not holder
    return not psutil.pid_exists(int(found[1]))


def _flock(file: Path) -> int:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(file.parent, error) from error
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # whoever worked here has just finished and removed the folder
        except OSError as error:
            raise unwritable(file.parent, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise _held_by(file.parent, holder) from error
        except OSError:
            pass  # a file system without locks: nothing can be known there
        try:
            same = os.path.samestat(os.fstat(handle), file.stat())
        except FileNotFoundError:
            same = False
        if same:
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)


def _here() -> str:
    """This machine since it was started, as far as process numbers mean the same: containers have their own."""
    # Names are not unique, and the first namespace has the same number everywhere.
    boot = ""
    with suppress(OSError):  # not everywhere
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 - a link to no path


def _started(pid: int) -> int:
    """When a process began, in clock ticks since the machine was started: no setting of the clock changes that.

    Raises:
        FileNotFoundError: It is gone.
        ProcessLookupError: It has just gone.
    """
    # After the name, which may hold anything.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


class Lease:
    """A lock in a store of objects.

    Args:
        lock: Its object.
    """

    def __init__(self, lock: UrlPath) -> None:
        self.lock = lock
        self._etag, self._lost = "", ""
        self._ours = {
            "token": uuid.uuid4().hex,
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "machine": _here(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._count, self._done = 0, threading.Event()
        self._kept_s = 0.0  # when it was written last, by this process's clock
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> None:
        """Create the lease, or take one over that is no longer held.

        Raises:
            InputError: It is held; the store refuses, or does not know conditional writes.
            StorageError: The store keeps failing.
        """
        while not self._put({"IfNoneMatch": "*"}, FIRST_TRIES):
            found = self._look()
            if found is None:
                continue  # just released
            etag, values, age_s = found
            if self._is_ours(etag, values):
                break
            if not _is_over(values, age_s):
                raise _held_by(self.lock.parent, f"{values.get('holder', 'another process')} (seen {age_s:.0f} s ago)")
            if self._put({"IfMatch": etag}, FIRST_TRIES):
                break
        # A store that takes no notice of the condition would give the lease to everybody.
        if self._put({"IfNoneMatch": "*"}, FIRST_TRIES):
            self.lock.unlink(missing_ok=True)
            raise InputError(
                "the store does not keep conditional writes (If-None-Match), so that two runs could not be kept apart",
                where=self.lock.parent,
                remedy="use a store that does (AWS S3, MinIO, Ceph and others in their present versions), or a disk",
            )
        _held.add(self._ours["token"])
        self._thread.start()

    def check(self) -> None:
        """Go on only as its holder; while that is not known, because the store is slow to answer, wait.

        Raises:
            Stopped: Another process has taken it over, or the store has not answered for too long.
        """
        while not self._lost and self._thread.is_alive() and self._quiet_s() > LEASE_S - RENEW_S:
            time.sleep(0.2)
        if self._lost:
            raise Stopped(self._lost)

    def _quiet_s(self) -> float:
        return time.monotonic() - self._kept_s

    def release(self) -> None:
        """Let go of it; where the store fails, it ends by itself."""
        self._done.set()
        self._thread.join()
        _held.discard(self._ours["token"])
        with suppress(InputError, StorageError):
            found = None if self._lost else self._look()
            if found is not None and self._is_ours(found[0], found[1]):
                self.lock.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether anybody holds it."""
        found = self._look()
        return found is not None and not _is_over(found[1], found[2])

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            try:
                kept = self._put({"IfMatch": self._etag}, FIRST_TRIES)
                if not kept:
                    found = self._look()
                    # An answer that got lost: it was written all the same.
                    kept = found is not None and self._is_ours(found[0], found[1])
            except DeepfereError as error:
                if self._quiet_s() < LEASE_S - RENEW_S:
                    continue
                self._lost = f"its lock could not be kept: {error}"
                return
            if not kept:
                self._lost = f"another process has taken {self.lock.parent} over"
                return

    def _is_ours(self, etag: str, values: dict[str, Any]) -> bool:
        if values.get("token") != self._ours["token"]:
            return False
        self._etag = etag
        return True

    def _put(self, condition: dict[str, str], tries: int) -> bool:
        """Write it, if the condition holds."""
        found, path = filesystem(str(self.lock))
        bucket, key, _ = found.split_path(path)
        self._count += 1
        body = json.dumps({**self._ours, "count": self._count}).encode()
        begun_s = time.monotonic()

        def ask() -> str | None:
            try:
                return str(found.call_s3("put_object", Bucket=bucket, Key=key, Body=body, **condition)["ETag"])
            except OSError as error:
                if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                    return None
                raise

        etag = answered(str(self.lock), ask, tries)
        if etag is not None:
            self._etag, self._kept_s = etag, begun_s
        return etag is not None

    def _look(self) -> tuple[str, dict[str, Any], float] | None:
        """The lease's tag, what it says, and its age by the store's clock; None if there is none."""
        found, path = filesystem(str(self.lock))
        bucket, key, _ = found.split_path(path)

        def ask() -> tuple[str, dict[str, Any], float] | None:
            try:
                head = found.call_s3("head_object", Bucket=bucket, Key=key)
                values = json.loads(found.cat_file(path))
            except FileNotFoundError:
                return None
            except ValueError:
                values = {}
            now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
            return head["ETag"], values, (now - head["LastModified"]).total_seconds()

        return answered(str(self.lock), ask, TRIES)


def _code(error: BaseException) -> str:
    """S3's name for what is wrong."""
    cause = error if hasattr(error, "response") else error.__cause__
    response = getattr(cause, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is_over(values: dict[str, Any], age_s: float) -> bool:
    """Whether a lease is held no more."""
    if age_s > LEASE_S:
        return True
    if values.get("machine") != _here():
        return False
    if values.get("pid") == os.getpid():
        return values.get("token") not in _held  # one that could not be removed when it was let go of
    try:
        return _started(values["pid"]) != values["started"]
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return True
