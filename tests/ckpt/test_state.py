# SPDX-License-Identifier: Apache-2.0
"""State to shards and back, bit for bit: what `protect` reads, lays out, and puts back."""

import json
import math
import random
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.collect import Collector, Leaf, State, random_state, set_random_state
from refound.ckpt.copier import Copier, SlotMemory
from refound.ckpt.errors import DamageError, LayoutMismatchError, UnsupportedStateError
from refound.ckpt.held import failing_buckets
from refound.ckpt.loader import Loader
from refound.ckpt.shard import Shard, make_plan, pieces
from refound.ckpt.slots import Segment
from refound.ckpt.stripes import BUCKET_BYTES
from refound.ckpt.tree import decode, encode


def shard_bytes(objects: dict[str, Any], rank: int = 0, replicas_of: tuple[int, ...] | None = None) -> np.ndarray:
    """What a rank's slot holds after a snapshot of `objects`."""
    state = Collector(objects, rank=rank).collect()
    if replicas_of is not None:
        leaves = [
            Leaf(path=x.path, tensor=x.tensor, constant=x.constant, replicas=replicas_of, spec=x.spec)
            if x.constant
            else x
            for x in state.leaves
        ]
        state = State(objects=state.objects, leaves=leaves)
    text = json.dumps(state.objects).encode()
    plan = make_plan(state, rank, len(text))
    header = plan.header(text)
    assert header is not None
    segment = Segment("test", plan.size_bytes)
    slot = SlotMemory(segment.fd, plan.size_bytes)
    sums = Copier(torch.device("cpu")).fill(plan, state.leaves, header, slot, None)
    assert failing_buckets(slot.array, sums) == []
    return slot.array.copy()


def restore(objects: dict[str, Any], shard: np.ndarray, rank: int = 0) -> None:
    Loader(lambda _: shard, rank).load(objects, Collector(objects, rank=rank))


def training(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A model (with a buffer, tied weights and a non-contiguous parameter), its optimizer and scheduler."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 16)).to(dtype)
    model[2].weight = model[0].weight
    model.register_parameter("odd", torch.nn.Parameter(torch.randn(6, 4, dtype=dtype).t()))
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.5, dtype=dtype)))
    model.register_parameter("none", torch.nn.Parameter(torch.empty(0, 3, dtype=dtype)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def train(objects: dict[str, Any], steps: int) -> list[str]:
    losses = []
    for _ in range(steps):
        model = objects["model"]
        x = torch.randn(8, 16, dtype=model.scale.dtype)
        loss = (model(x) * model.scale).pow(2).mean() + model.odd.pow(2).sum() * random.random() + np.random.rand()
        loss.backward()
        objects["optimizer"].step()
        objects["scheduler"].step()
        objects["optimizer"].zero_grad()
        losses.append(loss.item().hex())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_training_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    original = training(dtype=dtype)
    train(original, 3)
    shard = shard_bytes(original)
    expected = train(original, 4)
    restored = training(seed=9, dtype=dtype)
    restore(restored, shard)
    assert train(restored, 4) == expected
    for (name, a), b in zip(
        original["model"].state_dict().items(), restored["model"].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_optimizer_state_keeps_its_own_dtype() -> None:
    """torch's load_state_dict casts state to the parameter's dtype, which loses bits."""
    objects = {"model": torch.nn.Linear(4, 4).bfloat16()}
    objects["optimizer"] = torch.optim.SGD(objects["model"].parameters(), lr=0.1, momentum=0.9)
    for parameter in objects["model"].parameters():
        objects["optimizer"].state[parameter]["momentum_buffer"] = torch.randn(parameter.shape)
    shard = shard_bytes(objects)
    fresh = {"model": torch.nn.Linear(4, 4).bfloat16()}
    fresh["optimizer"] = torch.optim.SGD(fresh["model"].parameters(), lr=0.1, momentum=0.9)
    restore(fresh, shard)
    for a, b in zip(objects["model"].parameters(), fresh["model"].parameters(), strict=True):
        kept = fresh["optimizer"].state[b]["momentum_buffer"]
        assert kept.dtype == torch.float32
        assert torch.equal(kept, objects["optimizer"].state[a]["momentum_buffer"])


def test_tied_weights_are_stored_once() -> None:
    leaves = Collector(training(), rank=0).collect().leaves
    assert sum(leaf.path.endswith("weight") and leaf.tensor.shape == (16, 16) for leaf in leaves) == 1


def test_what_data_parallel_ranks_share_is_stored_in_parts_and_read_back_whole() -> None:
    objects = training()
    train(objects, 2)
    ranks = (0, 1, 2)
    shards = {rank: shard_bytes(objects, rank, ranks) for rank in ranks}
    whole = shard_bytes(objects)
    for number, slot in enumerate(Shard(shards[0]).slots):
        region = Shard(shards[0]).regions[slot.region]
        parts = [Shard(shards[rank]).part(region.ranks) for rank in region.ranks]
        alone = Shard(whole).slots[number]
        expected = Shard(whole).part((0,))[1][alone.offset : alone.offset + alone.size_bytes]
        found = np.empty(slot.size_bytes, np.uint8)
        for at, data in pieces(parts, slot.offset, slot.size_bytes):
            found[at : at + len(data)] = data
        assert np.array_equal(found, expected), slot.path
    with pytest.raises(DamageError, match="in no shard"):
        pieces([Shard(shards[0]).part(ranks)], 0, Shard(shards[0]).regions[1].size_bytes)


def test_a_changed_model_is_refused_by_name_and_nothing_is_changed() -> None:
    objects = training()
    train(objects, 1)
    shard = shard_bytes(objects)
    changed = training(seed=5)
    changed["model"].register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    before = {k: v.clone() for k, v in changed["model"].state_dict().items()}
    with pytest.raises(LayoutMismatchError, match="model/extra is new"):
        restore(changed, shard)
    assert all(torch.equal(before[k], v) for k, v in changed["model"].state_dict().items())
    other = training()
    other["model"].odd = torch.nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(LayoutMismatchError, match=r"model/odd was float32 \[4, 6\] and is float32 \[5, 4\]"):
        restore(other, shard)
    with pytest.raises(LayoutMismatchError, match="'sampler' is protected now and not in the snapshot"):
        restore({**training(), "sampler": training()["scheduler"]}, shard)


def test_a_header_that_outgrows_its_room_asks_for_a_new_plan() -> None:
    state = Collector(training(), rank=0).collect()
    plan = make_plan(state, 0, 1000)
    assert plan.header(b"x" * 2000) is not None
    assert plan.header(b"x" * (plan.header_bytes)) is None


@pytest.mark.parametrize("at", [0, 7, 9, 13, 16])
def test_bytes_that_are_no_shard_are_refused(at: int) -> None:
    shard = shard_bytes(training())
    shard[at] ^= 0xFF
    with pytest.raises(DamageError):
        Shard(shard)


def test_the_random_generators_go_back_to_what_they_were() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    state = random_state()
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


# --- nested data -----------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.binary(max_size=8)
)
keys = st.one_of(st.text(max_size=6), st.integers(), st.tuples(st.integers(), st.text(max_size=3)))
nested = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(max_size=4).map(lambda key: "$" + key), inner, max_size=3),
        st.sets(st.integers(), max_size=3),
    ),
    max_leaves=12,
)


def round_trip(value: Any) -> Any:
    tensors: list[torch.Tensor] = []

    def note(_: str, tensor: torch.Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    return decode(json.loads(json.dumps(encode(value, "x", note))), tensors.__getitem__)


@given(nested)
def test_nested_state_comes_back_as_it_was(value: Any) -> None:
    found = round_trip(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        *(math.inf, -math.inf, 1e-320, 3 + 4j, Counter({3: 2}), bytearray(b"ab")),
        *(torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")),
    ],
)
def test_other_kinds_come_back(value: Any) -> None:
    assert round_trip(value) == value
    assert type(round_trip(value)) is type(value)


def test_a_bounded_deque_stays_bounded() -> None:
    found = round_trip({"recent": deque([1, 2, 3], maxlen=3)})["recent"]
    found.append(4)
    assert found == deque([2, 3, 4])


class Remembers(torch.nn.Module):
    """A module whose extra state holds tensors, one of them named like nothing the module has."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.history = [torch.full((3,), value)]

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": self.history}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.history = state["history"]


def test_extra_state_may_hold_tensors_and_grow() -> None:
    saved, fresh = torch.nn.Sequential(Remembers(1.0)), torch.nn.Sequential(Remembers(2.0))
    saved[0].history.append(torch.arange(5))
    restore({"model": fresh}, shard_bytes({"model": saved}))
    assert [h.tolist() for h in fresh[0].history] == [[1.0, 1.0, 1.0], [0, 1, 2, 3, 4]]
    assert torch.equal(fresh[0].inner.weight, saved[0].inner.weight)


def test_lazily_conjugated_and_negated_tensors_come_back_as_they_read() -> None:
    """Such a view has its base's memory and shape, and other values."""
    base = torch.randn(4, dtype=torch.complex64)
    views = {"base": base, "conjugate": base.conj(), "negative": base.conj().imag}
    found = Holder({})
    restore({"x": found}, shard_bytes({"x": Holder(views)}))
    for name, tensor in views.items():
        assert torch.equal(found.state[name], tensor), name


class Holder:
    """Anything with a state_dict."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "jagged|NestedTensor"),
    ],
)
def test_tensors_that_are_not_one_block_of_numbers_are_named(tensor: torch.Tensor, kind: str) -> None:
    with pytest.raises(UnsupportedStateError, match=rf"x/odd is a ({kind}) tensor"):
        shard_bytes({"x": Holder({"odd": tensor})})


@pytest.mark.parametrize("array", [np.float64(2.5), np.arange(6, dtype="<i2").reshape(2, 3), np.zeros(0, np.float32)])
def test_numpy_comes_back(array: Any) -> None:
    found = round_trip(array)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_what_has_no_form_as_data_is_named() -> None:
    with pytest.raises(UnsupportedStateError, match=r"x/a/1 is a builtins\.object"):
        round_trip({"a": [1, object()]})
    with pytest.raises(UnsupportedStateError, match="function"):
        round_trip({"hook": test_nested_state_comes_back_as_it_was})
    record = np.zeros(2, [("a", "<i4"), ("b", "<f8")])
    for array in (record, record[0], np.ma.masked_array([1, 2], mask=[0, 1]), np.array([object()])):
        with pytest.raises(UnsupportedStateError, match="numpy"):
            round_trip({"array": array})


def test_shards_are_whole_buckets() -> None:
    assert len(shard_bytes(training())) % BUCKET_BYTES == 0
