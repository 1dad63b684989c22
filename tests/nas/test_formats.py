# SPDX-License-Identifier: Apache-2.0
"""Formats of weights as variants: what is scored, counted, written and loaded is one and the same model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refound.adapters.errors import TuneUsageError
from refound.adapters.quantized import rounding_in as rounding_of_directory
from refound.distill.config import Training
from refound.export.compressed import Rounding, is_rounded, mixed_config
from refound.export.directory import open_directory
from refound.export.errors import ModelDirectoryError
from refound.nas.children import modules_of, realize
from refound.nas.costs import distinct_blocks, weight_bytes
from refound.nas.errors import RecipeError
from refound.nas.formats import format_of, rounding_in, roundings_of, source_decoder, source_of
from refound.nas.jobs import Store
from refound.nas.library import replacements, trained
from refound.nas.ranks import Ranks
from refound.nas.recipe import Space, check, read_recipe
from refound.nas.report import to_json, to_text, write_report
from refound.nas.scores import Scorer
from refound.nas.search import Found, Search, plan_search, run_search
from refound.nas.space import SearchSpace, make_space, name_of
from refound.nas.teacher import Teacher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..export.models import decoder
from .small import recipe, teacher

ALL = ("source", "int8", "int4")
FEW = Space(
    kv_heads=(1,), attention_linear=False, ffn_percent=(50,), ffn_linear=True, ffn_none=False, multiple=32, formats=ALL
)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher(tmp_path_factory.mktemp("teacher") / "model", layers=2, width=128)


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One whole search over architecture and formats, within half of the teacher's bytes."""
    wanted = recipe(
        model,
        tmp_path_factory.mktemp("search"),
        space=FEW,
        budget={"memory": "50%"},
        distill=Training(tokens=4096, length=32, batch=4, lr=3e-4),
    )
    done = run_search(wanted, quiet)
    assert done is not None
    return done


def pick(space: SearchSpace, names: list[tuple[str, str]]) -> tuple[tuple[int, int], ...]:
    """The pair of each layer by the names of its blocks."""
    pairs = []
    for layer, wanted in zip(space.layers, names, strict=True):
        told = {(name_of(layer.attention[one]), name_of(layer.ffn[other])): (one, other) for one, other in layer.pairs}
        pairs.append(told[wanted])
    return tuple(pairs)


@pytest.fixture(scope="module")
def mixed(found: Found, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A child with every format in it, the teacher's own subblocks among those that are rounded."""
    child = found.space.child(found.programme.teacher, pick(found.space, [("kv2-int8", "w64-int4"), ("kv1", "linear")]))
    out = tmp_path_factory.mktemp("child") / "mixed"
    store = Store(Path(found.teacher.recipe.out) / "store")
    realize(found.teacher, child, store, out, record={}, overwrite=False)
    yield out


# --- the space ---------------------------------------------------------------------------------------------------


def test_by_default_nothing_changes() -> None:
    plain = make_space(decoder(), Space(ffn_percent=(50,)))
    more = make_space(decoder(), Space(ffn_percent=(50,), formats=ALL))
    for layer, wider in zip(plain.layers, more.layers, strict=True):
        assert wider.attention[: len(layer.attention)] == layer.attention
        assert wider.ffn[: len(layer.ffn)] == layer.ffn
        assert wider.pairs[: len(layer.pairs)] == layer.pairs and len(wider.pairs) > len(layer.pairs)
        assert all(rounding_in(block) is None for block in (*layer.attention, *layer.ffn))
    assert list(trained(more)) == list(replacements(plain)) and distinct_blocks(more) == distinct_blocks(plain)


def test_every_subblock_with_weights_comes_in_every_format() -> None:
    layer = make_space(decoder(), replace(FEW, ffn_none=True)).layers[1]
    names = [name_of(block) for block in (*layer.attention, *layer.ffn)]
    assert names == [
        *("kv2", "kv1", "none", "kv2-int8", "kv2-int4", "kv1-int8", "kv1-int4"),
        *("w96", "w64", "linear", "none", "w96-int8", "w96-int4", "w64-int8", "w64-int4", "linear-int8", "linear-int4"),
    ]
    assert len(layer.pairs) == len(set(layer.pairs)) == len(layer.attention) * len(layer.ffn)


def test_a_format_that_an_engine_does_not_serve_is_left_out_with_the_reason() -> None:
    space = make_space(decoder(), replace(FEW, engines=("transformers", "llama.cpp")))
    assert {format_of(block) for layer in space.layers for block in (*layer.attention, *layer.ffn)} == {"source"}
    assert sum("rounded as a whole" in reason for reason in space.excluded) == 2
    space = make_space(decoder(), replace(FEW, engines=("vllm",)))
    assert {format_of(block) for layer in space.layers for block in layer.ffn} == set(ALL)


def test_rows_that_no_group_divides_are_left_out_with_the_reason() -> None:
    space = make_space(decoder(), replace(FEW, ffn_percent=(52,), multiple=10))
    assert [name_of(block) for block in space.layers[0].ffn if "w50" in name_of(block)] == ["w50"]
    assert any("rows of 50 numbers are no multiple of 32" in reason for reason in space.excluded)


def test_mistakes_in_the_recipe_are_told_at_once(model: Path, tmp_path: Path) -> None:
    wanted = recipe(model, tmp_path, space=Space(formats=("int5", "int4")))
    told = check(wanted)
    assert any("'int5'" in line and "did you mean 'int" in line for line in told)
    assert any("lacks 'source'" in line for line in told) and any("no budget counts bytes" in line for line in told)
    file = tmp_path / "recipe.toml"
    file.write_text('space = { formats = ["source", "int8"] }\n')
    with pytest.raises(RecipeError, match="no budget counts bytes"):
        read_recipe(file)
    assert read_recipe(file, ["budget.memory=50%"]).space.formats == ("source", "int8")


# --- what is scored is what is written ---------------------------------------------------------------------------


def test_the_written_child_answers_what_was_scored(
    found: Found, mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers, from the packed files, beside the teacher with the modules that the scores are measured on."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    child = found.space.child(found.programme.teacher, pick(found.space, [("kv2-int8", "w64-int4"), ("kv1", "linear")]))
    own = Teacher.open(found.teacher.recipe)
    scored = own.model
    for index, modules in modules_of(own, child, Store(Path(own.recipe.out) / "store")).items():
        for module in modules:
            module.into(scored.model.layers[index])
    theirs = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32, trust_remote_code=True).eval()
    ids = own.test[:2]
    with torch.no_grad():
        answer, wanted = theirs(input_ids=ids).logits, scored(input_ids=ids, use_cache=False).logits
        teachers = found.teacher.model(input_ids=ids).logits
    torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-5)
    assert (answer - teachers).abs().max() > 1e-2


def test_the_configuration_names_every_matrix_once(mixed: Path) -> None:
    told = json.loads((mixed / "config.json").read_text())["quantization_config"]
    groups = told["config_groups"].values()
    bits = {target: group["weights"]["num_bits"] for group in groups for target in group["targets"]}
    assert {name for name in bits if "layers.0" in name} == bits.keys() and len(bits) == 7
    assert all(width == (8 if "self_attn" in name else 4) for name, width in bits.items())
    assert told["ignore"] == [
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
        "model.layers.1.mlp.linear_mlp",
        "lm_head",
    ]


def test_the_bytes_of_the_budget_are_those_of_the_file(found: Found, mixed: Path) -> None:
    child = found.space.child(found.programme.teacher, pick(found.space, [("kv2-int8", "w64-int4"), ("kv1", "linear")]))
    tensors = load_file(mixed / "model.safetensors")
    for index, layer in enumerate(child.layers):
        for part, norm in (("attention", "input_layernorm"), ("ffn", "post_attention_layernorm")):
            inner = f"model.layers.{index}.{'self_attn' if part == 'attention' else 'mlp'}."
            names = [name for name in tensors if name.startswith((inner, f"model.layers.{index}.{norm}."))]
            stored = sum(tensors[name].nbytes for name in names)
            assert stored == weight_bytes(found.programme.teacher, getattr(layer, part), bits=32)


def test_a_single_score_is_what_the_written_model_has(found: Found) -> None:
    """Every rounded replacement has a score of its own, and fewer bits cost more."""
    scores = {key: facts["kl"] for key, facts in found.scores.items()}
    for layer in range(2):
        for name in ("kv2", "w128"):
            part = "attention" if name == "kv2" else "ffn"
            assert 0 < scores[layer, part, f"{name}-int8"] < scores[layer, part, f"{name}-int4"]
    assert not any("int" in name for _, _, name in found.library)


# --- the whole search --------------------------------------------------------------------------------------------


def test_one_solution_decides_architecture_and_bits(found: Found) -> None:
    child = found.children[0]
    used = {format_of(block) for layer in child.decoder.layers for block in (layer.attention, layer.ffn)}
    assert used & {"int8", "int4"}
    budget = found.programme.budgets[0]
    assert child.totals["memory.chat"] <= budget.allowed * (1 + 1e-9)
    measured = Scorer(found.teacher, found.teacher.test).quality(
        modules_of(found.teacher, child.decoder, Store(Path(found.teacher.recipe.out) / "store"))
    )
    assert measured.to_json() == pytest.approx(child.test)
    packed = load_file(child.path / "model.safetensors")
    assert sum(name.endswith(".weight_packed") for name in packed) == len(roundings_of(child.decoder))


def test_distilling_comes_before_rounding(found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The trained weights are rounded as it was chosen; what is reported of them is what transformers answers."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    child = found.children[0]
    assert child.distilled is not None
    told = child.distilled["rounded"]
    assert told["test"]["kl"] < child.test["kl"]
    trained, packed = (load_file(Path(path) / "model.safetensors") for path in (child.distilled["path"], told["path"]))
    roundings = roundings_of(child.decoder)
    for name, weight in trained.items():
        if name in roundings:
            made = roundings[name].pack(name, weight)
            assert all(torch.equal(packed[key], tensor) for key, tensor in made.items())
        else:
            assert torch.equal(packed[name], weight)
    theirs = AutoModelForCausalLM.from_pretrained(told["path"], dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        wanted = found.teacher.model(input_ids=found.teacher.test).logits.log_softmax(-1)
        answer = theirs(input_ids=found.teacher.test).logits.log_softmax(-1)
    kl = torch.nn.functional.kl_div(answer, wanted, reduction="none", log_target=True).sum(-1).mean().item()
    assert kl == pytest.approx(told["test"]["kl"], rel=1e-3)


def test_time_is_that_of_the_source(found: Found) -> None:
    workload = found.teacher.recipe.costs.workloads[0]
    child = found.children[0].decoder
    assert found.table.child(child, workload) == found.table.child(source_decoder(child), workload)
    assert not any("int" in name for _, name in found.table.blocks)


def test_the_report_tells_the_formats(found: Found) -> None:
    told = to_json(found)["children"][0]
    names = [[name_of(layer.attention), name_of(layer.ffn)] for layer in found.children[0].decoder.layers]
    assert told["layers"] == names
    assert all(
        name.endswith(f"-{stored}") == (stored != "source")
        for pair, formats in zip(names, told["formats"], strict=True)
        for name, stored in zip(pair, formats, strict=True)
    )
    _, pictures = write_report(found)
    assert "the bits of a weight there" in pictures.read_text()
    assert (
        "transformers" in told["export"] and "refound export" not in told["export"] and told["export"] in to_text(found)
    )


def test_a_search_without_formats_resumes_as_it_was(found: Found) -> None:
    """The same library, and the same scores of what is not rounded, by the same names."""
    plain = replace(found.teacher.recipe, space=replace(FEW, formats=("source",)), budget={"parameters": "80%"})
    search = Search(plain, quiet, Ranks())
    assert all(search.store.is_done(job) for job in (*search.library_jobs(), *search.score_jobs(), *search.cost_jobs()))
    wider = {job.id for job in Search(found.teacher.recipe, quiet, Ranks()).library_jobs()}
    assert wider == {job.id for job in search.library_jobs()}
    counted = {stage.name: (stage.jobs, stage.done) for stage in plan_search(found.teacher.recipe).stages}
    assert counted["scores"][0] == counted["scores"][1] == len(found.scores) > counted["library"][0]


def test_a_rounded_directory_is_no_source_of_others(mixed: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="holds rounded weights"):
        open_directory(mixed)
    with pytest.raises(TuneUsageError, match="not rounded as"):
        rounding_of_directory(mixed)


def test_two_ways_in_all_matrices_are_two_groups() -> None:
    model = decoder(layers=1)
    names = [name for name, spec in model.tensors().items() if is_rounded(name, spec.shape)]
    ways = {name: Rounding(bits=8 if "attn" in name else 4, group=32) for name in names}
    told = mixed_config(ways, names)
    assert told["ignore"] == ["lm_head"] and len(told["config_groups"]) == 2
    assert source_of(model.layers[0].ffn) == model.layers[0].ffn
