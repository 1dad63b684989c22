# SPDX-License-Identifier: Apache-2.0
"""Decoders to and from Hugging Face configurations, held against what transformers itself builds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refound.export.architecture import FFN, Attention, Decoder, Layer
from refound.export.configs import read_config, uniform_obstacles, write_config, write_nemotron
from refound.export.errors import ModelDirectoryError, UnknownArchitectureError
from refound.export.families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from .models import decoder, heterogeneous, weights, with_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_builds_the_tensors_that_a_decoder_names(family: str, tmp_path: Path) -> None:
    """Names and shapes on disk: save_pretrained writes the published names, also of experts."""
    model = decoder(family)
    (tmp_path / "config.json").write_text(json.dumps(write_config(model)))
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    built.save_pretrained(tmp_path / "saved")
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert saved == {name: spec.shape for name, spec in model.tensors().items()}
    again = read_config(json.loads((tmp_path / "saved" / "config.json").read_text()))
    assert again == replace(model, dtype="float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_comes_back_as_it_was(family: str) -> None:
    model = decoder(family, tied=True, dtype="bfloat16")
    assert read_config(json.loads(json.dumps(write_config(model)))) == model


LAYERS = st.builds(
    Layer,
    attention=st.one_of(
        st.just(Attention(kind="none")),
        st.just(Attention(kind="linear")),
        st.sampled_from([1, 2, 4]).map(lambda kv: Attention(kv_heads=kv)),
    ),
    ffn=st.one_of(
        st.just(FFN(kind="none")), st.just(FFN(kind="linear")), st.integers(1, 2000).map(lambda w: FFN(width=w))
    ),
)


@given(st.lists(LAYERS, min_size=1, max_size=6), st.booleans())
def test_nemotron_says_any_mixture_of_layers(layers: list[Layer], tied: bool) -> None:
    model = decoder(layers=len(layers), tied=tied)
    model = replace(model, layers=tuple(layers))
    assert read_config(json.loads(json.dumps(write_nemotron(model)))) == model


@given(st.integers(1, 64).map(lambda n: 256 * n), st.sampled_from([64, 576, 960, 4096, 8192]))
def test_ffn_mult_says_every_multiple_of_256(width: int, hidden: int) -> None:
    model = decoder(width=width, hidden_size=hidden)
    for block in write_nemotron(model)["block_configs"]:
        del block["ffn"]["intermediate_size"]
        multiple = block["ffn"]["ffn_mult"]
        assert -(-int(2 * multiple * hidden / 3) // 256) * 256 == width


def test_nemotron_has_no_words_for_windows():
    model = with_layer(decoder(layers=2), 1, attention=Attention(kv_heads=1, window=64))
    with pytest.raises(ValueError, match="windows"):
        write_nemotron(model)


def test_settings_of_transformers_4_are_read() -> None:
    raw = write_config(decoder())
    old = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    model = read_config(old)
    assert model.rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert model.dtype == "bfloat16"


def test_windows_of_each_family() -> None:
    mistral = write_config(decoder("mistral"))
    assert {layer.attention.window for layer in read_config(mistral).layers} == {None}
    del mistral["sliding_window"]
    assert {layer.attention.window for layer in read_config(mistral).layers} == {4096}
    qwen: dict[str, Any] = write_config(decoder("qwen2")) | {"use_sliding_window": True, "sliding_window": 32}
    del qwen["layer_types"]
    found = read_config(qwen | {"max_window_layers": 3})
    assert [layer.attention.window for layer in found.layers] == [None, None, None, 32]
    assert read_config(write_config(found)) == found


def test_uneven_layers_are_named() -> None:
    told = dict(uniform_obstacles(heterogeneous()))
    assert set(told) == {1, 2, 3, 4}
    assert "no attention" in told[2]
    with pytest.raises(ValueError, match="layer 2: it has no attention"):
        write_config(heterogeneous())
    assert uniform_obstacles(with_layer(decoder("qwen3_moe"), 1, ffn=FFN(width=64))) == []
    (obstacle,) = uniform_obstacles(with_layer(decoder("mixtral"), 1, ffn=FFN(width=64)))
    assert obstacle == (1, "mixtral has no dense layers")


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"architectures": ["LlamaForCasualLM"]}, UnknownArchitectureError, "did you mean LlamaForCausalLM?"),
        ({"architectures": ["MambaForCausalLM"]}, UnknownArchitectureError, "Known are: LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, UnknownArchitectureError, "'gelu'"),
        ({"rope_parameters": {"rope_type": "su"}}, UnknownArchitectureError, "'su'"),
        ({"hidden_size": None}, ModelDirectoryError, "hidden_size"),
        ({"num_hidden_layers": "4"}, ModelDirectoryError, "num_hidden_layers"),
        ({"intermediate_size": None}, ModelDirectoryError, "intermediate_size"),
        ({"architectures": ["DeciLMForCausalLM"]}, ModelDirectoryError, "block_configs for none"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told.replace("?", r"\?")):
        read_config(write_config(decoder()) | change)


def test_a_zero_filled_subblock_has_tensors_that_are_made() -> None:
    model: Decoder = with_layer(decoder(), 0, attention=Attention(kv_heads=1, zero=True))
    specs = model.tensors()
    assert specs["model.layers.0.input_layernorm.weight"].fill == "ones"
    assert specs["model.layers.0.self_attn.k_proj.weight"].fill == "zeros"
    assert specs["model.layers.1.self_attn.k_proj.weight"].fill == "source"
    assert sum(tensor.numel() for tensor in weights(model).values()) == model.parameters
    assert torch.isfinite(next(iter(weights(model).values()))).all()
