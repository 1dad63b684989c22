# SPDX-License-Identifier: Apache-2.0
"""The bound holds: over many draws of held-out text the true risk is above the limit no more often than is stated."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.adapters.heads.calibrate import Outcome, betting_p_value, choose_threshold, grid

LIMIT, CONFIDENCE, UNITS, PLACES, TRIALS = 0.1, 0.9, 80, 20, 300


def drawn(generator: torch.Generator, units: int = UNITS) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, and mistakes the likelier the lower the score; places of a unit are alike, so they are no independent
    draws. (units, places) each."""
    level = torch.rand(units, 1, generator=generator)
    scores = (0.7 * level + 0.3 * torch.rand(units, PLACES, generator=generator)).clamp(0, 1)
    wrong = torch.rand(units, PLACES, generator=generator) < 0.5 * (1 - scores)
    return scores, wrong


def outcome(scores: torch.Tensor, wrong: torch.Tensor) -> Outcome:
    return lambda value: (scores >= value, (scores >= value) & wrong)


@cache
def true_risks() -> dict[float, float]:
    scores, wrong = drawn(torch.Generator().manual_seed(99), 100_000)
    return {value: ((scores >= value) & wrong).double().mean().item() for value in grid(20)}


def violations(choose: str) -> tuple[float, float]:
    """(share of draws whose true risk is above the limit, the mean share of places where it acts)."""
    generator, over, acts = torch.Generator().manual_seed(0), 0, 0.0
    for _ in range(TRIALS):
        found = outcome(*drawn(generator))
        if choose == "bound":
            chosen = choose_threshold(found, limit=LIMIT, confidence=CONFIDENCE, values=grid(20))
            value, share = chosen.value, chosen.acts
        else:  # what is under the limit on the held-out text, and no more than that
            good = [v for v in grid(20) if found(v)[1].double().mean() <= LIMIT]
            value, share = min(good, default=math.inf), 0.0
        over += true_risks().get(value, 0.0) > LIMIT
        acts += share / TRIALS
    return over / TRIALS, acts


def test_the_risk_is_above_the_limit_no_more_often_than_stated() -> None:
    over, acts = violations("bound")
    slack = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / TRIALS)
    assert over <= 1 - CONFIDENCE + slack
    assert acts > 0.3  # and it is not by never acting
    # the draws are such that a threshold chosen by the mean alone breaks it, so the test could fail
    naive, _ = violations("naive")
    assert naive > 1 - CONFIDENCE + slack


@given(mean=st.floats(0.11, 0.9), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_p_value_is_seldom_small_by_chance(mean: float, seed: int) -> None:
    """Of a hypothesis that is true: P(p <= 0.01) <= 0.01, so 15 of 100 would come once in 10^12."""
    generator = torch.Generator().manual_seed(seed)
    losses = (torch.rand(100, 50, generator=generator) < mean).double()
    assert sum(betting_p_value(row, LIMIT, CONFIDENCE) <= 0.01 for row in losses) < 15


def test_too_little_text_proves_nothing_and_enough_does() -> None:
    def never_wrong(units: int) -> Outcome:
        return outcome(torch.ones(units, 4), torch.zeros(units, 4, dtype=torch.bool))

    few = choose_threshold(never_wrong(20), limit=0.05, confidence=0.95, values=grid())
    assert few.never and few.acts == 0
    many = choose_threshold(never_wrong(80), limit=0.05, confidence=0.95, values=grid())
    assert not many.never and many.acts == 1 and many.value == pytest.approx(0.01)
    assert betting_p_value(torch.zeros(0), 0.05, 0.95) == 1
    assert betting_p_value(torch.ones(80), 0.05, 0.95) == 1
