# SPDX-License-Identifier: Apache-2.0
"""Checkpoints mended from their parity: any m files lost, damage anywhere, a crash at any point of the repair."""

import itertools
import json
import os
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.ckpt import checkpoints
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.errors import ConfigError, DamageError
from refound.ckpt.examine import examine, find_checkpoints
from refound.ckpt.held import pack_record
from refound.ckpt.repair import repair
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import Cluster

SHARDS = {1: [[2], [1, 1], [3]], 2: [[2, 1], [3], [1], [4, 1]]}
Content = dict[str, bytes]


def content(path: Path) -> Content:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """m → a checkpoint written by real snapshot processes' parts, with parity for m losses."""
    made = {}
    for m, shards in SHARDS.items():
        cluster = Cluster(2, m, shards, seed=m)
        cluster.open()
        snapshot = cluster.snapshot(7)
        cluster.committed(snapshot)
        root = tmp_path_factory.mktemp(f"m{m}")
        for node in cluster.nodes:
            checkpoints.write_part(root, node.held(snapshot), "job")
        facts = {"world_size": sum(map(len, shards)), "nodes": len(shards), "job": "job"}
        made[m] = checkpoints.commit(root, snapshot, facts, keep=2)
        cluster.end()
    return made


@pytest.fixture
def copies(originals: dict[int, Path], tmp_path: Path) -> Iterator[dict[int, Path]]:
    yield {m: Path(shutil.copytree(path, tmp_path / str(m) / path.name)) for m, path in originals.items()}


def flip(file: Path, bucket: int, offset: int = 5) -> None:
    data = bytearray(file.read_bytes())
    data[bucket * BUCKET_BYTES + offset] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("m", [1, 2])
def test_what_was_written_is_sound(copies: dict[int, Path], m: int) -> None:
    found = examine(copies[m])
    assert found.is_sound and not found.can_be_repaired and found.code == (2, m)
    assert found.files == len(content(copies[m]))
    assert repair(copies[m]).written == ()


@pytest.mark.parametrize("m", [1, 2])
def test_any_m_files_may_be_lost_and_come_back_as_they_were(copies: dict[int, Path], m: int) -> None:
    path, before = copies[m], content(copies[m])
    pairs = list(itertools.combinations(before, m))
    for lost in random.Random(m).sample(pairs, min(len(pairs), 30)):
        for name in lost:
            (path / name).unlink()
        if "COMMIT.json" in lost:
            (path / "DAMAGED.json").write_text('{"reason": "test"}')  # else it never was a checkpoint
        found = examine(path)
        assert {damage.name for damage in found.damage} >= set(lost)
        assert found.can_be_repaired, found.not_covered
        done = repair(path)
        assert done.after.is_sound and set(done.written) >= set(lost)
        assert content(path) == before, lost


def test_one_file_more_is_refused_and_nothing_is_touched(copies: dict[int, Path]) -> None:
    path = copies[1]
    for rank in (0, 3):
        (path / f"rank-{rank:06d}.shard").unlink()
    before = content(path)
    found = examine(path)
    assert not found.can_be_repaired and "covers 1" in found.not_covered
    with pytest.raises(DamageError, match="cannot be repaired: 2 files lack the same place"):
        repair(path)
    assert content(path) == before


ALL_NAMES = {
    m: [
        *(f"rank-{rank:06d}.shard" for rank in range(sum(map(len, shards)))),
        *(f"parity-{p:06d}-{i:02d}.shard" for p in range(len(shards)) for i in range(m)),
        *(f"position-{p:06d}.json" for p in range(len(shards))),
        "COMMIT.json",
    ]
    for m, shards in SHARDS.items()
}


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_damage_is_mended_whole_or_refused_untouched(
    originals: dict[int, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    m = data.draw(st.sampled_from([1, 2]))
    path = tmp_path_factory.mktemp("damage") / originals[m].name
    shutil.copytree(originals[m], path)
    good = content(path)
    for name in data.draw(st.lists(st.sampled_from(ALL_NAMES[m]), max_size=4, unique=True)):
        size = len(good[name])
        how = data.draw(st.sampled_from(["flip", "cut", "grow"] + ["lose"] * (name != "COMMIT.json")))
        if how == "lose":
            (path / name).unlink()
        elif how == "flip":
            changed = bytearray(good[name])
            changed[data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
            (path / name).write_bytes(changed)
        elif how == "cut":
            os.truncate(path / name, data.draw(st.integers(0, size - 1)))
        else:
            (path / name).write_bytes(good[name] + b"more")
    damaged = content(path)
    found = examine(path)
    bad = {name for name in good if damaged.get(name) != good[name]} - _harmless(good, damaged)
    if {name for name in good if name.startswith("position-")} <= bad:
        assert not found.is_sound and not found.can_be_repaired  # nobody knows any more what should be there
    else:
        assert {damage.name for damage in found.damage} >= bad
    if found.is_sound or found.can_be_repaired:
        repair(path)
        mended = content(path)
        assert {n: b for n, b in mended.items() if n not in _harmless(good, mended)} == {
            n: b for n, b in good.items() if n not in _harmless(good, mended)
        }
    else:
        with pytest.raises(DamageError):
            repair(path)
        assert content(path) == damaged
    shutil.rmtree(path)


def _harmless(good: Content, damaged: Content) -> set[str]:
    """Small files that say the same in other bytes (a space for a space's kin): not damage."""
    same = set()
    for name in good:
        if name.endswith(".json") and name in damaged and damaged[name] != good[name]:
            try:
                if json.loads(damaged[name]) == json.loads(good[name]):
                    same.add(name)
            except ValueError:
                continue
    return same


@pytest.mark.parametrize("m", [1, 2])
def test_damage_in_different_places_of_more_than_m_files(copies: dict[int, Path], m: int) -> None:
    """What counts is how many symbols of one stripe are bad at one bucket, not how many files."""
    path, before = copies[m], content(copies[m])
    flip(path / "rank-000000.shard", 0)
    flip(path / "rank-000000.shard", 1)
    flip(path / "parity-000000-00.shard", 1)
    flip(path / f"parity-00000{m}-00.shard", 0)
    assert len(examine(path).damage) == 3
    if examine(path).can_be_repaired:
        repair(path)
        assert content(path) == before
    else:
        assert "lack the same place" in examine(path).not_covered


def test_a_damaged_shard_is_read_through_its_parity(copies: dict[int, Path]) -> None:
    path = copies[1]
    good = content(path)
    snapshot = SnapshotId(generation=1, step=7)
    flip(path / "rank-000003.shard", 1)
    os.truncate(path / "rank-000003.shard", 2 * BUCKET_BYTES)
    (path / "position-000002.json").unlink()
    told: list[str] = []
    segment, record = checkpoints.read_shard(path.parent, snapshot, 3, told.append)
    assert segment.array.tobytes() == good["rank-000003.shard"] and record.size_bytes == 3 * BUCKET_BYTES
    assert len(told) == 1 and "2 buckets were rebuilt from parity" in told[0]
    flip(path / "rank-000000.shard", 1)
    flip(path / "rank-000001.shard", 0)
    flip(path / "rank-000002.shard", 0)
    with pytest.raises(DamageError, match=r"covers 1"):
        checkpoints.read_shard(path.parent, snapshot, 3)


def test_one_set_aside_is_a_checkpoint_again_when_repaired(copies: dict[int, Path]) -> None:
    path, before = copies[2], content(copies[2])
    snapshot = SnapshotId(generation=1, step=7)
    flip(path / "rank-000001.shard", 0)
    checkpoints.set_aside(path.parent, snapshot, "a flipped bit")
    assert checkpoints.complete_checkpoints(path.parent) == []
    found = examine(path)
    assert found.state == "set aside" and found.can_be_repaired
    assert "(a flipped bit)" in found.damage[-1].problem
    repair(path)
    assert checkpoints.complete_checkpoints(path.parent) == [snapshot] and content(path) == before


class _CrashError(Exception):
    """The power fails here."""


def test_a_crash_at_any_point_of_a_repair_loses_nothing(
    copies: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches storage counts down; the one that finds 0 never happens, nor any after it."""
    path, good = copies[2], content(copies[2])
    left = [-1]

    def counted(real):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise _CrashError
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    survived = 0
    for point in range(60):
        left[0] = -1
        root = tmp_path / f"crash-{point}"
        shutil.copytree(path, root / path.name)
        damaged = root / path.name
        flip(damaged / "rank-000003.shard", 0)
        flip(damaged / "parity-000001-01.shard", 0)
        damaged.joinpath("position-000000.json").unlink()
        damaged.joinpath("COMMIT.json").write_text("{}")
        left[0] = point
        try:
            repair(damaged)
        except _CrashError:
            survived += 1
        crashed, left[0] = left[0] == 0, -1
        repair(damaged)
        assert content(damaged) == good
        shutil.rmtree(root)
        if not crashed:
            break
    assert survived > 10 and point < 59


def test_a_disk_without_room_changes_nothing(copies: dict[int, Path]) -> None:
    path = copies[1]
    flip(path / "rank-000003.shard", 0)
    before = content(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BUCKET_BYTES, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            repair(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(path) == before


def test_a_crash_while_one_is_written_leaves_nothing_that_counts(originals: dict[int, Path], tmp_path: Path) -> None:
    """Without its last file it is none, whatever is there, and a repair does not make it one."""
    path = Path(shutil.copytree(originals[1], tmp_path / originals[1].name))
    (path / "COMMIT.json").unlink()
    with pytest.raises(ConfigError, match="never completed"):
        find_checkpoints(path)
    with pytest.raises(ConfigError, match="holds none"):
        find_checkpoints(tmp_path)


def test_one_of_an_earlier_version_is_read_and_looked_at_but_not_repaired(copies: dict[int, Path]) -> None:
    path = copies[1]
    from refound.ckpt.folder import Folder

    for position, manifest in Folder(path).manifests.items():
        ranks, sums = pack_record(manifest.own)
        text = json.dumps({"format": 1, "ranks": ranks, "crc32c": sums.hex()})
        (path / f"position-{position:06d}.json").write_text(text)
        (path / f"parity-{position:06d}-00.shard").unlink()
    good = content(path)
    assert examine(path).is_sound and examine(path).code is None
    segment, _ = checkpoints.read_shard(path.parent, SnapshotId(generation=1, step=7), 3)
    assert np.array_equal(segment.array, np.frombuffer(good["rank-000003.shard"], np.uint8))
    flip(path / "rank-000003.shard", 2)
    assert [damage.buckets for damage in examine(path).damage] == [(2,)]
    with pytest.raises(DamageError, match="without parity"):
        repair(path)
    with pytest.raises(DamageError, match="1 of 3 buckets fail"):
        checkpoints.read_shard(path.parent, SnapshotId(generation=1, step=7), 3)


def test_a_wrong_path_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "is no chec"),
    ):
        with pytest.raises(ConfigError, match=words) as raised:
            find_checkpoints(path)
        assert "\n" not in str(raised.value)
