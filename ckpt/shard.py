# SPDX-License-Identifier: Apache-2.0
"""The bytes of one rank's shard: planned once, then filled at fixed offsets by every snapshot.

A shard is a header (description as JSON) and one part of each *region*. A region is the concatenation of all leaves
with the same replicas; each of its n ranks stores an n-th of its bytes, so what is common to all is stored once. A
shard describes itself: with the shards of a region's ranks at hand, every leaf can be read back from them alone.
"""

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .collect import Leaf, State
from .errors import DamageError
from .stripes import BUCKET_BYTES
from .tree import Json

_HEAD = struct.Struct("<8sII")  # magic, bytes of the plan's JSON, bytes of the objects' JSON
_MAGIC = b"rfshard1"
_ALIGN_LEAF = 64
_ALIGN_PART = 4096
_HEADROOM_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Region:
    """Leaves that the same ranks hold. This rank stores bytes [low, high) of it, at `at` in its shard."""

    ranks: tuple[int, ...]
    size_bytes: int
    low: int
    high: int
    at: int


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one leaf lies: bytes [offset, offset + size) of a region."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    spec: dict[str, Any] | None
    region: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Bytes [low, high) of leaf number `leaf` go to `at` in the shard."""

    leaf: int
    low: int
    high: int
    at: int


@dataclass(frozen=True)
class Plan:
    """The layout of one rank's shard."""

    regions: tuple[Region, ...]
    slots: tuple[Slot, ...]
    header_bytes: int
    size_bytes: int

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """What this rank stores, in the order of its shard."""
        found = []
        for number, slot in enumerate(self.slots):
            region = self.regions[slot.region]
            low, high = max(slot.offset, region.low), min(slot.offset + slot.size_bytes, region.high)
            if low < high:
                at = region.at + low - region.low
                found.append(Copy(leaf=number, low=low - slot.offset, high=high - slot.offset, at=at))
        return tuple(sorted(found, key=lambda copy: copy.at))

    @cached_property
    def json(self) -> bytes:
        """The plan as it stands in the header."""
        regions = [[list(r.ranks), r.size_bytes, r.low, r.high, r.at] for r in self.regions]
        specs: list[dict[str, Any] | None] = []
        slots = []
        for s in self.slots:
            if s.spec not in specs:
                specs.append(s.spec)
            slots.append([s.path, s.dtype, list(s.shape), specs.index(s.spec), s.region, s.offset, s.size_bytes])
        return json.dumps({"regions": regions, "specs": specs, "slots": slots}, separators=(",", ":")).encode()

    def header(self, objects: bytes) -> bytes | None:
        """The shard's first bytes, or None if the objects have outgrown the room left for them."""
        head = _HEAD.pack(_MAGIC, len(self.json), len(objects)) + self.json + objects
        return head if len(head) <= self.header_bytes else None


def signature(state: State) -> tuple[Any, ...]:
    """What must not change for a plan to hold."""
    return tuple(
        (leaf.path, leaf.tensor.dtype, leaf.tensor.shape, leaf.replicas, id(leaf.spec)) for leaf in state.leaves
    )


def make_plan(state: State, rank: int, objects_bytes: int) -> Plan:
    """Lay the leaves out. `objects_bytes` is the present size of the description, which may double."""
    keys = sorted({leaf.replicas for leaf in state.leaves})
    sizes = dict.fromkeys(keys, 0)
    slots = []
    for leaf in state.leaves:
        offset = -(-sizes[leaf.replicas] // _ALIGN_LEAF) * _ALIGN_LEAF
        slots.append(_slot(leaf, keys.index(leaf.replicas), offset))
        sizes[leaf.replicas] = offset + leaf.size_bytes
    # The plan's own size depends on numbers that depend on it: a draft with the widest numbers bounds it.
    wide = 1 << 48
    draft_regions = tuple(Region(ranks=k, size_bytes=wide, low=wide, high=wide, at=wide) for k in keys)
    draft = Plan(draft_regions, tuple(slots), 0, 0)
    header = _up(_HEAD.size + len(draft.json) + 2 * objects_bytes + _HEADROOM_BYTES, _ALIGN_PART)
    regions, at = [], header
    for key in keys:
        share = _up(-(-sizes[key] // len(key)), _ALIGN_PART)
        index = key.index(rank)
        low, high = min(index * share, sizes[key]), min((index + 1) * share, sizes[key])
        regions.append(Region(ranks=key, size_bytes=sizes[key], low=low, high=high, at=at))
        at = _up(at + high - low, _ALIGN_PART)
    return Plan(tuple(regions), tuple(slots), header, _up(at, BUCKET_BYTES))


def _slot(leaf: Leaf, region: int, offset: int) -> Slot:
    return Slot(
        path=leaf.path,
        dtype=str(leaf.tensor.dtype).removeprefix("torch."),
        shape=tuple(leaf.tensor.shape),
        spec=leaf.spec,
        region=region,
        offset=offset,
        size_bytes=leaf.size_bytes,
    )


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def header_bytes(data: np.ndarray) -> int:
    """Length of the header of a shard whose first bytes are given. Raises DamageError if it has none."""
    head = bytes(data[: _HEAD.size])
    magic, plan_bytes, objects_bytes = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0)
    if magic != _MAGIC or _HEAD.size + plan_bytes + objects_bytes > len(data):
        raise DamageError("these bytes are not a shard of a snapshot: its header is not one")
    return _HEAD.size + plan_bytes + objects_bytes


class Shard:
    """A shard that is read back: its description, and the bytes of the regions' parts that it stores."""

    def __init__(self, data: np.ndarray) -> None:
        """data: uint8, the whole shard, already proven by its checksums. Raises DamageError if it is no shard."""
        try:
            magic, plan_bytes, objects_bytes = _HEAD.unpack(bytes(data[: _HEAD.size]))
            if magic != _MAGIC or _HEAD.size + plan_bytes + objects_bytes > len(data):
                raise ValueError("its header is not one")
            text = bytes(data[_HEAD.size : _HEAD.size + plan_bytes + objects_bytes])
            raw = json.loads(text[:plan_bytes])
            self.objects: dict[str, Json] = json.loads(text[plan_bytes:])
            self.regions = tuple(
                Region(ranks=tuple(ranks), size_bytes=size, low=low, high=high, at=at)
                for ranks, size, low, high, at in raw["regions"]
            )
            self.slots = tuple(
                Slot(
                    path=path,
                    dtype=dtype,
                    shape=tuple(shape),
                    spec=raw["specs"][spec],
                    region=region,
                    offset=offset,
                    size_bytes=size,
                )
                for path, dtype, shape, spec, region, offset, size in raw["slots"]
            )
        except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamageError(f"these bytes are not a shard of a snapshot: {error}") from error
        if any(r.at + r.high - r.low > len(data) or r.low > r.high for r in self.regions):
            raise DamageError("a shard's description points beyond its end")
        self.data = data

    def part(self, ranks: tuple[int, ...]) -> tuple[int, np.ndarray]:
        """This shard's bytes of the region of `ranks`: their first offset in the region, and the bytes."""
        for region in self.regions:
            if region.ranks == ranks:
                return region.low, self.data[region.at : region.at + region.high - region.low]
        raise DamageError(f"a shard lacks its part of what ranks {list(ranks)} hold in common")


def pieces(parts: list[tuple[int, np.ndarray]], offset: int, size: int) -> list[tuple[int, np.ndarray]]:
    """Where bytes [offset, offset + size) of a region come from: (position within them, bytes).

    parts: (first offset, bytes) of the region's ranks. Raises DamageError if they leave a gap.
    """
    found, covered = [], 0
    for first, data in parts:
        low, high = max(first, offset), min(first + len(data), offset + size)
        if low < high:
            found.append((low - offset, data[low - first : high - first]))
            covered += high - low
    if covered != size:
        raise DamageError(f"{size - covered} of {size} bytes of a tensor are in no shard")
    return found
