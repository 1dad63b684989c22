# SPDX-License-Identifier: Apache-2.0
"""Parity and recovery between several nodes' snapshot processes, over real loopback TCP, byte for byte."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import reedsolo
from refound.ckpt.errors import DamageError
from refound.ckpt.exchange import Exchange
from refound.ckpt.held import Held
from refound.ckpt.recovery import Recovery
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import Cluster, wait_for, write

CODES = [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)]
# Buckets of each rank, by position: uneven, several ranks a node, and one node with little.
SHARDS: dict[int, Sequence[Sequence[int]]] = {
    2: [[2], [1, 2]],
    3: [[3], [1, 2], [5]],
    4: [[2, 2], [3], [1], [5, 1]],
    6: [[4], [1, 1], [6], [2, 3], [1], [5]],
}


@contextmanager
def protected(k: int, m: int, steps: int = 2) -> Iterator[Cluster]:
    """A cluster that has committed a few snapshots."""
    cluster = Cluster(k, m, SHARDS[k + m])
    try:
        cluster.open()
        for step in range(1, steps + 1):
            cluster.committed(cluster.snapshot(step))
        yield cluster
    finally:
        cluster.end()


def last(cluster: Cluster):
    return max(cluster.written)


def test_snapshots_many_steps_apart_are_protected_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before is still held when the next is done: doing it again would ask others for what they drop."""
    done: Counter[tuple[int, int]] = Counter()
    real = Exchange._protect

    def protect(self: Exchange, held: Held) -> None:
        done[held.position, held.id.step] += 1
        real(self, held)

    monkeypatch.setattr(Exchange, "_protect", protect)
    cluster = Cluster(2, 1, [[1]] * 3)
    try:
        cluster.open()
        steps = range(10, 200, 10)
        for step in steps:
            cluster.committed(cluster.snapshot(step))
    finally:
        cluster.end()
    assert done == Counter({(position, step): 1 for position in range(3) for step in steps})


@pytest.mark.parametrize(("k", "m"), CODES)
def test_every_stripe_is_a_codeword_of_reedsolo(k: int, m: int) -> None:
    codec = reedsolo.RSCodec(m, nsize=k + m, fcr=0, prim=0x11D)
    with protected(k, m) as cluster:
        snapshot = last(cluster)
        held = [node.held(snapshot) for node in cluster.nodes]
        size = held[0].chunk * BUCKET_BYTES
        vectors = []
        for position, ranks in enumerate(cluster.ranks):
            vector = np.concatenate([cluster.written[snapshot][rank] for rank in ranks])
            vectors.append(np.pad(vector, (0, k * size - len(vector))))
            assert held[position].parity_complete
        for stripe in held[0].group.stripes:
            symbols = []
            for member in stripe.data:
                chunk = held[0].group.data_stripes(member).index(stripe)
                symbols.append(vectors[member][chunk * size : (chunk + 1) * size])
            for member in stripe.parity:
                symbols.append(held[member].parity[held[0].group.parity_stripes(member).index(stripe)].array)
            for column in (0, 1, BUCKET_BYTES - 1, BUCKET_BYTES % size, size - 1):
                word = bytes(int(symbol[column]) for symbol in symbols)
                assert bytes(codec.encode(word[:k])) == word


@pytest.mark.parametrize(("k", "m"), CODES)
def test_every_loss_that_the_code_covers_is_rebuilt(k: int, m: int) -> None:
    patterns = [p for lost in range(1, m + 1) for p in itertools.combinations(range(k + m), lost)]
    with protected(k, m) as cluster:
        snapshot = last(cluster)
        parity = cluster.parity(snapshot)
        for pattern in patterns:
            cluster.replace(*pattern)
            decision = cluster.open()
            assert decision.source == "memory"
            assert decision.snapshot == snapshot
            cluster.check_data(snapshot)
            cluster.whole(snapshot)
            for found, expected in zip(cluster.parity(snapshot), parity, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("k", "m"), [(2, 1), (2, 2)])
def test_one_loss_too_many_is_not_restored(k: int, m: int) -> None:
    with protected(k, m) as cluster:
        cluster.replace(*range(m + 1))
        decision = cluster.open()
        assert decision.source == "start"
        assert "cannot be restored" in decision.notes[0]


@pytest.mark.parametrize("offset", [0, 12345, BUCKET_BYTES - 1])
@pytest.mark.parametrize("where", ["data", "parity"])
def test_a_flipped_byte_is_rebuilt_in_place(where: str, offset: int) -> None:
    with protected(2, 1) as cluster:
        snapshot = last(cluster)
        for position in range(3):
            parity = cluster.parity(snapshot)
            held = cluster.nodes[position].held(snapshot)
            segment = held.shards[cluster.ranks[position][-1]] if where == "data" else held.parity[0]
            at = (segment.size_bytes // BUCKET_BYTES - 1) * BUCKET_BYTES + offset
            segment.array[at] ^= 0x40
            assert cluster.open().snapshot == snapshot
            cluster.whole(snapshot)
            cluster.check_data(snapshot)
            assert all(np.array_equal(a[0], b[0]) for a, b in zip(cluster.parity(snapshot), parity, strict=True))


def test_memory_that_goes_bad_between_a_rebuild_and_its_proof_is_rebuilt_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a node with two ranks, in both of them. What it was rebuilt from is sound, so the step is not given up."""
    real, proofs = Recovery._prove_data, list[Recovery]()

    def prove(self: Recovery, rebuilt: list[int], tries_left: int) -> list[int]:
        if not proofs:
            for segment in self._held.shards.values():
                segment.array[7] ^= 0x10
        proofs.append(self)
        return real(self, rebuilt, tries_left)

    with protected(2, 1) as cluster:
        snapshot = last(cluster)
        cluster.replace(1)
        monkeypatch.setattr(Recovery, "_prove_data", prove)
        assert cluster.open().snapshot == snapshot
        cluster.whole(snapshot)
        cluster.check_data(snapshot)
        assert len(proofs) == 2 and len(proofs[0]._held.shards) == 2
        assert not cluster.nodes[1].keeper.given_up


def test_damage_in_different_buckets_on_all_nodes_is_rebuilt() -> None:
    """More damaged nodes than m, but no stripe is hit more than once in the same bucket."""
    with protected(2, 1) as cluster:
        snapshot = last(cluster)
        held = [node.held(snapshot) for node in cluster.nodes]
        held[0].shards[0].array[5] ^= 1  # bucket 0 of its vector
        held[2].shards[3].array[4 * BUCKET_BYTES] ^= 1  # bucket 4: another bucket of another chunk
        assert cluster.open().snapshot == snapshot
        cluster.whole(snapshot)
        cluster.check_data(snapshot)


def test_damage_while_parity_is_made_is_never_committed() -> None:
    """A byte changes after its worker took the checksum: the snapshot is not committed and the one before serves."""
    with protected(2, 1) as cluster:
        good = last(cluster)
        bad = cluster.snapshot(3, positions=[0, 1])
        keeper = cluster.nodes[0].keeper
        # Node 2 has not written yet, so no chunk of node 0 has been pulled.
        cluster.nodes[0].held(bad).shards[0].array[77] ^= 2
        cluster.snapshot(3, positions=[2])
        # Its first chunk belongs to stripe 1, whose parity node 1 computes.
        puller = cluster.nodes[1].keeper
        wait_for(puller, lambda: puller.trouble)
        assert isinstance(puller.trouble, DamageError)
        assert keeper.committed == good
        assert cluster.open().snapshot in (good, bad)
        restored = cluster.decision.snapshot if cluster.decision else None
        assert restored is not None
        cluster.check_data(restored)


def test_a_snapshot_that_only_some_have_written_is_not_what_a_restart_uses() -> None:
    with protected(2, 1) as cluster:
        good = last(cluster)
        cluster.snapshot(3, positions=[0, 2])
        cluster.replace(1)
        assert cluster.open().snapshot == good
        cluster.check_data(good)


def test_data_complete_everywhere_serves_even_before_parity() -> None:
    """All workers of all nodes are killed right after their copy: nothing is missing, so nothing is lost."""
    with protected(2, 1) as cluster:
        for node in cluster.nodes:
            node.keeper.on_seal.append(lambda: None)  # seal() must not depend on who listens
        cluster.snapshot(3, positions=[0, 1])
        views = [node.view() for node in cluster.nodes[:2]]
        writer = cluster.writer(2, 3)
        data = np.arange(5 * BUCKET_BYTES, dtype=np.uint64).astype(np.uint8)
        write(cluster.nodes[2].keeper, writer, 3, data)
        snapshot = max(held.id for view in views for held in view.held)
        cluster.written[snapshot][3] = data
        decision = cluster.open([*views, cluster.nodes[2].view()])
        assert decision.snapshot == snapshot
        cluster.check_data(snapshot)
        cluster.whole(snapshot)


def test_a_node_lost_while_another_recovers_is_recovered_too() -> None:
    with protected(2, 2) as cluster:
        snapshot = last(cluster)
        cluster.replace(1)
        cluster.open()
        cluster.replace(3)  # at once: whatever node 1 has rebuilt by now
        assert cluster.open().snapshot == snapshot
        cluster.check_data(snapshot)
        cluster.whole(snapshot)


def test_shards_of_other_nodes_are_read_through_ones_own() -> None:
    """What data-parallel ranks hold in common is saved in parts; each rank reads all of them."""
    with protected(2, 1) as cluster:
        snapshot = last(cluster)
        cluster.replace(1)
        cluster.open()
        for node in cluster.nodes:
            for rank, data in cluster.written[snapshot].items():
                assert np.array_equal(node.shard(rank), data)


def test_training_goes_on_committing_after_a_recovery() -> None:
    with protected(4, 2) as cluster:
        cluster.replace(0, 5)
        cluster.open()
        for step in (3, 4, 5):
            cluster.committed(cluster.snapshot(step))
        cluster.replace(2, 3)
        assert cluster.open().snapshot == last(cluster)
        cluster.check_data(last(cluster))
