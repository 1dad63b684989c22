# SPDX-License-Identifier: Apache-2.0
"""What belongs to a rank and not to a tensor, when the number of ranks has changed.

- An object with `load_state_dicts(states, *, rank, world_size)` is given the states of all ranks, in their order.
- Of any other object, a state that is the same on all ranks is everybody's: schedulers, `refound.Position`, counters.
- A state that differs by rank and has no such method is refused by name: nobody could say what it means now.
- torchdata's loaders and samplers count samples of one rank: those are converted, for the same batch over all ranks.
- Random streams: a rank that existed keeps its own; a new one gets a stream that follows from all old ones and its
  rank, the same whenever this happens again. Where all ranks drew the same stream, all go on doing so.
"""

import hashlib
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .collect import RNG, set_random_state
from .errors import WorldSizeError
from .position import Position
from .saved import SavedRanks, tensor_paths
from .tree import Json, decode

_SAMPLE_COUNTS = ("samples_yielded", "yielded")
_SEEDS = ("_base_seed",)  # of a torchdata loader's workers: each rank has its own, like its random streams


def load_object(saved: SavedRanks, name: str, value: Any, rank: int, world_size: int) -> Callable[[], None]:
    """Plan the loading of an object that is neither module nor optimizer. Raises WorldSizeError if none can be."""
    if saved.world_size == world_size:
        state = _state(saved, rank, name)
        return lambda: value.load_state_dict(state)
    if callable(getattr(value, "load_state_dicts", None)):
        states = [_state(saved, other, name) for other in range(saved.world_size)]
        return lambda: value.load_state_dicts(states, rank=rank, world_size=world_size)
    torchdata = type(value).__module__.startswith("torchdata.")
    if not isinstance(value, torch.optim.lr_scheduler.LRScheduler):  # those are the same by construction
        own = _SEEDS if torchdata else ()
        first = _without(own, saved.fingerprint(0, name))
        for other in range(1, saved.world_size):
            found = _without(own, saved.fingerprint(other, name))
            if found != first:
                raise WorldSizeError(
                    f"the snapshot was taken by {saved.world_size} ranks and this group has {world_size}. The state of "
                    f"{name!r} ({type(value).__name__}) differs between ranks at {_difference(first, found, name)!r}, "
                    "so it cannot be dealt out to another number of them. Nothing was loaded and the snapshot is kept: "
                    f"bring the job back with {saved.world_size} ranks, give the object a method "
                    "load_state_dicts(states, *, rank, world_size), or keep the data's place in a refound.Position"
                )
    state = _state(saved, rank % saved.world_size, name)
    if torchdata:
        state = _of_other_ranks(state, name, saved.world_size, world_size)
    elif rank == 0 and not isinstance(value, torch.optim.lr_scheduler.LRScheduler | Position):
        print(
            f"refound: {name!r} ({type(value).__name__}) had the same state on all {saved.world_size} ranks, which is "
            f"now that of all {world_size}. If it counts what one rank has done, give it load_state_dicts()",
            file=sys.stderr,
            flush=True,
        )
    return lambda: value.load_state_dict(state)


def _of_other_ranks(state: Any, name: str, old: int, new: int) -> Any:
    """A torchdata loader's state for another number of ranks that share the same batches.

    It counts batches, which stay as many, and samples of one rank, which become fewer or more. Raises WorldSizeError
    if they cannot, or if every rank walked through all of the data.
    """
    if isinstance(state, dict):
        if {"yielded", "generator"} <= state.keys():
            raise WorldSizeError(
                f"{name!r} walks through all of the data on every rank, so its place cannot be dealt out to another "
                f"number of ranks ({old}, now {new}): give it a DistributedSampler, or use a refound.Position"
            )
        return {
            key: _converted(item, name, old, new) if key in _SAMPLE_COUNTS else _of_other_ranks(item, name, old, new)
            for key, item in state.items()
        }
    if isinstance(state, list):
        return [_of_other_ranks(item, name, old, new) for item in state]
    return state


def _without(keys: tuple[str, ...], data: Json) -> Json:
    if isinstance(data, list):
        return [_without(keys, item) for item in data]
    if isinstance(data, dict):
        return {key: _without(keys, item) for key, item in data.items() if key not in keys}
    return data


def _converted(count: int, name: str, old: int, new: int) -> int:
    if count * old % new:
        raise WorldSizeError(
            f"each of {old} ranks had taken {count} samples from {name!r}, which {new} ranks cannot share evenly: "
            f"bring the job back with {old} ranks, or use a refound.Position"
        )
    return count * old // new


def load_random_state(saved: SavedRanks, rank: int, world_size: int) -> Callable[[], None]:
    """Plan the loading of the random generators."""
    if rank < saved.world_size:
        state = _state(saved, rank, RNG)
        return lambda: set_random_state(state)
    streams = [saved.fingerprint(other, RNG) for other in range(saved.world_size)]
    if all(stream == streams[0] for stream in streams):
        state = _state(saved, 0, RNG)
        return lambda: set_random_state(state)
    return lambda: _seed(json.dumps(streams, sort_keys=True), rank)


def _seed(streams: str, rank: int) -> None:
    """Start all generators anew, each from a seed of its own."""

    def seed(kind: str, bits: int) -> int:
        text = f"{kind} of new rank {rank} after {streams}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest(), "little") >> (256 - bits)

    random.seed(seed("python", 256))
    np.random.seed(seed("numpy", 32))
    torch.manual_seed(seed("torch", 63))


def _state(saved: SavedRanks, rank: int, name: str) -> Any:
    """A rank's state of an object, its tensors as that rank held them."""
    shard = saved.shard(rank)
    for _, number in tensor_paths(shard.objects[name], name):
        slot = shard.slots[number]
        saved.want(rank, slot, 0, slot.size_bytes)
    saved.fetch()

    def tensor(number: int) -> torch.Tensor:
        slot = shard.slots[number]
        found = torch.empty(slot.shape, dtype=getattr(torch, slot.dtype))
        found.reshape(-1).view(torch.uint8).numpy()[:] = saved.bytes_of(rank, slot, 0, slot.size_bytes)
        return found

    return decode(shard.objects[name], tensor)


def _difference(a: Json, b: Json, path: str) -> str:
    """The first place where two encoded states differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(f"{path}/{key}" if not key.startswith("$") else path, a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(f"{path}/{i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return path
    return next((_difference(x, y, at) for at, x, y in pairs if x != y), path)
