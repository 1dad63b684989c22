# SPDX-License-Identifier: Apache-2.0
"""Every way to split an FFN: each channel in its place, sizes equal, the same again; and what each one is for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from refound.nas.moe.config import SPLITS, Shape
from refound.nas.moe.splits import LayerSplit, find_split, made_of

from .small import evidence, planted

SHAPES = [
    Shape(width=48, experts=4, top_k=2),
    Shape(width=48, experts=4, top_k=1, shared=16),
    Shape(width=48, experts=6, top_k=6),
    Shape(width=48, experts=1, top_k=1, shared=47),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPLITS)
def test_every_split_keeps_its_word(name: str, shape: Shape) -> None:
    split = find_split(name)
    if name == "upcycle":
        shape = Shape(width=48, experts=8, top_k=4, copies=2)
    seen = evidence() if split.needs != "nothing" else None
    if split.problems(shape, 2):
        assert name == "domains" and shape.experts % 2
        return
    found = split.split(shape, seen, np.random.default_rng(3))
    assert found.problem(shape) is None
    held = np.bincount(found.order, minlength=48)
    assert (held == shape.copies).all() and {len(e) for e in found.experts} == {shape.expert_width}
    assert found == split.split(shape, seen, np.random.default_rng(3))


def test_a_split_that_breaks_its_word_is_noticed() -> None:
    shape = Shape(width=4, experts=2, top_k=1)
    assert LayerSplit(experts=((0, 1), (2, 3))).problem(shape) is None
    assert "channel 1 is in 2 places" in (LayerSplit(experts=((0, 1), (1, 3))).problem(shape) or "")
    assert "are not" in (LayerSplit(experts=((0, 1, 2), (3,))).problem(shape) or "")
    assert "are not" in (LayerSplit(experts=((0, 1), (2, 3)), shared=(1,)).problem(shape) or "")
    assert "places" in (LayerSplit(experts=((0, 1), (2, 4))).problem(shape) or "")


def test_coactivation_finds_what_works_together() -> None:
    seen, owner = planted()
    found = find_split("coactivation").split(Shape(width=48, experts=4, top_k=1), seen, np.random.default_rng(0))
    assert [len(owner[list(expert)].unique()) for expert in found.experts] == [1, 1, 1, 1]


def test_coactivation_loses_less_energy_than_a_random_split() -> None:
    seen, shape = evidence(windows=24), Shape(width=48, experts=8, top_k=2, shared=8)

    def lost(split: LayerSplit) -> float:
        energy = torch.stack([seen.energy[:, list(expert)].sum(1) for expert in split.experts], 1)
        shared = seen.energy[:, list(split.shared)].sum(1)
        return 1 - (energy.topk(2, 1).values.sum(1) + shared).mean().item()

    draws = [np.random.default_rng(number) for number in range(2)]
    ours, other = (find_split(n).split(shape, seen, d) for n, d in zip(("coactivation", "random"), draws, strict=True))
    assert lost(ours) < 0.7 * lost(other)


def test_domains_share_what_all_use_and_own_what_one_uses() -> None:
    seen, owner = planted(groups=2, each=16, hidden=32)
    common = seen.inputs.mean(0)
    gate = torch.cat([seen.gate, common.expand(8, -1)])
    seen = replace(seen, gate=gate, up=gate.clone(), down=torch.ones(32, 40))
    found = find_split("domains").split(Shape(width=40, experts=4, top_k=2, shared=8), seen, np.random.default_rng(0))
    assert set(found.shared) == set(range(32, 40))
    for number, expert in enumerate(found.experts):
        assert set(owner[list(expert)].tolist()) == {number // 2}


def test_gradient_looks_at_no_window_that_is_held_out() -> None:
    seen, shape = evidence(windows=16), Shape(width=48, experts=3, top_k=1, shared=6)
    assert seen.gradients is not None
    other = seen.gradients.clone()
    other[14:] = 100 * torch.rand(2, 48, generator=torch.Generator().manual_seed(5))
    one, two = (
        find_split("gradient").split(shape, replace(seen, gradients=gradients), np.random.default_rng(0))
        for gradients in (seen.gradients, other)
    )
    assert one == two


def test_gradient_puts_together_what_matters_in_the_same_windows() -> None:
    seen = evidence(windows=12)
    owner = torch.arange(48) % 3
    matters = 0.01 + (torch.arange(12)[:, None] % 3 == owner[None]).float()
    found = find_split("gradient").split(
        Shape(width=48, experts=3, top_k=1), replace(seen, gradients=matters), np.random.default_rng(0)
    )
    assert [set(owner[list(expert)].tolist()) for expert in found.experts] in _orders()


def _orders() -> list[list[set[int]]]:
    return [[{a}, {b}, {3 - a - b}] for a in range(3) for b in range(3) if a != b]


def test_upcycling_holds_each_shard_once_in_every_copy() -> None:
    shape = Shape(width=48, experts=8, top_k=4, copies=2)
    found = find_split("upcycle").split(shape, None, np.random.default_rng(0))
    assert found.experts[:4] == found.experts[4:]
    assert sorted(channel for expert in found.experts[:4] for channel in expert) == list(range(48))
    assert find_split("upcycle").problems(replace(shape, shared=8), 1)


def test_channels_of_a_dead_layer_are_no_trouble() -> None:
    seen = evidence()
    dead = replace(seen, down=torch.zeros_like(seen.down), gradients=torch.zeros(12, 48))
    for name in ("coactivation", "domains", "gradient"):
        shape = Shape(width=48, experts=4, top_k=2)
        assert find_split(name).split(shape, dead, np.random.default_rng(0)).problem(shape) is None


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (Shape(width=48, experts=4, top_k=5), "cannot take 5 of 4 experts; say --active 4"),
        (Shape(width=48, experts=5, top_k=2), "48 channels do not divide into 5 experts"),
        (Shape(width=48, experts=5, top_k=2), "--shared 3, or 4 or 6 experts"),
        (Shape(width=48, experts=4, top_k=2, shared=2), "--shared 0 or 4"),
        (Shape(width=48, experts=4, top_k=2, shared=48), "leave none of 48"),
        (Shape(width=48, experts=4, top_k=0), "active is 0"),
        (Shape(width=48, experts=6, top_k=2, copies=4), "a multiple of 4"),
        (Shape(width=48, experts=8, top_k=3, copies=2), "must be a multiple of 4, not 3"),
    ],
)
def test_shapes_that_cannot_be(shape: Shape, told: str) -> None:
    assert told in "; ".join(shape.problems())


def test_made_of_sorts_within_each_place() -> None:
    found = made_of(np.array([1, 0, 1]), 2, np.array([9, 4, 2]), [7, 3])
    assert found == LayerSplit(experts=((4,), (2, 9)), shared=(3, 7))
