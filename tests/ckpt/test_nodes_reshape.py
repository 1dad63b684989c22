# SPDX-License-Identifier: Apache-2.0
"""A snapshot of some nodes on fewer or more of them, over real loopback TCP, byte for byte."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.plugin import create_handler
from refound.ckpt.stripes import BUCKET_BYTES
from torch.distributed.elastic.rendezvous import RendezvousParameters

from .cluster import Cluster, Node, snapshot_memory

SHARDS: Sequence[Sequence[int]] = [[3], [1, 2], [5], [2, 2]]


@contextmanager
def taken(nodes: int, m: int = 1) -> Iterator[tuple[Cluster, SnapshotId]]:
    """A cluster that has committed two snapshots. Its code is chosen from the number of nodes unless m is 2."""
    cluster = Cluster(nodes - m, 0 if m == 1 else m, SHARDS[:nodes])
    try:
        cluster.open()
        cluster.committed(cluster.snapshot(1))
        snapshot = cluster.snapshot(2)
        cluster.committed(snapshot)
        yield cluster, snapshot
    finally:
        cluster.end()


def change(cluster: Cluster, *, lost: Sequence[int] = (), new: int = 0, shards: Sequence[Sequence[int]]) -> None:
    """Other nodes, and other ranks on them: what a smaller or larger job is."""
    for position in lost:
        cluster.nodes[position].die()
    kept = [node for position, node in enumerate(cluster.nodes) if position not in lost]
    names = [f"n{cluster.named + i}" for i in range(new)]
    cluster.named += new
    cluster.nodes = [*kept, *(Node(cluster.job, name, cluster.conf) for name in names)]
    cluster.shards = [list(ranks) for ranks in shards]
    firsts = np.cumsum([0, *map(len, shards)]).tolist()
    cluster.ranks = [range(low, high) for low, high in itertools.pairwise(firsts)]
    assert len(cluster.nodes) == len(shards)


def check_readable(cluster: Cluster, snapshot: SnapshotId) -> None:
    """Every node can read every rank's old shard, and single buckets of it."""
    for node in cluster.nodes:
        restore = node.process._current_restore()
        for rank, data in cluster.written[snapshot].items():
            last = len(data) // BUCKET_BYTES - 1
            segment, _ = restore.shard(rank, [range(last, last + 7)])
            assert np.array_equal(segment.array[last * BUCKET_BYTES :], data[last * BUCKET_BYTES :])
            assert np.array_equal(node.shard(rank), data), (node.name, rank)


@pytest.mark.parametrize("lost", [[0], [1], [2]])
def test_three_nodes_go_on_as_two_and_as_three_again(lost: list[int]) -> None:
    with taken(3) as (cluster, snapshot):
        change(cluster, lost=lost, shards=[[4], [4, 1]])
        decision = cluster.open()
        assert (decision.source, decision.snapshot) == ("memory", snapshot)
        check_readable(cluster, snapshot)
        check_readable(cluster, snapshot)
        newer = cluster.snapshot(3)
        cluster.committed(newer)
        cluster.whole(newer)
        # Two are protected by each other as three were.
        cluster.replace(0)
        assert cluster.open().snapshot == newer
        cluster.check_data(newer)
        cluster.whole(newer)
        change(cluster, new=1, shards=SHARDS[:3])
        assert cluster.open().snapshot == newer
        check_readable(cluster, newer)
        last = cluster.snapshot(4)
        cluster.committed(last)
        cluster.replace(2)
        assert cluster.open().snapshot == last
        cluster.check_data(last)


def test_two_lost_of_four_and_a_stranger_in_their_stead() -> None:
    with taken(4, m=2) as (cluster, snapshot):
        cluster.conf = cluster.nodes[0].keeper.conf = cluster.nodes[3].keeper.conf = type(cluster.conf)()
        change(cluster, lost=[1, 2], new=1, shards=[[4], [4, 1], [2]])
        decision = cluster.open()
        assert (decision.source, decision.snapshot) == ("memory", snapshot)
        check_readable(cluster, snapshot)
        cluster.committed(cluster.snapshot(3))


def test_damage_on_top_of_fewer_nodes_is_healed_where_parity_covers_it() -> None:
    with taken(3) as (cluster, snapshot):
        cluster.nodes[0].held(snapshot).shards[0].array[5] ^= 1
        change(cluster, new=1, shards=[[4], [4, 1], [2], [1]])
        assert cluster.open().snapshot == snapshot
        check_readable(cluster, snapshot)


def test_the_old_snapshot_stays_until_the_first_of_the_new_shape_is_committed() -> None:
    with taken(3) as (cluster, snapshot):
        change(cluster, lost=[1], shards=[[4], [4, 1]])
        cluster.open()
        part = cluster.snapshot(3, positions=[0])  # one of the two has not finished it
        change(cluster, new=1, shards=SHARDS[:3])
        decision = cluster.open()
        assert decision.snapshot == snapshot != part
        check_readable(cluster, snapshot)


def test_one_node_too_many_lost_is_not_restored() -> None:
    with taken(3) as (cluster, _):
        change(cluster, lost=[1, 2], shards=[[4]])
        decision = cluster.open()
        assert decision.source == "start" and "2 of 3 nodes are without it" in decision.notes[0]


def test_memory_of_ranks_that_live_elsewhere_now_is_given_back() -> None:
    before = snapshot_memory()
    with taken(3) as (cluster, _):
        change(cluster, lost=[2], shards=[[4], [4]])
        cluster.open()
        for step in (3, 4, 5):
            cluster.committed(cluster.snapshot(step))
        # Two slots a rank and, with (1, 1), parity for the newest and for the one to come.
        pools = [sorted(node.keeper.pools) for node in cluster.nodes]
        assert [[rank for rank in ranks if cluster.nodes[p].keeper.pools[rank]] for p, ranks in enumerate(pools)] == [
            [0],
            [1],
        ]
    assert snapshot_memory() == before


def test_a_code_that_some_number_of_nodes_cannot_have_is_refused_at_the_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parameters = RendezvousParameters("refound", "127.0.0.1:0", "range", 2, 4, local_addr="127.0.0.1", k="1", m="1")
    with pytest.raises(SystemExit) as ended:
        create_handler(parameters)
    assert ended.value.code == 2
    assert "k=1,m=1 needs a multiple of 2 nodes and this job has 3" in capsys.readouterr().err
