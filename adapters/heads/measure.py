# SPDX-License-Identifier: Apache-2.0
"""What a guess is worth: the cost of a pass over so many positions, and decoders timed by turns on the same prompts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from .cached import CachedModel
from .decode import Decoded, Drafter, NoDraft, decode

SIZES = (1, 2, 3, 5, 9, 13, 17, 25, 33)
"""Positions of the passes that are timed."""
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one decoder over all prompts."""

    tokens_a_pass: float
    accepted: float
    """Guesses that were right, a pass."""
    guessed: float
    tokens_a_second: float
    speedup: float
    """Over plain decoding in the same run."""
    equal: bool
    """Its tokens are those of plain decoding."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pass_seconds(
    model: CachedModel, sizes: Sequence[int] = SIZES, *, context: int = 128, repeats: int = 5
) -> dict[int, float]:
    """Seconds of a pass that checks a tree of so many nodes after `context` tokens, logits included; the median of
    `repeats` by turns."""
    found: dict[int, list[float]] = {size: [] for size in sizes}
    context = max(min(context, model.limit - 2), 1)
    with torch.inference_mode():
        model.reset()
        model.run([0] * context, range(-1, context - 1))
        model.keep(range(context))
        for turn in range(repeats + 1):
            for size in sizes:
                began = time.perf_counter()
                model.logits(model.run([0] * size, [-1] + [0] * (size - 1)))
                if turn:  # the first is to warm up
                    found[size].append(time.perf_counter() - began)
                model.keep([])
    return {size: median(seconds) for size, seconds in found.items()}


def seconds_of(task: Callable[[], Any], repeats: int = 5) -> float:
    """The median."""
    found = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            task()
            found.append(time.perf_counter() - began)
    return median(found[1:])


def interpolate(costs: Mapping[int, float], size: int) -> float:
    """Between the sizes that were timed, on a line."""
    sizes = sorted(costs)
    if size <= sizes[0]:
        return costs[sizes[0]]
    for low, high in pairwise(sizes):
        if size <= high:
            return costs[low] + (costs[high] - costs[low]) * (size - low) / (high - low)
    return costs[sizes[-1]] * size / sizes[-1]


def by_turns(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    drafters: Mapping[str, Drafter],
    *,
    new_tokens: int,
    eos: Sequence[int] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Speed]:
    """Each prompt by each decoder, in another order every time; plain decoding is added to them."""
    decoders: dict[str, Drafter] = {PLAIN: NoDraft(), **drafters}
    names, found = list(decoders), {name: list[Decoded]() for name in decoders}
    for number, prompt in enumerate(prompts):
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            found[name].append(decode(model, prompt, decoders[name], new_tokens=new_tokens, eos=eos))
        progress(f"decoded {number + 1} of {len(prompts)} prompts in {len(names)} ways")
    return {name: _speed(found[name], found[PLAIN]) for name in names}


def _speed(own: list[Decoded], plain: list[Decoded]) -> Speed:
    passes = max(sum(len(one.accepted) for one in own), 1)
    accepted = sum(sum(one.accepted) for one in own) / passes
    rate, base = _rate(own), _rate(plain)
    return Speed(
        tokens_a_pass=1 + accepted,
        accepted=accepted,
        guessed=sum(sum(one.guessed) for one in own) / passes,
        tokens_a_second=rate,
        speedup=rate / base if base else 1.0,
        equal=all(a.tokens == b.tokens for a, b in zip(own, plain, strict=True)),
    )


def _rate(found: list[Decoded]) -> float:
    seconds = sum(one.seconds for one in found)
    return sum(len(one.tokens) - 1 for one in found) / seconds if seconds else 0.0
