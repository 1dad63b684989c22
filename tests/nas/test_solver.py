# SPDX-License-Identifier: Apache-2.0
"""The programme against trying everything, and what is told about budgets."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.nas.explain import explain, prices
from refound.nas.solver import Choice, Problem, Row, Solution, front, pool, solve

LIMITS = {"seconds": 20.0, "gap": 1e-9}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 4 layers of up to 4 options under up to 3 limits, with small integers so that nothing is nearly so."""
    layers, rows = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    sizes = [draw(st.integers(1, 4)) for _ in range(layers)]

    def column(low: int, high: int) -> tuple[np.ndarray, ...]:
        return tuple(np.array([draw(st.integers(low, high)) for _ in range(size)], dtype=float) for size in sizes)

    scores = column(0, 9)
    for found in scores:
        if len(found) > 1 and draw(st.booleans()):
            found[draw(st.integers(1, len(found) - 1))] = np.inf  # one that failed
    return Problem(
        scores=scores,
        rows=tuple(
            Row(name=f"row{k}", costs=column(-3, 9), limit=float(draw(st.integers(-4, 20)))) for k in range(rows)
        ),
    )


def every(problem: Problem) -> list[Choice]:
    """All choices that meet the limits."""
    options = product(*(range(len(scores)) for scores in problem.scores))
    return [choice for choice in options if np.isfinite(problem.score(choice)) and problem.fits(choice)]


@settings(deadline=None, max_examples=60)
@given(problems())
def test_the_solution_is_the_best_of_all_choices(problem: Problem) -> None:
    found, choices = solve(problem, **LIMITS), every(problem)
    if not choices:
        assert found == "infeasible"
        return
    assert isinstance(found, Solution) and found.proven
    assert problem.fits(found.choice)
    best = min(map(problem.score, choices))
    assert found.score == pytest.approx(best) and found.bound <= found.score
    assert found.gap == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(problems(), st.integers(1, 3))
def test_a_pool_is_the_best_of_what_differs_enough(problem: Problem, distance: int) -> None:
    choices, earlier = every(problem), []
    for found in pool(problem, 3, distance, **LIMITS):
        far = [
            choice
            for choice in choices
            if all(sum(a != b for a, b in zip(choice, other, strict=True)) >= distance for other in earlier)
        ]
        assert found.choice in far
        assert found.score == pytest.approx(min(map(problem.score, far)))
        earlier.append(found.choice)


@settings(deadline=None, max_examples=40)
@given(problems())
def test_why_a_budget_cannot_be_met_and_what_is_nearest(problem: Problem) -> None:
    if every(problem) or any(not np.isfinite(scores).any() for scores in problem.scores):
        return
    found = explain(problem, **LIMITS)
    named = [row for row in problem.rows if row.name in found.rows]

    def feasible(rows: list[Row]) -> bool:
        return bool(every(Problem(scores=problem.scores, rows=tuple(rows))))

    assert named and not feasible(named)
    for row in named:  # each is needed
        assert feasible([other for other in named if other is not row])
    assert found.stretch > 0
    if np.isfinite(found.stretch):
        nearest = [Row(name=row.name, costs=row.costs, limit=found.nearest[row.name] + 1e-4) for row in problem.rows]
        assert feasible(nearest)
        little = [
            Row(name=row.name, costs=row.costs, limit=row.limit + 0.99 * found.stretch * abs(row.limit) - 1e-4)
            for row in problem.rows
        ]
        assert not feasible(little)


def tower(layers: int = 6) -> Problem:
    """Each layer: 10 parameters for nothing, 5 for a score of 1, 0 for one of 4; layers matter differently."""
    scores = tuple(np.array([0.0, 1.0, 4.0]) * (1 + layer / 10) for layer in range(layers))
    row = Row(name="parameters", costs=(np.array([10.0, 5.0, 0.0]),) * layers, limit=5.0 * layers + 2.5)
    loose = Row(name="loose", costs=(np.array([1.0, 1.0, 1.0]),) * layers, limit=100.0)
    return Problem(scores=scores, rows=(row, loose))


def test_the_front_falls_as_the_limit_rises() -> None:
    problem = tower()
    found = front(problem, 0, 7, **LIMITS)
    scores, costs = [one.score for one in found], [problem.rows[0].of(one.choice) for one in found]
    assert len(found) == 7 and costs == sorted(costs)
    assert scores == sorted(scores, reverse=True) and scores[-1] == 0


def test_the_price_says_which_limit_binds_and_what_more_of_it_buys() -> None:
    problem = tower()
    solution = solve(problem, **LIMITS)
    assert isinstance(solution, Solution)
    tight, loose = prices(problem, solution, **LIMITS)
    assert tight.binds and tight.per_unit > 0 and tight.used == 30
    assert not loose.binds and loose.per_unit == 0 and loose.one_percent == 0
    # five more units let the dearest layer be whole again
    wider = Problem(scores=problem.scores, rows=(Row(name="parameters", costs=problem.rows[0].costs, limit=37.5),))
    better = solve(wider, **LIMITS)
    assert isinstance(better, Solution)
    assert solution.score - better.score == pytest.approx(5 * tight.per_unit)


def test_costs_may_be_counted_from_the_teachers_and_scores_be_tiny() -> None:
    """Differences of seconds: all negative, of the order of 1e-4, and scores of 1e-5."""
    costs = tuple(np.array([0.0, -3e-4, -5e-4]) for _ in range(10))
    scores = tuple(np.array([0.0, 1e-5, 4e-5]) for _ in range(10))
    found = solve(Problem(scores=scores, rows=(Row(name="latency", costs=costs, limit=-1.2e-3),)), **LIMITS)
    assert isinstance(found, Solution)
    assert found.score == pytest.approx(4e-5) and sorted(found.choice) == [0] * 6 + [1] * 4


def test_options_of_kinds_are_never_mixed_and_the_best_of_all_is_proven() -> None:
    """Against every choice there is, of kinds drawn at random, with limits that bind."""
    draw = np.random.default_rng(5)
    for _ in range(20):
        kinds = tuple(tuple(draw.choice(["", "a", "b"], 4)) for _ in range(4))
        problem = Problem(
            scores=tuple(draw.random(4) for _ in range(4)),
            rows=(Row(name="parameters", costs=tuple(draw.random(4) for _ in range(4)), limit=2.0),),
            kinds=kinds,
        )
        one_kind = [
            choice
            for choice in product(range(4), repeat=4)
            if len({kinds[layer][option] for layer, option in enumerate(choice)}) == 1 and problem.fits(choice)
        ]
        found = solve(problem, **LIMITS)
        if not one_kind:
            assert found == "infeasible"
            continue
        assert isinstance(found, Solution) and found.proven and found.choice in one_kind
        assert found.score == pytest.approx(min(map(problem.score, one_kind)))
        assert problem.part_of(found.choice).score(found.choice) == found.score
        points = front(problem, 0, 3, **LIMITS)
        assert [point.score for point in points] == sorted((p.score for p in points), reverse=True)
