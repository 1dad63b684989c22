# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on storage: torn at every point, cut short, flipped, on a full disk."""

import json
import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from refound.ckpt import checkpoints
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.errors import DamageError, StaleWriterError
from refound.ckpt.examine import examine
from refound.ckpt.held import Held, ShardRecord, bucket_checksums
from refound.ckpt.slots import Segment
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import Cluster, wait_for

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


@pytest.fixture
def pairs() -> Iterator[list[list[Held]]]:
    """Three snapshots of one node without parity, or of two nodes with (k=1, m=1)."""
    cluster = Cluster(1, 1, [[1], [2]])
    cluster.open()
    made = []
    for step in (1, 2, 3):
        snapshot = cluster.snapshot(step)
        cluster.committed(snapshot)
        made.append([held for node in cluster.nodes if (held := node.keeper.pin(snapshot))])
    yield made
    cluster.end()


@pytest.mark.parametrize("with_parity", [False, True])
def test_a_crash_at_any_point_leaves_a_checkpoint_that_can_be_proven(
    tmp_path: Path, crash: list[int], pairs: list[list[Held]], with_parity: bool
) -> None:
    old, new, third = pairs if with_parity else [[held(step)] for step in (1, 2, 3)]

    def write_all(root: Path, parts: list[Held]) -> None:
        for part in parts:
            checkpoints.write_part(root, part)
        checkpoints.commit(root, parts[0].id, FACTS | {"nodes": len(parts)}, keep=1)

    survived = 0
    for point in range(200):
        root = tmp_path / str(point)
        crash[0] = -1
        write_all(root, old)
        crash[0] = point
        try:
            write_all(root, new)
        except _CrashError:
            survived += 1
        crashed, crash[0] = crash[0] == 0, -1
        listed = checkpoints.complete_checkpoints(root)
        assert listed, f"nothing is left after a crash at call {point}"
        for parts in (old, new):
            if parts[0].id in listed:
                assert examine(checkpoints.directory_of(root, parts[0].id)).is_sound
                for part in parts:
                    check(root, part)
        # What a crash has left does not stand in the way of the next checkpoint.
        write_all(root, third)
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


@pytest.mark.parametrize("name", ["COMMIT.json", "position-000000.json"])
@pytest.mark.parametrize("bit", [0x01, 0x02, 0x10])
def test_any_flipped_bit_of_the_small_files_is_found(tmp_path: Path, name: str, bit: int) -> None:
    snapshot = held(1)
    write(tmp_path, snapshot)
    path = checkpoints.directory_of(tmp_path, snapshot.id) / name
    good = path.read_bytes()
    facts = checkpoints.facts_of(tmp_path, snapshot.id)
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        try:
            assert checkpoints.facts_of(tmp_path, snapshot.id) == facts
            check(tmp_path, snapshot)
        except DamageError:
            continue
        assert name != "COMMIT.json", f"byte {at} of {good!r}"
    path.write_bytes(good)
    check(tmp_path, snapshot)


@pytest.mark.parametrize("name", ["COMMIT.json", "position-000000.json", "rank-000000.shard"])
def test_a_file_cut_anywhere_is_damage(tmp_path: Path, name: str) -> None:
    snapshot = held(1)
    write(tmp_path, snapshot)
    path = checkpoints.directory_of(tmp_path, snapshot.id) / name
    size = path.stat().st_size
    for length in sorted({0, 1, size // 2, size - 1}, reverse=True):
        os.truncate(path, length)
        with pytest.raises(DamageError):
            check(tmp_path, snapshot)
    path.unlink()
    with pytest.raises(DamageError):
        check(tmp_path, snapshot)


def test_a_file_with_bytes_to_spare_is_damage(tmp_path: Path) -> None:
    snapshot = held(1)
    write(tmp_path, snapshot)
    with (checkpoints.directory_of(tmp_path, snapshot.id) / "rank-000000.shard").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamageError):
        checkpoints.read_shard(tmp_path, snapshot.id, 0)


def test_reading_damage_leaves_no_memory_behind(tmp_path: Path) -> None:
    snapshot = held(1)
    write(tmp_path, snapshot)
    path = checkpoints.directory_of(tmp_path, snapshot.id) / "rank-000001.shard"
    path.write_bytes(bytes(2 * BUCKET_BYTES))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        with pytest.raises(DamageError):
            checkpoints.read_shard(tmp_path, snapshot.id, 1)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_crash_while_one_is_set_aside_never_costs_the_one_before(tmp_path: Path, crash: list[int]) -> None:
    good, bad = held(1), held(2)
    for point in range(20):
        root = tmp_path / str(point)
        crash[0] = -1
        write(root, good)
        write(root, bad)
        (checkpoints.directory_of(root, bad.id) / "rank-000000.shard").write_bytes(b"short")
        crash[0] = point
        try:
            checkpoints.set_aside(root, bad.id, "cut short")
        except _CrashError:
            crash[0] = -1
            if bad.id in checkpoints.complete_checkpoints(root):  # then it is tried again, found out again
                with pytest.raises(DamageError):
                    checkpoints.read_shard(root, bad.id, 0)
                checkpoints.set_aside(root, bad.id, "cut short")
        finished, crash[0] = crash[0] > 0, -1
        assert checkpoints.complete_checkpoints(root) == [good.id]
        check(root, good)
        if finished:
            return
    raise AssertionError("it never came to its end")


def test_all_ranks_that_find_the_damage_may_set_it_aside_at_once(tmp_path: Path) -> None:
    good, bad = held(1), held(2)
    write(tmp_path, good)
    write(tmp_path, bad)
    together = threading.Barrier(8)
    errors: list[BaseException] = []

    def find() -> None:
        try:
            together.wait(60)
            checkpoints.set_aside(tmp_path, bad.id, "rank 0 is cut short")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=find) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    # One who comes late, and now finds no commit file, does not hide what was found first.
    checkpoints.set_aside(tmp_path, bad.id, "COMMIT.json is unreadable")
    said = json.loads((checkpoints.directory_of(tmp_path, bad.id) / "DAMAGED.json").read_text())
    assert said == {"reason": "rank 0 is cut short"}
    assert checkpoints.complete_checkpoints(tmp_path) == [good.id]


def test_the_end_of_a_checkpoint_is_durable_before_its_parts_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure might bring the commit file back without them."""
    old, new = held(1), held(2)
    write(tmp_path, old, keep=1)
    calls: list[str] = []
    real_unlink, real_sync, real_rmtree = Path.unlink, checkpoints.sync_directory, checkpoints.shutil.rmtree

    def unlink(path: Path, missing_ok: bool = False) -> None:
        calls.append(f"unlink {path.name}")
        real_unlink(path, missing_ok)

    def sync(path: Path) -> None:
        calls.append(f"sync {path.name}")
        real_sync(path)

    def rmtree(path: Path, **more: bool) -> None:
        calls.append(f"rmtree {path.name}")
        real_rmtree(path, **more)

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(checkpoints, "sync_directory", sync)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", rmtree)
    write(tmp_path, new, keep=1)
    name = checkpoints.directory_of(tmp_path, old.id).name
    assert calls[-3:] == ["unlink COMMIT.json", f"sync {name}", f"rmtree {name}"]


# --- by the snapshot processes ---------------------------------------------------------------------------------

SHARDS = [[1], [1, 1], [2]]


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    made: list[Cluster] = []
    yield made
    for cluster in made:
        cluster.end()


def writing_cluster(clusters: list[Cluster], root: Path, every: int = 1) -> Cluster:
    cluster = Cluster(2, 1, SHARDS, checkpoint_dir=str(root), checkpoint_every_steps=every, checkpoint_every_s=0.0)
    clusters.append(cluster)
    cluster.open()
    return cluster


def on_disk(cluster: Cluster, step: int) -> SnapshotId:
    """Take a snapshot and wait for its checkpoint."""
    snapshot = cluster.snapshot(step)
    cluster.committed(snapshot)
    lead = cluster.nodes[0].keeper
    wait_for(lead, lambda: (lead.checkpoint or {}).get("step") == step)
    return snapshot


def events(cluster: Cluster, kind: str) -> list[dict[str, object]]:
    return [event for node in cluster.nodes for event in node.keeper.events if event["kind"] == kind]


def test_the_loss_of_all_memory_goes_back_to_the_disk(clusters: list[Cluster], tmp_path: Path) -> None:
    cluster = writing_cluster(clusters, tmp_path, every=2)
    cluster.committed(cluster.snapshot(1))
    saved = on_disk(cluster, 2)
    cluster.committed(cluster.snapshot(3))
    assert checkpoints.complete_checkpoints(tmp_path) == [saved]
    cluster.replace(0, 1, 2)
    decision = cluster.open()
    assert (decision.source, decision.snapshot) == ("disk", saved)
    cluster.check_data(saved)
    assert [node.process._current_restore().facts()["source"] for node in cluster.nodes] == ["disk"] * 3
    # And on: what is taken now is newer than the checkpoint, in memory and on disk.
    newer = on_disk(cluster, 4)
    assert newer > saved and checkpoints.complete_checkpoints(tmp_path) == [saved, newer]
    assert cluster.open().source == "memory"


def test_memory_that_is_newer_is_used_and_the_disk_is_not_read(clusters: list[Cluster], tmp_path: Path) -> None:
    cluster = writing_cluster(clusters, tmp_path, every=2)
    saved = on_disk(cluster, 2)
    cluster.committed(cluster.snapshot(3))
    (checkpoints.directory_of(tmp_path, saved) / "rank-000000.shard").unlink()
    cluster.replace(1)
    assert cluster.open().source == "memory"
    cluster.check_data(max(cluster.written))


@pytest.mark.parametrize("names", [["COMMIT.json"], ["rank-000001.shard", "rank-000003.shard"]])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_serves(
    clusters: list[Cluster], tmp_path: Path, names: list[str]
) -> None:
    cluster = writing_cluster(clusters, tmp_path)
    before, damaged = on_disk(cluster, 1), on_disk(cluster, 2)
    cluster.replace(0, 1, 2)
    for name in names:
        (checkpoints.directory_of(tmp_path, damaged) / name).write_bytes(b"short")
    assert cluster.open().snapshot == damaged
    restore = cluster.nodes[1].process._current_restore()
    with pytest.raises(DamageError, match="set aside; the restart goes on from the one before it"):
        restore.facts()
        restore.shard(1)
    assert len(events(cluster, "checkpoint damaged")) == 1
    assert cluster.open().snapshot == before
    cluster.check_data(before)


@pytest.mark.parametrize("name", ["position-000001.json", "rank-000002.shard", "parity-000000-00.shard"])
def test_a_checkpoint_with_a_damaged_file_is_restored_through_its_parity(
    clusters: list[Cluster], tmp_path: Path, name: str
) -> None:
    cluster = writing_cluster(clusters, tmp_path)
    on_disk(cluster, 1)
    damaged = on_disk(cluster, 2)
    cluster.replace(0, 1, 2)
    flip(checkpoints.directory_of(tmp_path, damaged) / name)
    assert cluster.open().snapshot == damaged
    cluster.check_data(damaged)
    assert len(events(cluster, "checkpoint rebuilt")) == (name == "rank-000002.shard")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_part_that_cannot_be_written_costs_that_checkpoint_only(clusters: list[Cluster], tmp_path: Path) -> None:
    cluster = writing_cluster(clusters, tmp_path)
    first = on_disk(cluster, 1)
    unlucky = cluster.nodes[2].keeper
    conf = unlucky.conf
    (tmp_path / "file").write_text("")
    unlucky.conf = replace(conf, checkpoint_dir=str(tmp_path / "file"))
    second = cluster.snapshot(2)
    cluster.committed(second)
    lead = cluster.nodes[0].keeper
    wait_for(lead, lambda: any(event["kind"] == "checkpoint failed" for event in lead.events))
    assert [e["step"] for e in unlucky.events if e["kind"] == "checkpoint failed"] == [2]
    unlucky.conf = conf
    wait_for(lead, lambda: not checkpoints.directory_of(tmp_path, second).exists())
    assert checkpoints.complete_checkpoints(tmp_path) == [first]
    third = on_disk(cluster, 3)
    assert checkpoints.complete_checkpoints(tmp_path) == [first, third]
    for node in cluster.nodes:
        node.process._writer.drain(60)
    assert lead.trouble is None


def test_a_checkpoint_whose_generation_ends_is_none_and_the_next_is(clusters: list[Cluster], tmp_path: Path) -> None:
    cluster = writing_cluster(clusters, tmp_path)
    views = cluster.views()
    cluster.open(views)
    lead = cluster.nodes[0]
    reports: list[int] = []
    lead.process._writer.note_part = lambda *_, **__: reports.append(1)  # the last report is lost on its way
    lead.process._server._persisted = lambda *_, **__: reports.append(1)
    lost = cluster.snapshot(1)
    cluster.committed(lost)
    wait_for(lead.keeper, lambda: len(reports) == 3)
    assert checkpoints.complete_checkpoints(tmp_path) == []
    del lead.process._writer.note_part
    lead.process._server._persisted = lead.process._writer.note_part
    assert cluster.open().snapshot == lost
    done = on_disk(cluster, 2)
    assert checkpoints.complete_checkpoints(tmp_path) == [done]
    assert not checkpoints.directory_of(tmp_path, lost).exists()  # the remains have gone with it


def test_a_shard_that_arrives_after_its_generation_is_not_the_next_ones(
    clusters: list[Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = writing_cluster(clusters, tmp_path)
    old = on_disk(cluster, 1)
    cluster.replace(0, 1, 2)
    cluster.open()
    real = checkpoints.read_shard

    def slow(*args: object) -> object:
        found = real(*args)  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(checkpoints, "read_shard", real)
        cluster.open()
        return found

    monkeypatch.setattr(checkpoints, "read_shard", slow)
    with pytest.raises(StaleWriterError):
        cluster.nodes[0].shard(0)
    assert cluster.nodes[0].keeper.fetched == {}
    cluster.check_data(old)
