# SPDX-License-Identifier: Apache-2.0
"""A keeper's memory: slots, what does not fit, and damage that is told."""

import os

import pytest
from refound.ckpt import keeper as keeper_module
from refound.ckpt import slots as slots_module
from refound.ckpt.errors import (
    SnapshotMemoryError,
    StaleWriterError,
)
from refound.ckpt.held import bucket_checksums
from refound.ckpt.slots import Segment
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import PATIENCE_S, Writer, snapshot_memory, write
from .keepers import Waiting, at, data, one, opened, write_all, write_and_commit

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
