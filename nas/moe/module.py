# SPDX-License-Identifier: Apache-2.0
"""A carved model as a torch module: `distill`'s, with mixtures in the places of FFNs, trained and measured like any.

The mixture keeps its weights as three matrices, the shared channels first and then expert after expert, and computes
all channels before it weighs them: on a CPU, and with experts as narrow as these, one large product is as fast as
gathering tokens for many small ones, and gradients come out the same. Its weights are, row by row, those of the
exported layout, with the same softmax: what is trained is what is served.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ...distill.models import build
from ...export.architecture import FFN, Decoder
from ...export.directory import ModelDirectory
from ...export.families import Moe
from .errors import LayoutError
from .gates import balance_loss, expert_weights

_SHARED = ("gate_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class Mixture:
    """The weights of one mixture. P = shared + E · m rows, the shared ones first. As the layout stores them."""

    router: torch.Tensor
    """(E, hidden)"""
    gate: torch.Tensor
    """(P, hidden)"""
    up: torch.Tensor
    """(P, hidden)"""
    down: torch.Tensor
    """(hidden, P)"""
    shared_gate: torch.Tensor | None = None
    """(1, hidden)"""

    def named(self, moe: Moe, ffn: FFN) -> dict[str, torch.Tensor]:
        """By the names that the family has within a layer. A shared expert that has no channels here is of zeros."""
        found = {moe.router: self.router}
        first = len(self.gate) - ffn.experts * ffn.width
        for expert in range(ffn.experts):
            begin = first + expert * ffn.width
            part = slice(begin, begin + ffn.width)
            matrices = (self.gate[part], self.up[part], self.down[:, part])
            found |= dict(zip(moe.expert_names(expert), matrices, strict=True))
        if ffn.shared_width:
            found |= self._shared(moe, ffn, first)
        return found

    def _shared(self, moe: Moe, ffn: FFN, first: int) -> dict[str, torch.Tensor]:
        missing = ffn.shared_width - first
        matrices = [self.gate[:first], self.up[:first], self.down[:, :first]]
        if missing:
            matrices = [functional.pad(m, (0, missing) if m is matrices[2] else (0, 0, 0, missing)) for m in matrices]
        named = {f"{moe.shared.format(name)}.weight": m for name, m in zip(_SHARED, matrices, strict=True)}
        gate = half_gate(self.router.shape[1]).to(self.router) if self.shared_gate is None else self.shared_gate
        return named | {moe.shared_gate: gate}

    @staticmethod
    def read(weights: Mapping[str, torch.Tensor], moe: Moe, ffn: FFN) -> "Mixture":
        """From a layer's weights by their names in it."""
        names = zip(*(moe.expert_names(expert) for expert in range(ffn.experts)), strict=True)
        parts = [[weights[name] for name in matrix] for matrix in names]
        if ffn.shared_width:
            for part, name in zip(parts, _SHARED, strict=True):
                part.insert(0, weights[f"{moe.shared.format(name)}.weight"])
        return Mixture(
            router=weights[moe.router],
            gate=torch.cat(parts[0]),
            up=torch.cat(parts[1]),
            down=torch.cat(parts[2], 1),
            shared_gate=weights[moe.shared_gate] if ffn.shared_width else None,
        )


def half_gate(hidden: int) -> torch.Tensor:
    """A gate whose sigmoid is 1/2 for every token, to less than float32 shows: (1, hidden).

    Not of zeros: llama.cpp computes sigmoid(x) as silu(x) / x, which has no value at 0. 2^-24 is the least of float16.
    """
    signs = 1 - 2 * (torch.arange(hidden) % 2)
    return signs[None] * 2.0**-24


class MoeFFN(nn.Module):
    """In the place of an FFN. `balance` is the load-balancing loss of the last pass that gradients were wanted of."""

    def __init__(self, weights: Mixture, ffn: FFN) -> None:
        super().__init__()
        self.top_k, self.normalized, self.experts = ffn.top_k, ffn.normalized, ffn.experts
        self.width, self.shared = ffn.width, len(weights.gate) - ffn.experts * ffn.width
        self.router = nn.Parameter(weights.router)
        self.gate, self.up = nn.Parameter(weights.gate), nn.Parameter(weights.up)
        self.down = nn.Parameter(weights.down)
        needed = self.shared and weights.shared_gate is None
        shared_gate = half_gate(weights.router.shape[1]).to(weights.router) if needed else weights.shared_gate
        self.shared_gate = None if shared_gate is None else nn.Parameter(shared_gate)
        self.balance: torch.Tensor | None = None
        self.forced: torch.Tensor | None = None
        """(…, k) experts to take in place of the gate's own, which then only weighs them; see `pregating`."""
        self.likeness: torch.Tensor | None = None
        """Of the last pass with `forced`: the cross entropy of the gate's shares to those experts."""

    def mixture(self) -> Mixture:
        shared_gate = None if self.shared_gate is None else self.shared_gate.data
        return Mixture(
            router=self.router.data, gate=self.gate.data, up=self.up.data, down=self.down.data, shared_gate=shared_gate
        )

    def choice(self, hidden: torch.Tensor) -> torch.Tensor:
        """The experts that the gate takes, (…, k), the heaviest first."""
        return expert_weights(hidden @ self.router.T, self.top_k, normalized=self.normalized)[1]

    def output_energy(self, hidden: torch.Tensor) -> torch.Tensor:
        """‖E_e(x)‖² of every expert, as its weights are stored: (…, E)."""
        gate, up, down = self.gate[self.shared :], self.up[self.shared :], self.down[:, self.shared :]
        inner = functional.silu(hidden @ gate.T) * (hidden @ up.T)
        parts = zip(inner.split(self.width, -1), down.split(self.width, 1), strict=True)
        return torch.stack([(mine @ matrix.T).square().sum(-1) for mine, matrix in parts], -1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ self.router.T
        weights, chosen = self._weights(logits)
        if torch.is_grad_enabled():
            self.balance = balance_loss(torch.softmax(logits.float(), -1), chosen)
        each = weights.repeat_interleave(self.width, -1)
        if self.shared:
            assert self.shared_gate is not None
            always = torch.sigmoid(hidden @ self.shared_gate.T)
            each = torch.cat([always.expand(*always.shape[:-1], self.shared), each], -1)
        inner = functional.silu(hidden @ self.gate.T) * (hidden @ self.up.T)
        return (inner * each.to(inner)) @ self.down.T

    def _weights(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.forced is None:
            return expert_weights(logits, self.top_k, normalized=self.normalized)
        share = torch.softmax(logits.float(), -1)
        taken = share.gather(-1, self.forced)
        self.likeness = -taken.clamp_min(1e-30).log().mean()
        if self.normalized:
            taken = taken / taken.sum(-1, keepdim=True)
        return torch.zeros_like(share).scatter(-1, self.forced, taken), self.forced


def build_carved(decoder: Decoder, weights: Mapping[str, torch.Tensor]) -> Any:
    """The module of a decoder with experts whose other blocks are Llama's, in float32.

    Raises:
        LayoutError: if they are not: norms of queries and keys, biases that are not zeros, windows.
    """
    moe = decoder.blocks.moe
    assert moe is not None
    biases = [name for name in weights if name.endswith("_proj.bias")]
    odd = [name for name in biases if weights[name].any()]
    if odd or decoder.blocks.qk_norm or any(layer.attention.window for layer in decoder.layers):
        told = f"{odd[0]} is not zeros" if odd else f"{decoder.family} has norms or windows here that Llama has not"
        raise LayoutError(f"only Llama's blocks are measured and trained, and {told}")
    plain = replace(
        decoder,
        family="llama",
        qkv_bias=False,
        output_bias=False,
        layers=tuple(
            replace(layer, ffn=FFN(kind="none")) if layer.ffn.kind == "moe" else layer for layer in decoder.layers
        ),
    )
    wide = {name: tensor.float() for name, tensor in weights.items() if name not in biases}
    model: Any = build(plain, {name: wide[name] for name in plain.tensors()}, dtype=torch.float32)
    for index, layer in enumerate(decoder.layers):
        if layer.ffn.kind == "moe":
            prefix = f"model.layers.{index}."
            own = {name.removeprefix(prefix): x for name, x in wide.items() if name.startswith(prefix)}
            norm = LlamaRMSNorm(decoder.hidden_size, eps=decoder.norm_eps)
            norm.weight.data = own["post_attention_layernorm.weight"]
            block = model.model.layers[index]
            block.post_attention_layernorm = norm
            block.mlp = MoeFFN(Mixture.read(own, moe, layer.ffn), layer.ffn)
    return model.eval().requires_grad_(False)


def load_carved(source: ModelDirectory) -> Any:
    """`build_carved` of a directory."""
    return build_carved(source.decoder, dict(source.weights(list(source.decoder.tensors()))))


def stored_dtype(source: ModelDirectory) -> torch.dtype:
    """What a directory's weights are stored in, and what is made of it is too."""
    stored = source.tensors["model.embed_tokens.weight"].dtype
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[stored]


def carved_weights(model: Any, decoder: Decoder) -> dict[str, torch.Tensor]:
    """The weights of such a module by the names that a directory of it has, in float32."""
    moe, state = decoder.blocks.moe, model.state_dict()
    assert moe is not None
    found: dict[str, torch.Tensor] = {}
    for index in decoder.moe_layers:
        named = model.model.layers[index].mlp.mixture().named(moe, decoder.layers[index].ffn)
        found |= {f"model.layers.{index}.{name}": tensor for name, tensor in named.items()}
    for name, spec in decoder.tensors().items():
        if name not in found:
            found[name] = state[name] if name in state else torch.zeros(spec.shape)
    return found


def mixtures(model: Any) -> list[MoeFFN]:
    """In the order of the layers; layers that stayed dense have none."""
    return [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoeFFN)]
