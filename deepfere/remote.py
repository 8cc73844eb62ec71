"""Remote stores: the file system behind a URL, and how one that fails is asked again or told of in one line."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from deepfere.errors import DeepfereError, InputError, StorageError

Answer = TypeVar("Answer")

TRIES, FIRST_TRIES = 6, 3
"""How often a store is asked: for bytes of a file that it has shown before, and for the first time."""
PAUSE_S = 0.4
"""Before the second try; doubled from try to try, 12 s in all."""

INSTALL = {"s3": "pip install 'deepfere[s3]'", "s3a": "pip install 'deepfere[s3]'", "gs": "pip install 'deepfere[gs]'"}
AGAIN = (408, 425, 429)
# Of aiohttp (HTTP, and what s3fs talks through) and botocore: the connection failed, not the request.
BROKEN = (
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),
    *("ResponseStreamingError", "IncompleteReadError", "HTTPClientError", "ClientPayloadError"),
)


class ShortAnswer(ConnectionError):
    """Fewer bytes came than the store has."""


TOLD_EVERY_S = 30.0
"""A store that keeps one waiting is told of this often, at most."""
_told_at_s = -TOLD_EVERY_S
_log = logging.getLogger(__name__)

_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# What other processes write has to be seen: no listing is remembered.
OPTIONS = {"use_listings_cache": False}


def is_url(url: object) -> bool:
    """Whether this names a remote file or store (``s3://``, ``gs://``, ``http://``...) instead of a local path."""
    return bool(_URL.match(str(url)))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        InputError: Its protocol is not known, or the package for it is not installed.
    """
    import fsspec

    if _is_gs(url):
        # It asks by gRPC of what kind a bucket is, for a minute where nobody answers; and what it logs at length,
        # `refusal` tells in one line.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        for name in ("gcsfs", "google.auth"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        found, path = fsspec.core.url_to_fs(url, **OPTIONS)
    except Exception as error:  # every protocol has its own library
        raise refusal(url, error) from error
    return found, path


def _is_gs(url: str) -> bool:
    return url.lower().startswith(("gs://", "gcs://"))


def holds(url: str, name: str) -> bool:
    """Whether a file of this name lies in the folder at a URL.

    Raises:
        InputError: See `filesystem`, or the store does not answer.
    """
    found, path = filesystem(url)
    return answered(url, lambda: is_there(url, found, f"{path.rstrip('/')}/{name}"), FIRST_TRIES)


def kind_of(found: Any, path: str) -> str | None:
    """What stands at a path of a file system: "file", "directory" or nothing; a failure is raised as what it is."""
    try:
        return str(found.info(path)["type"])
    except FileNotFoundError as error:
        # A web server's every failure is called that, with what was behind it.
        if is_passing(error):
            raise
        return None


def is_there(url: str, found: Any, path: str) -> bool:
    """Whether anything stands at a path of the file system of a URL."""
    if url.lower().startswith("http"):  # whose `exists` says no to every failure
        return kind_of(found, path) is not None
    return bool(found.exists(path))


def answered(url: str, ask: Callable[[], Answer], tries: int) -> Answer:
    """What a store answers, asked again where it throttles, fails or breaks off, after longer and longer pauses.

    Args:
        url: For errors.
        ask: Puts the question.
        tries: How often at most.

    Raises:
        InputError: It refuses, or does not answer.
        StorageError: It keeps failing.
    """
    for number in range(tries):
        try:
            return ask()
        except DeepfereError:
            raise
        except Exception as error:  # every store raises its own
            pause_s = _pause_s(url, error, number, tries)
        time.sleep(pause_s)
    raise AssertionError


async def answered_later(url: str, ask: Callable[[], Awaitable[Answer]], tries: int) -> Answer:
    """`answered` for a question that is awaited."""
    for number in range(tries):
        try:
            return await ask()
        except DeepfereError:
            raise
        except Exception as error:
            pause_s = _pause_s(url, error, number, tries)
        await asyncio.sleep(pause_s)
    raise AssertionError


def _pause_s(url: str, error: Exception, number: int, tries: int) -> float:
    """How long to wait before the next try; raises what there is to say where there is none."""
    # gcsfs has asked six times itself, for half a minute.
    if number + 1 == tries or _is_gs(url) or not is_passing(error):
        raise refusal(url, error) from error
    _tell(url, error, number, tries)
    # Many workers that were throttled together should not come back together.
    return PAUSE_S * 2**number * random.Random().uniform(0.7, 1.0)


def _tell(url: str, error: Exception, number: int, tries: int) -> None:
    """Say that a store is asked again: one that does not answer at all would be minutes of silence."""
    global _told_at_s
    if time.monotonic() - _told_at_s >= TOLD_EVERY_S:
        _told_at_s = time.monotonic()
        where, reason = url.partition("?")[0], type(list(_chain(error))[-1]).__name__
        _log.warning("%s does not answer (%s): asked again, %d of %d", where, reason, number + 2, tries)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore or gcsfs; None where there is none."""
    for part in _chain(error):
        response = getattr(part, "response", None)
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        for value in (getattr(part, "status", None), getattr(part, "code", None), told):
            if isinstance(value, int) and 300 <= value < 600:
                return value
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same question may be answered a little later."""
    if any(type(part).__name__ in BROKEN for part in _chain(error)):
        return True
    status = _status(error)
    if status is not None:
        return status >= 500 or status in AGAIN
    for part in _chain(error):
        module = type(part).__module__.partition(".")[0]
        if isinstance(part, ConnectionError | TimeoutError):
            return True
        if module == "aiohttp" and not isinstance(part, ValueError):
            return True
        if isinstance(part, OSError) and part.errno in (errno.EIO, errno.EBUSY):
            return True
    return False


def refusal(url: str, error: BaseException) -> DeepfereError:
    """One line on why a URL cannot be read or written, and what to do about it."""
    status, last = _status(error), list(_chain(error))[-1]
    # Behind the ? may be the signature that opens it.
    where, text = url.partition("?")[0], re.sub(r"\?[^\s'\"]+", "", " ".join(str(last).split()) or type(last).__name__)
    protocol = url.partition("://")[0].lower()
    if isinstance(error, ImportError):
        install = INSTALL.get(protocol, f"install the package that fsspec names: {text}")
        return InputError(f"{protocol}:// needs a package that is not installed", where=where, remedy=install)
    if isinstance(error, ValueError) and "Protocol not known" in text:
        return InputError(f"{protocol}:// is not known", where=where, remedy="give s3://, gs://, https:// or a path")
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(last).__name__:
        return InputError(
            f"access is refused ({text})",
            where=where,
            remedy="give credentials that may read it (for an output, write it too), and check the address",
        )
    if status == 404 or (isinstance(error, FileNotFoundError) and last is error):
        what = "the bucket does not exist" if "bucket does not exist" in text else "does not exist"
        return InputError(what, where=where, remedy="check the address")
    if status is not None and (status >= 500 or status in AGAIN):
        return StorageError(f"{where}: the store keeps failing ({status}: {text}); run it again later")
    return InputError(f"cannot be read ({text})", where=where, remedy="check the address, and that the store answers")
