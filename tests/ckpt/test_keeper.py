# SPDX-License-Identifier: Apache-2.0
"""The rules by which one node's state changes: what workers may say, generations, commit."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from refound.ckpt.agreement import SnapshotId, decide
from refound.ckpt.conf import PluginConfig
from refound.ckpt.errors import (
    DamageError,
    ProtocolError,
    SnapshotError,
    StaleWriterError,
)
from refound.ckpt.held import bucket_checksums
from refound.ckpt.keeper import Keeper
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import PATIENCE_S, Writer, write
from .keepers import KEY, Waiting, at, data, one, opened, reopen, view_of, write_all, write_and_commit

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
