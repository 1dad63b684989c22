# SPDX-License-Identifier: Apache-2.0
"""nemotron-nas in transformers: Llama's own parts, built layer by layer from `block_configs`.

Only what a layer consists of is set here; the passes through it are Llama's, so this follows its transformers.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_decilm import Block, DeciLMConfig


class Nothing(nn.Module):
    """Adds zeros to the residual stream, which changes no bit of it."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class LinearAttention(nn.Module):
    """One matrix in place of attention."""

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """One matrix in place of an FFN."""

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)


def width_of(ffn: Block, hidden_size: int) -> int:
    """The intermediate size: `ffn_mult` wins where it is given, and stands for multiples of 256."""
    if ffn.get("ffn_mult") is None:
        return ffn["intermediate_size"]
    return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256


class DeciLMDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: DeciLMConfig, layer: int, cache_index: int) -> None:
        own = copy.copy(config)
        attention, ffn = config.block_configs[layer]["attention"], config.block_configs[layer]["ffn"]
        own.num_key_value_heads = config.num_attention_heads // (attention.get("n_heads_in_group") or 1)
        own.intermediate_size = 1 if ffn["no_op"] or ffn["replace_with_linear"] else width_of(ffn, config.hidden_size)
        super().__init__(own, cache_index)
        # what has no weights has no norm either
        if attention["no_op"]:
            self.input_layernorm, self.self_attn = nn.Identity(), NoAttention()
        elif attention["replace_with_linear"]:
            self.self_attn = LinearAttention(config)
        else:
            self.self_attn = LlamaAttention(own, cache_index)
        if ffn["no_op"]:
            self.post_attention_layernorm, self.mlp = nn.Identity(), Nothing()
        else:
            self.mlp = LinearMLP(config) if ffn["replace_with_linear"] else LlamaMLP(own)


class DeciLMPreTrainedModel(LlamaPreTrainedModel):
    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]  # noqa: RUF012  (transformers declares it so)


class DeciLMModel(LlamaModel, DeciLMPreTrainedModel):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        DeciLMPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        # The cache asks its first entry for the length of the past, so the entries are those layers that have one.
        layers, cached = [], 0
        for index, block in enumerate(config.block_configs):
            layers.append(DeciLMDecoderLayer(config, index, cached))
            attention = block["attention"]
            cached += not (attention["no_op"] or attention["replace_with_linear"])
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM, DeciLMPreTrainedModel):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        DeciLMPreTrainedModel.__init__(self, config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
