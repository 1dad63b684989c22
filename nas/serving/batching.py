# SPDX-License-Identifier: Apache-2.0
"""Batches of tokens that share experts, made from a queue whose routing is known (Read-ME 2410.19123, section 4).

Sequences decode token by token, so of each open one only the next token can go into a batch. In arrival order the
batch is whoever has waited longest. Expert-aware, the first is still that one, and each further one is the token that
adds the fewest experts to what the batch needs already, over all layers; who has waited `patience` steps goes first.
What a step reads from memory is its *unique experts*: those that any of its tokens needs, counted once a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How batches are made. Counts are of sequences, each of which gives one token to a batch."""

    batch: int = 8
    active: int = 32
    """Sequences that are open at a time."""
    patience: int = 8
    """Steps that a sequence waits at most before its turn comes first."""

    def __post_init__(self) -> None:
        if min(self.batch, self.active, self.patience) < 1:
            raise PlanError(
                f"a batch of {self.batch}, {self.active} open and a patience of {self.patience}: at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What batches need."""

    unique: float
    """Unique experts of a batch and layer, on average."""
    per_token: float
    """Unique experts by tokens: of a layer, what each token's share of the reading is."""
    longest_wait: int
    """Steps between two tokens of one sequence, at most."""

    def to_json(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.__dict__.items()}


def batches_of(
    experts: np.ndarray, starts: np.ndarray, count: int, how: Batching, *, expert_aware: bool
) -> list[np.ndarray]:
    """Tokens of each step, as indices: every token once, those of a sequence in their order.

    experts: (layers, tokens, top_k). starts: (sequences + 1,), where each begins. count: experts of a layer.
    """
    waiting = [index for index in range(len(starts) - 1) if starts[index + 1] > starts[index]]
    waiting.reverse()
    at = {index: int(starts[index]) for index in waiting}
    queue: list[int] = []  # the open sequences, who has waited longest first
    since: dict[int, int] = {}
    batches = []
    while queue or waiting:
        while waiting and len(queue) < how.active:
            queue.append(waiting.pop())
            since[queue[-1]] = len(batches)
        if expert_aware:
            overdue = sum(len(batches) - since[index] >= how.patience for index in queue)
            chosen = _greedy(experts, [at[index] for index in queue], count, how.batch, max(overdue, 1))
            taken = [queue[place] for place in chosen]
        else:
            taken = queue[: how.batch]
        batches.append(np.array([at[index] for index in taken]))
        members = set(taken)
        queue = [index for index in queue if index not in members]
        for index in taken:
            at[index] += 1
            if at[index] < starts[index + 1]:
                queue.append(index)
                since[index] = len(batches)
    return batches


def _greedy(experts: np.ndarray, tokens: Sequence[int], count: int, size: int, forced: int) -> list[int]:
    """Places in `tokens`: the first `forced`, then again and again the one that adds the fewest experts."""
    if len(tokens) <= size:
        return list(range(len(tokens)))
    layers = experts.shape[0]
    needs = np.zeros((len(tokens), layers, count), np.float32)
    chosen = experts[:, np.asarray(tokens), :].astype(np.int64)  # (layers, queue, top_k)
    needs[np.arange(len(tokens))[None, :, None], np.arange(layers)[:, None, None], chosen] = 1.0
    needs = needs.reshape(len(tokens), -1)
    places = list(range(min(forced, size)))
    absent = 1.0 - needs[places].max(0)
    adds = needs @ absent
    adds[places] = np.inf
    while len(places) < size:
        place = int(adds.argmin())  # of equal ones who has waited longest
        places.append(place)
        fresh = needs[place] * absent
        adds -= needs @ fresh
        absent -= fresh
        adds[place] = np.inf
    return places


def known_from(starts: np.ndarray, batches: Sequence[np.ndarray], how: Batching) -> np.ndarray:
    """The step from which each token's id is known, (tokens,) int64: that after the token before it was made.

    A sequence's first token is known when the sequence is opened. batches: all of `batches_of`.
    """
    at = np.empty(int(starts[-1]), np.int64)
    for step, batch in enumerate(batches):
        at[batch] = step
    found = np.concatenate([[0], at[:-1] + 1])
    first, ends = starts[:-1], np.sort(at[starts[1:] - 1]) + 1
    found[first[: how.active]] = 0
    found[first[how.active :]] = ends[: max(len(first) - how.active, 0)]
    return found


def shared_of(experts: np.ndarray, starts: np.ndarray, batches: Sequence[np.ndarray]) -> Shared:
    layers, tokens, _ = experts.shape
    unique = sum(len(np.unique(layer[batch])) for batch in batches for layer in experts)
    at = np.empty(tokens, np.int64)
    for step, batch in enumerate(batches):
        at[batch] = step
    waits = [np.diff(at[first:last]).max(initial=0) for first, last in pairwise(starts)]
    return Shared(
        unique=unique / (len(batches) * layers),
        per_token=unique / (tokens * layers),
        longest_wait=int(max(waits, default=0)),
    )
