# SPDX-License-Identifier: Apache-2.0
"""Talking to snapshot processes from outside: their status, stopping them, and the connection others build on."""

import contextlib
import os
import select
import socket
import threading
from pathlib import Path
from typing import Any

from . import errors, wire
from .errors import ProtocolError, SnapshotError
from .paths import job_dir, runtime_dir
from .wire import Message


class Client:
    """One connection to a snapshot process over its Unix socket. Calls from several threads take turns."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._unread = 0
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(os.fspath(path))
            uid, self.pid = wire.peer_uid_pid(self.sock)
            if uid != os.getuid():
                raise ProtocolError(
                    f"{path} belongs to a process of uid {uid}, not to you (uid {os.getuid()}): not trusted. "
                    "Set REFOUND_DIR to a private directory of yours"
                )
        except BaseException:
            self.sock.close()
            raise

    def call(self, message: Message, body: bytes = b"") -> tuple[Message, memoryview, list[int]]:
        """Send a request and return the reply, its body and descriptors (the caller's to close).

        Raises what the other side raised (an errors.SnapshotError), or ConnectionError if it has gone.
        """
        with self._lock:
            wire.send(self.sock, message, body)
            while self._unread:
                self._unread -= 1
                wire.receive(self.sock)
            reply, data, fds = wire.receive(self.sock)
        if text := reply.get("error"):
            kind = getattr(errors, str(reply.get("kind")), SnapshotError)
            raise (kind if isinstance(kind, type) and issubclass(kind, SnapshotError) else SnapshotError)(text)
        return reply, data, fds

    def tell(self, message: Message) -> None:
        """Send a request whose reply nobody waits for: the other side may be stopped. The next call reads it away.

        Raises ConnectionError if the other side has gone.
        """
        with self._lock:
            wire.send(self.sock, message)
            self._unread += 1

    def alive(self) -> bool:
        """Whether the process still has its end open, whatever of its replies has not been read."""
        if self.sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return not poll.poll(0)

    def shutdown(self) -> None:
        """Close even under a call that waits for its reply: it gets a ConnectionError."""
        with contextlib.suppress(OSError):  # the other side may have closed it first
            self.sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        self.sock.close()


def find_nodes(job: str | None = None) -> list[dict[str, Any]]:
    """Status of every snapshot process of this user on this host (of `job`, if given), ordered by job and node.

    Sockets that nobody answers are left out: their process has died, and the next agent replaces it.
    """
    folders = [job_dir(job)] if job is not None else _folders()
    found = []
    for folder in folders:
        for path in _sockets(folder):
            with contextlib.suppress(OSError):
                found.append(_ask(path, {"op": "status"}))
    return sorted(found, key=lambda status: (status["job"], status["node"]))


def verify_nodes(job: str | None = None) -> list[dict[str, Any]]:
    """Have every snapshot process of this user on this host (of `job`, if given) check its memory."""
    folders = [job_dir(job)] if job is not None else _folders()
    found = []
    for folder in folders:
        for path in _sockets(folder):
            with contextlib.suppress(OSError):
                found.append(_ask(path, {"op": "verify"}, timeout_s=None))
    return sorted(found, key=lambda node: (node["job"], node["node"]))


def stop_job(job: str) -> int:
    """Tell the job's snapshot processes on this host to free their memory and go. Returns how many were told."""
    told = 0
    for path in _sockets(job_dir(job)):
        with contextlib.suppress(OSError):
            _ask(path, {"op": "stop"})
            told += 1
    return told


def sockets_of(job: str) -> list[Path]:
    """The sockets of a job's snapshot processes on this host."""
    return _sockets(job_dir(job))


def _folders() -> list[Path]:
    return [entry for entry in _entries(runtime_dir()) if entry.is_dir()]


def _sockets(folder: Path) -> list[Path]:
    return sorted(entry for entry in _entries(folder) if entry.suffix == ".sock")


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if it is not there, or goes away just now: the last process of a job removes it."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _ask(path: Path, message: Message, timeout_s: float | None = 10) -> dict[str, Any]:
    client = Client(path)
    try:
        client.sock.settimeout(timeout_s)
        reply, _, _ = client.call(message)
        return reply
    finally:
        client.close()
