# SPDX-License-Identifier: Apache-2.0
"""What a plan says a code costs, against what snapshot processes hold and against the design's tables."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt import keeper as keeper_module
from refound.ckpt.costs import code_cost
from refound.ckpt.errors import SnapshotMemoryError
from refound.ckpt.stripes import BUCKET_BYTES, choose_groups

from .cluster import Cluster, wait_for


def memory_files() -> dict[int, int]:
    """Snapshot memory of this process, which all nodes of a `Cluster` live in: inode → bytes that are there."""
    files = {}
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and "memfd:refound-" in str(link.readlink()):
            stat = link.stat()
            files[stat.st_ino] = stat.st_blocks * 512
    return files


def held_bytes(cluster: Cluster) -> int:
    """What the nodes of a cluster hold; what other tests have left in this process is not theirs."""
    return sum(size for inode, size in memory_files().items() if inode not in cluster.not_ours)


def settled(cluster: Cluster) -> None:
    """Wait until everything but the committed snapshot has been dropped everywhere."""
    for node in cluster.nodes:
        wait_for(node.keeper, lambda k=node.keeper: len(k.held) == 1 and not k.fetched)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    k, m = request.param
    others = set(memory_files())
    made = Cluster(k, m, [[2 * k, k]] * (k + m))  # two ranks a node, of 2k and k buckets: D is 3k buckets
    made.not_ours = others
    made.open()
    yield made
    made.end()


@pytest.mark.parametrize("cluster", [(1, 1), (2, 1), (2, 2), (1, 2), (3, 2)], indirect=True)
def test_memory_is_what_snapshot_processes_hold(cluster: Cluster) -> None:
    nodes, k = len(cluster.nodes), cluster.conf.k
    cost = code_cost(choose_groups(nodes, k, cluster.conf.m), 3 * k * BUCKET_BYTES)
    for step in (1, 2, 3):
        snapshot = cluster.snapshot(step)
        cluster.committed(snapshot)
    settled(cluster)
    assert held_bytes(cluster) == nodes * cost.memory_bytes
    # As while a checkpoint is written: the snapshot is pinned and training goes on beside it.
    pinned = [node.keeper.pin(snapshot) for node in cluster.nodes]
    for step in (4, 5, 6):
        cluster.committed(cluster.snapshot(step))
    assert held_bytes(cluster) == nodes * cost.peak_bytes
    for node, held in zip(cluster.nodes, pinned, strict=True):
        assert held is not None
        node.keeper.unpin(held)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 2), (2, 1)])
def test_a_node_refuses_what_the_plan_says_does_not_fit(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    """By one byte; with one more it is taken."""
    cluster = Cluster(k, m, [[2 * k]] * (k + m))
    size_bytes = 2 * k * BUCKET_BYTES
    need = int(code_cost(choose_groups(k + m, k, m), size_bytes).memory_bytes)
    try:
        cluster.open()
        worker, keeper = cluster.writer(0, 0).worker(), cluster.nodes[0].keeper
        monkeypatch.setattr(keeper_module, "available_bytes", lambda: need - 1)
        with pytest.raises(SnapshotMemoryError):
            keeper.begin(worker, 1, size_bytes)
        monkeypatch.setattr(keeper_module, "available_bytes", lambda: need)
        assert keeper.begin(worker, 1, size_bytes).size_bytes == size_bytes
    finally:
        cluster.end()


def test_memory_of_one_node_without_parity() -> None:
    others = set(memory_files())
    cluster = Cluster(1, 0, [[4]])
    cluster.not_ours = others
    cluster.open()
    try:
        for step in (1, 2, 3):
            cluster.committed(cluster.snapshot(step))
        assert held_bytes(cluster) == code_cost(choose_groups(1), 4 * BUCKET_BYTES).memory_bytes == 8 * BUCKET_BYTES
    finally:
        cluster.end()


def design_rows(root: Path, heading: str) -> list[list[str]]:
    """Cells of the table under a heading of docs/design/001, a row for each code it names."""
    section = (root / "docs/design/001-erasure-layout.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if "|" in line]
    single = []
    for row in rows:
        for k, m in re.findall(r"\((\d+), (\d+)\)", row[0]):
            single.append([k, m, *row[1:]])
    return single


def test_network_of_a_snapshot_is_the_design_s(root: Path) -> None:
    rows = design_rows(root, "Parity: bytes a snapshot")
    assert len(rows) == 5
    for k, m, _, one_encodes in rows:
        cost = code_cost(choose_groups(int(k) + int(m), int(k), int(m)), 1.0)
        assert cost.network_bytes == pytest.approx(float(one_encodes), abs=0.0051), (k, m)


def test_network_of_a_recovery_is_the_design_s(root: Path) -> None:
    rows = design_rows(root, "Recovery: bytes until the newcomers are whole")
    assert len(rows) == 5
    for k, m, bound, _, _, helpers, _ in rows:
        cost = code_cost(choose_groups(int(k) + int(m), int(k), int(m)), 1.0)
        newcomer, helper = (float(each) for each in helpers.split("/"))
        assert cost.newcomer_bytes == pytest.approx(newcomer, abs=0.0051) == pytest.approx(float(bound), abs=0.0051)
        assert cost.helper_bytes == pytest.approx(helper, abs=0.0051), (k, m)


@given(k=st.integers(1, 12), m=st.integers(1, 5), node_bytes=st.floats(1.0, 1e13), factor=st.floats(1.0, 100.0))
def test_costs_are_linear_in_bytes_and_rise_with_parity(k: int, m: int, node_bytes: float, factor: float) -> None:
    def cost(m: int, node_bytes: float) -> list[float]:
        return list(vars(code_cost(choose_groups(k + m, k, m), node_bytes)).values())

    assert cost(m, factor * node_bytes) == pytest.approx([factor * each for each in cost(m, node_bytes)])
    assert cost(m + 1, node_bytes)[:4] > cost(m, node_bytes)[:4]


def test_no_parity_sends_nothing_and_mixed_groups_count_at_their_worst() -> None:
    alone = code_cost(choose_groups(4, 1, 0), 8.0)
    assert (alone.memory_bytes, alone.network_bytes, alone.newcomer_bytes, alone.helper_bytes) == (16.0, 0, 0, 0)
    mixed = choose_groups(13)
    assert {(group.k, group.m) for group in mixed} == {(5, 2), (4, 2)}
    assert code_cost(mixed, 1.0).memory_bytes == code_cost(choose_groups(6, 4, 2), 1.0).memory_bytes
    assert code_cost((), 1.0).peak_bytes == 0
