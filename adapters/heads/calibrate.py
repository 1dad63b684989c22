# SPDX-License-Identifier: Apache-2.0
"""A threshold whose risk is bounded, from held-out text: learn then test (Angelopoulos et al., arXiv:2110.01052).

Thresholds are tried from the strictest on. Each is a hypothesis, that its risk is above the limit; it is rejected by a
betting p-value (Waudby-Smith and Ramdas, arXiv:2010.09686), and the first that is not ends the sequence (fixed-sequence
testing, which needs no correction). The last one that was rejected is taken. Then, with probability `confidence` over
the held-out text, the risk of what is taken is at most the limit.

What is assumed: the units (windows of text) are drawn independently from the text that is decoded later. Tokens within
a window need not be independent: a unit's loss is the mean over its tokens. Nothing is promised for other text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What was chosen."""

    value: float
    """Act where the score is at least this; infinity: never."""
    risk: float
    """The mean loss on the held-out text, which lies below the limit."""
    acts: float
    """Share of places where it acts there."""

    @property
    def never(self) -> bool:
        return math.isinf(self.value)


def betting_p_value(losses: torch.Tensor, limit: float, confidence: float) -> float:
    """Of the hypothesis that the mean of what `losses` (units,), each between 0 and 1, are drawn from is above `limit`.

    A gambler who bets, before each unit, that its loss is below the limit does not get rich if the hypothesis is true:
    the p-value is one over the most that he had (Ville's inequality).
    """
    count = len(losses)
    wealth, most, total, spread = 0.0, 0.0, 0.5, 0.25
    stake = math.sqrt(2 * math.log(1 / (1 - confidence)) / count) if count else 0.0
    for number, loss in enumerate(losses.tolist(), start=1):
        bet = min(1.0, stake / math.sqrt(spread / number))  # by what came before only
        wealth += math.log1p(-bet * (loss - limit)) if bet * (loss - limit) < 1 else -math.inf
        most = max(most, wealth)
        total += loss
        spread += (loss - total / (number + 1)) ** 2
    return math.exp(-most)


Outcome = Callable[[float], tuple[torch.Tensor, torch.Tensor]]
"""A threshold to (where it acts, where that is a mistake): (units, places) of bool each."""


def choose_threshold(outcome: Outcome, *, limit: float, confidence: float, values: Sequence[float]) -> Threshold:
    """The laxest of `values` with a risk that is proven to be at most `limit`, and all stricter ones with it.

    The risk is the share of all places where acting is a mistake.
    """
    found = Threshold(value=math.inf, risk=0.0, acts=0.0)
    for value in sorted(values, reverse=True):
        acts, mistakes = outcome(value)
        losses = mistakes.double().mean(1)
        if betting_p_value(losses, limit, confidence) > 1 - confidence:
            break
        found = Threshold(value=value, risk=losses.mean().item(), acts=acts.double().mean().item())
    return found


def grid(points: int = 50) -> list[float]:
    """Thresholds on a probability, chosen before any text is seen."""
    return [index / (2 * points) for index in range(1, 2 * points)]
