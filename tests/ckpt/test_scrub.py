# SPDX-License-Identifier: Apache-2.0
"""Bad memory found and mended while the generation goes on; and a step that cannot be restored, never tried twice."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.errors import DamageError
from refound.ckpt.held import bucket_checksums

from .cluster import Cluster, Node, wait_for

SHARDS = {3: [[3], [1, 2], [5]], 4: [[2, 2], [3], [1], [5, 1]]}


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    made: list[Cluster] = []
    yield made
    for cluster in made:
        cluster.end()


def scrubbing(clusters: list[Cluster], m: int, rate: float = 1e6) -> tuple[Cluster, SnapshotId]:
    cluster = Cluster(2, m, SHARDS[2 + m], scrub_mb_s=rate)
    clusters.append(cluster)
    cluster.open()
    snapshot = cluster.snapshot(1)
    cluster.committed(snapshot)
    return cluster, snapshot


def flip(node: Node, snapshot: SnapshotId, bucket: int, offset: int = 17) -> None:
    """Change a byte in a bucket of a node's vector, as a bad memory cell does."""
    ((segment, first, _),) = node.held(snapshot).data_views(bucket, 1)
    segment.array[first + offset] ^= 0x20


def bad_memory(node: Node) -> list[dict[str, object]]:
    return [event for event in node.keeper.events if event["kind"] == "bad memory"]


@pytest.mark.parametrize("m", [1, 2])
def test_bad_memory_is_mended_while_the_job_goes_on(clusters: list[Cluster], m: int) -> None:
    cluster, snapshot = scrubbing(clusters, m)
    parity = cluster.parity(snapshot)
    generation = cluster.generation
    for position, node in enumerate(cluster.nodes):
        buckets = sum(cluster.shards[position])
        for bucket in range(buckets):
            flip(node, snapshot, bucket, offset=bucket)
        for index in range(m):
            node.held(snapshot).parity[index].array[99] ^= 1
        wait_for(node.keeper, lambda k=node.keeper, n=buckets + m: k.scrub["mended"] == n)
        assert len(bad_memory(node)) == buckets + m and node.keeper.scrub["failed"] == 0
    found = cluster.parity(snapshot)
    assert all(np.array_equal(a, b) for x, y in zip(found, parity, strict=True) for a, b in zip(x, y, strict=True))
    for position, node in enumerate(cluster.nodes):
        for rank in cluster.ranks[position]:
            assert np.array_equal(node.held(snapshot).shards[rank].array, cluster.written[snapshot][rank])
    assert cluster.generation == generation
    cluster.committed(cluster.snapshot(2))  # in the very same generation
    assert [node.keeper.seal()[-1].damaged_data for node in cluster.nodes] == [()] * (2 + m)


def test_what_is_bad_on_too_many_nodes_is_said_once_and_replaced_by_the_next_snapshot(clusters: list[Cluster]) -> None:
    cluster, snapshot = scrubbing(clusters, 1)
    for keeper in (node.keeper for node in cluster.nodes):
        keeper.changed.acquire()  # no scrubber mends one before the other is bad
    flip(cluster.nodes[0], snapshot, 0)
    flip(cluster.nodes[1], snapshot, 0)
    flip(cluster.nodes[2], snapshot, 0)
    for keeper in (node.keeper for node in cluster.nodes):
        keeper.changed.release()
    keepers = [node.keeper for node in cluster.nodes]
    for keeper in keepers:
        before = keeper.scrub["passes"]
        wait_for(keeper, lambda k=keeper, b=before: k.scrub["passes"] >= b + 2)
    failed = [keeper.scrub["failed"] for keeper in keepers]
    assert sum(failed) >= 2 and max(failed) == 1  # said once, however many walks
    assert all(keeper.trouble is None for keeper in keepers)
    newer = cluster.snapshot(2)
    cluster.committed(newer)
    assert cluster.open().snapshot == newer
    cluster.check_data(newer)


def test_without_parity_it_is_only_said(clusters: list[Cluster]) -> None:
    cluster = Cluster(1, 0, [[2]], scrub_mb_s=1e6)
    clusters.append(cluster)
    cluster.open()
    snapshot = cluster.snapshot(1)
    cluster.committed(snapshot)
    flip(cluster.nodes[0], snapshot, 1)
    keeper = cluster.nodes[0].keeper
    wait_for(keeper, lambda: keeper.scrub["failed"])
    (event,) = bad_memory(cluster.nodes[0])
    assert event["mended"] is False and "no parity" in str(event["error"]) and event["what"] == "bucket 1 of the data"


def test_zero_turns_it_off_and_a_slow_one_does_not_hold_a_rendezvous_up(clusters: list[Cluster]) -> None:
    for rate in (0.0, 1e-6):  # a year for a bucket
        cluster, snapshot = scrubbing(clusters, 1, rate)
        flip(cluster.nodes[0], snapshot, 2)
        assert cluster.open().snapshot == snapshot
        cluster.whole(snapshot)
        cluster.check_data(snapshot)
        assert all(node.keeper.scrub["mended"] == 0 for node in cluster.nodes)


def test_it_costs_no_third_slot(clusters: list[Cluster]) -> None:
    cluster, snapshot = scrubbing(clusters, 1, rate=1.0)  # a second for a bucket: always in the middle of a walk
    for step in range(2, 30):
        snapshot = cluster.snapshot(step)
        cluster.committed(snapshot)
    for node in cluster.nodes:
        assert {len(pool) for pool in node.keeper.pools.values()} == {2}
        assert node.keeper.scrub == {"passes": 0, "mended": 0, "failed": 0} and not bad_memory(node)


def test_a_storm_of_bad_bits_during_snapshots_never_makes_a_false_one(clusters: list[Cluster]) -> None:
    cluster, snapshot = scrubbing(clusters, 2)
    rng = np.random.default_rng(5)
    for step in range(2, 12):
        node = cluster.nodes[int(rng.integers(4))]
        with node.keeper.changed:
            held = node.keeper.held.get(snapshot)
        if held is not None:
            rank = int(rng.choice(list(held.shards)))
            at = int(rng.integers(held.shards[rank].size_bytes))
            held.shards[rank].array[at] ^= 1
        snapshot = cluster.snapshot(step)
        cluster.committed(snapshot)
    decision = cluster.open()
    assert decision.snapshot == snapshot
    cluster.check_data(snapshot)


# --- never twice -----------------------------------------------------------------------------------------------


def test_a_step_whose_parity_is_wrong_is_tried_once_and_the_next_tier_serves(
    clusters: list[Cluster], tmp_path: Path
) -> None:
    """What no checksum shows: parity that was computed wrong. The data rebuilt from it fails its own checksum."""
    conf = {"checkpoint_dir": str(tmp_path), "checkpoint_every_steps": 1, "checkpoint_every_s": 0.0}
    cluster = Cluster(2, 1, SHARDS[3], **conf)
    clusters.append(cluster)
    cluster.open()
    snapshot = cluster.snapshot(1)
    cluster.committed(snapshot)
    lead = cluster.nodes[0].keeper
    wait_for(lead, lambda: lead.checkpoint)
    for node in cluster.nodes[:2]:  # a fault of arithmetic, not of memory: the checksums are those of the wrong bytes
        held = node.held(snapshot)
        held.parity[0].array[:] ^= 1
        held.parity_checksums[0] = bucket_checksums(held.parity[0].array)
    cluster.replace(2)
    assert cluster.open().snapshot == snapshot
    newcomer = cluster.nodes[2].keeper
    wait_for(newcomer, lambda: newcomer.trouble)
    assert isinstance(newcomer.trouble, DamageError) and list(newcomer.given_up) == [snapshot]
    decision = cluster.open()
    assert (decision.source, decision.snapshot) == ("disk", snapshot)
    assert "was tried and could not be restored" in decision.notes[0]
    cluster.check_data(snapshot)
    # And never again, however often the nodes meet.
    assert cluster.open().source == "disk"


def test_a_snapshot_that_a_worker_cannot_use_is_passed_over(clusters: list[Cluster]) -> None:
    cluster, snapshot = scrubbing(clusters, 1)
    assert cluster.open().snapshot == snapshot
    restore = cluster.nodes[1].process._current_restore()
    restore.reject("its description holds an unknown tag")
    restore.reject("said twice")
    events = [event for event in cluster.nodes[1].keeper.events if event["kind"] == "given up"]
    assert [event["error"] for event in events] == ["its description holds an unknown tag"]
    decision = cluster.open()
    assert decision.source == "start" and "was tried" in decision.notes[0]
    newer = cluster.snapshot(1)
    cluster.committed(newer)
    assert cluster.open().snapshot == newer  # another generation's step 1 is another snapshot
