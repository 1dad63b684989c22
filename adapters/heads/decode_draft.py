# SPDX-License-Identifier: Apache-2.0
"""A small model guesses: one token after the other, or a tree that follows its doubts (DySpec, arXiv:2410.11744)."""

import heapq
from collections.abc import Sequence

import torch

from .cached import CachedModel
from .decode import Proposal, pick
from .decode_tree import Tree, chain
from .errors import HeadsMismatchError


class _Draft:
    """A draft model that keeps up with what is known."""

    def __init__(self, draft: CachedModel) -> None:
        self._draft = draft
        self._known: Sequence[int] = ()

    def start(self, model: CachedModel, prompt: Sequence[int]) -> None:
        """Raises HeadsMismatchError if the two have not the same vocabulary."""
        sizes = [one.model.lm_head.weight.shape[0] for one in (model, self._draft)]
        if sizes[0] != sizes[1]:
            raise HeadsMismatchError(
                f"the draft's vocabulary has {sizes[1]} tokens and the model's {sizes[0]}: their tokenizers differ, "
                "and the draft's guesses mean nothing to the model. Train one for it: refound heads MODEL --kind draft"
            )
        self._draft.reset()

    def _depth_of(self, tokens: Sequence[int], room: int) -> int:
        """Guesses in a row that are wanted, and that the draft has positions for: it reads all of them but the last."""
        return min(room - 1, self._draft.limit - len(tokens) + 1)

    def _catch_up(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads what is new, all but the last token to be kept; the logits (vocabulary,) after the last, which is the
        pending node 0."""
        draft = self._draft
        draft.cut(len(tokens) - 1)
        missing = list(tokens[draft.length :])
        states = draft.run(missing, range(-1, len(missing) - 1))
        if len(missing) > 1:
            draft.keep(range(len(missing)))
            draft.cut(len(tokens) - 1)
            places = draft.grow([-1])  # its keys and values are in their place already
            assert places.stop == len(tokens)
        return draft.logits(states[-1])

    def settle(self, accepted: int, path: Sequence[int]) -> None: ...


class ModelDraft(_Draft):
    """A chain of up to `length` guesses; it ends at the first that is less likely than `confidence`, by the draft."""

    def __init__(self, draft: CachedModel, *, length: int = 4, confidence: float = 0.0) -> None:
        super().__init__(draft)
        self._length, self._confidence, self._accepted = length, confidence, 0

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        guesses, most = [tokens[-1]], min(self._length, self._depth_of(tokens, room))
        if most < 1:
            return Proposal(tree=chain(guesses))
        logits = self._catch_up(tokens)
        while True:
            guess = int(pick(logits))
            likely = self._confidence <= 0 or float(logits.softmax(-1)[guess]) >= self._confidence
            if not likely:
                break
            guesses.append(guess)
            if len(guesses) > most:
                break
            logits = self._draft.logits(self._draft.run([guess], [self._draft.pending - 1])[-1])
        return Proposal(tree=chain(guesses))

    def settle(self, accepted: int, path: Sequence[int]) -> None:
        # of the pending ones, those that were right are known now; the last guess was never read
        self._draft.keep(range(min(accepted + 1, self._draft.pending)))


class DynamicTreeDraft(_Draft):
    """DySpec's tree, for greedy checking: of all continuations the `budget` that the draft finds likeliest, which is
    the tree that is expected to be accepted furthest if the draft's probabilities are right.

    The draft reads a whole layer of the tree in one pass, as in DySpec's threshold construction: only nodes at least as
    likely as `threshold` are read. No node is likelier than its parent, so the likeliest `budget` form a tree.
    """

    def __init__(
        self, draft: CachedModel, *, budget: int = 12, depth: int = 4, threshold: float = 0.05, width: int = 4
    ) -> None:
        super().__init__(draft)
        self._budget, self._depth, self._threshold, self._width = budget, depth, threshold, width
        self._read: list[int] = []
        self.expected = 1.0
        """Tokens that the last tree was expected to bring, the model's own included."""

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        depth = min(self._depth, self._depth_of(tokens, room))
        if depth < 1:
            self._read = []
            return Proposal(tree=chain(tokens[-1:]))
        logits = self._catch_up(tokens)[None]
        # grown: token, parent and likelihood of nodes that the draft has read; the root is the first of them
        grown: list[tuple[int, int, float]] = [(tokens[-1], -1, 1.0)]
        leaves: list[tuple[int, int, float]] = []
        layer = [0]
        for level in range(depth):
            found = [
                (token, parent, grown[parent][2] * share)
                for parent, row in zip(layer, logits.softmax(-1), strict=True)
                for share, token in zip(*(part.tolist() for part in row.topk(self._width)), strict=True)
            ]
            found = heapq.nlargest(self._budget, found, key=lambda one: one[2])
            read = [one for one in found if one[2] >= self._threshold] if level + 1 < depth else []
            leaves += [one for one in found if one not in read]
            if not read:
                break
            layer = list(range(len(grown), len(grown) + len(read)))
            grown += read
            states = self._draft.run([one[0] for one in read], [one[1] for one in read])
            logits = self._draft.logits(states)
        return Proposal(tree=self._cut(grown, leaves))

    def _cut(self, grown: list[tuple[int, int, float]], leaves: list[tuple[int, int, float]]) -> Tree:
        """The likeliest `budget` of all, parents before children."""
        nodes = [*grown, *leaves]
        order = sorted(range(1, len(nodes)), key=lambda node: (-nodes[node][2], node))[: self._budget]
        place = {0: 0} | {node: index for index, node in enumerate(sorted(order), start=1)}
        self.expected = 1.0 + sum(nodes[node][2] for node in order)
        kept = sorted(place, key=place.__getitem__)
        self._read = [node for node in kept if node < len(grown)]
        return Tree(
            tokens=tuple(nodes[node][0] for node in kept),
            parents=(-1, *(place[nodes[node][1]] for node in kept[1:])),
        )

    def settle(self, accepted: int, path: Sequence[int]) -> None:
        # nodes that the draft has read come first in the tree, so a path begins with those of them it has
        self._draft.keep([self._read[node] for node in path if node < len(self._read)])
