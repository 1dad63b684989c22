# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf refused at snapshot time: by name, on all nodes, and the last good snapshot stays."""

import atexit
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from refound.ckpt.collect import Collector
from refound.ckpt.errors import NonFiniteStateError
from refound.ckpt.finite import first_nonfinite
from refound.ckpt.held import bucket_checksums
from refound.ckpt.link import Place
from refound.ckpt.protection import Protection
from refound.ckpt.shard import make_plan
from refound.ckpt.snapshotter import MOST_REFUSALS
from refound.ckpt.stripes import BUCKET_BYTES

from .alone import alone
from .cluster import Cluster, wait_for


def found(objects: dict[str, Any]) -> str | None:
    state = Collector(objects, rank=0).collect()
    return first_nonfinite(make_plan(state, 0, len(json.dumps(state.objects))), state.leaves)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_found_by_name(dtype: torch.dtype, value: float) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(30, 20) for name in ("a", "b")}).to(dtype)
    assert found({"model": model}) is None
    with torch.no_grad():
        model["b"].weight[19, 29] = value
    assert found({"model": model}) == "model/b.weight"


def test_sums_that_overflow_masks_and_integers_are_no_alarm() -> None:
    model = torch.nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.fill_(3e38)
    model.register_buffer("mask", torch.full((4,), -float("inf")))
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    assert found({"model": model}) is None


def test_optimizer_state_counts_too() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert found({"model": model, "optimizer": optimizer}) is None
    optimizer.state[model.bias]["exp_avg_sq"][1] = float("inf")
    assert found({"model": model, "optimizer": optimizer}) == "optimizer/state/1/exp_avg_sq"


# --- cluster-wide ----------------------------------------------------------------------------------------------


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    made: list[Cluster] = []
    yield made
    for cluster in made:
        cluster.end()


@pytest.mark.parametrize("objector", [0, 1, 2])
def test_what_one_rank_objects_to_is_committed_on_no_node(clusters: list[Cluster], objector: int) -> None:
    cluster = Cluster(2, 1, [[1], [2], [1]])
    clusters.append(cluster)
    cluster.open()
    good = cluster.snapshot(1)
    cluster.committed(good)
    for step in range(2, 8):  # more than there are slots: each is given back
        for position, node in enumerate(cluster.nodes):
            worker = cluster.writer(position, position).worker()
            size = cluster.shards[position][0] * BUCKET_BYTES
            segment = node.keeper.begin(worker, step, size)
            words = "model/w holds NaN" if position == objector else ""
            node.keeper.complete(worker, step, bucket_checksums(segment.array), {}, words)
        for node in cluster.nodes:
            wait_for(node.keeper, lambda k=node.keeper, s=step: k.skipped is not None and k.skipped.step == s)
            assert node.keeper.committed == good and node.keeper.trouble is None
    event = cluster.nodes[2].keeper.events[-1]
    assert (event["kind"], event["error"]) == ("not committed", "model/w holds NaN")
    after = cluster.snapshot(9)
    cluster.committed(after)
    assert cluster.open().snapshot == after
    cluster.check_data(after)


# --- in a training loop ----------------------------------------------------------------------------------------


def test_training_goes_on_and_stops_after_many_refusals(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with alone() as job:
        (link,) = job.links
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        place = Place(socket=str(job.path), job=job.job, generation=1, rank=0, world_size=1, local_world_size=1)
        monkeypatch.setattr("refound.ckpt.protection.Link", lambda _: link)
        training = Protection(
            {"model": model, "optimizer": optimizer}, every=1, replicas=True, place=place, refuse_nonfinite=True
        )

        def step() -> None:
            optimizer.step()
            training.end_step()
            training._wait()

        step()
        assert link.wait_committed(1, 60_000)
        good = model.weight.detach().clone()
        with torch.no_grad():
            model.weight[0, 0] = float("nan")
        step()
        assert "model/weight of rank 0 holds NaN or Inf at step 2" in capfd.readouterr().err
        assert not link.wait_committed(2, 60_000)  # at once, not after a minute
        with torch.no_grad():
            model.weight.copy_(good)
        step()
        assert link.wait_committed(3, 60_000)  # and counts anew
        with torch.no_grad():
            model.weight[0, 0] = float("inf")
        for _ in range(MOST_REFUSALS):
            step()
        with pytest.raises(NonFiniteStateError, match=f"as in the {MOST_REFUSALS} snapshots before"):
            step()
        atexit.unregister(training._at_exit)
