# SPDX-License-Identifier: Apache-2.0
"""Snapshots of one number of ranks and one layout, restored into others: every value, bit for bit."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refound.ckpt.collect import Collector
from refound.ckpt.copier import Copier, SlotMemory
from refound.ckpt.errors import DamageError, LayoutMismatchError, WorldSizeError
from refound.ckpt.reshape import Reshaper
from refound.ckpt.saved import SavedRanks, joined
from refound.ckpt.shard import make_plan
from refound.ckpt.slots import Segment
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from .ranks import run_ranks


class Net(torch.nn.Module):
    """Sizes that 2, 3 and 4 ranks cut unevenly, one so short that some get nothing; a buffer and tied weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, width)
        self.down = torch.nn.Linear(width, 6)
        self.out = torch.nn.Linear(6, 2)
        self.tied = torch.nn.Linear(6, 2)
        self.tied.weight = self.out.weight
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.tanh(self.up(x)))
        with torch.no_grad():
            self.mean.add_(x.detach().mean(0))
        return self.out(x) + self.tied(x)


def make(kind: str, world: int, seed: int = 0) -> dict[str, Any]:
    """A model laid out in one of the ways, and its optimizer."""
    torch.manual_seed(seed)
    net: Any = Net(8 if kind == "tp" else 7) if kind != "ddp8" else Net(8)
    if kind.startswith("ddp"):
        net = DistributedDataParallel(net)
    elif kind == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif kind in ("tp", "fsdp8"):
        net = Net(8)
        if kind == "fsdp8":
            fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        else:
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
            parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(net, mesh=mesh["dp"])
    return {"model": net, "optimizer": torch.optim.AdamW(net.parameters(), lr=1e-2, amsgrad=True, foreach=False)}


def train(objects: dict[str, Any], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        objects["model"](torch.randn(3, 6, generator=generator)).pow(2).mean().backward()
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()


def everything(objects: dict[str, Any]) -> dict[str, bytes]:
    """All global values of a model and its optimizer, as bytes."""

    def full(value: Any) -> bytes:
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    found = {
        name.removeprefix("module."): full(value)
        for name, value in objects["model"].state_dict().items()
        if not name.endswith("mean")
    }
    for number, state in objects["optimizer"].state_dict()["state"].items():
        found |= {f"{number}/{key}": full(value) for key, value in state.items()}
    return found


def shard_of(objects: dict[str, Any], rank: int, replicas: bool = True) -> np.ndarray:
    """What a rank's slot holds after a snapshot."""
    state = Collector(objects, rank=rank, replicas=replicas).collect()
    text = json.dumps(state.objects).encode()
    plan = make_plan(state, rank, len(text))
    header = plan.header(text)
    assert header is not None
    segment = Segment("test", plan.size_bytes)
    slot = SlotMemory(segment.fd, plan.size_bytes)
    Copier(torch.device("cpu")).fill(plan, state.leaves, header, slot, None)
    return slot.array.copy()


class Shards:
    """Saved shards that give right bytes only where they are asked for, and count them."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays, self.asked = arrays, dict.fromkeys(range(len(arrays)), 0)

    def __call__(self, rank: int, ranges: list[tuple[int, int]]) -> np.ndarray:
        found = np.full(len(self.arrays[rank]), 0xAA, np.uint8)
        for low, high in ranges:
            found[low:high] = self.arrays[rank][low:high]
        self.asked[rank] = sum(high - low for low, high in ranges)
        return found


def seed_all(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)


def saved(folder: Path, kind: str, world: int, replicas: bool = True) -> tuple[list[np.ndarray], dict[str, bytes]]:
    def work(rank: int) -> Any:
        objects = make(kind, world)
        train(objects, rank)
        objects["model"].get_submodule("module" if kind.startswith("ddp") else "").mean.fill_(rank)
        seed_all(rank)
        return shard_of(objects, rank, replicas), everything(objects)

    found = run_ranks(folder / "save", world, work)
    return [shard for shard, _ in found], found[0][1]


def reshaped(
    folder: Path, shards: list[np.ndarray], kind: str, world: int, then: Callable[[dict[str, Any], int], Any]
) -> list[Any]:
    def work(rank: int) -> Any:
        objects = make(kind, world, seed=9)
        reader = Shards(shards)
        Reshaper(reader, rank=rank, world_size=world, saved_world_size=len(shards)).load(objects)
        return everything(objects), then(objects, rank), reader.asked

    return run_ranks(folder / f"load-{kind}-{world}", world, work)


@pytest.mark.parametrize(
    ("kind", "world", "to", "ranks"),
    [
        ("fsdp", 4, "fsdp", 2),
        ("fsdp", 4, "fsdp", 3),
        ("fsdp", 3, "ddp", 2),
        ("ddp", 2, "fsdp", 3),
        ("hsdp", 4, "fsdp", 3),
        ("tp", 4, "fsdp8", 2),
        ("fsdp8", 3, "tp", 4),
        ("tp", 4, "ddp8", 1),
        ("fsdp", 2, "ddp", 2),
    ],
)
def test_every_value_comes_back_in_another_shape(tmp_path: Path, kind: str, world: int, to: str, ranks: int) -> None:
    shards, expected = saved(tmp_path, kind, world)

    def then(objects: dict[str, Any], rank: int) -> Any:
        mean = objects["model"].get_submodule("module" if to.startswith("ddp") else "").mean.tolist()
        drawn = (random.random(), np.random.rand(), torch.rand(1).item())
        train(objects, rank)  # it can train on
        return mean, drawn

    found = reshaped(tmp_path, shards, to, ranks, then)
    for rank, (values, (mean, drawn), _) in enumerate(found):
        assert values == expected
        assert mean == [rank % world] * 6  # what is a rank's own stays its own; a new one takes an old one's
        if rank < world:
            seed_all(rank)
            assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert len({drawn for _, (_, drawn), _ in found}) == ranks, "no two ranks draw the same numbers"


def test_new_ranks_draw_the_same_streams_whenever_it_happens_again(tmp_path: Path) -> None:
    shards, _ = saved(tmp_path, "fsdp", 2)

    def draw(objects: dict[str, Any], rank: int) -> Any:
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = [drawn for _, drawn, _ in reshaped(tmp_path / "a", shards, "fsdp", 4, draw)]
    assert [drawn for _, drawn, _ in reshaped(tmp_path / "b", shards, "fsdp", 4, draw)] == first


def test_ranks_read_what_they_need_and_not_the_rest(tmp_path: Path) -> None:
    """8 → 4 ranks of FSDP2: each needs two of the eight shards, and of the others nothing."""
    weight = torch.arange(1 << 16, dtype=torch.float32).reshape(256, 256)

    def save(rank: int) -> Any:
        objects = make_wide(8)
        with torch.no_grad():
            objects["model"].weight.to_local().copy_(weight[rank * 32 : (rank + 1) * 32])
        return shard_of(objects, rank)

    def make_wide(world: int) -> dict[str, Any]:
        return {"model": fully_shard(torch.nn.Linear(256, 256, bias=False), mesh=init_device_mesh("cpu", (world,)))}

    shards = run_ranks(tmp_path / "save", 8, save)

    def load(rank: int) -> Any:
        objects, reader = make_wide(4), Shards(shards)
        Reshaper(reader, rank=rank, world_size=4, saved_world_size=8).load(objects)
        assert torch.equal(objects["model"].weight.to_local(), weight[rank * 64 : (rank + 1) * 64])
        return {other: asked for other, asked in reader.asked.items() if asked >= 32 * 256 * 4}

    for rank, asked in enumerate(run_ranks(tmp_path / "load", 4, load)):
        assert set(asked) == {2 * rank, 2 * rank + 1}


def test_without_replicas_each_rank_has_saved_all_of_it(tmp_path: Path) -> None:
    shards, expected = saved(tmp_path, "hsdp", 4, replicas=False)
    found = reshaped(tmp_path, shards, "fsdp", 2, lambda objects, rank: None)
    assert [values for values, _, _ in found] == [expected] * 2


def test_another_model_is_refused_by_name_before_anything_is_changed(tmp_path: Path) -> None:
    shards, _ = saved(tmp_path, "fsdp", 2)

    def work(rank: int) -> Any:
        objects = make("fsdp8", 3, seed=9)
        before = everything(objects)
        with pytest.raises(LayoutMismatchError) as raised:
            Reshaper(Shards(shards), rank=rank, world_size=3, saved_world_size=2).load(objects)
        assert everything(objects) == before
        objects["more"] = objects["optimizer"]
        with pytest.raises(LayoutMismatchError, match="'more' is protected now and not in the snapshot"):
            Reshaper(Shards(shards), rank=rank, world_size=3, saved_world_size=2).load(objects)
        return str(raised.value)

    said = run_ranks(tmp_path / "load", 3, work)
    assert "model/up.weight was float32 [7, 6] and is float32 [8, 6]" in said[0]


# --- what belongs to a rank ------------------------------------------------------------------------------------


class Holder:
    """Anything with a state_dict."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Dealer(Holder):
    """One that knows how to deal its ranks' states out anew."""

    def load_state_dicts(self, states: list[dict[str, Any]], *, rank: int, world_size: int) -> None:
        self.state = {"states": states, "rank": rank, "world_size": world_size}


def of_ranks(states: list[Any]) -> list[np.ndarray]:
    return [shard_of({"data": Holder(state)}, rank) for rank, state in enumerate(states)]


def load_into(value: Any, shards: list[np.ndarray], rank: int, world: int) -> Any:
    Reshaper(Shards(shards), rank=rank, world_size=world, saved_world_size=len(shards)).load({"data": value})
    return value.state


def test_a_state_that_all_ranks_share_is_everybodys() -> None:
    shards = of_ranks([{"epoch": 3, "at": torch.arange(4), "seen": np.arange(3)} for _ in range(3)])
    found = load_into(Holder(), shards, 4, 5)
    assert found["epoch"] == 3 and found["at"].tolist() == [0, 1, 2, 3] and found["seen"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("own", "where"),
    [
        (lambda rank: {"epoch": 3, "at": [5, rank // 2]}, "data/at/1"),
        (lambda rank: {"at": torch.tensor([rank // 2])}, "data/at"),
        (lambda rank: {("a", 1): rank // 2}, "data"),
    ],
)
def test_a_state_that_differs_by_rank_is_refused_by_name(own: Callable[[int], Any], where: str) -> None:
    shards, value = of_ranks([own(rank) for rank in range(4)]), Holder("untouched")
    with pytest.raises(WorldSizeError, match=f"'data' .Holder. differs between ranks at '{where}") as raised:
        load_into(value, shards, 0, 2)
    assert "load_state_dicts" in str(raised.value) and "refound.Position" in str(raised.value)
    assert value.state == "untouched"


def test_an_object_may_deal_its_ranks_states_out_itself() -> None:
    states = [{"at": rank, "rest": torch.arange(rank)} for rank in range(3)]
    found = load_into(Dealer(), of_ranks(states), 1, 2)
    assert (found["rank"], found["world_size"]) == (1, 2)
    assert [s["at"] for s in found["states"]] == [0, 1, 2]
    assert [s["rest"].tolist() for s in found["states"]] == [[], [0], [0, 1]]


def test_ranks_that_drew_the_same_numbers_go_on_doing_so() -> None:
    shards = []
    for rank in range(2):
        seed_all(7)
        shards.append(shard_of({"data": Holder({})}, rank))
    seed_all(7)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    load_into(Holder(), shards, 3, 4)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize(("workers", "sampler"), [(0, "stateful"), (1, "stateful"), (0, "plain")])
def test_a_stateful_loader_goes_on_with_the_same_batches_over_other_ranks(workers: int, sampler: str) -> None:
    """4 ranks of 3 samples, then 2 ranks of 6: each sample once."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    kind: Any = StatefulDistributedSampler if sampler == "stateful" else torch.utils.data.DistributedSampler
    data: Any = list(range(48))

    def loader(rank: int, world: int) -> Any:
        dealt = kind(data, num_replicas=world, rank=rank, seed=5)
        return StatefulDataLoader(data, batch_size=12 // world, sampler=dealt, num_workers=workers)

    seen, shards = list[int](), []
    for rank in range(4):
        found = loader(rank, 4)
        batches = iter(found)
        seen += [n for _ in range(2) for n in next(batches).tolist()]
        shards.append(shard_of({"data": found}, rank))
        del batches
    for rank in range(2):
        found = loader(rank, 2)
        Reshaper(Shards(shards), rank=rank, world_size=2, saved_world_size=4).load({"data": found})
        seen += [n for batch in found for n in batch.tolist()]
    assert sorted(seen) == data
    with pytest.raises(WorldSizeError, match="each of 4 ranks had taken 6 samples from 'data', which 5 ranks cannot"):
        Reshaper(Shards(shards), rank=0, world_size=5, saved_world_size=4).load({"data": loader(0, 4)})


# --- reading in part -------------------------------------------------------------------------------------------


def test_ranges_are_joined() -> None:
    assert joined([(5, 7), (0, 2), (2, 4), (6, 9), (20, 21)]) == [(0, 4), (5, 9), (20, 21)]


def test_what_is_no_shard_is_refused() -> None:
    shards = of_ranks([{}])
    with pytest.raises(DamageError, match="speaks of rank 3"):
        SavedRanks(Shards(shards), 1).shard(3)
    shards[0][3] ^= 1
    with pytest.raises(DamageError, match="not a shard"):
        SavedRanks(Shards(shards), 1).shard(0)
