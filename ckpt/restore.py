# SPDX-License-Identifier: Apache-2.0
"""Where a worker's shards come from: this node's memory, another node's, or the disk."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoints
from .agreement import Decision, HeldView
from .errors import DamageError, SnapshotError
from .held import ShardRecord, failing_buckets
from .keeper import Keeper
from .peers import Peers, fetch_record, read_message
from .rebuild import helpers
from .slots import Segment
from .stripes import BUCKET_BYTES, chunk_buckets, runs

_READ_BUCKETS = 16


class Restore:
    """The snapshot one generation goes on from, as its workers read it."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes) -> None:
        self._keeper, self._decision, self._key = keeper, decision, key
        self._records: dict[int, ShardRecord] = {}
        self._missing: dict[int, set[int]] = {}
        """Rank → buckets of its shard that have not been read from its node yet."""
        self._first: dict[int, int] = {}
        """Rank → where its shard begins in its position's vector, in buckets."""
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

    def shard(self, rank: int, spans: Sequence[range] | None = None) -> tuple[Segment, ShardRecord]:
        """One rank's shard, proven; waits for a rebuild that is under way.

        spans: the buckets that are needed, where all would be a waste; what lies outside them may be anything.

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
                segment, self._records[rank] = self._from_elsewhere(rank)
                with self._keeper.changed:
                    # It may have taken so long that another generation has begun, which must not find it.
                    self._keeper.check_open(self._decision.generation)
                    self._keeper.fetched[rank] = segment
            if rank in self._missing:
                self._fill(rank, segment, spans)
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

    def _from_elsewhere(self, rank: int) -> tuple[Segment, ShardRecord]:
        """A shard that this node does not hold: whole from disk, or memory for it that is still to be filled."""
        if self._decision.source == "disk":
            return self._from_disk(lambda root, id: checkpoints.read_shard(root, id, rank, self._note_rebuilt))
        knower, position = self._knower_of(rank)
        peers = Peers(self._keeper, self._decision, self._key)
        try:
            whole = fetch_record(peers, self._decision.at[knower.position], knower.id, position)
        finally:
            peers.close()
        record = whole[rank]
        self._missing[rank] = set(range(record.size_bytes // BUCKET_BYTES))
        self._first[rank] = sum(whole[r].size_bytes for r in whole if r < rank) // BUCKET_BYTES
        return Segment(f"rank{rank}-peer", record.size_bytes, sparse=True), record

    def _knower_of(self, rank: int) -> tuple[HeldView, int]:
        """A node that knows a rank's checksums, and the position that the rank belongs to."""
        for view in self._decision.views.values():
            for position, sizes in view.sizes.items():
                if rank in sizes:
                    return view, position
        raise SnapshotError(f"no node knows rank {rank} of {self._decision.snapshot}")

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

    def _fill(self, rank: int, segment: Segment, spans: Sequence[range] | None) -> None:
        """Read what is wanted and missing of another position's shard, from whoever holds that position."""
        missing, total, first = self._missing[rank], len(self._records[rank].checksums), self._first[rank]
        among = [range(span.start, min(span.stop, total)) for span in spans] if spans is not None else [range(total)]
        wanted = sorted(missing.intersection(itertools.chain.from_iterable(among)))
        knower, position = self._knower_of(rank)
        peers = Peers(self._keeper, self._decision, self._key)
        try:
            if position in self._decision.at:
                pieces = self._stored(peers, position, [first + bucket for bucket in wanted])
            else:
                pieces = self._rebuilt(peers, knower, position, [first + bucket for bucket in wanted])
            for start, data in pieces:
                low = (start - first) * BUCKET_BYTES
                segment.array[low : low + len(data)] = data
        finally:
            peers.close()
        if bad := failing_buckets(segment.array, self._records[rank].checksums, wanted):
            raise DamageError(f"rank {rank} of {knower.id}: buckets {bad[:4]} from another node fail their checksums")
        missing.difference_update(wanted)

    def _stored(self, peers: Peers, position: int, buckets: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Buckets of a position's vector, from the node that holds it (and has rebuilt it, where it had to)."""
        snapshot = self._decision.snapshot
        assert snapshot is not None
        for start, count in runs(buckets, _READ_BUCKETS):
            message = read_message(snapshot, "data", 0, start, count)
            yield start, np.frombuffer(peers.request(self._decision.at[position], message)[1], np.uint8)

    def _rebuilt(
        self, peers: Peers, knower: HeldView, position: int, buckets: list[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Buckets of a position that no node holds since there are other nodes, or fewer; proven by the caller."""
        group = next(group for group in knower.groups if position in group.members)
        known = {p: sizes for view in self._decision.views.values() for p, sizes in view.sizes.items()}
        chunk = chunk_buckets([sum(known[p].values()) // BUCKET_BYTES for p in group.members], group.k)
        index, where = position - group.first, {"generation": knower.id.generation, "step": knower.id.step}
        for number, stripe in enumerate(group.data_stripes(index)):
            begin = number * chunk
            offsets = [bucket - begin for bucket in buckets if begin <= bucket < begin + chunk]
            for start, count, helper in helpers(self._decision, group, chunk, stripe, offsets):
                place = {"stripe": stripe.number, "symbol": stripe.data.index(index), "start": start, "count": count}
                yield (
                    begin + start,
                    np.frombuffer(peers.request(helper, {"op": "rebuild", **where, **place})[1], np.uint8),
                )
