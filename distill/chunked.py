# SPDX-License-Identifier: Apache-2.0
"""The loss over a large vocabulary, from hidden states: logits exist only for one chunk of tokens at a time.

Forward and backward of a chunk are done together, so neither logits nor their gradients of a whole batch are ever
held: beside the inputs it takes chunk x vocabulary, and the gradients of hidden states and output matrix.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .losses import Divergence, divergence

CHUNK = 256
"""Tokens."""


@dataclass(frozen=True, kw_only=True)
class HeadLoss:
    """What is computed on logits: `kl` times the divergence plus `lm` times the cross entropy, means over tokens."""

    kl: float = 1.0
    lm: float = 0.0
    kind: Divergence = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    chunk: int = CHUNK


def head_loss(
    child: torch.Tensor,
    child_head: torch.Tensor,
    teacher: torch.Tensor,
    teacher_head: torch.Tensor,
    labels: torch.Tensor,
    loss: HeadLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the loss, the divergence, the cross entropy); only the first can be differentiated.

    child, teacher: (tokens, hidden) after the last norm. The heads: (vocabulary, hidden). labels: (tokens,) of the
    tokens that follow, -100 where there is none; those count for the divergence only.
    """
    found = _HeadLoss.apply(child, child_head, teacher, teacher_head, labels, loss)
    return found[0], found[1], found[2]  # type: ignore[index]  # autograd.Function is not typed


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        child: torch.Tensor,
        child_head: torch.Tensor,
        teacher: torch.Tensor,
        teacher_head: torch.Tensor,
        labels: torch.Tensor,
        loss: HeadLoss,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        count, labelled = len(child), int((labels >= 0).sum())
        to_child = torch.zeros_like(child) if wanted[0] else None
        to_head = torch.zeros_like(child_head) if wanted[1] else None
        kl, lm = child.new_zeros(()), child.new_zeros(())
        for start in range(0, count, loss.chunk):
            part = slice(start, start + loss.chunk)
            with torch.enable_grad():
                hidden, head = child[part].detach(), child_head.detach()
                inputs = [x.requires_grad_() for x, want in zip((hidden, head), wanted, strict=True) if want]
                logits = hidden @ head.T
                part_kl = divergence(
                    teacher[part] @ teacher_head.T,
                    logits,
                    kind=loss.kind,
                    beta=loss.beta,
                    temperature=loss.temperature,
                ).sum()
                total = loss.kl * part_kl / count
                # what does not count has no gradient, and costs no backward pass
                part_lm = functional.cross_entropy(
                    logits if loss.lm else logits.detach(), labels[part], reduction="sum"
                )
                total = total + loss.lm * part_lm / max(labelled, 1)
                grads = list(torch.autograd.grad(total, inputs)) if inputs else []
            if to_child is not None:
                to_child[part] = grads.pop(0)
            if to_head is not None:
                to_head += grads.pop(0)
            kl += part_kl.detach() / count
            lm += part_lm.detach() / max(labelled, 1)
        ctx.save_for_backward(to_child, to_head)
        ctx.mark_non_differentiable(kl, lm)
        return loss.kl * kl + loss.lm * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        to_child, to_head = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            None if to_child is None else scale * to_child,
            None if to_head is None else scale * to_head,
            None,
            None,
            None,
            None,
        )
