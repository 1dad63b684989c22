# SPDX-License-Identifier: Apache-2.0
"""`refound verify` and `refound repair` as they are typed: what they say, their JSON and their exit codes."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from refound.ckpt import checkpoints
from refound.ckpt.inspection import Inspection
from refound.ckpt.stripes import BUCKET_BYTES
from refound.cli import main
from refound.integrity import _of_memory

from .ckpt.alone import alone
from .ckpt.cluster import Cluster


def refound(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cluster = Cluster(2, 1, [[2], [1], [1, 1]])
    cluster.open()
    snapshot = cluster.snapshot(5)
    cluster.committed(snapshot)
    root = tmp_path_factory.mktemp("job")
    for node in cluster.nodes:
        checkpoints.write_part(root, node.held(snapshot), "job")
    yield checkpoints.commit(root, snapshot, {"world_size": 4, "nodes": 3, "job": "job"}, keep=2)
    cluster.end()


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def test_a_sound_checkpoint(path: Path) -> None:
    for target in (path, path.parent):
        done = refound("verify", target)
        assert done.exit_code == 0 and done.output.startswith("sound  ")
        assert "step 5, 11 files, 8.0 MiB read, parity (k=2, m=1)" in done.output
    done = refound("repair", path)
    assert done.exit_code == 0 and "Nothing to do" in done.output


def test_damage_that_parity_covers_is_told_and_mended(path: Path) -> None:
    os.truncate(path / "rank-000000.shard", 3)
    done = refound("verify", path)
    assert done.exit_code == 3
    assert "rank-000000.shard: 3 B of 2.0 MiB" in done.output and f"refound repair {path}" in done.output
    said = json.loads(refound("verify", path, "--json").stdout)
    assert said["sound"] is False and said["checked"][0]["can_be_repaired"] is True
    assert said["checked"][0]["details"]["damaged"][0]["buckets"] == [0, 1]
    done = refound("repair", path, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["written"] == ["rank-000000.shard"] and json.loads(done.stdout)["sound"] is True
    assert refound("verify", path).exit_code == 0


def test_damage_that_parity_does_not_cover(path: Path) -> None:
    for rank in (0, 3):
        (path / f"rank-{rank:06d}.shard").unlink()
    done = refound("verify", path)
    assert done.exit_code == 3 and "cannot be repaired: 2 files lack the same place" in done.output
    done = refound("repair", path)
    assert done.exit_code == 3 and len(done.output.strip().splitlines()) == 1


def test_a_wrong_target_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, code in (
        (["verify", tmp_path / "none"], 2),
        (["verify", tmp_path / "file"], 2),
        (["verify", tmp_path], 2),
        (["verify", "no-such-job"], 2),
        (["repair", tmp_path / "none"], 2),
        (["repair", tmp_path], 2),
    ):
        done = refound(*words)
        assert (done.exit_code, len(done.output.strip().splitlines())) == (code, 1), done.output


def test_several_checkpoints_are_all_verified_and_repair_wants_one(path: Path) -> None:
    shutil.copytree(path, path.parent / "step-000000000006-g000001")  # its files say step 5
    done = refound("verify", path.parent)
    assert done.exit_code == 3 and done.output.count("\nDAMAGED") == 1
    done = refound("repair", path.parent)
    assert done.exit_code == 2 and "name one of" in done.output


def test_no_memory_to_check() -> None:
    done = refound("verify")
    assert done.exit_code == 0 and "No snapshot process runs" in done.output


def test_memory_is_checked_while_the_job_goes_on() -> None:
    with alone() as job:
        data = np.arange(3 * BUCKET_BYTES, dtype=np.uint8)
        job.snapshot(1, data)
        for target in ([], [job.job]):
            done = refound("verify", *target)
            assert done.exit_code == 0 and "step 1, committed, 3.0 MiB of data and parity checked" in done.output
        job.slot.array[2 * BUCKET_BYTES + 9] ^= 1  # what a bad memory cell does
        done = refound("verify", job.job, "--json")
        said = json.loads(done.stdout)["checked"][0]
        assert (done.exit_code, said["details"]["damaged_data"], said["can_be_repaired"]) == (3, [2], False)
        job.snapshot(2, data)
        assert refound("verify", job.job).exit_code == 0


def test_damage_in_memory_is_weighed_over_the_nodes() -> None:
    cluster = Cluster(2, 1, [[2], [1], [1, 1]])
    try:
        cluster.open()
        snapshot = cluster.snapshot(1)
        cluster.committed(snapshot)
        inspections = [Inspection(node.keeper) for node in cluster.nodes]

        def verdicts() -> list[tuple[bool, bool]]:
            said = json.loads(json.dumps([inspection.verify() for inspection in inspections]))
            return [(v.is_sound, v.can_be_repaired) for v in _of_memory(said)]

        assert verdicts() == [(True, False)] * 3
        cluster.nodes[1].held(snapshot).shards[1].array[3] ^= 4
        assert verdicts() == [(True, False), (False, True), (True, False)]
        cluster.nodes[2].held(snapshot).shards[2].array[3] ^= 4
        assert verdicts() == [(True, False), (False, False), (False, False)]
    finally:
        cluster.end()
