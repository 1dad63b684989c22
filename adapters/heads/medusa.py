# SPDX-License-Identifier: Apache-2.0
"""Medusa heads trained on what their model says itself (Cai et al. 2024, arXiv:2401.10774).

Medusa-1: the model is frozen, head k learns the model's own distribution k + 2 tokens on (`kl`) or the text (`lm`).
Medusa-2 (`joint`): heads first; then the model too, at a rate of its own, held to what it said before by the same
divergence. What the model says is taken from the pass that the heads are trained in, so it costs nothing extra.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...distill.chunked import HeadLoss, head_loss
from ...distill.models import DeciLMForCausalLM
from ...export.medusa import MedusaHead, MedusaHeads
from .decode import pick
from .decode_medusa import head_logits
from .settings import MedusaSettings
from .states import final_states


class Head(nn.Module):
    """Residual blocks x + SiLU(W x + b) that begin as the identity, and an output matrix or none."""

    def __init__(self, hidden: int, blocks: int, output: torch.Tensor | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        for block in self.blocks:
            for parameter in block.parameters():
                nn.init.zeros_(parameter)
        self.output = None if output is None else nn.Parameter(output.detach().clone())

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            state = state + functional.silu(block(state))
        return state


class MedusaPart(nn.Module):
    """What is trained: the heads, and with `joint` the model."""

    def __init__(self, model: DeciLMForCausalLM, settings: MedusaSettings) -> None:
        super().__init__()
        output = model.lm_head.weight
        own = None if settings.shared else output
        self.heads = nn.ModuleList(Head(output.shape[1], settings.blocks, own) for _ in range(settings.heads)).to(
            output.dtype
        )
        if settings.joint:
            self.backbone = model.requires_grad_(True)

    def weights(self, output: torch.Tensor) -> MedusaHeads:
        """As they are written and decoded with; `output` is the model's own matrix."""
        heads = tuple(
            MedusaHead(
                weights=tuple(block.weight.detach() for block in head.blocks),
                biases=tuple(block.bias.detach() for block in head.blocks),
                output=None if head.output is None else head.output.detach(),
            )
            for head in self.each()
        )
        shared = heads[0].output is None
        return MedusaHeads(heads=heads, shared_output=output.detach() if shared else None)

    def each(self) -> Iterator[Any]:
        yield from self.heads


@dataclass(frozen=True, kw_only=True)
class MedusaLoss:
    """The loss of windows of text: see `train.Loss`."""

    part: MedusaPart
    model: DeciLMForCausalLM
    teacher: DeciLMForCausalLM
    """The same as `model` unless that is trained."""
    settings: MedusaSettings

    def __call__(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        settings = self.settings
        first = settings.prompt - 1 if settings.own else 0
        together = settings.joint and share >= settings.joint_after
        with torch.set_grad_enabled(together):
            states = final_states(self.model, ids)[:, first:]
        with torch.no_grad():
            targets = final_states(self.teacher, ids)[:, first:] if settings.joint else states
        total = torch.zeros((), dtype=states.dtype)
        output = self.model.lm_head.weight
        # the heads that use the model's own matrix move it with the model only, not before
        shared = output if together else output.detach()
        for number, head in enumerate(self.part.each()):
            weight = shared if head.output is None else head.output
            found = self._head(head(states[:, : -1 - number]), weight, targets[:, 1 + number :], ids, 1 + number)
            total = total + settings.decay**number * found
        if not together:
            return total
        return self._head(states, output, targets, ids, 0) + settings.joint_weight * total

    def _head(
        self, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, ahead: int
    ) -> torch.Tensor:
        """states (batch, n, hidden) say what `targets`, which are `ahead` places on, say of the token after those."""
        count = states.shape[1]
        labels = torch.full((len(ids), count), -100)
        labels[:, :-1] = ids[:, ids.shape[1] - count + 1 :]
        loss, _, _ = head_loss(
            states.flatten(0, 1),
            weight,
            targets.flatten(0, 1),
            self.teacher.lm_head.weight,
            labels.flatten(),
            HeadLoss(kl=self.settings.kl, lm=self.settings.lm),
        )
        return loss


def accuracies(
    heads: MedusaHeads, model: DeciLMForCausalLM, windows: torch.Tensor, *, first: int, top: int
) -> list[list[float]]:
    """Of each head, how often its i-th guess is what the model says there; over positions from `first` on."""
    right = torch.zeros(len(heads.heads), top, dtype=torch.float64)
    counts = torch.zeros(len(heads.heads), dtype=torch.float64)
    with torch.inference_mode():
        for ids in windows.split(4):
            states = final_states(model, ids)[:, first:]
            for row in states:
                said = pick(functional.linear(row, model.lm_head.weight))
                for number, logits in enumerate(head_logits(heads, row)):
                    ahead = number + 1
                    guesses = logits[:-ahead].topk(min(top, logits.shape[-1]), dim=-1).indices
                    hits = guesses == said[ahead:, None]
                    right[number, : hits.shape[1]] += hits.sum(0)
                    counts[number] += len(hits)
    return (right / counts.clamp(min=1)[:, None]).tolist()
