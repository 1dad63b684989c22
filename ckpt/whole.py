# SPDX-License-Identifier: Apache-2.0
"""The state of a whole job, read from the shards of all its ranks: global tensors and everything beside them."""

from collections.abc import Callable

import numpy as np

from .boxes import Layout, extent, overlaps
from .boxes import whole as whole_part
from .errors import DamageError, LayoutMismatchError
from .shard import Shard, Slot, pieces
from .tree import Json

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


class Whole:
    """All ranks' shards. Tensors are put together when they are asked for, so only one need be in memory at a time."""

    def __init__(self, shard_of: Callable[[int], np.ndarray], world_size: int) -> None:
        self.shards = {rank: Shard(shard_of(rank)) for rank in range(world_size)}
        self._slots = {rank: {slot.path: slot for slot in shard.slots} for rank, shard in self.shards.items()}

    def objects(self, rank: int = 0) -> dict[str, Json]:
        """What was protected, as data; random states are under `RNG`."""
        return self.shards[rank].objects

    def slot(self, rank: int, number: int) -> Slot:
        return self.shards[rank].slots[number]

    def local(self, rank: int, slot: Slot) -> np.ndarray:
        """uint8 (slot.size_bytes,): what a rank holds of a leaf."""
        shard = self.shards[rank]
        ranks = shard.regions[slot.region].ranks
        found = pieces([self.shards[other].part(ranks) for other in ranks], slot.offset, slot.size_bytes)
        if len(found) == 1:
            return found[0][1]
        whole = np.empty(slot.size_bytes, np.uint8)
        for at, data in found:
            whole[at : at + len(data)] = data
        return whole

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """The global shape of a leaf."""
        return tuple(slot.spec["shape"]) if slot.spec else slot.shape

    def tensor(self, rank: int, slot: Slot) -> np.ndarray:
        """uint8: all bytes of the global tensor, row by row. For a leaf that is no DTensor, what `rank` holds.

        Raises LayoutMismatchError if the ranks' parts are not all of it, UnsupportedStateError for partial sums.
        """
        if slot.spec is None:
            return self.local(rank, slot)
        shape = self.shape(slot)
        out = np.zeros(shape, np.dtype(f"V{_item_bytes(slot)}"))
        covered = 0
        for part, ranks in Layout.of(slot.spec).owners.items():
            local, held = extent(part), self._slots[ranks[0]].get(slot.path)
            if 0 in local:
                continue
            if held is None or held.shape != local or held.dtype != slot.dtype:
                raise LayoutMismatchError(
                    f"{slot.path}: rank {ranks[0]} should hold {list(local)} and holds "
                    f"{list(held.shape) if held else 'nothing'}"
                )
            source = self.local(ranks[0], held).view(out.dtype).reshape(local)
            for box in overlaps(part, whole_part(shape)):
                out[box.target] = source[box.source]
                covered += box.size
        if covered != out.size:
            raise LayoutMismatchError(f"{slot.path}: the ranks hold {covered} of {out.size} elements")
        return out.reshape(-1).view(np.uint8)

    def module(self, name: str) -> tuple[dict[str, tuple[int, Slot]], dict[str, Json]]:
        """Of a module: the union of what the ranks hold, as (rank that has it, slot) by the names that the bare model
        has; and what is no tensor."""
        found: dict[str, tuple[int, Slot]] = {}
        rest: dict[str, Json] = {}
        for rank in self.shards:
            for key, item in self.objects(rank).get(name, {"$ordered": []})["$ordered"]:
                if isinstance(item, dict) and "$tensor" in item:
                    found.setdefault(key, (rank, self.slot(rank, item["$tensor"])))
                else:
                    rest.setdefault(key, item)
        prefix = next((p for p in _WRAPPERS if found and all(key.startswith(p) for key in found)), "")
        return {key.removeprefix(prefix): where for key, where in found.items()}, rest

    def differing_ranks(self, name: str) -> list[int]:
        """Ranks whose object of this name is not what rank 0 has: positions in the data, random states and the like."""
        first = self.shards[0].objects.get(name)
        return [r for r in self.shards if r and not self._is_alike(name, r, first)]

    def _is_alike(self, name: str, rank: int, first: Json) -> bool:
        if self.shards[rank].objects.get(name) is None or not _alike(first, self.shards[rank].objects[name]):
            return False
        for path, slot in self._slots[0].items():
            if path.startswith(f"{name}/") and slot.spec is None:
                other = self._slots[rank].get(path)
                if other is None or not np.array_equal(self.local(0, slot), self.local(rank, other)):
                    return False
        return True


def is_module(data: Json) -> bool:
    """Whether an object's data looks like the state_dict of a module: ordered, flat, tensors by name."""
    return isinstance(data, dict) and list(data) == ["$ordered"]


def _item_bytes(slot: Slot) -> int:
    count = int(np.prod(slot.shape, dtype=np.int64))
    sizes = {"float64": 8, "int64": 8, "complex64": 8, "uint64": 8, "complex128": 16}
    sizes |= {"float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}
    found = slot.size_bytes // count if count else sizes.get(slot.dtype, 1)
    if found * count != slot.size_bytes:
        raise DamageError(f"{slot.path} has {slot.size_bytes} bytes for {count} elements")
    return found


def _alike(one: Json, other: Json) -> bool:
    """Equal but for the numbers of tensors, which may differ between ranks."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            key in ("$tensor", "$array") or _alike(one[key], other[key]) for key in one
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other) and one == other


def renamed(data: Json, name_of: Callable[[int], str]) -> Json:
    """The data with tensors by name instead of by number."""
    if isinstance(data, list):
        return [renamed(item, name_of) for item in data]
    if not isinstance(data, dict):
        return data
    return {k: name_of(v) if k in ("$tensor", "$array") else renamed(v, name_of) for k, v in data.items()}
