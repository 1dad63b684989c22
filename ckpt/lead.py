# SPDX-License-Identifier: Apache-2.0
"""Commit, cluster-wide, and the background writing of checkpoints.

The lead is the node at position 0 of the generation. When it has heard from every node that a snapshot is complete
there, it tells them all that it is committed, and whether to write it to storage.
"""

import queue
import threading
import time
from pathlib import Path

from . import checkpoints
from .agreement import Decision, SnapshotId
from .errors import SnapshotError, StaleWriterError
from .held import Held
from .keeper import Keeper
from .peers import Peers
from .wire import Message


class Control:
    """This node's part in committing the snapshots of one generation."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes, writer: "CheckpointWriter") -> None:
        self._keeper, self._decision, self._writer = keeper, decision, writer
        self._peers = Peers(keeper, decision, key)
        self._outbox: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()

    @property
    def is_lead(self) -> bool:
        return self._keeper.position == 0

    def start(self) -> None:
        with self._keeper.changed:
            self._keeper.on_seal.append(self.close)
        threading.Thread(target=self._send_all, name="control", daemon=True).start()

    def close(self) -> None:
        self._peers.close()
        self._outbox.put(None)

    def _send_all(self) -> None:
        try:
            while (item := self._outbox.get()) is not None:
                self._peers.request(*item)
        except StaleWriterError:
            return  # the generation has ended, and its messages with it
        except SnapshotError as error:
            self._keeper.event("control", error=str(error))
        finally:
            with self._keeper.changed:
                self._keeper.on_seal.remove(self.close)

    def prepared(self, snapshot: SnapshotId) -> None:
        """Data and parity of `snapshot` are complete on this node."""
        self._to_lead("prepared", snapshot)

    def persisted(self, snapshot: SnapshotId) -> None:
        """This node's part of the checkpoint of `snapshot` is durable."""
        self._to_lead("persisted", snapshot)

    def _to_lead(self, op: str, snapshot: SnapshotId) -> None:
        if not self.is_lead:
            message = {**_message(op, snapshot), "position": self._keeper.position}
            self._outbox.put((0, {**message, "replica_checks": self._replica_checks(snapshot)}))
        elif op == "persisted":
            self._writer.note_persisted(snapshot, 0)
        elif self._keeper.note_prepared(snapshot, 0, self._replica_checks(snapshot)):
            self.everyone_prepared(snapshot)

    def _replica_checks(self, snapshot: SnapshotId) -> dict[str, int]:
        with self._keeper.changed:
            held = self._keeper.held.get(snapshot)
            return dict(held.replica_checks) if held else {}

    def everyone_prepared(self, snapshot: SnapshotId) -> None:
        """At the lead: commit, here and everywhere."""
        persist = self._writer.is_due(snapshot)
        for position in range(len(self._decision.nodes)):
            if position != self._keeper.position:
                self._outbox.put((position, {**_message("commit", snapshot), "persist": persist}))
        self.committed(snapshot, persist)

    def committed(self, snapshot: SnapshotId, persist: bool) -> None:
        """The lead has committed `snapshot`."""
        self._keeper.commit(snapshot)
        if persist:
            self._writer.write(snapshot, self)


def _message(op: str, snapshot: SnapshotId) -> Message:
    return {"op": op, "generation": snapshot.generation, "step": snapshot.step}


class CheckpointWriter:
    """Writes committed snapshots to storage, one at a time, and never holds training up.

    A failure (a full disk, say) is reported and costs that checkpoint only.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._queue: queue.SimpleQueue[tuple[Held, Control]] = queue.SimpleQueue()
        self._pending = 0
        self._parts: dict[SnapshotId, set[int]] = {}
        self._facts: dict[SnapshotId, dict[str, int]] = {}
        self._last_time, self._last_step = time.monotonic(), None
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def root(self) -> Path | None:
        return Path(self._keeper.conf.checkpoint_dir) if self._keeper.conf.checkpoint_dir else None

    def is_due(self, snapshot: SnapshotId) -> bool:
        """At the lead: whether the snapshot being committed should go to storage."""
        conf = self._keeper.conf
        if self.root is None or self._pending:
            return False
        if self._last_step is None:
            restored = self._keeper.restored or {}
            self._last_step = int(restored.get("step", 0))
        by_steps = conf.checkpoint_every_steps and snapshot.step - self._last_step >= conf.checkpoint_every_steps
        by_time = conf.checkpoint_every_s and time.monotonic() - self._last_time >= conf.checkpoint_every_s
        if by_steps or by_time:
            self._last_step, self._last_time = snapshot.step, time.monotonic()
        return bool(by_steps or by_time)

    def write(self, snapshot: SnapshotId, control: Control) -> None:
        """Write this node's part in the background; the snapshot's memory is kept until that is done."""
        if held := self._keeper.pin(snapshot):
            with self._keeper.changed:
                self._pending += 1
                self._facts[snapshot] = {"world_size": held.world_size, "nodes": held.nodes}
            self._queue.put((held, control))

    def _run(self) -> None:
        while True:
            held, control = self._queue.get()
            root = self.root
            try:
                assert root is not None
                checkpoints.write_part(root, held)
                control.persisted(held.id)
            except OSError as error:
                self._keeper.event("checkpoint failed", step=held.id.step, error=str(error))
                assert root is not None
                checkpoints.discard(root, held.id)
            finally:
                self._keeper.unpin(held)
                with self._keeper.changed:
                    self._pending -= 1
                    self._keeper.changed.notify_all()

    def note_persisted(self, snapshot: SnapshotId, position: int) -> None:
        """At the lead: a node's part is durable. The last one makes the checkpoint complete."""
        with self._keeper.changed:
            parts = self._parts.setdefault(snapshot, set())
            parts.add(position)
            facts = self._facts.get(snapshot)
            if facts is None or len(parts) < facts["nodes"] or self.root is None:
                return
            del self._parts[snapshot], self._facts[snapshot]
        try:
            folder = checkpoints.commit(
                self.root, snapshot, {**facts, "job": self._keeper.job}, self._keeper.conf.checkpoint_keep
            )
        except OSError as error:
            self._keeper.event("checkpoint failed", step=snapshot.step, error=str(error))
            return
        with self._keeper.changed:
            self._keeper.checkpoint = {"step": snapshot.step, "path": str(folder)}
            self._keeper.changed.notify_all()
        self._keeper.event("checkpoint", step=snapshot.step, path=str(folder))

    def drain(self, timeout_s: float) -> None:
        """Wait until what was begun is written, at the job's end."""
        with self._keeper.changed:
            self._keeper.changed.wait_for(lambda: not self._pending and not self._parts, timeout=timeout_s)
