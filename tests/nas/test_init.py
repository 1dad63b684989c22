# SPDX-License-Identifier: Apache-2.0
"""How variants start: identities that hold exactly, and planted channels and heads that must be found."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.distill.models import build, positions_of
from refound.export.architecture import FFN, Attention
from refound.nas.attention_init import captured, head_scores, pooled, pruned
from refound.nas.blocks import Module, fill, make
from refound.nas.ffn_init import activations, contributions, narrowed, removal_order
from refound.nas.ridge import Grams, regress

from ..export.models import decoder, weights

TEACHER = decoder(layers=1, kv_heads=4, width=96)
RIDGE = 1e-6


def layer_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    prefix = "model.layers.0."
    return {name.removeprefix(prefix): x for name, x in weights(TEACHER, seed).items() if name.startswith(prefix)}


def module(block: Attention | FFN, tensors: dict[str, torch.Tensor]) -> Module:
    return fill(make(TEACHER, block), tensors_of(block, tensors))


def tensors_of(block: Attention | FFN, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("input_layernorm", "self_attn") if isinstance(block, Attention) else ("post_attention_layernorm", "mlp")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(names)}


def inputs(count: int = 4, length: int = 24, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, length, TEACHER.hidden_size, generator=torch.Generator().manual_seed(seed))


def attend(block: Attention, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model = build(TEACHER, weights(TEACHER), dtype=torch.float32)
    with torch.no_grad():
        return captured(module(block, tensors).body, x, position_embeddings=positions_of(model, x.shape[1]))


# --- the closed form ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 5))
def test_ridge_finds_a_linear_map_and_knows_its_error(seed: int, width: int, out: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(out, width, generator=generator, dtype=torch.float64)
    x = torch.randn(40, width, generator=generator, dtype=torch.float64)
    grams = Grams()
    for part in x.split(7):  # streamed
        grams.add(part, part @ true.T)
    torch.testing.assert_close(grams.solve(1e-10), true, rtol=1e-6, atol=1e-6)
    other = true + 0.1
    wanted = ((x @ other.T - x @ true.T).square().sum() / (x @ true.T).square().sum()).item()
    assert grams.error(other) == pytest.approx(wanted, rel=1e-6)


def test_an_infinite_ridge_keeps_the_prior_and_dead_inputs_divide_by_nothing() -> None:
    prior = torch.randn(3, 4, dtype=torch.float64)
    inner, cross = torch.eye(4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(regress(inner, cross, 1e12, prior), prior)
    assert torch.isfinite(
        regress(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64), 0.0)
    ).all()


# --- FFN ---------------------------------------------------------------------------------------------------------


def gram_of(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        seen = activations(module(FFN(width=96), tensors).body, x).flatten(0, 1).double()
    return seen.T @ seen


def test_all_channels_are_the_teacher_bit_for_bit_in_their_products() -> None:
    """Nothing is removed, so nothing is refitted: the residual is zero."""
    tensors, x = layer_weights(), inputs()
    found = narrowed(tensors, gram_of(tensors, x), torch.arange(96), RIDGE)
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_the_planted_channels_survive() -> None:
    tensors = layer_weights()
    planted = torch.randperm(96, generator=torch.Generator().manual_seed(1))[:24].sort().values
    silent = torch.ones(96, dtype=torch.bool)
    silent[planted] = False
    tensors["mlp.down_proj.weight"][:, silent] *= 1e-3
    kept = removal_order(gram_of(tensors, inputs(64)), tensors["mlp.down_proj.weight"], [24], RIDGE)[24]
    assert torch.equal(kept, planted)


def test_a_channel_that_another_can_replace_goes_first() -> None:
    """Twins: alone each counts much, but the other can do its work; independent scores would keep both."""
    tensors = layer_weights()
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        tensors[name][7] = tensors[name][3]
    tensors["mlp.down_proj.weight"][:, [3, 7]] *= 5
    gram = gram_of(tensors, inputs(64))
    kept = removal_order(gram, tensors["mlp.down_proj.weight"], [95], RIDGE)[95]
    assert {3, 7} - set(kept.tolist()) and len(kept) == 95
    found = narrowed(tensors, gram, kept, RIDGE)
    x = inputs(seed=9)
    with torch.no_grad():
        wanted = module(FFN(width=96), tensors).body(x)
        torch.testing.assert_close(module(FFN(width=95), found).body(x), wanted, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99))
def test_narrower_ones_are_nested_and_refitting_helps(seed: int) -> None:
    tensors, x = layer_weights(seed), inputs(32, seed=seed)
    gram = gram_of(tensors, x)
    order = removal_order(gram, tensors["mlp.down_proj.weight"], [72, 48, 24], RIDGE)
    assert set(order[24].tolist()) < set(order[48].tolist()) < set(order[72].tolist())
    with torch.no_grad():
        wanted = module(FFN(width=96), tensors).body(x)
        errors = []
        for width in (72, 48, 24):
            found = narrowed(tensors, gram, order[width], RIDGE)
            sliced = {**found, "mlp.down_proj.weight": tensors["mlp.down_proj.weight"][:, order[width]]}
            error, without = (
                (module(FFN(width=width), one).body(x) - wanted).square().sum() for one in (found, sliced)
            )
            assert error <= without
            errors.append(error.item())
    assert errors == sorted(errors)


def test_what_a_removal_costs_is_what_comes_out() -> None:
    """The formula against doing it: the error after removing one channel and refitting the rest."""
    tensors, x = layer_weights(), inputs(64)
    gram, down = gram_of(tensors, x), tensors["mlp.down_proj.weight"].double()
    costs = contributions(gram, down, 1e-9)
    for channel in (0, 40, 95):
        rest = torch.tensor([other for other in range(96) if other != channel])
        weight = regress(gram[rest][:, rest], down @ gram[:, rest], 1e-9)
        square = (down @ gram * down).sum() - 2 * (weight @ gram[rest] * down).sum()
        square += (weight @ gram[rest][:, rest] * weight).sum()
        assert costs[channel].item() == pytest.approx(square.item(), rel=1e-3)


# --- attention ---------------------------------------------------------------------------------------------------


def test_mean_pooling_equal_heads_changes_nothing() -> None:
    tensors, x = layer_weights(), inputs()
    for name in ("k_proj", "v_proj"):
        matrix = tensors[f"self_attn.{name}.weight"]
        matrix[32:64], matrix[96:128] = matrix[:32], matrix[64:96]
    _, wanted = attend(Attention(kv_heads=4), tensors, x)
    _, found = attend(Attention(kv_heads=2), pooled(tensors, before=4, kv_heads=2), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_pruned_heads_are_the_same_as_masked_ones(kv_heads: int) -> None:
    tensors, x = layer_weights(), inputs()
    scores = torch.tensor([0.3, 2.0, 0.1, 1.0])
    best = [1, 3][:kv_heads]
    masked = dict(tensors)
    output = torch.zeros_like(tensors["self_attn.o_proj.weight"])
    for head in best:
        rows = slice(head * 32, head * 32 + 32)
        output[:, rows] = tensors["self_attn.o_proj.weight"][:, rows]
    masked["self_attn.o_proj.weight"] = output
    _, wanted = attend(Attention(kv_heads=4), masked, x)
    found = pruned(tensors, scores, heads=4, head_dim=32, kv_heads=kv_heads)
    _, got = attend(Attention(kv_heads=kv_heads), found, x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_head_that_matters_has_the_highest_score() -> None:
    tensors, x = layer_weights(), inputs()
    tensors["self_attn.o_proj.weight"][:, 64:96] *= 10
    values, _ = attend(Attention(kv_heads=4), tensors, x)
    assert head_scores(values.flatten(0, 1), tensors["self_attn.o_proj.weight"], 4).argmax() == 2


def test_linear_attention_that_sees_one_token_is_exact() -> None:
    """With one token attention is W_o W_v, whatever the queries: the closed form finds it."""
    tensors, x = layer_weights(), inputs(400, 1)
    _, wanted = attend(Attention(kv_heads=4), tensors, x)
    grams = Grams()
    grams.add(x, wanted)
    assert grams.error(grams.solve(1e-10)) < 1e-6


def test_no_op_blocks_hold_nothing() -> None:
    for block in (Attention(kind="none"), FFN(kind="none")):
        assert not make(TEACHER, block).weights()


def test_a_block_has_the_weights_that_the_decoder_names() -> None:
    blocks: list[Any] = [Attention(kv_heads=1), Attention(kind="linear"), FFN(width=40), FFN(kind="linear")]
    for block in blocks:
        part = "attention" if isinstance(block, Attention) else "ffn"
        layer = replace(TEACHER.layers[0], **{part: block})
        specs = replace(TEACHER, layers=(layer,)).tensors()
        for name, tensor in make(TEACHER, block).weights().items():
            assert specs[f"model.layers.0.{name}"].shape == tuple(tensor.shape)
