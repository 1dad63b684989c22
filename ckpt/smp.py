# SPDX-License-Identifier: Apache-2.0
"""The snapshot management process (SMP) of one node: `python -m refound.ckpt.smp`, started by the plugin.

It outlives workers and agents. It goes away when its job has succeeded, when it is told to (`refound stop`), or when
neither agent nor worker has been seen for the lease; a crash of either never frees its memory before that.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import wire
from .agreement import NodeView, SnapshotId, decide
from .checkpoints import complete_checkpoints
from .conf import PluginConfig
from .door import Door
from .errors import ProtocolError, SnapshotError
from .exchange import Exchange
from .hang import Hangs
from .keeper import Keeper
from .lead import Control
from .paths import private_dir, socket_path
from .pulse import Pulse
from .rebuild import Rebuilder, Rebuilds
from .recovery import Recovery
from .restore import Restore
from .scrub import Scrubber
from .server import PeerServer
from .telemetry import Telemetry
from .wire import Message
from .writer import CheckpointWriter

_TICK_S = 0.5
_DRAIN_S = 120.0
_LAST_LINES_S = 5.0
_NICE = 5


class Process:
    """The parts of a snapshot process and what an agent may ask of it."""

    def __init__(self, *, job: str, node: str, address: str, conf: PluginConfig) -> None:
        self.keeper = Keeper(job=job, node=node, conf=conf)
        self._address = address
        self._writer = CheckpointWriter(self.keeper)
        self._control: Control | None = None
        self._restore: Restore | None = None
        self._rebuilds: Rebuilds | None = None
        self._stopping = threading.Event()
        self._hangs = Hangs(self.keeper)
        self._server = PeerServer(
            self.keeper,
            address,
            prepared=lambda snapshot: self._with_control().everyone_prepared(snapshot),
            committed=lambda snapshot, *more: self._with_control().told_committed(snapshot, *more),
            persisted=self._writer.note_part,
            finished=lambda snapshot, position: self._with_control().note_finished(snapshot, position),
            over=lambda: self._with_control().over(),
            rebuilder=self._rebuilder,
        )
        self._path = socket_path(job, node)
        self._door = Door(
            self.keeper,
            self._path,
            agent=self._agent,
            stop=self._stopping.set,
            restore=self._current_restore,
            finished=lambda snapshot: self._with_control().finished(snapshot),
            hangs=self._hangs,
        )
        self._telemetry = Telemetry(self.keeper, self._door.status)
        self._telemetry.follow(conf)

    def _with_control(self) -> Control:
        if self._control is None:
            raise ProtocolError("no generation is open here")
        return self._control

    def _rebuilder(self) -> Rebuilder:
        if self._rebuilds is None:
            raise ProtocolError("no generation is open here")
        return self._rebuilds.session()

    def _current_restore(self) -> Restore:
        if self._restore is None:
            raise ProtocolError("no generation is open here")
        return self._restore

    # --- the agent ---------------------------------------------------------------------------------------------

    def _agent(self, message: Message) -> Message:
        try:
            return self._do_for_agent(message)
        except (KeyError, TypeError, StopIteration) as error:
            raise ProtocolError(f"malformed request {message.get('op')!r}: {error!r}") from error

    def _do_for_agent(self, message: Message) -> Message:
        op = message.get("op")
        if op == "configure":
            self.keeper.conf = PluginConfig(**message["conf"])
            self._telemetry.follow(self.keeper.conf)
            return {}
        if op == "rendezvous":
            self.keeper.left = self.keeper.generation
            return {}
        if op == "inventory":
            return {"view": self._inventory().to_json()}
        if op == "open":
            self._open([NodeView.from_json(text) for text in message["views"]], str(message["secret"]))
            return {"generation": self.keeper.generation}
        if op == "over":
            return {"over": self.keeper.is_over}
        if op == "leave":
            self.keeper.event("leave", success=bool(message.get("success")))
            return {"stop": True} if message.get("success") else {}
        raise ProtocolError(f"unknown request {op!r}")

    def _inventory(self) -> NodeView:
        """End the generation here and say what this node holds, verified."""
        keeper, conf = self.keeper, self.keeper.conf
        held = keeper.seal()
        checkpoints: list[SnapshotId] = []
        if conf.checkpoint_dir:
            checkpoints = complete_checkpoints(Path(conf.checkpoint_dir))
        return NodeView(
            name=keeper.node,
            address=self._address,
            port=self._server.port,
            generation=keeper.generation,
            k=conf.k,
            m=conf.m,
            nonce=keeper.nonce,
            secret_check="",
            held=tuple(held),
            checkpoints=tuple(checkpoints),
            refused=tuple(sorted(keeper.given_up)),
        )

    def _open(self, views: list[NodeView], secret: str) -> None:
        decision = decide(views)
        key = wire.generation_key(secret, decision.nodes[0].nonce)
        baseline = self.keeper.open(decision, key)
        self._writer.new_generation(decision.snapshot.step if decision.snapshot else 0)
        self._restore = Restore(self.keeper, decision, key)
        self._rebuilds = Rebuilds(self.keeper, decision, key)
        self._control = Control(self.keeper, decision, key, self._writer)
        try:
            self._control.start()
            Exchange(self.keeper, decision, key, self._control.prepared).start()
            Scrubber(self.keeper, decision, key).start()
            Pulse(self.keeper, decision, key).start()
            if baseline:
                Recovery(self.keeper, decision, key, baseline).start()
        except MemoryError as error:
            # Half a generation can do nothing, and cannot be taken back. The agent starts an empty process, which gets
            # what this one held from the others.
            print(f"refound: this process ends: {error or 'out of memory'}", file=sys.stderr, flush=True)
            os._exit(1)

    # --- life --------------------------------------------------------------------------------------------------

    def run(self, ready_fd: int | None) -> None:
        """Serve until the job is over. Returns when it is time to go."""
        self._server.start()
        self._door.start()
        if ready_fd is not None:
            os.write(ready_fd, b"ready")
            os.close(ready_fd)
        last_seen = time.monotonic()
        while not self._stopping.wait(_TICK_S):
            self._hangs.look()
            if self._door.agent_pid is not None or any(w.alive for w in list(self.keeper.workers.values())):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > self.keeper.conf.lease_s:
                self.keeper.event("lease over", lease_s=self.keeper.conf.lease_s)
                break
        self._writer.drain(_DRAIN_S)
        if self._control is not None:
            self._control.drain(_DRAIN_S)
        self.keeper.event("end")
        self._telemetry.close(_LAST_LINES_S)
        self._path.unlink(missing_ok=True)
        log_path(self._path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other nodes of the job on this host still use the folder
            self._path.parent.rmdir()
            self._path.parent.parent.rmdir()


def log_path(socket_file: Path) -> Path:
    """Where a snapshot process writes what it says."""
    return socket_file.with_suffix(".log")


def main(arguments: list[str]) -> int:
    """arguments: one JSON object with job, node, address, conf and ready_fd."""
    raw: dict[str, Any] = json.loads(arguments[0])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        # What ends workers and agents must not end the memory they need to come back.
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)
    os.nice(_NICE)  # parity may wait, training may not
    conf = PluginConfig(**raw["conf"])
    try:
        private_dir(socket_path(raw["job"], raw["node"]).parent)
        process = Process(job=raw["job"], node=raw["node"], address=raw["address"], conf=replace(conf))
    except (SnapshotError, OSError) as error:
        print(f"refound: {error}", file=sys.stderr, flush=True)
        return 1
    process.run(raw.get("ready_fd"))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads may sit in sockets; the memory goes with the process
