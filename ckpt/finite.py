# SPDX-License-Identifier: Apache-2.0
"""Is there a NaN or an Inf in what a snapshot is about to save?"""

from collections.abc import Sequence
from typing import Any

import torch

from .shard import Plan


def first_nonfinite(plan: Plan, leaves: Sequence[Any]) -> str | None:
    """The path of a parameter or optimizer state with NaN or Inf in the part that this rank saves, or None.

    Buffers are left out: a mask may hold -inf for good. One sum over each tensor, read at memory speed (a NaN or Inf
    carries through it), all looked at together so that a device is waited for once; `isfinite` only where a sum is not
    finite, which may also be an overflow of the sum.
    """
    parts: list[tuple[str, torch.Tensor]] = []
    for copy in plan.copies:
        leaf = leaves[copy.leaf]
        if getattr(leaf, "constant", False) and (leaf.tensor.is_floating_point() or leaf.tensor.is_complex()):
            flat = leaf.tensor.detach().contiguous().reshape(-1)
            size = flat.element_size()
            parts.append((plan.slots[copy.leaf].path, flat[copy.low // size : -(-copy.high // size)]))
    if not parts:
        return None
    sums = torch.stack([_sum(part) for _, part in parts]).cpu()
    for (path, part), total in zip(parts, sums, strict=True):
        if not torch.isfinite(total) and not bool(torch.isfinite(part).all()):
            return path
    return None


def _sum(part: torch.Tensor) -> torch.Tensor:
    if part.is_complex():
        part = torch.view_as_real(part)
    if part.element_size() < 4:
        return part.to(torch.float32).sum() if part.element_size() == 1 else part.sum(dtype=torch.float32)
    return part.sum().to(torch.float32)
