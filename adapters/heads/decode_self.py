# SPDX-License-Identifier: Apache-2.0
"""Self-speculative decoding: the first layers of the model guess, the others check (LayerSkip, arXiv:2404.16710).

Keys, values and the residual stream of the first layers are those that the check needs, so it runs the others only.
"""

from collections.abc import Callable, Sequence

import torch

from .cached import CachedModel
from .decode import Proposal, pick
from .decode_tree import chain
from .errors import HeadsUsageError
from .gates import Gate, State

ExitHead = Callable[[torch.Tensor], torch.Tensor]
"""(positions, hidden) of the residual stream to (positions, hidden) that the model's output matrix turns to logits."""


class SelfDraft:
    """Guesses up to `length` tokens with the layers below `layer`, and ends at one less likely than `confidence`, or
    that `gate` finds less likely to be right than `threshold`.

    head: what takes the place of the model's last norm; None: that norm. A gate that remembers begins where the prompt
    ends.

    Raises:
        HeadsUsageError: at the start, if the model has no such layer.
    """

    def __init__(
        self,
        layer: int,
        *,
        length: int = 4,
        head: ExitHead | None = None,
        confidence: float = 0.0,
        gate: Gate | None = None,
        threshold: float = 0.0,
    ) -> None:
        self._layer, self._length, self._head, self._confidence = layer, length, head, confidence
        self._gate, self._threshold = gate, threshold
        self._model: CachedModel | None = None
        self._states: list[State] = []
        """Of the gate: before the root, and after each token since."""

    def start(self, model: CachedModel, prompt: Sequence[int]) -> None:
        if not 0 < self._layer < len(model.layers):
            raise HeadsUsageError(
                f"the model has {len(model.layers)} layers: an exit can be after 1 to {len(model.layers) - 1} of them, "
                f"not {self._layer}"
            )
        self._model, self._states = model, [None]

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        model = self._model
        assert model is not None
        guesses, hidden = [tokens[-1]], []
        while True:
            places = model.grow([model.pending - 1])
            hidden.append(model.through(model.embed(guesses[-1:]), places, 0, self._layer))
            if len(guesses) > min(self._length, room - 1):
                break
            found = (self._head or model.norm)(hidden[-1])
            logits = model.logits(found)[0]
            guess = int(pick(logits))
            if self._confidence > 0 and float(logits.softmax(-1)[guess]) < self._confidence:
                break
            if self._gate is not None:
                score, after = self._gate(found[None], self._states[-1])
                self._states.append(after)
                if float(score.sigmoid()) < self._threshold:
                    break
            guesses.append(guess)
        return Proposal(tree=chain(guesses), hidden=torch.cat(hidden), layer=self._layer)

    def settle(self, accepted: int, path: Sequence[int]) -> None:
        # what was guessed wrong is not remembered; the last guess of all was not shown to the gate
        self._states = [self._states[min(accepted + 1, len(self._states) - 1)]]
