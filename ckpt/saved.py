# SPDX-License-Identifier: Apache-2.0
"""The shards of other ranks, read in part: their descriptions, and those bytes of their leaves that are wanted.

First say everything that is wanted, then fetch it in one request a shard, then read. What is not wanted is never
moved, but for the rest of the 1 MiB buckets that it lies in, which is the grain of checksums.
"""

import hashlib
import json
from collections.abc import Callable, Iterator

import numpy as np
import torch

from .errors import DamageError
from .shard import Shard, Slot, header_bytes, pieces
from .tree import Json, decode

Ranges = list[tuple[int, int]]
Read = Callable[[int, Ranges], np.ndarray]
"""(rank, byte ranges [low, high) of its shard) → an array as long as the shard, right and proven in those ranges."""

_FIRST_BYTES = 1 << 16


class SavedRanks:
    """What the ranks of a snapshot have saved."""

    def __init__(self, read: Read, world_size: int) -> None:
        self._read = read
        self.world_size = world_size
        self._shards: dict[int, Shard] = {}
        self._paths: dict[int, dict[str, int]] = {}
        self._wanted: dict[int, Ranges] = {}
        self._fetched: dict[int, Ranges] = {}

    def shard(self, rank: int) -> Shard:
        """A rank's description, with the bytes that have been fetched so far."""
        if rank not in self._shards:
            if not 0 <= rank < self.world_size:
                raise DamageError(f"a snapshot of {self.world_size} ranks speaks of rank {rank}")
            length = header_bytes(self._read(rank, [(0, _FIRST_BYTES)]))
            self._shards[rank] = Shard(self._read(rank, [(0, length)]))
        return self._shards[rank]

    def slot(self, rank: int, path: str) -> Slot | None:
        """Where a rank keeps the tensor at `path` of its objects; tied tensors have several paths."""
        shard = self.shard(rank)
        if rank not in self._paths:
            self._paths[rank] = {
                found: number for name, data in shard.objects.items() for found, number in tensor_paths(data, name)
            }
        number = self._paths[rank].get(path)
        return None if number is None else shard.slots[number]

    def want(self, rank: int, slot: Slot, low: int, high: int) -> None:
        """Bytes [low, high) of a leaf will be read."""
        region = self.shard(rank).regions[slot.region]
        for other in region.ranks:
            held = next((r for r in self.shard(other).regions if r.ranks == region.ranks), None)
            if held is None:
                raise DamageError(f"rank {other}'s shard lacks its part of what ranks {list(region.ranks)} share")
            first, last = max(held.low, slot.offset + low), min(held.high, slot.offset + high)
            if first < last:
                self._wanted.setdefault(other, []).append((held.at + first - held.low, held.at + last - held.low))

    def fetch(self) -> None:
        """Get all that is wanted, each shard's in one request."""
        for rank, ranges in self._wanted.items():
            self._fetched[rank] = joined([*self._fetched.get(rank, []), *ranges])
            self._shards[rank].data = self._read(rank, self._fetched[rank])
        self._wanted = {}

    def bytes_of(self, rank: int, slot: Slot, low: int, high: int) -> np.ndarray:
        """uint8: bytes [low, high) of a leaf, which must have been wanted and fetched."""
        region = self.shard(rank).regions[slot.region]
        parts = [self.shard(other).part(region.ranks) for other in region.ranks]
        found = pieces(parts, slot.offset + low, high - low)
        if len(found) == 1:
            return found[0][1]
        data = np.empty(high - low, np.uint8)
        for at, piece in found:
            data[at : at + len(piece)] = piece
        return data

    def fingerprint(self, rank: int, name: str) -> Json:
        """An object's description with each tensor's digest in its place: equal if and only if the states are."""
        shard = self.shard(rank)
        used = [shard.slots[number] for _, number in tensor_paths(shard.objects[name], name)]
        for slot in used:
            self.want(rank, slot, 0, slot.size_bytes)
        self.fetch()

        def digest(number: int) -> str:
            slot = shard.slots[number]
            data = hashlib.sha256(self.bytes_of(rank, slot, 0, slot.size_bytes).tobytes()).hexdigest()
            return f"{slot.dtype} {list(slot.shape)} {data}"

        return json.loads(json.dumps(_with(shard.objects[name], digest)))


def joined(ranges: Ranges) -> Ranges:
    """The same bytes as ranges in rising order that neither touch nor overlap."""
    found: Ranges = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found


def tensor_paths(data: Json, path: str) -> Iterator[tuple[str, int]]:
    """(path, number) of every tensor in an encoded object, with the paths that `tree.encode` gave them."""
    if isinstance(data, list):
        for index, item in enumerate(data):
            yield from tensor_paths(item, f"{path}/{index}")
    elif isinstance(data, dict):
        tag = next((key for key in data if key.startswith("$")), None)
        if tag in ("$tensor", "$array"):
            yield path, data[tag]
        elif tag in ("$dict", "$ordered", "$counter"):
            for key, item in data[tag]:
                yield from tensor_paths(item, f"{path}/{decode(key, _no_tensor)}")
        else:
            for key, item in data.items():
                yield from tensor_paths(item, path if key == tag else f"{path}/{key}")


def _no_tensor(number: int) -> torch.Tensor:
    raise DamageError(f"tensor {number} is the key of a mapping")


def _with(data: Json, digest: Callable[[int], str]) -> Json:
    if isinstance(data, list):
        return [_with(item, digest) for item in data]
    if isinstance(data, dict):
        return {
            key: digest(item) if key in ("$tensor", "$array") else _with(item, digest) for key, item in data.items()
        }
    return data
