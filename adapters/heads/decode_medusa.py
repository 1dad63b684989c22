# SPDX-License-Identifier: Apache-2.0
"""Medusa's guesses (arXiv:2401.10774): each head says what comes so many places on, a tree joins what they say."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from ...export.medusa import MedusaHead, MedusaHeads
from .cached import CachedModel
from .decode import Proposal
from .decode_tree import Shape, chain
from .errors import HeadsMismatchError


def head_states(head: MedusaHead, state: torch.Tensor) -> torch.Tensor:
    """(…, hidden) after the last norm to (…, hidden) before the head's output matrix."""
    for layer, weight in enumerate(head.weights):
        bias = head.biases[layer] if head.biases else None
        state = state + functional.silu(functional.linear(state, weight, bias))
    return state


def head_logits(heads: MedusaHeads, state: torch.Tensor) -> torch.Tensor:
    """(positions, hidden) to (heads, positions, vocabulary)."""
    states = torch.stack([head_states(head, state) for head in heads.heads])
    if heads.shared_output is not None:
        return functional.linear(states, heads.shared_output)
    return torch.stack(
        [functional.linear(one, heads.output if head.output is None else head.output)
         for one, head in zip(states, heads.heads, strict=True)]
    )  # fmt: skip


class MedusaDraft:
    """Fills `shape` with the heads' likeliest tokens."""

    def __init__(self, heads: MedusaHeads, shape: Shape) -> None:
        self._heads, self._shape = heads, shape
        self._most = max(shape.ranks, default=-1) + 1

    def start(self, model: CachedModel, prompt: Sequence[int]) -> None:
        """Raises HeadsMismatchError if the heads are of a model of another size."""
        wanted = tuple(model.model.lm_head.weight.shape)
        if (found := tuple(self._heads.output.shape)) != wanted:
            raise HeadsMismatchError(
                f"these heads' output is {list(found)} and the model's {list(wanted)}: they were trained on another "
                "model. Train heads for this one: refound heads MODEL --kind medusa"
            )
        self._heads = self._heads.to(model.dtype)

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        if not self._most or room < 2:
            return Proposal(tree=chain(tokens[-1:]))
        best = head_logits(self._heads, state[None])[:, 0].topk(self._most, dim=-1).indices.tolist()
        return Proposal(tree=self._shape.fill(tokens[-1], best))

    def settle(self, accepted: int, path: Sequence[int]) -> None: ...
