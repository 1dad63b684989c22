# SPDX-License-Identifier: Apache-2.0
"""Connections between the snapshot processes of a job: authenticated TCP, one request and one reply at a time.

Requests: `offer`, `prepared`, `commit`, `persisted` (control) and `read`, `record` (bytes). `read` is the one way
bytes leave a node, for parity and for recovery alike: it is answered by `sendfile` from the memfd, so the serving
side copies nothing. Readers pull at their own pace, which is also the flow control.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from . import wire
from .agreement import Decision, SnapshotId
from .errors import ProtocolError, SnapshotError, StaleWriterError
from .held import Held, Record, pack_record, unpack_record
from .keeper import Keeper
from .slots import Segment
from .stripes import BUCKET_BYTES
from .wire import Message

_CONNECT_TIMEOUT = timedelta(seconds=3)
_REPLY_TIMEOUT = timedelta(seconds=60)
_SEND_TIMEOUT = timedelta(seconds=60)
_RETRY_PAUSE = timedelta(milliseconds=20)
MAX_READ_BUCKETS = 64

Part = tuple[int, int, int]
"""Bytes in a memfd: descriptor, first byte, count."""


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


class _NotYetError(SnapshotError):
    """What is asked for is being rebuilt."""


class PeerServer:
    """Answers the other nodes. One thread a connection; a bad message ends its connection and nothing else."""

    def __init__(
        self,
        keeper: Keeper,
        address: str,
        *,
        prepared: Callable[[SnapshotId], None],
        committed: Callable[[SnapshotId, bool], None],
        persisted: Callable[..., None],
    ) -> None:
        self._keeper = keeper
        self._prepared, self._committed, self._persisted = prepared, committed, persisted
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=64)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, name="peers", daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, address = self._listener.accept()
            threading.Thread(target=self._serve, args=(sock, address), daemon=True).start()

    def _serve(self, sock: socket.socket, address: object) -> None:
        with sock:
            try:
                key = self._keeper.key
                if key is None:
                    return
                sock.settimeout(_CONNECT_TIMEOUT.total_seconds())
                wire.authenticate(sock, key, server=True)
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A reader that vanished without a word must not keep a snapshot pinned.
                user_timeout_ms = int(_SEND_TIMEOUT.total_seconds() * 1000)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
                while True:
                    message, body, _ = wire.receive(sock)
                    self._answer(sock, message, body)
            except ProtocolError as error:
                self._keeper.event("refused", peer=str(address), error=str(error))
            except OSError:
                return  # the other side has gone; it will come again if it wants something

    def _answer(self, sock: socket.socket, message: Message, body: memoryview) -> None:
        try:
            self._keeper.check_open(_integer(message, "in"))
            if message.get("op") == "read":
                self._send_buckets(sock, message)
                return
            reply, data = self._handle(message, body)
        except (StaleWriterError, _NotYetError) as error:
            reply, data = {"error": str(error), "later": True}, b""
        except SnapshotError as error:
            reply, data = {"error": str(error)}, b""
        wire.send(sock, reply, data)

    def _handle(self, message: Message, body: memoryview) -> tuple[Message, bytes]:
        snapshot = _snapshot(message)
        op = message.get("op")
        if op == "offer":
            record = unpack_record(message.get("ranks"), body)
            self._keeper.offered(snapshot, _integer(message, "position"), record, _integer(message, "world_size"))
        elif op == "prepared":
            checks = checked_replicas(message)
            if self._keeper.note_prepared(snapshot, _integer(message, "position"), checks):
                self._prepared(snapshot)
        elif op == "commit":
            self._committed(snapshot, bool(message.get("persist")))
        elif op == "persisted":
            self._persisted(snapshot, _integer(message, "position"), durable=message.get("durable") is True)
        elif op == "record":
            with self._keeper.changed:
                held = self._keeper.held.get(snapshot)
                record = held.records.get(_integer(message, "position")) if held else None
            if not record:
                raise SnapshotError(f"{snapshot} is not known here")
            ranks, data = pack_record(record)
            return {"ranks": ranks}, data
        else:
            raise ProtocolError(f"unknown request {op!r}")
        return {}, b""

    def _send_buckets(self, sock: socket.socket, message: Message) -> None:
        snapshot, kind = _snapshot(message), message.get("kind")
        start, count, index = (_integer(message, name) for name in ("start", "count", "index"))
        if count > MAX_READ_BUCKETS:
            raise ProtocolError(f"a read of {count} buckets is more than {MAX_READ_BUCKETS}")
        held = self._keeper.pin(snapshot)
        if held is None:
            raise SnapshotError(f"{snapshot} is not held here")
        try:
            parts, checksums = self._parts(held, kind, index, start, count)
            wire.send_head(sock, {"crc32c": checksums}, sum(size for _, _, size in parts))
            for fd, offset, size in parts:
                _send_file(sock, fd, offset, size)
        finally:
            self._keeper.unpin(held)

    def _parts(self, held: Held, kind: object, index: int, start: int, count: int) -> tuple[list[Part], list[int]]:
        """Where the buckets lie, and the checksums of those whose reader cannot know them (rows of parity)."""
        with self._keeper.changed:
            if kind == "data" and held.data_complete:
                return [(segment.fd, offset, size) for segment, offset, size in held.data_views(start, count)], []
            if kind == "parity" and held.parity_complete and index < len(held.parity):
                return [_bucket_range(held.parity[index], start, count)], []
            if kind == "row" and 1 <= index < held.group.m and start + count <= held.chunk:
                return self._row(held, index, start, count)
            if kind in ("data", "parity") and index < max(1, held.group.m):
                raise _NotYetError(f"{kind} of {held.id} is not complete here yet")
        raise SnapshotError(f"{kind} {index} of {held.id} is not here")

    def _row(self, held: Held, index: int, start: int, count: int) -> tuple[list[Part], list[int]]:
        """Wait until this node has encoded so much of the stripe whose parity rows it hands on."""
        generation = self._keeper.generation
        self._keeper.changed.wait_for(
            lambda: (
                held.handed_on_buckets >= start + count
                or not self._keeper.is_open
                or self._keeper.generation != generation
            )
        )
        self._keeper.check_open(generation)
        if not held.handed_on:
            raise SnapshotError(f"the rows of {held.id} have been handed on already")
        checksums = held.handed_on_checksums[index - 1][start : start + count]
        return [_bucket_range(held.handed_on[index - 1], start, count)], [int(value) for value in checksums]


def _bucket_range(segment: Segment, start: int, count: int) -> Part:
    low, high = start * BUCKET_BYTES, min((start + count) * BUCKET_BYTES, segment.size_bytes)
    return segment.fd, low, max(0, high - low)


def _send_file(sock: socket.socket, fd: int, offset: int, size: int) -> None:
    while size:
        sent = os.sendfile(sock.fileno(), fd, offset, size)
        if not sent:
            raise ConnectionError("the other side closed the connection")
        offset, size = offset + sent, size - sent


def checked_replicas(message: Message) -> dict[str, int]:
    """The checksums of shared state in a message. Raises ProtocolError if they are none."""
    raw = message.get("replica_checks")
    if not isinstance(raw, dict) or not all(isinstance(value, int) for value in raw.values()):
        raise ProtocolError("malformed message: replica_checks")
    return raw


def _snapshot(message: Message) -> SnapshotId:
    return SnapshotId(generation=_integer(message, "generation"), step=_integer(message, "step"))


def _integer(message: Message, name: str) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ProtocolError(f"malformed message: {name} is not a count")
    return value
