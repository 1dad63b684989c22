# SPDX-License-Identifier: Apache-2.0
"""How scores compose: a layer in which attention and FFN are both replaced, and a child of many such layers.

Within a layer (a^p + f^p)^(1/p): p = 1 adds, and p above 1 says that one damage hides part of the other, as on NVIDIA's
published joint scores (joint / additive has a median of 0.755 there). Over layers, sums; a child's true score is then
predicted as c · sum^q, which does not change which child is best. p, c and q are fitted to joint measurements.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FLOOR = 1e-9
"""Of a score: measured on little text, a good variant may come out as nothing or less."""
_LEAST_P, _MOST_P = 0.5, 6.0


@dataclass(frozen=True, kw_only=True)
class Composition:
    p: float = 1.0
    scale: float = 1.0
    """c"""
    power: float = 1.0
    """q"""

    def layer(self, attention: float, ffn: float) -> float:
        """The score of both together; of one alone it is that one's."""
        if attention <= 0 or ffn <= 0:
            return max(attention, 0.0) + max(ffn, 0.0)
        larger, smaller = max(attention, ffn), min(attention, ffn)
        return larger * (1 + (smaller / larger) ** self.p) ** (1 / self.p)

    def child(self, layers: Sequence[float]) -> float:
        total = sum(layers)
        return self.scale * total**self.power if total > 0 else 0.0


def fit_p(pairs: Sequence[tuple[float, float, float]]) -> float:
    """p for (attention, FFN, joint) scores of single layers, by least squares of logarithms; 1 where none says more."""
    usable = [pair for pair in pairs if min(pair) > _FLOOR]
    if not usable:
        return 1.0

    def error(p: float) -> float:
        form = Composition(p=p)
        return sum(math.log(form.layer(a, f) / joint) ** 2 for a, f, joint in usable)

    grid = [_LEAST_P * (_MOST_P / _LEAST_P) ** (step / 40) for step in range(41)]
    best = min(range(41), key=lambda index: error(grid[index]))
    return _golden(error, grid[max(best - 1, 0)], grid[min(best + 1, 40)])


def fit_children(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(c, q) for children's summed and true scores; one child fixes c alone."""
    points = [(math.log(s), math.log(m)) for s, m in zip(sums, measured, strict=True) if min(s, m) > _FLOOR]
    if not points:
        return 1.0, 1.0
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    # Children of one budget lie close together: their slope is told by noise, and is not used.
    q = 1.0
    if spread / len(points) > 0.04:
        q = min(max(sum((x - mean_x) * (y - mean_y) for x, y in points) / spread, 0.5), 3.0)
    return math.exp(mean_y - q * mean_x), q


def _golden(error: Callable[[float], float], low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        one, other = high - ratio * (high - low), low + ratio * (high - low)
        if error(one) <= error(other):
            high = other
        else:
            low = one
    return (low + high) / 2
