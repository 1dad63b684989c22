# SPDX-License-Identifier: Apache-2.0
"""One node of a campaign's job: its snapshot process, its agent's connection, its worker, and how each is broken."""

import contextlib
import os
import random
import resource
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..ckpt import wire
from ..ckpt.agreement import NodeView
from ..ckpt.attach import Attachment, attach
from ..ckpt.client import Client
from ..ckpt.conf import PluginConfig
from ..ckpt.paths import private_dir, socket_path
from .network import Gate
from .template import Child, Template


@dataclass(kw_only=True, eq=False)
class Node:
    """A node. `start` brings up what is not there."""

    name: str
    job: str
    conf: PluginConfig
    template: Template
    logs: Path
    patience_s: float
    address: str = "127.0.0.1"
    namespace: Path | None = None
    namespace_number: int = -1
    gated: bool = False
    gate: Gate | None = None
    smp: Child | None = None
    agent: Attachment | None = None
    worker: Child | None = None
    orphans: list[Child] = field(default_factory=list)
    """Workers whose agent has gone; the snapshot process must end them."""

    @property
    def path(self) -> Path:
        return socket_path(self.job, self.name)

    @property
    def log(self) -> Path:
        return self.logs / f"{self.name}.log"

    def start(self) -> None:
        """Bring up the snapshot process if it is not there, and attach to it. Raises SnapshotError."""
        fresh = self.smp is None or not self.smp.alive
        if fresh:
            self._drop_smp()
            private_dir(self.path.parent)
            what = {"job": self.job, "node": self.name, "address": self.address, "conf": asdict(self.conf)}
            self.smp = self.template.start_smp(what, self.log, self.namespace)
        if self.agent is None:
            self.agent = attach(self.job, self.address, self.conf)
        elif fresh:
            self.agent.restart()
        self.agent._client.sock.settimeout(self.patience_s)

    def seen_through_the_gate(self, view: NodeView) -> int:
        """The port that others are told."""
        if not self.gated:
            return view.port
        self.gate = self.gate or Gate(self.address, view.port)
        return self.gate.port

    def start_worker(self, place: dict[str, Any], seed: int) -> None:
        self.worker = self.template.start({"worker": True}, self.logs / f"{self.name}-worker.log")
        wire.send(self.worker.sock, {"op": "join", "place": place, "seed": seed})

    def status(self) -> dict[str, Any]:
        """What the snapshot process says of itself. Raises OSError if it has gone or does not answer."""
        client = Client(self.path)
        try:
            client.sock.settimeout(self.patience_s)
            return client.call({"op": "status"})[0]
        finally:
            client.close()

    # --- breaking it -------------------------------------------------------------------------------------------

    def end_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.close()
            self.worker = None

    def lose_agent(self) -> None:
        """The agent is gone; what it started goes on."""
        if self.agent is not None:
            self.agent._client.shutdown()
            self.agent = None
        if self.worker is not None:
            self.orphans.append(self.worker)
            self.worker = None

    def lose(self) -> None:
        """All of it is gone."""
        self.lose_agent()
        for child in (*self.orphans, *([self.smp] if self.smp else [])):
            child.kill()
        self.close()

    def close(self) -> None:
        for orphan in self.orphans:
            orphan.close()
        self.orphans.clear()
        self._drop_smp()

    def _drop_smp(self) -> None:
        if self.smp is not None:
            self.smp.kill()
            self.smp.close()
            self.smp = None
        if self.gate is not None:
            self.gate.close()
            self.gate = None

    def flip(self, kind: str, rng: random.Random) -> int:
        """Flip one bit of every memfd whose name begins with `kind`; returns how many there were."""
        count = 0
        assert self.smp is not None
        for link in Path(f"/proc/{self.smp.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was freed just now
                if not str(link.readlink()).startswith(f"/memfd:refound-{kind}"):
                    continue
                with link.open("r+b", buffering=0) as memory:
                    at = rng.randrange(max(1, os.fstat(memory.fileno()).st_size))
                    memory.seek(at)
                    byte = memory.read(1)
                    memory.seek(at)
                    memory.write(bytes([byte[0] ^ (1 << rng.randrange(8))]) if byte else b"")
                    count += bool(byte)
        return count

    def limit(self, kind: int, size_bytes: int | None = None) -> None:
        """Limit the snapshot process to so many bytes (of its memory: what it has now); -1 takes the limit away."""
        if self.smp is None:
            return
        if size_bytes is None:
            size_bytes = int(Path(f"/proc/{self.smp.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        with contextlib.suppress(ProcessLookupError):  # it has died of something else
            resource.prlimit(self.smp.pid, kind, (size_bytes, resource.RLIM_INFINITY))

    def unlimit(self) -> None:
        """Take all limits away that `limit` has set."""
        if self.smp is not None and self.smp.alive:
            for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
                self.limit(kind, resource.RLIM_INFINITY)


def pause(child: Child | None) -> None:
    if child is not None:
        child.signal(signal.SIGSTOP)


def go_on(child: Child | None) -> None:
    if child is not None:
        child.signal(signal.SIGCONT)
