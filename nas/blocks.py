# SPDX-License-Identifier: Apache-2.0
"""Subblocks as torch modules: made for a variant, filled with its weights, put into a layer in another's place."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from ..distill.models import config_of
from ..export.architecture import FFN, Attention, Decoder, Layer
from ..export.remote.modeling_decilm import LinearAttention, LinearMLP, NoAttention, Nothing
from .experts import NamedMixture, in_layout
from .formats import Block

Part = Literal["attention", "ffn"]
PARTS: tuple[Part, Part] = ("attention", "ffn")
_PLACES = {"attention": ("input_layernorm", "self_attn"), "ffn": ("post_attention_layernorm", "mlp")}


@dataclass(frozen=True)
class Module:
    """A subblock: what is normed goes into `body`. Its weights have the names that they have within a layer."""

    part: Part
    norm: nn.Module
    body: nn.Module

    def into(self, layer: Any) -> None:
        norm, body = _PLACES[self.part]
        setattr(layer, norm, self.norm)
        setattr(layer, body, self.body)

    @staticmethod
    def of(layer: Any, part: Part) -> "Module":
        norm, body = _PLACES[part]
        return Module(part, getattr(layer, norm), getattr(layer, body))

    def moved(self, device: torch.device) -> "Module":
        self.norm.to(device)
        self.body.to(device)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        norm, body = _PLACES[self.part]
        named = {f"{norm}.{name}": tensor for name, tensor in self.norm.state_dict().items()}
        return named | {f"{body}.{name}": tensor for name, tensor in self.body.state_dict().items()}


def part_of(block: Block) -> Part:
    return "attention" if isinstance(block, Attention) else "ffn"


def shapes(teacher: Decoder, block: Block) -> dict[str, tuple[int, ...]]:
    """The weights of the block by their names within a layer."""
    nothing = Layer(attention=Attention(kind="none"), ffn=FFN(kind="none"))
    layer = replace(nothing, **{part_of(block): block})  # type: ignore[arg-type]
    prefix = "model.layers.0."
    specs = in_layout(replace(teacher, layers=(layer,))).tensors()
    return {name.removeprefix(prefix): spec.shape for name, spec in specs.items() if name.startswith(prefix)}


def parameters(teacher: Decoder, block: Block) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(teacher, block).values())


def make(teacher: Decoder, block: Block) -> Module:
    """A module without storage for its weights; see `fill`."""
    config = copy.copy(_config(teacher))
    with torch.device("meta"):
        norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if isinstance(block, Attention):
            if block.kind == "grouped":
                config.num_key_value_heads = block.kv_heads
                return Module("attention", norm, LlamaAttention(config, 0))
            if block.kind == "linear":
                return Module("attention", norm, LinearAttention(config))
            return Module("attention", nn.Identity(), NoAttention())
        if block.kind == "dense":
            config.intermediate_size = block.width
            return Module("ffn", norm, LlamaMLP(config))
        if block.kind == "linear":
            return Module("ffn", norm, LinearMLP(config))
        if block.kind == "moe":
            return Module("ffn", norm, NamedMixture(block, config.hidden_size))
        return Module("ffn", nn.Identity(), Nothing())


def fill(module: Module, weights: Mapping[str, torch.Tensor]) -> Module:
    """The module with these weights, which it holds."""
    for prefix, inner in zip(_PLACES[module.part], (module.norm, module.body), strict=True):
        own = {name.removeprefix(f"{prefix}."): x for name, x in weights.items() if name.startswith(f"{prefix}.")}
        inner.load_state_dict(own, assign=True)
        inner.eval().requires_grad_(False)
    return module


def _config(teacher: Decoder) -> Any:
    config = config_of(teacher)
    config._attn_implementation = "sdpa"
    return config
