# SPDX-License-Identifier: Apache-2.0
"""A decoder with its KV cache, into which a tree of positions is put and of which one path stays.

The layers are those of `distill.models` (transformers' Llama, or nemotron-nas); only attention is done here, over keys
and values in one block of memory, so that dropping the positions that were guessed wrong is one copy. Layers can be run
a few at a time, which is what early exits need.

Rounding: the matrix products of several positions at once are not those of one position after the other, so logits of
the two ways differ, in float32 by about a millionth of the largest. See `decode.pick` for what follows from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ...distill.models import DeciLMForCausalLM
from .errors import HeadsUsageError

_ROOM = 256
"""Positions that the cache grows by, at least."""


@dataclass(frozen=True)
class Places:
    """Where some new positions are: the slots `start` to `stop` of the cache, and what each may see."""

    start: int
    stop: int
    rotary: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    """(new, stop); None: all before it, as a single newest position does."""


class CachedModel:
    """`length` positions are kept; those that were grown since are pending until `keep` says which of them stay."""

    def __init__(self, model: DeciLMForCausalLM) -> None:
        self.model = model
        config: Any = model.config
        self._heads = config.num_attention_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self.limit = config.max_position_embeddings
        self.layers: list[Any] = list(model.model.layers)
        self._kv_heads = max([_kv_heads(layer, self._size) for layer in self.layers], default=0)
        weight = model.model.embed_tokens.weight
        self.dtype, self._device = weight.dtype, weight.device
        self._store = torch.empty(0)
        self._rotary: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self.length = 0
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._reserve(_ROOM)

    @property
    def pending(self) -> int:
        return len(self._parents)

    def reset(self) -> None:
        self.length = 0
        self._drop()

    def grow(self, parents: Sequence[int]) -> Places:
        """Makes room for new positions. parents: of each, a pending position that comes before; -1: the kept ones.

        Raises:
            HeadsUsageError: if the model has no more positions.
        """
        first = self.pending
        for parent in parents:
            self._depths.append(self._depths[parent] + 1 if parent >= 0 else 0)
            self._parents.append(parent)
        if self.length + max(self._depths) >= self.limit:
            self._drop()
            raise HeadsUsageError(f"the model has {self.limit} positions; ask for fewer tokens, or a shorter prompt")
        self._reserve(self.length + self.pending)
        return self.places(first)

    def places(self, first: int = 0) -> Places:
        """Of the pending positions from `first` on."""
        count = self.pending
        depths = self._depths[first:]
        low, high = self.length + min(depths), self.length + max(depths) + 1
        if len(depths) == high - low:  # a chain
            rotary = (self._rotary[0][:, low:high], self._rotary[1][:, low:high])
        else:
            at = torch.tensor(depths, device=self._device) + self.length
            rotary = (self._rotary[0][:, at], self._rotary[1][:, at])
        return Places(self.length + first, self.length + count, rotary, self._mask(first))

    def _mask(self, first: int) -> torch.Tensor | None:
        count = self.pending
        straight = all(parent == node - 1 for node, parent in enumerate(self._parents))
        if straight and count - first == 1:
            return None
        mask = torch.ones(count - first, self.length + count, dtype=torch.bool, device=self._device)
        if straight:
            return mask.tril_(self.length + first)
        among = torch.eye(count, dtype=torch.bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                among[node] |= among[parent]
        mask[:, self.length :] = among[first:]
        return mask

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """(tokens, hidden)."""
        return functional.embedding(torch.tensor(list(ids), device=self._device), self.model.model.embed_tokens.weight)

    def through(self, hidden: torch.Tensor, places: Places, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The residual stream (positions, hidden) after the layers `first` to `last`, from that before them."""
        hidden = hidden[None]
        for index in range(first, len(self.layers) if last is None else last):
            layer = self.layers[index]
            hidden = hidden + self._attention(layer.self_attn, layer.input_layernorm(hidden), index, places)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden[0]

    def run(self, ids: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Grown and through all layers and the last norm: (positions, hidden)."""
        places = self.grow(parents)
        return self.norm(self.through(self.embed(ids), places))

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.model.norm(hidden)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.model.lm_head.weight)

    def keep(self, path: Sequence[int]) -> None:
        """The pending positions in `path`, each the parent of the next, are kept; the others are gone."""
        if list(path) != list(range(len(path))):
            start = self.length
            at = torch.tensor(list(path), device=self._device) + start
            self._store[:, :, :, start : start + len(path)] = self._store[:, :, :, at]
        self.length += len(path)
        self._drop()

    def cut(self, length: int) -> None:
        """Forgets what is pending, and what was kept beyond `length`."""
        self.length = min(self.length, length)
        self._drop()

    def _drop(self) -> None:
        self._parents, self._depths = [], []

    def _reserve(self, slots: int) -> None:
        if self._store.numel() and slots <= self._store.shape[3]:
            return
        room = max(slots + _ROOM, 2 * (self._store.shape[3] if self._store.numel() else 0))
        shape = (len(self.layers), 2, self._kv_heads, room, self._size)
        store = torch.zeros(shape, dtype=self.dtype, device=self._device)
        if self._store.numel():
            store[:, :, :, : self._store.shape[3]] = self._store
        self._store = store
        ids = torch.arange(min(room, self.limit), device=self._device)[None]
        self._rotary = self.model.model.rotary_emb(self.model.model.embed_tokens.weight[:1, None], position_ids=ids)

    def _attention(self, attention: Any, hidden: torch.Tensor, layer: int, places: Places) -> torch.Tensor:
        kv = _kv_heads(self.layers[layer], self._size)
        if not kv:  # nothing in its place, or one matrix
            return attention(hidden)[0]
        count = hidden.shape[1]

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(1, count, -1, self._size).transpose(1, 2)

        query, key = apply_rotary_pos_emb(
            heads(attention.q_proj(hidden)), heads(attention.k_proj(hidden)), *places.rotary
        )
        store = self._store[layer, :, :kv]
        store[0, :, places.start : places.stop] = key[0]
        store[1, :, places.start : places.stop] = heads(attention.v_proj(hidden))[0]
        # the query heads of a group see the same keys: they are more positions of one head
        groups = self._heads // kv
        mask = places.mask if places.mask is None or groups == 1 else places.mask.repeat(groups, 1)
        found = functional.scaled_dot_product_attention(
            query.reshape(1, kv, groups * count, self._size),
            store[None, 0, :, : places.stop],
            store[None, 1, :, : places.stop],
            attn_mask=mask,
            scale=attention.scaling,
        )
        return attention.o_proj(found.reshape(1, self._heads, count, self._size).transpose(1, 2).flatten(2))


def _kv_heads(layer: Any, size: int) -> int:
    """0: the layer has no attention that sees other positions."""
    projection = getattr(layer.self_attn, "k_proj", None)
    return 0 if projection is None else projection.out_features // size
