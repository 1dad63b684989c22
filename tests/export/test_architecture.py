# SPDX-License-Identifier: Apache-2.0
"""Decoders to and from Hugging Face configurations, held against what transformers itself builds."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refound.export import per_layer
from refound.export.alike import alike
from refound.export.architecture import FFN, Attention, Decoder, Layer
from refound.export.configs import read_config, uniform_obstacles, write_config, write_nemotron, write_per_layer
from refound.export.errors import ModelDirectoryError, UnknownArchitectureError
from refound.export.families import FAMILIES
from refound.export.forms import forms_of, needs_code
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


@given(
    st.lists(
        LAYERS.filter(lambda layer: "linear" not in (layer.attention.kind, layer.ffn.kind)), min_size=1, max_size=6
    ),
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
)
def test_per_layer_config_says_any_mixture_of_blocks(layers: list[Layer], family: str) -> None:
    model = replace(decoder(family), layers=tuple(layers))
    if per_layer.obstacles(model):
        assert all(layer.attention.kind == "none" for layer in layers)
        return
    config = json.loads(json.dumps(write_per_layer(model)))
    assert read_config(config) == model
    assert needs_code(config)
    same = alike(model)
    assert same is not None
    assert not uniform_obstacles(same)
    sizes = {name: spec.size for name, spec in model.tensors().items()}
    for name, spec in same.tensors().items():
        stored = math.prod(spec.stored) if spec.stored else spec.size
        assert spec.fill != "source" or stored == sizes[name]


def test_per_layer_config_has_no_words_for_everything() -> None:
    linear = with_layer(decoder("qwen3"), 1, attention=Attention(kind="linear"))
    with pytest.raises(ValueError, match="layer 1: per_layer_config has no linear"):
        write_per_layer(linear)
    two = with_layer(decoder("qwen3"), 1, attention=Attention(kv_heads=2, window=8))
    assert read_config(write_per_layer(two)) == two
    with pytest.raises(ValueError, match="windows of several sizes"):
        write_per_layer(with_layer(two, 2, attention=Attention(kv_heads=2, window=16)))
    assert alike(linear) is None
    assert forms_of(decoder("mixtral")) == ("uniform",)


@pytest.mark.parametrize(
    ("told", "error", "sentence"),
    [
        ({"9": {"skip": ["mlp"]}}, ModelDirectoryError, "names layer 9 of 4"),
        ({"1": {"head_dim": 8}}, UnknownArchitectureError, r"per_layer_config\[1\] changes head_dim"),
        ({"1": {"skip": ["moe"]}}, UnknownArchitectureError, "changes moe"),
        ({"1": {"num_key_value_heads": 0}}, ModelDirectoryError, "no usable number"),
        ({"one": {}}, ModelDirectoryError, "cannot be read"),
        ([1], ModelDirectoryError, "cannot be read"),
    ],
)
def test_a_per_layer_config_that_is_not_known_is_refused(told: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        read_config(write_config(decoder()) | {"per_layer_config": told})
    with pytest.raises(UnknownArchitectureError, match="names the blocks 'gemma'"):
        read_config(write_per_layer(decoder("qwen3")) | {"blocks": "gemma"})


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
