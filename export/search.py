# SPDX-License-Identifier: Apache-2.0
"""Find the fastest settings of an engine with few runs, guided by a small model of all runs so far.

The model says that the logarithm of the speed is a sum of one effect for each setting's value, fitted by least squares
with a weak pull to zero; runs with models of other sizes count less. A value that no run had is tried once. Then each
step measures what is expected to be best of what is left, until that is no gain any more, or `most` runs are done.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Settings = Mapping[str, Any]
_PULL = 0.01
_GAIN = 1.01
"""What is predicted must be so much faster than the best run to be worth a run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured run."""

    settings: Settings
    speed: float
    """Tokens a second, or anything that is better when larger."""
    weight: float = 1.0


def search(
    space: Mapping[str, Sequence[Any]],
    start: Settings,
    measure: Callable[[Settings], float],
    *,
    history: Sequence[Run] = (),
    most: int = 12,
) -> Iterator[Run]:
    """Measure settings from `space`, `start` first, and give each run. Nothing is measured twice.

    space: the values that each setting may have. history: runs of other models, with weights below 1.
    """
    runs: list[Run] = []
    settings: Settings | None = dict(start)
    while settings is not None and len(runs) < most:
        runs.append(Run(settings=settings, speed=measure(settings)))
        yield runs[-1]
        settings = _next(space, runs, history)


def _next(space: Mapping[str, Sequence[Any]], runs: Sequence[Run], history: Sequence[Run]) -> Settings | None:
    done = [run.settings for run in runs]
    best = max(runs, key=lambda run: run.speed)
    # Of a value that no run had the model knows nothing: one run each, with all else as in the best.
    for name, values in space.items():
        known = {run.settings.get(name) for run in (*runs, *history)}
        for value in values:
            if value not in known:
                return {**best.settings, name: value}
    expected = _fit(space, [*runs, *history])
    everything = (dict(zip(space, values, strict=True)) for values in itertools.product(*space.values()))
    left = [settings for settings in everything if settings not in done]
    chosen = max(left, key=expected, default=None)
    if chosen is None or expected(chosen) <= expected(best.settings) + math.log(_GAIN):
        return None
    return chosen


def _fit(space: Mapping[str, Sequence[Any]], runs: Sequence[Run]) -> Callable[[Settings], float]:
    """Settings → the logarithm of the speed that the runs let one expect."""
    columns = {(name, value): 1 + i for i, (name, value) in enumerate((n, v) for n in space for v in space[n])}

    def features(settings: Settings) -> "np.ndarray[Any, Any]":
        row = np.zeros(1 + len(columns))
        row[0] = 1.0
        for name in space:
            if (column := columns.get((name, settings.get(name)))) is not None:
                row[column] = 1.0
        return row

    # Other models have other speeds: only how settings differ within a model says something about this one.
    groups: dict[float, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.weight, []).append(run)
    rows, targets, weights = [], [], []
    level = float(np.mean([math.log(run.speed) for run in groups.get(1.0, runs)]))
    for group in groups.values():
        mean = float(np.mean([math.log(run.speed) for run in group]))
        for run in group:
            rows.append(features(run.settings))
            targets.append(math.log(run.speed) - mean)
            weights.append(run.weight)
    matrix, root = np.array(rows), np.sqrt(np.array(weights))[:, None]
    normal = (matrix * root).T @ (matrix * root) + _PULL * np.eye(matrix.shape[1])
    effects = np.linalg.solve(normal, (matrix * root).T @ (np.array(targets)[:, None] * root))[:, 0]
    return lambda settings: level + float(features(settings) @ effects)
