# SPDX-License-Identifier: Apache-2.0
"""Throw malformed, mutated, forged and replayed messages at a live snapshot process; it must shrug.

    python tests/chaos/fuzz.py [--messages 1000000] [--seed N] [--json]

A real process holds a committed snapshot. Everything goes to its Unix socket and to its TCP port: garbage, cut and
oversized frames, deep JSON, real requests with fields of any kind, wrong keys, replayed handshakes, and messages of
one who holds the job's key and talks nonsense. After every round the process must answer, hold the very same snapshot,
sound, and no more descriptors than before; at the end no more memory either. Exit code 1 if not, and the seed that
says it again.
"""

import argparse
import errno
import json
import os
import random
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from refound.ckpt import wire
from refound.ckpt.agreement import NodeView
from refound.ckpt.client import Client
from refound.ckpt.errors import SnapshotError
from refound.ckpt.stripes import BUCKET_BYTES

if __package__:
    from ..ckpt.alone import Alone, alone
else:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.ckpt.alone import Alone, alone

_FIELDS = struct.Struct("!4sBxHIQI")
_HEADER_BYTES = _FIELDS.size + 4
_PATIENCE_S = 60.0
_ROUND = 2000
_BATCH = 48
_LAST_STEP = 7
_ENDED = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
"""How a connection ends whose other side has not read all that was sent."""
_GROWTH_BYTES = 64 << 20
"""What a process that handles many messages may grow by: its allocator's arenas and thread stacks."""

Random = random.Random
Json = Any


class FuzzError(AssertionError):
    """The process did something that it must not."""


# --- what is sent ----------------------------------------------------------------------------------------------


def frame(message: object, body: bytes = b"", **wrong: Any) -> bytes:
    """A frame, with header fields replaced as asked."""
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    fields = {"magic": b"rfnd", "version": 2, "reserved": 0, "json_bytes": len(text), "body_bytes": len(body)}
    head = _FIELDS.pack(*(fields | {"text_check": zlib.crc32(text)} | wrong).values())
    return head + struct.pack("!I", zlib.crc32(head)) + text + body


def any_value(rng: Random, depth: int = 0) -> Json:
    """A JSON value of a kind that nobody expects."""
    kind = rng.randrange(12 if depth < 3 else 9)
    if kind < 4:
        return rng.choice(
            [0, 1, 2, -1, 63, 64, 65, BUCKET_BYTES, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30)]
        )
    if kind < 6:
        return rng.choice(
            [None, True, False, 0.5, -0.0, 1e308, "", "x" * rng.randrange(300), "\0", "\ud800", "op", "../.."]
        )
    if kind < 9:
        return rng.choice(["read", "data", "parity", "row", "stop", "hello", "attach", rng.randrange(10**6)])
    if kind == 9:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 10:
        return {str(any_value(rng, 3)): any_value(rng, depth + 1) for _ in range(rng.randrange(5))}
    return [[any_value(rng, 3), any_value(rng, 3)] for _ in range(rng.randrange(4))]


def malformed(rng: Random) -> bytes:
    """Bytes that are no message: each ends its connection."""
    good = frame({"op": "status", "job": "x"}, rng.randbytes(rng.randrange(64)))
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 200))
    if kind == 1:
        return good[: rng.randrange(1, len(good))]
    if kind == 2:
        return frame({}, magic=rng.randbytes(4))
    if kind == 3:
        return frame({}, **{rng.choice(["json_bytes"]): rng.choice([wire.MAX_JSON_BYTES + 1, 2**32 - 1])})
    if kind == 4:
        return frame({}, body_bytes=rng.choice([wire.MAX_BODY_BYTES + 1, 2**63, 2**64 - 1]))
    if kind == 5:
        depth = rng.choice([10, 1000, 50_000])
        return frame(rng.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth]))
    if kind == 6:
        text = bytearray(json.dumps({"op": "begin", "step": rng.randrange(99)}).encode())
        text[rng.randrange(len(text))] = rng.randrange(0x80, 0x100)
        return frame(bytes(text))
    return frame(rng.choice([b"", b"null", b"1", b'"text"', b"[]", b"9" * 5000, b"NaN", b"\xff\xfe{}"]))


_AT_THE_DOOR: list[dict[str, Json]] = [
    {"op": "hello", "job": "", "generation": 1, "rank": 0, "world_size": 1, "local_world_size": 1},
    {"op": "attach", "job": ""},
    {"op": "restore"},
    {"op": "shard", "rank": 0},
    {"op": "begin", "step": 9, "size_bytes": BUCKET_BYTES},
    {"op": "complete", "step": 9, "replica_checks": {}},
    {"op": "abort"},
    {"op": "wait", "step": 9, "timeout_ms": 0},
    {"op": "look", "rank": 0},
    {"op": "inventory"},
    {"op": "open", "views": [], "secret": ""},
    {"op": "configure", "conf": {}},
    {"op": "leave", "success": True},
]
_BETWEEN_NODES: list[dict[str, Json]] = [
    {"op": "offer", "position": 1, "ranks": [[1, BUCKET_BYTES]], "world_size": 2},
    {"op": "prepared", "position": 1, "replica_checks": {}},
    {"op": "commit", "persist": True},
    {"op": "persisted", "position": 1, "durable": True},
    {"op": "read", "kind": "data", "index": 0, "start": 0, "count": 1},
    {"op": "record", "position": 0},
    {"op": "rebuild", "stripe": 0, "symbol": 0, "start": 0, "count": 1},
]


def mutated(rng: Random, template: dict[str, Json]) -> dict[str, Json]:
    """A request with one to three of its fields changed, taken away or added."""
    message = dict(template)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*message, "extra"])
        if rng.random() < 0.2:
            message.pop(name, None)
        else:
            message[name] = any_value(rng)
    if message.get("op") == "stop":  # that is one's right
        message["op"] = "stopp"
    return message


# --- who is there ----------------------------------------------------------------------------------------------


@dataclass
class Target:
    """The live process, and what it was like before."""

    job: Alone
    data: np.ndarray
    view: NodeView
    pid: int
    key: bytes
    descriptors: int = 0
    resident_bytes: int = 0
    sent: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, job: Alone, view: NodeView, data: np.ndarray) -> "Target":
        client = Client(job.path)
        pid = client.pid
        client.close()
        return cls(job=job, data=data, view=view, pid=pid, key=wire.generation_key("", view.nonce))

    def ask(self, op: str) -> dict[str, Json]:
        client = Client(self.job.path)
        try:
            client.sock.settimeout(_PATIENCE_S)
            found = client.call({"op": op})[0]
            _all_that_comes(client.sock)  # it has let go of its end when this one sees the end
            return found
        finally:
            client.close()

    def open_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def resident(self) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS:"))

    def check(self) -> None:
        """It answers, and holds what it held, sound and no more. Raises FuzzError."""
        status = self.ask("status")
        committed = status["committed"]
        if committed is None or committed["step"] != 1 or status["trouble"] or status["snapshots"] != 1:
            raise FuzzError(f"its state has changed: {committed}, {status['trouble']}, {status['snapshots']} snapshots")
        (snapshot,) = [s for s in self.ask("verify")["snapshots"] if s["committed"]]
        if snapshot["view"]["damaged_data"] or snapshot["buckets"] != len(self.data) // BUCKET_BYTES:
            raise FuzzError(f"the committed snapshot is damaged: {snapshot}")
        # It may still be about to close the last connections, whose other ends have seen their end already.
        deadline = time.monotonic() + _PATIENCE_S
        while self.descriptors and (count := self.open_descriptors()) > self.descriptors:
            if time.monotonic() > deadline:
                raise FuzzError(f"{count} descriptors are open where {self.descriptors} were")
            time.sleep(0.01)


# --- how it is sent --------------------------------------------------------------------------------------------


def _connect(target: Target, tcp: bool) -> socket.socket:
    if tcp:
        sock = socket.create_connection((target.view.address, target.view.port), timeout=_PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(_PATIENCE_S)
    sock.connect(os.fspath(target.job.path))
    return sock


def _all_that_comes(sock: socket.socket) -> bytes:
    """Until the other side closes. Raises FuzzError if it neither answers nor closes."""
    found = bytearray()
    try:
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(1 << 16):
            found += data
    except TimeoutError as error:
        raise FuzzError("it neither answered nor closed the connection") from error
    except OSError as error:
        if error.errno not in _ENDED:
            raise FuzzError(f"the connection broke: {error}") from error
    return bytes(found)


def _replies(data: bytes) -> list[dict[str, Json]]:
    found, at = [], 0
    while at + _HEADER_BYTES <= len(data):
        _, _, _, json_bytes, body_bytes, _ = _FIELDS.unpack_from(data, at)
        at += _HEADER_BYTES
        found.append(json.loads(data[at : at + json_bytes]))
        at += json_bytes + body_bytes
    return found


def malformed_at_the_door(target: Target, rng: Random) -> int:
    with _connect(target, tcp=False) as sock:
        data = malformed(rng)
        if rng.random() < 0.1:
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(rng.randrange(1, 8))]
            socket.send_fds(sock, [data], fds)
            for fd in fds:
                os.close(fd)
        else:
            sock.sendall(data)
        if replies := _replies(_all_that_comes(sock)):
            raise FuzzError(f"{data[:80]!r} was answered with {replies}")
    return 1


def mutated_at_the_door(target: Target, rng: Random) -> int:
    """A stranger of the same user: never greeted, so whatever it asks for is refused."""
    messages = []
    while len(messages) < _BATCH:
        message = mutated(rng, rng.choice(_AT_THE_DOOR))
        if message.get("op") == "hello" and not _is_wrong_hello(message):
            continue
        messages.append(message)
    with _connect(target, tcp=False) as sock:
        sock.sendall(b"".join(frame(m, rng.randbytes(rng.choice([0, 0, 3, 8]))) for m in messages))
        replies = _replies(_all_that_comes(sock))
    for message, reply in zip(messages, replies, strict=False):
        if "error" not in reply and "busy" not in reply and message.get("op") not in ("status", "verify", "keep"):
            raise FuzzError(f"{message} was accepted: {reply}")
    if len(replies) != len(messages):
        raise FuzzError(f"after {messages[len(replies)]} it said nothing more")
    return len(messages)


def _is_wrong_hello(message: dict[str, Json]) -> bool:
    """Whether a greeting is to be refused: rank 0 is here already, and others may come."""
    if message.get("job") is not None:
        return True  # not this job's name
    counts = [message.get(name) for name in ("generation", "rank", "world_size", "local_world_size")]
    return not all(type(count) is int and count >= 0 for count in counts) or counts[:2] == [1, 0]


def forged_handshake(target: Target, rng: Random) -> int:
    """Another key, no key, or a proof that was heard before, and then a request as if all were well."""
    request = frame({**rng.choice(_BETWEEN_NODES), "in": 1, "generation": 1, "step": 1})
    with _connect(target, tcp=True) as sock:
        kind = rng.randrange(4)
        if kind == 0:
            sock.sendall(rng.randbytes(rng.randrange(0, 64)))
        elif kind == 1:
            sock.sendall(rng.randbytes(64) + request)
        elif kind == 2:  # its own challenge and proof come back to it
            echo = sock.recv(32)
            sock.sendall(echo)
            sock.sendall(sock.recv(32) + request)
        else:
            mine = rng.randbytes(32)
            sock.sendall(mine)
            theirs = bytes(wire.receive_exactly(sock, memoryview(bytearray(32))))
            wrong = wire.generation_key(rng.choice(["", "secret"]), rng.randbytes(16).hex())
            sock.sendall(wire._proof(wrong, b"client", mine, theirs) + request)
        rest = _all_that_comes(sock)
        if len(rest) > 64:
            raise FuzzError(f"it spoke to one who does not hold the key: {rest[64:200]!r}")
    return 1


def replayed_session(target: Target, rng: Random) -> int:
    """Every byte that a real node once sent, again."""
    with _connect(target, tcp=True) as sock:
        sent: list[bytes] = []
        wire.authenticate(_Tap(sock, sent), target.key, server=False)  # pyright: ignore[reportArgumentType]
        request = frame({"op": "record", "position": 0, "in": 1, "generation": 1, "step": 1})
        sock.sendall(request)
        if not _replies(_all_that_comes(sock)):
            raise FuzzError("it does not answer one who holds the key")
    with _connect(target, tcp=True) as sock:
        sock.sendall(b"".join(sent) + request)
        if len(_all_that_comes(sock)) > 64:
            raise FuzzError("it took a handshake that was heard before")
    return 1


class _Tap:
    """A socket that notes what is sent through it."""

    def __init__(self, sock: socket.socket, sent: list[bytes]) -> None:
        self._sock, self._sent = sock, sent

    def sendall(self, data: bytes) -> None:
        self._sent.append(bytes(data))
        self._sock.sendall(data)

    def recv_into(self, view: memoryview) -> int:
        return self._sock.recv_into(view)


def nonsense_with_the_key(target: Target, rng: Random) -> int:
    """One who holds the key: its bad requests are refused one by one, malformed bytes end its connection."""
    with _connect(target, tcp=True) as sock:
        wire.authenticate(sock, target.key, server=False)
        messages = []
        for _ in range(_BATCH):
            message = {**rng.choice(_BETWEEN_NODES), "in": 1, "generation": 1, "step": rng.choice([1, 50, 51])}
            messages.append(mutated(rng, message))
        data = b"".join(frame(m, rng.randbytes(rng.choice([0, 0, 4, 8]))) for m in messages)
        ends = rng.random() < 0.3
        sock.sendall(data + (malformed(rng) if ends else b""))
        replies = _replies(_all_that_comes(sock))
        if not ends and len(replies) != len(messages):
            raise FuzzError(f"after {messages[len(replies)]} it said nothing more")
    return len(messages) + ends


ATTACKS: list[tuple[int, Callable[[Target, Random], int]]] = [
    (20, malformed_at_the_door),
    (8, mutated_at_the_door),
    (16, forged_handshake),
    (4, replayed_session),
    (8, nonsense_with_the_key),
]


def run(messages: int, seed: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Send so many messages; returns the figures. Raises FuzzError."""
    rng = Random(seed)
    with alone(2, k=1, m=1) as job:
        data = np.frombuffer(rng.randbytes(3 * BUCKET_BYTES), np.uint8)
        job.snapshot(1, data)
        target = Target.of(job, job.views[0], data)
        weights, attacks = zip(*ATTACKS, strict=True)
        for attack in attacks:  # once each, so that what is made at first use is there
            attack(target, rng)
        target.check()
        target.descriptors, target.resident_bytes = target.open_descriptors(), target.resident()
        began, total, next_check = time.monotonic(), 0, _ROUND
        while total < messages:
            attack = rng.choices(attacks, weights)[0]
            count = attack(target, rng)
            target.sent[attack.__name__] += count
            total += count
            if total >= next_check:
                target.check()
                next_check = total + max(_ROUND, messages // 50)
                progress(f"{total} of {messages} messages, {total / (time.monotonic() - began):.0f} a second")
        seconds = time.monotonic() - began
        target.check()
        growth = target.resident() - target.resident_bytes
        if growth > _GROWTH_BYTES:
            raise FuzzError(f"it has grown by {growth} bytes")
        log = job.path.with_suffix(".log").read_text()
        if "Traceback" in log:
            raise FuzzError(f"a thread of it has failed: {log[log.index('Traceback') :][:2000]}")
        job.snapshot(_LAST_STEP, data)  # and it still serves its own
    return {
        "messages": total,
        "seed": seed,
        "seconds": round(seconds, 1),
        "per_second": round(total / seconds),
        "grown_bytes": growth,
        "log_bytes": len(log),
        "by_kind": dict(target.sent),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000, help="how many (default: 1000000)")
    parser.add_argument("--seed", type=int, help="what is drawn (default: drawn itself, and printed)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    print(f"{options.messages} messages, seed {seed}", file=sys.stderr, flush=True)
    try:
        figures = run(options.messages, seed, lambda text: print(text, file=sys.stderr, flush=True))
    except (FuzzError, OSError, SnapshotError) as error:
        print(
            f"{error!r}\n  again: python tests/chaos/fuzz.py --messages {options.messages} --seed {seed}",
            file=sys.stderr,
        )
        return 1
    words = f"{figures['messages']} messages in {figures['seconds']} s: none accepted, nothing lost"
    print(json.dumps(figures) if options.json else words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
