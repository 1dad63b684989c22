# SPDX-License-Identifier: Apache-2.0
"""The rules by which one node's state changes, each tried on real memory and real processes."""

import functools
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from refound.ckpt import fence
from refound.ckpt import keeper as keeper_module
from refound.ckpt import slots as slots_module
from refound.ckpt.agreement import Decision, NodeView, SnapshotId, decide
from refound.ckpt.conf import PluginConfig
from refound.ckpt.errors import (
    DamageError,
    ProtocolError,
    SnapshotError,
    SnapshotMemoryError,
    StaleWriterError,
)
from refound.ckpt.fence import Worker
from refound.ckpt.held import Held, bucket_checksums
from refound.ckpt.keeper import Keeper
from refound.ckpt.slots import Segment
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import PATIENCE_S, Writer, sleepers, snapshot_memory, write

KEY = b"key"


def view_of(keeper: Keeper, **more: Any) -> NodeView:
    fields: dict[str, Any] = {"k": 0, "m": -1, "held": tuple(keeper.seal())} | more
    return NodeView(
        name=keeper.node,
        address="127.0.0.1",
        port=1,
        generation=keeper.generation,
        nonce=keeper.nonce,
        secret_check="",
        **fields,
    )


def others(count: int, **more: Any) -> list[NodeView]:
    """Views of nodes that hold nothing, named after the one under test."""
    fields: dict[str, Any] = {"k": 0, "m": -1} | more
    return [
        NodeView(name=f"z{i}", address="127.0.0.1", port=1, generation=0, nonce="00" * 16, secret_check="", **fields)
        for i in range(count)
    ]


def opened(nodes: int = 1) -> Keeper:
    keeper = Keeper(job="j", node="a", conf=PluginConfig())
    reopen(keeper, nodes)
    return keeper


def reopen(keeper: Keeper, nodes: int = 1) -> Decision:
    decision = decide([view_of(keeper), *others(nodes - 1)])
    keeper.open(decision, KEY)
    return decision


def data(buckets: int, fill: int) -> np.ndarray:
    return np.full(buckets * BUCKET_BYTES, fill, np.uint8)


def at(keeper: Keeper, step: int) -> SnapshotId:
    return SnapshotId(generation=keeper.generation, step=step)


def write_all(keeper: Keeper, step: int, ranks: int = 1, buckets: int = 1) -> SnapshotId:
    for rank in range(ranks):
        write(keeper, Writer(rank, keeper.generation, ranks, ranks), step, data(buckets, 16 * step + rank))
    return at(keeper, step)


def write_and_commit(keeper: Keeper, step: int, **more: int) -> SnapshotId:
    snapshot = write_all(keeper, step, **more)
    keeper.commit(snapshot)
    return snapshot


def one(keeper: Keeper, rank: int = 0) -> Worker:
    return Writer(rank, keeper.generation).worker()


class Waiting:
    """A call that is expected to wait, in a thread of its own."""

    def __init__(self, keeper: Keeper, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self._error: BaseException | None = None
        before = len(keeper.changed._waiters)  # pyright: ignore[reportAttributeAccessIssue]
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()
        while len(keeper.changed._waiters) == before:  # pyright: ignore[reportAttributeAccessIssue]
            assert self._thread.is_alive(), "it did not wait"

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except Exception as error:
            self._error = error

    def end(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "it still waits"
        if self._error:
            raise self._error
        return self.result


# --- slots -----------------------------------------------------------------------------------------------------


def test_two_slots_a_rank_and_the_committed_one_is_never_handed_out() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    first = keeper.held[at(keeper, 1)].shards[0]
    for step in range(2, 7):
        kept = keeper.held[at(keeper, step - 1)].shards[0]
        segment = keeper.begin(one(keeper), step, BUCKET_BYTES)
        assert segment is not kept and (kept.array == (16 * (step - 1)) % 256).all()
        segment.array[:] = (16 * step) % 256
        assert (kept.array == (16 * (step - 1)) % 256).all()
        keeper.complete(one(keeper), step, bucket_checksums(segment.array), {})
        assert (kept.array == (16 * (step - 1)) % 256).all()
        keeper.commit(at(keeper, step))
    assert first in keeper.pools[0] and len(keeper.pools[0]) == 2
    assert keeper.status()["slot_bytes"] == 2 * BUCKET_BYTES


def test_begin_waits_while_both_slots_are_needed_and_goes_on_at_the_commit() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    older = keeper.held[at(keeper, 1)].shards[0]
    write_all(keeper, 2)
    waiting = Waiting(keeper, lambda: keeper.begin(one(keeper), 3, BUCKET_BYTES))
    assert waiting.result is None
    keeper.commit(at(keeper, 2))
    assert waiting.end() is older


def test_begin_that_waits_ends_with_the_generation() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    write_all(keeper, 2)
    waiting = Waiting(keeper, lambda: keeper.begin(one(keeper), 3, BUCKET_BYTES))
    keeper.seal()
    with pytest.raises(StaleWriterError):
        waiting.end()


def test_a_pinned_snapshot_gets_a_third_slot_and_only_one() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    pinned = keeper.pin(at(keeper, 1))
    assert pinned is not None
    write_and_commit(keeper, 2)
    write_all(keeper, 3)  # slots: pinned, committed, this one
    assert len(keeper.pools[0]) == 3
    waiting = Waiting(keeper, lambda: keeper.begin(one(keeper), 4, BUCKET_BYTES))
    keeper.commit(at(keeper, 3))
    segment = waiting.end()
    assert segment is not pinned.shards[0] and (pinned.shards[0].array == 16).all()
    keeper.abort(one(keeper))
    keeper.unpin(pinned)
    with keeper.changed:
        assert keeper.changed.wait_for(lambda: at(keeper, 1) not in keeper.held, timeout=PATIENCE_S)
    write_and_commit(keeper, 4)
    write_and_commit(keeper, 5)
    assert len(keeper.pools[0]) == 2  # back to two


def test_a_pinned_snapshot_outlives_its_successor_and_goes_when_it_is_let_go() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    pinned = keeper.pin(at(keeper, 1))
    assert pinned is not None
    write_and_commit(keeper, 2)
    assert list(keeper.held) == [at(keeper, 2)] and keeper.doomed == [pinned]
    assert keeper.pin(at(keeper, 1)) is None
    write_and_commit(keeper, 3)  # in a third slot
    assert (pinned.shards[0].array == 16).all()
    assert len(keeper.pools[0]) == 3
    keeper.unpin(pinned)
    assert keeper.doomed == []
    write_and_commit(keeper, 4)
    assert len(keeper.pools[0]) == 2


def test_ranks_have_slots_of_their_own() -> None:
    keeper = opened()
    write_and_commit(keeper, 1, ranks=3)
    held = keeper.held[at(keeper, 1)]
    assert [int(held.shards[rank].array[0]) for rank in range(3)] == [16, 17, 18]
    assert len({id(s) for pool in keeper.pools.values() for s in pool}) == 6


def test_an_aborted_slot_is_handed_out_again() -> None:
    keeper = opened()
    segment = keeper.begin(one(keeper), 1, BUCKET_BYTES)
    keeper.abort(one(keeper))
    assert keeper.status()["phase"] == "idle"
    assert keeper.begin(one(keeper), 1, BUCKET_BYTES) is segment


def test_a_changed_layout_replaces_the_slots_and_keeps_the_committed_snapshot() -> None:
    keeper = opened()
    write_and_commit(keeper, 1, buckets=1)
    old = keeper.held[at(keeper, 1)].shards[0]
    write_all(keeper, 2, buckets=3)
    assert (old.array == 16).all() and old.fd >= 0
    keeper.commit(at(keeper, 2))
    write_and_commit(keeper, 3, buckets=3)
    assert {s.size_bytes for s in keeper.pools[0]} == {3 * BUCKET_BYTES}
    assert old.fd == -1 and keeper.status()["slot_bytes"] == 6 * BUCKET_BYTES


# --- what a worker may say -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -BUCKET_BYTES, 1, BUCKET_BYTES + 1, BUCKET_BYTES - 1])
def test_a_size_that_is_no_whole_number_of_buckets_is_refused(size: int) -> None:
    keeper = opened()
    with pytest.raises(ProtocolError, match="not a whole number of buckets"):
        keeper.begin(one(keeper), 1, size)
    write_and_commit(keeper, 1)


def test_steps_only_go_forward() -> None:
    keeper = opened()
    write_and_commit(keeper, 5)
    for step in (5, 4):
        with pytest.raises(ProtocolError, match=f"step {step} is not newer than the committed step 5"):
            keeper.begin(one(keeper), step, BUCKET_BYTES)
    write_all(keeper, 6)
    with pytest.raises(ProtocolError, match="rank 0 has already written step 6"):
        keeper.begin(one(keeper), 6, BUCKET_BYTES)


def test_a_step_may_be_taken_again_in_a_later_generation() -> None:
    keeper = opened()
    write_and_commit(keeper, 5)
    write_and_commit(keeper, 6)
    reopen(keeper)
    write_and_commit(keeper, 6)
    assert keeper.committed == at(keeper, 6) and keeper.generation == 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_checksums_must_be_as_many_as_buckets(count: int) -> None:
    keeper = opened()
    keeper.begin(one(keeper), 1, 2 * BUCKET_BYTES)
    with pytest.raises(ProtocolError, match="completed step 1, which it had not begun so"):
        keeper.complete(one(keeper), 1, np.zeros(count, np.uint32), {})
    assert at(keeper, 1) not in keeper.held


def test_only_what_was_begun_can_be_completed_and_only_once() -> None:
    keeper = opened()
    sums = bucket_checksums(data(1, 0))
    with pytest.raises(ProtocolError, match="had not begun"):
        keeper.complete(one(keeper), 1, sums, {})
    keeper.begin(one(keeper), 1, BUCKET_BYTES)
    with pytest.raises(ProtocolError, match="had not begun"):
        keeper.complete(one(keeper), 2, sums, {})
    with pytest.raises(ProtocolError, match="had not begun"):
        keeper.complete(one(keeper, rank=1), 1, sums, {})
    keeper.complete(one(keeper), 1, sums, {})
    with pytest.raises(ProtocolError, match="had not begun"):
        keeper.complete(one(keeper), 1, sums, {})


def test_data_is_complete_when_the_last_local_rank_is() -> None:
    keeper = opened()
    for rank in (2, 0, 1):
        assert not any(held.data_complete for held in keeper.held.values())
        write(keeper, Writer(rank, keeper.generation, 3, 3), 1, data(1, rank))
    assert keeper.held[at(keeper, 1)].data_complete


# --- generations -----------------------------------------------------------------------------------------------


def test_an_older_generation_may_do_nothing_any_more() -> None:
    keeper = opened()
    worker = one(keeper)
    keeper.begin(worker, 1, BUCKET_BYTES)
    reopen(keeper)
    attempts: list[Callable[[], Any]] = [
        lambda: keeper.join(worker),
        lambda: keeper.begin(worker, 2, BUCKET_BYTES),
        lambda: keeper.complete(worker, 1, np.zeros(1, np.uint32), {}),
    ]
    for attempt in attempts:
        with pytest.raises(StaleWriterError, match=r"generation 1 is over on node 'a' \(now 2\)"):
            attempt()
    assert keeper.held == {}


def test_a_future_generation_may_not_either() -> None:
    keeper = opened()
    with pytest.raises(StaleWriterError):
        keeper.begin(Writer(0, 2).worker(), 1, BUCKET_BYTES)


def test_a_slot_in_the_middle_of_being_written_is_free_again() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    segment = keeper.begin(one(keeper), 2, BUCKET_BYTES)
    segment.array[:] = 99
    reopen(keeper)
    assert list(keeper.held) == [SnapshotId(generation=1, step=1)]
    assert keeper.begin(one(keeper), 2, BUCKET_BYTES) is segment


def test_between_seal_and_open_nothing_changes() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    second = write_all(keeper, 2)
    keeper.begin(one(keeper, rank=1), 3, BUCKET_BYTES)
    told = keeper.seal()
    keeper.commit(second)  # a message that was on its way
    with pytest.raises(StaleWriterError):
        keeper.complete(one(keeper, rank=1), 3, np.zeros(1, np.uint32), {})
    assert [view.id.step for view in told] == [1, 2]
    assert sorted(keeper.held) == [view.id for view in told]
    assert keeper.status()["phase"] == "rendezvous"


def test_only_the_chosen_snapshot_is_kept() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    write_all(keeper, 2)
    decision = reopen(keeper)
    assert decision.snapshot == SnapshotId(generation=1, step=2)
    assert list(keeper.held) == [decision.snapshot]
    assert keeper.committed == decision.snapshot  # agreed upon by all nodes: as good as committed


def test_a_snapshot_of_another_position_is_dropped() -> None:
    keeper = opened(2)
    write_all(keeper, 1)
    view = replace(view_of(keeper), name="y")
    held = replace(view.held[0], parity=True, sizes={0: {0: BUCKET_BYTES}, 1: {1: BUCKET_BYTES}})
    # Somebody else holds position 0 of the same snapshot, more soundly.
    sounder = replace(view, name="a", held=(held,))
    decision = decide([sounder, replace(view, held=())])
    keeper.node = "y"
    keeper.open(decision, KEY)
    assert keeper.position == 1
    assert keeper.held[held.id].position == 1 and not keeper.held[held.id].data_complete


def test_the_nonce_is_new_for_every_generation() -> None:
    keeper = opened()
    seen = {keeper.nonce}
    for _ in range(3):
        reopen(keeper)
        seen.add(keeper.nonce)
    assert len(seen) == 4 and all(len(bytes.fromhex(nonce)) == 16 for nonce in seen)


# --- workers and fencing ---------------------------------------------------------------------------------------


def join(keeper: Keeper, rank: int, pid: int) -> Worker:
    worker = Worker(
        rank=rank,
        pid=pid,
        pidfd=os.pidfd_open(pid),
        generation=keeper.generation,
        local_world_size=2,
        world_size=2,
    )
    keeper.join(worker)
    return worker


def test_seal_ends_every_worker_even_a_stopped_one() -> None:
    keeper = opened()
    with sleepers(3) as processes:
        for rank, process in enumerate(processes[:2]):
            join(keeper, rank, process.pid)
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert [w["rank"] for w in keeper.status()["workers"]] == [0, 1]
        keeper.seal()
        assert [process.poll() for process in processes] == [-signal.SIGKILL, -signal.SIGKILL, None]
        assert keeper.workers == {} and keeper.status()["workers"] == []


def test_seal_does_not_mind_workers_that_have_gone() -> None:
    keeper = opened()
    with sleepers() as processes:
        join(keeper, 0, processes[0].pid)
        processes[0].kill()
        processes[0].wait()
        assert keeper.status()["workers"] == []
        keeper.seal()


def test_a_rank_has_one_worker_and_a_dead_one_may_be_replaced() -> None:
    keeper = opened()
    with sleepers(2) as processes:
        first = join(keeper, 0, processes[0].pid)
        with pytest.raises(ProtocolError, match=f"rank 0 is already here as process {first.pid}"):
            join(keeper, 0, processes[1].pid)
        assert keeper.workers == {0: first}
        processes[0].kill()
        processes[0].wait()
        second = join(keeper, 0, processes[1].pid)
        assert keeper.workers == {0: second}
        keeper.seal()


def test_slots_of_a_writer_that_would_not_die_are_never_believed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = opened()
    write_and_commit(keeper, 1, ranks=2)
    distrusted = keeper.pools[0].copy()
    trusted = keeper.pools[1].copy()
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    monkeypatch.setattr(fence, "end", functools.partial(fence.end, timeout=timedelta(milliseconds=20)))
    with sleepers() as processes:
        join(keeper, 0, processes[0].pid)
        assert keeper.seal() == []  # half of its data is suspect, so there is nothing to offer
        assert processes[0].poll() is None
    monkeypatch.undo()
    reopen(keeper)
    write_and_commit(keeper, 2, ranks=2)
    write_and_commit(keeper, 3, ranks=2)
    assert not {id(s) for s in distrusted} & {id(s) for s in keeper.pools[0]}
    assert {id(s) for s in trusted} & {id(s) for s in keeper.pools[1]}


# --- commit ----------------------------------------------------------------------------------------------------


def test_commit_drops_what_is_older_and_nothing_else() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    write_all(keeper, 2)
    assert sorted(i.step for i in keeper.held) == [1, 2]
    keeper.commit(at(keeper, 2))
    assert [i.step for i in keeper.held] == [2]
    keeper.commit(at(keeper, 1))  # late, and long gone
    keeper.commit(at(keeper, 9))  # never heard of
    assert keeper.committed == at(keeper, 2) and keeper.snapshots == 2


def test_a_snapshot_is_prepared_when_the_last_node_has_said_so_and_only_then() -> None:
    keeper = opened(3)
    snapshot = at(keeper, 1)
    assert [keeper.note_prepared(snapshot, p, {}) for p in (2, 2, 0, 0, 1, 1)] == [False] * 4 + [True, False]


def test_replicas_that_differ_on_one_node_are_refused() -> None:
    keeper = opened()
    write(keeper, Writer(0, 1, 2, 2), 1, data(1, 1), **{"0,1": 7})
    worker = Writer(1, 1, 2, 2).worker()
    keeper.begin(worker, 1, BUCKET_BYTES)
    with pytest.raises(DamageError, match="ranks 0,1 should hold the same"):
        keeper.complete(worker, 1, bucket_checksums(data(1, 1)), {"0,1": 8})
    assert not keeper.held[at(keeper, 1)].data_complete


def test_replicas_that_differ_between_nodes_are_never_committed() -> None:
    keeper = opened(3)
    snapshot = at(keeper, 1)
    assert not keeper.note_prepared(snapshot, 0, {"0,1": 7, "1,2": 5})
    assert not keeper.note_prepared(snapshot, 1, {"0,1": 8})
    assert not keeper.note_prepared(snapshot, 2, {"1,2": 5})
    assert not keeper.note_prepared(snapshot, 1, {"0,1": 8})
    with pytest.raises(DamageError, match=r"protect.*replicas=False"):
        keeper.begin(one(keeper), 2, BUCKET_BYTES)
    assert "0,1" in keeper.status()["trouble"]
    reopen(keeper, 3)
    keeper.begin(one(keeper), 2, BUCKET_BYTES)  # trouble ends with its generation


def test_replicas_that_agree_are() -> None:
    keeper = opened(2)
    assert not keeper.note_prepared(at(keeper, 1), 0, {"0,1": 7})
    assert keeper.note_prepared(at(keeper, 1), 1, {"0,1": 7})


def test_waiting_for_a_commit_ends_with_it_the_time_or_the_generation() -> None:
    keeper = opened()
    worker = one(keeper)
    patience = timedelta(seconds=PATIENCE_S)
    assert keeper.wait_committed(worker, 1, timedelta(0)) is False
    write_all(keeper, 1)
    waiting = Waiting(keeper, lambda: keeper.wait_committed(worker, 1, patience))
    keeper.commit(at(keeper, 1))
    assert waiting.end() is True
    assert keeper.wait_committed(worker, 1, timedelta(0)) is True
    waiting = Waiting(keeper, lambda: keeper.wait_committed(worker, 2, patience))
    reopen(keeper)
    assert waiting.end() is False
    assert keeper.wait_committed(worker, 1, patience) is False


# --- memory ----------------------------------------------------------------------------------------------------


def test_a_state_that_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = opened(3)  # (2, 1)
    size = 8 * BUCKET_BYTES  # two slots and as much again, halved, for parity: 24 MiB
    monkeypatch.setattr(keeper_module, "available_bytes", lambda: 23 * BUCKET_BYTES)
    with pytest.raises(SnapshotMemoryError) as raised:
        keeper.begin(one(keeper), 1, size)
    text = str(raised.value)
    for words in ("rank 0's state is 8.0 MiB", "(k=2, m=1) need 24.0 MiB", "23.0 MiB left", "7.7 MiB would fit"):
        assert words in text
    assert keeper.pools == {} and keeper.status()["slot_bytes"] == 0
    monkeypatch.setattr(keeper_module, "available_bytes", lambda: 24 * BUCKET_BYTES)
    keeper.begin(one(keeper), 1, size)
    monkeypatch.setattr(keeper_module, "available_bytes", lambda: 0)
    keeper.abort(one(keeper))
    keeper.begin(one(keeper), 1, size)  # what is there already needs no more


def test_memory_that_runs_out_halfway_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = opened()
    before = snapshot_memory()
    real, calls = os.posix_fallocate, [0]

    def second_fails(fd: int, offset: int, size: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        real(fd, offset, size)

    monkeypatch.setattr(slots_module.os, "posix_fallocate", second_fails)
    with pytest.raises(SnapshotMemoryError, match="No space left on device"):
        keeper.begin(one(keeper), 1, BUCKET_BYTES)
    monkeypatch.undo()
    assert snapshot_memory() == before
    write_and_commit(keeper, 1)


def test_parity_memory_is_reused_where_it_fits() -> None:
    keeper = opened(3)
    first = keeper.parity_memory(2, BUCKET_BYTES)
    keeper._spare(first, 2)
    second = keeper.parity_memory(1, BUCKET_BYTES)
    assert second[0] in first
    third = keeper.parity_memory(1, 2 * BUCKET_BYTES)
    assert third[0].size_bytes == 2 * BUCKET_BYTES
    assert [s.fd for s in first if s is not second[0]] == [-1]  # of the wrong size, and freed
    assert keeper.spare_parity == []


# --- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("offset", [0, BUCKET_BYTES // 2, BUCKET_BYTES - 1])
def test_a_flipped_bit_anywhere_is_told(bucket: int, offset: int) -> None:
    keeper = opened()
    for rank, buckets in enumerate((2, 3)):
        write(keeper, Writer(rank, 1, 2, 2), 1, data(buckets, rank))
    held = keeper.held[at(keeper, 1)]
    segment, at_byte = (held.shards[0], bucket) if bucket < 2 else (held.shards[1], bucket - 2)
    segment.array[at_byte * BUCKET_BYTES + offset] ^= 0x10
    (view,) = keeper.seal()
    assert view.damaged_data == (bucket,) and view.data
    assert keeper.status()["events"][-1]["kind"] == "damage"


def test_parity_is_verified_too() -> None:
    keeper = opened(3)
    write_all(keeper, 1)
    held = keeper.held[at(keeper, 1)]
    segment = Segment("parity", 3 * BUCKET_BYTES)
    held.parity, held.parity_checksums = [segment], [bucket_checksums(segment.array)]
    held.parity_complete = True
    segment.array[2 * BUCKET_BYTES] = 1
    (view,) = keeper.seal()
    assert view.damaged_parity == ((0, 2),) and view.damaged_data == ()


# --- looking ---------------------------------------------------------------------------------------------------


def test_status_is_plain_data_in_every_phase() -> None:
    keeper = Keeper(job="j", node="a", conf=PluginConfig())
    phases = [json.loads(json.dumps(keeper.status()))["phase"]]

    def look() -> None:
        phases.append(json.loads(json.dumps(keeper.status()))["phase"])

    reopen(keeper)
    look()
    keeper.begin(one(keeper), 1, BUCKET_BYTES)
    look()
    keeper.complete(one(keeper), 1, np.zeros(1, np.uint32), {})
    look()
    keeper.commit(at(keeper, 1))
    look()
    keeper.held[at(keeper, 1)].data_complete = False
    look()
    keeper.seal()
    look()
    assert phases == ["waiting", "idle", "copying", "parity", "idle", "recovering", "rendezvous"]


def test_events_are_few_and_the_newest() -> None:
    keeper = opened()
    for number in range(500):
        keeper.event("test", number=number)
    events = keeper.status()["events"]
    assert len(events) == 200 and events[-1]["number"] == 499


# --- any order of things ---------------------------------------------------------------------------------------


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


def test_trouble_reaches_those_who_wait() -> None:
    keeper = opened()
    write_and_commit(keeper, 1)
    write_all(keeper, 2)
    waiting = Waiting(keeper, lambda: keeper.begin(one(keeper), 3, BUCKET_BYTES))
    with keeper.changed:
        keeper.trouble = SnapshotError("the exchange failed")
        keeper.changed.notify_all()
    with pytest.raises(SnapshotError, match="the exchange failed"):
        waiting.end()
