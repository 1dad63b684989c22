# SPDX-License-Identifier: Apache-2.0
"""Narrower FFNs: which channels stay, and how the down projection makes up for those that go.

With a = silu(W_g x) ⊙ W_u x the FFN is W_d a, so all that matters of the text is the Gram matrix G = Σ a aᵀ. Channels
are removed a block at a time, least contribution first: with the others refitted, removing channel i adds
‖W'_i‖² / (H⁻¹)_ii to the squared error, H = G + λI of those that are left (optimal brain surgeon, Hassibi & Stork 1993,
on channels; Puzzle's iterative removal (2411.19146) leaves W_d as it is).
"""

from collections.abc import Sequence

import torch

from .ridge import damping, regress

_BLOCKS = 48
"""Steps in which all channels would be removed: each removes at most that share at once."""


def activations(body: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What goes into the down projection of a gated FFN, (…, width), for normed inputs (…, hidden)."""
    return body.act_fn(body.gate_proj(inputs)) * body.up_proj(inputs)  # type: ignore[operator]  # as LlamaMLP has them


def contributions(gram: torch.Tensor, down: torch.Tensor, ridge: float) -> torch.Tensor:
    """What removing each channel alone costs, the rest refitted: (width,) float64."""
    inverse = _inverse(gram, ridge)
    return down.double().square().sum(0) / inverse.diagonal()


def removal_order(
    gram: torch.Tensor, down: torch.Tensor, widths: Sequence[int], ridge: float
) -> dict[int, torch.Tensor]:
    """The channels that stay at each width, in ascending order; those of a smaller width are among those of a larger.

    gram: (width, width) float64. down: (hidden, width).
    """
    size, step = len(gram), max(-(-len(gram) // _BLOCKS), 1)
    weight, inverse = down.double().cpu().clone(), _inverse(gram, ridge)
    gone, left = torch.zeros(size, dtype=torch.bool), size
    found = {}
    for width in sorted(widths, reverse=True):
        while left > width:
            cost = weight.square().sum(0) / inverse.diagonal()
            cost[gone] = float("inf")
            going = torch.argsort(cost, stable=True)[: min(step, left - width)]
            # The others make up for those that go, and the inverse of their own H follows from the one of all; what
            # is left of the rows and columns that went is nothing.
            rows, columns = inverse[going], weight[:, going]
            share = torch.linalg.solve(rows[:, going], rows)
            weight.addmm_(columns, share, alpha=-1)
            inverse.addmm_(rows.T, share, alpha=-1)
            gone[going] = True
            left -= len(going)
        found[width] = torch.arange(size)[~gone]
    return found


def narrowed(
    weights: dict[str, torch.Tensor], gram: torch.Tensor, kept: torch.Tensor, ridge: float
) -> dict[str, torch.Tensor]:
    """The FFN's weights, by their names within a layer, with these channels and a refitted down projection."""
    down = weights["mlp.down_proj.weight"].double().cpu()
    refitted = regress(gram[kept][:, kept], down @ gram[:, kept], ridge, down[:, kept])
    return {
        "post_attention_layernorm.weight": weights["post_attention_layernorm.weight"],
        "mlp.gate_proj.weight": weights["mlp.gate_proj.weight"][kept],
        "mlp.up_proj.weight": weights["mlp.up_proj.weight"][kept],
        "mlp.down_proj.weight": refitted.float(),
    }


def narrowing_error(
    weights: dict[str, torch.Tensor], narrow: dict[str, torch.Tensor], gram: torch.Tensor, kept: torch.Tensor
) -> float:
    """‖W_d a - W'_d a_kept‖² over the tokens of a Gram matrix."""
    off = weights["mlp.down_proj.weight"].double().cpu().clone()
    off[:, kept] -= narrow["mlp.down_proj.weight"].double().cpu()
    return ((off @ gram) * off).sum().item()


def _inverse(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    damped = gram + damping(gram, ridge) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
