# SPDX-License-Identifier: Apache-2.0
"""A decoder, layer by layer: the one description that readers, writers and the engine table share.

It says which tensors a model has and what shape each one is, and nothing about how a file or an engine names the
settings; that is in `families` and `configs`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .families import FAMILIES, Family, Moe


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of one layer."""

    kind: Literal["grouped", "linear", "none"] = "grouped"
    """`linear`: one matrix (hidden, hidden) takes its place. `none`: the residual stream passes by, with no norm."""
    kv_heads: int = 0
    window: int | None = None
    """Tokens that a position sees, itself included. None: all before it."""
    zero: bool = False
    """All weights are zeros: exactly `none`, for an engine that cannot leave a subblock out."""
    stored_kv_heads: int = 0
    """KV heads in the source's files where those are fewer: each is written several times, which changes nothing."""

    def __str__(self) -> str:
        if self.kind != "grouped":
            return {"linear": "linear attention", "none": "no attention"}[self.kind]
        window = f", window {self.window}" if self.window else ""
        repeated = f", {self.stored_kv_heads} of them repeated" if self.stored_kv_heads else ""
        return f"attention with {self.kv_heads} KV heads{repeated}{window}{', all zeros' if self.zero else ''}"


@dataclass(frozen=True, kw_only=True)
class FFN:
    """The FFN of one layer: gated (SwiGLU), a mixture of such, one matrix, or nothing."""

    kind: Literal["dense", "moe", "linear", "none"] = "dense"
    width: int = 0
    """Intermediate size; of a single expert if `kind` is `moe`."""
    experts: int = 0
    top_k: int = 0
    normalized: bool = True
    """The weights of the top k experts sum to 1."""
    shared_width: int = 0
    """Of the expert that every token takes, behind a sigmoid gate. 0: there is none."""
    zero: bool = False
    """All weights are zeros: exactly `none`."""
    stored_width: int = 0
    """Rows in the source's files where that is less than `width`: the rest is zeros, which changes nothing."""

    def __str__(self) -> str:
        if self.kind in ("linear", "none"):
            return {"linear": "linear FFN", "none": "no FFN"}[self.kind]
        if self.kind == "moe":
            shared = f", shared expert {self.shared_width}" if self.shared_width else ""
            return f"{self.experts} experts of width {self.width}, top {self.top_k}{shared}"
        return f"FFN of width {self.width}{', all zeros' if self.zero else ''}"


@dataclass(frozen=True, kw_only=True)
class Layer:
    attention: Attention
    ffn: FFN

    def __str__(self) -> str:
        return f"{self.attention}; {self.ffn}"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A weight that a model must have."""

    shape: tuple[int, ...]
    fill: Literal["source", "zeros", "ones"] = "source"
    """`zeros` and `ones` are made, not read."""
    stored: tuple[int, ...] = ()
    """The shape in the source where it is less than `shape`; the rest is zeros."""
    repeated: int = 0
    """Or the rows in the source are blocks of this many, and each block is written several times, one by the other."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only transformer. Sizes are in elements; every layer is described on its own."""

    family: str
    """A key of `FAMILIES`: which blocks these are, not how they are arranged."""
    vocab_size: int
    hidden_size: int
    heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    norm_eps: float
    max_positions: int
    rope: Mapping[str, Any] = field(hash=False)
    tied: bool = False
    """The output matrix is the embedding."""
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    dtype: str = "float32"
    tokens: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Ids of special tokens as the configuration has them (`bos_token_id`, …)."""

    @property
    def blocks(self) -> Family:
        return FAMILIES[self.family]

    @property
    def uniform(self) -> bool:
        """Every layer is like the first."""
        return len(set(self.layers)) <= 1

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.ffn.kind == "moe")

    @property
    def parameters(self) -> int:
        return sum(spec.size for spec in self.tensors().values())

    def __str__(self) -> str:
        kinds = Counter(str(layer) for layer in self.layers)
        (common, count), *rest = kinds.most_common()
        told = f"{count} of {len(self.layers)} layers: {common}" if rest else f"{count} layers: {common}"
        return f"{self.family}, hidden {self.hidden_size}, {self.heads} heads of {self.head_dim}; {told}"

    def tensors(self) -> dict[str, TensorSpec]:
        """Every weight by its Hugging Face name. A tied output matrix is not among them: it is the embedding."""
        specs = {"model.embed_tokens.weight": TensorSpec(shape=(self.vocab_size, self.hidden_size))}
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            specs |= {prefix + name: spec for name, spec in self._attention(layer.attention)}
            specs |= {prefix + name: spec for name, spec in self._ffn(layer.ffn)}
        specs["model.norm.weight"] = TensorSpec(shape=(self.hidden_size,))
        if not self.tied:
            specs["lm_head.weight"] = TensorSpec(shape=(self.vocab_size, self.hidden_size))
        return specs

    def _attention(self, attention: Attention) -> Iterator[tuple[str, TensorSpec]]:
        hidden, query, kv = self.hidden_size, self.heads * self.head_dim, attention.kv_heads * self.head_dim
        if attention.kind == "none":
            return
        yield "input_layernorm.weight", TensorSpec(shape=(hidden,), fill="ones" if attention.zero else "source")
        if attention.kind == "linear":
            yield "self_attn.linear_attn.weight", TensorSpec(shape=(hidden, hidden))
            return
        fill = "zeros" if attention.zero else "source"
        fewer = attention.stored_kv_heads * self.head_dim
        for name, rows, columns, bias in (
            ("q_proj", query, hidden, self.qkv_bias),
            ("k_proj", kv, hidden, self.qkv_bias),
            ("v_proj", kv, hidden, self.qkv_bias),
            ("o_proj", hidden, query, self.output_bias),
        ):
            few = fewer if name in ("k_proj", "v_proj") else 0
            block = self.head_dim if few else 0
            stored = (few, columns) if few else ()
            yield (
                f"self_attn.{name}.weight",
                TensorSpec(shape=(rows, columns), fill=fill, stored=stored, repeated=block),
            )
            if bias:
                yield f"self_attn.{name}.bias", TensorSpec(shape=(rows,), fill=fill, stored=stored[:1], repeated=block)
        if self.blocks.qk_norm:
            ones = "ones" if attention.zero else "source"
            yield "self_attn.q_norm.weight", TensorSpec(shape=(self.head_dim,), fill=ones)
            yield "self_attn.k_norm.weight", TensorSpec(shape=(self.head_dim,), fill=ones)

    def _ffn(self, ffn: FFN) -> Iterator[tuple[str, TensorSpec]]:
        hidden = self.hidden_size
        if ffn.kind == "none":
            return
        yield "post_attention_layernorm.weight", TensorSpec(shape=(hidden,), fill="ones" if ffn.zero else "source")
        if ffn.kind == "linear":
            yield "mlp.linear_mlp.weight", TensorSpec(shape=(hidden, hidden))
        elif ffn.kind == "dense":
            yield from self._gated("mlp.{}", ("gate_proj", "up_proj", "down_proj"), ffn)
        elif moe := self.blocks.moe:
            yield from self._experts(moe, ffn)

    def _experts(self, moe: Moe, ffn: FFN) -> Iterator[tuple[str, TensorSpec]]:
        hidden = self.hidden_size
        yield moe.router, TensorSpec(shape=(ffn.experts, hidden))
        for expert in range(ffn.experts):
            yield from self._gated(moe.expert.replace("{expert}", str(expert)), moe.matrices, FFN(width=ffn.width))
        if ffn.shared_width:
            yield from self._gated(moe.shared, ("gate_proj", "up_proj", "down_proj"), FFN(width=ffn.shared_width))
            yield moe.shared_gate, TensorSpec(shape=(1, hidden))

    def _gated(self, pattern: str, names: tuple[str, str, str], ffn: FFN) -> Iterator[tuple[str, TensorSpec]]:
        fill = "zeros" if ffn.zero else "source"
        stored = ffn.stored_width
        for name, is_down in zip(names, (False, False, True), strict=True):
            shape, less = (ffn.width, self.hidden_size), (stored, self.hidden_size)
            if is_down:
                shape, less = shape[::-1], less[::-1]
            base = pattern.format(name)
            yield f"{base}.weight", TensorSpec(shape=shape, fill=fill, stored=less if stored else ())
            if self.ffn_bias:
                full = not is_down and stored
                yield f"{base}.bias", TensorSpec(shape=shape[:1], fill=fill, stored=(stored,) if full else ())
