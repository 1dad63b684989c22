# SPDX-License-Identifier: Apache-2.0
"""Attention with fewer KV heads: pruned or mean-pooled, exact at the start, then with a refitted output projection.

Pruned: the KV heads that matter most stay, each with its own query heads first in its new group. The query heads that
lose their KV head fill the groups up and get zeros in the output projection: at first exactly the attention without
them, but trainable. Mean-pooled: neighbouring KV heads become their mean (GQA, 2305.13245), exact where they are equal.
"""

from typing import Any

import torch

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def head_scores(values: torch.Tensor, output: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """How much each KV head adds to the output: mean over tokens of ‖W_o^(its group) a‖, (kv_heads,).

    values: (tokens, heads · head_dim), what goes into the output projection (hidden, heads · head_dim).
    """
    parts = zip(values.chunk(kv_heads, -1), output.chunk(kv_heads, -1), strict=True)
    return torch.stack([(value @ weight.T).norm(dim=-1).mean() for value, weight in parts])


def pruned(
    weights: dict[str, torch.Tensor], scores: torch.Tensor, *, heads: int, head_dim: int, kv_heads: int
) -> dict[str, torch.Tensor]:
    """The attention with the `kv_heads` best of its KV heads; weights by their names within a layer."""
    before = len(scores)
    group, wide = heads // before, heads // kv_heads
    best = sorted(torch.argsort(scores, descending=True, stable=True)[:kv_heads].tolist())
    lost = [head for head in range(heads) if head // group not in best]
    order, silent = [], []
    for head in best:
        own = list(range(head * group, (head + 1) * group))
        fill = [lost.pop(0) for _ in range(wide - group)]
        silent += range(len(order) + group, len(order) + wide)
        order += own + fill
    q, k, v, o = (weights[f"self_attn.{name}.weight"] for name in _PROJECTIONS)
    query, kept = _rows(order, head_dim), _rows(best, head_dim)
    output = o[:, query].clone()
    output[:, _rows(silent, head_dim)] = 0
    return _named(weights, q[query], k[kept], v[kept], output)


def pooled(weights: dict[str, torch.Tensor], *, before: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """The attention with each run of `before / kv_heads` KV heads replaced by their mean."""
    q, k, v, o = (weights[f"self_attn.{name}.weight"] for name in _PROJECTIONS)

    def mean(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.reshape(kv_heads, before // kv_heads, -1, matrix.shape[1]).mean(1).flatten(0, 1)

    return _named(weights, q, mean(k), mean(v), o)


def captured(module: Any, inputs: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(what goes into the output projection, what comes out of the attention)."""
    seen: list[torch.Tensor] = []
    handle = module.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        out, _ = module(hidden_states=inputs, attention_mask=None, **arguments)
    finally:
        handle.remove()
    return seen[0], out


def _rows(heads: list[int], head_dim: int) -> torch.Tensor:
    return torch.tensor([head * head_dim + row for head in heads for row in range(head_dim)], dtype=torch.long)


def _named(
    weights: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor
) -> dict[str, torch.Tensor]:
    matrices = dict(zip(_PROJECTIONS, (q, k, v, o), strict=True))
    return {
        "input_layernorm.weight": weights["input_layernorm.weight"],
        **{f"self_attn.{name}.weight": matrix.contiguous() for name, matrix in matrices.items()},
    }
