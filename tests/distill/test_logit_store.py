# SPDX-License-Identifier: Apache-2.0
"""Stored logits: the full divergence with all of them, a bound with fewer; proven bytes, and nothing asked twice."""

from pathlib import Path

import pytest
import torch
from refound.distill.errors import DistillUsageError, StateMismatchError
from refound.distill.logit_store import SHARD_WINDOWS, Answers, LogitStore, stored_kl
from refound.distill.losses import divergence
from refound.distill.models import load, open_blocks, positions_of, states_of
from torch.nn import functional

from ..export.models import VOCAB, decoder, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return load(open_blocks(write_model(tmp_path_factory.mktemp("teacher") / "model", decoder(layers=2))))


WINDOWS = (torch.arange((SHARD_WINDOWS + 3) * 12).reshape(-1, 12) * 7) % VOCAB


def store(folder: Path, k: int) -> LogitStore:
    return LogitStore(folder, teacher="a teacher", windows=WINDOWS, k=k)


def final(model, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model.model.norm(states_of(model, ids, positions_of(model, ids.shape[1]))[-1])


def test_with_all_logits_it_is_the_full_divergence_and_with_fewer_a_bound(model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    child, head = final(model, WINDOWS[:4]) + 0.1, model.lm_head.weight
    wanted = divergence(final(model, WINDOWS[:4]) @ head.T, child @ head.T).mean().item()
    found = []
    for k in (4, 64, VOCAB):
        kept = store(tmp_path, k)
        kept.fill(model, lambda _: None)
        answers = kept.read(0)
        some = Answers(answers.ids[:4], answers.tokens[:4], answers.log_probs[:4], answers.tail[:4])
        assert torch.equal(some.ids, WINDOWS[:4])
        found.append(stored_kl(child, head, some).item())
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(wanted, rel=2e-2)  # log-probabilities have 16 bits


def test_the_gradient_is_that_of_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 6), (20, 6)))
    log_probs = functional.log_softmax(torch.randn(2, 5, 20, generator=generator), -1)
    best, tokens = log_probs.topk(3, -1)
    tail = torch.log1p(-best.exp().sum(-1))
    mine, plain = (hidden.clone().requires_grad_() for _ in range(2))
    stored_kl(mine, head, Answers(torch.zeros(2, 5), tokens, best, tail)).backward()
    own = functional.log_softmax(plain @ head.T, -1).gather(-1, tokens)
    rest = torch.log1p(-own.exp().sum(-1))
    ((best.exp() * (best - own)).sum(-1) + tail.exp() * (tail - rest)).mean().backward()
    assert mine.grad is not None and plain.grad is not None
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_what_is_there_is_not_asked_again_and_damage_is_found(model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    kept = store(tmp_path, 8)
    kept.fill(model, said.append)
    assert len(said) == 2 and len(kept) == len(WINDOWS)
    sound = kept.path(1).read_bytes()
    kept.fill(model, said.append)
    assert len(said) == 2
    body = bytearray(sound)
    body[-7] ^= 4
    kept.path(1).write_bytes(body)
    with pytest.raises(StateMismatchError, match="set aside"):
        kept.read(1)
    kept.fill(model, said.append)
    assert kept.path(1).read_bytes() == sound
    assert store(tmp_path, 9).path(0) != kept.path(0)


def test_no_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DistillUsageError, match="at least 1"):
        store(tmp_path, 0)
