# SPDX-License-Identifier: Apache-2.0
"""Attention without norms of queries and keys, written for a family that has them, so that the norms do nothing.

Qwen3's blocks divide each head's query and key by its root mean square. In heads of twice the width, half of the
channels are spare, and a bias (Qwen3's `attention_bias`) gives some of them one large constant: the mean square is then
that constant's but for a share of |q|² / Σ c², and the norm's weights, which are powers of two, undo it and leave the
spare channels out of every score. All of it is exact in any type of numbers, except that share (below 10⁻⁶ for
|q| = 50). The price: a KV cache of twice the size, and attention as wide.

Rotary embedding turns pairs (j, j + width / 2) by rates that follow from the width; the rates of a head of d channels
are every second one of 2d, so pair j goes to pair 2j.
"""

from collections.abc import Mapping

import torch

from ...export.architecture import Decoder
from .errors import LayoutError

_SCALE = 2.0**12
"""The root mean square that the constants make. With it they stay within float16."""
_ROPES = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose rates are changed one by one, whatever the head's width."""


def problem(source: Decoder) -> str | None:
    """Why queries and keys cannot be so written, if they cannot."""
    kind = source.rope.get("rope_type", "default")
    if kind not in _ROPES:
        return f"rotary embedding of the kind {kind!r} is another in heads of another width"
    if source.head_dim % 2:
        return f"heads of {source.head_dim} channels have no pairs"
    return None


def widened(weights: Mapping[str, torch.Tensor], source: Decoder, kv_heads: int) -> dict[str, torch.Tensor]:
    """The attention of one layer in heads of twice the width, by the names that Qwen3's have within it.

    weights: `q_proj.weight` and so on, biases where there are any.

    Raises:
        LayoutError: if it cannot be done, see `problem`.
    """
    if told := problem(source):
        raise LayoutError(told)
    width = source.head_dim
    found: dict[str, torch.Tensor] = {}
    # (mean square of the constants, in units of _SCALE², weight of the norm): 1 / sqrt(2 d) of the wider attention
    # against 1 / sqrt(d) is made up for by queries whose constants have half the mean square.
    for name, heads, half in (("q", source.heads, True), ("k", kv_heads, False)):
        matrix = weights[f"{name}_proj.weight"]
        bias = weights.get(f"{name}_proj.bias", torch.zeros(len(matrix), dtype=matrix.dtype))
        found[f"{name}_proj.weight"] = _spread(matrix, heads, width)
        found[f"{name}_proj.bias"] = _with_constants(_spread(bias, heads, width), heads, width, half=half)
        norm = torch.zeros(2 * width, dtype=matrix.dtype)
        norm[_places(width)] = _SCALE
        found[f"{name}_norm.weight"] = norm
    value = weights["v_proj.weight"]
    bias = weights.get("v_proj.bias", torch.zeros(len(value), dtype=value.dtype))
    found["v_proj.weight"], found["v_proj.bias"] = _padded(value, kv_heads, width), _padded(bias, kv_heads, width)
    output = weights["o_proj.weight"]
    found["o_proj.weight"] = _padded(output.T, source.heads, width).T.contiguous()
    found["o_proj.bias"] = weights.get("o_proj.bias", torch.zeros(len(output), dtype=output.dtype))
    return found


def _places(width: int) -> torch.Tensor:
    """Where the channels of a head go among twice as many."""
    half = torch.arange(width // 2) * 2
    return torch.cat([half, half + width])


def _spread(rows: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    wide = rows.new_zeros(heads, 2 * width, *rows.shape[1:])
    wide[:, _places(width)] = rows.view(heads, width, *rows.shape[1:])
    return wide.flatten(0, 1)


def _padded(rows: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    wide = rows.new_zeros(heads, 2 * width, *rows.shape[1:])
    wide[:, :width] = rows.view(heads, width, *rows.shape[1:])
    return wide.flatten(0, 1)


def _with_constants(bias: torch.Tensor, heads: int, width: int, *, half: bool) -> torch.Tensor:
    """With constants c in n spare channels: n c² is 2 d times `_SCALE`², or half of that, and c a power of two."""
    needed, step = (width if half else 2 * width), 1
    while needed % 4 == 0:
        needed, step = needed // 4, step * 2
    spare = torch.arange(width // 2)[:, None] * 2 + torch.tensor([1, 1 + width])
    wide = bias.view(heads, 2 * width)
    wide[:, spare.flatten()[:needed]] = step * _SCALE
    return wide.flatten()
