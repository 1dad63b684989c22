# SPDX-License-Identifier: Apache-2.0
"""The programme: one option for each layer, the least sum of scores, sums of costs within limits. HiGHS proves it.

x_ij = 1 if layer i takes option j: minimize Σ s_ij x_ij with Σ_j x_ij = 1 for each layer and Σ c_ij x_ij ≤ limit for
each row (Puzzle 2411.19146, section 4). A child that must differ from earlier ones in d layers has Σ x_ij ≤ L - d over
the options of each. Solved by scipy's `milp` (HiGHS), to a proven gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

Choice = tuple[int, ...]
"""The option of each layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One limit. Costs may be negative, where they are counted from the teacher's."""

    name: str
    costs: tuple[np.ndarray, ...]
    """For each layer, of each option: (options,)."""
    limit: float

    def of(self, choice: Choice) -> float:
        return float(sum(costs[option] for costs, option in zip(self.costs, choice, strict=True)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    scores: tuple[np.ndarray, ...]
    """For each layer, of each option: (options,). Infinite: it may not be taken."""
    rows: tuple[Row, ...]

    def score(self, choice: Choice) -> float:
        return float(sum(scores[option] for scores, option in zip(self.scores, choice, strict=True)))

    def fits(self, choice: Choice) -> bool:
        return all(row.of(choice) <= row.limit + 1e-9 * (1 + abs(row.limit)) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Solution:
    choice: Choice
    score: float
    bound: float
    """No choice can be better than this."""
    proven: bool
    """The gap is within what was asked for."""
    seconds: float

    @property
    def gap(self) -> float:
        return max(self.score - self.bound, 0.0) / max(abs(self.score), 1e-12)


Outcome = Solution | Literal["infeasible", "unknown"]
"""`unknown`: time ran out before any solution was found."""


def solve(
    problem: Problem,
    *,
    seconds: float = 60.0,
    gap: float = 1e-4,
    earlier: Sequence[Choice] = (),
    distance: int = 1,
) -> Outcome:
    """The best choice that differs from every earlier one in at least `distance` layers."""
    import time

    began = time.monotonic()
    kept = [
        _undominated(problem, layer) if not earlier else allowed(problem, layer) for layer in range(_layers(problem))
    ]
    if any(len(options) == 0 for options in kept):
        return "infeasible"
    objective = np.concatenate([scores[options] for scores, options in zip(problem.scores, kept, strict=True)])
    matrix, low, high = constraints_of(problem, kept, earlier, distance)
    # HiGHS has absolute tolerances, so scores are brought to the size of 1.
    scale = float(np.abs(objective).max()) or 1.0
    found = run_milp(objective / scale, matrix, low, high, np.ones(len(objective)), seconds, gap)
    if found.status == 2:
        return "infeasible"
    if found.x is None:
        return "unknown"
    choice, start = [], 0
    for options in kept:
        choice.append(int(options[int(np.argmax(found.x[start : start + len(options)]))]))
        start += len(options)
    chosen = tuple(choice)
    score, bound = problem.score(chosen), float(found.mip_dual_bound) * scale
    return Solution(
        choice=chosen,
        score=score,
        bound=min(bound, score),
        proven=found.status == 0,
        seconds=time.monotonic() - began,
    )


def pool(problem: Problem, count: int, distance: int, *, seconds: float, gap: float) -> list[Solution]:
    """Up to `count` choices, best first, each different from those before in `distance` layers."""
    found: list[Solution] = []
    while len(found) < count:
        earlier = [solution.choice for solution in found]
        outcome = solve(problem, seconds=seconds, gap=gap, earlier=earlier, distance=distance)
        if not isinstance(outcome, Solution):
            break
        found.append(outcome)
    return found


def front(problem: Problem, row: int, points: int, *, seconds: float, gap: float) -> list[Solution]:
    """Best choices for `points` limits of one row, from the least it can be to what the best scores take."""
    free = solve(_with_limit(problem, row, np.inf), seconds=seconds, gap=gap)
    if not isinstance(free, Solution):
        return []
    most, least = problem.rows[row].of(free.choice), least_of(problem, row)
    found = []
    for limit in np.linspace(least, most, points):
        outcome = solve(_with_limit(problem, row, float(limit)), seconds=seconds, gap=gap)
        if isinstance(outcome, Solution):
            found.append(outcome)
    return found


def least_of(problem: Problem, row: int) -> float:
    """The least that a row can sum up to, whatever the other rows say."""
    costs = problem.rows[row].costs
    return float(sum(found[allowed(problem, layer)].min() for layer, found in enumerate(costs)))


def _with_limit(problem: Problem, row: int, limit: float) -> Problem:
    rows = list(problem.rows)
    rows[row] = replace(rows[row], limit=limit + abs(limit) * 1e-9 if np.isfinite(limit) else limit)
    return replace(problem, rows=tuple(rows))


def _layers(problem: Problem) -> int:
    return len(problem.scores)


def allowed(problem: Problem, layer: int) -> np.ndarray:
    return np.flatnonzero(np.isfinite(problem.scores[layer]))


def _undominated(problem: Problem, layer: int) -> np.ndarray:
    """Options that no other beats or equals in score and every cost: without cuts, no best choice needs the rest."""
    options = allowed(problem, layer)
    columns = [problem.scores[layer], *(row.costs[layer] for row in problem.rows)]
    table = np.stack([column[options] for column in columns])
    kept = []
    for index in range(len(options)):
        no_worse = (table <= table[:, [index]]).all(0)
        better = (table < table[:, [index]]).any(0)
        twin = no_worse & ~better & (np.arange(len(options)) < index)
        if not ((no_worse & better) | twin).any():
            kept.append(int(options[index]))
    return np.array(kept, dtype=np.int64)


def constraints_of(
    problem: Problem, kept: Sequence[np.ndarray], earlier: Sequence[Choice], distance: int
) -> tuple[Any, np.ndarray, np.ndarray]:
    """(matrix, lower, upper bounds): a row for each layer, each limit, each earlier choice."""
    from scipy.sparse import csr_matrix, vstack

    sizes = [len(options) for options in kept]
    total, starts = sum(sizes), np.concatenate([[0], np.cumsum(sizes)])
    owner = np.repeat(np.arange(len(kept)), sizes)
    once = csr_matrix((np.ones(total), (owner, np.arange(total))), shape=(len(kept), total))
    parts, low, high = [once], [np.ones(len(kept))], [np.ones(len(kept))]
    for row in problem.rows:
        if not np.isfinite(row.limit):
            continue
        costs = np.concatenate([found[options] for found, options in zip(row.costs, kept, strict=True)])
        scale = float(np.abs(costs).max()) or 1.0
        parts.append(csr_matrix(costs / scale))
        low.append(np.array([-np.inf]))
        high.append(np.array([row.limit / scale]))
    for choice in earlier:
        taken = [starts[layer] + np.flatnonzero(kept[layer] == option) for layer, option in enumerate(choice)]
        columns = np.concatenate(taken)
        cut = csr_matrix((np.ones(len(columns)), (np.zeros(len(columns), int), columns)), shape=(1, total))
        parts.append(cut)
        low.append(np.array([-np.inf]))
        high.append(np.array([float(len(kept) - distance)]))
    return vstack(parts).tocsr(), np.concatenate(low), np.concatenate(high)


def run_milp(
    objective: np.ndarray,
    matrix: Any,
    low: np.ndarray,
    high: np.ndarray,
    integral: np.ndarray,
    seconds: float,
    gap: float,
) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp

    upper = np.where(integral > 0, 1.0, np.inf)
    return milp(
        objective,
        integrality=integral,
        bounds=Bounds(np.zeros(len(objective)), upper),
        constraints=LinearConstraint(matrix, low, high),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
