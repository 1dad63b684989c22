# SPDX-License-Identifier: Apache-2.0
"""Making a snapshot whole again on this node: what is missing or damaged is rebuilt from the group, then proven.

All nodes know from the rendezvous what each of them holds intact (`Decision.views`), so every rebuild chooses k
intact symbols of each stripe, pulls them, and computes the lost one with the same `apply` that made the parity.
"""

import threading
import time
from collections.abc import Iterator

import numpy as np

from ..erasure import Code, apply
from .agreement import Decision, symbol_available
from .errors import DamageError, SnapshotError, StaleWriterError
from .exchange import PIECE_BUCKETS
from .held import Held, ShardRecord, bucket_checksums, failing_buckets, record_buckets
from .keeper import Keeper
from .peers import Peers, fetch_record, read_message
from .slots import Segment
from .stripes import BUCKET_BYTES, Stripe


class Recovery:
    """The recovery thread of one generation that goes on from a snapshot in memory."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes, held: Held) -> None:
        self._keeper, self._decision, self._held = keeper, decision, held
        self._peers = Peers(keeper, decision, key)
        self._code = Code(held.group.k, held.group.m)

    def start(self) -> None:
        with self._keeper.changed:
            self._keeper.busy += 1
            self._keeper.pin(self._held.id)
            self._keeper.on_seal.append(self._peers.close)
        threading.Thread(target=self._run, name="recovery", daemon=True).start()

    def _run(self) -> None:
        keeper = self._keeper
        try:
            started = time.monotonic()
            self.restore_records()
            self.rebuild_data()
            with keeper.changed:
                assert keeper.restored is not None
                keeper.restored["seconds"] = round(time.monotonic() - started, 3)
                keeper.changed.notify_all()
            keeper.event("restore", snapshot=str(self._held.id), **keeper.restored)
            self.rebuild_parity()
        except StaleWriterError:
            return  # the next generation decides anew
        except SnapshotError as error:
            with keeper.changed:
                if keeper.committed != self._held.id:
                    return  # a newer snapshot is committed: this one is no longer needed, here or elsewhere
                keeper.trouble = error
                keeper.changed.notify_all()
            keeper.event("trouble", error=str(error))
        finally:
            self._peers.close()
            keeper.unpin(self._held)
            with keeper.changed:
                keeper.busy -= 1
                keeper.on_seal.remove(self._peers.close)
                keeper.changed.notify_all()

    # --- what was there ----------------------------------------------------------------------------------------

    def restore_records(self) -> None:
        """Learn the checksums of every member's shards, from any node that knows them."""
        held = self._held
        for position in held.group.members:
            if not held.records.get(position):
                knower = next(
                    p for p, view in self._decision.views.items() if position in view.sizes and p != held.position
                )
                record = fetch_record(self._peers, knower, held.id, position)
                with self._keeper.changed:
                    held.records[position] = record

    # --- data --------------------------------------------------------------------------------------------------

    def rebuild_data(self) -> None:
        """Fill this node's missing and damaged buckets and prove them. Raises DamageError if they cannot be."""
        held = self._held
        total = record_buckets(held.own)
        wanted = sorted(held.damaged_data) if held.data_complete else list(range(total))
        if not wanted:
            return
        if not held.data_complete:
            shards = {rank: self._shard_memory(rank, record) for rank, record in held.own.items()}
            with self._keeper.changed:
                self._peers.check()
                held.shards = shards
        for chunk_index, stripe in enumerate(held.group.data_stripes(held.index)):
            symbol = stripe.data.index(held.index)
            first = chunk_index * held.chunk
            offsets = [bucket - first for bucket in wanted if first <= bucket < first + held.chunk]
            for start, count in _runs(offsets):
                rebuilt = self._rebuild(stripe, symbol, start, count)
                self._write_data(first + start, count, rebuilt)
        self._prove_data()

    def _shard_memory(self, rank: int, record: ShardRecord) -> Segment:
        """A slot of this rank's pool, so that later snapshots use it too."""
        with self._keeper.changed:
            used = {id(held.shards.get(rank)) for held in self._keeper.in_memory()}
            for segment in self._keeper.pools.get(rank, []):
                if segment.size_bytes == record.size_bytes and id(segment) not in used:
                    return segment
        segment = Segment(f"rank{rank}", record.size_bytes)
        with self._keeper.changed:
            self._keeper.pools.setdefault(rank, []).append(segment)
        return segment

    def _write_data(self, start: int, count: int, rebuilt: np.ndarray) -> None:
        done = 0
        for segment, offset, size in self._held.data_views(start, count):
            segment.array[offset : offset + size] = rebuilt[done : done + size]
            done += size

    def _prove_data(self) -> None:
        held = self._held
        for rank, record in held.own.items():
            if bad := failing_buckets(held.shards[rank].array, record.checksums):
                raise DamageError(f"rank {rank} of {held.id}: rebuilt buckets {bad[:4]} fail their checksums")
        with self._keeper.changed:
            self._peers.check()
            held.data_complete, held.damaged_data = True, set()
            self._keeper.changed.notify_all()

    # --- parity ------------------------------------------------------------------------------------------------

    def rebuild_parity(self) -> None:
        """Fill this node's missing and damaged parity, so that the next loss is survived too."""
        held = self._held
        stripes = held.group.parity_stripes(held.index)
        if not stripes or (held.parity_complete and not held.damaged_parity):
            return
        if held.parity_complete:
            segments, sums = held.parity, held.parity_checksums
            wanted = {i: [b for j, b in held.damaged_parity if j == i] for i in range(len(stripes))}
        else:
            segments = self._keeper.parity_memory(len(stripes), held.chunk * BUCKET_BYTES)
            sums = [np.zeros(held.chunk, np.uint32) for _ in stripes]
            wanted = {i: list(range(held.chunk)) for i in range(len(stripes))}
        for index, stripe in enumerate(stripes):
            symbol = held.group.k + stripe.parity.index(held.index)
            for start, count in _runs(sorted(wanted[index])):
                rebuilt = self._rebuild(stripe, symbol, start, count)
                segments[index].array[start * BUCKET_BYTES : (start + count) * BUCKET_BYTES] = rebuilt
                sums[index][start : start + count] = bucket_checksums(rebuilt)
        with self._keeper.changed:
            self._peers.check()
            held.parity, held.parity_checksums = segments, sums
            held.parity_complete, held.damaged_parity = True, set()
            self._keeper.changed.notify_all()

    # --- both --------------------------------------------------------------------------------------------------

    def _rebuild(self, stripe: Stripe, symbol: int, start: int, count: int) -> np.ndarray:
        """Compute one symbol of a stripe at buckets [start, start+count) from k that are intact there."""
        have = self._sources(stripe, symbol, range(start, start + count))
        if len(have) < self._held.group.k:
            if count == 1:
                raise DamageError(
                    f"bucket {start} of stripe {stripe.number} of {self._held.id} has too few intact symbols"
                )
            # Together these buckets miss too much, but each of them alone may not.
            return np.concatenate([self._rebuild(stripe, symbol, start + i, 1) for i in range(count)])
        inputs = [self._symbol(stripe, source, start, count) for source in have]
        out = np.empty(count * BUCKET_BYTES, np.uint8)
        apply(self._code.rebuild_matrix(have, [symbol]), inputs, [out])
        return out

    def _sources(self, stripe: Stripe, symbol: int, buckets: range) -> list[int]:
        """Up to k other symbols of the stripe that are intact at all of `buckets`, data before parity."""
        group, views, chunk = self._held.group, self._decision.views, self._held.chunk
        intact = [
            s
            for s in range(group.n)
            if s != symbol and all(symbol_available(group, views, stripe.number, s, b, chunk) for b in buckets)
        ]
        return intact[: group.k]

    def _symbol(self, stripe: Stripe, symbol: int, start: int, count: int) -> np.ndarray:
        held = self._held
        member = stripe.holders[symbol]
        if symbol < held.group.k:
            kind, index = "data", 0
            start += held.group.data_stripes(member).index(stripe) * held.chunk
        else:
            kind, index = "parity", held.group.parity_stripes(member).index(stripe)
        _, body = self._peers.request(held.group.first + member, read_message(held.id, kind, index, start, count))
        return np.frombuffer(body, np.uint8)


def _runs(buckets: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring buckets together, at most PIECE_BUCKETS: (first, count)."""
    at = 0
    while at < len(buckets):
        end = at + 1
        while end < len(buckets) and buckets[end] == buckets[end - 1] + 1 and end - at < PIECE_BUCKETS:
            end += 1
        yield buckets[at], end - at
        at = end
