# SPDX-License-Identifier: Apache-2.0
"""Small classifiers on hidden states, one token after the other: MLP, recurrent, and a selective state space.

DYNAMAX (arXiv:2504.20922) has these kinds decide whether a layer's token is that of the last layer. They score; which
score is enough is for `calibrate`.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

State = torch.Tensor | None


class Gate(Protocol):
    """(batch, tokens, hidden) and what those before left behind, to logits (batch, tokens) and what these leave."""

    def __call__(self, hidden: torch.Tensor, state: State = None) -> tuple[torch.Tensor, State]: ...


class MlpGate(nn.Module):
    """Each token for itself."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(hidden, width), nn.Linear(width, 1)

    def forward(self, hidden: torch.Tensor, state: State = None) -> tuple[torch.Tensor, State]:
        return self.outside(functional.silu(self.inside(hidden)))[..., 0], None


class GruGate(nn.Module):
    """A gated recurrent unit over the text."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gru, self.outside = nn.GRU(hidden, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, hidden: torch.Tensor, state: State = None) -> tuple[torch.Tensor, State]:
        found, last = self.gru(hidden, state)
        return self.outside(found)[..., 0], last


class SsmGate(nn.Module):
    """A selective state space as in Mamba (arXiv:2312.00752): what is kept and what is written depends on the token.

    s_t = exp(-d_t a) s_{t-1} + d_t b_t x_t, read as c_t s_t + x_t, through a gate; a state of `size` numbers a channel.
    """

    def __init__(self, hidden: int, width: int, size: int = 8) -> None:
        super().__init__()
        self.inside = nn.Linear(hidden, 2 * width)
        self.step, self.write, self.read = nn.Linear(width, width), nn.Linear(width, size), nn.Linear(width, size)
        self.decay = nn.Parameter(torch.arange(1, size + 1).float().log().repeat(width, 1))
        self.outside = nn.Linear(width, 1)

    def forward(self, hidden: torch.Tensor, state: State = None) -> tuple[torch.Tensor, State]:
        x, gate = self.inside(hidden).chunk(2, -1)
        x = functional.silu(x)
        step, write, read = functional.softplus(self.step(x)), self.write(x), self.read(x)
        keep = torch.exp(-step[..., None] * self.decay.exp())
        add = (step * x)[..., None] * write[..., None, :]
        held = torch.zeros_like(add[:, 0]) if state is None else state
        seen = []
        for token in range(hidden.shape[1]):
            held = keep[:, token] * held + add[:, token]
            seen.append((held * read[:, token, None]).sum(-1))
        found = (torch.stack(seen, 1) + x) * functional.silu(gate)
        return self.outside(found)[..., 0], held


_GATES = {"mlp": MlpGate, "gru": GruGate, "ssm": SsmGate}


def make_gate(kind: str, hidden: int, width: int) -> nn.Module:
    return _GATES[kind](hidden, width)


class GateStopper:
    """Ends a text where a gate's score is at least `threshold`: a `decode.Stopper`. A gate that remembers has seen the
    prompt, as its threshold was chosen over whole windows of text."""

    def __init__(self, gate: Gate, threshold: float) -> None:
        self._gate, self._threshold = gate, threshold
        self._state: State = None

    def start(self, states: torch.Tensor) -> None:
        self._state = self._gate(states[None])[1] if len(states) else None

    def first(self, states: torch.Tensor) -> int | None:
        for index in range(len(states)):
            score, self._state = self._gate(states[None, index : index + 1], self._state)
            if float(score.sigmoid()) >= self._threshold:
                return index
        return None
