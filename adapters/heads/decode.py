# SPDX-License-Identifier: Apache-2.0
"""Reference decoding: a drafter guesses a tree of tokens, the model checks all of them in one pass.

Greedy decoding says the very tokens that the model says alone, whatever is guessed: a guess only saves a pass. With
`Typical` (Medusa's typical acceptance) it does not, and is not meant to.

What "the very tokens" means: logits are computed in passes of other shapes, and round otherwise. So what is taken is
not the token of the largest logit, but the lowest one within `tie_of(dtype)` of it, a share of the largest number among
them and about ten times what rounding does (SmolLM2-135M, float32: 5e-5 where logits reach 43, so a tie is 4e-4). Equal
logits are then decided alike by every pass. Only a token whose lead is that tie to within rounding could fall either
way. Float32 and float64; in half precision rounding is larger than many leads, and nothing is promised.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .cached import CachedModel
from .decode_tree import Tree, chain
from .errors import HeadsUsageError


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A tree to check. Its root is the last token that is known."""

    tree: Tree
    hidden: torch.Tensor | None = None
    """(nodes, hidden): the residual stream before `layer`, if the drafter has run the layers below it already; then its
    nodes are pending in the model's cache."""
    layer: int = 0


class Drafter(Protocol):
    """What guesses."""

    def start(self, model: CachedModel, prompt: Sequence[int]) -> None:
        """A new text; the model has read the prompt."""
        ...

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        """tokens: all that is known, the last one not yet in the model's cache. state: (hidden,), which said it.
        room: tokens that are still wanted. Guesses deeper than room - 1 are not checked; who puts its nodes into the
        model's cache makes none, as the model may have no position for them."""
        ...

    def settle(self, accepted: int, path: Sequence[int]) -> None:
        """`accepted` guesses were right: `path` are the nodes that were kept, the root first."""
        ...


class Acceptance(Protocol):
    """What is made of the logits."""

    def first(self, logits: torch.Tensor) -> int: ...

    def walk(self, tree: Tree, logits: torch.Tensor) -> tuple[list[int], int]:
        """(the nodes that are kept, the root first; the token that follows the last of them)."""
        ...


class Stopper(Protocol):
    """What ends a text before it is long enough."""

    def start(self, states: torch.Tensor) -> None:
        """A new text. states: (tokens, hidden) of the prompt's tokens but the last, which may be none."""
        ...

    def first(self, states: torch.Tensor) -> int | None:
        """states: (tokens, hidden) of the next tokens, which say what follows each. The first of them after which
        nothing more is worth saying; None: go on. Each token is shown once, up to the one that is named."""
        ...


_TIES = {torch.float32: 1e-5, torch.float64: 1e-13}


def tie_of(dtype: torch.dtype) -> float:
    """Logits that differ by less, as a share of the largest among them by absolute value, count as equal."""
    return _TIES.get(dtype, 0.0)


def pick(logits: torch.Tensor) -> torch.Tensor:
    """(…, vocabulary) to (…): of the tokens whose logits tie with the largest, the lowest."""
    tie = tie_of(logits.dtype) * logits.abs().amax(-1, keepdim=True)
    near = logits >= logits.amax(-1, keepdim=True) - tie
    return near.to(torch.uint8).argmax(-1)


class Greedy:
    """The likeliest token, always."""

    def first(self, logits: torch.Tensor) -> int:
        return int(pick(logits))

    def walk(self, tree: Tree, logits: torch.Tensor) -> tuple[list[int], int]:
        said, children, path = pick(logits).tolist(), tree.children(), [0]
        while True:
            wanted = said[path[-1]]
            right = next((node for node in children[path[-1]] if tree.tokens[node] == wanted), None)
            if right is None:
                return path, wanted
            path.append(right)


@dataclass(kw_only=True)
class Typical:
    """Medusa's typical acceptance (arXiv:2401.10774, section 2.3.1): a guess is right if the model finds it more
    likely than min(epsilon, delta * exp(-entropy)). The longest path that is right is kept, of several the likeliest.
    What follows is drawn from the tokens that pass the same test. Not the model's own distribution, by design."""

    epsilon: float = 0.09
    delta: float = 0.3
    temperature: float = 1.0
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and 0 < self.delta <= 1 and self.temperature > 0):
            raise HeadsUsageError("typical acceptance: epsilon and delta lie between 0 and 1, temperature is positive")
        self._generator = torch.Generator().manual_seed(self.seed)

    def first(self, logits: torch.Tensor) -> int:
        probabilities, threshold = self._of(logits[None])
        return self._draw(probabilities[0], float(threshold[0]))

    def walk(self, tree: Tree, logits: torch.Tensor) -> tuple[list[int], int]:
        probabilities, threshold = self._of(logits)
        paths, likelihood = {0: [0]}, {0: 0.0}
        for node, parent in enumerate(tree.parents[1:], start=1):
            found = float(probabilities[parent, tree.tokens[node]])
            if parent in paths and found > float(threshold[parent]):
                paths[node] = [*paths[parent], node]
                likelihood[node] = likelihood[parent] + float(torch.tensor(found).log())
        last = max(paths, key=lambda node: (len(paths[node]), likelihood[node], -node))
        return paths[last], self._draw(probabilities[last], float(threshold[last]))

    def _of(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logs = (logits.double() / self.temperature).log_softmax(-1)
        entropy = -(logs.exp() * logs).nan_to_num().sum(-1)
        return logs.exp(), (self.delta * (-entropy).exp()).clamp(max=self.epsilon)

    def _draw(self, probabilities: torch.Tensor, threshold: float) -> int:
        allowed = torch.where(probabilities > threshold, probabilities, 0.0)
        if not allowed.any():
            return int(probabilities.argmax())
        return int(torch.multinomial(allowed, 1, generator=self._generator))


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What was said, and in how many passes."""

    tokens: tuple[int, ...]
    accepted: tuple[int, ...]
    """Guesses that were right, of each pass after the prompt's."""
    guessed: tuple[int, ...]
    """Nodes of each tree, the root left out."""
    prompt_seconds: float
    seconds: float
    """After the prompt."""

    @property
    def tokens_a_pass(self) -> float:
        """As long as the text lasted: 1 with no guess right."""
        return sum(self.accepted) / len(self.accepted) + 1 if self.accepted else 1.0

    @property
    def tokens_a_second(self) -> float:
        """Of those after the first, which the prompt's pass says."""
        return max(len(self.tokens) - 1, 0) / self.seconds if self.seconds else 0.0


class NoDraft:
    """Guesses nothing: plain decoding."""

    def start(self, model: CachedModel, prompt: Sequence[int]) -> None: ...

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        return Proposal(tree=chain(tokens[-1:]))

    def settle(self, accepted: int, path: Sequence[int]) -> None: ...


def decode(
    model: CachedModel,
    prompt: Sequence[int],
    drafter: Drafter,
    *,
    new_tokens: int,
    eos: Sequence[int] = (),
    acceptance: Acceptance | None = None,
    stopper: Stopper | None = None,
) -> Decoded:
    """Continue `prompt` by `new_tokens`, or up to a token of `eos`, which is the last one then, or as far as `stopper`
    finds it worth.

    Raises:
        HeadsUsageError: for an empty prompt, or if the model has not so many positions.
    """
    if not prompt or new_tokens < 1:
        raise HeadsUsageError("decoding needs a prompt of at least one token, and at least one token to say")
    rule = acceptance or Greedy()
    ends, tokens, accepted, guessed = set(eos), list(prompt), [], []
    began = time.perf_counter()
    with torch.inference_mode():
        model.reset()
        read = model.run(prompt, range(-1, len(prompt) - 1))
        model.keep(range(len(prompt)))
        state = read[-1]
        if stopper is not None:
            stopper.start(read[:-1])
        stopped = _stops(stopper, read[-1:]) is not None
        tokens += [] if stopped else [rule.first(model.logits(state))]
        drafter.start(model, prompt)
        prompted = time.perf_counter()
        while not stopped and len(tokens) - len(prompt) < new_tokens and tokens[-1] not in ends:
            room = new_tokens - (len(tokens) - len(prompt))
            proposal = drafter.propose(tokens, state, room)
            tree, nodes = _shallow(proposal, room - 1)
            states = _check(model, proposal, tree)
            path, following = rule.walk(tree, model.logits(states))
            said = [*(tree.tokens[node] for node in path[1:]), following]
            stop = next((index + 1 for index, token in enumerate(said) if token in ends), len(said))
            model.keep(path)
            drafter.settle(len(path) - 1, [nodes[node] for node in path])
            state = states[path[-1]]
            enough = _stops(stopper, states[path])
            stopped = enough is not None and enough < stop
            tokens += said[: stop if enough is None else min(stop, enough)]
            accepted.append(len(path) - 1)
            guessed.append(len(tree.tokens) - 1)
    return Decoded(
        tokens=tuple(tokens[len(prompt) : len(prompt) + new_tokens]),
        accepted=tuple(accepted),
        guessed=tuple(guessed),
        prompt_seconds=prompted - began,
        seconds=time.perf_counter() - prompted,
    )


def _stops(stopper: Stopper | None, states: torch.Tensor) -> int | None:
    return None if stopper is None else stopper.first(states)


def _shallow(proposal: Proposal, depth: int) -> tuple[Tree, Sequence[int]]:
    """(what of the tree can be used, which of its nodes those are): deeper nodes are work for nothing, and may lie
    beyond the model's last position. What is in the model's cache already stays whole."""
    if proposal.hidden is None:
        return proposal.tree.up_to(depth)
    return proposal.tree, range(len(proposal.tree.tokens))


def _check(model: CachedModel, proposal: Proposal, tree: Tree) -> torch.Tensor:
    """The states (nodes, hidden) of a tree, after the last norm."""
    if proposal.hidden is None:
        return model.run(tree.tokens, tree.parents)
    return model.norm(model.through(proposal.hidden, model.places(), proposal.layer))


def decode_plain(model: CachedModel, prompt: Sequence[int], *, new_tokens: int, eos: Sequence[int] = ()) -> Decoded:
    """One token a pass."""
    return decode(model, prompt, NoDraft(), new_tokens=new_tokens, eos=eos)
