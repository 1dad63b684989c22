# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on storage: torn at every point, cut short, flipped, on a full disk."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from refound.ckpt import checkpoints
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.errors import DamageError
from refound.ckpt.held import Held, ShardRecord, bucket_checksums
from refound.ckpt.slots import Segment
from refound.ckpt.stripes import BUCKET_BYTES

FACTS = {"world_size": 2, "nodes": 1, "job": "test"}


def held(step: int, generation: int = 1) -> Held:
    """A committed snapshot of two ranks on one node."""
    found = Held(SnapshotId(generation=generation, step=step), position=0, nodes=1, world_size=2, k=0, m=-1)
    for rank in range(2):
        segment = Segment(f"rank{rank}", (1 + rank) * BUCKET_BYTES)
        segment.array[:] = np.random.default_rng(step * 10 + rank).integers(0, 256, segment.size_bytes, np.uint8)
        found.shards[rank] = segment
        found.own[rank] = ShardRecord(size_bytes=segment.size_bytes, checksums=bucket_checksums(segment.array))
    found.data_complete = True
    return found


def write(root: Path, snapshot: Held, keep: int = 2) -> None:
    checkpoints.write_part(root, snapshot)
    checkpoints.commit(root, snapshot.id, FACTS, keep)


def check(root: Path, snapshot: Held) -> None:
    """It reads back as it was."""
    assert checkpoints.facts_of(root, snapshot.id)["world_size"] == 2
    for rank, segment in snapshot.shards.items():
        found, _ = checkpoints.read_shard(root, snapshot.id, rank)
        assert np.array_equal(found.array, segment.array)


def test_what_is_written_reads_back_and_old_ones_go(tmp_path: Path) -> None:
    snapshots = [held(step) for step in (1, 2, 3)]
    for snapshot in snapshots:
        write(tmp_path, snapshot)
    assert checkpoints.complete_checkpoints(tmp_path) == [snapshots[1].id, snapshots[2].id]
    check(tmp_path, snapshots[2])


def test_a_part_without_its_commit_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, held(1))
    checkpoints.write_part(tmp_path, held(2))
    assert [found.step for found in checkpoints.complete_checkpoints(tmp_path)] == [1]
    checkpoints.discard(tmp_path, held(2).id)
    assert not checkpoints.directory_of(tmp_path, held(2).id).exists()
    assert checkpoints.complete_checkpoints(tmp_path / "none") == []


class _CrashError(Exception):
    """The power fails here."""


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every call that touches storage counts down `left`; the one that finds 0 never happens, nor any after it."""
    left = [-1]

    def counted(real):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise _CrashError
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "open")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", counted(checkpoints.shutil.rmtree))
    yield left
    left[0] = -1


def test_a_crash_at_any_point_leaves_a_checkpoint_that_can_be_proven(tmp_path: Path, crash: list[int]) -> None:
    old, new = held(1), held(2)
    survived = 0
    for point in range(200):
        root = tmp_path / str(point)
        crash[0] = -1
        write(root, old, keep=1)
        crash[0] = point
        try:
            write(root, new, keep=1)
        except _CrashError:
            survived += 1
        crashed, crash[0] = crash[0] == 0, -1
        listed = checkpoints.complete_checkpoints(root)
        assert listed, f"nothing is left after a crash at call {point}"
        for snapshot in (old, new):
            if snapshot.id in listed:
                check(root, snapshot)
        # What a crash has left does not stand in the way of the next checkpoint.
        write(root, held(3), keep=1)
        assert checkpoints.complete_checkpoints(root)[-1].step == 3
        if not crashed:
            break
    assert survived > 10, "no crash happened"
    assert point < 199


@pytest.mark.parametrize("at", [0, BUCKET_BYTES - 1, BUCKET_BYTES, 2 * BUCKET_BYTES - 1])
def test_a_flipped_byte_is_found_and_the_checkpoint_set_aside(tmp_path: Path, at: int) -> None:
    good, bad = held(1), held(2)
    write(tmp_path, good)
    write(tmp_path, bad)
    path = checkpoints.directory_of(tmp_path, bad.id) / "rank-000001.shard"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=r"1 of 2 buckets fail"):
        checkpoints.read_shard(tmp_path, bad.id, 1)
    checkpoints.set_aside(tmp_path, bad.id, "flipped")
    assert checkpoints.complete_checkpoints(tmp_path) == [good.id]
    assert path.exists()
    write(tmp_path, held(3), keep=1)
    assert path.exists()  # for a look


def test_a_file_cut_short_says_how_much_is_there(tmp_path: Path) -> None:
    snapshot = held(1)
    write(tmp_path, snapshot)
    path = checkpoints.directory_of(tmp_path, snapshot.id) / "rank-000001.shard"
    os.truncate(path, BUCKET_BYTES)
    with pytest.raises(DamageError, match=r"1\.0 MiB of 2\.0 MiB: it was cut short"):
        checkpoints.read_shard(tmp_path, snapshot.id, 1)
    path.unlink()
    with pytest.raises(DamageError, match="could not be read"):
        checkpoints.read_shard(tmp_path, snapshot.id, 1)
    with pytest.raises(DamageError, match="no record of rank 7"):
        checkpoints.read_shard(tmp_path, snapshot.id, 7)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2, "step": 1, "world_size": 2}', '{"format": 1, "step": 9}']
)
def test_an_unreadable_commit_file_is_damage(tmp_path: Path, text: str) -> None:
    snapshot = held(1)
    write(tmp_path, snapshot)
    (checkpoints.directory_of(tmp_path, snapshot.id) / "COMMIT.json").write_text(text)
    with pytest.raises(DamageError, match="unreadable"):
        checkpoints.facts_of(tmp_path, snapshot.id)


def test_an_unreadable_record_is_damage(tmp_path: Path) -> None:
    snapshot = held(1)
    write(tmp_path, snapshot)
    (checkpoints.directory_of(tmp_path, snapshot.id) / "position-000000.json").write_text('{"ranks": 3}')
    with pytest.raises(DamageError, match="unreadable"):
        checkpoints.read_shard(tmp_path, snapshot.id, 0)


def test_a_disk_without_room_costs_that_checkpoint_only(tmp_path: Path) -> None:
    """Room for 1.5 MiB a file, where rank 1 needs 2."""
    first, second = held(1), held(2)
    write(tmp_path, first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * BUCKET_BYTES // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.write_part(tmp_path, second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.discard(tmp_path, second.id)
    assert checkpoints.complete_checkpoints(tmp_path) == [first.id]
    check(tmp_path, first)
