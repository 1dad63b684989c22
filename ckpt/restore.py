# SPDX-License-Identifier: Apache-2.0
"""Where a worker's shards come from: this node's memory, another node's, or the disk."""

import threading
from pathlib import Path
from typing import Any

from . import checkpoints
from .agreement import Decision, HeldView
from .errors import DamageError, SnapshotError
from .held import ShardRecord, failing_buckets, unpack_record
from .keeper import Keeper
from .peers import Peers, read_message
from .slots import Segment
from .stripes import BUCKET_BYTES

_READ_BUCKETS = 16


class Restore:
    """The snapshot one generation goes on from, as its workers read it."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes) -> None:
        self._keeper, self._decision, self._key = keeper, decision, key
        self._records: dict[int, ShardRecord] = {}
        self._lock = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """What a worker must know before it reads: source, step, generation, world_size and notes."""
        decision = self._decision
        facts: dict[str, Any] = {"source": decision.source, "step": 0, "notes": list(decision.notes)}
        if decision.snapshot is None:
            return facts
        facts |= {"step": decision.snapshot.step, "generation": decision.snapshot.generation}
        if decision.source == "memory":
            facts["world_size"] = next(iter(decision.views.values())).world_size
            facts["source"] = (self._keeper.restored or facts)["source"]
        else:
            facts["world_size"] = self._from_disk(lambda root, id: checkpoints.facts_of(root, id))["world_size"]
        return facts

    def shard(self, rank: int) -> tuple[Segment, ShardRecord]:
        """One rank's shard, proven; waits for a rebuild that is under way.

        Raises DamageError if it cannot be had whole, SnapshotError if no node knows it.
        """
        snapshot = self._decision.snapshot
        if snapshot is None:
            raise SnapshotError("there is no snapshot to restore")
        with self._keeper.changed:
            held = self._keeper.held.get(snapshot)
            if held and (rank in held.own or not held.data_complete):
                self._keeper.changed.wait_for(
                    lambda: (held.data_complete and not held.damaged_data) or self._ended() or self._keeper.trouble
                )
                if self._keeper.trouble:
                    raise self._keeper.trouble
                self._keeper.check_open(self._decision.generation)
                if rank in held.own:
                    return held.shards[rank], held.own[rank]
        with self._lock:
            segment = self._keeper.fetched.get(rank)
            if segment is None:
                segment, self._records[rank] = self._fetch(rank)
                with self._keeper.changed:
                    # It may have taken so long that another generation has begun, which must not find it.
                    self._keeper.check_open(self._decision.generation)
                    self._keeper.fetched[rank] = segment
            return segment, self._records[rank]

    def reject(self, reason: str) -> None:
        """A worker had a proven shard and could not make a state of it: the next rendezvous goes on from another."""
        snapshot = self._decision.snapshot
        if snapshot is None:
            raise SnapshotError("there is no snapshot to restore")
        if self._decision.source == "disk":
            checkpoints.set_aside(Path(self._keeper.conf.checkpoint_dir), snapshot, reason)
            self._keeper.event("checkpoint damaged", step=snapshot.step, error=reason)
        else:
            self._keeper.give_up_on(snapshot, reason)

    def _ended(self) -> bool:
        return not self._keeper.is_open or self._keeper.generation != self._decision.generation

    def _fetch(self, rank: int) -> tuple[Segment, ShardRecord]:
        snapshot = self._decision.snapshot
        assert snapshot is not None
        if self._decision.source == "disk":
            return self._from_disk(lambda root, id: checkpoints.read_shard(root, id, rank, self._note_rebuilt))
        for view in self._decision.views.values():
            for position, sizes in view.sizes.items():
                if rank in sizes:
                    return self._pull(view, position, rank)
        raise SnapshotError(f"no node knows rank {rank} of {snapshot}")

    def _note_rebuilt(self, what: str) -> None:
        self._keeper.event("checkpoint rebuilt", text=what)

    def _from_disk(self, read: Any) -> Any:
        root, snapshot = Path(self._keeper.conf.checkpoint_dir), self._decision.snapshot
        assert snapshot is not None
        try:
            return read(root, snapshot)
        except DamageError as error:
            checkpoints.set_aside(root, snapshot, str(error))
            self._keeper.event("checkpoint damaged", step=snapshot.step, error=str(error))
            raise DamageError(
                f"{error}. The checkpoint is set aside; the restart goes on from the one before it"
            ) from error

    def _pull(self, knower: HeldView, position: int, rank: int) -> tuple[Segment, ShardRecord]:
        """Read another position's shard from the node that holds it (and has rebuilt it, where it had to)."""
        snapshot = knower.id
        peers = Peers(self._keeper, self._decision, self._key)
        try:
            ask = {
                "op": "record",
                "generation": snapshot.generation,
                "step": snapshot.step,
                "position": position,
            }
            reply, body = peers.request(knower.position, ask)
            whole = unpack_record(reply.get("ranks"), body)
            record = whole[rank]
            first = sum(whole[r].size_bytes for r in whole if r < rank) // BUCKET_BYTES
            segment = Segment(f"rank{rank}-peer", record.size_bytes)
            count = record.size_bytes // BUCKET_BYTES
            for start in range(0, count, _READ_BUCKETS):
                wanted = min(_READ_BUCKETS, count - start)
                _, data = peers.request(position, read_message(snapshot, "data", 0, first + start, wanted))
                low = start * BUCKET_BYTES
                segment.array[low : low + len(data)] = data
        finally:
            peers.close()
        if bad := failing_buckets(segment.array, record.checksums):
            segment.free()
            raise DamageError(f"rank {rank} of {snapshot}: buckets {bad[:4]} from another node fail their checksums")
        return segment, record
