# SPDX-License-Identifier: Apache-2.0
"""A model directory as a torch module whose layers may each be another: teachers and children alike.

The module is that of nemotron-nas as it is exported (`export/remote`), so what is trained and measured here is what
transformers runs afterwards. With every subblock in place it computes what `LlamaForCausalLM` does, bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..export.architecture import Decoder
from ..export.configs import write_nemotron
from ..export.directory import ModelDirectory, open_directory
from ..export.remote.configuration_decilm import DeciLMConfig
from ..export.remote.modeling_decilm import DeciLMForCausalLM
from .errors import DistillUsageError

Positions = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary embedding: (1, length, head_dim) each."""


def open_blocks(directory: Path) -> ModelDirectory:
    """The directory of a model made of Llama's blocks, checked whole.

    Raises:
        ExportError: see `export.directory.open_directory`.
        DistillUsageError: if it is made of other blocks.
    """
    source = open_directory(directory, tokenizer=False)
    if source.decoder.family != "llama":
        raise DistillUsageError(
            f"{directory} is made of {source.decoder.family} blocks; children are built of Llama's blocks only "
            "(nemotron-nas). `refound export` writes layers of other families that differ, but none are made here yet"
        )
    return source


def load(source: ModelDirectory, *, dtype: torch.dtype = torch.float32) -> DeciLMForCausalLM:
    """The model in `source`, its weights widened (or cast) to `dtype`, in evaluation mode, without gradients."""
    weights = {name: tensor.to(dtype) for name, tensor in source.weights(list(source.decoder.tensors()))}
    return build(source.decoder, weights, dtype=dtype)


def config_of(decoder: Decoder) -> DeciLMConfig:
    raw: dict[str, Any] = write_nemotron(decoder)
    del raw["auto_map"], raw["torch_dtype"]
    return DeciLMConfig.from_dict(raw)


def build(decoder: Decoder, weights: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> DeciLMForCausalLM:
    """A model with exactly these weights, which it holds, not copies.

    Raises:
        ValueError: if a weight is missing or one too many.
    """
    model = skeleton(decoder, dtype=dtype)
    if weights.keys() != decoder.tensors().keys():
        odd = sorted(weights.keys() ^ decoder.tensors().keys())
        raise ValueError(f"the weights do not fit the decoder: {', '.join(odd[:4])}")
    complete(model, decoder, weights)
    return model.eval().requires_grad_(False)


def skeleton(decoder: Decoder, *, dtype: torch.dtype) -> DeciLMForCausalLM:
    """The modules of a model, their weights without storage."""
    config = config_of(decoder)
    config.dtype = dtype
    with torch.device("meta"):
        return DeciLMForCausalLM(config)


def complete(model: DeciLMForCausalLM, decoder: Decoder, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a skeleton these weights, and what is no weight."""
    model.load_state_dict(dict(weights), strict=False, assign=True)
    if decoder.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)  # not a weight, so it was left without storage


def weights_of(model: DeciLMForCausalLM, decoder: Decoder) -> dict[str, torch.Tensor]:
    """The model's weights by the names that a directory of it has."""
    state = model.state_dict()
    return {name: state[name] for name in decoder.tensors()}


def positions_of(model: DeciLMForCausalLM, length: int) -> Positions:
    """For windows of `length` tokens that start at position 0."""
    weight = model.model.embed_tokens.weight
    ids = torch.arange(length, device=weight.device)[None]
    # of the tensor it looks at the type and the device alone; a slice of a sharded weight would cost a gather
    cosines, sines = model.model.rotary_emb(torch.empty(0, dtype=weight.dtype, device=weight.device), position_ids=ids)
    return cosines, sines


def attention_output(layer: Any, hidden: torch.Tensor, positions: Positions) -> torch.Tensor:
    """What the layer's attention adds to `hidden` (batch, length, hidden), by causal attention."""
    found, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden), position_embeddings=positions, attention_mask=None
    )
    return found


def ffn_output(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the layer's FFN adds to `hidden`, which its attention has been added to."""
    return layer.mlp(layer.post_attention_layernorm(hidden))


def layer_output(layer: Any, hidden: torch.Tensor, positions: Positions) -> torch.Tensor:
    hidden = hidden + attention_output(layer, hidden, positions)
    return hidden + ffn_output(layer, hidden)


PASS = "states_by_layers"
"""A method that a model in shards has, and computes `states_of` with."""


def states_of(model: DeciLMForCausalLM, ids: torch.Tensor, positions: Positions) -> list[torch.Tensor]:
    """The residual stream before the first layer and after each one: layers + 1 times (batch, length, hidden)."""
    if (by_layers := getattr(model, PASS, None)) is not None:
        return by_layers(ids, positions)
    states = [model.model.embed_tokens(ids)]
    for layer in model.model.layers:
        states.append(layer_output(layer, states[-1], positions))
    return states
