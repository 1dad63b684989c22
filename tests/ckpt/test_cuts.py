# SPDX-License-Identifier: Apache-2.0
"""Nodes that vanish at any byte of a parity exchange or a recovery, damage and loss together, and storms of both."""

import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from refound.ckpt import wire
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.errors import DamageError, SnapshotError, SnapshotMemoryError, StaleWriterError
from refound.ckpt.peers import Peers, read_message
from refound.ckpt.slots import Segment
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import Cluster, snapshot_memory, wait_for

SHARDS = {3: [[3], [1, 2], [5]], 4: [[2, 2], [3], [1], [5, 1]]}
# In and around a handshake (64 bytes), the first replies, and buckets of 1 MiB.
CUTS = [0, 1, 63, 64, 65, 110, 200, 400, 1 << 20, (1 << 20) + 200, (1 << 20) + 300, 5 << 19, 3 << 20, 5 << 20]


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    made: list[Cluster] = []
    yield made
    for cluster in made:
        cluster.end()


def started(clusters: list[Cluster], k: int, m: int, steps: int = 1, **conf: Any) -> Cluster:
    cluster = Cluster(k, m, SHARDS[k + m], **conf)
    clusters.append(cluster)
    cluster.open()
    for step in range(1, steps + 1):
        cluster.committed(cluster.snapshot(step))
    return cluster


def newest(cluster: Cluster) -> SnapshotId:
    return max(cluster.written)


def flip(cluster: Cluster, position: int, bucket: int, offset: int = 17) -> None:
    """Change a byte in a bucket of a node's vector."""
    held = cluster.nodes[position].held(newest(cluster))
    ((segment, first, _),) = held.data_views(bucket, 1)
    segment.array[first + offset] ^= 0x20


def same(found: list[list[np.ndarray]], expected: list[list[np.ndarray]]) -> bool:
    return all(np.array_equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


# --- vanishing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), [(2, 1), (2, 2)])
def test_a_node_that_vanishes_at_any_byte_of_an_exchange(clusters: list[Cluster], k: int, m: int) -> None:
    cluster = started(clusters, k, m)
    cuts = 0
    for step, (limit, lost) in enumerate(zip(CUTS, itertools.cycle(range(k + m)), strict=False), start=2):
        old = newest(cluster)
        views, gate = cluster.gated(lost, limit)
        assert cluster.open(views).snapshot == old
        new = cluster.snapshot(step)
        keepers = [node.keeper for node in cluster.nodes]
        for keeper in keepers:
            wait_for(keeper, lambda k=keeper, g=gate, n=new: g.is_cut or k.committed == n)
        cuts += gate.is_cut
        promised = any(keeper.committed == new for keeper in keepers)
        gate.cut()
        cluster.replace(lost)
        decision = cluster.open()
        assert decision.snapshot in ((new,) if promised else (old, new)), limit
        cluster.check_data(decision.snapshot)
        cluster.whole(decision.snapshot)
        cluster.committed(cluster.snapshot(step + 1))
    assert cuts >= len(CUTS) // 2


@pytest.mark.parametrize("helper", [1, 2, 3])
def test_a_node_that_vanishes_at_any_byte_of_a_recovery(clusters: list[Cluster], helper: int) -> None:
    cluster = started(clusters, 2, 2)
    snapshot = newest(cluster)
    parity = cluster.parity(snapshot)
    cuts = 0
    for limit in CUTS:
        cluster.replace(0)
        views, gate = cluster.gated(helper, limit)
        assert cluster.open(views).snapshot == snapshot
        newcomer = cluster.nodes[0]
        held, keeper = newcomer.held(snapshot), newcomer.keeper
        wait_for(keeper, lambda h=held, g=gate: g.is_cut or (h.data_complete and h.parity_complete))
        cuts += gate.is_cut
        gate.cut()
        cluster.replace(helper)
        assert cluster.open().snapshot == snapshot, limit
        cluster.check_data(snapshot)
        cluster.whole(snapshot)
        assert same(cluster.parity(snapshot), parity), limit
    assert cuts >= len(CUTS) // 2


def test_a_newcomer_that_is_lost_again_and_again(clusters: list[Cluster]) -> None:
    cluster = started(clusters, 2, 1)
    snapshot = newest(cluster)
    for _ in range(6):
        cluster.replace(1)
        assert cluster.open().snapshot == snapshot
    cluster.check_data(snapshot)
    cluster.whole(snapshot)
    cluster.committed(cluster.snapshot(9))


def test_an_exchange_that_is_cut_short_leaves_no_memory_behind(clusters: list[Cluster]) -> None:
    cluster = started(clusters, 2, 2, steps=3)
    before = snapshot_memory()
    for step in range(10, 16):
        cluster.snapshot(step, positions=[0, 1, 2])  # the fourth never comes, so no parity is ever complete
        cluster.open()
    cluster.committed(cluster.snapshot(20))
    cluster.committed(cluster.snapshot(21))
    wait_for(cluster.nodes[0].keeper, lambda: snapshot_memory() <= before)


def test_a_connection_made_while_the_generation_ends_is_not_used(
    clusters: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the thread would wait for a reply while the rendezvous waits for the thread."""
    cluster = started(clusters, 2, 1)
    assert cluster.decision is not None
    node = cluster.nodes[0]
    key = node.keeper.key
    assert key is not None
    peers = Peers(node.keeper, cluster.decision, key)
    real = wire.authenticate

    def and_then_it_ends(*args: Any, server: bool) -> None:
        real(*args, server=server)
        if not server:
            peers.close()

    monkeypatch.setattr(wire, "authenticate", and_then_it_ends)
    with pytest.raises(StaleWriterError):
        peers.request(1, read_message(newest(cluster), "data", 0, 0, 1))
    assert all(sock.fileno() == -1 for sock in peers._sockets.values())


# --- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), [(2, 1), (2, 2)])
def test_a_flipped_byte_in_any_data_bucket_is_rebuilt(clusters: list[Cluster], k: int, m: int) -> None:
    cluster = started(clusters, k, m)
    snapshot = newest(cluster)
    parity = cluster.parity(snapshot)
    for position, ranks in enumerate(SHARDS[k + m]):
        for bucket in range(sum(ranks)):
            flip(cluster, position, bucket, offset=(bucket * 100_003 + position) % BUCKET_BYTES)
            decision = cluster.open()
            assert decision.snapshot == snapshot
            assert decision.views[position].damaged_data == (bucket,)
            cluster.whole(snapshot)
            cluster.check_data(snapshot)
    assert same(cluster.parity(snapshot), parity)


def test_a_flipped_byte_in_any_parity_bucket_is_rebuilt(clusters: list[Cluster]) -> None:
    cluster = started(clusters, 2, 2)
    snapshot = newest(cluster)
    parity = cluster.parity(snapshot)
    for position in range(4):
        held = cluster.nodes[position].held(snapshot)
        for index, bucket in itertools.product(range(2), range(held.chunk)):
            held.parity[index].array[bucket * BUCKET_BYTES + 3] ^= 0x80
            decision = cluster.open()
            assert decision.views[position].damaged_parity == ((index, bucket),)
            cluster.whole(snapshot)
            assert same(cluster.parity(snapshot), parity)


@pytest.mark.parametrize(("lost", "damaged"), list(itertools.permutations(range(4), 2)))
def test_a_lost_node_and_damage_on_another(clusters: list[Cluster], lost: int, damaged: int) -> None:
    cluster = started(clusters, 2, 2)
    snapshot = newest(cluster)
    parity = cluster.parity(snapshot)
    buckets = sum(SHARDS[4][damaged])
    for bucket in {0, buckets // 2, buckets - 1}:
        flip(cluster, damaged, bucket)
    cluster.nodes[damaged].held(snapshot).parity[1].array[0] ^= 1
    cluster.replace(lost)
    assert cluster.open().snapshot == snapshot
    cluster.check_data(snapshot)
    cluster.whole(snapshot)
    assert same(cluster.parity(snapshot), parity)


def test_damage_of_many_buckets_on_all_nodes_is_rebuilt_where_stripes_allow_it(clusters: list[Cluster]) -> None:
    """Any set of damaged buckets is either rebuilt to the bit or refused; the agreement knows which."""
    rng = random.Random(5)
    outcomes = set()
    for _ in range(12):
        cluster = started(clusters, 2, 1)
        snapshot = newest(cluster)
        for _ in range(rng.randint(2, 5)):
            position = rng.randrange(3)
            flip(cluster, position, rng.randrange(sum(SHARDS[3][position])), rng.randrange(BUCKET_BYTES))
        decision = cluster.open()
        outcomes.add(decision.source)
        if decision.source == "memory":
            cluster.whole(snapshot)
            cluster.check_data(snapshot)
        else:
            assert "is lost or damaged on" in decision.notes[0]
        clusters.remove(cluster)
        cluster.end()
    assert outcomes == {"memory", "start"}


def test_another_nodes_shard_is_read_only_when_its_damage_is_mended(clusters: list[Cluster]) -> None:
    """What data-parallel ranks share is read from all of them, while some may still be rebuilding a bucket."""
    cluster = started(clusters, 2, 1)
    snapshot = newest(cluster)
    flip(cluster, 2, 1)
    views = cluster.views()
    repair = threading.Event()
    slow = cluster.nodes[2].process
    real = slow._rebuilder  # nothing of node 2 itself: its helpers wait
    for node in cluster.nodes[:2]:
        make = node.process._rebuilder
        node.process._server._rebuilder = lambda make=make: (repair.wait(60), make())[1]
    assert slow._rebuilder == real
    cluster.open(views)
    results: list[Any] = []

    def read() -> None:
        try:
            results.append(cluster.nodes[0].shard(3))
        except Exception as error:
            results.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    keeper = cluster.nodes[2].keeper
    wait_for(keeper, lambda: keeper.held[snapshot].damaged_data == {1})
    reader.join(0.3)
    assert results == []  # it waits rather than reads what is damaged
    repair.set()
    reader.join(60)
    assert np.array_equal(results[0], cluster.written[snapshot][3])


def test_parity_is_not_rebuilt_from_bytes_that_changed_since_they_were_verified(clusters: list[Cluster]) -> None:
    cluster = started(clusters, 2, 2)
    snapshot = newest(cluster)
    parity = cluster.parity(snapshot)
    cluster.nodes[0].held(snapshot).parity[0].array[:4] ^= 1  # bucket 0 of stripe 0, whose data nodes 2 and 3 hold
    views = cluster.views()
    flip(cluster, 2, 0)  # behind the back of the verification
    cluster.open(views)
    keeper = cluster.nodes[0].keeper
    wait_for(keeper, lambda: keeper.trouble or not keeper.held[snapshot].damaged_parity)
    assert keeper.trouble is not None and "checksum" in str(keeper.trouble)
    assert cluster.open().snapshot == snapshot  # the restart verifies anew and mends both
    cluster.whole(snapshot)
    cluster.check_data(snapshot)
    assert same(cluster.parity(snapshot), parity)


def test_trouble_in_the_exchange_ends_with_its_generation(clusters: list[Cluster]) -> None:
    cluster = started(clusters, 2, 1)
    good = newest(cluster)
    bad = cluster.snapshot(2, positions=[0, 1])
    cluster.nodes[0].held(bad).shards[0].array[77] ^= 2
    cluster.snapshot(2, positions=[2])
    puller = cluster.nodes[1].keeper
    wait_for(puller, lambda: puller.trouble)
    assert isinstance(puller.trouble, DamageError)
    with pytest.raises(DamageError):
        puller.begin(cluster.writer(1, 1).worker(), 3, BUCKET_BYTES)
    assert all(node.keeper.committed == good for node in cluster.nodes)
    decision = cluster.open()
    assert decision.snapshot is not None
    cluster.check_data(decision.snapshot)
    cluster.committed(cluster.snapshot(3))


def test_running_out_of_memory_is_said_and_a_restart_goes_on(
    clusters: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that died of it without a word would leave everybody waiting."""
    cluster = started(clusters, 2, 1)
    good = newest(cluster)
    keeper = cluster.nodes[1].keeper

    def full(*_: object) -> list[Segment]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "parity_memory", full)
        cluster.snapshot(2)
        wait_for(keeper, lambda: keeper.trouble)
        with pytest.raises(SnapshotMemoryError, match="ran out of memory"):
            keeper.begin(cluster.writer(1, 1).worker(), 3, BUCKET_BYTES)
        cluster.replace(1)
        keeper = cluster.nodes[1].keeper
        patch.setattr(keeper, "parity_memory", full)
        found = cluster.open().snapshot
        assert found is not None and found >= good  # step 2 may be whole enough by now
        wait_for(keeper, lambda: keeper.trouble)
    assert cluster.open().snapshot == found
    cluster.whole(found)
    cluster.check_data(found)


def test_replicas_that_differ_between_nodes_never_commit(clusters: list[Cluster]) -> None:
    from .cluster import write

    cluster = started(clusters, 2, 1)
    good = newest(cluster)
    for position, ranks in enumerate(cluster.ranks):
        for rank in ranks:
            data = np.zeros(BUCKET_BYTES, np.uint8)
            write(cluster.nodes[position].keeper, cluster.writer(position, rank), 2, data, **{"0,1": position // 2})
    lead = cluster.nodes[0].keeper
    wait_for(lead, lambda: lead.trouble)
    with pytest.raises(DamageError, match="ranks 0,1 should hold the same"):
        lead.begin(cluster.writer(0, 0).worker(), 3, BUCKET_BYTES)
    assert all(node.keeper.committed == good for node in cluster.nodes)


# --- strangers -------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_is_answered(clusters: list[Cluster]) -> None:
    cluster = started(clusters, 2, 1)
    assert cluster.decision is not None
    node = cluster.nodes[0]
    key = wire.generation_key("another secret", cluster.decision.nodes[0].nonce)
    stranger = Peers(node.keeper, cluster.decision, key)
    with pytest.raises(ConnectionError):
        stranger.post(1, read_message(newest(cluster), "data", 0, 0, 1))
    stranger.close()
    target = cluster.nodes[1].keeper
    wait_for(target, lambda: any(event["kind"] == "refused" for event in target.events))
    cluster.committed(cluster.snapshot(2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": "read", "kind": "data", "index": 0, "start": 0, "count": 65},
        {"op": "read", "kind": "nothing", "index": 0, "start": 0, "count": 1},
        {"op": "read", "kind": "parity", "index": 5, "start": 0, "count": 1},
        {"op": "read", "kind": "row", "index": 0, "start": 0, "count": 1},
        {"op": "read", "kind": "row", "index": 1, "start": 0, "count": 60},
        {"op": "read", "kind": "data", "index": 0, "start": -1, "count": 1},
        {"op": "read", "kind": "data", "index": 0, "start": True, "count": 1},
        {"op": "read", "kind": "data", "index": 0, "start": 0},
        {"op": "rebuild", "stripe": 0, "symbol": 0, "start": 0, "count": 1},
        {"op": "rebuild", "stripe": 99, "symbol": 0, "start": 0, "count": 1},
        {"op": "rebuild", "stripe": 0, "symbol": 99, "start": 0, "count": 1},
        {"op": "rebuild", "stripe": 0, "symbol": 0, "start": 0, "count": 0},
        {"op": "offer", "position": 0, "world_size": 1, "ranks": 7},
        {"op": "offer", "position": 0, "world_size": 1, "ranks": [[0, 1]]},
        {"op": "offer", "position": 0, "world_size": 1, "ranks": [[0, 1 << 20]]},
        {"op": "prepared", "position": 0, "replica_checks": []},
        {"op": "record", "position": 9},
        {"op": "persisted"},
        {"op": "dance"},
        {"op": None},
        {},
    ],
    ids=str,
)
def test_a_wrong_request_is_refused_in_words_and_the_next_is_answered(
    one_cluster: Cluster, wrong: dict[str, Any]
) -> None:
    assert one_cluster.decision is not None
    snapshot = newest(one_cluster)
    node = one_cluster.nodes[0]
    key = node.keeper.key
    assert key is not None
    peers = Peers(node.keeper, one_cluster.decision, key)
    place = {"generation": snapshot.generation, "step": snapshot.step}
    with pytest.raises(SnapshotError, match="node 'n1': "):
        peers.post(1, {**place, **wrong})
        peers.collect(1)
    _, body = peers.request(1, read_message(snapshot, "data", 0, 0, 1))
    assert np.array_equal(np.frombuffer(body, np.uint8), one_cluster.written[snapshot][1])
    for missing in ("in", "step"):
        with pytest.raises(SnapshotError, match="is not a count"):
            wire.send(peers._socket(1), {**read_message(snapshot, "data", 0, 0, 1), "in": 1, missing: None})
            peers.collect(1)
    peers.close()


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[Cluster]:
    cluster = Cluster(2, 1, SHARDS[3])
    cluster.open()
    cluster.committed(cluster.snapshot(1))
    yield cluster
    cluster.end()


def test_an_older_generation_is_told_to_wait(clusters: list[Cluster]) -> None:
    cluster = started(clusters, 2, 1)
    node, old = cluster.nodes[0], cluster.decision
    assert old is not None and node.keeper.key is not None
    peers = Peers(node.keeper, old, node.keeper.key)
    peers.post(1, read_message(newest(cluster), "data", 0, 0, 1))
    peers.collect(1)
    cluster.open()
    peers.post(1, read_message(newest(cluster), "data", 0, 0, 1))  # over the connection of before
    with pytest.raises(ConnectionError, match="generation 1 is over on node 'n1'"):
        peers.collect(1)
    peers.close()


# --- storms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m", "seed"), [(2, 1, 1), (2, 1, 2), (2, 2, 3), (2, 2, 4)])
def test_a_storm(clusters: list[Cluster], k: int, m: int, seed: int) -> None:
    """Whatever comes: what is restored is what was written, and what all nodes held whole survives m of them."""
    rng = random.Random(seed)
    cluster = started(clusters, k, m, seed=seed)
    step = 1
    for _ in range(14):
        decision = cluster.decision
        assert decision is not None
        safe = None
        for _ in range(rng.randrange(3)):
            step += 1
            cluster.committed(cluster.snapshot(step))
            safe = newest(cluster)
        if safe is None and decision.snapshot and rng.random() < 0.7:
            cluster.whole(decision.snapshot)
            safe = decision.snapshot
        if rng.random() < 0.5:  # and one that is still under way
            step += 1
            cluster.snapshot(step, rng.sample(range(k + m), rng.randint(1, k + m)))
        struck = rng.sample(range(k + m), rng.randint(0, m))
        for position in struck:
            if rng.random() < 0.5:
                cluster.replace(position)
            else:
                for held in cluster.nodes[position].keeper.in_memory():
                    for segment in (*held.shards.values(), *held.parity):
                        segment.array[rng.randrange(segment.size_bytes)] ^= rng.randint(1, 255)
        decision = cluster.open()
        if safe:
            assert decision.snapshot is not None and decision.snapshot >= safe, decision.notes
        if decision.snapshot:
            cluster.check_data(decision.snapshot)
    step += 1
    cluster.committed(cluster.snapshot(step))
