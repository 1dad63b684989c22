# SPDX-License-Identifier: Apache-2.0
"""An agent's hold on its node's snapshot process: attach to the one that is there, or start one."""

import fcntl
import hmac
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import wire
from .agreement import NodeView
from .client import Client
from .conf import PluginConfig
from .errors import ConfigError, ProtocolError
from .paths import private_dir, runtime_dir, socket_path
from .smp import log_path

_START_TIMEOUT = timedelta(seconds=60)
_HANDOVER_TIMEOUT = timedelta(seconds=5)
_AGENTS_PER_HOST = 256
_started: list[subprocess.Popen[bytes]] = []  # reaped if they die before the agent; else they outlive it


class Attachment:
    """The agent's connection to the snapshot process of its node. It lasts as long as the agent does."""

    def __init__(self, client: Client, *, job: str, node: str, address: str, conf: PluginConfig) -> None:
        self._client, self._address, self._conf = client, address, conf
        self.job, self.node = job, node
        self.path = socket_path(job, node)

    def at_rendezvous(self) -> None:
        """Let the other nodes hear that this one's workers have stopped. Does not wait until it is known."""
        self._client.tell({"op": "rendezvous"})

    def inventory(self, secret: str = "") -> NodeView:
        """End the old generation on this node and learn what the node holds."""
        reply, _, _ = self._client.call({"op": "inventory"})
        return replace(NodeView.from_json(reply["view"]), secret_check=secret_check(secret, self.job))

    def open(self, views: list[NodeView], secret: str) -> int:
        """Begin the generation that follows from `views`; returns its number."""
        message = {"op": "open", "views": [view.to_json() for view in views], "secret": secret}
        reply, _, _ = self._client.call(message)
        return int(reply["generation"])

    def alive(self) -> bool:
        """Whether the snapshot process is still there."""
        return self._client.alive()

    def is_over(self) -> bool:
        """Whether all ranks of the job have said that they are done for good; False if nobody can say."""
        try:
            return bool(self._client.call({"op": "over"})[0].get("over"))
        except OSError:
            return False

    @property
    def heartbeat_s(self) -> float:
        """How long a node may be silent."""
        return self._conf.heartbeat_s

    @property
    def warm_spares(self) -> int:
        """How many processes wait beside each worker."""
        return self._conf.warm_spares

    @property
    def hang_s(self) -> float:
        """How long a worker may go without a step; 0: as long as it likes."""
        return self._conf.hang_s

    @property
    def lease_s(self) -> float:
        """How long the memory is kept when the agent has gone."""
        return self._conf.lease_s

    def leave(self, *, success: bool) -> None:
        """The agent is about to end. After success nothing of the job is needed any more."""
        try:
            self._client.sock.settimeout(_START_TIMEOUT.total_seconds())  # it may have been stopped
            self._client.call({"op": "leave", "success": success})
            if success:
                self._client.sock.recv(1)  # its end of the socket closes when it has cleaned up
        except OSError as error:
            print(f"refound: the snapshot process of {self.node!r} could not be told: {error}", file=sys.stderr)
        finally:
            self._client.close()

    def restart(self) -> None:
        """Replace a snapshot process that has died by an empty one."""
        self._client.close()
        for process in _started:
            process.poll()
        self._client = _attach(self.job, self.node, self._address, self._conf, wait=_HANDOVER_TIMEOUT)


def attach(job: str, address: str, conf: PluginConfig) -> Attachment:
    """Attach to this node's snapshot process of `job`, starting it if there is none.

    Without a configured name the node is called after its host; further agents on the same host get a number.
    Raises ConfigError if a named node has another agent, or the process cannot be started.
    """
    private_dir(runtime_dir())
    if conf.node:
        client = _attach(job, conf.node, address, conf, wait=_HANDOVER_TIMEOUT)
        return Attachment(client, job=job, node=conf.node, address=address, conf=conf)
    host = socket.gethostname()
    for number in range(_AGENTS_PER_HOST):
        node = f"{host}-{number}" if number else host
        try:
            client = _attach(job, node, address, conf, wait=timedelta(0))
        except _BusyError:
            continue
        return Attachment(client, job=job, node=node, address=address, conf=conf)
    raise ConfigError(f"{_AGENTS_PER_HOST} agents of job {job!r} run on {host} already")


class _BusyError(ConfigError):
    """Another live agent has this node."""


def _attach(job: str, node: str, address: str, conf: PluginConfig, wait: timedelta) -> Client:
    """Connect, or start and connect. Waits a little for a predecessor that is just dying."""
    deadline = time.monotonic() + wait.total_seconds()
    while True:
        client = _connect_or_start(job, node, address, conf)
        try:
            reply, _, _ = client.call({"op": "attach", "job": job})
            if "busy" not in reply:
                client.call({"op": "configure", "conf": asdict(conf)})
                return client
        except ConnectionError as error:
            client.close()
            if isinstance(error, ProtocolError):
                raise ConfigError(f"{socket_path(job, node)}: {error}") from error
            if time.monotonic() > deadline:
                raise ConfigError(f"the snapshot process of node {node!r} went away while attaching") from error
            continue
        client.close()
        if time.monotonic() >= deadline:
            raise _BusyError(
                f"node {node!r} of job {job!r} has an agent already (process {reply['busy']}): "
                "give each agent its own name with --rdzv-conf node=…, or end that one"
            )
        time.sleep(0.05)


def _connect_or_start(job: str, node: str, address: str, conf: PluginConfig) -> Client:
    path = socket_path(job, node)
    private_dir(path.parent)
    with _only_one(path.with_suffix(".lock")):
        try:
            return Client(path)
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)  # left by a process that was killed
        except ProtocolError as error:
            raise ConfigError(str(error)) from error
        _start(job, node, address, conf, path)
        return Client(path)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Two agents that start at once start one process."""
    fd = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _start(job: str, node: str, address: str, conf: PluginConfig, path: Path) -> None:
    """Start the snapshot process in its own session, so that no signal to the job reaches it."""
    read_fd, write_fd = os.pipe()
    arguments: dict[str, Any] = {
        "job": job,
        "node": node,
        "address": address,
        "conf": asdict(conf),
        "ready_fd": write_fd,
    }
    log = log_path(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "refound.ckpt.smp", json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=environment,
                start_new_session=True,
                pass_fds=(write_fd,),
            )
        os.close(write_fd)
        ready = wire.is_readable(read_fd, _START_TIMEOUT)
        if not ready or os.read(read_fd, 5) != b"ready":
            process.kill()  # which has happened already unless it hangs
            process.wait()
            what = "did not start" if ready else f"did not start within {_START_TIMEOUT.total_seconds():.0f} s"
            raise ConfigError(
                f"the snapshot process of node {node!r} {what}: {log.read_text()[-2000:].strip()}. Run: refound doctor"
            )
    except OSError as error:
        raise ConfigError(f"the snapshot process of node {node!r} could not be started: {error}") from error
    finally:
        os.close(read_fd)
    _started.append(process)


def exchange_views(store: Any, mine: NodeView, rank: int, nodes: int, timeout: timedelta) -> list[NodeView]:
    """Publish this node's view in the round's store and read all the others'.

    Raises torch's DistStoreError if a node that joined the round does not say what it holds in time.
    """
    store.set(f"refound/view/{rank}", mine.to_json())
    keys = [f"refound/view/{other}" for other in range(nodes)]
    store.wait(keys, timeout)
    return [NodeView.from_json(store.get(key)) for key in keys]


def secret_check(secret: str, job: str) -> str:
    """What nodes compare to know that they hold the same secret, without showing it."""
    return hmac.digest(secret.encode(), b"refound check " + job.encode(), "sha256").hex() if secret else ""
