# SPDX-License-Identifier: Apache-2.0
"""From scores and costs to the programme that is solved, and from a choice back to a child."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..export.architecture import Attention, Decoder, Layer
from .blocks import parameters, part_of
from .budget import Limit, parse_limits, row_limit
from .compose import Composition
from .costs import CostTable, active_parameters, cache_bytes, kind_parameters, weight_bytes
from .formats import Block
from .recipe import Recipe, Workload
from .solver import Choice, Problem, Row
from .space import SearchSpace, name_of

Key = tuple[int, str, str]
"""(layer, part, name of the block)"""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One row and what it is counted from."""

    limit: Limit
    fixed: float
    """Of what no layer decides: embedding, head, and for times the base model."""
    allowed: float
    """What the child as a whole may have, in parameters, bytes or seconds."""
    teacher: float

    @property
    def name(self) -> str:
        return self.limit.name


class Programme:
    """Everything that is known of the options; problems for any composition are made from it."""

    def __init__(
        self, teacher: Decoder, space: SearchSpace, recipe: Recipe, scores: Mapping[Key, float], table: CostTable
    ) -> None:
        """scores: of single replacements; what is missing is infeasible."""
        self.teacher, self.space, self.recipe, self.table = teacher, space, recipe, table
        self._scores = scores
        self._workloads = {workload.name: workload for workload in recipe.costs.workloads}
        blocks = sum(self._parameters(layer) for layer in teacher.layers)
        self._fixed_parameters = teacher.parameters - blocks
        limits = parse_limits(recipe.budget, list(self._workloads))
        self._costs = [tuple(self._layer_costs(limit, index) for index in range(len(space.layers))) for limit in limits]
        self.budgets = [self._budget(limit, costs) for limit, costs in zip(limits, self._costs, strict=True)]

    def problem(self, composition: Composition) -> Problem:
        rows = tuple(
            Row(name=budget.name, costs=costs, limit=budget.allowed - budget.fixed)
            for budget, costs in zip(self.budgets, self._costs, strict=True)
        )
        scores = tuple(self._layer_scores(index, composition) for index in range(len(self.space.layers)))
        return Problem(scores=scores, rows=rows, kinds=tuple(layer.kinds for layer in self.space.layers))

    def singles(self, choice: Choice) -> list[tuple[float, float]]:
        """The scores of attention and FFN by themselves, for each layer of a choice."""
        found = []
        for index, (layer, option) in enumerate(zip(self.space.layers, choice, strict=True)):
            one, other = layer.pairs[option]
            found.append((self.single(index, layer.attention[one]), self.single(index, layer.ffn[other])))
        return found

    def single(self, layer: int, block: Block) -> float:
        """The score of one replacement; 0 for the teacher's own, infinite for what failed."""
        own = self.teacher.layers[layer]
        if block in (own.attention, own.ffn):
            return 0.0
        found = self._scores.get((layer, part_of(block), name_of(block)))
        return float("inf") if found is None else max(found, 0.0)

    def child(self, choice: Choice) -> Decoder:
        pairs = tuple(layer.pairs[option] for layer, option in zip(self.space.layers, choice, strict=True))
        return self.space.child(self.teacher, pairs)

    def teacher_choice(self) -> Choice:
        return (0,) * len(self.space.layers)

    def totals(self, choice: Choice) -> dict[str, float]:
        """By budget: what the child as a whole has."""
        return {
            budget.name: budget.fixed + sum(float(layer[option]) for layer, option in zip(costs, choice, strict=True))
            for budget, costs in zip(self.budgets, self._costs, strict=True)
        }

    def _layer_scores(self, index: int, composition: Composition) -> np.ndarray:
        layer = self.space.layers[index]
        found = []
        for one, other in layer.pairs:
            single = (self.single(index, layer.attention[one]), self.single(index, layer.ffn[other]))
            timed = all(self.table.knows(block) for block in (layer.attention[one], layer.ffn[other]))
            found.append(composition.layer(*single) if timed and max(single) < float("inf") else float("inf"))
        return np.array(found)

    def _layer_costs(self, limit: Limit, index: int) -> np.ndarray:
        layer = self.space.layers[index]
        return np.array(
            [
                self._cost(limit, layer.attention[one])
                + self._cost(limit, layer.ffn[other])
                + self._kind_cost(limit, layer.attention[one], kind)
                for (one, other), kind in zip(layer.pairs, layer.kinds or ("",) * len(layer.pairs), strict=True)
            ]
        )

    def _kind_cost(self, limit: Limit, attention: Attention, kind: str) -> float:
        if limit.quantity not in ("parameters", "active", "memory"):
            return 0.0
        size = {"memory": self.recipe.costs.weight_bits / 8}.get(limit.quantity, 1.0)
        return kind_parameters(self.teacher, attention, kind) * size

    def _cost(self, limit: Limit, block: Block) -> float:
        if limit.quantity == "parameters":
            return float(parameters(self.teacher, block))
        if limit.quantity == "active":
            return float(active_parameters(self.teacher, block))
        workload, costs = self._workloads[limit.workload], self.recipe.costs
        if limit.quantity == "memory":
            return weight_bytes(self.teacher, block, costs.weight_bits) + cache_bytes(
                self.teacher, block, workload, costs.cache_bits
            )
        if not self.table.knows(block):
            return 0.0  # it may not be taken
        times = self.table.difference(block, limit.workload)
        return times.prefill_s if limit.quantity == "first_token" else times.latency_s(workload)

    def _parameters(self, layer: Layer) -> int:
        return sum(parameters(self.teacher, block) for block in (layer.attention, layer.ffn))

    def _budget(self, limit: Limit, costs: Sequence[np.ndarray]) -> Budget:
        workload = self._workloads.get(limit.workload)
        fixed = self._fixed(limit, workload)
        teacher = fixed + sum(float(layer[0]) for layer in costs)
        return Budget(limit=limit, fixed=fixed, allowed=row_limit(limit, teacher, workload), teacher=teacher)

    def _fixed(self, limit: Limit, workload: Workload | None) -> float:
        if limit.quantity in ("parameters", "active"):
            return float(self._fixed_parameters)
        if limit.quantity == "memory":
            return self._fixed_parameters * self.recipe.costs.weight_bits / 8
        assert workload is not None
        times = self.table.base_times[workload.name]
        return times.prefill_s if limit.quantity == "first_token" else times.latency_s(workload)
