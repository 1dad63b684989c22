# SPDX-License-Identifier: Apache-2.0
"""Trees of guessed tokens, and which tree to guess.

The shape of Medusa's tree follows from measured accuracies (Cai et al. 2024, arXiv:2401.10774, section 2.3.3): the node
whose candidate comes `i`-th from head `k` is right if the whole path to it is, and what a tree is expected to be
accepted of is the sum of that over its nodes. Adding the likeliest node until the budget is spent is optimal, since no
node is likelier than its parent.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import HeadsUsageError


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Tokens to be checked in one pass. Node 0 is the last token that is known; the others are guesses."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    """Of each node, and -1 of node 0. A node comes after its parent."""

    def __post_init__(self) -> None:
        alike = len(self.tokens) == len(self.parents) > 0 and self.parents[0] == -1
        if not alike or any(not 0 <= parent < node for node, parent in enumerate(self.parents[1:], start=1)):
            raise ValueError(f"this is no tree: parents {self.parents} of {len(self.tokens)} nodes")

    def children(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent].append(node)
        return found

    def up_to(self, depth: int) -> tuple["Tree", Sequence[int]]:
        """(the nodes at most so deep, below the root at depth 0; their numbers here)."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        kept = [node for node, found in enumerate(depths) if found <= depth]
        if len(kept) == len(depths):
            return self, kept
        place = {node: index for index, node in enumerate(kept)} | {-1: -1}
        tokens = tuple(self.tokens[node] for node in kept)
        return Tree(tokens=tokens, parents=tuple(place[self.parents[node]] for node in kept)), kept


def chain(tokens: Sequence[int]) -> Tree:
    """One guess after the other; the first is the token that is known."""
    return Tree(tokens=tuple(tokens), parents=tuple(range(-1, len(tokens) - 1)))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A tree of candidates by rank: node `n` (from 1) is the `ranks[n - 1]`-th guess of the head at its depth."""

    ranks: tuple[int, ...] = ()
    parents: tuple[int, ...] = (-1,)

    @property
    def depths(self) -> tuple[int, ...]:
        """Of each node; 0 of the root."""
        found = [0]
        for parent in self.parents[1:]:
            found.append(found[parent] + 1)
        return tuple(found)

    def fill(self, root: int, candidates: Sequence[Sequence[int]]) -> Tree:
        """candidates: of each head its guesses, best first."""
        tokens = [candidates[depth - 1][rank] for depth, rank in zip(self.depths[1:], self.ranks, strict=True) if depth]
        return Tree(tokens=(root, *tokens), parents=self.parents)


def best_shape(accuracy: Sequence[Sequence[float]], budget: int) -> Shape:
    """The tree of `budget` nodes beside the root that is expected to be accepted furthest.

    accuracy: of each head, how often each of its guesses (best first) is right.

    Raises:
        HeadsUsageError: if there is no accuracy, or one that is no share, or a negative budget.
    """
    if budget < 0 or not accuracy or any(not 0 <= share <= 1 for head in accuracy for share in head):
        raise HeadsUsageError(f"a tree needs accuracies between 0 and 1 and a budget of 0 or more, not {budget}")
    ranks, parents, depths = [], [-1], [0]
    waiting: list[tuple[float, int, int, int, float]] = []  # (-likelihood, order, parent, rank, parent's likelihood)

    def offer(parent: int, rank: int, likelihood: float) -> None:
        depth = depths[parent]
        if depth < len(accuracy) and rank < len(accuracy[depth]):
            heapq.heappush(waiting, (-likelihood * accuracy[depth][rank], len(ranks), parent, rank, likelihood))

    offer(0, 0, 1.0)
    while waiting and len(ranks) < budget:
        negative, _, parent, rank, above = heapq.heappop(waiting)
        if negative == 0:
            break
        ranks.append(rank)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        offer(len(ranks), 0, -negative)
        offer(parent, rank + 1, above)
    return Shape(ranks=tuple(ranks), parents=tuple(parents))


def expected_tokens(shape: Shape, accuracy: Sequence[Sequence[float]]) -> float:
    """Tokens a pass: the one that the model itself says, and the guesses that are expected to be right."""
    likelihood = [1.0]
    for parent, rank, depth in zip(shape.parents[1:], shape.ranks, shape.depths[1:], strict=True):
        likelihood.append(likelihood[parent] * accuracy[depth - 1][rank])
    return sum(likelihood)
