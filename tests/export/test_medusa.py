# SPDX-License-Identifier: Apache-2.0
"""Medusa heads keep what they compute in both layouts, and what does not belong to a model is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refound.export.directory import open_directory
from refound.export.environments import engine_python
from refound.export.errors import ExportUsageError, ModelDamageError, ModelDirectoryError
from refound.export.medusa import MedusaHead, MedusaHeads, MedusaLayout, read_medusa, write_medusa
from refound.export.proof import TOLERANCES, compare, make_prompts, run_engine
from safetensors.torch import load_file, save_file
from torch.nn import functional

from .models import VOCAB, decoder, write_model

HIDDEN, HEADS, LAYERS = 64, 3, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("medusa") / "base", decoder(layers=1))


def heads(*, biased: bool = True, shared: bool = False) -> MedusaHeads:
    torch.manual_seed(0)
    made = tuple(
        MedusaHead(
            weights=tuple(torch.randn(HIDDEN, HIDDEN) for _ in range(LAYERS)),
            biases=tuple(torch.randn(HIDDEN) for _ in range(LAYERS)) if biased else (),
            output=None if shared else torch.randn(VOCAB, HIDDEN),
        )
        for _ in range(HEADS)
    )
    return MedusaHeads(heads=made, shared_output=torch.randn(VOCAB, HIDDEN) if shared else None)


def logits(found: MedusaHeads, state: torch.Tensor) -> list[torch.Tensor]:
    """(batch, vocabulary) of each head, as the paper has it."""
    answers = []
    for head in found.heads:
        x = state
        for layer, weight in enumerate(head.weights):
            x = x + functional.silu(functional.linear(x, weight, head.biases[layer] if head.biases else None))
        output = found.output if head.output is None else head.output
        answers.append(x @ output.T)
    return answers


@pytest.mark.parametrize("layout", ["fasterdecoding", "vllm"])
@pytest.mark.parametrize(("biased", "shared"), [(True, False), (False, False), (False, True)])
def test_what_is_written_computes_the_same(
    base: Path, tmp_path: Path, layout: MedusaLayout, biased: bool, shared: bool
) -> None:
    given = heads(biased=biased, shared=shared)
    out = write_medusa(given, base, tmp_path / "heads", layout)
    state = torch.randn(5, HIDDEN)
    expected = logits(given, state)
    found = logits(read_medusa(out), state)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_names_are_those_of_each_layout(base: Path, tmp_path: Path) -> None:
    faster = write_medusa(heads(), base, tmp_path / "faster", "fasterdecoding", base_name="org/model")
    names = set(load_file(faster / "medusa_lm_head.safetensors"))
    assert {"0.0.linear.weight", "0.1.linear.bias", "2.2.weight"} <= names and len(names) == HEADS * 5
    told = json.loads((faster / "config.json").read_text())
    assert (told["medusa_num_heads"], told["medusa_num_layers"]) == (HEADS, LAYERS)
    assert told["base_model_name_or_path"] == "org/model"
    vllm = write_medusa(heads(biased=False, shared=True), base, tmp_path / "vllm", "vllm")
    names = set(load_file(vllm / "model.safetensors"))
    assert names == {f"blocks.{h}.layers.{la}.weight" for h in range(HEADS) for la in range(LAYERS)} | {
        "lm_heads.0.weight"
    }
    told = json.loads((vllm / "config.json").read_text())
    assert (told["architectures"], told["original_lm_head"], told["medusa_fc_bias"]) == (["MedusaModel"], True, False)


@pytest.mark.skipif(engine_python("vllm") is None, reason="vLLM is not installed: make engines ENGINES=vllm")
def test_vllm_decodes_with_them_and_says_the_same(base: Path, tmp_path: Path) -> None:
    """Heads only guess, so the tokens are the model's own, whatever random heads guess."""
    out = write_medusa(heads(), base, tmp_path / "heads", "vllm")
    speculation = {"method": "medusa", "model": str(out), "num_speculative_tokens": HEADS}
    prompts = make_prompts(open_directory(base))
    (wanted,) = run_engine("transformers", [base], prompts)["models"]
    answer = run_engine("vllm", [base], prompts, settings={"speculation": speculation})
    figures = compare("vllm", answer["version"], wanted, answer["models"][0], TOLERANCES["f32"])
    assert figures.holds and figures.equal_prompts >= 7, str(figures)


def without_output(given: MedusaHeads) -> MedusaHeads:
    return replace(given, heads=(*given.heads[1:], replace(given.heads[0], output=None)))


def narrow(given: MedusaHeads) -> MedusaHeads:
    return replace(given, heads=(replace(given.heads[0], weights=(torch.zeros(3, 3),) * LAYERS), *given.heads[1:]))


def broken(given: MedusaHeads) -> MedusaHeads:
    given.heads[1].weights[0][0, 0] = torch.nan
    return given


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_output, "head 2: its output is None"),
        (narrow, r"head 0: a block is \[3, 3\]"),
        (broken, "blocks.1.layers.0.weight holds NaN"),
        (lambda given: replace(given, heads=()), "there is no head"),
    ],
)
def test_what_does_not_belong_to_the_model_is_refused(
    base: Path, tmp_path: Path, change: Callable[[MedusaHeads], MedusaHeads], told: str
) -> None:
    with pytest.raises(ExportUsageError, match=told):
        write_medusa(change(heads()), base, tmp_path / "heads", "vllm")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_heads_or_with_some_missing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="holds no Medusa heads"):
        read_medusa(tmp_path)
    out = write_medusa(heads(), base, tmp_path / "heads", "vllm")
    tensors = load_file(out / "model.safetensors")
    del tensors["blocks.1.layers.0.weight"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ModelDamageError, match=r"blocks\.1\.layers\.0\.weight"):
        read_medusa(out)
