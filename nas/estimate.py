# SPDX-License-Identifier: Apache-2.0
"""What a search would take: jobs, hours and bytes, before any is done. Only a matrix product is timed."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..export.atomic import size_text
from ..text import columns, duration_text
from .blocks import parameters
from .costs import distinct_blocks
from .library import replacements, trained
from .space import SearchSpace, count_pairs
from .teacher import Teacher

_EFFICIENCY = 0.5
"""Of a whole model, against one large matrix product."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    jobs: int
    done: int
    hours: float
    """For what is not done."""
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    teacher: str
    stages: tuple[Stage, ...]
    options: int
    excluded: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "teacher": self.teacher,
            "options": self.options,
            "excluded": list(self.excluded),
            "stages": [stage.to_json() for stage in self.stages],
            "jobs": sum(stage.jobs for stage in self.stages),
            "hours": sum(stage.hours for stage in self.stages),
            "bytes": sum(stage.bytes for stage in self.stages),
        }

    def to_text(self) -> str:
        rows = [("stage", "jobs", "done", "time left", "on disk")]
        rows += [
            (stage.name, str(stage.jobs), str(stage.done), duration_text(stage.hours * 3600), size_text(stage.bytes))
            for stage in self.stages
        ]
        total = self.to_json()
        left = duration_text(total["hours"] * 3600)
        rows.append(("all", str(total["jobs"]), "", left, size_text(total["bytes"])))
        lines = [self.teacher, f"{self.options} options in all layers together", *columns(rows)]
        lines += [f"left out: {reason}" for reason in self.excluded]
        return "\n".join([*lines, "nothing was done (--dry-run); times are rough, from the speed of a matrix product"])


def estimate(teacher: Teacher, space: SearchSpace, done: dict[str, int], counts: dict[str, int]) -> Estimate:
    """counts, done: jobs of each stage, and those that are done already."""
    recipe, decoder = teacher.recipe, teacher.source.decoder
    rate = _flops() * _EFFICIENCY
    bits = torch.empty(0, dtype=teacher.dtype).element_size()
    scored = len(list(replacements(space)))
    layers = len(decoder.layers)
    head = decoder.vocab_size * decoder.hidden_size
    inner = decoder.parameters - head * (1 if decoder.tied else 2)
    train, score = recipe.text.train, recipe.text.score
    widest = max((layer.ffn.width for layer in decoder.layers), default=0)
    sizes = [parameters(decoder, block) for _, _, block in trained(space)]
    gram = layers * (2 * train * widest**2 + 9 * widest**3)  # products, an inverse and its updates in float64
    steps = 6 * recipe.library.steps * min(recipe.library.batch * recipe.text.length, train) * sum(sizes)
    one_score = 2 * score * (inner / 2 + head)
    timed = sum(workload.batch * workload.prompt for workload in recipe.costs.workloads)
    work = {
        "activations": (2 * train * inner, train * decoder.hidden_size * layers * 2),
        "library": (gram + steps + 8 * train * inner, sum(sizes) * bits),
        "scores": (one_score * scored, 500 * scored),
        "costs": (2 * 2 * (recipe.costs.repeats + 1) * timed * inner * len(distinct_blocks(space)), 0),
        "probes": (one_score * recipe.score.probes, 0),
        "children": (
            recipe.solver.pool * recipe.solver.rounds * 2 * score * (inner + head),
            recipe.children * decoder.parameters * bits,
        ),
        "distillation": (
            8 * recipe.distill.tokens * (inner + head),
            decoder.parameters * bits if recipe.distill.tokens else 0,
        ),
    }
    stages = tuple(
        Stage(
            name=name,
            jobs=counts.get(name, 0),
            done=done.get(name, 0),
            hours=flops / rate / 3600 * (1 - done.get(name, 0) / max(counts.get(name, 0), 1)),
            bytes=int(size_bytes),
        )
        for name, (flops, size_bytes) in work.items()
    )
    return Estimate(teacher=str(decoder), stages=stages, options=count_pairs(space), excluded=space.excluded)


def _flops() -> float:
    """Of a product of two matrices of 1024 x 1024 in float32, in operations a second."""
    one = torch.ones(1024, 1024)
    torch.mm(one, one)
    began = time.perf_counter()
    for _ in range(5):
        torch.mm(one, one)
    return 5 * 2 * 1024**3 / (time.perf_counter() - began)
