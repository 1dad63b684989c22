# SPDX-License-Identifier: Apache-2.0
"""What a budget means: which limit binds, what one more unit of it buys, and why a budget cannot be met.

The price of a unit is the dual value of the programme's linear relaxation; what one percent more buys is solved for
exactly. A budget that cannot be met is reduced to limits that conflict (each one needed for it), and the nearest one
that can be met stretches all limits by the same least share.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .solver import Problem, Row, Solution, allowed, constraints_of, least_of, run_milp, solve


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a limit costs the solution."""

    row: str
    used: float
    limit: float
    binds: bool
    per_unit: float
    """By how much the score falls for one more unit (a parameter, a byte, a second), in the relaxation."""
    one_percent: float
    """By how much the best score falls if the limit is 1% higher; exact."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Why no choice meets the limits."""

    rows: tuple[str, ...]
    """Limits that no choice meets together, each one needed for that. One alone is below what anything can be."""
    least: dict[str, float]
    """The least that each of them can be by itself."""
    stretch: float
    """The least share by which all limits must be raised together."""
    nearest: dict[str, float]
    """What the nearest budget that can be met would say."""


def prices(problem: Problem, solution: Solution, *, seconds: float, gap: float) -> list[Price]:
    """One for each row, as they stand in the problem."""
    duals = _duals(problem.part_of(solution.choice))
    found = []
    for index, row in enumerate(problem.rows):
        raised = list(problem.rows)
        raised[index] = replace(row, limit=row.limit + 0.01 * abs(row.limit))
        wider = solve(replace(problem, rows=tuple(raised)), seconds=seconds, gap=gap)
        gain = max(solution.score - wider.score, 0.0) if isinstance(wider, Solution) else 0.0
        found.append(
            Price(
                row=row.name,
                used=row.of(solution.choice),
                limit=row.limit,
                binds=duals[index] > 1e-12 or gain > 0,
                per_unit=duals[index],
                one_percent=gain,
            )
        )
    return found


def _duals(problem: Problem) -> list[float]:
    from scipy.optimize import linprog

    kept = [allowed(problem, layer) for layer in range(len(problem.scores))]
    matrix, _, high = constraints_of(problem, kept, (), 1)
    layers = len(kept)
    scores = np.concatenate([found[options] for found, options in zip(problem.scores, kept, strict=True)])
    scales = [float(np.abs(_flat(row, kept)).max()) or 1.0 for row in problem.rows]
    solved: Any = linprog(
        scores,
        A_ub=matrix[layers:] if problem.rows else None,
        b_ub=high[layers:] if problem.rows else None,
        A_eq=matrix[:layers],
        b_eq=high[:layers],
        bounds=(0, 1),
        method="highs",
    )
    if solved.status != 0 or not problem.rows:
        return [0.0] * len(problem.rows)
    return [max(-float(value), 0.0) / scale for value, scale in zip(solved.ineqlin.marginals, scales, strict=True)]


def _flat(row: Row, kept: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([costs[options] for costs, options in zip(row.costs, kept, strict=True)])


def explain(problem: Problem, *, seconds: float, gap: float) -> Conflict:
    """Why the problem is infeasible; call it only for one that is."""
    rows = list(range(len(problem.rows)))
    for index in list(rows):
        fewer = [row for row in rows if row != index]
        if fewer and not _feasible(problem, fewer, seconds):
            rows = fewer  # it is not needed for the conflict
    stretch = min(_stretch(part, seconds, gap) for part in problem.parts() if part.has_options)
    return Conflict(
        rows=tuple(problem.rows[row].name for row in rows),
        least={problem.rows[row].name: least_of(problem, row) for row in rows},
        stretch=stretch,
        nearest={row.name: row.limit + stretch * abs(row.limit) for row in problem.rows},
    )


def _feasible(problem: Problem, rows: list[int], seconds: float) -> bool:
    anything = tuple(np.where(np.isfinite(scores), 0.0, np.inf) for scores in problem.scores)
    part = replace(problem, scores=anything, rows=tuple(problem.rows[row] for row in rows))
    return solve(part, seconds=seconds, gap=1.0) != "infeasible"


def _stretch(problem: Problem, seconds: float, gap: float) -> float:
    """The least t for which limits + t · |limits| can be met."""
    kept = [allowed(problem, layer) for layer in range(len(problem.scores))]
    matrix, low, high = constraints_of(problem, kept, (), 1)
    from scipy.sparse import csr_matrix, hstack

    column = np.concatenate([np.zeros(len(kept)), -np.abs(high[len(kept) :])])
    wider = hstack([matrix, csr_matrix(column[:, None])]).tocsr()
    variables = matrix.shape[1]
    objective = np.concatenate([np.zeros(variables), [1.0]])
    integral = np.concatenate([np.ones(variables), [0.0]])
    found = run_milp(objective, wider, low, high, integral, seconds, gap)
    return float(found.x[-1]) if found.x is not None else float("inf")
