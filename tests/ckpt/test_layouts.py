# SPDX-License-Identifier: Apache-2.0
"""Who holds what: meshes of every shape, without their processes (torch's fake process group stands for the others).

What the ranks then save and restore together is shown by the jobs of test_frameworks.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from refound.ckpt.collect import Collector, State
from refound.ckpt.shard import make_plan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD = 4


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))


def mesh_of(*names: str) -> DeviceMesh:
    """Named after the rank too: torch keeps meshes for good and finds them by name, with the rank they were made on."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=tuple(f"{name}{dist.get_rank()}" for name in names))


def hsdp() -> torch.nn.Module:
    return fully_shard(network(), mesh=mesh_of("replicate", "shard"))


def tensor_parallel_fsdp() -> torch.nn.Module:
    mesh = mesh_of("data", "tensor")
    names = mesh.mesh_dim_names
    assert names is not None
    model = parallelize_module(network(), mesh[names[1]], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh[names[0]])


def tensor_parallel() -> torch.nn.Module:
    mesh = mesh_of("data", "tensor")
    names = mesh.mesh_dim_names
    assert names is not None
    return parallelize_module(network(), mesh[names[1]], {"0": ColwiseParallel(), "1": RowwiseParallel()})


def states(make: Callable[[], torch.nn.Module], *, replicas: bool = True) -> dict[int, State]:
    found = {}
    for rank in range(WORLD):
        with as_rank(rank):
            found[rank] = Collector({"model": make()}, rank=rank, replicas=replicas).collect()
    return found


def model_bytes(state: State, rank: int) -> int:
    """What a rank stores of the model."""
    plan = make_plan(state, rank, 0)
    return sum(c.high - c.low for c in plan.copies if plan.slots[c.leaf].path.startswith("model/"))


def of_model(state: State) -> dict[str, tuple[int, ...]]:
    return {leaf.path: leaf.replicas for leaf in state.leaves if leaf.path.startswith("model/")}


def test_the_replicas_of_hsdp_split_the_work() -> None:
    found = states(hsdp)
    for rank, state in found.items():
        assert set(of_model(state).values()) == {(0, 2) if rank in (0, 2) else (1, 3)}
    whole = sum(p.numel() * 4 for p in network().parameters())
    stored = [model_bytes(state, rank) for rank, state in found.items()]
    assert sum(stored) == pytest.approx(whole, rel=0.05)  # gaps for alignment
    alone = [model_bytes(state, rank) for rank, state in states(hsdp, replicas=False).items()]
    assert sum(alone) == 2 * whole


def test_replicas_store_every_byte_once() -> None:
    found = states(hsdp)
    plans = {rank: make_plan(found[rank], rank, 0) for rank in (0, 2)}
    (first,) = (r for r in plans[0].regions if r.ranks == (0, 2))
    (second,) = (r for r in plans[2].regions if r.ranks == (0, 2))
    assert (first.low, first.high, second.high) == (0, second.low, first.size_bytes)


def test_a_tensor_parallel_part_is_held_by_one_rank_of_each_pair() -> None:
    for state in states(tensor_parallel).values():
        specs = {leaf.path: leaf.spec for leaf in state.leaves}
        weight = specs["model/0.weight"]
        assert weight is not None
        assert (weight["placements"], weight["shape"]) == (["S(0)"], [64, 64])
        assert len(weight["mesh"]) == 2


def test_tensor_parallel_over_fsdp_describes_strided_shards() -> None:
    for rank, state in states(tensor_parallel_fsdp).items():
        specs = {leaf.path: leaf.spec for leaf in state.leaves}
        column, row, bias = (specs[f"model/{name}"] for name in ("0.weight", "1.weight", "1.bias"))
        assert column is not None and row is not None and bias is not None
        assert column["placements"][0].startswith("_S(0"), "FSDP cuts what tensor parallelism has already cut"
        assert row["placements"] == ["S(0)", "S(1)"]
        assert bias["placements"] == ["S(0)", "R"]
        mesh_pair = (0, 1) if rank in (0, 1) else (2, 3)
        assert of_model(state)["model/1.bias"] == mesh_pair, "the replicated bias is shared by a pair"
        assert of_model(state)["model/0.weight"] == (rank,)
