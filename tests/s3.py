"""A server of the S3 protocol on the loopback, which can be told to fail; shared by whatever reads or writes S3."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "something",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    # Tries of botocore, which pauses for seconds: deepfere has its own.
    "AWS_MAX_ATTEMPTS": "1",
}
ANSWERS = {
    403: ("403 FORBIDDEN", "AccessDenied", "Access Denied"),
    500: ("500 INTERNAL SERVER ERROR", "InternalError", "We encountered an internal error."),
    503: ("503 SLOW DOWN", "SlowDown", "Please reduce your request rate."),
}


@dataclass
class S3Server:
    """The running server.

    Attributes:
        url: Its address; in the environment while `s3_server` lasts, so that ``s3://`` leads there.
        asked: Method and path of every request that came, with the status of those that were made to fail.
        failing: Decides on a request (method, path): a status of `ANSWERS` to fail with, or None.
    """

    url: str = ""
    asked: list[tuple[str, str, int | None]] = field(default_factory=list)
    failing: Callable[[str, str], int | None] = lambda method, path: None
    files: Any = None

    def __call__(self, environ: dict[str, Any], start: Any, app: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        status = self.failing(method, path)
        self.asked.append((method, path, status))
        if status is None:
            return app(environ, start)
        line, code, text = ANSWERS[status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
        start(line, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    def fail(self, status: int, times: int, methods: tuple[str, ...] = ("GET", "HEAD")) -> None:
        """Fail the next requests of these methods, so many times."""
        left = [times]

        def decide(method: str, path: str) -> int | None:
            if method not in methods or left[0] <= 0:
                return None
            left[0] -= 1
            return status

        self.failing = decide

    def heal(self) -> None:
        """Fail no more."""
        self.failing = lambda method, path: None


@contextmanager
def s3_server(bucket: str = "bucket", host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Start a server with one empty bucket; its credentials and address are in the environment until the end."""
    import fsspec
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    running = S3Server()
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server(host, 0, lambda environ, start: running(environ, start, app), threaded=True)
    server.RequestHandlerClass.log_request = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    running.url = f"http://{host}:{server.server_port}"
    given = {**ENVIRONMENT, "AWS_ENDPOINT_URL": running.url}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    _forget()
    try:
        running.files = fsspec.filesystem("s3")
        # All servers of a process have the same content.
        running.files.makedirs(bucket, exist_ok=True)
        yield running
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget()
        server.shutdown()
        thread.join()


def _forget() -> None:
    """File systems remember the address that they were made for."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
