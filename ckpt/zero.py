# SPDX-License-Identifier: Apache-2.0
"""The state of a DeepSpeed engine with ZeRO 1, 2 or 3, as tensors that `protect` can save and put back.

What an engine trains lies in flat *masters*, of which each rank holds a part, and in the base optimizer's state of
them. The weights that the model computes with are masters, cast and gathered: they are made anew at a restore, the
way DeepSpeed's own loading makes them, and not saved. Parameters that no optimizer owns and buffers are saved as they
are. Every flat tensor is described like a DTensor, `Shard(0)` over the data-parallel ranks, and a table says where each
parameter begins in it, so that other numbers of ranks can read it.

Written against deepspeed 0.19; it uses its internals, and refuses an engine that lacks them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .errors import ConfigError

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps", "_unmanaged_backward_count")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a tensor belongs that is no DTensor."""

    replicas: tuple[int, ...]
    """Global ranks that hold the same bytes."""
    spec: dict[str, Any] | None


def is_engine(value: Any) -> bool:
    """Whether this is a DeepSpeedEngine; imports nothing."""
    return any(c.__name__ == "DeepSpeedEngine" and c.__module__.startswith("deepspeed.") for c in type(value).__mro__)


def is_zero_optimizer(value: Any) -> bool:
    """Whether this is one of DeepSpeed's own optimizers, whose state belongs to an engine."""
    kinds = type(value).__mro__
    return any(c.__name__ == "DeepSpeedOptimizer" and c.__module__.startswith("deepspeed.") for c in kinds)


class ZeroState:
    """What `protect` sees in the place of an engine. Has state_dict and load_state_dict like all that it protects."""

    def __init__(self, engine: Any) -> None:
        """Raises ConfigError for an engine whose state is not where it is looked for."""
        self._engine, self._zero, self.stage = engine, engine.optimizer, engine.zero_optimization_stage()
        masters = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        kind = type(self._zero).__name__
        if not hasattr(self._zero, masters) or getattr(self._zero, "zenflow", None):
            raise ConfigError(
                f"a DeepSpeed engine with {kind} cannot be protected: use ZeRO stage 1, 2 or 3 without ZenFlow"
            )
        if getattr(self._zero, "swap_optimizer", False) or getattr(self._zero, "params_in_nvme_and_cpu", False):
            raise ConfigError(
                "a DeepSpeed engine that keeps state on NVMe cannot be protected; offload to the CPU instead"
            )
        self._masters: list[torch.Tensor] = getattr(self._zero, masters)
        self._ranks = tuple(sorted(dist.get_process_group_ranks(self._zero.dp_process_group)))
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self._parts = tuple(self._find_parts())
        self._sizes = {name: count for name, _, _, count in self._parts}
        self._roles: dict[str, tuple[bool, Placed]] = {}

    @property
    def device(self) -> torch.device:
        return self._masters[0].device

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those whose steps change the state."""
        both = (self._zero.optimizer, getattr(self._zero, "backup_optimizer", None))
        return [optimizer for optimizer in both if isinstance(optimizer, torch.optim.Optimizer)]

    fixed = ("masters", "rest")
    """The parts of the state that exist from the start, so that a snapshot's must be the same."""

    # --- saving ------------------------------------------------------------------------------------------------

    def _find_parts(self) -> Iterator[tuple[str, int, int, int]]:
        """Every piece of a master that is saved as one: (name, master, offset, elements).

        In stages 1 and 2 a master is one rank's range of all parameters of a group, and that is a piece. In stage 3 it
        is made of a range of each of them, and those are pieces.
        """
        for number, master in enumerate(self._masters):
            offset = 0
            if self.stage != 3:
                yield f"group{number}", number, 0, master.numel()
                continue
            for parameter in self._zero.fp16_groups[number]:
                count = parameter.partition_numel()
                yield self._names[id(parameter)], number, offset, count
                offset += count

    def share_of(self, path: str) -> tuple[int, int, int] | None:
        """Of a tensor below this object that is cut over the ranks: where this rank's share begins, how long it is, and
        how many of all ranks' values are no padding. None for any other."""
        kind, _, name = path.partition("/")
        piece, _, which = name.partition("/")
        if kind not in ("masters", "state") or (kind == "state" and not which.startswith("parts/")):
            return None
        count = self._sizes[piece]
        real = sum(math.prod(shape) for owner, _, shape in self._layout() if owner == piece)
        return self._ranks.index(dist.get_rank()) * count, count, real

    def cannot_take(self, saved: dict[str, Any]) -> str:
        """Why the state of other ranks does not fit here; empty if it does. saved: its description."""
        if saved["stage"] != self.stage:
            return f"it is of ZeRO stage {saved['stage']} and this engine's is {self.stage}"
        if saved["layout"] != self._layout():
            return "its parameters are others, or lie in another order (round_robin_gradients deals them out by rank)"
        if self.stage == 3 and self.frozen():
            return f"{next(iter(self.frozen()))} is frozen, and each rank has its part of it in a way of its own"
        return ""

    def role(self, path: str) -> tuple[bool, Placed]:
        """Of a tensor below this object, as in `masters/group0`: whether it stays between two steps, and its place."""
        if path not in self._roles:  # one object for each path: that it is the same is how a layout is known again
            self._roles[path] = self._role(path)
        return self._roles[path]

    def _role(self, path: str) -> tuple[bool, Placed]:
        kind, _, name = path.partition("/")
        alone = (dist.get_rank(),)
        if kind == "rest":
            constant = name in self.frozen()
            shared = constant and self.stage < 3
            return constant, Placed(replicas=self._ranks if shared else alone, spec=None)
        piece, _, which = name.partition("/")
        cut = kind == "masters" or which.startswith("parts/")
        return True, Placed(replicas=alone, spec=_flat_spec(self._sizes[piece], self._ranks) if cut else None)

    def frozen(self) -> dict[str, torch.Tensor]:
        """Parameters that no optimizer owns: the frozen ones."""
        groups = self._zero.fp16_groups if self.stage == 3 else self._zero.bit16_groups
        owned = {id(parameter) for group in groups for parameter in group}
        found = {}
        for name, parameter in self._engine.module.named_parameters():
            if id(parameter) not in owned:
                found[name] = getattr(parameter, "ds_tensor", parameter)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The live state. Raises ConfigError in the middle of gradient accumulation, whose gradients are not saved."""
        engine = self._engine
        if engine.micro_steps % engine.gradient_accumulation_steps():
            raise ConfigError(
                "end_step() was called in the middle of gradient accumulation: call it after the engine.step() that "
                "ends a batch, as engine.is_gradient_accumulation_boundary() says before that step"
            )
        kept = _persistent(engine.module)
        buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}
        return {
            "stage": self.stage,
            "masters": {name: self._masters[i][at : at + n].detach() for name, i, at, n in self._parts},
            "state": {name: self._state_of(i, at, n) for name, i, at, n in self._parts},
            "rest": self.frozen() | buffers,
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self._zero.optimizer.param_groups],
            "layout": self._layout(),
            "scaler": {k: v for k, v in vars(self._zero.loss_scaler).items() if isinstance(v, int | float)},
            "counters": {name: getattr(engine, name) for name in _COUNTERS if hasattr(engine, name)},
            "scheduler": engine.lr_scheduler.state_dict() if hasattr(engine.lr_scheduler, "state_dict") else None,
        }

    def _state_of(self, number: int, at: int, count: int) -> dict[str, Any]:
        """Of one piece: what is as long as its master (cut like it), and all else with its device."""
        master, parts, own = self._masters[number], {}, {}
        for key, value in self._zero.optimizer.state.get(master, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == master.shape:
                parts[key] = value[at : at + count]
            else:
                own[key] = [value, value.device.type if isinstance(value, torch.Tensor) else None]
        return {"parts": parts, "own": own}

    def _layout(self) -> list[list[Any]]:
        """What a flat tensor is made of, in order: [piece, parameter, shape]."""
        if self.stage == 3:
            named = {self._names[id(p)]: list(p.ds_shape) for group in self._zero.fp16_groups for p in group}
            return [[name, name, shape] for name, shape in named.items()]
        groups = getattr(self._zero, "round_robin_bit16_groups", self._zero.bit16_groups)
        return [[f"group{i}", self._names[id(p)], list(p.shape)] for i, group in enumerate(groups) for p in group]

    # --- restoring ---------------------------------------------------------------------------------------------

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything back. A collective: all ranks must call it."""
        zero, engine = self._zero, self._engine
        if self.stage == 3:
            zero.checkpoint_event_prologue()  # no parameter stays gathered with old values
        with torch.no_grad():
            for name, i, at, n in self._parts:
                self._masters[i][at : at + n].data.copy_(state["masters"][name])
            self._load_optimizer(state)
            live = self.frozen() | dict(engine.module.named_buffers())
            for name, value in state["rest"].items():
                live[name].data.copy_(value)
            if self.stage == 3:
                for flat, master in zip(zero.fp16_partitioned_groups_flat, self._masters, strict=True):
                    flat.data.copy_(master.data)
                zero.checkpoint_event_epilogue()
                zero.invalidate_secondary_tensor()  # hpZ's second copies
            else:
                zero.update_lp_params()
        vars(zero.loss_scaler).update(state["scaler"])
        for name, value in state["counters"].items():
            setattr(engine, name, value)
        if state["scheduler"] is not None and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        optimizer = self._zero.optimizer
        for name, i, at, n in self._parts:
            master, saved = self._masters[i], state["state"][name]
            live = optimizer.state.setdefault(master, {})
            for key, value in saved["parts"].items():
                if key not in live:  # most optimizers make their state in their first step
                    live[key] = torch.empty(master.shape, dtype=value.dtype, device=master.device)
                live[key][at : at + n].copy_(value)
            for key, (value, device) in saved["own"].items():
                live[key] = value if device is None else value.to(device)
        for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update(saved)


def _flat_spec(count: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    """The spec of an n-th of a flat tensor, as of a DTensor with the placement Shard(0)."""
    return {"shape": [count * len(ranks)], "stride": [1], "placements": ["S(0)"], "mesh": list(ranks)}


def _persistent(module: torch.nn.Module) -> set[str]:
    """Names of the buffers that state_dict() would have."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._buffers
        if name not in owner._non_persistent_buffers_set
    }
