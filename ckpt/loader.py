# SPDX-License-Identifier: Apache-2.0
"""From shards back into live objects, bit for bit."""

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from .buckets import BUCKETS
from .collect import RNG, Collector, Leaf, set_random_state, spec_of
from .errors import LayoutMismatchError
from .frozen import crc, local, parameters
from .shard import Shard, Slot, pieces
from .tree import ABSENT, Json, absent_tensors, decode
from .zero import ZeroState

_SHOWN = 5


class Loader:
    """One rank's state, read from its own shard and those of the ranks it shares leaves with."""

    def __init__(self, shard_of: Callable[[int], np.ndarray], rank: int) -> None:
        self._shard = Shard(shard_of(rank))
        self._rank = rank
        self._absent = absent_tensors(self._shard.objects)
        self._live: dict[str, torch.Tensor] = {}
        self._parts: dict[int, list[tuple[int, np.ndarray]]] = {}
        shards = {rank: self._shard}
        for number, region in enumerate(self._shard.regions):
            for other in region.ranks:
                if other not in shards:
                    shards[other] = Shard(shard_of(other))
            self._parts[number] = [shards[other].part(region.ranks) for other in region.ranks]

    def described(self, name: str) -> Json:
        """What the snapshot says under a name, as data; None if nothing."""
        return self._shard.objects.get(name)

    def load(self, objects: dict[str, Any], collector: Collector) -> None:
        """Put everything back. Raises LayoutMismatchError, before anything is changed, if it does not fit."""
        self._check(objects, collector)
        placements = _live_placements(objects)
        for name, value in objects.items():
            data = self._shard.objects[name]
            if isinstance(value, torch.nn.Module):
                self._load_module(name, value, data)
            elif isinstance(value, torch.optim.Optimizer):
                load_optimizer(value, decode(data, lambda number: self._new_tensor(number, placements)))
            elif isinstance(value, ZeroState):
                value.load_state_dict(
                    decode(data, lambda number: self._new_tensor(number, None), lambda facts: self._live[facts["path"]])
                )
            else:
                value.load_state_dict(decode(data, lambda number: self._new_tensor(number, placements)))
        set_random_state(decode(self._shard.objects[RNG], lambda number: self._new_tensor(number, placements)))

    # --- fits? -------------------------------------------------------------------------------------------------

    def _check(self, objects: dict[str, Any], collector: Collector) -> None:
        saved, now = set(self._shard.objects) - {RNG, BUCKETS}, set(objects)
        problems = [f"the snapshot holds {name!r}, which is not protected now" for name in sorted(saved - now)]
        problems += [f"{name!r} is protected now and not in the snapshot" for name in sorted(now - saved)]
        slots = {slot.path: slot for slot in self._shard.slots if not is_extra(slot.path)}
        leaves = {leaf.path: leaf for leaf in collector.collect(whole=True).leaves if not is_extra(leaf.path)}
        self._live = {path: local(p) for path, p in parameters(objects) if path in self._absent}
        for path, facts in self._absent.items():
            leaves.pop(path, None)
            problems += _compare_frozen(path, facts, self._live.get(path))
        modules = tuple(f"{name}/" for name, value in objects.items() if isinstance(value, torch.nn.Module))
        for name, value in objects.items():
            if isinstance(value, ZeroState):
                modules += tuple(f"{name}/{part}/" for part in value.fixed)
        for path in sorted({p for p in slots if p.startswith(modules)} | {p for p in leaves if p.startswith(modules)}):
            problems += _compare(path, slots.get(path), leaves.get(path), slots)
        for name, value in objects.items():
            if isinstance(value, torch.optim.Optimizer) and name in self._shard.objects:
                problems += compare_groups(name, value, self._shard.objects[name])
        refuse(problems)

    # --- reading -----------------------------------------------------------------------------------------------

    def _read_into(self, slot: Slot, target: torch.Tensor) -> None:
        """Fill a dense local tensor."""
        found = pieces(self._parts[slot.region], slot.offset, slot.size_bytes)
        lazily = target.is_conj() or target.is_neg()
        if target.device.type == "cpu" and target.is_contiguous() and not lazily:
            view = target.detach().reshape(-1).view(torch.uint8).numpy()
            for at, data in found:
                view[at : at + len(data)] = data
            return
        whole = np.empty(slot.size_bytes, np.uint8)
        for at, data in found:
            whole[at : at + len(data)] = data
        with torch.no_grad():
            target.copy_(torch.from_numpy(whole).view(target.dtype).reshape(target.shape))

    def _new_tensor(self, number: int, placements: dict[str, DTensor] | None) -> torch.Tensor:
        """A fresh tensor with a leaf's bytes, on the CPU or laid out like a live DTensor with the same spec.

        placements: None for the local part of what is no DTensor.
        """
        slot = self._shard.slots[number]
        like = placements.get(_spec_key(slot.spec)) if slot.spec and placements is not None else None
        device = like.device if like is not None else torch.device("cpu")
        local = torch.empty(slot.shape, dtype=getattr(torch, slot.dtype), device=device)
        self._read_into(slot, local)
        if slot.spec is None or placements is None:
            return local
        if like is None:
            raise LayoutMismatchError(f"{slot.path} was a DTensor on a mesh that no parameter has now")
        return DTensor.from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=torch.Size(slot.spec["shape"]),
            stride=tuple(slot.spec["stride"]),
        )

    def _load_module(self, name: str, module: torch.nn.Module, data: Json) -> None:
        """In place, without a second copy of the model."""
        live = module.state_dict()
        rest: dict[str, Json] = {}
        with torch.no_grad():
            for key, item in entries(data):
                if isinstance(item, dict) and "$tensor" in item and not is_extra(key):
                    tensor = live[key]
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    self._read_into(self._shard.slots[item["$tensor"]], local)
                elif not (isinstance(item, dict) and ABSENT in item):
                    rest[key] = item
        if rest:  # get_extra_state() of some submodule
            extra = {key: decode(item, lambda number: self._new_tensor(number, {})) for key, item in rest.items()}
            module.load_state_dict({**live, **extra})


def refuse(problems: list[str]) -> None:
    """Raises LayoutMismatchError if there are any."""
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise LayoutMismatchError(
            "the snapshot does not fit this job: " + "; ".join(problems[:_SHOWN]) + more + ". Nothing was loaded "
            "and the snapshot is kept: run the code it was taken with, or give the changed job another --rdzv-id"
        )


def entries(data: Json) -> list[tuple[str, Json]]:
    """The items of an encoded state_dict."""
    return list(data.items()) if "$ordered" not in data else [(key, item) for key, item in data["$ordered"]]


def is_extra(path: str) -> bool:
    """Whether a path lies in what get_extra_state() of some module gave, which set_extra_state() must get."""
    return any(part.rpartition(".")[2] == "_extra_state" for part in path.split("/"))


def _spec_key(spec: dict[str, Any]) -> str:
    return f"{spec['placements']} {spec['mesh']}"


def _live_placements(objects: dict[str, Any]) -> dict[str, DTensor]:
    """A live DTensor for every (placements, mesh) that the protected modules use."""
    return {
        _spec_key(spec_of(parameter)): parameter
        for value in objects.values()
        if isinstance(value, torch.nn.Module)
        for parameter in value.parameters()
        if isinstance(parameter, DTensor)
    }


def _compare(path: str, slot: Slot | None, leaf: Leaf | None, slots: dict[str, Slot]) -> list[str]:
    if slot is None:
        near = difflib.get_close_matches(path, slots, n=1)
        return [f"{path} is new" + (f" (the snapshot has {near[0]})" if near else "")]
    if leaf is None:
        return [f"{path} is in the snapshot and not in the job"]
    found = (slot.dtype, slot.shape, slot.spec)
    needed = (str(leaf.tensor.dtype).removeprefix("torch."), tuple(leaf.tensor.shape), leaf.spec)
    if found == needed:
        return []
    words = (f"{found[0]} {list(found[1])}", f"{needed[0]} {list(needed[1])}")
    return [f"{path} was {words[0]} and is {words[1]}" if words[0] != words[1] else f"{path} is sharded otherwise now"]


def _compare_frozen(path: str, facts: dict[str, Any], live: torch.Tensor | None) -> list[str]:
    """A frozen parameter that the snapshot does not hold must be the same in this start of the script."""
    if live is None:
        return [f"{path} is frozen in the snapshot and not in the job"]
    found = (facts["dtype"], facts["shape"], facts["checksum"])
    if found == (str(live.dtype).removeprefix("torch."), list(live.shape), crc(live)):
        return []
    return [
        f"{path} does not train, was left out of the snapshot (save_frozen=False), and is not what it was: the script "
        "must make it the same in every start"
    ]


def compare_groups(name: str, optimizer: torch.optim.Optimizer, data: Json) -> list[str]:
    """What keeps an optimizer's saved state from its parameters of now, in words."""
    saved = [len(group["params"]) for group in data["param_groups"]]
    now = [len(group["params"]) for group in optimizer.param_groups]
    return [] if saved == now else [f"{name} had parameter groups of {saved} and has {now}"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Through the optimizer's own loading, then undo its one liberty: it casts state to the parameter's dtype."""
    optimizer.load_state_dict(state)
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        live = optimizer.state[ordered[int(number)]]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and live[key].dtype != value.dtype:
                live[key] = value.to(live[key].device)
