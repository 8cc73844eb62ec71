"""Losses in MLflow while training runs: sent by a thread of the first worker or of the run, which nothing waits for.

A point is sent once the report after its own has gone through: training then never begins again before it, and what
MLflow has of a step is what the history has. What was not sent (the store does not answer, or is a SQLite file on
another host; the last points) the driver records when training has ended.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepfere.cluster import last_line
from deepfere.training.mlflow_store import import_mlflow, redact, sqlite_path
from deepfere.training.tracking import Tracker, log_history

EVERY_S, LATEST_S = 5.0, 600.0
"""Points are sent no more often than this; after failures there are longer and longer pauses, up to the second."""
ENDS_S = 10.0
"""So long may what is being sent take when a worker's training ends."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's client would ask a server that is away again for minutes, while newer points wait."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """The run that a training belongs to, as its workers get it.

    Attributes:
        uri: The absolute tracking URI. It may hold a password, and Ray shows what workers are given.
        run_id: The run.
        system_metrics: Whether the load of the workers' hosts is recorded.
    """

    uri: str = field(repr=False)
    run_id: str
    system_metrics: bool

    def from_host(self, node: str, drivers: str) -> bool:
        """Whether the store may be written to from a host: a SQLite file is the driver's alone.

        Args:
            node: Ray's id of the host.
            drivers: That of the driver's.
        """
        return sqlite_path(self.uri) is None or node == drivers


class Live:
    """Sends points to a run, some seconds' worth at a time.

    Args:
        to: The run.
    """

    def __init__(self, to: Recording) -> None:
        self._to = to
        self._points: list[Mapping[str, Any]] = []
        self._tracker: Tracker | None = None
        self._thread: threading.Thread | None = None
        self._sending, self._closed = threading.Lock(), False
        self._pause_s, self._next_s = EVERY_S, time.monotonic() + EVERY_S
        self._warned = False
        self._set: list[str] = []

    def __call__(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Have points sent, ``{"step": int, name: float, ...}`` each; returns at once."""
        self._points.extend(points)
        busy = self._thread is not None and self._thread.is_alive()
        if self._points and not busy and time.monotonic() >= self._next_s:
            # Not one thread for all of it: a short training needs none, nor MLflow, which takes seconds to import.
            self._thread = threading.Thread(target=self._send, args=(len(self._points),), daemon=True)
            self._thread.start()

    def close(self, wait_s: float = ENDS_S) -> None:
        """Send no more: from now on the run is the driver's, which has more patience.

        Args:
            wait_s: So long may what is being sent take.
        """
        self._closed = True
        if self._sending.acquire(timeout=wait_s):
            self._sending.release()
        for name in self._set:
            os.environ.pop(name, None)
        self._set = []

    def _send(self, count: int) -> None:
        try:
            if self._tracker is None:
                client = import_mlflow().MlflowClient(tracking_uri=self._to.uri)
                self._tracker = Tracker(client, self._to.uri, self._to.run_id, "")
            with self._sending:
                if self._closed:
                    return
                more = [name for name in PATIENCE if name not in os.environ]
                os.environ.update({name: PATIENCE[name] for name in more})
                self._set += more
                log_history(self._tracker, self._points[:count], refresh=False)
            del self._points[:count]
            self._pause_s = EVERY_S
        except Exception as error:  # whatever it is, training goes on
            if not self._warned:
                _log.warning("no losses reach %s while training runs: %s", redact(self._to.uri), last_line(error))
            self._warned = True
            self._pause_s = min(2 * self._pause_s, LATEST_S)
        self._next_s = time.monotonic() + self._pause_s
