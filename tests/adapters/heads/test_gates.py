# SPDX-License-Identifier: Apache-2.0
"""Gates see a text token by token as they see it whole, and learn what they are there for."""

import pytest
import torch
from refound.adapters.heads.gates import make_gate
from torch.nn import functional

KINDS = ["mlp", "gru", "ssm"]


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_all_at_once(kind: str) -> None:
    torch.manual_seed(0)
    gate, text = make_gate(kind, 16, 8).double(), torch.randn(2, 11, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, last = gate(text)
        state, steps = None, []
        for token in range(11):
            score, state = gate(text[:, token : token + 1], state)
            steps.append(score)
        assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-12)
        if last is not None:
            assert torch.allclose(last, state, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_memory_is_learned_by_those_that_have_it(kind: str) -> None:
    """Right is: the mark came at this or the token before."""
    torch.manual_seed(0)
    gate = make_gate(kind, 4, 8)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.03)
    for _ in range(120):
        text = torch.randn(16, 12, 4)
        mark = text[..., 0] > 0.5
        wanted = mark.clone()
        wanted[:, 1:] |= mark[:, :-1]
        loss = functional.binary_cross_entropy_with_logits(gate(text)[0], wanted.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (loss.item() < 0.3) == (kind != "mlp")
