# SPDX-License-Identifier: Apache-2.0
"""Experts and gates trained together against the dense model, by `distill`'s own loop.

Trained are gates, experts, shared experts and the norms before them; attention, embeddings and heads stay the dense
model's. To the loss of `distill` (divergence of the logits, cosine distance of the hidden states) a load-balancing loss
is added, the mean over layers. Where a token takes one expert and its weight is made to be 1, the gates stay as they
are, and nothing is added: the model's output says nothing of them then, and balance alone would lead them away. The
state is on disk every `save_every` steps, and a killed run goes on from it, bit for bit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...distill.config import DistillConfig
from ...distill.loop import Distilled, Loop
from ...distill.models import load
from .hearing import loads
from .module import build_carved, carved_weights, mixtures

if TYPE_CHECKING:
    from .carve import Carving, Progress


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What came of it."""

    outcome: Distilled
    weights: dict[str, torch.Tensor]
    """In the dense model's type."""
    loads: list[dict[str, list[Any]]]
    """Of the gates on held-out text, see `hearing.loads`."""
    loop: Loop
    """To be closed when the weights are written."""


def finetune(carving: "Carving", weights: dict[str, torch.Tensor], progress: "Progress") -> Finetuned:
    """Train experts and gates together.

    Raises:
        TextError: if there is too little text. DivergedError: if the loss is no number.
    """
    config, training = carving.config, carving.config.training
    steps = training.tokens // (training.length * training.batch)
    child = build_carved(carving.layout.decoder, {name: tensor.float() for name, tensor in weights.items()})
    own = DistillConfig(
        child=config.model,
        teacher=config.model,
        out=config.out,
        sources=config.sources,
        training=training,
        held_out=config.held_out,
        seed=config.seed,
    )
    # one expert whose weight is 1 whatever its gate says: no gradient but that of balance
    steered = not (carving.layout.normalized and carving.shape.top_k == 1)
    loop = Loop(
        own,
        trainable(child, gates=steered),
        load(carving.source),
        carving.training_windows,
        carving.held_out_windows,
        carving.run,
        None,
        alone=True,
        auxiliary=(lambda: config.balance * balance(child)) if steered else None,
    )
    outcome = loop.run(steps, progress)
    found = {name: tensor.to(carving.dtype) for name, tensor in carved_weights(child, carving.layout.decoder).items()}
    heard = loads(child, carving.held_out_windows)
    return Finetuned(outcome=outcome, weights=found, loads=heard, loop=loop)


def trainable(child: torch.nn.Module, *, gates: bool = True) -> torch.nn.Module:
    """With gradients where training is to change something. gates: those too."""
    for layer in child.model.layers:  # type: ignore[union-attr]  # as DeciLMForCausalLM has them
        if layer.mlp in mixtures(child):
            layer.mlp.requires_grad_(True)
            layer.mlp.router.requires_grad_(gates)
            layer.post_attention_layernorm.requires_grad_(True)
    return child


def balance(child: torch.nn.Module) -> torch.Tensor:
    """The load-balancing loss of the last pass, the mean over layers: 1 when all loads are equal."""
    found = [mixture.balance for mixture in mixtures(child) if mixture.balance is not None]
    return torch.stack(found).mean()
