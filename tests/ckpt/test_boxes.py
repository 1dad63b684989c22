# SPDX-License-Identifier: Apache-2.0
"""Parts of tensors and their overlaps, against torch's own cutting and against every single value."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.ckpt.boxes import Layout, Overlap, cut, extent, gather, overlaps, whole
from refound.ckpt.errors import DamageError, UnsupportedStateError
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard


@dataclass(frozen=True)
class Dealt:
    """A tensor over a mesh, and what torch's placements make of it."""

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def spec(self) -> dict[str, Any]:
        ranks = np.arange(int(np.prod(self.mesh))).reshape(self.mesh).tolist()
        return {"shape": list(self.shape), "placements": [str(p) for p in self.placements], "mesh": ranks}

    @property
    def locals(self) -> list[torch.Tensor]:
        """Each rank's tensor, cut by torch from one whose values are its own flat places."""
        found = []
        for coordinate in itertools.product(*map(range, self.mesh)):
            local = torch.arange(int(np.prod(self.shape))).reshape(self.shape)
            for placement, ways, index in zip(self.placements, self.mesh, coordinate, strict=True):
                if isinstance(placement, Shard | _StridedShard):
                    local = placement._split_tensor(local, ways, with_padding=False)[0][index]
            found.append(local)
        return found


@st.composite
def dealings(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Dealt:
    shape = shape if shape is not None else tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1) if shape else st.nothing()
    shards = st.builds(Shard, dims) | st.builds(lambda d, s: _StridedShard(d, split_factor=s), dims, st.integers(1, 3))
    kinds = (st.just(Replicate()) | shards) if shape else st.just(Replicate())
    return Dealt(shape, mesh, tuple(draw(kinds) for _ in mesh))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Dealt, Dealt]:
    one = draw(dealings())
    return one, draw(dealings(one.shape))


def values(part: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The flat places of a part's values, in the shape of its local tensor."""
    found = np.arange(int(np.prod(shape))).reshape(shape)
    for dim, runs in enumerate(part):
        places = [i for first, count in runs for i in range(first, first + count)]
        found = np.take(found, np.array(places, dtype=int), axis=dim)
    return found


@settings(deadline=None, max_examples=300)
@given(dealings())
def test_every_rank_holds_what_torch_deals_it(dealt: Dealt) -> None:
    layout = Layout.of(dealt.spec)
    for rank, local in enumerate(dealt.locals):
        part = layout.part(rank)
        assert extent(part) == tuple(local.shape)
        assert np.array_equal(values(part, dealt.shape), local.numpy())


@settings(deadline=None, max_examples=200)
@given(dealings())
def test_shapes_and_offsets_are_those_of_torch(dealt: Dealt) -> None:
    for rank, coordinate in enumerate(itertools.product(*map(range, dealt.mesh))):
        shape, offset = _compute_local_shape_and_global_offset(
            dealt.shape, dealt.mesh, list(coordinate), dealt.placements
        )
        part = Layout.of(dealt.spec).part(rank)
        assert extent(part) == tuple(shape)
        if all(shape):  # an empty part has no first value
            assert tuple(runs[0][0] for runs in part) == tuple(offset)


@settings(deadline=None, max_examples=300)
@given(pairs(), st.integers(0, 5))
def test_what_ranks_of_one_layout_read_of_another_is_what_torch_deals_them(
    pair: tuple[Dealt, Dealt], prefer: int
) -> None:
    saved, now = pair
    shards = saved.locals
    for rank, expected in enumerate(now.locals):
        found = np.full(tuple(expected.shape), -1)
        times = np.zeros(tuple(expected.shape), int)
        for owner, shape, boxes in gather(Layout.of(saved.spec), Layout.of(now.spec).part(rank), prefer):
            source = shards[owner].numpy()
            assert source.shape == shape
            for box in boxes:
                low, high = box.span(shape)
                flat = np.full(source.size, -2)
                flat[low:high] = source.reshape(-1)[low:high]  # nothing outside the span may be needed
                found[box.target] = flat.reshape(shape)[box.source]
                times[box.target] += 1
        assert np.array_equal(found, expected.numpy())
        assert (times == 1).all()


def test_a_plain_tensor_is_a_part_like_any_other() -> None:
    spec = {"shape": [5, 2], "placements": ["S(0)"], "mesh": [4, 7]}
    layout = Layout.of(spec)
    assert layout.part(7) == (((3, 2),), ((0, 2),))
    assert layout.part(0) == ((), ())
    assert [rank for rank, _, _ in gather(layout, whole([5, 2]))] == [4, 7]
    assert overlaps(whole([]), whole([])) == [Overlap((), ())]
    assert Overlap((), ()).span([]) == (0, 1)
    assert cut(((2, 3), (9, 2)), 2, 4) == ((4, 1), (9, 1))


def test_strided_shards_are_read_as_older_torch_prints_them_too() -> None:
    spec = {"shape": [8], "mesh": [[0, 1], [2, 3]]}
    old = Layout.of(spec | {"placements": ["_StridedShard(dim=0, sf=2)", "S(0)"]})
    assert [old.part(rank) for rank in range(4)] == [
        Layout.of(spec | {"placements": ["_S(0, 2)", "S(0)"]}).part(rank) for rank in range(4)
    ]


def test_what_is_missing_or_partial_is_refused() -> None:
    layout = Layout((4,), (2,), (0, 1), ("S(0)",))
    with pytest.raises(DamageError, match="2 of 6 values"):
        gather(layout, whole([6]))
    with pytest.raises(UnsupportedStateError, match=r"placed as P\(sum\)"):
        Layout.of({"shape": [4], "placements": ["P(sum)"], "mesh": [0, 1]})
