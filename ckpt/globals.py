# SPDX-License-Identifier: Apache-2.0
"""Which part of a global tensor a rank holds: pure arithmetic over a DTensor's spec, without torch and without a mesh.

A spec is what `collect.spec_of` writes: global shape, placements as text ("R", "S(0)", "_S(0, 2)") and the mesh as
nested lists of ranks. Splitting follows `torch.chunk`: parts of ceil(n / parts), the last ones shorter or empty.
A strided shard (FSDP2 over tensor parallelism on one dimension) splits what the later mesh dimensions have left.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import LayoutMismatchError

_SHARD = re.compile(r"S\((\d+)\)")
_STRIDED = re.compile(r"_S\((\d+), (\d+)\)|_StridedShard\(dim=(\d+), sf=(\d+)\)")


@dataclass(frozen=True)
class Box:
    """A block of a global tensor: elements [low, high) of each dimension."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(h - low for low, h in zip(self.low, self.high, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(low, high) for low, high in zip(self.low, self.high, strict=True))


def box_of(spec: Mapping[str, Any], rank: int) -> Box:
    """The block that `rank` holds. Raises LayoutMismatchError for placements that are no block (partial sums)."""
    shape = tuple(spec["shape"])
    coordinate = _coordinate(spec["mesh"], rank)
    sizes = np.array(spec["mesh"]).shape
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for mesh_dim, placement in enumerate(spec["placements"]):
        if match := _SHARD.fullmatch(placement):
            plain.append((int(match[1]), mesh_dim))
        elif match := _STRIDED.fullmatch(placement):
            strided.append((int(match[1] or match[3]), mesh_dim))
        elif placement != "R":
            raise LayoutMismatchError(f"a tensor placed as {placement} has no part that is simply its own")
    low, high = [0] * len(shape), list(shape)
    for dim, mesh_dim in [*plain, *reversed(strided)]:
        size = -(-(high[dim] - low[dim]) // sizes[mesh_dim])
        first = min(low[dim] + coordinate[mesh_dim] * size, high[dim])
        low[dim], high[dim] = first, min(first + size, high[dim])
    return Box(tuple(low), tuple(high))


def ranks_of(spec: Mapping[str, Any]) -> list[int]:
    """All ranks of the spec's mesh."""
    return [int(rank) for rank in np.array(spec["mesh"]).flatten()]


def _coordinate(mesh: Any, rank: int) -> tuple[int, ...]:
    found = np.argwhere(np.array(mesh) == rank)
    if len(found) != 1:
        raise LayoutMismatchError(f"rank {rank} is not in the mesh of the tensor")
    return tuple(int(i) for i in found[0])
