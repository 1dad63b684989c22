# SPDX-License-Identifier: Apache-2.0
"""A reference scheduler for a model with a pre-gating sidecar: which requests run together, and what they will need.

Experts of all layers are known for every queued token, so a batch can be made of requests that want the same experts,
and each layer's experts can be fetched before it runs (Read-ME 2410.19123, expert-aware batching). The oldest request
is always in the next batch: nothing waits for ever.
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from .errors import CarveUsageError
from .pregate import PreGate


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests that run together."""

    requests: tuple[int, ...]
    """Their numbers, in the order in which they came."""
    experts: tuple[frozenset[int], ...]
    """By layer with experts, all that their tokens take: what is fetched before that layer runs."""

    @property
    def unique(self) -> float:
        """Experts a layer, on average: what a batch costs in memory traffic."""
        return sum(map(len, self.experts)) / len(self.experts)


@dataclass(frozen=True)
class _Request:
    number: int
    needs: tuple[frozenset[int], ...] = field(hash=False)


class Scheduler:
    """A queue of requests. `submit` them as they come, take `next_batch` until it is None."""

    def __init__(self, pregate: PreGate, *, batch: int) -> None:
        """batch: requests that run together at most. Raises CarveUsageError if it is less than 1."""
        if batch < 1:
            raise CarveUsageError(f"batch is {batch}; it must be at least 1")
        self._pregate, self._batch = pregate, batch
        self._queue: deque[_Request] = deque()
        self._submitted = 0

    def submit(self, tokens: list[int]) -> int:
        """Queue a request for these tokens (its prompt, or the one that is to follow); returns its number.

        Raises:
            CarveUsageError: if there are none, or one is outside of the vocabulary.
        """
        shape = self._pregate.shape
        if not tokens or not all(0 <= token < shape.vocab_size for token in tokens):
            raise CarveUsageError(f"a request needs tokens from 0 to {shape.vocab_size - 1}")
        with torch.no_grad():
            chosen = self._pregate.choice(torch.tensor([tokens]))[0]
        needs = tuple(frozenset(chosen[:, layer].flatten().tolist()) for layer in range(shape.layers))
        self._queue.append(_Request(self._submitted, needs))
        self._submitted += 1
        return self._submitted - 1

    def next_batch(self) -> Batch | None:
        """The oldest request, and with it those that add the fewest experts, the older first among equals."""
        if not self._queue:
            return None
        taken = [self._queue.popleft()]
        needs = [set(layer) for layer in taken[0].needs]
        while self._queue and len(taken) < self._batch:
            best = min(self._queue, key=lambda request: _added(request, needs))
            self._queue.remove(best)
            taken.append(best)
            for layer, more in zip(needs, best.needs, strict=True):
                layer |= more
        numbers = sorted(request.number for request in taken)
        return Batch(requests=tuple(numbers), experts=tuple(map(frozenset, needs)))


def _added(request: _Request, needs: list[set[int]]) -> int:
    return sum(len(more - layer) for more, layer in zip(request.needs, needs, strict=True))
