# SPDX-License-Identifier: Apache-2.0
"""Losses of distillation, each by its plain formula. All are in nats or without a unit, and differentiable.

Sources: Hinton et al. 1503.02531 (temperature), GKD 2306.13649 (generalized Jensen-Shannon), Puzzle 2411.19146
(normalized MSE of block-local distillation, cosine of hidden states).
"""

from typing import Literal, cast, get_args

import torch
from torch.nn import functional

from .errors import DistillUsageError

Divergence = Literal["forward", "reverse", "jsd"]
"""`forward`: KL(teacher || child). `reverse`: KL(child || teacher). `jsd`: generalized Jensen-Shannon."""


def find_divergence(name: str) -> Divergence:
    """Raises DistillUsageError if there is none of that name."""
    if name not in get_args(Divergence):
        raise DistillUsageError(f"the divergence {name!r} is none of {', '.join(get_args(Divergence))}")
    return cast(Divergence, name)


def divergence(
    teacher: torch.Tensor,
    child: torch.Tensor,
    *,
    kind: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The divergence of two sets of logits (..., vocabulary), as (...): nats, times the temperature squared.

    beta: of `jsd`, b·KL(T || M) + (1-b)·KL(C || M) with M = b·T + (1-b)·C; strictly between 0 and 1.
    """
    log_teacher = functional.log_softmax(teacher / temperature, -1)
    log_child = functional.log_softmax(child / temperature, -1)
    if kind == "forward":
        found = _kl(log_teacher, log_child)
    elif kind == "reverse":
        found = _kl(log_child, log_teacher)
    else:
        if not 0 < beta < 1:
            raise DistillUsageError(f"beta is {beta}; it must lie between 0 and 1 (for the ends: forward and reverse)")
        weights = torch.tensor([beta, 1 - beta], dtype=child.dtype, device=child.device).log()
        log_middle = torch.logsumexp(torch.stack([log_teacher + weights[0], log_child + weights[1]]), 0)
        found = beta * _kl(log_teacher, log_middle) + (1 - beta) * _kl(log_child, log_middle)
    return found * temperature**2


def _kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    return (of.exp() * (of - to)).sum(-1)


def normalized_mse(child: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """‖child - teacher‖² / ‖teacher‖², over everything: 0 for the teacher, 1 for zeros, and free of scale."""
    return (child - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)


def cosine_distance(child: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cos of two sets of vectors (..., size), as (...)."""
    return 1 - functional.cosine_similarity(child, teacher, dim=-1)
