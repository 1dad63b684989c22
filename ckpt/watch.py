# SPDX-License-Identifier: Apache-2.0
"""The agent's look at its snapshot process: does it answer, and whom does it miss?

It has a connection of its own, so that no long request of the agent's delays it. A snapshot process that does not
answer for `heartbeat_s` three times over is killed, since a stopped one would hold its node's training up for ever
and, continued later, would go on in a generation that is over. Its memory is lost and comes back from the other nodes;
so where no other node could give it back (no parity) it is only complained about.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from .client import Client

_BEATS = 4
_PATIENCE = 3.0
_LOOK_EVERY_S = 0.2


class Watch:
    """Looks until the agent ends."""

    def __init__(self, path: Path, heartbeat_s: float) -> None:
        self._path, self._heartbeat_s = path, heartbeat_s
        self._generation = 0
        self._reasons: list[str] = []
        self._spare = False
        self._complained = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        if heartbeat_s:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(self._heartbeat_s * _PATIENCE)

    def reasons(self, generation: int) -> list[str]:
        """Why `generation` cannot go on as it is; empty if it can."""
        return list(self._reasons) if self._generation == generation else []

    def _look(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(OSError):  # it has died, and the agent sees that for itself
                client = Client(self._path)
                with contextlib.closing(client):
                    self._ask(client)
            self._stopped.wait(min(_LOOK_EVERY_S, self._heartbeat_s / _BEATS))

    def _ask(self, client: Client) -> None:
        fd = os.pidfd_open(client.pid)
        try:
            client.sock.settimeout(self._heartbeat_s * _PATIENCE)
            while not self._stopped.is_set():
                reply, _, _ = client.call({"op": "pulse"})
                reasons = [f"node {name!r}: {reason}" for name, reason in reply["missing"].items()]
                if reply["over"] and not reasons:
                    reasons = ["another node has left it"]
                self._spare, self._complained = bool(reply["spare"]), False
                self._generation, self._reasons = int(reply["generation"]), reasons
                self._stopped.wait(min(_LOOK_EVERY_S, self._heartbeat_s / _BEATS))
        except TimeoutError:
            self._hung(fd)
        finally:
            os.close(fd)

    def _hung(self, fd: int) -> None:
        silent = f"this node's snapshot process has not answered for {self._heartbeat_s * _PATIENCE:.1f} s"
        if self._spare:
            print(f"refound: {silent}: ending it; the other nodes have what it held", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        elif not self._complained:
            self._complained = True
            print(f"refound: {silent}; nothing else holds its snapshots, so it is left alone", file=sys.stderr)
