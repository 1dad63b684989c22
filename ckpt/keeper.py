# SPDX-License-Identifier: Apache-2.0
"""The state of one node's snapshot process, and the rules by which it changes.

Rules that everything else relies on:
- A worker is only ever given a slot that no kept snapshot uses, so the newest committed one is never written over.
- A snapshot is committed when the lead (position 0) has heard from every node that data and parity are complete.
- Only then are older snapshots dropped. So at any moment some snapshot is complete on all nodes.
- Between `seal` and `open` (a rendezvous) nothing changes: what was told to the other nodes stays true.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from . import fence
from .agreement import Decision, HeldView, SnapshotId
from .conf import PluginConfig
from .costs import code_cost
from .describe import describe
from .errors import DamageError, ProtocolError, SnapshotError, SnapshotMemoryError, StaleWriterError
from .fence import Worker
from .held import Held, Record, ShardRecord
from .slots import Segment, available_bytes, format_bytes
from .stripes import BUCKET_BYTES
from .tuning import Tuning

if TYPE_CHECKING:
    from .pulse import Pulse

_SLOTS = 2
_EVENTS_KEPT = 200
_MOST_HELD = 16  # workers have two slots, or three, so honest nodes never have so many under way


class Keeper:
    """What this node holds and knows. Every method is thread-safe."""

    def __init__(self, *, job: str, node: str, conf: PluginConfig) -> None:
        self.job, self.node, self.conf = job, node, conf
        self.changed = threading.Condition(threading.RLock())
        self._allocating = threading.Lock()
        self.generation = 0
        self.is_open = False
        self.decision: Decision | None = None
        self.position = 0
        self.key: bytes | None = None
        self.nonce = secrets.token_hex(16)
        self.held: dict[SnapshotId, Held] = {}
        self.doomed: list[Held] = []
        """Snapshots that are no longer held but still read."""
        self.committed: SnapshotId | None = None
        self.committed_at = 0.0
        self.workers: dict[int, Worker] = {}
        self.pools: dict[int, list[Segment]] = {}
        self.writing: dict[int, tuple[SnapshotId, Segment]] = {}
        self.fetched: dict[int, Segment] = {}
        self.spare_parity: list[Segment] = []
        self.busy = 0
        self.on_seal: list[Callable[[], None]] = []
        self.prepared: dict[SnapshotId, set[int]] = {}
        self.replica_checks: dict[SnapshotId, dict[str, int]] = {}
        self.objections: dict[SnapshotId, str] = {}
        self.skipped: SnapshotId | None = None
        self.trouble: SnapshotError | None = None
        self.restored: dict[str, Any] | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.finished: set[int] = set()
        """Ranks of this node that are done for good."""
        self.is_over = False
        """Whether all ranks of the job are done for good."""
        self.snapshots = 0
        self.tuning = Tuning()
        self.last_commit_ms = 0.0
        self._completed_at: dict[SnapshotId, float] = {}
        self.left = 0
        """The last generation that this node has left. Read without the lock (`pulse.py`)."""
        self.pulse: Pulse | None = None
        """This generation's heartbeats."""
        self.first_failure: int | None = None
        """The rank of this node whose exception came first in this generation."""
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._refusals = 0
        self.sink: Callable[[dict[str, Any]], None] | None = None
        """Where events go beside; must not block."""
        self.given_up: dict[SnapshotId, str] = {}
        """Snapshots that could not be restored though their checksums hold, and why: never to be tried again."""
        self.scrub = {"passes": 0, "mended": 0, "failed": 0}

    # --- generations -------------------------------------------------------------------------------------------

    def seal(self) -> list[HeldView]:
        """End the current generation here: fence its workers, verify what is held, and say what that is."""
        with self.changed:
            self.is_open, self.left = False, self.generation
            workers, self.workers = list(self.workers.values()), {}
            for let_go in list(self.on_seal):  # some take themselves off it
                let_go()
            self.changed.notify_all()
        stuck = fence.end(workers)
        with self.changed:
            for rank in {worker.rank for worker in stuck}:
                self._abandon_slots(rank)
            for worker in workers:
                worker.close()
            self.writing.clear()
            # The threads that write (exchange, recovery) let go at their next piece; readers may go on.
            self.changed.wait_for(lambda: not self.busy)
            for held in self.held.values():
                held.verify()
            self._log_damage()
            return [held.view() for held in self.held.values() if held.data_complete or held.parity]

    def _log_damage(self) -> None:
        for held in self.held.values():
            if held.damaged_data or held.damaged_parity:
                data, parity = sorted(held.damaged_data), sorted(held.damaged_parity)
                self.event("damage", snapshot=str(held.id), buckets=data, parity=parity)

    def _abandon_slots(self, rank: int) -> None:
        """A writer that cannot be killed may still scribble: its slots are never used or believed again."""
        self.pools.pop(rank, None)
        for held in self.in_memory():
            if held.shards.pop(rank, None) is not None:
                held.data_complete = False

    def open(self, decision: Decision, key: bytes) -> Held | None:
        """Begin a generation. Returns the snapshot to go on from, to be made whole where it is not."""
        with self.changed:
            self.decision, self.key = decision, key
            self.generation = decision.generation
            self.position = decision.position_of(self.node)
            self.nonce = secrets.token_hex(16)
            self.prepared, self.replica_checks, self.trouble, self.committed = {}, {}, None, None
            self.finished, self.is_over = set(), False
            self._completed_at.clear()
            self.tuning = Tuning()
            self.objections, self.skipped = {}, None
            self.first_failure, self.pulse = None, None
            self.restored = {
                "source": decision.source,
                "step": 0,
                "notes": list(decision.notes),
                "started": time.time(),
            }
            keep = decision.snapshot if decision.source == "memory" else None
            for held in list(self.held.values()):
                if held.id != keep or decision.at.get(held.position) != self.position:
                    self._drop(held)
            self._free_fetched()
            baseline = self._baseline(decision, keep) if keep else None
            if baseline and (not baseline.data_complete or baseline.damaged_data):
                self.restored["source"] = "parity"
            if keep and len(decision.at) < next(iter(decision.views.values())).nodes:
                self.restored["source"] = "parity"  # of a position that no node holds
            if decision.snapshot:
                self.restored["step"] = decision.snapshot.step
            self.event("generation", generation=self.generation, source=decision.source, notes=list(decision.notes))
            self.is_open = True
            self.changed.notify_all()
            return baseline

    def _baseline(self, decision: Decision, keep: SnapshotId) -> Held | None:
        """What this node answers for of the snapshot to go on from; nothing if other nodes, or more, took it."""
        sample = next(iter(decision.views.values()))
        self.committed, self.committed_at = keep, time.time()
        if keep not in self.held and sample.nodes != len(decision.nodes):
            return None
        if keep not in self.held:
            self.held[keep] = Held(
                keep,
                position=self.position,
                nodes=sample.nodes,
                world_size=sample.world_size,
                k=sample.k,
                m=sample.m,
            )
        self.held[keep].committed = True
        return self.held[keep]

    def check_open(self, generation: int) -> None:
        """Raises StaleWriterError unless `generation` is the one that is open."""
        if not self.is_open or generation != self.generation:
            raise StaleWriterError(
                f"generation {generation} is over on node {self.node!r} (now {self.generation}); "
                "torchrun is starting the workers again"
            )

    # --- workers -----------------------------------------------------------------------------------------------

    def join(self, worker: Worker) -> None:
        """A worker has come. Raises StaleWriterError if it belongs to an older generation."""
        with self.changed:
            self.check_open(worker.generation)
            if old := self.workers.pop(worker.rank, None):
                self.workers[worker.rank] = old
                if old.alive:
                    raise ProtocolError(f"rank {worker.rank} is already here as process {old.pid}")
                old.close()
            self.workers[worker.rank] = worker
            self.changed.notify_all()

    def begin(self, worker: Worker, step: int, size_bytes: int) -> Segment:
        """A slot to write `step` into; waits while both slots hold snapshots that are still needed.

        Raises SnapshotMemoryError if the state does not fit, StaleWriterError if the generation has ended.
        """
        if size_bytes <= 0 or size_bytes % BUCKET_BYTES:
            raise ProtocolError(f"a shard of {size_bytes} bytes is not a whole number of buckets")
        while True:
            with self.changed:
                self.check_open(worker.generation)
                if self.trouble:
                    raise self.trouble
                self._check_step(worker, step)
                free, may_grow = self._free_slot(worker.rank, size_bytes)
                if free:
                    self.writing[worker.rank] = (self._id(step), free)
                    return free
                if not may_grow:
                    self.changed.wait(1.0)
                    continue
            self._grow(worker, size_bytes)

    def _id(self, step: int) -> SnapshotId:
        return SnapshotId(generation=self.generation, step=step)

    def _check_step(self, worker: Worker, step: int) -> None:
        held = self.held.get(self._id(step))
        if self.committed and self.committed.generation == self.generation and step <= self.committed.step:
            raise ProtocolError(f"step {step} is not newer than the committed step {self.committed.step}")
        if held and worker.rank in held.shards:
            raise ProtocolError(f"rank {worker.rank} has already written step {step}")

    def _free_slot(self, rank: int, size_bytes: int) -> tuple[Segment | None, bool]:
        """A slot nobody needs, or None and whether another may be allocated."""
        # A snapshot that a checkpoint or a recovery still reads does not hold training up: a third slot does its work.
        pinned = any(held.pins and rank in held.shards for held in self.in_memory())
        limit = _SLOTS + int(pinned)
        self._trim(rank, size_bytes, limit)
        pool = [segment for segment in self.pools.get(rank, []) if segment.size_bytes == size_bytes]
        used = {id(held.shards.get(rank)) for held in self.in_memory()}
        if free := [segment for segment in pool if id(segment) not in used]:
            return free[0], False
        return None, len(pool) < limit

    def in_memory(self) -> list[Held]:
        """All snapshots whose memory is in use: those held, and those only still read. For holders of the lock."""
        return [*self.held.values(), *self.doomed]

    def _trim(self, rank: int, size_bytes: int, limit: int) -> None:
        """Free the slots that nothing uses and nothing will."""
        used = {id(held.shards.get(rank)) for held in self.in_memory()}
        pool = self.pools.get(rank, [])
        spare = [segment for segment in pool if id(segment) not in used]
        extra = [segment for segment in spare if segment.size_bytes != size_bytes]
        fitting = [segment for segment in spare if segment.size_bytes == size_bytes]
        extra += fitting[: max(0, len(pool) - len(extra) - limit)]
        for segment in extra:
            pool.remove(segment)
            segment.free()

    def _grow(self, worker: Worker, size_bytes: int) -> None:
        """Allocate this rank's slots, outside the lock: it takes as long as touching the memory does."""
        with self._allocating:
            with self.changed:
                have = [s for s in self.pools.get(worker.rank, []) if s.size_bytes == size_bytes]
                count = max(1, _SLOTS - len(have))
            self._check_memory(worker, size_bytes, count)
            made = [Segment(f"rank{worker.rank}", size_bytes) for _ in range(count)]
            with self.changed:
                self.pools.setdefault(worker.rank, []).extend(made)

    def _check_memory(self, worker: Worker, size_bytes: int, slots: int) -> None:
        assert self.decision is not None
        group = next(g for g in self.decision.groups if self.position in g.members)
        whole = code_cost((group,), size_bytes).memory_bytes  # as `refound plan` says it
        parity = int(whole) - _SLOTS * size_bytes if slots == _SLOTS else 0
        need, room = slots * size_bytes + parity, available_bytes()
        if need > room:
            fits = int(room * size_bytes / whole)
            raise SnapshotMemoryError(
                f"rank {worker.rank}'s state is {format_bytes(size_bytes)}: {slots} slots and their parity "
                f"(k={group.k}, m={group.m}) need {format_bytes(need)} and node {self.node!r} has "
                f"{format_bytes(room)} left. A state of {format_bytes(fits)} would fit: shard it over more ranks "
                "(FSDP), use a wider code (larger k), or free memory on the node"
            )

    def complete(
        self,
        worker: Worker,
        step: int,
        checksums: np.ndarray,
        replica_checks: dict[str, int],
        objection: str = "",
    ) -> None:
        """The worker has copied all of `step`; these are its buckets' checksums.

        replica_checks: on a worker's first snapshot, a checksum of everything it holds in common with other ranks.
        objection: why it must not be committed, in words; all nodes drop it when it is complete, and keep the last one.
        """
        with self.changed:
            self.check_open(worker.generation)
            snapshot = self._id(step)
            begun, segment = self.writing.get(worker.rank, (None, None))
            if begun != snapshot or segment is None or len(checksums) * BUCKET_BYTES != segment.size_bytes:
                raise ProtocolError(f"rank {worker.rank} completed step {step}, which it had not begun so")
            del self.writing[worker.rank]
            held = self.held.get(snapshot) or self._new_held(snapshot, worker)
            _merge_checks(held.replica_checks, replica_checks)
            held.objection = held.objection or objection
            held.shards[worker.rank] = segment
            held.own[worker.rank] = ShardRecord(size_bytes=segment.size_bytes, checksums=checksums)
            if len(held.shards) == worker.local_world_size:
                held.data_complete = True
                self._completed_at[snapshot] = time.monotonic()
            self.changed.notify_all()

    def _new_held(self, snapshot: SnapshotId, worker: Worker) -> Held:
        assert self.decision is not None
        self.held[snapshot] = Held(
            snapshot,
            position=self.position,
            nodes=len(self.decision.nodes),
            world_size=worker.world_size,
            k=self.decision.nodes[0].k,
            m=self.decision.nodes[0].m,
        )
        return self.held[snapshot]

    def abort(self, worker: Worker) -> None:
        """The worker gives up the slot it was writing."""
        with self.changed:
            self.writing.pop(worker.rank, None)
            self.changed.notify_all()

    def finish(self, worker: Worker) -> SnapshotId | None:
        """The worker is done for good. Returns what all hold, when it was the last of this node to say so."""
        with self.changed:
            self.check_open(worker.generation)
            before = len(self.finished)
            self.finished.add(worker.rank)
            return self.committed if before < len(self.finished) == worker.local_world_size else None

    # --- the group ---------------------------------------------------------------------------------------------

    def offered(self, snapshot: SnapshotId, position: int, record: Record, worker_world: int) -> None:
        """Another member of the group says what its shards of `snapshot` are."""
        with self.changed:
            if not self._is_news(snapshot):
                return
            assert self.decision is not None
            group = next(g for g in self.decision.groups if self.position in g.members)
            if position == self.position or position not in group.members:
                raise ProtocolError(f"position {position} has nothing to offer to position {self.position}")
            if snapshot not in self.held:
                self._make_room()
                node = self.decision.nodes[0]
                self.held[snapshot] = Held(
                    snapshot,
                    position=self.position,
                    nodes=len(self.decision.nodes),
                    world_size=worker_world,
                    k=node.k,
                    m=node.m,
                )
            self.held[snapshot].records[position] = record
            self.changed.notify_all()

    def _make_room(self) -> None:
        """Forget the farthest snapshot that others speak of and this node has nothing of, where there are too many."""
        hollow = [held for held in self.held.values() if not held.shards and not held.committed]
        if len(hollow) >= _MOST_HELD:
            self._drop(max(hollow, key=lambda held: held.id))

    def _is_news(self, snapshot: SnapshotId) -> bool:
        """Whether word of `snapshot` still counts: its generation is open and nothing newer is committed."""
        current = self.is_open and snapshot.generation == self.generation
        return current and (self.committed is None or snapshot > self.committed)

    def note_prepared(
        self, snapshot: SnapshotId, position: int, replica_checks: dict[str, int], objection: str = ""
    ) -> bool:
        """At the lead: `position` holds all of `snapshot`. True when that was the last one to say so."""
        with self.changed:
            assert self.decision is not None
            if position >= len(self.decision.nodes):
                raise ProtocolError(f"there is no position {position}")
            if not self._is_news(snapshot):
                return False
            while len(self.prepared) >= _MOST_HELD:
                del self.prepared[max(self.prepared)]
            try:
                _merge_checks(self.replica_checks.setdefault(snapshot, {}), replica_checks)
            except SnapshotError as error:
                self.trouble = error  # what was saved in parts is not one state: it must never be committed
                self.changed.notify_all()
                return False
            if objection:
                self.objections.setdefault(snapshot, objection)
            ready = self.prepared.setdefault(snapshot, set())
            before = len(ready)
            ready.add(position)
            return before < len(ready) == len(self.decision.nodes)

    def commit(self, snapshot: SnapshotId) -> None:
        """All nodes hold `snapshot`: it is what a restart goes back to, and everything older may go."""
        with self.changed:
            held = self.held.get(snapshot)
            if not self._is_news(snapshot) or held is None or not (held.data_complete and held.parity_complete):
                return  # the lead commits what this node has said to be complete, so this is none of its messages
            held.committed = True
            self._spare(held.handed_on, held.group.m)  # all nodes have fetched their rows
            held.handed_on = []
            self.committed, self.committed_at = snapshot, time.time()
            self.snapshots += 1
            if (completed := self._completed_at.pop(snapshot, None)) is not None:
                self.last_commit_ms = (time.monotonic() - completed) * 1000
            # Too many for `events`, which keeps what is rare.
            self._tell("commit", {"step": snapshot.step, "commit_ms": round(self.last_commit_ms, 1)})
            for older in [h for h in self.held.values() if h.id < snapshot]:
                self._drop(older)
            for rank in set(self.pools) - set(held.own):
                self._trim(rank, 0, 0)  # a rank that lives elsewhere since the job came back in another shape
            self.prepared = {i: p for i, p in self.prepared.items() if i > snapshot}
            self.replica_checks = {i: c for i, c in self.replica_checks.items() if i > snapshot}
            self._free_fetched()
            self.changed.notify_all()

    def skip(self, snapshot: SnapshotId, why: str) -> None:
        """All nodes hold `snapshot` and one objects to it: it is dropped, and the last committed one stays."""
        with self.changed:
            held = self.held.get(snapshot)
            if not self._is_news(snapshot) or held is None:
                return
            self._drop(held)
            self._completed_at.pop(snapshot, None)
            self.prepared.pop(snapshot, None)
            self.replica_checks.pop(snapshot, None)
            self.objections.pop(snapshot, None)
            self.skipped = snapshot
            self.changed.notify_all()
        self.event("not committed", snapshot=str(snapshot), error=why)

    def _free_fetched(self) -> None:
        for segment in self.fetched.values():
            segment.free()
        self.fetched = {}

    # --- holding on --------------------------------------------------------------------------------------------

    def pin(self, snapshot: SnapshotId) -> Held | None:
        """Keep a snapshot's memory as it is until `unpin`; None if it is not held."""
        with self.changed:
            held = self.held.get(snapshot)
            if held:
                held.pins += 1
            return held

    def unpin(self, held: Held) -> None:
        with self.changed:
            held.pins -= 1
            if not held.pins and held in self.doomed:
                self.doomed.remove(held)
                self._release(held)
            self.changed.notify_all()

    def _drop(self, held: Held) -> None:
        """Forget a snapshot. If something still reads it, its memory stays until the reader is done."""
        self.held.pop(held.id, None)
        if held.pins:
            self.doomed.append(held)
        else:
            self._release(held)

    def _release(self, held: Held) -> None:
        self._spare(held.parity + held.handed_on, held.group.m)
        pooled = {id(segment) for pool in self.pools.values() for segment in pool}
        for segment in held.shards.values():
            if id(segment) not in pooled:
                segment.free()

    def _spare(self, segments: list[Segment], m: int) -> None:
        """Keep parity memory for the next snapshot: making pages costs more than filling them."""
        self.spare_parity += segments
        while len(self.spare_parity) > max(0, 2 * m - 1):  # what one snapshot takes: m of its own, m - 1 to hand on
            self.spare_parity.pop(0).free()

    def parity_memory(self, count: int, size_bytes: int) -> list[Segment]:
        """`count` segments for parity, reused where the size is the same."""
        with self.changed:
            reused = [s for s in self.spare_parity if s.size_bytes == size_bytes][:count]
            for segment in self.spare_parity:
                if segment not in reused and segment.size_bytes != size_bytes:
                    segment.free()
            self.spare_parity = [s for s in self.spare_parity if s.size_bytes == size_bytes and s not in reused]
        return reused + [Segment("parity", size_bytes) for _ in range(count - len(reused))]

    # --- looking -----------------------------------------------------------------------------------------------

    def event(self, kind: str, **details: Any) -> None:
        """Note something people will want to know afterwards."""
        with self.changed:
            self.events.append(self._tell(kind, details))
        print(f"refound: {kind} {details}", flush=True)

    def give_up_on(self, snapshot: SnapshotId, reason: str) -> None:
        """The next rendezvous passes this snapshot over, on all nodes."""
        with self.changed:
            known = self.given_up.setdefault(snapshot, reason) is not reason
        if not known:
            self.event("given up", snapshot=str(snapshot), error=reason)

    def refused(self, **details: Any) -> None:
        """Note a caller that was turned away: the 1st, 2nd, 4th, 8th…, so that no flood drowns the other events."""
        with self.changed:
            self._refusals += 1
            count = self._refusals
        if count & (count - 1) == 0:
            self.event("refused", **details, refused_so_far=count)

    def _tell(self, kind: str, details: dict[str, Any]) -> dict[str, Any]:
        event = {"time": time.time(), "kind": kind, **details}
        if self.sink:
            self.sink({**event, "job": self.job, "node": self.node, "in": self.generation})
        return event

    def status(self) -> dict[str, Any]:
        """A snapshot of everything `refound status` shows."""
        with self.changed:
            return describe(self)

    def wait_committed(self, worker: Worker, step: int, timeout: timedelta) -> bool:
        """Wait until a snapshot of this generation at `step` or later is committed. False on time-out."""
        with self.changed:
            self.changed.wait_for(
                lambda: not self._is_current(worker) or self._is_committed(step) or self.is_skipped(step),
                timeout=timeout.total_seconds(),
            )
            return self._is_current(worker) and self._is_committed(step)

    def _is_current(self, worker: Worker) -> bool:
        return self.is_open and worker.generation == self.generation

    def is_skipped(self, step: int) -> bool:
        """Whether a snapshot of this generation at `step` or later was dropped, since a rank objected to it."""
        return self.skipped is not None and self.skipped >= self._id(step)

    def _is_committed(self, step: int) -> bool:
        return self.committed is not None and self.committed >= self._id(step)


def _merge_checks(known: dict[str, int], new: dict[str, int]) -> None:
    """Ranks that share state must have checksummed the same bytes. Raises DamageError if they have not."""
    for ranks, value in new.items():
        if known.setdefault(ranks, value) != value:
            raise DamageError(
                f"ranks {ranks} should hold the same parameters and optimizer state and do not, so they cannot share "
                "the saving. If they differ on purpose, call protect(..., replicas=False)"
            )
