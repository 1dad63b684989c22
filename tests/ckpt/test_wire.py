# SPDX-License-Identifier: Apache-2.0
"""Frames and handshakes: what comes out is what went in, and anything else is refused without harm."""

import json
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.ckpt import wire
from refound.ckpt.errors import ProtocolError

FIELDS = struct.Struct("!4sBxHIQI")
KEY = wire.generation_key("secret", "00" * 16)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
messages = st.dictionaries(st.text(), json_values, max_size=5)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.settimeout(20)
    right.settimeout(20)
    with left, right:
        yield left, right


def frame(message: object, body: bytes = b"", **wrong: Any) -> bytes:
    """A frame, with header fields replaced as asked."""
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    fields = {"magic": b"rfnd", "version": 2, "reserved": 0, "json_bytes": len(text), "body_bytes": len(body)}
    head = FIELDS.pack(*(fields | {"text_check": zlib.crc32(text)} | wrong).values())
    return head + struct.pack("!I", zlib.crc32(head)) + text + body


def received(data: bytes, kind: socket.AddressFamily = socket.AF_UNIX) -> tuple[wire.Message, bytes]:
    """What `wire.receive` makes of exactly these bytes and the end of the stream."""
    left, right = socket.socketpair() if kind == socket.AF_UNIX else tcp_pair()
    with left, right:
        sender = threading.Thread(target=lambda: (left.sendall(data), left.shutdown(socket.SHUT_WR)))
        sender.start()
        try:
            message, body, fds = wire.receive(right)
        finally:
            sender.join()
        assert fds == []
        return message, bytes(body)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return client, server


def memfd(text: bytes = b"slot") -> int:
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


def open_fds() -> set[str]:
    return {f"{fd.name} {fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


@settings(deadline=None)
@given(messages, st.binary(max_size=3000))
def test_what_is_sent_is_received(message: dict[str, Any], body: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        wire.send(left, message, body)
        wire.send(left, message)  # a frame ends where the next begins
        assert [bytes(part) if isinstance(part, memoryview) else part for part in wire.receive(right)] == [
            message,
            body,
            [],
        ]
        assert wire.receive(right)[0] == message


def test_a_large_body_crosses_tcp_into_the_callers_buffer() -> None:
    client, server = tcp_pair()
    body = os.urandom(3 << 20)
    target = memoryview(bytearray(4 << 20))
    with client, server:
        sender = threading.Thread(target=wire.send, args=(client, {"op": "x"}, body))
        sender.start()
        _, data, _ = wire.receive(server, target)
        sender.join()
    assert data == body
    assert target[: len(body)] == body and data.obj is target.obj


@given(messages, st.data())
def test_a_bit_that_flips_in_header_or_text_is_noticed(message: dict[str, Any], draw: st.DataObject) -> None:
    data = bytearray(frame(message, b"body"))
    bit = draw.draw(st.integers(0, 8 * (len(data) - len(b"body")) - 1))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        received(bytes(data))


def test_a_body_larger_than_the_buffer_gets_memory_of_its_own(pair: tuple[socket.socket, socket.socket]) -> None:
    target = memoryview(bytearray(3))
    wire.send(pair[0], {}, b"1234")
    _, body, _ = wire.receive(pair[1], target)
    assert body == b"1234" and bytes(target) == b"\0\0\0"


def test_a_head_announces_a_body_sent_apart(pair: tuple[socket.socket, socket.socket]) -> None:
    wire.send_head(pair[0], {"a": 1}, 3)
    pair[0].sendall(b"xyz")
    message, body, _ = wire.receive(pair[1])
    assert (message, bytes(body)) == ({"a": 1}, b"xyz")


@pytest.mark.parametrize("kind", [socket.AF_UNIX, socket.AF_INET])
def test_a_frame_cut_at_any_byte_is_a_broken_connection(kind: socket.AddressFamily) -> None:
    whole = frame({"op": "begin", "step": 3}, b"body!")
    for length in range(len(whole)):
        with pytest.raises(ConnectionError) as raised:
            received(whole[:length], kind)
        assert not isinstance(raised.value, ProtocolError), length
    assert received(whole, kind) == ({"op": "begin", "step": 3}, b"body!")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frame({}, magic=b"HTTP"), "not a refound message: it starts with 4854"),
        (frame({}, version=3), "not a refound message"),
        (frame({}, reserved=1), "not a refound message"),
        (frame({}, json_bytes=wire.MAX_JSON_BYTES + 1), "oversized"),
        (frame({}, json_bytes=2**32 - 1), "oversized"),
        (frame({}, body_bytes=wire.MAX_BODY_BYTES + 1), "oversized"),
        (frame({}, body_bytes=2**64 - 1), "oversized"),
        (frame(b"{"), "not JSON"),
        (frame(b""), "not JSON"),
        (frame(b"\xff\xfe{}"), "not JSON"),
        (frame(b"[" * 100_000), "not JSON"),
        (frame([1, 2]), "not a JSON object"),
        (frame("text"), "not a JSON object"),
        (frame(None), "not a JSON object"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        received(data)


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_is_refused_or_yields_another_message(data: st.DataObject) -> None:
    whole = bytearray(frame({"op": "read", "count": 7}, b"0123456789"))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        message, body = received(bytes(whole))
    except ConnectionError:  # ProtocolError is one
        return
    assert isinstance(message, dict) and len(body) <= 10


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(ConnectionError):
        received(garbage)


def test_descriptors_arrive_and_name_the_same_memory(pair: tuple[socket.socket, socket.socket]) -> None:
    mine = [memfd(b"a"), memfd(b"b")]
    wire.send(pair[0], {"op": "slot"}, b"sums", mine)
    for fd in mine:
        os.close(fd)
    message, body, fds = wire.receive(pair[1])
    assert (message, bytes(body), len(fds)) == ({"op": "slot"}, b"sums", 2)
    assert [os.pread(fd, 9, 0) for fd in fds] == [b"a", b"b"]
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    "data",
    [
        frame({}, magic=b"XXXX"),
        frame({"a": 1}, b"123")[:-1],
        frame({"a": 1})[:5],
        frame(b"{"),
        frame({}, body_bytes=2**63),
    ],
)
def test_descriptors_of_a_bad_frame_are_closed(pair: tuple[socket.socket, socket.socket], data: bytes) -> None:
    fd = memfd()
    before = open_fds()
    socket.send_fds(pair[0], [data], [fd])
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        wire.receive(pair[1])
    assert open_fds() == before
    os.close(fd)


def test_more_descriptors_than_allowed_do_not_stay_open(pair: tuple[socket.socket, socket.socket]) -> None:
    fd = memfd()
    before = open_fds()
    socket.send_fds(pair[0], [frame({})], [fd] * 20)
    _, _, fds = wire.receive(pair[1])
    assert len(fds) <= 4
    for received_fd in fds:
        os.close(received_fd)
    assert open_fds() == before
    os.close(fd)


def test_the_kernel_says_who_is_at_the_other_end(pair: tuple[socket.socket, socket.socket]) -> None:
    assert wire.peer_uid_pid(pair[0]) == (os.getuid(), os.getpid())


# --- the handshake ---------------------------------------------------------------------------------------------


def shake(server_key: bytes, client: Callable[[socket.socket], None]) -> list[BaseException | None]:
    """Run `client` against a server that authenticates; what each side raised: [server, client]."""
    left, right = socket.socketpair()
    left.settimeout(20)
    right.settimeout(20)
    outcome: list[BaseException | None] = [None, None]

    def side(index: int, sock: socket.socket, act: Callable[[], None]) -> None:
        with sock:
            try:
                act()
            except Exception as error:
                outcome[index] = error

    def serve() -> None:
        wire.authenticate(right, server_key, server=True)

    threads = [
        threading.Thread(target=side, args=(0, right, serve)),
        threading.Thread(target=side, args=(1, left, lambda: client(left))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def test_both_sides_with_the_key_accept() -> None:
    assert shake(KEY, lambda sock: wire.authenticate(sock, KEY, server=False)) == [None, None]


@pytest.mark.parametrize(
    "other",
    [
        wire.generation_key("secret", "01" * 16),
        wire.generation_key("Secret", "00" * 16),
        wire.generation_key("", "00" * 16),
    ],
    ids=["another generation", "another secret", "no secret"],
)
def test_neither_side_accepts_another_key(other: bytes) -> None:
    server, client = shake(KEY, lambda sock: wire.authenticate(sock, other, server=False))
    # Whichever side checks first closes; the other sees that or a wrong proof.
    assert isinstance(server, ConnectionError) and isinstance(client, ConnectionError)
    assert any(isinstance(error, ProtocolError) for error in (server, client))


def test_a_challenge_reflected_to_its_sender_proves_nothing() -> None:
    def mirror(sock: socket.socket) -> None:
        for size in (32, 32):
            sock.sendall(wire.receive_exactly(sock, memoryview(bytearray(size))))

    server, _ = shake(KEY, mirror)
    assert isinstance(server, ProtocolError)


def test_two_clients_do_not_satisfy_each_other() -> None:
    server, client = shake(KEY, lambda sock: wire.authenticate(sock, KEY, server=True))
    assert any(isinstance(error, ProtocolError) for error in (server, client))


def test_a_proof_heard_before_opens_nothing() -> None:
    heard: list[bytes] = []

    def record(sock: socket.socket) -> None:
        wire.authenticate(_Tap(sock, heard), KEY, server=False)  # pyright: ignore[reportArgumentType]

    assert shake(KEY, record) == [None, None]

    def replay(sock: socket.socket) -> None:
        for part in heard:
            sock.sendall(part)
        wire.receive_exactly(sock, memoryview(bytearray(64)))

    server, _ = shake(KEY, replay)
    assert isinstance(server, ProtocolError)


class _Tap:
    """A socket that notes what is sent through it."""

    def __init__(self, sock: socket.socket, heard: list[bytes]) -> None:
        self._sock, self._heard = sock, heard

    def sendall(self, data: bytes) -> None:
        self._heard.append(bytes(data))
        self._sock.sendall(data)

    def recv_into(self, view: memoryview) -> int:
        return self._sock.recv_into(view)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63])
def test_a_handshake_cut_short_is_a_broken_connection(length: int) -> None:
    def part(sock: socket.socket) -> None:
        sock.sendall(b"\0" * length)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(100):
            pass

    server, _ = shake(KEY, part)
    assert isinstance(server, ConnectionError)
