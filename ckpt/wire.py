# SPDX-License-Identifier: Apache-2.0
"""Messages between workers, agents and snapshot processes: framed, length-checked, never pickled.

A frame is a fixed header (magic, version, JSON length, body length), a JSON object and a body of raw bytes. Header and
JSON carry a CRC-32 each, since a bit that flips in `"step": 6` would be believed; bodies have their own checksums. Unix
sockets may carry file descriptors with the first byte. TCP connections begin with a mutual challenge-response
over the generation's key, so a process of another job, user or older generation gets no further than that.
What is not promised: secrecy. Bodies travel in the clear, guarded by the checksums that go with every bucket.
"""

import hashlib
import hmac
import json
import os
import select
import socket
import struct
import zlib
from datetime import timedelta
from typing import Any

from .errors import ProtocolError

_FIELDS = struct.Struct("!4sBxHIQI")  # magic, version, (pad), reserved, JSON bytes, body bytes, CRC-32 of the JSON
_CHECK = struct.Struct("!I")  # CRC-32 of the fields
_HEADER_BYTES = _FIELDS.size + _CHECK.size
_MAGIC = b"rfnd"
_VERSION = 2
MAX_JSON_BYTES = 64 << 20
MAX_BODY_BYTES = 256 << 20
MAX_COUNT = 1 << 62
"""No number in a message is larger: what counts bytes or steps fits into 64 bits, and into a float's range."""
_NONCE_BYTES = 32
_MAC_BYTES = 32
_MAX_FDS = 4

Message = dict[str, Any]


def is_readable(fd: int, timeout: timedelta) -> bool:
    """Wait until something can be read, or the other side has gone. Unlike `select`, for any number of open files."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout.total_seconds() * 1000))


def send(sock: socket.socket, message: Message, body: bytes | memoryview = b"", fds: list[int] | None = None) -> None:
    """Send one frame. `fds` (Unix sockets only) are duplicated into the receiver."""
    text = json.dumps(message, separators=(",", ":")).encode()
    head = _head(text, len(body))
    if fds:
        sent = socket.send_fds(sock, [head], fds)
        head = head[sent:]
    if head:
        sock.sendall(head)
    if len(body):
        sock.sendall(body)


def send_head(sock: socket.socket, message: Message, body_bytes: int) -> None:
    """Announce a body that the caller sends itself (`os.sendfile`)."""
    text = json.dumps(message, separators=(",", ":")).encode()
    sock.sendall(_head(text, body_bytes))


def _head(text: bytes, body_bytes: int) -> bytes:
    """All of a frame but its body."""
    fields = _FIELDS.pack(_MAGIC, _VERSION, 0, len(text), body_bytes, zlib.crc32(text))
    return fields + _CHECK.pack(zlib.crc32(fields)) + text


def receive(sock: socket.socket, into: memoryview | None = None) -> tuple[Message, memoryview, list[int]]:
    """Receive one frame: the message, its body and any descriptors.

    into: where to put the body, if it fits; else memory is allocated (at most MAX_BODY_BYTES).
    Raises ProtocolError (malformed, oversized) or ConnectionError (the peer has gone).
    """
    fds: list[int] = []
    try:
        head = _receive_head(sock, fds)
        magic, version, reserved, json_bytes, body_bytes, text_check = _FIELDS.unpack_from(head)
        if magic != _MAGIC or version != _VERSION or reserved:
            raise ProtocolError(f"not a refound message: it starts with {head[:6].hex()}")
        if _CHECK.unpack_from(head, _FIELDS.size)[0] != zlib.crc32(head[: _FIELDS.size]):
            raise ProtocolError("a message's header was changed on its way")
        if json_bytes > MAX_JSON_BYTES or body_bytes > MAX_BODY_BYTES:
            raise ProtocolError(f"oversized message refused: {json_bytes} bytes of JSON, {body_bytes} of body")
        text = receive_exactly(sock, memoryview(bytearray(json_bytes)))
        if zlib.crc32(text) != text_check:
            raise ProtocolError("a message was changed on its way")
        message = _parse(text)
        if into is not None and body_bytes <= len(into):
            body = into[:body_bytes]
        else:
            body = memoryview(bytearray(body_bytes))
        receive_exactly(sock, body)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, body, fds


def _receive_head(sock: socket.socket, fds: list[int]) -> bytes:
    if sock.family == socket.AF_UNIX:
        first, received, _, _ = socket.recv_fds(sock, _HEADER_BYTES, _MAX_FDS)
        fds.extend(received)
    else:
        first = sock.recv(_HEADER_BYTES)
    if not first:
        raise ConnectionError("the other side closed the connection")
    rest = receive_exactly(sock, memoryview(bytearray(_HEADER_BYTES - len(first))))
    return first + bytes(rest)


def receive_exactly(sock: socket.socket, view: memoryview) -> memoryview:
    """Fill `view` from the socket or raise ConnectionError."""
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:])
        if not count:
            raise ConnectionError("the other side closed the connection in the middle of a message")
        done += count
    return view


def _parse(text: memoryview) -> Message:
    try:
        message = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("malformed message: not JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError("malformed message: not a JSON object")
    return message


def peer_uid_pid(sock: socket.socket) -> tuple[int, int]:
    """The uid and pid at the other end of a Unix socket, as the kernel knows them."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid, pid


def generation_key(secret: str, nonce: str) -> bytes:
    """The key of one generation, from the job's own secret (may be empty) and the round's random nonce (hex)."""
    return hmac.digest(secret.encode(), b"refound generation " + bytes.fromhex(nonce), hashlib.sha256)


def authenticate(sock: socket.socket, key: bytes, *, server: bool) -> None:
    """Prove to each other that both sides hold `key`, without sending it. Raises ProtocolError if they differ.

    The roles are part of what is signed, so a challenge cannot be reflected to its sender.
    """
    mine = os.urandom(_NONCE_BYTES)
    sock.sendall(mine)
    theirs = bytes(receive_exactly(sock, memoryview(bytearray(_NONCE_BYTES))))
    client_nonce, server_nonce = (theirs, mine) if server else (mine, theirs)
    sock.sendall(_proof(key, b"server" if server else b"client", client_nonce, server_nonce))
    proof = bytes(receive_exactly(sock, memoryview(bytearray(_MAC_BYTES))))
    if not hmac.compare_digest(proof, _proof(key, b"client" if server else b"server", client_nonce, server_nonce)):
        raise ProtocolError("the other side does not hold this job's key: another job, generation or REFOUND_SECRET")


def _proof(key: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hmac.digest(key, role + client_nonce + server_nonce, hashlib.sha256)
