# SPDX-License-Identifier: Apache-2.0
"""Commit, cluster-wide.

The lead is the node at position 0 of the generation. When it has heard from every node that a snapshot is complete
there, it tells them all that it is committed, and whether to write it to storage.
"""

import queue

from .agreement import Decision, SnapshotId
from .errors import ProtocolError, SnapshotError, StaleWriterError
from .keeper import Keeper
from .peers import Peers
from .threads import PATIENCE, start_thread
from .wire import Message
from .writer import CheckpointWriter


class Control:
    """This node's part in committing the snapshots of one generation."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes, writer: CheckpointWriter) -> None:
        self._keeper, self._decision, self._writer = keeper, decision, writer
        self._peers = Peers(keeper, decision, key)
        self._unsent = 0
        self._finished: set[int] = set()
        self._outbox: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()

    @property
    def is_lead(self) -> bool:
        return self._keeper.position == 0

    def start(self) -> None:
        with self._keeper.changed:
            self._keeper.on_seal.append(self.close)
        start_thread(self._send_all, patience=PATIENCE)

    def close(self) -> None:
        self._peers.close()
        self._outbox.put(None)

    def _send_all(self) -> None:
        try:
            while (item := self._outbox.get()) is not None:
                self._peers.request(*item)
                self._sent(1)
        except StaleWriterError:
            return  # the generation has ended, and its messages with it
        except SnapshotError as error:
            # Without this thread nothing is ever committed again: a restart is what helps.
            with self._keeper.changed:
                self._keeper.trouble = error
            self._keeper.event("trouble", error=str(error))
        finally:
            with self._keeper.changed:
                self._keeper.on_seal.remove(self.close)
            self._sent(self._unsent)

    def _send(self, position: int, message: Message) -> None:
        with self._keeper.changed:
            self._unsent += 1
        self._outbox.put((position, message))

    def _sent(self, count: int) -> None:
        with self._keeper.changed:
            self._unsent -= count
            self._keeper.changed.notify_all()

    def drain(self, timeout_s: float) -> None:
        """Wait until everything that was to be said has been."""
        with self._keeper.changed:
            self._keeper.changed.wait_for(lambda: not self._unsent, timeout=timeout_s)

    def prepared(self, snapshot: SnapshotId) -> None:
        """Data and parity of `snapshot` are complete on this node."""
        checks, objection = self._said_by_workers(snapshot)
        with self._keeper.changed:
            costs = self._keeper.tuning.told(snapshot)
            if self.is_lead:
                self._keeper.tuning.heard(snapshot, costs)
        if not self.is_lead:
            more = {"position": self._keeper.position, "replica_checks": checks, "objection": objection, **costs}
            self._send(0, {**_message("prepared", snapshot), **more})
        elif self._keeper.note_prepared(snapshot, 0, checks, objection):
            self.everyone_prepared(snapshot)

    def persisted(self, snapshot: SnapshotId, *, durable: bool) -> None:
        """This node's part of the checkpoint of `snapshot` is on storage, or could not be written."""
        if self.is_lead:
            self._writer.note_part(snapshot, 0, durable=durable)
        else:
            self._send(0, {**_message("persisted", snapshot), "position": self._keeper.position, "durable": durable})

    def finished(self, snapshot: SnapshotId) -> None:
        """All ranks of this node are done for good."""
        if self.is_lead:
            self.note_finished(snapshot, 0)
        else:
            self._send(0, {**_message("finished", snapshot), "position": self._keeper.position})

    def note_finished(self, snapshot: SnapshotId, position: int) -> None:
        """At the lead: the ranks at `position` are done for good. When all are, tell everybody."""
        if position >= len(self._decision.nodes):
            raise ProtocolError(f"there is no position {position}")
        with self._keeper.changed:
            self._finished.add(position)
            if len(self._finished) < len(self._decision.nodes):
                return
        for other in range(len(self._decision.nodes)):
            if other != self._keeper.position:
                self._send(other, _message("over", snapshot))
        self.over()

    def over(self) -> None:
        """All ranks of the job are done for good."""
        with self._keeper.changed:
            self._keeper.is_over = True
        self._keeper.event("over")

    def _said_by_workers(self, snapshot: SnapshotId) -> tuple[dict[str, int], str]:
        with self._keeper.changed:
            held = self._keeper.held.get(snapshot)
            return (dict(held.replica_checks), held.objection) if held else ({}, "")

    def everyone_prepared(self, snapshot: SnapshotId) -> None:
        """At the lead: commit, here and everywhere; or drop it everywhere if some rank objects."""
        if objection := self._keeper.objections.get(snapshot, ""):
            for position in range(1, len(self._decision.nodes)):
                self._send(position, {**_message("commit", snapshot), "objection": objection})
            self._keeper.skip(snapshot, objection)
            return
        persist = self._writer.is_due(snapshot)
        with self._keeper.changed:
            tuned = self._keeper.tuning.decide(snapshot, self._keeper.last_commit_ms)
            self._keeper.tuning.decided(snapshot, tuned)
        for position in range(len(self._decision.nodes)):
            if position != self._keeper.position:
                self._send(position, {**_message("commit", snapshot), "persist": persist, **tuned})
        self.committed(snapshot, persist)

    def told_committed(self, snapshot: SnapshotId, persist: bool, objection: str = "") -> None:
        """Another node says that `snapshot` is committed, or dropped for an objection. Raises ProtocolError at the
        lead, which is the one to say so."""
        if self.is_lead:
            raise ProtocolError("the lead is told by nobody what is committed")
        if objection:
            self._keeper.skip(snapshot, objection)
        else:
            self.committed(snapshot, persist)

    def committed(self, snapshot: SnapshotId, persist: bool) -> None:
        """The lead has committed `snapshot`."""
        self._keeper.commit(snapshot)
        if persist:
            self._writer.write(snapshot, self.persisted)


def _message(op: str, snapshot: SnapshotId) -> Message:
    return {"op": op, "generation": snapshot.generation, "step": snapshot.step}
