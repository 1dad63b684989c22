# SPDX-License-Identifier: Apache-2.0
"""Experts as one more variant: the space; and that a child with them is what was scored, counted and written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refound.distill.config import Training
from refound.export.directory import open_directory
from refound.export.fit import check_fit
from refound.nas.blocks import make, parameters
from refound.nas.children import realize, weights_of
from refound.nas.costs import active_parameters
from refound.nas.errors import BudgetError, RecipeError
from refound.nas.experts import NamedMixture, expert_ffns
from refound.nas.jobs import Store
from refound.nas.recipe import Recipe, Space, check
from refound.nas.report import to_json
from refound.nas.search import Found, run_search
from refound.nas.space import make_space, name_of
from transformers import AutoModelForCausalLM

from ..export.models import decoder, heterogeneous
from .small import recipe, teacher

ONLY = Space(
    kv_heads=(), attention_linear=False, attention_none=False, ffn_percent=(50,), multiple=8, ffn_linear=False,
    ffn_none=False, ffn_experts=("2of6", "6of6", "2of8+32"),
)  # fmt: skip


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One whole search, for fewer parameters that a token takes, where nothing but experts can be had."""
    space = replace(ONLY, ffn_percent=(), ffn_experts=("2of6", "6of6"))
    wanted = recipe(model, tmp_path_factory.mktemp("search"), space=space, budget={"active": "95%"})
    done = run_search(wanted, quiet)
    assert done is not None
    return done


# --- the space ---------------------------------------------------------------------------------------------------


def test_names_and_kinds_of_a_layer() -> None:
    layer = make_space(decoder(), ONLY).layers[1]
    assert [name_of(block) for block in layer.ffn] == ["w96", "w48", "2of6x16", "6of6x16", "2of8x8"]
    assert layer.pairs == ((0, 0), (0, 1), (0, 2), (0, 0), (0, 3), (0, 0), (0, 4), (0, 0))
    assert layer.kinds == ("", "", "2of6x16", "2of6x16", "6of6x16", "6of6x16", "2of8x8", "2of8x8")


def test_without_experts_nothing_is_otherwise() -> None:
    assert make_space(decoder(), replace(ONLY, ffn_experts=())).layers[0].kinds == ()


def test_an_engine_with_experts_in_every_layer_only_gets_no_dense_ones_beside_them() -> None:
    own = decoder(hidden_size=128)  # llama.cpp's qwen2moe wants the hidden size of its heads
    space = make_space(own, replace(ONLY, engines=("llama.cpp",), ffn_experts=("2of6",)))
    assert space.layers[0].pairs == ((0, 0), (0, 1), (0, 2)) and space.layers[0].kinds == ("", "", "2of6x16")
    (told,) = space.excluded
    assert "wants experts in every layer" in told and "in all layers or in none" in told
    child = space.child(own, tuple((0, 2) for _ in space.layers))
    assert child.family == "qwen2_moe" and not check_fit(child, "llama.cpp")
    (told,) = make_space(decoder(), replace(ONLY, engines=("llama.cpp",), ffn_experts=("2of6",))).excluded
    assert "are not the hidden size 64" in told


def test_an_engine_without_experts_leaves_them_out_and_says_why() -> None:
    space = make_space(decoder(), replace(ONLY, ffn_percent=(), engines=("onnxruntime",)))
    assert set(space.layers[0].kinds) == {""}
    assert any("its builder does not know that architecture" in told for told in space.excluded)


def test_experts_stand_beside_the_teachers_own_alone() -> None:
    """KV heads and dense widths vary in children without experts: no layout says both."""
    space = make_space(decoder(), Space(ffn_percent=(50,), multiple=8, ffn_experts=("2of6",)))
    for layer in space.layers:
        beside = {pair for pair, kind in zip(layer.pairs, layer.kinds, strict=True) if kind}
        assert beside == {(0, 0), (0, len(layer.ffn) - 1)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("5of", "is not of the form 4of16"),
        ("8of6", "cannot take 8 of 6 experts"),
        ("2of7", "do not divide into 7 experts"),
        ("2of6+96", "leave none of 96"),
        ("0of6", "must be at least 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make_space(decoder(), replace(ONLY, ffn_experts=(text,)))


def test_a_teacher_whose_layers_differ_is_refused() -> None:
    with pytest.raises(RecipeError, match="experts exist for uniform models only"):
        make_space(heterogeneous(), replace(ONLY, multiple=8))


def test_the_recipe_says_what_is_malformed_and_what_is_not_distilled() -> None:
    own = Recipe(space=Space(ffn_experts=("4x16",)), distill=Training(tokens=4096))
    problems = check(own)
    assert any("'4x16'" in told for told in problems) and any("distill.tokens=0" in told for told in problems)


# --- what comes out ----------------------------------------------------------------------------------------------


def test_the_variant_tells_its_weights_as_the_layout_has_them() -> None:
    own = decoder(layers=3)
    (ffn,) = expert_ffns(own, ["2of6"])
    body = make(own, ffn).body
    assert isinstance(body, NamedMixture)
    names = {f"mlp.{name}" for name in body.state_dict()} | {"post_attention_layernorm.weight"}
    child = make_space(own, replace(ONLY, ffn_experts=("2of6",))).child(own, ((0, 2), (0, 0), (0, 0)))
    prefix = "model.layers.0."
    written = {name.removeprefix(prefix) for name in child.tensors() if name.startswith(prefix)}
    assert names == {name for name in written if "attn" not in name and "input" not in name}


def test_all_experts_score_nothing_and_fewer_score_something(found: Found) -> None:
    for layer in range(3):
        whole, part = found.scores[layer, "ffn", "6of6x16"], found.scores[layer, "ffn", "2of6x16"]
        assert abs(whole["kl"]) < 1e-6 < part["kl"]
        facts = found.library[layer, "ffn", "2of6x16"]
        assert facts["loss"] <= facts["start"] < 1 and 0 < facts["agreement"] <= 1


def test_the_child_mixes_dense_layers_and_experts_within_its_budget(found: Found) -> None:
    child = found.children[0]
    assert 0 < len(child.decoder.moe_layers) < 3 and len({layer.ffn for layer in child.decoder.layers}) == 2
    own, hidden = found.teacher.source.decoder, found.teacher.source.decoder.hidden_size
    idle = sum((f.experts - f.top_k) * 3 * f.width * hidden for la in child.decoder.layers if (f := la.ffn).experts)
    assert child.totals["active"] == child.decoder.parameters - idle <= 0.95 * own.parameters


def test_every_total_is_exact_whatever_the_kind(found: Found) -> None:
    """Budgets of parameters of any choice: those of the tensors that are written, biases and all."""
    programme = found.programme
    layers = programme.space.layers
    for kind in dict.fromkeys(layers[0].kinds):
        if not kind:
            continue
        options = [index for index, name in enumerate(layers[0].kinds) if name == kind]
        choice = (options[0], options[1], options[0])
        child = programme.child(choice)
        ffn = child.layers[0].ffn
        idle = 2 * (ffn.experts - ffn.top_k) * 3 * ffn.width * child.hidden_size
        assert programme.totals(choice)["active"] == child.parameters - idle
        assert active_parameters(child, ffn) == parameters(child, ffn) - idle / 2


def test_transformers_loads_the_child_and_answers_what_was_measured(found: Found) -> None:
    """It reads the directory without any code of ours; its KL to the teacher is the one that was told."""
    child, own = found.children[0], found.teacher
    source = open_directory(child.path)
    assert source.decoder.family == "qwen2_moe" and source.decoder.layers == child.decoder.layers
    theirs: Any = AutoModelForCausalLM.from_pretrained(child.path, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    with torch.no_grad():
        logits = torch.log_softmax(theirs(input_ids=own.test).logits, -1)
        wanted = torch.log_softmax(own.model(input_ids=own.test).logits, -1)
    kl = (wanted.exp() * (wanted - logits)).sum(-1).mean().item()
    assert kl == pytest.approx(child.test["kl"], rel=1e-3, abs=1e-6)


def test_weights_of_the_kept_layers_are_the_teachers_and_the_biases_are_zeros(found: Found) -> None:
    own, child = found.teacher, found.children[0].decoder
    weights = weights_of(own, child, Store(Path(own.recipe.out) / "store"))
    assert weights.keys() == child.tensors().keys()
    biases = [name for name in weights if name.endswith("_proj.bias")]
    assert len(biases) == 9 and not any(weights[name].any() for name in biases)
    dense = next(index for index, layer in enumerate(child.layers) if layer.ffn.kind == "dense")
    assert torch.equal(
        weights[f"model.layers.{dense}.mlp.up_proj.weight"], own.layer_weights[dense]["mlp.up_proj.weight"]
    )


def test_the_report_names_the_experts_and_how_to_serve_them(found: Found) -> None:
    told = to_json(found)
    assert any(ffn == "2of6x16" or ffn == "2of8x8" for _, ffn in told["children"][0]["layers"])
    assert told["children"][0]["export"].startswith("refound export")


def test_all_experts_in_all_layers_are_the_teacher(found: Found, tmp_path: Path) -> None:
    own, programme = found.teacher, found.programme
    option = programme.space.layers[0].kinds.index("6of6x16")
    child = programme.child((option,) * 3)
    store = Store(Path(own.recipe.out) / "store")
    realize(own, child, store, tmp_path / "child", record={}, overwrite=False)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "child", dtype=torch.float32)
    with torch.no_grad():
        off = theirs(input_ids=own.test[:2]).logits - own.model(input_ids=own.test[:2]).logits
    assert off.abs().max() < 1e-4


def test_what_cannot_be_met_by_any_kind_says_what_is_nearest(found: Found) -> None:
    with pytest.raises(BudgetError, match="the least that any child has is"):
        run_search(replace(found.teacher.recipe, budget={"active": "10%"}), quiet)
