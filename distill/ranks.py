# SPDX-License-Identifier: Apache-2.0
"""What several ranks of one training do together: begin, end, and average their gradients."""

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Progress = Callable[[str], None]


def on_every_rank(work: Callable[[Progress], T], progress: Progress) -> T | None:
    """`work(progress)` on all ranks of this process's torchrun, or on this process alone.

    Only the first rank says something, and only it returns what its work did; the others return None.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work(progress)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    try:
        found = work(progress if first else lambda _: None)
        return found if first else None
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that speaks and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Over the ranks, in place. What no rank has a gradient for gets none: AdamW would count a step for it.

    To be called with the same parameters, in the same order, on all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    known = list(parameters)
    found = torch.tensor([parameter.grad is not None for parameter in known], dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    for parameter, somewhere in zip(known, found.tolist(), strict=True):
        if not somewhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
