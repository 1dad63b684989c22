# SPDX-License-Identifier: Apache-2.0
"""Gates learn the oracle's choice, dead experts come alive, and refitting makes up for what is left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from refound.nas.moe.config import RouterTraining, Shape
from refound.nas.moe.gates import (
    DEAD,
    Gate,
    balance_loss,
    distil_gate,
    expert_weights,
    output_energy,
    revive,
    virtual_gates,
)
from refound.nas.moe.layouts import Layout, lay_out
from refound.nas.moe.refit import refit
from refound.nas.moe.splits import LayerSplit, find_split

from ...export.models import decoder
from .small import evidence, planted


def split_of(shape: Shape, name: str = "coactivation") -> LayerSplit:
    return find_split(name).split(shape, planted()[0], np.random.default_rng(0))


def test_the_gate_learns_the_oracles_choice() -> None:
    seen, _ = planted()
    shape = Shape(width=48, experts=4, top_k=1)
    gate = distil_gate(seen, split_of(shape), shape, RouterTraining(steps=100, batch=256), torch.Generator())
    assert gate.agreement > 0.99 and gate.kept > 0.99 and gate.dead == ()
    assert sum(gate.load) == pytest.approx(4)
    logits = seen.inputs[seen.fit] @ gate.weight.T
    assert (logits - logits.mean(1, keepdim=True)).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)


def test_load_balance_is_kept() -> None:
    """An oracle that nearly always takes one expert: with a heavy balancing loss the gate does not follow it."""
    seen = evidence(windows=24)
    split = split_of(Shape(width=48, experts=4, top_k=1))
    down = seen.down.clone()
    down[:, list(split.experts[2])] *= 30
    seen, shape = replace(seen, down=down), Shape(width=48, experts=4, top_k=1)

    def gate(balance: float) -> Gate:
        return distil_gate(seen, split, shape, RouterTraining(steps=200, balance=balance, lr=0.02), torch.Generator())

    assert max(gate(0.0).load) > 1.5 * max(gate(5.0).load)


def test_output_energy_is_that_of_the_experts_outputs() -> None:
    seen, split = evidence(), split_of(Shape(width=48, experts=4, top_k=1))
    found = output_energy(seen, split)
    index = list(split.experts[1])
    assert torch.allclose(found[:, 1], (seen.channels[:, index] @ seen.down[:, index].T).square().sum(1), rtol=1e-4)


def test_dead_experts_come_alive() -> None:
    seen, _ = planted()
    split = split_of(Shape(width=48, experts=4, top_k=1))
    energy = output_energy(seen, split)
    alive = distil_gate(seen, split, Shape(width=48, experts=4, top_k=1), RouterTraining(steps=60), torch.Generator())
    weight = alive.weight.clone()
    weight[2] = -100 * seen.inputs.mean(0)
    mended, dead, left = revive(weight, seen.inputs, energy, 1)
    assert dead == (2,) and left == ()
    chosen = (seen.inputs @ mended.T).argmax(1)
    load = torch.bincount(chosen, minlength=4) * 4 / len(chosen)
    assert (load > DEAD).all() and load[2] > 0.2
    assert torch.equal(mended[[0, 1, 3]], weight[[0, 1, 3]])
    # and it gets tokens that it is for
    assert (energy.argmax(1)[chosen == 2] == 2).float().mean() > 0.9


@pytest.mark.parametrize("top_k", [4, 8, 12])
def test_a_dead_expert_of_many_active_ones_gets_its_own_tokens(top_k: int) -> None:
    """With half of the experts active the bar is below zero for half of the tokens: length alone sets no load."""
    draw = torch.Generator().manual_seed(top_k)
    inputs = torch.randn(4096, 32, generator=draw) + torch.randn(32, generator=draw)
    weight = torch.randn(16, 32, generator=draw)
    energy = torch.rand(4096, 16, generator=draw)
    energy[:, 5] += (inputs[:, 0] - inputs[:, 0].mean()).clamp_min(0) * 5
    weight[5] = -100 * inputs.mean(0)
    mended, dead, left = revive(weight, inputs, energy, top_k)
    assert 5 in dead and left == ()
    chosen = (inputs @ mended.T).topk(top_k, dim=1).indices
    wanted = (chosen == 5).any(1)
    assert 0.5 < wanted.float().mean().item() / (0.25 * top_k / 16) < 2
    share = energy[:, 5] / energy.sum(1)
    assert share[wanted].mean() > 1.5 * share[~wanted].mean()


def test_an_expert_that_dies_when_another_is_put_right_is_put_right_too() -> None:
    """Expert 3 lives of 30 tokens that expert 2, which is dead, wants more than any others."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, 16, generator=draw)
    inputs[:, 0], inputs[:, 1], inputs[:30, 0] = 0, 3, 8
    weight = torch.randn(8, 16, generator=draw) / 4
    weight[:, :2], weight[2, 1], weight[3] = 0, -100, 0
    weight[3, 0], weight[3, 1] = 1, -2
    energy = torch.rand(2048, 8, generator=draw) * 0.1
    energy[:30, 2] = energy[:30, 3] = 5
    mended, dead, left = revive(weight, inputs, energy, 1)
    load = torch.bincount((inputs @ mended.T).argmax(1), minlength=8) * 8 / 2048
    assert dead == (2, 3) and left == () and (load > DEAD).all()


@pytest.mark.parametrize("normalized", [True, False])
def test_expert_weights_are_those_of_the_layouts(normalized: bool) -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weights, chosen = expert_weights(logits, 2, normalized=normalized)
    assert ((weights > 0).sum(1) == 2).all()
    assert torch.equal(chosen[:, 0], logits.argmax(1))
    total = weights.sum(1)
    assert torch.allclose(total, torch.ones(5)) if normalized else (total < 1).all()
    equal, _ = expert_weights(torch.zeros(5, 6), 3, normalized=normalized)
    assert torch.allclose(equal.max(1).values, torch.full((5,), 1 / 3 if normalized else 1 / 6))


def test_balance_is_1_when_loads_are_equal() -> None:
    chosen = torch.arange(8)[:, None] % 4
    assert balance_loss(torch.full((8, 4), 0.25), chosen).item() == pytest.approx(1)
    one = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert balance_loss(one, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4)


def test_virtual_gates_are_one_for_each_copy() -> None:
    shape = Shape(width=48, experts=8, top_k=4, copies=2)
    gates = virtual_gates(shape, 64, 0.1, torch.Generator())
    assert all(torch.equal(gates[4 * copy], gates[4 * copy + shard]) for copy in range(2) for shard in range(4))
    assert not torch.equal(gates[0], gates[4])


def layout_of(shape: Shape, family: str) -> Layout:
    return lay_out(decoder(width=shape.width, hidden_size=32), shape, family)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_refitting_makes_up_for_what_is_left_out(family: str) -> None:
    shape = Shape(width=48, experts=4, top_k=2)
    seen, split = evidence(windows=80, hidden=32), split_of(shape, "random")
    router = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) / 50
    found = refit(seen, split, router, layout_of(shape, family), (1e-3, 1e-1))
    assert found.after < 0.9 * found.before
    kept = refit(seen, split, router, layout_of(shape, family), ())
    assert torch.equal(kept.down, seen.down[:, split.order]) and kept.after == kept.before == found.before


def test_with_all_experts_there_is_nothing_to_make_up_for() -> None:
    shape = Shape(width=48, experts=4, top_k=4)
    found = refit(evidence(hidden=32), split_of(shape, "random"), torch.zeros(4, 32), layout_of(shape, "mixtral"), ())
    assert found.before < 1e-6
