# SPDX-License-Identifier: Apache-2.0
"""Losses against their plain formulas, and the chunked one against the plain one, gradients included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.distill.chunked import HeadLoss, head_loss
from refound.distill.errors import DistillUsageError
from refound.distill.losses import Divergence, cosine_distance, divergence, find_divergence, normalized_mse
from torch.nn import functional

KINDS: list[Divergence] = ["forward", "reverse", "jsd"]


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(teacher: torch.Tensor, child: torch.Tensor, kind: Divergence, beta: float, temperature: float) -> float:
    """By probabilities, one at a time."""

    def probabilities(row: torch.Tensor) -> list[float]:
        weights = [math.exp(value / temperature) for value in row.tolist()]
        return [weight / sum(weights) for weight in weights]

    def kl(of: list[float], to: list[float]) -> float:
        return sum(p * math.log(p / q) for p, q in zip(of, to, strict=True))

    one, other = probabilities(teacher), probabilities(child)
    middle = [beta * p + (1 - beta) * q for p, q in zip(one, other, strict=True)]
    found = {
        "forward": kl(one, other),
        "reverse": kl(other, one),
        "jsd": beta * kl(one, middle) + (1 - beta) * kl(other, middle),
    }
    return found[kind] * temperature**2


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from(KINDS), st.floats(0.05, 0.95), st.floats(0.5, 4))
def test_divergences_are_what_their_formulas_say(seed: int, kind: Divergence, beta: float, temperature: float) -> None:
    teacher, child = logits(seed, 2, 7), logits(seed + 1, 2, 7)
    found = divergence(teacher, child, kind=kind, beta=beta, temperature=temperature)
    wanted = [plain(teacher[row], child[row], kind, beta, temperature) for row in range(2)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 999))
def test_a_small_or_large_beta_comes_near_the_two_kl_divergences(seed: int) -> None:
    """JSD / beta goes to KL(teacher || child) as beta goes to 0 (GKD 2306.13649)."""
    teacher, child = logits(seed, 1, 5) / 3, logits(seed + 1, 1, 5) / 3
    near = divergence(teacher, child, kind="jsd", beta=1e-6) / 1e-6
    assert near.item() == pytest.approx(divergence(teacher, child, kind="forward").item(), rel=1e-3, abs=1e-6)
    far = divergence(teacher, child, kind="jsd", beta=1 - 1e-6) / 1e-6
    assert far.item() == pytest.approx(divergence(teacher, child, kind="reverse").item(), rel=1e-3, abs=1e-6)


@settings(deadline=None)
@given(
    st.integers(0, 999),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(KINDS),
    st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)]),
)
def test_the_chunked_loss_is_the_plain_one_with_its_gradients(
    seed: int, tokens: int, chunk: int, kind: Divergence, weights: tuple[float, float]
) -> None:
    child, head = logits(seed, tokens, 4) / 3, logits(seed + 1, 11, 4) / 3
    teacher, teacher_head = logits(seed + 2, tokens, 4) / 3, logits(seed + 3, 11, 4) / 3
    labels = torch.arange(tokens) % 11
    labels[-1] = -100
    kl, lm = weights
    loss = HeadLoss(kl=kl, lm=lm, kind=kind, chunk=chunk, temperature=1.5)

    one = [child.clone().requires_grad_(), head.clone().requires_grad_()]
    found, found_kl, _ = head_loss(*one, teacher, teacher_head, labels, loss)
    found.backward()

    other = [child.clone().requires_grad_(), head.clone().requires_grad_()]
    out = other[0] @ other[1].T
    wanted_kl = divergence(teacher @ teacher_head.T, out, kind=kind, temperature=1.5).mean()
    known = functional.cross_entropy(out, labels, reduction="sum") / max(tokens - 1, 1)
    wanted = kl * wanted_kl + lm * known
    wanted.backward()

    assert found.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
    assert found_kl.item() == pytest.approx(wanted_kl.item(), rel=1e-9, abs=1e-12)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12)


def test_the_chunked_loss_never_holds_the_logits_of_all_tokens() -> None:
    """Every tensor that torch allocates meanwhile is watched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, vocabulary, chunk, largest = 64, 1000, 8, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocabulary, 4)
    with Watch():
        loss, _, _ = head_loss(
            hidden, head, hidden.detach(), head, torch.zeros(tokens, dtype=torch.long), HeadLoss(chunk=chunk, lm=1)
        )
        loss.backward()
    assert largest <= chunk * vocabulary


@settings(deadline=None)
@given(st.integers(0, 999), st.floats(1e-3, 1e3))
def test_the_normalized_mse_is_free_of_scale_and_nothing_for_the_teacher(seed: int, scale: float) -> None:
    teacher, child = logits(seed, 3, 5), logits(seed + 1, 3, 5)
    assert normalized_mse(teacher, teacher).item() == 0
    assert normalized_mse(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
    scaled = normalized_mse(scale * child, scale * teacher).item()
    assert scaled == pytest.approx(normalized_mse(child, teacher).item(), rel=1e-9)


def test_the_cosine_distance_is_one_less_the_cosine() -> None:
    one, other = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [-1.0, -1.0]])
    assert cosine_distance(one, other).tolist() == pytest.approx([0, 2])


def test_an_unknown_divergence_and_a_beta_at_the_end_are_refused() -> None:
    with pytest.raises(DistillUsageError, match="none of forward, reverse, jsd"):
        find_divergence("kl")
    with pytest.raises(DistillUsageError, match="beta is 1"):
        divergence(torch.zeros(3), torch.zeros(3), kind="jsd", beta=1.0)
