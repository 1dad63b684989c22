# SPDX-License-Identifier: Apache-2.0
"""Times of whole models on this device, as transformers runs them: prefill, and decoding with a cache.

What is compared is measured by turns, so that a machine that grows slower meanwhile is slow for both.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .recipe import Workload

_DECODED = 4
"""Tokens decoded for one measurement."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one workload."""

    prefill_s: float
    decode_s: float
    """Of one token of every sequence in the batch, right after the prompt."""

    def latency_s(self, workload: Workload) -> float:
        return self.prefill_s + workload.new * self.decode_s

    def __sub__(self, other: "Times") -> "Times":
        return Times(prefill_s=self.prefill_s - other.prefill_s, decode_s=self.decode_s - other.decode_s)

    def __add__(self, other: "Times") -> "Times":
        return Times(prefill_s=self.prefill_s + other.prefill_s, decode_s=self.decode_s + other.decode_s)

    def scaled(self, factor: float) -> "Times":
        return Times(prefill_s=self.prefill_s * factor, decode_s=self.decode_s * factor)


def measure_once(model: Any, workload: Workload) -> Times:
    """One prefill of the prompts and a few decoded tokens."""
    from transformers.cache_utils import DynamicCache

    device = model.model.embed_tokens.weight.device
    vocabulary = model.config.vocab_size
    prompt = torch.arange(workload.batch * workload.prompt, device=device).reshape(workload.batch, -1) % vocabulary
    cache = {_cache_name(model): DynamicCache()}
    with torch.inference_mode():
        began = _now(device)
        answer = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **cache)
        prefilled = _now(device)
        decoded = min(_DECODED, workload.new)
        token = answer.logits[:, -1:].argmax(-1)
        for _ in range(decoded):
            token = model(input_ids=token, use_cache=True, logits_to_keep=1, **cache).logits[:, -1:].argmax(-1)
        ended = _now(device)
    return Times(prefill_s=prefilled - began, decode_s=(ended - prefilled) / decoded if decoded else 0.0)


def by_turns(measures: Sequence[Callable[[], Times]], repeats: int) -> list[list[Times]]:
    """Each measured `repeats` times, by turns, after one that is not counted: a list of times for each."""
    found: list[list[Times]] = [[] for _ in measures]
    for turn in range(repeats + 1):
        for times, measure in zip(found, measures, strict=True):
            one = measure()
            if turn:
                times.append(one)
    return found


def median(times: Sequence[Times]) -> Times:
    return Times(
        prefill_s=statistics.median(one.prefill_s for one in times),
        decode_s=statistics.median(one.decode_s for one in times),
    )


@contextmanager
def threads(count: int) -> Any:
    """With so many threads of torch; 0 leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cache_name(model: Any) -> str:
    """transformers 5 has renamed the argument on its way."""
    return "cache" if "cache" in inspect.signature(type(model.model).forward).parameters else "past_key_values"


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
