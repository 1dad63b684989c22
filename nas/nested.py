# SPDX-License-Identifier: Apache-2.0
"""Nested block-local distillation: one set of FFN channels for all widths of a layer, trained in one run.

The channels are sorted once, so that each width is a prefix of the same gate, up and down matrices. Every step takes
one width: a cycle takes each of them once, in an order that is drawn anew. Then each width gets its prefix, with a down
projection of its own out of a ridge regression towards the shared one. (Matryoshka representations, 2205.13147; as
block-local distillation with one set of weights in Puzzle's second version.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..distill.losses import normalized_mse
from .activations import CHUNK_WINDOWS, LayerData
from .ffn_init import activations, narrowed
from .recipe import Library
from .ridge import Grams, regress

NORM, GATE, UP, DOWN = (
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)


def nested_order(kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Channels so that those of each width come first: those that stay longest before all others.

    kept: width to the channels that stay, each a part of those of the next larger width.
    """
    order: list[int] = []
    for width in sorted(kept):
        known = set(order)
        order += [channel for channel in kept[width].tolist() if channel not in known]
        if len(order) != width:
            raise ValueError(f"the channels of width {width} are not among those of the larger ones")
    return torch.tensor(order)


def train_nested(
    data: LayerData,
    weights: Mapping[str, torch.Tensor],
    gram: torch.Tensor,
    kept: Mapping[int, torch.Tensor],
    settings: Library,
    seed: int,
) -> dict[int, dict[str, torch.Tensor]]:
    """The FFN's weights of each width, by their names within a layer.

    weights: the teacher's. gram: of its FFN's activations on the windows to fit. settings.steps: of all widths
    together.
    """
    order, ridge = nested_order(kept), sorted(settings.ridge)[len(settings.ridge) // 2]
    start = narrowed(dict(weights), gram, order, ridge)
    device = data.hidden.device
    shared = [start[name].clone().to(device).requires_grad_(True) for name in (GATE, UP, DOWN)]
    inputs, targets = (whole[data.fit] for whole in data.ffn)
    act: Callable[[torch.Tensor], torch.Tensor] = data.layer.mlp.act_fn

    def answer(width: int, seen: torch.Tensor) -> torch.Tensor:
        gate, up, down = shared
        return (act(seen @ gate[:width].T) * (seen @ up[:width].T)) @ down[:, :width].T

    optimizer = torch.optim.AdamW(shared, lr=settings.lr, weight_decay=0.0, foreach=False)
    for step, width in enumerate(balanced(sorted(kept), settings.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        rows = [(step * settings.batch + row) % len(inputs) for row in range(min(settings.batch, len(inputs)))]
        loss = normalized_mse(answer(width, inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate, up, down = (tensor.detach() for tensor in shared)
    return {
        width: {
            NORM: weights[NORM],
            GATE: gate[:width].cpu().clone(),
            UP: up[:width].cpu().clone(),
            DOWN: matrix,
        }
        for width, matrix in refitted(data, gate, up, down, sorted(kept), settings.ridge).items()
    }


def balanced(widths: Sequence[int], steps: int, seed: int) -> list[int]:
    """The width of each step: every cycle has each once, in a drawn order."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += [widths[index] for index in torch.randperm(len(widths), generator=generator).tolist()]
    return found[:steps]


@torch.no_grad()
def refitted(
    data: LayerData,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    widths: Sequence[int],
    ridges: Sequence[float],
) -> dict[int, torch.Tensor]:
    """For each width the down projection of its channels that is best on held-out windows, in float32 on the CPU."""
    body: Any = torch.nn.Module()
    body.act_fn = data.layer.mlp.act_fn
    body.gate_proj, body.up_proj = (lambda x: x @ gate.T), (lambda x: x @ up.T)
    fit, held = Grams(), Grams()
    for grams, windows in ((fit, data.fit), (held, data.held)):
        for seen, target in zip(*(whole[windows].split(CHUNK_WINDOWS) for whole in data.ffn), strict=True):
            grams.add(activations(body, seen), target)
    found = {}
    for width in widths:
        own, other = first(fit, width), first(held, width)
        prior = down[:, :width].double().cpu()
        matrices = [prior, *(regress(own.inner, own.cross, ridge, prior) for ridge in ridges)]
        found[width] = min(matrices, key=other.error).float()
    return found


def first(grams: Grams, width: int) -> Grams:
    """The sums of the first inputs alone."""
    part = Grams()
    part.tokens, part.outer = grams.tokens, grams.outer
    part.inner, part.cross = grams.inner[:width, :width], grams.cross[:, :width]
    return part
