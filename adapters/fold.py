# SPDX-License-Identifier: Apache-2.0
"""Parallel bottlenecks folded into wider FFNs: extra channels that compute exactly what the adapter adds.

    gated     W_d (act(W_g x) * W_u x) + s U (act(G x) * D x)  =  [W_d, s U] (act([W_g; G] x) * [W_u; D] x)
    bare      W_2 act(W_1 x + b) + s U act(D x)                =  [W_2, s U] act([W_1; D] x + [b; 0])
    linear    z = act(z) - act(-z) for relu, gelu and silu, so a linear bottleneck in a bare FFN is twice its width:
              s U D x = s U act(D x) - s U act(-D x)

Channels of zeros fill up to a multiple, since engines take FFN widths in steps (GGUF's quantizations and
compressed-tensors' groups: 32; widths that differ in SGLang and TensorRT-LLM: 256); they compute zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .sites import Blocks, Site

Activation = Callable[[torch.Tensor], torch.Tensor]
STEP = 32
"""The smallest step that every quantization takes; `export.fit` widens further where an engine needs it."""


@dataclass(frozen=True, kw_only=True)
class Widening:
    """What is added to one FFN."""

    first: torch.Tensor
    """(width, hidden): beside the matrix that the activation is applied to."""
    second: torch.Tensor | None
    """(width, hidden): beside the other one of a gated FFN."""
    out: torch.Tensor
    """(hidden, width), the scale within."""
    both_signs: bool = False
    """The bottleneck is linear: act(z) - act(-z)."""


def can_fold(blocks: Blocks, activation: str, act: Activation, own: Activation) -> str:
    """Why a parallel bottleneck does not fold into such an FFN; empty if it does.

    activation: as the recipe names it; act, own: the bottleneck's function and the FFN's.
    """
    if not blocks.width_key:
        return (
            "the width of this family's FFN follows from its hidden size, so none can be wider. Nearest that is "
            'served: kind = "lora"'
        )
    grid = torch.linspace(-12, 12, 4801)
    if activation == "same":
        return ""
    if blocks.gated:
        return (
            f"a bottleneck with {activation} and no gate is none of the channels of this gated FFN. Nearest that is "
            'served: activation = "same", which has a gate and folds exactly'
        )
    with torch.no_grad():
        if activation == "linear" and torch.allclose(own(grid) - own(-grid), grid, rtol=0, atol=1e-5):
            return ""
        if activation != "linear" and torch.equal(own(grid), act(grid)):
            return ""
    return (
        f"a bottleneck with {activation} is none of the channels of this FFN, whose activation is another. Nearest "
        'that is served: activation = "same"'
    )


def widen(
    state: Mapping[str, torch.Tensor], site: Site, widening: Widening, *, step: int = STEP
) -> dict[str, torch.Tensor]:
    """The FFN's weights with the adapter in them, in the types that they have, by their names."""
    first, second, out = widening.first, widening.second, widening.out
    if widening.both_signs:
        first, out = torch.cat([first, -first]), torch.cat([out, -out], dim=1)
    old = state[f"{site.exit}.weight"].shape[1]
    spare = -(old + first.shape[0]) % step
    made = {}
    for name, more in zip(site.entries, (first, second), strict=False):
        weight = state[f"{name}.weight"].detach()
        assert more is not None
        made[f"{name}.weight"] = torch.cat([weight, _rows(more, spare).to(weight)])
        if f"{name}.bias" in state:
            bias = state[f"{name}.bias"].detach()
            made[f"{name}.bias"] = torch.cat([bias, bias.new_zeros(first.shape[0] + spare)])
    weight = state[f"{site.exit}.weight"].detach()
    made[f"{site.exit}.weight"] = torch.cat([weight, _rows(out.T, spare).T.to(weight)], dim=1).contiguous()
    return made


def _rows(matrix: torch.Tensor, spare: int) -> torch.Tensor:
    return torch.cat([matrix, matrix.new_zeros(spare, matrix.shape[1])])
