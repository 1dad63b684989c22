# SPDX-License-Identifier: Apache-2.0
"""What a rank ended with, as one SHA-256 a tensor: small enough to keep, and equal only if every bit is."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a tensor; of a DTensor, the shard that this rank holds."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local = local.detach().cpu().contiguous()
    header = f"{local.dtype} {tuple(local.shape)} ".encode()
    return hashlib.sha256(header + local.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def training_digests(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    position: Any,
) -> dict[str, str]:
    """A digest for each weight, each tensor of the optimizer, and the scheduler, data position and torch RNG."""
    found = {}
    for name, parameter in model.named_parameters():
        found[f"weight {name}"] = digest(parameter)
        for key, value in optimizer.state[parameter].items():
            found[f"optimizer {key} {name}"] = digest(torch.as_tensor(value))
    for name, holder in (("scheduler", scheduler), ("position", position)):
        state = json.dumps(holder.state_dict(), sort_keys=True, default=repr)
        found[name] = hashlib.sha256(state.encode()).hexdigest()
    found["rng torch"] = digest(torch.get_rng_state())
    return found


def write_digests(path: Path, *, step: int, rank: int, world: int, digests: dict[str, str]) -> None:
    """Writes them as JSON, whole or not at all: a rank killed while it writes leaves no half of a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"step": step, "rank": rank, "world": world, "digests": digests}, indent=1))
    part.replace(path)
