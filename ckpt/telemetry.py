# SPDX-License-Identifier: Apache-2.0
"""What a snapshot process tells the outside by itself, as its settings ask: metrics and the log of events."""

from collections.abc import Callable

from .conf import PluginConfig
from .eventlog import EventLog, log_file
from .keeper import Keeper
from .metrics import MetricsServer, Status


class Telemetry:
    """Follows the settings: an agent that comes back may bring others. Nothing here can harm a snapshot."""

    def __init__(self, keeper: Keeper, status: Callable[[], Status]) -> None:
        self._keeper, self._status = keeper, status
        self._metrics: MetricsServer | None = None
        self._asked_port = 0
        self._log: EventLog | None = None

    def follow(self, conf: PluginConfig) -> None:
        """Begin, move or end what these settings ask for."""
        self._follow_log(conf.event_log)
        self._follow_port(conf.metrics_port)

    def _follow_log(self, directory: str) -> None:
        path = log_file(directory, self._keeper.job, self._keeper.node) if directory else None
        if path == (self._log.path if self._log else None):
            return
        old, self._log = self._log, EventLog(path) if path else None
        self._keeper.sink = self._log.write if self._log else None
        if old:
            old.close(1.0)

    def _follow_port(self, port: int) -> None:
        if port == self._asked_port:
            return
        if self._metrics:
            self._metrics.close()
            self._metrics = None
        self._asked_port = port
        if not port:
            return
        try:
            self._metrics = MetricsServer(port, self._status)
            self._keeper.event("metrics", url=f"http://127.0.0.1:{port}/metrics")
        except OSError as error:
            # Two nodes on one host, or somebody else's service: the snapshots matter more.
            self._keeper.event("no metrics", port=port, error=str(error))

    def close(self, timeout_s: float) -> None:
        """The process is about to end: write down what waits."""
        if self._log:
            self._log.close(timeout_s)
