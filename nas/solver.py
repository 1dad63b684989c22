# SPDX-License-Identifier: Apache-2.0
"""The programme: one option for each layer, the least sum of scores, sums of costs within limits. HiGHS proves it.

x_ij = 1 if layer i takes option j: minimize Σ s_ij x_ij with Σ_j x_ij = 1 for each layer and Σ c_ij x_ij ≤ limit for
each row (Puzzle 2411.19146, section 4). A child that must differ from earlier ones in d layers has Σ x_ij ≤ L - d over
the options of each. Solved by scipy's `milp` (HiGHS), to a proven gap. Where options are of kinds that no child mixes,
each kind is a programme of its own, and the best answer's bound is the least of theirs.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
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
    kinds: tuple[tuple[str, ...], ...] = ()
    """For each layer, the kind of each option; all that a choice takes are of one. Empty, at all or in a layer: any."""

    def parts(self) -> list["Problem"]:
        """One problem for each kind, in the order in which kinds first come; itself where there are none."""
        names = list(dict.fromkeys(name for kinds in self.kinds for name in kinds))
        return [self._of_kind(name) for name in names] if names else [self]

    def part_of(self, choice: Choice) -> "Problem":
        """The one that has this choice."""
        return next(part for part in self.parts() if np.isfinite(part.score(choice)))

    def _of_kind(self, name: str) -> "Problem":
        scores = tuple(
            np.where([kind == name for kind in kinds], found, np.inf) if kinds else found
            for found, kinds in zip(self.scores, self.kinds, strict=True)
        )
        return Problem(scores=scores, rows=self.rows)

    @property
    def has_options(self) -> bool:
        """Every layer has some that may be taken."""
        return all(np.isfinite(scores).any() for scores in self.scores)

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
    parts = problem.parts()
    each = seconds / len(parts)
    return _best(parts, [_solve(part, seconds=each, gap=gap, earlier=earlier, distance=distance) for part in parts])


def _best(parts: Sequence[Problem], outcomes: Sequence[Outcome]) -> Outcome:
    found = [outcome for outcome in outcomes if isinstance(outcome, Solution)]
    unknown = [part for part, outcome in zip(parts, outcomes, strict=True) if outcome == "unknown"]
    if len(parts) == 1 or not found:
        return outcomes[0] if len(parts) == 1 else "unknown" if unknown else "infeasible"
    # of a part that time ran out in, no more is known than what its options are by themselves
    bounds = [one.bound for one in found] + [float(sum(scores.min() for scores in part.scores)) for part in unknown]
    best = min(found, key=lambda one: one.score)
    return replace(
        best,
        bound=min(best.score, *bounds),
        proven=all(one.proven for one in found) and not unknown,
        seconds=sum(one.seconds for one in found),
    )


def _solve(problem: Problem, *, seconds: float, gap: float, earlier: Sequence[Choice], distance: int) -> Outcome:
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
    found = _core(objective / scale, matrix, low, high, len(kept), seconds, gap)
    if isinstance(found, str):
        return found
    values, bound, proven = found
    choice, start = [], 0
    for options in kept:
        choice.append(int(options[int(np.argmax(values[start : start + len(options)]))]))
        start += len(options)
    score = problem.score(tuple(choice))
    return Solution(
        choice=tuple(choice),
        score=score,
        bound=min(bound * scale, score),
        proven=proven,
        seconds=time.monotonic() - began,
    )


def _core(
    objective: np.ndarray, matrix: Any, low: np.ndarray, high: np.ndarray, layers: int, seconds: float, gap: float
) -> tuple[np.ndarray, float, bool] | Literal["infeasible", "unknown"]:
    """(x, bound, proven). Only options that may be in a best choice are searched, which is far fewer.

    An option whose reduced cost in the relaxation is r costs any choice that takes it at least r over the relaxation's
    bound. So the best choice among options of reduced cost up to d is the best of all, if it is within d of that bound;
    else d is raised to what it is off by, which is enough.
    """
    relaxed = relaxation(objective, matrix, high, layers)
    if relaxed is None:
        return "infeasible"
    floor, reduced = relaxed
    size = len(objective)
    reach = max(5 * gap * abs(floor), 1e-6 * float(np.abs(objective).max()))
    while True:
        chosen = np.flatnonzero(reduced <= reach + 1e-9)
        found = run_milp(objective[chosen], matrix[:, chosen], low, high, np.ones(len(chosen)), seconds, gap)
        is_all = len(chosen) == size
        if found.x is None:
            if is_all or found.status != 2:
                return "infeasible" if found.status == 2 else "unknown"
            reach = 8 * reach
            continue
        bound = max(
            min(float(found.mip_dual_bound), floor + reach) if not is_all else float(found.mip_dual_bound), floor
        )
        close = found.fun - bound <= gap * abs(found.fun) + 1e-12
        if is_all or close or found.status != 0:
            values = np.zeros(size)
            values[chosen] = found.x
            return values, bound, found.status == 0 and (is_all or close)
        reach = float(found.fun) - floor + 1e-9


def relaxation(objective: np.ndarray, matrix: Any, high: np.ndarray, layers: int) -> tuple[float, np.ndarray] | None:
    """(the least that fractions of options can reach, the reduced cost of each option); None: even they do not fit."""
    from scipy.optimize import linprog

    limited = matrix.shape[0] > layers
    solved: Any = linprog(
        objective,
        A_ub=matrix[layers:] if limited else None,
        b_ub=high[layers:] if limited else None,
        A_eq=matrix[:layers],
        b_eq=high[:layers],
        bounds=(0, None),  # at most 1 follows from one option a layer
        method="highs",
    )
    if solved.status != 0:
        return None
    reduced = objective - matrix[:layers].T @ solved.eqlin.marginals
    if limited:
        reduced = reduced - matrix[layers:].T @ solved.ineqlin.marginals
    return float(solved.fun), reduced


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
    return min(
        float(sum(found[allowed(part, layer)].min() for layer, found in enumerate(costs)))
        for part in problem.parts()
        if part.has_options
    )


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
    from scipy import optimize

    tools: Any = optimize  # its stubs know single numbers only, where arrays are documented
    upper = np.where(integral > 0, 1.0, np.inf)
    with _stdout_spared():
        return tools.milp(
            objective,
            integrality=integral,
            bounds=tools.Bounds(np.zeros(len(objective)), upper),
            constraints=tools.LinearConstraint(matrix, low, high),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )


@contextlib.contextmanager
def _stdout_spared() -> Iterator[None]:
    """HiGHS (1.12) now and then writes a line to stdout though told not to, where JSON may be expected."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
