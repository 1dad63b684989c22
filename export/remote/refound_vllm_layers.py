# SPDX-License-Identifier: Apache-2.0
"""Layers of nemotron-nas in vLLM, with one matrix in place of attention or of an FFN as well.

What its own class computes is computed the same; the layers are put together here, of its own parts.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm  # type: ignore[import-not-found]
from vllm.model_executor.layers.linear import ReplicatedLinear  # type: ignore[import-not-found]
from vllm.model_executor.models.llama import LlamaMLP  # type: ignore[import-not-found]
from vllm.model_executor.models.nemotron_nas import (  # type: ignore[import-not-found]
    DeciLMAttention,
    DeciLMForCausalLM,
    DeciModel,
)


def width_of(ffn: Any, hidden_size: int) -> int:
    """The intermediate size: `ffn_mult` wins where it is given, and stands for multiples of 256."""
    if ffn.get("ffn_mult") is None:
        return ffn["intermediate_size"]
    return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256


class LinearAttention(nn.Module):
    def __init__(self, size: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        name = f"{prefix}.linear_attn"
        self.linear_attn = ReplicatedLinear(size, size, bias=False, quant_config=quant_config, prefix=name)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_attn(hidden_states)[0]


class LinearMLP(nn.Module):
    def __init__(self, size: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        name = f"{prefix}.linear_mlp"
        self.linear_mlp = ReplicatedLinear(size, size, bias=False, quant_config=quant_config, prefix=name)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)[0]


class PluginDecoderLayer(nn.Module):
    def __init__(
        self, config: Any, layer_idx: int, cache_config: Any = None, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__()
        attention, ffn = config.block_configs[layer_idx].attention, config.block_configs[layer_idx].ffn
        self._is_no_op_attention, self._is_no_op_ffn = attention.no_op, ffn.no_op
        bias = getattr(config, "attention_bias", False)
        if not attention.no_op:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            name = f"{prefix}.self_attn"
            if attention.replace_with_linear:
                self.self_attn: nn.Module = LinearAttention(config.hidden_size, quant_config, name)
            else:
                self.self_attn = DeciLMAttention(
                    config=config,
                    hidden_size=config.hidden_size,
                    num_heads=config.num_attention_heads,
                    num_kv_heads=config.num_attention_heads // attention.n_heads_in_group,
                    max_position_embeddings=config.max_position_embeddings,
                    quant_config=quant_config,
                    bias=bias,
                    bias_o_proj=bias,
                    cache_config=cache_config,
                    prefix=name,
                )
        if not ffn.no_op:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            name = f"{prefix}.mlp"
            if ffn.replace_with_linear:
                self.mlp: nn.Module = LinearMLP(config.hidden_size, quant_config, name)
            else:
                self.mlp = LlamaMLP(
                    hidden_size=config.hidden_size,
                    intermediate_size=width_of(ffn, config.hidden_size),
                    hidden_act=config.hidden_act,
                    quant_config=quant_config,
                    bias=getattr(config, "mlp_bias", False),
                    prefix=name,
                )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._is_no_op_attention:
            hidden_states, residual = normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if not self._is_no_op_ffn:
            hidden_states, residual = normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def normed(
    norm: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the sum, and the sum; before the first subblock there is nothing to add."""
    return (norm(hidden_states), hidden_states) if residual is None else norm(hidden_states, residual)


class PluginForCausalLM(DeciLMForCausalLM):
    def _init_model(self, vllm_config: Any, prefix: str = "") -> nn.Module:
        return DeciModel(vllm_config=vllm_config, prefix=prefix, layer_type=PluginDecoderLayer)
