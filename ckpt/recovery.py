# SPDX-License-Identifier: Apache-2.0
"""Making a snapshot whole again on this node: what is missing or damaged is rebuilt from the group, then proven.

All nodes know from the rendezvous what each of them holds intact (`Decision.views`), so this node asks, for every
piece it lacks, one of the survivors of that stripe to compute it, many at a time. Data comes first, since training
waits for it; parity after it, in the background.
"""

import functools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from .agreement import Decision, SnapshotId
from .errors import DamageError, SnapshotError, StaleWriterError, as_snapshot_error
from .held import Held, ShardRecord, bucket_checksums, failing_buckets, record_buckets
from .keeper import Keeper
from .manifest import vector_of
from .peers import Peers, fetch_record
from .rebuild import helpers
from .slots import Segment
from .stripes import BUCKET_BYTES, Stripe
from .threads import PATIENCE, start_thread
from .wire import Message

_IN_FLIGHT_A_NODE = 2
_DAMAGE_RETRIES = 3
_NEWS = timedelta(seconds=10)
_TRIES = 2
"""Memory may go bad between a bucket's arrival and its proof; what comes out wrong twice was wrong before."""


class Recovery:
    """The recovery thread of one generation that goes on from a snapshot in memory."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes, held: Held) -> None:
        self._keeper, self._decision, self._held = keeper, decision, held
        self._peers = Peers(keeper, decision, key)

    def start(self) -> None:
        with self._keeper.changed:
            self._keeper.busy += 1
            self._keeper.pin(self._held.id)
            self._keeper.on_seal.append(self._peers.close)
        start_thread(self._run, patience=PATIENCE)

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
        except (SnapshotError, MemoryError) as error:
            trouble = as_snapshot_error(error)
            with keeper.changed:
                if self._is_restored() and not isinstance(error, DamageError | MemoryError):
                    # The others drop what they held as soon as a newer one is committed: word of it may be on its way.
                    keeper.changed.wait_for(self._is_outdated, timeout=_NEWS.total_seconds())
                if self._is_outdated():
                    return  # this snapshot is no longer needed, here or elsewhere, or the next generation decides anew
                keeper.trouble = trouble
                keeper.changed.notify_all()
            keeper.event("trouble", error=str(trouble))
        finally:
            self._peers.close()
            keeper.unpin(self._held)
            with keeper.changed:
                keeper.busy -= 1
                keeper.on_seal.remove(self._peers.close)
                keeper.changed.notify_all()

    def _is_restored(self) -> bool:
        """Whether the workers have their data, so that newer snapshots may come."""
        return bool(self._keeper.restored and "seconds" in self._keeper.restored)

    def _is_outdated(self) -> bool:
        return self._keeper.committed != self._held.id or not self._keeper.is_open

    # --- what was there ----------------------------------------------------------------------------------------

    def restore_records(self) -> None:
        """Learn the checksums of every member's shards, from any node that knows them."""
        held = self._held
        for position in held.group.members:
            if not held.records.get(position):
                knower = next(
                    p for p, view in self._decision.views.items() if position in view.sizes and p != held.position
                )
                record = fetch_record(self._peers, self._decision.at[knower], held.id, position)
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
        for tries_left in reversed(range(_TRIES)):
            self._fill(self._data_asks(wanted))
            if not (wanted := self._prove_data(wanted, tries_left)):
                return

    def _data_asks(self, wanted: list[int]) -> list["Ask"]:
        held, asks = self._held, list[Ask]()
        for chunk_index, stripe in enumerate(held.group.data_stripes(held.index)):
            symbol, first = stripe.data.index(held.index), chunk_index * held.chunk
            offsets = [bucket - first for bucket in wanted if first <= bucket < first + held.chunk]
            asks += self._asks(stripe, symbol, offsets, functools.partial(self._write_data, first))
        return asks

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

    def _write_data(self, first: int, start: int, rebuilt: np.ndarray) -> None:
        done = 0
        for segment, offset, size in self._held.data_views(first + start, len(rebuilt) // BUCKET_BYTES):
            segment.array[offset : offset + size] = rebuilt[done : done + size]
            done += size

    def _prove_data(self, rebuilt: list[int], tries_left: int) -> list[int]:
        """Check everything, and say what of it is to be rebuilt once more; nothing: it is all proven.

        Raises DamageError for what was wrong each time, or was not rebuilt at all.
        """
        held, bad, reason = self._held, set[int](), ""
        for rank, record, first in vector_of(held.own):
            if failing := failing_buckets(held.shards[rank].array, record.checksums):
                reason = f"rank {rank} of {held.id}: rebuilt buckets {failing[:4]} fail their checksums"
                bad |= {first + bucket for bucket in failing}
        if bad and tries_left and bad <= set(rebuilt):
            self._keeper.event("rebuilt anew", snapshot=str(held.id), reason=reason)
            return sorted(bad)
        if bad:
            if not tries_left and not bad.isdisjoint(rebuilt):
                # All that it was rebuilt from was proven, so its parity is wrong and would be wrong again.
                self._keeper.give_up_on(held.id, reason)
            raise DamageError(reason)
        with self._keeper.changed:
            self._peers.check()
            held.data_complete, held.damaged_data = True, set()
            self._keeper.changed.notify_all()
        return []

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

        def place(index: int, start: int, rebuilt: np.ndarray) -> None:
            segments[index].array[start * BUCKET_BYTES : start * BUCKET_BYTES + len(rebuilt)] = rebuilt
            sums[index][start : start + len(rebuilt) // BUCKET_BYTES] = bucket_checksums(rebuilt)

        asks: list[Ask] = []
        for index, stripe in enumerate(stripes):
            symbol = held.group.k + stripe.parity.index(held.index)
            asks += self._asks(stripe, symbol, sorted(wanted[index]), functools.partial(place, index))
        self._fill(asks)
        with self._keeper.changed:
            self._peers.check()
            held.parity, held.parity_checksums = segments, sums
            held.parity_complete, held.damaged_parity = True, set()
            self._keeper.changed.notify_all()

    # --- both --------------------------------------------------------------------------------------------------

    def _asks(
        self, stripe: Stripe, symbol: int, buckets: list[int], place: Callable[[int, np.ndarray], None]
    ) -> list["Ask"]:
        """What to ask of whom to get a symbol at `buckets`."""
        held, asks = self._held, list[Ask]()
        for start, count, helper in helpers(self._decision, held.group, held.chunk, stripe, buckets):
            asks.append(Ask(helper=helper, stripe=stripe.number, symbol=symbol, start=start, count=count, place=place))
        return asks

    def _fill(self, asks: list["Ask"]) -> None:
        """Ask for everything, several at a time and stripe by turns, so that all helpers are at work."""
        waiting, flying, damaged = deque(sorted(asks, key=lambda ask: ask.start)), deque[Ask](), 0
        while waiting or flying:
            try:
                while waiting and len(flying) < _IN_FLIGHT_A_NODE * self._held.group.n:
                    flying.append(waiting.popleft())
                    self._peers.post(flying[-1].helper, flying[-1].message(self._held.id))
                ask = flying[0]
                reply, body = self._peers.collect(ask.helper)
                rebuilt = np.frombuffer(body, np.uint8)
                if (
                    bucket_checksums(rebuilt).tolist() != reply.get("crc32c")
                    or len(rebuilt) != ask.count * BUCKET_BYTES
                ):
                    raise DamageError(f"a rebuilt piece of {self._held.id} was changed on its way")
                flying.popleft()
                ask.place(ask.start, rebuilt)
            except (OSError, DamageError) as error:
                damaged += isinstance(error, DamageError)
                if damaged > _DAMAGE_RETRIES:
                    raise
                for helper in {ask.helper for ask in flying}:
                    self._peers.retry_after(helper)
                waiting.extendleft(reversed(flying))
                flying.clear()


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One piece of a lost symbol: which, of whom, and what to do with it."""

    helper: int
    stripe: int
    symbol: int
    start: int
    count: int
    place: Callable[[int, np.ndarray], None]

    def message(self, snapshot: SnapshotId) -> Message:
        place = {"stripe": self.stripe, "symbol": self.symbol, "start": self.start, "count": self.count}
        return {"op": "rebuild", "generation": snapshot.generation, "step": snapshot.step, **place}
