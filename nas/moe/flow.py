# SPDX-License-Identifier: Apache-2.0
"""Balanced assignment: n things to E groups of fixed sizes at the least total cost, exactly.

This is a transportation problem. Spreading each group over its size would make it an n x n assignment (8 n² bytes,
O(n³)); here things are added one after the other along shortest augmenting paths, and since all things of a group look
alike from outside but for their costs, paths run over the E groups alone: memory O(nE), time about O(n (E² + n)).
(Successive shortest paths: Ahuja, Magnanti & Orlin, Network Flows, 1993, section 9.7.)
"""

from collections.abc import Sequence

import numpy as np

_STEPS = 1 << 40  # costs become whole numbers, so that sums are exact and no rounding makes a cycle negative
_FAR = 1 << 60


def balanced_assignment(cost: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The group of each thing: (n,) int64, with exactly sizes[e] things in group e, and no cheaper way to do it.

    cost: (n, E), finite. Costs are told apart down to 2⁻⁴⁰ of their range.

    Raises:
        ValueError: if the sizes do not add up to n, or a cost is no number.
    """
    count, groups = cost.shape
    if len(sizes) != groups or sum(sizes) != count or min(sizes, default=0) < 0:
        raise ValueError(f"sizes {list(sizes)} do not hold {count} things in {groups} groups")
    if not np.isfinite(cost).all():
        raise ValueError("a cost is no number")
    whole = _whole(cost.astype(np.float64))
    group = np.full(count, -1, np.int64)
    room = np.array(sizes, np.int64)
    # away[a, b]: what it costs to move the best thing of group a to group b, and which one that is
    away, mover = np.full((groups, groups), _FAR, np.int64), np.zeros((groups, groups), np.int64)
    for thing in range(count):
        path = _shortest(whole[thing], away, room)
        for first, second in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
            group[mover[first, second]] = second
        group[thing] = path[0]
        room[path[-1]] -= 1
        for changed in path:
            members = np.flatnonzero(group == changed)
            moves = whole[members] - whole[members, changed : changed + 1]
            best = moves.argmin(0)
            away[changed], mover[changed] = moves[best, np.arange(groups)], members[best]
            away[changed, changed] = _FAR
    return group


def _whole(cost: np.ndarray) -> np.ndarray:
    spread = float(cost.max() - cost.min()) if cost.size else 0.0
    if spread == 0:
        return np.zeros(cost.shape, np.int64)
    return np.rint((cost - cost.min()) / spread * _STEPS).astype(np.int64)


def _shortest(entry: np.ndarray, away: np.ndarray, room: np.ndarray) -> list[int]:
    """The groups that the cheapest way in passes through; the last one has room. Bellman-Ford."""
    distance, before = entry.copy(), np.full(len(entry), -1)
    for _ in range(len(entry)):
        through = distance[:, None] + away
        origin = through.argmin(0)
        shorter = through[origin, np.arange(len(entry))]
        better = shorter < distance
        if not better.any():
            break
        distance[better], before[better] = shorter[better], origin[better]
    last = int(np.where(room > 0, distance, _FAR * 4).argmin())
    path = [last]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]
