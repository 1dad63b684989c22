# SPDX-License-Identifier: Apache-2.0
"""Experts of channels that work for the same tokens, by balanced clustering.

What a token loses when it takes k experts is, up to cross terms, the energy Σ ‖W_d[:, i] h_i‖² of the channels that it
does not take. Two steps make the energy that is kept larger, each the best there is given the other, until neither
does: every token takes the k experts that hold most of its energy, and channels are dealt out anew, to the experts
whose tokens they work for, by an exact transportation problem (`flow`). After a few rounds tokens take what a linear
gate would choose for them, since that is what serves: channels then gather where a gate can find them.

Seeds and first clusters follow CMoE (2502.04416), which does one round of k-means on the binary marks of the most
active channels, with an n x n assignment.
"""

import numpy as np
import torch

from .config import Shape
from .evidence import LayerEvidence
from .flow import balanced_assignment
from .splits import LayerSplit, Needs, made_of

_ROUNDS = 6
"""With the oracle's choice; as many again with a gate's."""
_RIDGE = 1e-2


class CoactivationSplit:
    """Shared are the channels with the most energy."""

    needs: Needs = "activations"

    def problems(self, shape: Shape, domains: int) -> list[str]:
        return []

    def split(self, shape: Shape, seen: LayerEvidence | None, draw: np.random.Generator) -> LayerSplit:
        assert seen is not None
        energy = seen.energy[seen.fit]
        order = energy.mean(0).argsort(descending=True, stable=True)
        shared, rest = order[: shape.shared], order[shape.shared :]
        profiles = energy[:, rest]
        found = first_clusters(profiles, shape.experts)
        sizes = [shape.expert_width] * shape.experts
        for chooser in (None, _Gate(seen.inputs[seen.fit])):
            found = _improve(profiles, found, sizes, shape.top_k, chooser)
        return made_of(found, shape.experts, rest.numpy(), shared.numpy())


def first_clusters(profiles: torch.Tensor, groups: int) -> np.ndarray:
    """Balanced clusters of columns around the first `groups` of them: (columns,) group numbers.

    profiles: (T, columns), columns in descending order of importance.
    """
    unit = profiles.sqrt()
    unit = unit / unit.norm(dim=0).clamp_min(1e-12)
    nearness = unit.T @ unit[:, :groups]
    return balanced_assignment(-nearness.numpy(), [profiles.shape[1] // groups] * groups)


class _Gate:
    """The choice of a linear gate that is fitted to the experts' energies by ridge regression."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self._inputs = inputs
        gram = (inputs.T @ inputs).double()
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self._factor = torch.linalg.cholesky(gram)

    def __call__(self, held: torch.Tensor) -> torch.Tensor:
        centred = held - held.mean(1, keepdim=True)
        weight = torch.cholesky_solve((self._inputs.T @ centred).double(), self._factor)
        return self._inputs @ weight.float()


def _improve(profiles: torch.Tensor, start: np.ndarray, sizes: list[int], top_k: int, gate: _Gate | None) -> np.ndarray:
    """Rounds of both steps, as long as more energy is kept; the best is returned."""
    best, most, found = start, -1.0, start
    for _ in range(_ROUNDS):
        member = torch.zeros(len(found), len(sizes))
        member[torch.arange(len(found)), torch.from_numpy(found)] = 1.0
        held = profiles @ member
        chosen = (held if gate is None else gate(held)).topk(top_k, dim=1).indices
        taken = torch.zeros_like(held).scatter_(1, chosen, 1.0)
        kept = (held * taken).sum().item()
        if kept <= most * (1 + 1e-5):
            break
        best, most = found, kept
        found = balanced_assignment(-(profiles.T @ taken).numpy(), sizes)
    return best
