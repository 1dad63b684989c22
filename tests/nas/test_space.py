# SPDX-License-Identifier: Apache-2.0
"""The space: within the recipe, and within what engines serve."""

from dataclasses import replace

import pytest
from refound.export.fit import check_fit
from refound.nas.errors import RecipeError
from refound.nas.recipe import Space
from refound.nas.space import make_space, name_of

from ..export.models import decoder, heterogeneous

EVERYTHING = Space(ffn_percent=(75, 50, 25), multiple=8)


def names(space: Space, layer: int = 1) -> tuple[list[str], list[str]]:
    found = make_space(decoder(kv_heads=4), space).layers[layer]
    return [name_of(block) for block in found.attention], [name_of(block) for block in found.ffn]


def test_a_layer_may_be_all_that_the_recipe_says() -> None:
    attention, ffn = names(EVERYTHING)
    assert attention == ["kv4", "kv2", "kv1", "linear", "none"]
    assert ffn == ["w96", "w72", "w48", "w24", "linear", "none"]


def test_the_teacher_comes_first_and_may_always_stay() -> None:
    for layer in make_space(decoder(), EVERYTHING).layers:
        assert layer.pairs[0] == (0, 0)
    narrow = Space(
        kv_heads=(), attention_linear=False, attention_none=False, ffn_percent=(), ffn_linear=False, ffn_none=False
    )
    assert names(narrow) == (["kv4"], ["w96"])


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "tensorrt-llm", "transformers"])
def test_every_child_fits_the_engines(engine: str) -> None:
    teacher = decoder(layers=5)
    space = make_space(teacher, replace(EVERYTHING, engines=(engine,)))
    for index, layer in enumerate(space.layers):
        for pair in layer.pairs:
            choice = tuple(layer.pairs[0] if other != index else pair for other in range(5))
            assert all(finding.exact for finding in check_fit(space.child(teacher, choice), engine))


def test_what_an_engine_refuses_is_left_out_with_the_reason() -> None:
    space = make_space(decoder(), replace(EVERYTHING, engines=("vllm",)))
    kinds = {name_of(block) for layer in space.layers for block in (*layer.attention, *layer.ffn)}
    assert "linear" not in kinds and "none" in kinds
    assert any("no linear subblocks" in reason for reason in space.excluded)


def test_a_search_goes_on_from_a_child() -> None:
    child = heterogeneous()
    space = make_space(child, EVERYTHING)
    assert [space.layers[index].layer((0, 0)) for index in range(6)] == list(child.layers)
    assert [name_of(block) for block in space.layers[2].attention] == ["none"]


def test_heads_that_do_not_divide_and_unknown_engines_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"\[3\] do not divide the teacher's 4"):
        make_space(decoder(kv_heads=4), Space(kv_heads=(3, 2)))
    with pytest.raises(RecipeError, match="did you mean 'vllm'"):
        make_space(decoder(), Space(engines=("vlm",)))
