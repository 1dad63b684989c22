# SPDX-License-Identifier: Apache-2.0
"""Where attention and FFN begin and end in each family of models, as data, and which linear modules a model has.

A subblock reads its input through some linear modules and ends in one; what a bottleneck adapter adds is added there.
So Llama's gated FFN, OPT's two bare matrices and BLOOM's FFN, which adds the residual itself, are all the same here.
Sources: `modeling_*.py` of transformers.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import TargetsError, UnknownBlocksError


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The names of one family, within a layer unless said otherwise."""

    layers: str
    """Of the list of layers, from the model."""
    attention_in: tuple[str, ...]
    attention_out: str
    ffn_in: tuple[str, ...]
    """The first is the one that the activation is applied to."""
    ffn_out: str
    activation: str
    width_key: str
    """What the configuration calls the FFN's width. Empty: it follows from the hidden size."""

    @property
    def gated(self) -> bool:
        """ffn_out(activation(ffn_in[0] x) * (ffn_in[1] x))"""
        return len(self.ffn_in) == 2


_LLAMA = Blocks(
    layers="model.layers",
    attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    activation="mlp.act_fn",
    width_key="intermediate_size",
)
BLOCKS: dict[str, Blocks] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "nemotron-nas"), _LLAMA),
    "gpt_neox": Blocks(
        layers="gpt_neox.layers",
        attention_in=("attention.query_key_value",),
        attention_out="attention.dense",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        activation="mlp.act",
        width_key="intermediate_size",
    ),
    "opt": Blocks(
        layers="model.decoder.layers",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.out_proj",
        ffn_in=("fc1",),
        ffn_out="fc2",
        activation="activation_fn",
        width_key="ffn_dim",
    ),
    "bloom": Blocks(
        layers="transformer.h",
        attention_in=("self_attention.query_key_value",),
        attention_out="self_attention.dense",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        activation="mlp.gelu_impl",
        width_key="",
    ),
}
"""By `model_type`."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One subblock of one layer."""

    layer: int
    part: str
    """"attention" or "mlp"."""
    prefix: str
    """Of the names in this layer, with its dot at the end."""
    entries: tuple[str, ...]
    exit: str
    hidden_size: int
    activation: torch.nn.Module | None
    """The FFN's own."""


def blocks_of(model: torch.nn.Module) -> Blocks:
    """Raises UnknownBlocksError for a model that is not in the table."""
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in BLOCKS:
        raise UnknownBlocksError(f"models of type {kind!r} are not known here; known are {', '.join(BLOCKS)}")
    return BLOCKS[kind]


def sites(model: torch.nn.Module, parts: Sequence[str]) -> list[Site]:
    """The subblocks `parts` ("attention", "mlp") of all layers that have them.

    Raises:
        UnknownBlocksError: see `blocks_of`.
    """
    blocks, modules = blocks_of(model), dict(model.named_modules())
    found = []
    for layer in range(len(modules[blocks.layers])):  # type: ignore[arg-type]
        prefix = f"{blocks.layers}.{layer}."
        for part in parts:
            entries, end = (
                (blocks.attention_in, blocks.attention_out) if part == "attention" else (blocks.ffn_in, blocks.ffn_out)
            )
            last = modules.get(prefix + end)
            if not isinstance(last, torch.nn.Linear) or not all(prefix + name in modules for name in entries):
                continue  # a layer without this subblock
            found.append(
                Site(
                    layer=layer,
                    part=part,
                    prefix=prefix,
                    entries=tuple(prefix + name for name in entries),
                    exit=prefix + end,
                    hidden_size=last.out_features,
                    activation=modules.get(prefix + blocks.activation) if part == "mlp" else None,
                )
            )
    return found


def find_targets(model: torch.nn.Module, wanted: Sequence[str]) -> list[str]:
    """The names of the linear modules that `wanted` means: "attention", "mlp", or the end of a name as "q_proj".

    Raises:
        TargetsError: naming what matches nothing, with what the model has; or an output that is the embedding too.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    groups = {
        part: {name for site in sites(model, [part]) for name in (*site.entries, site.exit)}
        for part in ("attention", "mlp")
    }
    found, missing = set[str](), []
    for name in wanted:
        mine = groups.get(name) or {one for one in linears if f".{one}".endswith(f".{name}")}
        found |= mine
        if not mine:
            missing.append(name)
    if missing or not found:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linears})
        near = [difflib.get_close_matches(name, ends, n=1) for name in missing]
        hints = [
            f"{name!r}" + (f" (did you mean {n[0]!r}?)" if n else "") for name, n in zip(missing, near, strict=True)
        ]
        raise TargetsError(
            f"targets match no linear module: {', '.join(hints) or 'none are named'}. This model has "
            f"{', '.join(ends)}; 'attention' and 'mlp' mean those of these subblocks"
        )
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    tied = [name for name in found if embedding is not None and modules[name].weight is embedding.weight]
    if tied:
        raise TargetsError(
            f"targets name {tied[0]}, which has the weights of the input embedding here: what is merged into one would "
            "change the other. Leave it out"
        )
    return [name for name in linears if name in found]
