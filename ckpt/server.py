# SPDX-License-Identifier: Apache-2.0
"""Answering the other nodes' snapshot processes.

`read` is the one way stored bytes leave a node, for parity and for recovery alike: it is answered by `sendfile` from
the memfd, so the serving side copies nothing.
"""

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

from . import pulse, wire
from .agreement import SnapshotId
from .errors import ProtocolError, SnapshotError, StaleWriterError
from .held import Held, bucket_checksums, pack_record, unpack_record
from .keeper import Keeper
from .listening import accept_forever
from .peers import MAX_READ_BUCKETS, NotYetError
from .rebuild import Rebuilder
from .slots import Segment
from .stripes import BUCKET_BYTES
from .wire import MAX_COUNT, Message

_AUTHENTICATE_TIMEOUT = timedelta(seconds=5)
_RANKS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})+")
_SEND_TIMEOUT = timedelta(seconds=60)

Part = tuple[int, int, int]
"""Bytes in a memfd: descriptor, first byte, count."""


class _Helper:
    """Rebuilds for one connection; the connections that this takes last as long as that one."""

    def __init__(self, rebuilder: Callable[[], Rebuilder]) -> None:
        self._make = rebuilder
        self._rebuilder: Rebuilder | None = None

    def rebuild(self, message: Message) -> tuple[Message, memoryview]:
        """Compute a lost symbol."""
        self._rebuilder = self._rebuilder or self._make()
        place = [_integer(message, name) for name in ("stripe", "symbol", "start", "count")]
        symbol = self._rebuilder.compute(*place)
        return {"crc32c": bucket_checksums(symbol).tolist()}, symbol.data

    def close(self) -> None:
        if self._rebuilder is not None:
            self._rebuilder.close()


class PeerServer:
    """Answers the other nodes. One thread a connection; a bad message ends its connection and nothing else."""

    def __init__(
        self,
        keeper: Keeper,
        address: str,
        *,
        prepared: Callable[[SnapshotId], None],
        committed: Callable[[SnapshotId, bool, str], None],
        persisted: Callable[..., None],
        finished: Callable[[SnapshotId, int], None],
        over: Callable[[], None],
        rebuilder: Callable[[], Rebuilder],
    ) -> None:
        self._keeper = keeper
        self._prepared, self._committed, self._persisted = prepared, committed, persisted
        self._finished, self._over = finished, over
        self._rebuilder = rebuilder
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=64)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, name="peers", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are there go on."""
        with contextlib.suppress(OSError):  # it may have been closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        accept_forever(self._listener, self._serve)

    def _serve(self, sock: socket.socket, address: object) -> None:
        with sock, contextlib.closing(_Helper(self._rebuilder)) as helper:
            try:
                key = self._keeper.key
                if key is None:
                    return
                sock.settimeout(_AUTHENTICATE_TIMEOUT.total_seconds())
                wire.authenticate(sock, key, server=True)
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A reader that vanished without a word must not keep a snapshot pinned.
                user_timeout_ms = int(_SEND_TIMEOUT.total_seconds() * 1000)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
                while True:
                    message, body, _ = wire.receive(sock)
                    self._answer(sock, message, body, helper)
            except ProtocolError as error:
                self._keeper.refused(peer=str(address), error=str(error))
            except OSError:
                return  # the other side has gone; it will come again if it wants something

    def _answer(self, sock: socket.socket, message: Message, body: memoryview, helper: "_Helper") -> None:
        if message.get("op") == "pulse":
            wire.send(sock, pulse.answer(self._keeper, _integer(message, "in")))
            return
        try:
            self._keeper.check_open(_integer(message, "in"))
            if message.get("op") == "read":
                self._send_buckets(sock, message)
                return
            if message.get("op") == "rebuild":
                reply, data = helper.rebuild(message)
            else:
                reply, data = self._handle(message, body)
        except (StaleWriterError, NotYetError) as error:
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
            with self._keeper.changed:
                self._keeper.tuning.heard(snapshot, message)
            position, objection = _integer(message, "position"), str(message.get("objection") or "")[:2000]
            if self._keeper.note_prepared(snapshot, position, checks, objection):
                self._prepared(snapshot)
        elif op == "commit":
            with self._keeper.changed:
                self._keeper.tuning.decided(snapshot, message)
            self._committed(snapshot, bool(message.get("persist")), str(message.get("objection") or "")[:2000])
        elif op == "persisted":
            self._persisted(snapshot, _integer(message, "position"), durable=message.get("durable") is True)
        elif op == "finished":
            self._finished(snapshot, _integer(message, "position"))
        elif op == "over":
            self._over()
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
        """Where the buckets lie, and the checksums of those whose reader cannot know them (parity)."""
        with self._keeper.changed:
            span = range(start, start + count)
            if kind == "data" and held.data_complete and held.damaged_data.isdisjoint(span):
                return [(segment.fd, offset, size) for segment, offset, size in held.data_views(start, count)], []
            if kind == "parity" and held.parity_complete and index < len(held.parity):
                if held.damaged_parity.isdisjoint((index, bucket) for bucket in span):
                    checksums = held.parity_checksums[index][start : start + count]
                    return [_bucket_range(held.parity[index], start, count)], checksums.tolist()
                raise NotYetError(f"parity of {held.id} is being mended here")
            if kind == "row" and 1 <= index < held.group.m:
                if not held.records_complete:
                    raise NotYetError(f"the checksums of {held.id} are not all here yet")
                if start + count <= held.chunk:
                    return self._row(held, index, start, count)
            if kind in ("data", "parity") and index < max(1, held.group.m):
                raise NotYetError(f"{kind} of {held.id} is not complete here yet")
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
    if not all(_RANKS.fullmatch(ranks) for ranks in raw):
        raise ProtocolError("malformed message: replica_checks name no ranks")
    return raw


def _snapshot(message: Message) -> SnapshotId:
    return SnapshotId(generation=_integer(message, "generation"), step=_integer(message, "step"))


def _integer(message: Message, name: str) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_COUNT:
        raise ProtocolError(f"malformed message: {name} is not a count")
    return value
