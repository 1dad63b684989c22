# SPDX-License-Identifier: Apache-2.0
"""The same function with layers that are all alike, which every engine of the family loads, by its own class.

Exact, not nearest: KV heads are repeated (a query finds the same keys and values), widths are filled up with zeros, and
a subblock that is not there is one of zeros. What is gained by layers that differ is lost: all are as large as the
largest.
"""

import math
from dataclasses import replace

from .architecture import FFN, Attention, Decoder, Layer
from .configs import uniform_obstacles


def alike(decoder: Decoder) -> Decoder | None:
    """The decoder with layers that are alike; None if no weights make them so (linear subblocks, experts, windows)."""
    kinds = {layer.attention.kind for layer in decoder.layers} | {layer.ffn.kind for layer in decoder.layers}
    if kinds & {"linear", "moe"}:
        return None
    grouped = [layer.attention for layer in decoder.layers if layer.attention.kind == "grouped"]
    kv_heads = math.lcm(*(attention.kv_heads for attention in grouped)) if grouped else 1
    width = max((layer.ffn.width for layer in decoder.layers), default=0) or 1
    window = grouped[0].window if grouped else None
    layers = tuple(
        Layer(attention=_attention(layer.attention, kv_heads, window), ffn=_ffn(layer.ffn, width))
        for layer in decoder.layers
    )
    found = replace(decoder, layers=layers)
    return None if uniform_obstacles(found) else found


def _attention(attention: Attention, kv_heads: int, window: int | None) -> Attention:
    if attention.kind == "none":
        return Attention(kv_heads=kv_heads, window=window, zero=True)
    if attention.kv_heads == kv_heads:
        return attention
    stored = 0 if attention.zero else attention.stored_kv_heads or attention.kv_heads
    return replace(attention, kv_heads=kv_heads, stored_kv_heads=stored)


def _ffn(ffn: FFN, width: int) -> FFN:
    if ffn.kind == "none":
        return FFN(width=width, zero=True)
    if ffn.width == width:
        return ffn
    return replace(ffn, width=width, stored_width=0 if ffn.zero else ffn.stored_width or ffn.width)
