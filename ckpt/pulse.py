# SPDX-License-Identifier: Apache-2.0
"""Snapshot processes of a generation tell each other that they live.

Each asks the nodes 1, 2, 4, 8, … positions further on, log2(n) of them, over connections of their own, and hands on in
its answers whom it misses: so every node knows within log2(n) beats. A node is missing when its port refuses twice (its
process is gone), or when it has been silent for `heartbeat_s`. A node that answers that it has left the generation says
that it is over. The agents act on it (`watch.py`); nothing here touches a snapshot.

Neither side takes the keeper's lock, which is held for as long as checking all snapshots takes. So an answer looks at
one number only, the last generation that this node has left: it is right even while the next one is being opened.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from . import wire
from .agreement import Decision
from .errors import ProtocolError
from .keeper import Keeper
from .threads import PATIENCE, start_thread
from .wire import Message

_FIRST_CONTACT = timedelta(seconds=30)
"""How long a node may take to open a generation that the others have opened."""
_BEATS = 4
"""Beats within `heartbeat_s`."""
_ASK_AGAIN = timedelta(milliseconds=50)
_LATE = 1.5
"""Silence that lasted so many times longer than it was waited for is our own: we were stopped or starved."""


def watched(position: int, nodes: int) -> list[int]:
    """The positions that the node at `position` asks."""
    offsets = [1 << power for power in range(nodes.bit_length()) if 1 << power < nodes]
    return sorted({(position + offset) % nodes for offset in offsets} - {position})


def answer(keeper: Keeper, generation: int) -> Message:
    """What this node says to a beat of `generation`, which it is in or was in."""
    pulse = keeper.pulse
    missing = sorted(pulse.missing) if pulse and pulse.generation == generation else []
    failed = keeper.first_failure is not None or _has_lost_a_worker(keeper)
    return {"over": generation <= keeper.left, "failed": failed, "missing": missing}


def _has_lost_a_worker(keeper: Keeper) -> bool:
    return any(not worker.alive for worker in list(keeper.workers.values()))


def report(keeper: Keeper) -> Message:
    """What this node's agent is told."""
    pulse = keeper.pulse
    if pulse is None:
        return {"generation": 0, "missing": {}, "over": False, "spare": False}
    return {
        "generation": pulse.generation,
        "missing": {pulse.nodes[position].name: reason for position, reason in dict(pulse.missing).items()},
        "over": pulse.is_over,
        "spare": pulse.is_spare,
    }


class Pulse:
    """This node's beats in one generation. One thread for each node that it asks."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes) -> None:
        self._keeper, self._key = keeper, key
        self.generation, self.nodes = decision.generation, decision.nodes
        self.is_spare = any(group.m for group in decision.groups)
        """Whether the other nodes can give back what this one holds."""
        self.missing: dict[int, str] = {}
        """Positions that are missed, and why."""
        self.is_over = False
        """Other nodes have left this generation."""
        self._heartbeat_s = keeper.conf.heartbeat_s
        self._closed = threading.Event()
        self._heard_at: dict[int, float] = {}
        self._met: set[int] = set()

    def start(self) -> None:
        """Begin. With heartbeats turned off nobody is asked, and nobody missed."""
        with self._keeper.changed:
            self._keeper.on_seal.append(self.close)
            self._keeper.pulse = self
        for position in watched(self._keeper.position, len(self.nodes)) if self._heartbeat_s else ():
            start_thread(self._watch, position, patience=PATIENCE)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(ValueError):
            self._keeper.on_seal.remove(self.close)

    def who_is_gone(self) -> tuple[list[str], str]:
        """A worker here has lost a connection: names of nodes that are gone, or of one whose own worker has failed.

        Found out on the spot: asks until it knows, for `heartbeat_s` at most. What it cannot find out is empty.
        """
        deadline = time.monotonic() + self._heartbeat_s
        if _has_lost_a_worker(self._keeper):
            return [], ""  # another worker of this node
        while not self.missing and not self._closed.is_set() and time.monotonic() < deadline:
            for position in watched(self._keeper.position, len(self.nodes)):
                try:
                    with self._connection(position) as sock:
                        wire.send(sock, {"op": "pulse", "in": self.generation})
                        reply, _, _ = wire.receive(sock)
                except ConnectionRefusedError:
                    self._miss(position, "its snapshot process is gone")
                except OSError:
                    continue
                else:
                    if reply.get("failed") or reply.get("over"):
                        return [], self.nodes[position].name if reply.get("failed") else ""
            self._closed.wait(_ASK_AGAIN.total_seconds())
        return [self.nodes[position].name for position in list(self.missing)], ""

    def _watch(self, position: int) -> None:
        self._heard_at[position] = time.monotonic()
        refused = 0
        while not self._closed.is_set():
            try:
                self._converse(position)
                return
            except ConnectionRefusedError:
                refused += 1
            except OSError:
                refused = 0
            patience_s = self._heartbeat_s if position in self._met else _FIRST_CONTACT.total_seconds()
            silent_s = time.monotonic() - self._heard_at[position]
            if refused > 1:
                self._miss(position, "its snapshot process is gone")
                return
            if silent_s > _LATE * patience_s + self._heartbeat_s:
                self._heard_at[position] = time.monotonic()
            elif silent_s > patience_s:
                self._miss(position, f"not heard for {silent_s:.1f} s")
                return
            self._closed.wait(self._heartbeat_s / _BEATS)

    def _converse(self, position: int) -> None:
        """Beat until the generation is over. Raises OSError when the other side cannot be reached or is silent."""
        with self._connection(position) as sock:
            while not self._closed.is_set():
                wire.send(sock, {"op": "pulse", "in": self.generation})
                reply, _, _ = wire.receive(sock)
                self._heard_at[position] = time.monotonic()
                self._met.add(position)
                if not self._take(reply):
                    return
                self._closed.wait(self._heartbeat_s / _BEATS)

    @contextlib.contextmanager
    def _connection(self, position: int) -> Iterator[socket.socket]:
        node = self.nodes[position]
        with socket.create_connection((node.address, node.port), timeout=self._heartbeat_s) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.authenticate(sock, self._key, server=False)
            yield sock

    def _take(self, reply: Message) -> bool:
        """False if there is nothing more to ask: the generation is over."""
        missing = reply.get("missing")
        if not isinstance(missing, list) or not all(isinstance(entry, int) for entry in missing):
            raise ProtocolError("malformed answer to a beat")
        for position in missing:
            if position == self._keeper.position:
                return self._over("the other nodes have missed this one")
            if 0 <= position < len(self.nodes):
                self._miss(position, "another node misses it")
        return not reply.get("over") or self._over("another node is at the rendezvous")

    def _over(self, reason: str) -> bool:
        if not self._closed.is_set() and not self.is_over:
            self.is_over = True
            self._keeper.event("generation over", reason=reason)
        return False

    def _miss(self, position: int, reason: str) -> None:
        if not self._closed.is_set() and position not in self.missing:
            self.missing[position] = reason
            self._keeper.event("node missing", node=self.nodes[position].name, reason=reason)
