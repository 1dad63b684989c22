# SPDX-License-Identifier: Apache-2.0
"""A keeper's rules under any order of steps, commits, pins and rendezvous."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.fence import Worker
from refound.ckpt.held import Held, bucket_checksums
from refound.ckpt.slots import Segment
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import PATIENCE_S, Writer
from .keepers import at, opened, reopen


class AnyOrder(RuleBasedStateMachine):
    """Steps, commits, pins and rendezvous in any order; two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.keeper = opened()
        self.step = 0
        self.writing: dict[int, tuple[int, Segment]] = {}
        self.pinned: list[Held] = []
        self.truth: dict[tuple[SnapshotId, int], int] = {}

    def writer(self, rank: int) -> Worker:
        return Writer(rank, self.keeper.generation, 2, 2).worker()

    @initialize()
    def first(self) -> None:
        for rank in range(2):
            self.fill(rank, 1)
        self.keeper.commit(at(self.keeper, 1))
        self.step = 1

    def fill(self, rank: int, step: int) -> None:
        segment = self.keeper.begin(self.writer(rank), step, BUCKET_BYTES)
        assert all(segment is not h.shards.get(rank) for h in self.keeper.held.values())
        self.writing[rank] = (step, segment)
        self.finish(rank)

    def finish(self, rank: int) -> None:
        step, segment = self.writing.pop(rank)
        value = (step * 2 + rank) % 251
        segment.array[:] = value
        self.truth[at(self.keeper, step), rank] = value
        self.keeper.complete(self.writer(rank), step, bucket_checksums(segment.array), {})

    def room(self, rank: int) -> bool:
        using = [held for held in self.keeper.held.values() if rank in held.shards]
        return len(using) < 2 + any(held.pins for held in using)

    @rule(rank=st.integers(0, 1))
    def begin(self, rank: int) -> None:
        done = [i.step for i, held in self.keeper.held.items() if rank in held.shards and i == at(self.keeper, i.step)]
        step = max([*done, self.step]) + 1
        if rank in self.writing or not self.room(rank):
            return
        segment = self.keeper.begin(self.writer(rank), step, BUCKET_BYTES)
        assert all(segment is not held.shards.get(rank) for held in self.keeper.held.values())
        segment.array[:] = 255  # what is there until it is finished
        self.writing[rank] = (step, segment)

    @precondition(lambda self: self.writing)
    @rule(pick=st.data())
    def complete(self, pick: st.DataObject) -> None:
        self.finish(pick.draw(st.sampled_from(sorted(self.writing))))

    @precondition(lambda self: self.writing)
    @rule(pick=st.data())
    def abort(self, pick: st.DataObject) -> None:
        rank = pick.draw(st.sampled_from(sorted(self.writing)))
        del self.writing[rank]
        self.keeper.abort(self.writer(rank))

    @rule()
    def commit(self) -> None:
        ready = [i for i, held in self.keeper.held.items() if held.data_complete and not held.committed]
        if ready:
            self.keeper.commit(min(ready))
            self.step = min(ready).step

    @rule()
    def pin(self) -> None:
        if self.keeper.committed and (held := self.keeper.pin(self.keeper.committed)):
            self.pinned.append(held)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        held = self.pinned.pop(0)
        self.keeper.unpin(held)
        if not held.pins and self.keeper.committed and held.id < self.keeper.committed:
            with self.keeper.changed:
                assert self.keeper.changed.wait_for(lambda: held.id not in self.keeper.held, timeout=PATIENCE_S)

    @rule()
    def rendezvous(self) -> None:
        decision = reopen(self.keeper)
        assert decision.source == "memory" and decision.snapshot is not None
        assert decision.snapshot.step >= self.step
        self.writing.clear()
        self.step = decision.snapshot.step

    @invariant()
    def the_committed_snapshot_is_whole(self) -> None:
        committed = self.keeper.committed
        assert committed is None or committed in self.keeper.held
        for held in self.keeper.held.values():
            for rank, segment in held.shards.items():
                assert (segment.array[:: BUCKET_BYTES // 8] == self.truth[held.id, rank]).all()
            held.verify()
            assert not held.damaged_data

    def teardown(self) -> None:
        for pool in self.keeper.pools.values():
            for segment in pool:
                segment.free()


AnyOrder.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestAnyOrder = AnyOrder.TestCase
