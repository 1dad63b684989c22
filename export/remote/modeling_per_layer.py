# SPDX-License-Identifier: Apache-2.0
"""`per_layer_config` in transformers: a family's own attention and FFN, built layer by layer as it says.

Only what a layer consists of is set here; the passes through it are Qwen2's, which are Llama's with windows in some
layers, so this follows its transformers. Needs one that knows `per_layer_config` (5.19 does).
"""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2MLP,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from .configuration_per_layer import PerLayerConfig

BLOCKS = {
    "llama": (LlamaAttention, LlamaMLP),
    "mistral": (MistralAttention, MistralMLP),
    "qwen2": (Qwen2Attention, Qwen2MLP),
    "qwen3": (Qwen3Attention, Qwen3MLP),
}


class Nothing(nn.Module):
    """Adds zeros to the residual stream, which changes no bit of it."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class PerLayerDecoderLayer(Qwen2DecoderLayer):
    def __init__(self, config: PerLayerConfig, layer: int, cache_index: int) -> None:
        own = copy.copy(config.per_layer_config[layer])
        skip = getattr(own, "skip", [])
        if config.layer_types is None or config.layer_types[layer] != "sliding_attention":
            own.sliding_window = None  # Mistral's attention asks for it whatever the layer's type
        super().__init__(cast(Any, own), cache_index)
        attention, ffn = BLOCKS[config.blocks]
        # what has no weights has no norm either
        if "self_attn" in skip:
            self.input_layernorm, self.self_attn = nn.Identity(), NoAttention()
        else:
            self.self_attn = attention(own, cache_index)
        if "mlp" in skip:
            self.post_attention_layernorm, self.mlp = nn.Identity(), Nothing()
        else:
            self.mlp = ffn(own)


class PerLayerPreTrainedModel(Qwen2PreTrainedModel):
    config_class = PerLayerConfig
    _no_split_modules = ["PerLayerDecoderLayer"]  # noqa: RUF012  (transformers declares it so)


class PerLayerModel(Qwen2Model, PerLayerPreTrainedModel):
    config_class = PerLayerConfig

    def __init__(self, config: PerLayerConfig) -> None:
        PerLayerPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        # The cache asks its first entry for the length of the past, so the first layer with attention keeps its own
        # there; no other layer has that entry, and both are of one type.
        with_attention = [
            index
            for index in range(config.num_hidden_layers)
            if "self_attn" not in getattr(config.per_layer_config[index], "skip", [])
        ]
        self.layers = nn.ModuleList(
            PerLayerDecoderLayer(config, index, 0 if index == with_attention[0] else index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=cast(Any, config))
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (config.layer_types or [])
        self.post_init()


class PerLayerForCausalLM(Qwen2ForCausalLM, PerLayerPreTrainedModel):
    config_class = PerLayerConfig

    def __init__(self, config: PerLayerConfig) -> None:
        PerLayerPreTrainedModel.__init__(self, config)
        self.model = PerLayerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
