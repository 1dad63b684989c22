# SPDX-License-Identifier: Apache-2.0
"""A plan's survival figures against random draws of lost nodes."""

import math
from dataclasses import dataclass

from .planning import CostPlan, Planned
from .survival import run_survival, sample_runs, sample_survival

_SIGMAS = 4.0
_MOST_LOSSES = 2000.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure, by formula and drawn."""

    scheme: str
    what: str
    expected: float
    drawn: float
    allowed: float
    """Difference that chance explains: four standard errors, and Bernstein's allowance for what is rare."""

    @property
    def agrees(self) -> bool:
        return abs(self.drawn - self.expected) <= self.allowed


def check_plan(plan: CostPlan, *, trials: int, runs: int, seed: int) -> tuple[Comparison, ...]:
    """Draw `trials` sets of lost nodes and `runs` whole runs for each code, and compare."""
    return tuple(
        comparison
        for planned in plan.schemes
        if planned.in_memory
        for comparison in (*_sets(planned, trials, seed), *_runs(plan, planned, runs, seed))
    )


def _sets(planned: Planned, trials: int, seed: int) -> list[Comparison]:
    """Survival of sets of nodes lost at once."""
    return [
        _compared(
            planned,
            f"survives {lost} lost at once",
            expected,
            sample_survival(planned.scheme.groups, lost, trials=trials, seed=seed),
            math.sqrt(expected * (1 - expected) / trials),
            trials,
        )
        for lost, expected in planned.survival.items()
    ]


def _runs(plan: CostPlan, planned: Planned, runs: int, seed: int) -> list[Comparison]:
    """Falls in a run; and no fall at all, for which the closed form is a lower bound."""
    job, scheme = plan.job, planned.scheme
    rate = job.faults.node_losses_per_s
    # A run with very many losses is drawn as far as it tells anything.
    is_whole = rate * job.nodes * job.run_s <= _MOST_LOSSES
    run_s = job.run_s if is_whole else _MOST_LOSSES / rate / job.nodes
    sampled = sample_runs(scheme.groups, rate, scheme.repair_s, run_s, runs=runs, seed=seed)
    falls = planned.falls_per_s * run_s
    whole = planned.run_survival if is_whole else run_survival(planned.falls_per_s, run_s)
    # Above the bound is as it should be: only what is below it is compared.
    least = min(sampled.survived_share, whole)
    return [
        _compared(planned, "falls a run", falls, sampled.mean_falls, sampled.standard_error(falls), runs),
        _compared(planned, "whole run, at least", whole, least, math.sqrt(whole * (1 - whole) / runs), runs),
    ]


def _compared(
    planned: Planned, what: str, expected: float, drawn: float, standard_error: float, draws: int
) -> Comparison:
    # With sigma alone, a single hit of something rare would count as disagreement (Bernstein's inequality).
    allowed = _SIGMAS * standard_error + _SIGMAS**2 / 3 / draws
    return Comparison(scheme=planned.name, what=what, expected=expected, drawn=drawn, allowed=allowed)
