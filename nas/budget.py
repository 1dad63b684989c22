# SPDX-License-Identifier: Apache-2.0
"""Limits as people write them: "70%" of the teacher's, "90M" parameters, "300 MB", "120 ms", "40 tok/s".

Every limit becomes one row of the programme: a sum over layers that may not exceed a number. A throughput of X tokens
a second of a workload is a latency of at most batch · new / X.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import RecipeError
from .recipe import Workload

Quantity = Literal["parameters", "active", "memory", "latency", "first_token", "throughput"]
QUANTITIES: dict[str, str] = {
    "parameters": "",
    "active": "",
    "memory": "B",
    "latency": "s",
    "first_token": "s",
    "throughput": "tok/s",
}
_SCALES = {
    "": {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9},
    "B": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6},
    "tok/s": {"tok/s": 1, "": 1},
}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit as it was written."""

    quantity: str
    workload: str
    """Empty for parameters."""
    value: float
    percent: bool
    """`value` is of the teacher's, in percent."""

    @property
    def name(self) -> str:
        return f"{self.quantity}.{self.workload}" if self.workload else self.quantity


def parse_limits(budget: Mapping[str, str], workloads: Sequence[str]) -> list[Limit]:
    """All limits.

    Raises:
        RecipeError: naming all that cannot be read.
    """
    limits, problems = [], []
    for name, text in budget.items():
        try:
            limits.append(_parse(name, text, workloads))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("; ".join(problems))
    return limits


def budget_problems(budget: Mapping[str, str], workloads: Sequence[str]) -> list[str]:
    try:
        parse_limits(budget, workloads)
    except RecipeError as error:
        return str(error).split("; ")
    return []


def _parse(name: str, text: str, workloads: Sequence[str]) -> Limit:
    quantity, _, workload = name.partition(".")
    if quantity not in QUANTITIES:
        near = difflib.get_close_matches(quantity, QUANTITIES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"budget.{name} is none of {', '.join(QUANTITIES)}{hint}")
    without = quantity in ("parameters", "active")  # active: those that a token takes
    if without and workload:
        raise RecipeError(f"budget.{name}: parameters are the same for every workload")
    if not without:
        if not workload and len(workloads) == 1:
            workload = workloads[0]
        if workload not in workloads:
            near = difflib.get_close_matches(workload, workloads, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"budget.{name} names no workload of {', '.join(workloads)}{hint}")
    matched = re.fullmatch(r"\s*([0-9][0-9_.]*(?:e[+-]?[0-9]+)?)\s*([a-zA-Z/%]*)\s*", text)
    unit = matched.group(2) if matched else ""
    scales = _SCALES[QUANTITIES[quantity]]
    if not matched or (unit != "%" and unit.lower() not in scales):
        units = ", ".join(key for key in scales if key)
        raise RecipeError(f"budget.{name} is {text!r}, and wants a number with %, or one of {units or 'no unit'}")
    try:
        value = float(matched.group(1))
    except ValueError as error:
        raise RecipeError(f"budget.{name} is {text!r}, which is no number") from error
    if not value > 0:
        raise RecipeError(f"budget.{name} is {text!r}, and must be positive")
    percent = unit == "%"
    return Limit(
        quantity=quantity, workload=workload, value=value if percent else value * scales[unit.lower()], percent=percent
    )


def row_limit(limit: Limit, teacher: float, workload: Workload | None) -> float:
    """What the row of this limit may sum up to, in parameters, bytes or seconds; `teacher` is the teacher's sum.

    A throughput limit is a row of latency: 150% of the teacher's throughput is 2/3 of its latency.
    """
    if limit.quantity == "throughput":
        if limit.percent:
            return teacher * 100 / limit.value
        assert workload is not None
        return workload.batch * workload.new / limit.value
    return teacher * limit.value / 100 if limit.percent else limit.value


def amount_text(quantity: str, value: float) -> str:
    """A row's sum as people read it."""
    if quantity in ("parameters", "active"):
        return f"{value / 1e6:.2f}M" if value >= 1e5 else f"{value:.0f}"
    if quantity == "memory":
        return f"{value / 1e6:.2f} MB"
    return f"{value * 1000:.2f} ms"
