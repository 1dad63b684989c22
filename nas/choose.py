# SPDX-License-Identifier: Apache-2.0
"""From the programme to children: solve, measure the best few as a whole, correct the composition, solve again."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..export.architecture import Decoder
from .budget import amount_text
from .compose import Composition, fit_children, fit_p
from .errors import BudgetError
from .explain import Conflict, Price, explain, prices
from .jobs import Progress
from .programme import Budget, Programme
from .solver import Choice, Problem, Solution, front, pool, solve

Measure = Callable[[Decoder], dict[str, Any]]
"""The quality of a child as a whole, as facts."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Two replacements in one layer, by themselves and together."""

    layer: int
    attention: float
    ffn: float
    joint: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A solution that was put together and measured."""

    solution: Solution
    predicted: float
    measured: dict[str, Any]
    round: int

    @property
    def choice(self) -> Choice:
        return self.solution.choice


@dataclass(kw_only=True)
class Chosen:
    """All that came out of the programme."""

    probes: list[Probe] = field(default_factory=list)
    compositions: list[Composition] = field(default_factory=list)
    """One for each round, and the last correction."""
    measured: list[Measured] = field(default_factory=list)
    prices: list[Price] = field(default_factory=list)
    front: list[Solution] = field(default_factory=list)
    objective: str = "kl"

    def best(self, count: int) -> list[Measured]:
        """By what was measured, best first."""
        return sorted(self.measured, key=lambda one: one.measured[self.objective])[:count]


class Chooser:
    def __init__(self, programme: Programme, measure: Measure, progress: Progress) -> None:
        self._programme, self._measure, self._progress = programme, measure, progress
        self._recipe = programme.recipe

    def choose(self) -> Chosen:
        """Raises BudgetError if nothing meets the budget, with the reason and the nearest that can be met."""
        chosen = Chosen(objective=self._recipe.score.objective)
        chosen.probes = self._probe()
        p = fit_p([(probe.attention, probe.ffn, probe.joint) for probe in chosen.probes])
        chosen.compositions.append(Composition(p=p))
        for turn in range(self._recipe.solver.rounds):
            problem = self._programme.problem(chosen.compositions[-1])
            new = [one for one in self._solve(problem) if one.choice not in [had.choice for had in chosen.measured]]
            for solution in new:
                chosen.measured.append(self._check(solution, chosen.compositions[-1], turn))
            if not new:
                break
            chosen.compositions.append(self._correct(chosen))
        problem = self._programme.problem(chosen.compositions[-1])
        settings = self._recipe.solver
        final = solve(problem, seconds=settings.seconds, gap=settings.gap)
        assert isinstance(final, Solution)
        chosen.prices = prices(problem, final, seconds=settings.seconds, gap=settings.gap)
        if settings.points and problem.rows:
            chosen.front = front(problem, 0, settings.points, seconds=settings.seconds, gap=settings.gap)
        return chosen

    def _solve(self, problem: Problem) -> list[Solution]:
        settings = self._recipe.solver
        found = pool(problem, settings.pool, settings.distance, seconds=settings.seconds, gap=settings.gap)
        if found:
            first = found[0]
            told = "proven best" if first.proven else f"within {first.gap:.2%} of the best"
            self._progress(f"solved in {first.seconds:.2f} s: {told}; {len(found)} solutions")
            return found
        if solve(problem, seconds=settings.seconds, gap=settings.gap) == "unknown":
            raise BudgetError(f"no solution was found within {settings.seconds:.0f} s; raise solver.seconds")
        conflict = explain(problem, seconds=settings.seconds, gap=settings.gap)
        raise BudgetError(conflict_text(conflict, self._programme.budgets))

    def _check(self, solution: Solution, composition: Composition, turn: int) -> Measured:
        facts = self._measure(self._programme.child(solution.choice))
        predicted = composition.child(self._layers(composition, solution.choice))
        if "infeasible" in facts:
            facts = dict.fromkeys(("kl", "lm", "cosine"), math.inf) | facts
        objective = self._recipe.score.objective
        self._progress(f"child: predicted {objective} {predicted:.4f}, measured {facts[objective]:.4f}")
        return Measured(solution=solution, predicted=predicted, measured=facts, round=turn)

    def _layers(self, composition: Composition, choice: Choice) -> list[float]:
        return [composition.layer(attention, ffn) for attention, ffn in self._programme.singles(choice)]

    def _correct(self, chosen: Chosen) -> Composition:
        """c, q, and p anew: the p for which children (with the best c and q) and probes lie nearest to the truth."""
        pairs = [(probe.attention, probe.ffn, probe.joint) for probe in chosen.probes]
        measured = [(self._programme.singles(one.choice), one.measured[chosen.objective]) for one in chosen.measured]
        usable = [(singles, value) for singles, value in measured if 0 < value < math.inf]

        def fitted(p: float) -> tuple[float, Composition]:
            form = Composition(p=p)
            sums = [sum(form.layer(a, f) for a, f in singles) for singles, _ in usable]
            scale, power = fit_children(sums, [value for _, value in usable])
            form = replace(form, scale=scale, power=power)
            error = sum(math.log(form.layer(a, f) / joint) ** 2 for a, f, joint in pairs if min(a, f, joint) > 1e-9)
            for total, (_, value) in zip(sums, usable, strict=True):
                if total > 0:
                    error += math.log(scale * total**power / value) ** 2
            return error, form

        before = chosen.compositions[-1].p
        candidates = sorted({before, *(before * 2 ** (step / 8) for step in range(-8, 9))})
        return min((fitted(min(max(p, 0.5), 6.0)) for p in candidates), key=lambda found: found[0])[1]

    def _probe(self) -> list[Probe]:
        """Layers spread over the depth, two replacements drawn by the seed in each."""
        layers = list(self._programme.space.layers)
        draw = random.Random(self._recipe.seed)
        count = min(self._recipe.score.probes, len(layers))
        found = []
        for index in (len(layers) * turn // count for turn in range(count)):
            pairs = [pair for pair in layers[index].pairs if pair[0] and pair[1]]
            singles = [
                (
                    pair,
                    self._programme.single(index, layers[index].attention[pair[0]]),
                    self._programme.single(index, layers[index].ffn[pair[1]]),
                )
                for pair in pairs
            ]
            usable = [one for one in singles if max(one[1:]) < math.inf]
            if not usable:
                continue
            pair, attention, ffn = draw.choice(usable)
            choice = list(self._programme.teacher_choice())
            choice[index] = layers[index].pairs.index(pair)
            facts = self._measure(self._programme.child(tuple(choice)))
            if "infeasible" not in facts:
                joint = facts[self._recipe.score.objective]
                found.append(Probe(layer=index, attention=attention, ffn=ffn, joint=joint))
        return found


def conflict_text(conflict: Conflict, budgets: Sequence[Budget]) -> str:
    """Why, and what is nearest, in the units of the limits."""
    known = {budget.name: budget for budget in budgets}
    lines = []
    for name in conflict.rows:
        budget = known[name]
        amount = amount_text(budget.limit.quantity, budget.allowed)
        least = amount_text(budget.limit.quantity, budget.fixed + conflict.least[name])
        lines.append(f"{name}: at most {amount} is asked for; the least that any child has is {least}")
    what = "this limit" if len(lines) == 1 else "these limits together"
    near = ", ".join(
        f"{name} = {amount_text(known[name].limit.quantity, known[name].fixed + limit)}"
        for name, limit in conflict.nearest.items()
    )
    return f"no child meets {what}:\n  " + "\n  ".join(lines) + f"\nThe nearest budget that can be met: {near}"
