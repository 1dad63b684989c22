# SPDX-License-Identifier: Apache-2.0
"""Writing committed snapshots to storage, in the background, one at a time."""

import queue
import threading
import time
from pathlib import Path
from typing import Protocol

from . import checkpoints
from .agreement import SnapshotId
from .errors import ProtocolError
from .held import Held
from .keeper import Keeper

_MOST_PARTS = 16  # one checkpoint is written at a time; word of more is nonsense


class ReportPart(Protocol):
    """How a node's part of a checkpoint is reported to the lead."""

    def __call__(self, snapshot: SnapshotId, *, durable: bool) -> None: ...


class CheckpointWriter:
    """The disk tier of one node, and at the lead the books of which checkpoint is complete.

    It never holds training up: the snapshot it writes is pinned, and training gets another slot meanwhile. A failure
    (a full disk, say) is reported and costs that checkpoint only.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._queue: queue.SimpleQueue[tuple[Held, ReportPart]] = queue.SimpleQueue()
        self._pending = 0
        self._parts: dict[SnapshotId, dict[int, bool]] = {}
        self._facts: dict[SnapshotId, dict[str, int]] = {}
        self._last_time, self._last_step = time.monotonic(), 0
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def root(self) -> Path | None:
        return Path(self._keeper.conf.checkpoint_dir) if self._keeper.conf.checkpoint_dir else None

    def new_generation(self, step: int) -> None:
        """Checkpoints that nodes were writing when the generation ended are never completed; count from `step`."""
        with self._keeper.changed:
            self._parts, self._facts = {}, {}
            self._last_step = step
            self._keeper.changed.notify_all()

    def is_due(self, snapshot: SnapshotId) -> bool:
        """At the lead: whether the snapshot being committed should go to storage."""
        conf = self._keeper.conf
        if self.root is None or self._pending or self._facts:
            return False
        by_steps = conf.checkpoint_every_steps and snapshot.step - self._last_step >= conf.checkpoint_every_steps
        by_time = conf.checkpoint_every_s and time.monotonic() - self._last_time >= conf.checkpoint_every_s
        if by_steps or by_time:
            self._last_step, self._last_time = snapshot.step, time.monotonic()
        return bool(by_steps or by_time)

    def write(self, snapshot: SnapshotId, report: ReportPart) -> None:
        """Write this node's part in the background; the snapshot's memory is kept until that is done."""
        if held := self._keeper.pin(snapshot):
            with self._keeper.changed:
                self._pending += 1
                self._facts[snapshot] = {"world_size": held.world_size, "nodes": held.nodes}
            self._queue.put((held, report))

    def _run(self) -> None:
        while True:
            held, report = self._queue.get()
            durable = False
            try:
                if self.root is not None:
                    checkpoints.write_part(self.root, held, self._keeper.job)
                    durable = True
            except (OSError, MemoryError) as error:
                self._keeper.event("checkpoint failed", step=held.id.step, error=str(error))
            finally:
                self._keeper.unpin(held)
                report(held.id, durable=durable)
                with self._keeper.changed:
                    self._pending -= 1
                    if self._keeper.position != 0:
                        self._facts.pop(held.id, None)
                    self._keeper.changed.notify_all()

    def note_part(self, snapshot: SnapshotId, position: int, *, durable: bool) -> None:
        """At the lead: what became of a node's part. When all have reported, the checkpoint is complete or removed."""
        with self._keeper.changed:
            decision = self._keeper.decision
            if decision is None or position >= len(decision.nodes):
                raise ProtocolError(f"there is no position {position}")
            while snapshot not in self._parts and len(self._parts) >= _MOST_PARTS:
                del self._parts[max(self._parts)]
            facts = self._facts.get(snapshot)
            parts = self._parts.setdefault(snapshot, {})
            parts[position] = durable
            if facts is None or len(parts) < facts["nodes"]:
                return
        try:
            if self.root is None or not all(parts.values()):
                raise OSError(
                    f"the parts of nodes {[p for p, whole in sorted(parts.items()) if not whole]} are missing"
                )
            named = {**facts, "job": self._keeper.job}
            folder = checkpoints.commit(self.root, snapshot, named, self._keeper.conf.checkpoint_keep)
            with self._keeper.changed:
                self._keeper.checkpoint = {"step": snapshot.step, "path": str(folder)}
            self._keeper.event("checkpoint", step=snapshot.step, path=str(folder))
        except OSError as error:
            self._keeper.event("checkpoint failed", step=snapshot.step, error=str(error))
            if self.root is not None:
                checkpoints.discard(self.root, snapshot)
        finally:
            with self._keeper.changed:
                self._parts.pop(snapshot, None)
                self._facts.pop(snapshot, None)
                self._keeper.changed.notify_all()

    def drain(self, timeout_s: float) -> None:
        """Wait until what was begun is written and, at the lead, complete: the job is ending."""
        with self._keeper.changed:
            self._keeper.changed.wait_for(lambda: not self._pending and not self._facts, timeout=timeout_s)
