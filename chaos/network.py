# SPDX-License-Identifier: Apache-2.0
"""Networks that can be broken: namespaces joined by a switch, and a gate in front of a port that flips and cuts."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

from ..ckpt.errors import SnapshotError

_HANDSHAKE_BYTES = 64
"""What each side sends before its first message: a challenge and a proof."""
_FOLDER = Path("/run/netns")


def can_make_namespaces() -> bool:
    """Whether this user may make network namespaces here."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


class Namespaces:
    """`count` network namespaces on one switch, each with an address of its own. A context manager: they are removed.

    Raises SnapshotError if they cannot be made.
    """

    def __init__(self, count: int, number: int = 0) -> None:
        self._prefix = f"refound-{os.getpid()}-{number}"
        self._names = [f"{self._prefix}-{i}" for i in range(count)]
        self._switch = f"{self._prefix}-switch"

    def __enter__(self) -> "Namespaces":
        _sweep()
        switch = [f"netns add {self._switch}", f"-n {self._switch} link add br0 type bridge"]
        try:
            for line in (*switch, f"-n {self._switch} link set br0 up"):
                _ip(line)
            for i, name in enumerate(self._names):
                _ip(f"netns add {name}")
                _ip(f"-n {self._switch} link add p{i} type veth peer name eth0 netns {name}")
                _ip(f"-n {self._switch} link set p{i} master br0 up")
                _ip(f"-n {name} addr add {self.address(i)}/24 dev eth0")
                _ip(f"-n {name} link set eth0 up")
                _ip(f"-n {name} link set lo up")
        except SnapshotError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self._names, self._switch):
            if (_FOLDER / name).exists():
                _ip(f"netns delete {name}")

    def __len__(self) -> int:
        return len(self._names)

    def address(self, i: int) -> str:
        return f"10.99.0.{i + 1}"

    def path(self, i: int) -> Path:
        return _FOLDER / self._names[i]

    def cut(self, i: int) -> None:
        """Nothing gets to or from namespace `i`, and nobody is told."""
        _ip(f"-n {self._switch} link set p{i} down")

    def heal(self, i: int) -> None:
        _ip(f"-n {self._switch} link set p{i} up")


def _sweep() -> None:
    """Remove what a campaign has left that was killed."""
    for entry in _FOLDER.glob("refound-*-*-*") if _FOLDER.is_dir() else ():
        pid = entry.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "delete", entry.name], capture_output=True, check=False)


def _ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SnapshotError(f"`ip {words}` failed: {done.stderr.strip()}")


class Gate:
    """A port through which others reach a node: it can flip a bit, cut in the middle of a message, or fall silent."""

    def __init__(self, address: str, target_port: int) -> None:
        self._address, self._target = address, target_port
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._open = threading.Event()
        self._open.set()
        self._flip_in = self._cut_in = -1
        self._flip_bit = 0
        self._listener = socket.create_server((address, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def flip(self, byte: int) -> None:
        """Flip a bit of the byte that passes, either way, after `byte` others."""
        with self._lock:
            self._flip_in, self._flip_bit = byte, byte % 8

    def cut(self, byte: int) -> None:
        """End all connections when the node has sent `byte` more; later ones are served again."""
        with self._lock:
            self._cut_in = byte

    def silence(self) -> None:
        """Nothing comes through any more, in either direction, and nobody is told."""
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.set()
        with contextlib.suppress(OSError):  # it may never have been connected
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._end_connections()

    def _end_connections(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):  # the other side may have closed it first
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # how closing ends this thread
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection((self._address, self._target))
                except OSError:
                    near.close()  # the node has died
                    continue
                with self._lock:
                    self._sockets += [near, far]
                threading.Thread(target=self._forward, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._forward, args=(far, near, True), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, from_node: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):  # either side has gone
            while data := source.recv(1 << 16):
                self._open.wait()
                data = self._changed(data, max(0, _HANDSHAKE_BYTES - passed), from_node)
                passed += len(data)
                sink.sendall(data)
                if self._cut_in == 0:
                    self._cut_in = -1
                    self._end_connections()
        with contextlib.suppress(OSError):  # it has gone
            sink.shutdown(socket.SHUT_RDWR)
        if from_node:
            source.close()
            sink.close()

    def _changed(self, data: bytes, skip: int, from_node: bool) -> bytes:
        """What passes on, with a bit flipped or its end missing if that is due; `skip` bytes do not count."""
        with self._lock:
            payload = max(0, len(data) - skip)
            if 0 <= self._flip_in < payload:
                at = skip + self._flip_in
                data = data[:at] + bytes([data[at] ^ 1 << self._flip_bit]) + data[at + 1 :]
                self._flip_in = -1
            elif self._flip_in > 0:
                self._flip_in -= payload
            if not from_node:
                return data
            if 0 < self._cut_in <= payload:
                data = data[: skip + self._cut_in]
                self._cut_in = 0
            elif self._cut_in > 0:
                self._cut_in -= payload
            return data
