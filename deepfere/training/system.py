"""The load of a host in a run: MLflow's own system metrics (CPU, memory, disk, network, GPUs), every ten seconds."""

from __future__ import annotations

import logging
import threading
from typing import Any

from deepfere.cluster import last_line
from deepfere.training.mlflow_store import import_mlflow, redact

EVERY_S = 10.0
ENDS_S = 5.0
"""So long may the last of it take: a server that is away keeps MLflow's client for minutes."""

_log = logging.getLogger(__name__)


class SystemMetrics:
    """Records this host's load until it is closed; whatever goes wrong, the run goes on.

    Args:
        uri: The tracking URI.
        run_id: The run, which is ``RUNNING``.
        host: Stands in the metrics' names (``system/HOST/...``); None on the driver's host (``system/...``).
    """

    def __init__(self, uri: str, run_id: str, host: str | None = None) -> None:
        self._uri, self._monitor, self._closed = uri, None, threading.Event()
        self._lock = threading.Lock()
        # The store is asked where an earlier attempt's points end, and may keep one waiting.
        threading.Thread(target=self._begin, args=(run_id, host), daemon=True).start()

    def _begin(self, run_id: str, host: str | None) -> None:
        try:
            import_mlflow()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            # It tells when it starts, when it ends and when the run cannot be reached: of no use to anybody here.
            logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
            monitor: Any = SystemMetricsMonitor(
                run_id, sampling_interval=EVERY_S, resume_logging=True, node_id=host, tracking_uri=self._uri
            )
            with self._lock:
                if not self._closed.is_set():
                    monitor.start()
                    self._monitor = monitor
        except Exception as error:  # psutil in a container without /proc, a server that is away ...
            _log.warning("no system metrics reach %s: %s", redact(self._uri), last_line(error))

    def close(self) -> None:
        """Record no more."""
        self._closed.set()
        with self._lock:
            monitor = self._monitor
        if monitor is not None:
            last = threading.Thread(target=monitor.finish, daemon=True)
            last.start()
            last.join(ENDS_S)
