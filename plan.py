# SPDX-License-Identifier: Apache-2.0
"""What `refound plan` prints, as text and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .ckpt.errors import ConfigError
from .ckpt.plan_check import Comparison, check_plan
from .ckpt.planning import CostPlan, Planned, make_cost_plan
from .ckpt.simulation import Simulated, simulate
from .plan_settings import Request
from .text import columns, duration_text

_DRAWN_SETS = 20_000
_DRAWN_RUNS = 200
_MOST_INTERRUPTIONS = 2e6
_HEAD = (
    "code (k, m)",
    "memory",
    "at most",
    "network",
    "new node",
    "1 lost",
    "2 lost",
    "3 lost",
    "whole run",
    "every",
    "goodput",
    "",
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was asked for."""

    request: Request
    plan: CostPlan
    comparisons: tuple[Comparison, ...] | None
    simulated: tuple[Simulated, ...] | None

    @property
    def agrees(self) -> bool:
        """Whether no formula was contradicted."""
        return all(comparison.agrees for comparison in self.comparisons or ())


def make_report(request: Request, *, check: bool, simulated: bool, runs: int, seed: int) -> Report:
    """Plan, and draw what is to be drawn. Raises ConfigError for a simulation that would not end today."""
    interruptions = request.job.run_s / request.job.mtbf_s
    if simulated and interruptions * runs > _MOST_INTERRUPTIONS:
        raise ConfigError(
            f"--simulate: {runs} runs with {interruptions:,.0f} interruptions each take too long; shorten --run-days "
            "or take fewer --runs"
        )
    plan = make_cost_plan(request.job)
    return Report(
        request=request,
        plan=plan,
        comparisons=check_plan(plan, trials=_DRAWN_SETS, runs=_DRAWN_RUNS, seed=seed) if check else None,
        simulated=_simulate(plan, runs, seed) if simulated else None,
    )


def _simulate(plan: CostPlan, runs: int, seed: int) -> tuple[Simulated, ...]:
    """The recommended code and storage alone, through the same interruptions."""
    with_refound = [plan.recommended] if plan.recommended else []
    without = [planned for planned in plan.schemes if not planned.in_memory]
    return tuple(
        simulate(planned.scheme, plan.job.faults, plan.job.run_s, runs=runs, seed=seed)
        for planned in (*with_refound, *without)
    )


# --- JSON --------------------------------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, Any]:
    """Return what `refound plan --json` prints: bytes, seconds, probabilities; what is infinite is null."""
    request, plan = report.request, report.plan
    told: dict[str, Any] = {
        "schema": 1,
        "job": {**asdict(plan.job), "params": request.params, "node_bytes": plan.job.node_bytes},
        "assumptions": [asdict(assumption) for assumption in request.assumptions],
        "schemes": [_scheme_json(planned) for planned in plan.schemes],
        "recommended": plan.recommended.name if plan.recommended else None,
        "why": plan.why,
        "notes": list(plan.notes),
    }
    if report.comparisons is not None:
        told["check"] = {
            "agrees": report.agrees,
            "comparisons": [{**asdict(each), "agrees": each.agrees} for each in report.comparisons],
        }
    if report.simulated is not None:
        told["simulated"] = [asdict(each) for each in report.simulated]
    return _finite(told)


def _scheme_json(planned: Planned) -> dict[str, Any]:
    scheme, cost = planned.scheme, planned.cost
    return {
        "name": planned.name,
        "in_memory": planned.in_memory,
        "code": dict(zip("km", planned.code, strict=True)) if planned.code else None,
        "chosen": planned.is_chosen,
        "yours": planned.is_yours,
        **({**asdict(cost), "peak_bytes": planned.peak_bytes} if planned.in_memory else {}),
        "every_steps": planned.every_steps,
        **{name: value for name, value in vars(scheme).items() if name not in ("name", "groups")},
        "survival": {str(lost): value for lost, value in planned.survival.items()},
        "falls_per_s": planned.falls_per_s if planned.in_memory else None,
        "run_survival": planned.run_survival if planned.in_memory else None,
        "goodput": asdict(planned.goodput),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- text --------------------------------------------------------------------------------------------------------


def to_text(report: Report) -> str:
    """Return the job, a row for each scheme, the recommendation, what was drawn, and every assumption."""
    plan = report.plan
    blocks = [_headline(report.request), _table(plan), _recommendation(plan)]
    if report.simulated is not None:
        blocks.append(_simulated_text(report.request, plan, report.simulated))
    if report.comparisons is not None:
        blocks.append(_check_text(report.comparisons))
    rows = [(f"--{each.flag}", each.shown, each.source) for each in report.request.assumptions]
    blocks.append("\n".join(["Computed from:", *(f"  {line}" for line in columns(rows))]))
    return "\n\n".join(blocks)


def _headline(request: Request) -> str:
    job = request.job
    size = f"{request.params / 1e9:,.6g}B parameters, " if request.params else ""
    often = "never interrupted" if math.isinf(job.mtbf_s) else f"interrupted every {duration_text(job.mtbf_s)}"
    return (
        f"{_count(job.nodes, 'node')} of {_count(job.gpus_per_node, 'GPU')}, {size}{_size(job.state_bytes)} of state: "
        f"{_size(job.node_bytes)} a node; {often}, {job.node_loss_share:.0%} of the times by the loss of a node"
    )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _table(plan: CostPlan) -> str:
    lines = columns([_HEAD, *(_row(plan, planned) for planned in plan.schemes)])
    legend = (
        "memory: of a node; at most: while a checkpoint is written. network: of a snapshot, each direction.",
        "new node: what it receives. lost: probability that memory survives that many at once, and the whole run.",
        "every: work between two snapshots, in steps and time. goodput: time that counts.",
    )
    return "\n".join([*lines, "", *legend])


def _row(plan: CostPlan, planned: Planned) -> tuple[str, ...]:
    cost, job = planned.cost, plan.job
    if planned.in_memory:
        bytes_of = (cost.memory_bytes, planned.peak_bytes, cost.network_bytes, cost.newcomer_bytes)
        sizes = [_size(each) for each in bytes_of]
        chances = [_chance(planned.survival[f]) if f in planned.survival else "-" for f in (1, 2, 3)]
        chances.append(_chance(planned.run_survival))
    else:
        sizes, chances = ["-"] * 4, ["-"] * 4
    marks = [
        text
        for holds, text in (
            (planned is plan.recommended, "recommended"),
            (planned.is_chosen, "chosen"),
            (planned.is_yours, "yours"),
            (planned.in_memory and planned.peak_bytes > job.ram_bytes, "too large"),
        )
        if holds
    ]
    every = f"{planned.every_steps:,} ({duration_text(planned.scheme.interval_s)})"
    return (planned.name, *sizes, *chances, every, f"{planned.goodput.useful:.2%}", ", ".join(marks))


def _recommendation(plan: CostPlan) -> str:
    planned, base = plan.recommended, plan.baseline
    if planned is None:
        lines = [f"Nothing to recommend: {plan.why}."]
    else:
        wish = f"--rdzv-conf=k={planned.code[0]},m={planned.code[1]}" if planned.code and not planned.is_chosen else ""
        how = f"{wish or 'no k and m in --rdzv-conf'}, and protect(…, every={planned.every_steps})"
        lost = planned.goodput
        lines = [
            f"Recommended: {planned.name}, {plan.why}.",
            f"  {how}",
            f"  goodput {lost.useful:.2%} (stall {lost.stall:.2%}, repeated {lost.rework:.2%}, down {lost.down:.2%}), "
            f"{_points(lost.useful - base.goodput.useful)} than {base.goodput.useful:.2%} ({base.name})",
            f"  {planned.falls_per_s * plan.job.run_s:.2g} losses in a run that memory does not survive",
        ]
    return "\n".join([*lines, *(f"  note: {note}" for note in plan.notes)])


def _simulated_text(request: Request, plan: CostPlan, simulated: Sequence[Simulated]) -> str:
    first = simulated[0]
    head = [f"{first.runs} simulated runs of {plan.job.run_s / 86400:,.4g} days:"]
    if request.record:
        record = request.record
        head = [
            f"{record.name}: {record.source}.",
            f"{record.interruptions} of them, {record.node_loss_share:.0%} by our reading with the loss of a node; "
            f"{record.reported}.",
            head[0],
        ]
    rows = [("", "goodput", "9 of 10 runs", "by formula", "interruptions", "nodes lost", "falls to storage")]
    formula = {planned.name: planned.goodput.useful for planned in plan.schemes}
    rows += [
        (
            f"{'with refound' if at == 0 and plan.recommended else 'without'}: {each.scheme}",
            f"{each.goodput.useful:.2%}",
            f"{each.goodput_p5:.2%} to {each.goodput_p95:.2%}",
            f"{formula[each.scheme]:.2%}",
            f"{each.interruptions:.1f}",
            f"{each.node_losses:.1f}",
            f"{each.falls:.2f}" if at == 0 and plan.recommended else "-",
        )
        for at, each in enumerate(simulated)
    ]
    return "\n".join([*head, *(f"  {line}" for line in columns(rows))])


def _check_text(comparisons: Sequence[Comparison]) -> str:
    bad = [each for each in comparisons if not each.agrees]
    if not bad:
        return f"Checked: {len(comparisons)} figures agree with random draws within what chance explains."
    rows = [("code", "figure", "by formula", "drawn", "chance explains")]
    rows += [
        (each.scheme, each.what, f"{each.expected:.6g}", f"{each.drawn:.6g}", f"{each.allowed:.2g}") for each in bad
    ]
    return "\n".join(
        [
            f"Checked: {len(bad)} of {len(comparisons)} figures DISAGREE with random draws:",
            *(f"  {line}" for line in columns(rows)),
        ]
    )


def _points(difference: float) -> str:
    return f"{abs(difference) * 100:.2f} points {'more' if difference >= 0 else 'less'}"


def _size(count: float) -> str:
    """Decimal units, as the options are."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def _chance(probability: float) -> str:
    """A probability whose distance from 1 can be seen: '99.9996%'."""
    if probability == 1 or probability < 0.999:
        return f"{probability:.1%}" if probability != 1 else "100%"
    missing = 1 - probability
    digits = min(12, 1 - math.floor(math.log10(missing)) - 2)
    return f"{100 * probability:.{digits}f}%"
