# SPDX-License-Identifier: Apache-2.0
"""Experts by the kind of text that channels work for: activity in each domain, or gradients in clusters of windows."""

import numpy as np
import torch

from .config import Shape
from .evidence import LayerEvidence
from .flow import balanced_assignment
from .splits import LayerSplit, Needs, made_of


class DomainSplit:
    """The channels that each domain uses most; shared are those that all use (Read-ME 2410.19123).

    Read-ME's experts are the top half of the channels of each domain, less those that all have in common, and may
    overlap; here a channel that several domains want goes to the one that it works most for, so that all experts
    together are the dense FFN. A domain with several experts has its most used channels in the first.
    """

    needs: Needs = "activations"

    def problems(self, shape: Shape, domains: int) -> list[str]:
        if shape.experts % domains:
            return [f"{shape.experts} experts cannot be dealt out to {domains} texts; say a multiple of {domains}"]
        return []

    def split(self, shape: Shape, seen: LayerEvidence | None, draw: np.random.Generator) -> LayerSplit:
        assert seen is not None
        names = seen.domain[seen.fit].unique()
        channels, domain = seen.channels[seen.fit], seen.domain[seen.fit]
        use = torch.stack([channels[domain == name].abs().mean(0) for name in names])
        use = use / use.sum(1, keepdim=True).clamp_min(1e-30)
        shared, rest = common(use, shape)
        per_domain = shape.experts // len(names)
        wanted = use[:, rest]
        owner = balanced_assignment(-wanted.T.double().numpy(), [per_domain * shape.expert_width] * len(names))
        assigned = np.empty(len(rest), np.int64)
        for number in range(len(names)):
            mine = np.flatnonzero(owner == number)
            order = mine[np.argsort(-wanted[number, mine].numpy(), kind="stable")]
            assigned[order] = number * per_domain + np.arange(len(order)) // shape.expert_width
        return made_of(assigned, shape.experts, rest.numpy(), shared.numpy())


def common(use: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """(the channels that all domains have among their most used, the others). use: (domains, W).

    A channel counts by its worst rank over the domains: the first are in the intersection of all domains' tops.
    """
    rank = (-use).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    order = rank.max(0).values.argsort(stable=True)
    return order[: shape.shared], order[shape.shared :]


class GradientSplit:
    """Channels together whose gradients matter in the same windows (LLaMA-MoE 2406.16554: |feature · gradient|)."""

    needs: Needs = "gradients"

    def problems(self, shape: Shape, domains: int) -> list[str]:
        return []

    def split(self, shape: Shape, seen: LayerEvidence | None, draw: np.random.Generator) -> LayerSplit:
        assert seen is not None and seen.gradients is not None
        gradients = seen.gradients[seen.fit_windows]
        weight = gradients / gradients.sum(1, keepdim=True).clamp_min(1e-30)  # every window counts alike
        order = weight.mean(0).argsort(descending=True, stable=True)
        shared, rest = order[: shape.shared], order[shape.shared :]
        cluster = torch.from_numpy(_clusters(weight[:, rest], shape.experts))
        use = torch.stack([weight[cluster == number][:, rest].mean(0) for number in range(shape.experts)])
        assigned = balanced_assignment(-use.T.double().numpy(), [shape.expert_width] * shape.experts)
        return made_of(assigned, shape.experts, rest.numpy(), shared.numpy())


def _clusters(rows: torch.Tensor, groups: int, rounds: int = 4) -> np.ndarray:
    """Balanced k-means of windows; each of `groups` gets at least one. rows: (windows, channels)."""
    count = len(rows)
    unit = rows.sqrt()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
    sizes = [count // groups + (number < count % groups) for number in range(groups)]
    centres = unit[_far_apart(unit, groups)]
    found = np.zeros(count, np.int64)
    for _ in range(rounds):
        found = balanced_assignment(-(unit @ centres.T).double().numpy(), sizes)
        centres = torch.stack([unit[torch.from_numpy(found == number)].mean(0) for number in range(groups)])
    return found


def _far_apart(unit: torch.Tensor, groups: int) -> list[int]:
    """Rows to begin with: the first, then each that is least like all those before it."""
    found = [0]
    nearest = unit @ unit[0]
    while len(found) < groups:
        nearest[found] = float("inf")
        found.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[found[-1]])
    return found
