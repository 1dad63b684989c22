# SPDX-License-Identifier: Apache-2.0
"""Connections between the snapshot processes of a job: authenticated TCP, one request and one reply at a time.

Requests: `offer`, `prepared`, `commit`, `persisted`, `finished`, `over` (control); `read`, `record`, `rebuild` (bytes).
Readers pull at their own pace, which is also the flow control. `server.py` answers.
"""

import contextlib
import socket
import time
from datetime import timedelta

from . import wire
from .agreement import Decision, SnapshotId
from .errors import ProtocolError, SnapshotError, StaleWriterError
from .held import Record, unpack_record
from .keeper import Keeper
from .wire import Message

_CONNECT_TIMEOUT = timedelta(seconds=3)
_REPLY_TIMEOUT = timedelta(seconds=60)
_RETRY_PAUSE = timedelta(milliseconds=20)
MAX_READ_BUCKETS = 64


class Peers:
    """This thread's connections to the other nodes of one generation. Not shared between threads."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes) -> None:
        self._keeper, self._decision, self._key = keeper, decision, key
        self._sockets: dict[int, socket.socket] = {}
        self._closed = False

    def request(self, position: int, message: Message, body: bytes = b"") -> tuple[Message, memoryview]:
        """Ask the node at `position`, trying again until it answers or the generation ends here.

        Raises StaleWriterError when the generation ends, SnapshotError with the peer's own words if it refuses.
        """
        while True:
            self.check()
            try:
                self.post(position, message, body)
                return self.collect(position)
            except (OSError, ProtocolError):
                self.retry_after(position)

    def post(self, position: int, message: Message, body: bytes = b"") -> None:
        """Send a request; `collect` gets its reply. Replies come in the order of requests."""
        wire.send(self._socket(position), {**message, "in": self._decision.generation}, body)

    def collect(self, position: int, into: memoryview | None = None) -> tuple[Message, memoryview]:
        """The reply to the oldest request to `position` that has not been collected."""
        reply, data, _ = wire.receive(self._socket(position), into)
        if error := reply.get("error"):
            if reply.get("later"):
                raise ConnectionError(error)  # it is at a rendezvous or recovering: worth asking again
            raise SnapshotError(f"node {self._decision.nodes[position].name!r}: {error}")
        return reply, data

    def check(self) -> None:
        """Raises StaleWriterError once the generation has ended."""
        if self._closed:
            raise StaleWriterError("the generation has ended")
        self._keeper.check_open(self._decision.generation)

    def retry_after(self, position: int) -> None:
        """Drop the connection, pause, and go on (or raise if the generation has ended)."""
        if sock := self._sockets.pop(position, None):
            sock.close()
        self.check()
        time.sleep(_RETRY_PAUSE.total_seconds())

    def _socket(self, position: int) -> socket.socket:
        if position not in self._sockets:
            node = self._decision.nodes[position]
            sock = socket.create_connection((node.address, node.port), timeout=_CONNECT_TIMEOUT.total_seconds())
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                wire.authenticate(sock, self._key, server=False)
            except BaseException:
                sock.close()
                raise
            sock.settimeout(_REPLY_TIMEOUT.total_seconds())
            self._sockets[position] = sock
            if self._closed:  # while this connection was made, so nobody else will close it
                sock.close()
                self.check()
        return self._sockets[position]

    def close(self) -> None:
        """Close all connections; a thread that waits on one gets a ConnectionError."""
        self._closed = True
        for sock in list(self._sockets.values()):
            with contextlib.suppress(OSError):  # the other side may have closed it first
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def read_message(snapshot: SnapshotId, kind: str, index: int, start: int, count: int) -> Message:
    """Ask for buckets [start, start+count) of a node's vector (kind "data"), of its parity chunk `index`
    (kind "parity"), or of row `index` of the stripe that it encodes (kind "row")."""
    return {
        "op": "read",
        "generation": snapshot.generation,
        "step": snapshot.step,
        "kind": kind,
        "index": index,
        "start": start,
        "count": count,
    }


def fetch_record(peers: Peers, position: int, snapshot: SnapshotId, of_position: int) -> Record:
    """The record of `of_position`, from a node that knows it."""
    ask = {"op": "record", "generation": snapshot.generation, "step": snapshot.step, "position": of_position}
    reply, body = peers.request(position, ask)
    return unpack_record(reply.get("ranks"), body)


class NotYetError(SnapshotError):
    """What is asked for is being rebuilt."""
