# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what followed the last few tokens when they came before is guessed to follow again. Costs nothing."""

from collections.abc import Sequence

import torch

from .cached import CachedModel
from .decode import Proposal
from .decode_tree import chain


class LookupDraft:
    """Guesses up to `length` tokens, by the longest of the last `ngram` tokens or fewer that came before; of several
    places the latest."""

    def __init__(self, *, ngram: int = 3, length: int = 8) -> None:
        self._ngram, self._length = ngram, length
        self._seen: list[dict[tuple[int, ...], int]] = []
        self._read = 0

    def start(self, model: CachedModel, prompt: Sequence[int]) -> None:
        self._seen, self._read = [{} for _ in range(self._ngram)], 0

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        # where a run of tokens ends, once something follows it
        for end in range(max(self._read, 1), len(tokens)):
            for size in range(1, min(self._ngram, end) + 1):
                self._seen[size - 1][tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        for size in range(min(self._ngram, len(tokens)), 0, -1):
            at = self._seen[size - 1].get(tuple(tokens[-size:]))
            if at is not None:
                return Proposal(tree=chain([tokens[-1], *tokens[at : at + min(self._length, room - 1)]]))
        return Proposal(tree=chain(tokens[-1:]))

    def settle(self, accepted: int, path: Sequence[int]) -> None: ...
