# SPDX-License-Identifier: Apache-2.0
"""Which part of a global tensor each rank holds, and what two such parts have in common: pure functions of numbers.

A part is, for each dimension, the global indices that it holds, as runs (first, count) in the order of the local
tensor. One run a dimension is the usual box; `_StridedShard` (FSDP2 over tensor parallelism) may give several. The
placements are DTensor's, applied from left to right, with torch.chunk's uneven cuts.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .errors import DamageError, UnsupportedStateError

Runs = tuple[tuple[int, int], ...]
"""Global indices along one dimension: (first, count), in local order."""
Part = tuple[Runs, ...]
"""A rank's part of a tensor, by dimension."""

_SHARD = re.compile(r"(?:_?S\(|_StridedShard\(dim=)(-?\d+)(?:, (?:sf=)?(\d+))?\)")


def whole(shape: Sequence[int]) -> Part:
    """All of a tensor."""
    return tuple(((0, size),) if size else () for size in shape)


def extent(part: Part) -> tuple[int, ...]:
    """Shape of the local tensor that holds this part."""
    return tuple(sum(count for _, count in runs) for runs in part)


def cut(runs: Runs, low: int, high: int) -> Runs:
    """The indices at places [low, high) of `runs`."""
    found, at = [], 0
    for first, count in runs:
        begin, end = max(low - at, 0), min(high - at, count)
        if begin < end:
            found.append((first + begin, end - begin))
        at += count
    return tuple(found)


def chunk(runs: Runs, ways: int, index: int) -> Runs:
    """Chunk `index` of torch.chunk into `ways`; the last ones may be smaller or empty."""
    total = sum(count for _, count in runs)
    size = -(-total // ways)
    return cut(runs, index * size, min((index + 1) * size, total))


def strided_chunk(runs: Runs, ways: int, index: int, split_factor: int) -> Runs:
    """`_StridedShard`: cut into `split_factor` first, each of those into `ways`, and take number `index` of each."""
    return _joined([run for i in range(split_factor) for run in chunk(chunk(runs, split_factor, i), ways, index)])


def _joined(runs: list[tuple[int, int]]) -> Runs:
    """Runs that continue each other as one."""
    found: list[tuple[int, int]] = []
    for first, count in runs:
        if found and sum(found[-1]) == first:
            found[-1] = found[-1][0], found[-1][1] + count
        else:
            found.append((first, count))
    return tuple(found)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies over a mesh of ranks."""

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    """Shape of the mesh."""
    ranks: tuple[int, ...]
    """The mesh's global ranks, row by row."""
    placements: tuple[str, ...]
    """One a mesh dimension, as torch prints them: R, S(dim), _S(dim, split_factor), or _StridedShard(dim=…, sf=…)."""

    @classmethod
    def of(cls, spec: dict[str, Any]) -> "Layout":
        """From a leaf's spec. Raises UnsupportedStateError for placements that hold no part of the values."""
        mesh = np.array(spec["mesh"])
        if odd := [p for p in spec["placements"] if p != "R" and not _SHARD.fullmatch(p)]:
            raise UnsupportedStateError(f"a tensor that is placed as {odd[0]} has no values to deal out anew")
        return cls(tuple(spec["shape"]), mesh.shape, tuple(mesh.flatten().tolist()), tuple(spec["placements"]))

    @cached_property
    def owners(self) -> dict[Part, tuple[int, ...]]:
        """Each distinct part and the ranks that hold it; together the parts are the tensor, once."""
        found: dict[Part, tuple[int, ...]] = {}
        for rank, coordinate in zip(self.ranks, itertools.product(*map(range, self.mesh)), strict=True):
            part = self._at(coordinate)
            found[part] = (*found.get(part, ()), rank)
        return found

    def part(self, rank: int) -> Part:
        """What a rank holds; nothing if it is not of the mesh."""
        if rank not in self.ranks:
            return tuple(() for _ in self.shape)
        number, coordinate = self.ranks.index(rank), []
        for size in reversed(self.mesh):
            number, place = divmod(number, size)
            coordinate.append(place)
        return self._at(tuple(reversed(coordinate)))

    def _at(self, coordinate: tuple[int, ...]) -> Part:
        part = list(whole(self.shape))
        for placement, ways, index in zip(self.placements, self.mesh, coordinate, strict=True):
            if match := _SHARD.fullmatch(placement):
                dim = int(match[1]) % len(part)
                if match[2]:
                    part[dim] = strided_chunk(part[dim], ways, index, int(match[2]))
                else:
                    part[dim] = chunk(part[dim], ways, index)
        return tuple(part)


@dataclass(frozen=True)
class Overlap:
    """A box of values that two parts share: where it lies in the local tensor of either."""

    source: tuple[slice, ...]
    target: tuple[slice, ...]

    @property
    def size(self) -> int:
        """Values in it."""
        return int(np.prod([s.stop - s.start for s in self.source], dtype=np.int64))

    def span(self, shape: Sequence[int]) -> tuple[int, int]:
        """Places [low, high) between which the box lies in the flat source, a local tensor of this shape."""
        low = high = 0
        for part, size in zip(self.source, shape, strict=True):
            low, high = low * size + part.start, high * size + part.stop - 1
        return low, high + 1


def overlaps(source: Part, target: Part) -> list[Overlap]:
    """What `target` can get from `source`: boxes that share nothing."""
    pairs = [list(_shared(a, b)) for a, b in zip(source, target, strict=True)]
    return [Overlap(tuple(s for s, _ in box), tuple(t for _, t in box)) for box in itertools.product(*pairs)]


def _shared(source: Runs, target: Runs) -> Iterator[tuple[slice, slice]]:
    at = 0
    for first, count in source:
        to = 0
        for wanted, length in target:
            low, high = max(first, wanted), min(first + count, wanted + length)
            if low < high:
                yield (
                    slice(at + low - first, at + high - first),
                    slice(to + low - wanted, to + high - wanted),
                )
            to += length
        at += count


def gather(layout: Layout, target: Part, prefer: int = 0) -> list[tuple[int, tuple[int, ...], list[Overlap]]]:
    """Where a part comes from: (rank that holds it, shape of its local tensor, boxes).

    prefer: picks one of the ranks that hold the same, so that not all readers ask the first.
    Raises DamageError if the layout's parts do not make up the target.
    """
    found, covered = [], 0
    for part, ranks in layout.owners.items():
        if boxes := overlaps(part, target):
            found.append((ranks[prefer % len(ranks)], extent(part), boxes))
            covered += sum(box.size for box in boxes)
    needed = int(np.prod(extent(target), dtype=np.int64))
    if needed and covered != needed:
        raise DamageError(f"{needed - covered} of {needed} values of a tensor of shape {layout.shape} are in no shard")
    return found if needed else []
