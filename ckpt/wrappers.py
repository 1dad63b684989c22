# SPDX-License-Identifier: Apache-2.0
"""What frameworks wrap around models and optimizers, taken off; and what they silently did not do, said.

Nothing is imported for a framework that the script does not use.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .errors import ConfigError
from .zero import ZeroState, is_engine, is_zero_optimizer


def unwrap(objects: dict[str, Any]) -> dict[str, Any]:
    """The objects whose state is to be saved: accelerate's optimizers bare, and DeepSpeed engines as their state.

    An optimizer that belongs to one of the engines goes with it. Raises ConfigError for one whose engine is not there,
    for engines that cannot be protected, and for FSDP1.
    """
    found: dict[str, Any] = {}
    engines = [value for value in objects.values() if is_engine(value)]
    owned = {id(engine.optimizer) for engine in engines}
    for name, value in objects.items():
        bare = value
        while type(bare).__module__.startswith("accelerate.") and isinstance(
            inner := getattr(bare, "optimizer", None), torch.optim.Optimizer
        ):
            bare = inner
        if isinstance(bare, torch.nn.Module) and any(map(_is_fsdp1, bare.modules())):
            raise ConfigError(
                f"{name!r} is wrapped in FullyShardedDataParallel (FSDP1), which cannot be protected: shard it with "
                "fully_shard() (FSDP2); with accelerate say fsdp_version=2"
            )
        if is_engine(bare):
            found |= _of_engine(name, bare)
        elif id(bare) not in owned and id(getattr(bare, "optimizer", None)) not in owned:
            if is_zero_optimizer(bare):
                raise ConfigError(
                    f"{name!r} is an optimizer of DeepSpeed, whose state belongs to its engine: protect(model=engine)"
                )
            found[name] = bare
    return found


def _is_fsdp1(module: torch.nn.Module) -> bool:
    return any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__)


def _of_engine(name: str, engine: Any) -> dict[str, Any]:
    if engine.zero_optimization_stage() > 0:
        return {name: ZeroState(engine)}
    if is_zero_optimizer(engine.optimizer):
        raise ConfigError(
            f"{name!r} is a DeepSpeed engine with {type(engine.optimizer).__name__}, which cannot be protected: use "
            "ZeRO stage 1, 2 or 3, or stage 0 in float32"
        )
    found = {name: engine.module, f"{name}.optimizer": engine.optimizer}
    if engine.lr_scheduler is not None:
        found[f"{name}.scheduler"] = engine.lr_scheduler
    return {key: value for key, value in found.items() if value is not None}


def optimizers_of(objects: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """The optimizers whose steps change what is protected."""
    found: list[torch.optim.Optimizer] = []
    for value in objects.values():
        if isinstance(value, ZeroState):
            found += value.optimizers
        elif isinstance(value, torch.optim.Optimizer):
            found.append(value)
    return found


# --- traps -----------------------------------------------------------------------------------------------------


def unlike_asked(objects: dict[str, Any], world_size: int) -> Iterator[str]:
    """What a framework was asked for and does not do, a sentence each."""
    if world_size > 1 and not dist.is_initialized():
        yield (
            f"torchrun started {world_size} workers, but this process is in no process group: each of them trains a "
            "model of its own on all the data. With accelerate on the CPU say Accelerator(cpu=True), with Trainer "
            "use_cpu=True; with DeepSpeed there, also InitProcessGroupKwargs(backend='gloo') or ddp_backend='gloo'"
        )
    accelerate = sys.modules.get("accelerate.state")
    state = dict(accelerate.AcceleratorState._shared_state) if accelerate else {}
    if not state:
        return
    runs, models = str(state.get("distributed_type")).rpartition(".")[2], list(objects.values())
    if world_size > 1 and dist.is_initialized() and runs == "NO":
        yield (
            f"accelerate believes that it runs alone (DistributedType.NO) although torchrun started {world_size} "
            "workers: nothing is averaged between them. On the CPU say Accelerator(cpu=True)"
        )
    if _wants_fsdp(state) and runs != "FSDP" and not any(is_sharded(model) for model in models):
        yield (
            f"accelerate was told to use FSDP and does not (it runs {runs}): on the CPU it never does. The model is "
            "whole on every rank. For FSDP2 there call torch's fully_shard() yourself, as examples/fsdp2.py does"
        )


def _wants_fsdp(state: dict[str, Any]) -> bool:
    return state.get("fsdp_plugin") is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_sharded(model: Any) -> bool:
    """Whether a model's parameters are parts of larger ones."""
    if isinstance(model, ZeroState):
        return True
    return isinstance(model, torch.nn.Module) and any(isinstance(p, DTensor) for p in model.parameters())
