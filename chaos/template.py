# SPDX-License-Identifier: Apache-2.0
"""Processes by the hundred: one that has imported everything forks each snapshot process and each worker.

`python -m refound.chaos.template FD` serves requests over the socket FD until its other end closes. What it forks is
the real thing (`smp.main`, `link.Link`); only the interpreter's start and the imports are paid once.
"""

import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ckpt import smp, wire
from ..ckpt.errors import SnapshotError
from .points import Traps
from .worker import serve as serve_worker

_CLONE_NEWNET = 0x40000000


@dataclass(eq=False)
class Child:
    """A process of the campaign: a snapshot process or a worker. Its pidfd names it even after the pid is reused."""

    pid: int
    pidfd: int
    sock: socket.socket
    replies: list[dict[str, Any]] = field(default_factory=list)
    is_silent: bool = False
    """Whether its end of the socket has closed."""

    @property
    def alive(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def signal(self, number: int) -> None:
        if self.alive:
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        poll.poll()

    def close(self) -> None:
        self.sock.close()
        os.close(self.pidfd)


class Template:
    """The campaign's side. Thread-safe. A context manager: leaving it ends the template."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "refound.chaos.template", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=environment,
                cwd="/",
                start_new_session=True,
            )

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        self._process.wait()

    def start(self, request: dict[str, Any], log: Path) -> Child:
        """Fork a process; what it prints goes to the end of `log`. Raises SnapshotError if the template has died."""
        mine, theirs = socket.socketpair()
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            with self._lock:
                wire.send(self._sock, request, fds=[theirs.fileno(), log_fd])
                reply, _, _ = wire.receive(self._sock)
            return Child(int(reply["pid"]), os.pidfd_open(int(reply["pid"])), mine)
        except OSError as error:
            raise SnapshotError(f"the campaign could not start a process: {error}") from error
        finally:
            theirs.close()
            os.close(log_fd)

    def start_smp(self, arguments: dict[str, Any], log: Path, namespace: Path | None) -> Child:
        """A snapshot process with traps; returns when it answers at its socket."""
        child = self.start({"smp": arguments, "namespace": str(namespace or "")}, log)
        poll = select.poll()
        poll.register(child.sock, select.POLLIN)
        if not poll.poll(60_000):
            raise SnapshotError(f"a snapshot process did not start: {log.read_text()[-2000:]}")
        wire.receive(child.sock)
        return child


def main(fd: int) -> int:
    """Fork on request until the other end closes."""
    sock = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: whoever cares holds a pidfd
    gc.freeze()
    while True:
        try:
            request, _, fds = wire.receive(sock)
        except OSError:
            return 0
        pid = os.fork()
        if pid == 0:
            sock.close()
            _become(request, socket.socket(fileno=fds[0]), fds[1])
        for received in fds:
            os.close(received)
        wire.send(sock, {"pid": pid})


def _become(request: dict[str, Any], sock: socket.socket, log_fd: int) -> None:
    """The forked process, which never returns."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        if "smp" in request:
            status = _be_smp(request, sock)
        else:
            serve_worker(sock)
            status = 0
    finally:
        os._exit(status)


def _be_smp(request: dict[str, Any], sock: socket.socket) -> int:
    if namespace := request["namespace"]:
        _enter(Path(namespace))
    faulthandler.register(signal.SIGUSR1)  # where its threads are, into the log, for a campaign that has hung
    Traps(sock).install()
    ready, ready_end = os.pipe()
    threading.Thread(target=_tell_when_ready, args=(ready, sock), daemon=True).start()
    return smp.main([json.dumps({**request["smp"], "ready_fd": ready_end})])


def _tell_when_ready(ready: int, sock: socket.socket) -> None:
    os.read(ready, 5)
    os.close(ready)
    wire.send(sock, {"ready": True})


def _enter(namespace: Path) -> None:
    """Make a network namespace this process's own (`os.setns` is newer than the oldest Python that is supported)."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
