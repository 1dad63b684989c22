# SPDX-License-Identifier: Apache-2.0
"""Whether memory survives: lost nodes against sharding groups, in closed form and by drawing.

A snapshot can be restored from memory while no group of n = k + m nodes lacks more than m. Losses are taken as
independent, every node as likely as another; nodes that share a rack or a power feed are not (docs/plan.md).
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .stripes import Group


def survival_probability(groups: Sequence[Group], lost_nodes: int) -> Fraction:
    """Probability that memory survives the loss of `lost_nodes` of all nodes at once, each set equally likely. Exact.

    The sets that are survived are counted by a product of polynomials: the coefficient of x^f in
    prod over groups of sum_{i <= m} C(n, i) x^i, over the C(N, f) sets of f nodes. Raises ValueError for more losses
    than nodes.
    """
    nodes = sum(group.n for group in groups)
    if not 0 <= lost_nodes <= nodes:
        raise ValueError(f"{lost_nodes} of {nodes} nodes cannot be lost")
    survived = [1]
    for (n, m), count in _shapes(groups).items():
        factor = [math.comb(n, lost) for lost in range(min(m, lost_nodes) + 1)]
        survived = _product(survived, _power(factor, count, lost_nodes), lost_nodes)
    sets = survived[lost_nodes] if lost_nodes < len(survived) else 0
    return Fraction(sets, math.comb(nodes, lost_nodes))


def fall_rate(groups: Sequence[Group], node_losses_per_s: float, repair_s: float) -> float:
    """Expected number a second of losses that memory does not survive, `node_losses_per_s` being that of one node.

    A lost node counts as missing for `repair_s`, until its successor has its data and its parity. A loss is fatal if
    it meets m or more others of its group missing: n rate P[Binomial(n-1, 1 - exp(-rate repair)) >= m] a group.
    Exact for losses that are independent Poisson processes, one a node, in their stationary state.
    """
    missing = -math.expm1(-node_losses_per_s * repair_s)
    return sum(
        count * n * node_losses_per_s * _binomial_tail(n - 1, missing, m) for (n, m), count in _shapes(groups).items()
    )


def run_survival(falls_per_s: float, run_s: float) -> float:
    """Probability that a whole run never falls to disk: exp(-rate x length).

    A lower bound, close while repairs are short: "no fatal loss by t" is a decreasing event of Poisson processes, so
    by Harris' inequality no fall in one stretch makes none in the next likelier than its rate alone says.
    """
    return math.exp(-falls_per_s * run_s) if falls_per_s else 1.0


def sample_survival(groups: Sequence[Group], lost_nodes: int, *, trials: int, seed: int) -> float:
    """Share of `trials` random sets of lost nodes that memory survives; a check on `survival_probability`."""
    group_of = _group_of(groups)
    draw = random.Random(seed)
    survived = 0
    for _ in range(trials):
        lost = Counter(group_of[node] for node in draw.sample(range(len(group_of)), lost_nodes))
        survived += all(count <= groups[index].m for index, count in lost.items())
    return survived / trials


@dataclass(frozen=True, kw_only=True)
class SampledRuns:
    """What became of many random runs."""

    falls: tuple[int, ...]
    """Fatal losses of each run."""

    @property
    def survived_share(self) -> float:
        return self.falls.count(0) / len(self.falls)

    @property
    def mean_falls(self) -> float:
        return sum(self.falls) / len(self.falls)

    def standard_error(self, expected_falls: float) -> float:
        """Of `mean_falls`: from the runs, or Poisson's where they are too few to tell."""
        runs = len(self.falls)
        variance = sum((count - self.mean_falls) ** 2 for count in self.falls) / max(1, runs - 1)
        return math.sqrt(max(variance, expected_falls) / runs)


def sample_runs(
    groups: Sequence[Group], node_losses_per_s: float, repair_s: float, run_s: float, *, runs: int, seed: int
) -> SampledRuns:
    """Draw the losses of `runs` runs and count the fatal ones; a check on `fall_rate` and `run_survival`."""
    return SampledRuns(
        falls=tuple(
            _falls(groups, node_losses_per_s, repair_s, run_s, random.Random(f"{seed}/{run}")) for run in range(runs)
        )
    )


def _falls(groups: Sequence[Group], rate: float, repair_s: float, run_s: float, draw: random.Random) -> int:
    group_of = _group_of(groups)
    # From one repair time before the start, so that the run begins in the stationary state.
    at, last_loss, falls = -repair_s, dict[int, float](), 0
    while rate > 0 and (at := at + draw.expovariate(rate * len(group_of))) < run_s:
        node = draw.randrange(len(group_of))
        group = groups[group_of[node]]
        others = [last_loss.get(other, -math.inf) for other in group.members if other != node]
        falls += at >= 0 and sum(loss > at - repair_s for loss in others) >= group.m
        last_loss[node] = at
    return falls


def _shapes(groups: Iterable[Group]) -> Counter[tuple[int, int]]:
    """How many groups there are of each (n, m)."""
    return Counter((group.n, group.m) for group in groups)


def _group_of(groups: Sequence[Group]) -> list[int]:
    """Index of each node position's group."""
    return [index for index, group in enumerate(groups) for _ in group.members]


def _binomial_tail(trials: int, probability: float, least: int) -> float:
    """P[Binomial(trials, probability) >= least], as a sum of what is small, so that nothing cancels."""
    if least <= 0:
        return 1.0
    return sum(
        math.comb(trials, hits) * probability**hits * (1 - probability) ** (trials - hits)
        for hits in range(least, trials + 1)
    )


def _product(left: Sequence[int], right: Sequence[int], degree: int) -> list[int]:
    """Of two polynomials, up to a degree."""
    out = [0] * min(len(left) + len(right) - 1, degree + 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right[: len(out) - i]):
            out[i + j] += a * b
    return out


def _power(base: Sequence[int], exponent: int, degree: int) -> list[int]:
    result, square = [1], list(base)
    while exponent:
        if exponent & 1:
            result = _product(result, square, degree)
        square, exponent = _product(square, square, degree), exponent >> 1
    return result
