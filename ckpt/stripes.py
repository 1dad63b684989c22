# SPDX-License-Identifier: Apache-2.0
"""Geometry of parity: which nodes protect each other, and which of them holds what of every stripe.

A sharding group has n = k + m nodes, numbered by position 0..n-1. Its code words run over n *stripes*. The parity of
stripe t lies on the m nodes t, t+1, … (mod n), its data on the k others in rising order. So parity rotates (RAIM5 of
REFT, arXiv 2310.12670, is the case m = 1) and each node has k data chunks and m parity chunks of equal size: a node
that holds D bytes of state holds D·m/k bytes of parity.

A node's data is one long vector, its ranks' shards one after another, cut into k chunks; chunk j belongs to the j-th
stripe in which the node is a data node. Units are buckets of BUCKET_BYTES, the grain of checksums too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import ConfigError

BUCKET_BYTES = 1 << 20
_LARGEST_GROUP = 10  # more data nodes save little memory (m/k) and make a rebuild read more


@dataclass(frozen=True, kw_only=True)
class Group:
    """One sharding group: node positions `first` .. `first + k + m - 1` of the job."""

    first: int
    k: int
    m: int

    @property
    def n(self) -> int:
        return self.k + self.m

    @property
    def members(self) -> range:
        """Node positions in the job."""
        return range(self.first, self.first + self.n)

    @cached_property
    def stripes(self) -> tuple["Stripe", ...]:
        if not self.m:
            return ()
        return tuple(Stripe.of(number, self.k, self.m) for number in range(self.n))

    def data_stripes(self, index: int) -> list["Stripe"]:
        """The k stripes in which member `index` (0..n-1) holds data, in the order of its chunks."""
        return [stripe for stripe in self.stripes if index in stripe.data]

    def parity_stripes(self, index: int) -> list["Stripe"]:
        """The m stripes of which member `index` holds a parity chunk, in the order it keeps them."""
        return [stripe for stripe in self.stripes if index in stripe.parity]


@dataclass(frozen=True, kw_only=True)
class Stripe:
    """One row of code words: the members (0..n-1) that hold its k data and m parity symbols, in the code's order."""

    number: int
    data: tuple[int, ...]
    parity: tuple[int, ...]

    @classmethod
    def of(cls, number: int, k: int, m: int) -> "Stripe":
        parity = tuple((number + i) % (k + m) for i in range(m))
        return cls(number=number, data=tuple(i for i in range(k + m) if i not in parity), parity=parity)

    @property
    def holders(self) -> tuple[int, ...]:
        """Holder of symbol 0..k-1 (data) and k..k+m-1 (parity)."""
        return self.data + self.parity


def chunk_buckets(vector_buckets: Sequence[int], k: int) -> int:
    """Buckets in a chunk, for the lengths of the members' vectors; shorter vectors count as zero-padded."""
    return -(-max(vector_buckets, default=0) // k)


def runs(buckets: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring buckets together, at most so many: (first, count). `buckets` in rising order."""
    at = 0
    while at < len(buckets):
        end = at + 1
        while end < len(buckets) and buckets[end] == buckets[end - 1] + 1 and end - at < most:
            end += 1
        yield buckets[at], end - at
        at = end


def choose_groups(nodes: int, k: int = 0, m: int = -1) -> tuple[Group, ...]:
    """Cut `nodes` into sharding groups, by the wish (k, m) or, with k = 0, by what suits the number of nodes.

    The rule of choice: one node has no one to be protected by; up to 5 nodes survive one loss, more survive two in
    each group of at most 10. Raises ConfigError when (k, m) cannot tile the nodes, naming what could.
    """
    if k:
        if k + m > nodes or nodes % (k + m):
            raise ConfigError(_no_tiling(nodes, k, m))
        return tuple(Group(first=first, k=k, m=m) for first in range(0, nodes, k + m))
    if nodes == 1:
        return (Group(first=0, k=1, m=0),)
    m = 1 if nodes <= 5 else 2
    count = -(-nodes // _LARGEST_GROUP)
    sizes = [nodes // count + (i < nodes % count) for i in range(count)]
    firsts = [sum(sizes[:i]) for i in range(count)]
    return tuple(Group(first=first, k=size - m, m=m) for first, size in zip(firsts, sizes, strict=True))


def _no_tiling(nodes: int, k: int, m: int) -> str:
    fits = [f"k={n - p},m={p}" for n in range(1, nodes + 1) if nodes % n == 0 for p in (1, 2) if n - p >= 1]
    wanted = f"k={k},m={m} needs a multiple of {k + m} nodes and this job has {nodes}"
    if not fits:
        return f"{wanted}; one node has no other to be protected by: leave k and m out"
    return f"{wanted}; what fits: {', '.join(fits[-4:])}, or leave k and m out"
