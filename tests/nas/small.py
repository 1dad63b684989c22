# SPDX-License-Identifier: Apache-2.0
"""A tiny teacher and a recipe that is done in seconds, for the tests of the search."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from refound.distill.config import Training
from refound.nas.recipe import Costs, Library, Recipe, Score, Solver, Space, Text, Workload

from ..export.models import decoder, write_model

WORKLOAD = Workload(name="chat", batch=1, prompt=16, new=4)


def teacher(folder: Path, layers: int = 3, **changes: Any) -> Path:
    """A random Llama of 4 heads in 2 groups, FFN 96."""
    return write_model(folder, decoder(layers=layers, **changes))


def recipe(model: Path, out: Path, **changes: Any) -> Recipe:
    base = Recipe(
        teacher=str(model),
        out=str(out),
        text=Text(sources=("python-docs",), length=32, train=32 * 32, score=32 * 8, test=32 * 8),
        space=Space(ffn_percent=(75, 50, 25), multiple=8),
        library=Library(steps=2, batch=4),
        score=Score(probes=2),
        costs=Costs(workloads=(WORKLOAD,), repeats=1),
        budget={"parameters": "80%"},
        solver=Solver(pool=2, distance=1, rounds=2, points=4, seconds=20),
        distill=Training(tokens=0, length=32),
    )
    return replace(base, **changes)
