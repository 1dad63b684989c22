# SPDX-License-Identifier: Apache-2.0
"""Error-sensitive weights of tokens: FAIT (arXiv:2503.16913) for a right and a wrong answer to the same prompt.

Both are compared in lines, tokens and characters; tokens of the right answer that lie in a difference weigh more:

    w_j = 1 + sum over levels L of  c_L f_L [j differs at L],      then scaled so that the weights of a batch sum to n

f_L follows the model as it learns: with m = mean log P of the right answer's differing tokens minus that of the wrong
one's, f = 2 sigmoid(-m / temperature), which is 1 where the model cannot tell them apart, up to 2 where it prefers the
wrong one, and fades to 0 where it has learned the difference. The paper's own formula is not published; this is ours.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .data import LEVELS, Batch


@dataclass(frozen=True, kw_only=True)
class Fait:
    """The `[loss.fait]` table of a recipe."""

    enabled: bool = False
    line: float = 0.5
    """c of each level; 0 leaves it out."""
    token: float = 1.0
    char: float = 0.5
    dynamic: bool = True
    """False: f = 1, always."""
    temperature: float = 1.0
    normalize: bool = True
    """Weights sum to the number of tokens, so that the learning rate means what it did."""

    def problems(self) -> list[str]:
        found = [f"loss.fait.{name} is negative" for name in LEVELS if getattr(self, name) < 0]
        return found + ([] if self.temperature > 0 else ["loss.fait.temperature must be positive"])


def compare(right: str, wrong: str, spans: Sequence[tuple[int, int]], ids: Sequence[int], others: Sequence[int]) -> Any:
    """Which tokens of `right` lie where it differs from `wrong`, by level.

    spans: (start, end) characters of each token of `right`; ids, others: tokens of both.
    """
    lines = _line_spans(right)
    differing = _differing(right.splitlines(keepends=True), wrong.splitlines(keepends=True))
    marked_lines = [lines[index] for index in differing if index < len(lines)]
    chars = set(_differing_chars(right, wrong))
    tokens = set(_differing(ids, others))
    return {
        "line": [any(start < end_ and begin < end for begin, end_ in marked_lines) for start, end in spans],
        "token": [index in tokens for index in range(len(ids))],
        "char": [any(place in chars for place in range(start, end)) for start, end in spans],
    }


def _differing(one: Sequence[Any], other: Sequence[Any]) -> Iterable[int]:
    """Places of `one` that are not in `other`. Where only `other` has something, the place after it counts."""
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if kind in ("replace", "delete"):
            yield from range(start, end)
        elif kind == "insert" and len(one):
            yield min(start, len(one) - 1)


def _differing_chars(right: str, wrong: str) -> Iterable[int]:
    """Within the lines that differ: over whole answers it would take time that grows with their square."""
    ours, others = right.splitlines(keepends=True), wrong.splitlines(keepends=True)
    for kind, start, end, begin, stop in difflib.SequenceMatcher(None, ours, others, autojunk=False).get_opcodes():
        first, block = sum(map(len, ours[:start])), "".join(ours[start:end])
        if kind == "insert" and right:
            yield min(first, len(right) - 1)
        elif kind != "equal":
            yield from (first + place for place in _differing(block, "".join(others[begin:stop])))


def _line_spans(text: str) -> list[tuple[int, int]]:
    spans, start = [], 0
    for line in text.splitlines(keepends=True):
        spans.append((start, start + len(line)))
        start += len(line)
    return spans


def fait_weights(settings: Fait, batch: Batch, logits: torch.Tensor, wrong_logits: torch.Tensor | None) -> torch.Tensor:
    """(batch, length): of the tokens of `batch.ids`. No gradient flows through them.

    logits, wrong_logits: (batch, length, vocabulary) for `batch` and for `batch.wrong`; the latter if they are dynamic.
    """
    weights = torch.ones_like(batch.weights)
    if batch.wrong is None:
        return weights
    own = other = weights
    if settings.dynamic and wrong_logits is not None:
        own = log_probabilities(logits.detach(), batch.ids)
        other = log_probabilities(wrong_logits.detach(), batch.wrong.ids)
    for level in LEVELS:
        strength = float(getattr(settings, level))
        if not strength:
            continue
        for row, number in enumerate(batch.wrong_rows):
            mark, wrong_mark = batch.marks[level][number], batch.wrong.marks[level][row]
            factor = 1.0
            if settings.dynamic and mark.any() and wrong_mark.any():
                margin = own[number][mark].mean() - other[row][wrong_mark].mean()
                factor = 2 * torch.sigmoid(-margin / settings.temperature).item()
            weights[number] += strength * factor * mark
    return weights


def log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(batch, length): log P of each token given those before it; 0 for the first."""
    found = torch.zeros(ids.shape)
    for row in range(len(ids)):  # one at a time: in float32 a batch of them may not fit
        logs = torch.log_softmax(logits[row, :-1].float(), -1)
        found[row, 1:] = logs.gather(-1, ids[row, 1:, None])[:, 0]
    return found
