# SPDX-License-Identifier: Apache-2.0
"""Experts in another family's layout: run by transformers itself, and what has no equal is refused with a reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refound.export import proof
from refound.export.architecture import FFN, Decoder
from refound.export.directory import open_directory
from refound.export.errors import EngineFitError, ExportUsageError
from refound.export.fit import check_fit
from refound.export.plan import ExportConfig
from refound.export.relayout import relayout
from refound.export.run import export_model
from safetensors.torch import load_file

from .models import decoder, with_layer, write_model


def with_ffn(model: Decoder, **changes: Any) -> Decoder:
    layers = tuple(replace(layer, ffn=replace(layer.ffn, **changes)) for layer in model.layers)
    return replace(model, layers=layers)


def wide(family: str, **changes: Any) -> Decoder:
    """With the hidden size that all three take."""
    return with_ffn(decoder(family, layers=2, hidden_size=128), **changes)


def move(source: Path, family: str, out: Path) -> Path:
    config = ExportConfig(model=source, engines=("transformers",), out=out, family=family, verify=False)
    (done,) = export_model(config, lambda line: None)
    assert open_directory(done.part.model_path).decoder.family == family
    return done.part.model_path


def test_mixtral_as_qwen2_moe_and_back(tmp_path: Path) -> None:
    """There, a shared expert and biases of zeros are added, and transformers computes the same; back, they go."""
    source = write_model(tmp_path / "model", wide("mixtral"))
    there = move(source, "qwen2_moe", tmp_path / "there")
    prompts = proof.make_prompts(open_directory(source))
    wanted, found = proof.run_engine("transformers", [source, there], prompts)["models"]
    assert found["tokens"] == wanted["tokens"]
    assert found["logit_difference"] < 1e-4
    back = load_file(move(there, "mixtral", tmp_path / "back") / "model.safetensors")
    before = load_file(source / "model.safetensors")
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)


def test_what_would_be_left_out_must_be_zeros(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", wide("qwen2_moe", normalized=True))
    with pytest.raises(EngineFitError, match=r"is not zeros, and mixtral has no place for it"):
        move(source, "mixtral", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_over_all_experts_a_softmax_sums_to_1_by_itself() -> None:
    everything = wide("qwen2_moe", top_k=4)
    assert relayout(everything, "mixtral").decoder.layers[0].ffn.normalized
    assert check_fit(wide("qwen2_moe", normalized=True), "llama.cpp")
    assert not check_fit(wide("qwen2_moe", normalized=True, top_k=4), "llama.cpp")


@pytest.mark.parametrize(
    ("model", "family", "told"),
    [
        (wide("qwen3_moe"), "mixtral", "in qwen3_moe queries and keys pass a norm, in mixtral they do not"),
        (wide("mixtral"), "qwen3_moe", "in qwen3_moe queries and keys pass a norm, in mixtral they do not"),
        (wide("qwen2_moe"), "mixtral", "top 2 of 4 experts are not made to sum to 1"),
        (replace(wide("qwen3_moe"), output_bias=True), "qwen2_moe", "the attention's output has a bias"),
        (with_layer(wide("qwen2_moe", top_k=4), 1, ffn=FFN(width=64)), "mixtral", "mixtral has no dense layers"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_reason(model: Decoder, family: str, told: str) -> None:
    with pytest.raises(EngineFitError, match=told):
        relayout(model, family)


def test_layouts_are_for_experts() -> None:
    with pytest.raises(ExportUsageError, match="this is llama to mixtral"):
        relayout(decoder(), "mixtral")
    with pytest.raises(ExportUsageError, match="mixtral, qwen2_moe, qwen3_moe"):
        relayout(decoder("mixtral"), "llama")
