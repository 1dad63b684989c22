# SPDX-License-Identifier: Apache-2.0
"""The agent's look at its snapshot process: does it answer, and whom does it miss?

It has a connection of its own, so that no long request of the agent's delays it. A snapshot process that does not
answer for `heartbeat_s` three times over is killed, since a stopped one would hold its node's training up for ever
and, continued later, would go on in a generation that is over. Its memory is lost and comes back from the other nodes.
Where no other node could give it back (no parity) it is complained about, and killed after `lease_s` only.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from . import wire
from .client import Client
from .wire import Message

_BEATS = 4
_PATIENCE = 3.0
_LOOK_EVERY_S = 0.2


class Watch:
    """Looks until the agent ends."""

    def __init__(self, path: Path, heartbeat_s: float, lease_s: float) -> None:
        self._path, self._heartbeat_s, self._lease_s = path, heartbeat_s, lease_s
        self._generation = 0
        self._reasons: list[str] = []
        self._spare = False
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
            while not self._stopped.is_set():
                wire.send(client.sock, {"op": "pulse"})
                self._await_answer(client, fd)
                if self._stopped.is_set():
                    return
                client.sock.settimeout(self._heartbeat_s * _PATIENCE)
                self._take(wire.receive(client.sock)[0])
                self._stopped.wait(min(_LOOK_EVERY_S, self._heartbeat_s / _BEATS))
        finally:
            os.close(fd)

    def _take(self, reply: Message) -> None:
        reasons = [f"node {name!r}: {reason}" for name, reason in reply["missing"].items()]
        if reply["over"] and not reasons:
            reasons = ["another node has left it"]
        self._spare = bool(reply["spare"])
        self._generation, self._reasons = int(reply["generation"]), reasons

    def _await_answer(self, client: Client, fd: int) -> None:
        """On this one connection: a stopped process accepts no others, and a queue of them would fill up."""
        asked_at, complained, beat = time.monotonic(), False, timedelta(seconds=self._heartbeat_s / _BEATS)
        while not self._stopped.is_set() and not wire.is_readable(client.sock.fileno(), beat):
            silent_s = time.monotonic() - asked_at
            if silent_s <= self._heartbeat_s * _PATIENCE:
                continue
            silent = f"this node's snapshot process has not answered for {silent_s:.1f} s"
            if self._spare or silent_s > self._lease_s:
                lost = "the other nodes have what it held" if self._spare else "what it held is lost"
                print(f"refound: {silent}: ending it; {lost}", file=sys.stderr, flush=True)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                return
            if not complained:
                complained = True
                words = f"nothing else holds its snapshots, so it is left alone for {self._lease_s:.0f} s (lease_s)"
                print(f"refound: {silent}; {words}", file=sys.stderr, flush=True)
