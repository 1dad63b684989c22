# SPDX-License-Identifier: Apache-2.0
"""Early exits: what the model would say, from the residual stream after some of its layers.

An exit is a norm of its own and a small MLP beside it, then the model's own output matrix. It learns the model's
distribution. A gate at each exit learns where the exit is right (DYNAMAX, arXiv:2504.20922); the gate `stop` learns,
from the model's last state, where what the model would go on with is of no use to whoever types the text: fewer than
`useful` tokens of it would be right (as in dynamic code completion, arXiv:2401.09964).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...distill.chunked import HeadLoss, head_loss
from ...distill.models import DeciLMForCausalLM, positions_of, states_of
from .calibrate import Outcome
from .decode import pick
from .errors import HeadsUsageError
from .gates import make_gate
from .runs import run_lengths
from .settings import ExitSettings


class Exit(nn.Module):
    """(…, hidden) after a layer to (…, hidden) before the output matrix; at first that of the model's last norm."""

    def __init__(self, norm: Any, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().clone())
        self.eps = norm.variance_epsilon
        hidden = len(self.weight)
        self.down = nn.Linear(hidden, width) if width else None
        self.up = nn.Linear(width, hidden, bias=False) if width else None
        if self.up is not None:
            nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        if self.down is None or self.up is None:
            return found
        return found + self.up(functional.silu(self.down(found)))


class ExitPart(nn.Module):
    """What is trained: exits, a gate for each, and the gate `stop`."""

    def __init__(self, model: DeciLMForCausalLM, layers: Sequence[int], settings: ExitSettings) -> None:
        super().__init__()
        self.layers = tuple(layers)
        norm: Any = model.model.norm
        hidden = len(norm.weight)
        self.exits = nn.ModuleList(Exit(norm, settings.width) for _ in layers)
        self.gates = nn.ModuleList(make_gate(settings.gate, hidden, settings.gate_width) for _ in layers)
        self.stop = make_gate(settings.gate, hidden, settings.gate_width)

    def each(self) -> Iterator[tuple[int, Any, Any]]:
        """(after so many layers, exit, gate)."""
        yield from zip(self.layers, self.exits, self.gates, strict=True)


def exit_layers(settings: ExitSettings, count: int) -> tuple[int, ...]:
    """Raises HeadsUsageError if the model has no such layers."""
    found = settings.layers or tuple(sorted({max(count // 3, 1), max(count // 2, 1)}))
    if count < 2 or any(layer >= count for layer in found):
        raise HeadsUsageError(
            f"exits after layers {', '.join(map(str, found))}: the model has {count}, so an exit is after 1 to "
            f"{count - 1} of them"
        )
    return tuple(sorted(set(found)))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Windows of text as model, exits and gates see them: (windows, length) each; of exits one after the other."""

    right: tuple[torch.Tensor, ...]
    """Whether the exit's token is the model's."""
    bare: tuple[torch.Tensor, ...]
    """The same with the model's own norm in the exit's place."""
    scores: tuple[torch.Tensor, ...]
    """The probability that it is, by the gate."""
    stop: torch.Tensor
    """The probability that the continuation is useless."""
    hits: torch.Tensor
    """Whether the model's token is the text's; the last place of a window has no next token and counts as none."""


@dataclass(frozen=True, kw_only=True)
class ExitLoss:
    """See `train.Loss`."""

    part: ExitPart
    model: DeciLMForCausalLM
    settings: ExitSettings

    def __call__(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        first = self.settings.prompt - 1 if self.settings.own else 0
        head = self.model.lm_head.weight
        with torch.no_grad():
            states = states_of(self.model, ids, positions_of(self.model, ids.shape[1]))
            final = self.model.model.norm(states[-1])
            said = pick(functional.linear(final, head))
            labels = torch.full((len(ids), ids.shape[1] - first), -100)
            labels[:, :-1] = ids[:, first + 1 :]
        total = torch.zeros((), dtype=final.dtype)
        for layer, exit_, gate in self.part.each():
            found = exit_(states[layer])
            loss, _, _ = head_loss(
                found[:, first:].flatten(0, 1),
                head,
                final[:, first:].flatten(0, 1),
                head,
                labels.flatten(),
                HeadLoss(kl=self.settings.kl, lm=self.settings.lm),
            )
            with torch.no_grad():
                right = (pick(functional.linear(found, head)) == said).to(final.dtype)
            scores, _ = gate(found.detach())
            total = total + loss + functional.binary_cross_entropy_with_logits(scores[:, first:], right[:, first:])
        if self.settings.own:
            return total  # the model's own text is never useless to it
        useless = _useless(said[:, :-1] == ids[:, 1:], self.settings.useful)
        scores, _ = self.part.stop(final)
        scores = scores[:, : useless.shape[1]]
        return total + functional.binary_cross_entropy_with_logits(scores, useless.to(scores.dtype))


def _useless(hits: torch.Tensor, useful: int) -> torch.Tensor:
    """hits: (windows, length). (windows, length - useful + 1) of bool."""
    count = max(hits.shape[1] - useful + 1, 0)
    return (run_lengths(hits, useful) < useful).reshape(len(hits), count)


def evaluate(part: ExitPart, model: DeciLMForCausalLM, windows: torch.Tensor) -> Seen:
    """At held-out windows (windows, length)."""
    right, bare, scores = ([list[torch.Tensor]() for _ in part.layers] for _ in range(3))
    stop, hits, head = [], [], model.lm_head.weight
    with torch.inference_mode():
        for ids in windows.split(1):
            states = states_of(model, ids, positions_of(model, ids.shape[1]))
            final = model.model.norm(states[-1])
            said = pick(functional.linear(final, head))
            for number, (layer, exit_, gate) in enumerate(part.each()):
                found = exit_(states[layer])
                right[number].append(pick(functional.linear(found, head)) == said)
                bare[number].append(pick(functional.linear(model.model.norm(states[layer]), head)) == said)
                scores[number].append(gate(found)[0].sigmoid())
            stop.append(part.stop(final)[0].sigmoid())
            following = torch.full_like(ids, -1)
            following[:, :-1] = ids[:, 1:]
            hits.append(said == following)
    return Seen(
        right=tuple(torch.cat(one) for one in right),
        bare=tuple(torch.cat(one) for one in bare),
        scores=tuple(torch.cat(one) for one in scores),
        stop=torch.cat(stop),
        hits=torch.cat(hits),
    )


def leaving(seen: Seen, first: int) -> Outcome:
    """A token leaves at the first exit whose gate reaches the threshold; it is a mistake if the exit is not right."""

    def outcome(value: float) -> tuple[torch.Tensor, torch.Tensor]:
        acts = torch.zeros_like(seen.right[0][:, first:])
        mistakes = acts.clone()
        for right, scores in zip(seen.right, seen.scores, strict=True):
            leaves = ~acts & (scores[:, first:] >= value)
            acts |= leaves
            mistakes |= leaves & ~right[:, first:]
        return acts, mistakes

    return outcome


def stopping(seen: Seen, useful: int, first: int) -> Outcome:
    """Stopping is a mistake where the continuation would have been useful."""
    useless = _useless(seen.hits[:, :-1], useful)[:, first:]
    scores = seen.stop[:, first : first + useless.shape[1]]
    return lambda value: (scores >= value, (scores >= value) & ~useless)
