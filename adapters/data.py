# SPDX-License-Identifier: Apache-2.0
"""What is trained on: lines of JSON with a prompt and a completion, or text in windows; as numbered samples of tokens.

    {"prompt": "2 + 2 = ", "completion": "4"}
    {"prompt": …, "completion": …, "wrong": …, "thinking": …, "another": true}

`wrong`: a wrong answer to the same prompt, for error-sensitive weights and for LEMMA. `thinking`: what comes before the
completion, for budgets. `another`: whether another sample would be better, for self-evaluation. Loss is taken of the
completion only. Every line that cannot be used is told with its number before anything is trained.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import DataError

Encode = Callable[[str], list[int]]
LEVELS = ("line", "token", "char")
"""Granularities in which a right and a wrong answer are compared; see `fait`."""
_TOLD = 6  # problems in a message


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a file."""

    where: str
    """FILE:LINE"""
    prompt: str
    completion: str
    wrong: str = ""
    thinking: str = ""
    another: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that belong together."""

    ids: Sequence[int]
    learn: bool
    """Whether loss is taken of them."""
    weight: float = 1.0
    marks: dict[str, list[bool]] = field(default_factory=dict)
    """By `LEVELS`: where the answer differs from a wrong one."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence; all lists have a place for each token."""

    ids: list[int]
    learn: list[bool]
    weights: list[float]
    marks: dict[str, list[bool]]
    wrong: "Sample | None" = None
    """The wrong answer to the same prompt, marked where it differs."""
    truncated: bool = False
    """Whether its end was cut off."""

    def content(self) -> list[Any]:
        """All that training sees of it, as plain values."""
        return [self.ids, self.learn, self.weights, self.marks, self.wrong.content() if self.wrong else None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples side by side, filled up on the right: (batch, length) each."""

    ids: torch.Tensor
    attention: torch.Tensor
    """1 where a token is."""
    learn: torch.Tensor
    weights: torch.Tensor
    marks: dict[str, torch.Tensor]
    wrong: "Batch | None"
    wrong_rows: list[int]
    """Of which samples the rows of `wrong` are."""


def read_records(path: Path, *, needs: Sequence[str] = ()) -> list[Record]:
    """The records of a JSONL file.

    needs: fields that every line must have, beyond prompt and completion.

    Raises:
        DataError: naming every line that cannot be used, and why; or that there is none.
    """
    records, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other separators may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _record(f"{path}:{number}", line, needs)
        if isinstance(found, str):
            problems.append(f"line {number} {found}")
        else:
            records.append(found)
    if problems:
        more = f"\n  and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
        raise DataError(
            f"{path} has {len(problems)} lines that cannot be used:\n  " + "\n  ".join(problems[:_TOLD]) + more
        )
    if not records:
        raise DataError(f'{path} is empty; a line is {{"prompt": …, "completion": …}}')
    return records


def _record(where: str, line: str, needs: Sequence[str]) -> Record | str:
    try:
        raw = json.loads(line)
    except ValueError as error:
        return f"is no JSON: {error}"
    if not isinstance(raw, dict):
        return "is no JSON object"
    texts = {"prompt": "", "completion": "", "wrong": "", "thinking": ""}
    for name in texts:
        value = raw.get(name, "")
        if not isinstance(value, str):
            return f"has a {name} that is no text: {value!r}"
        texts[name] = value
    if "prompt" not in raw or "completion" not in raw:
        missing = [name for name in ("prompt", "completion") if name not in raw]
        return f"has no {' and no '.join(missing)}; it has {', '.join(map(str, raw)) or 'nothing'}"
    if not texts["completion"].strip():
        return "has an empty completion"
    another = raw.get("another")
    if another is not None and not isinstance(another, bool):
        return f"has another = {another!r}; true or false is wanted"
    for name in needs:
        if raw.get(name) in (None, ""):
            return f"is unpaired: it has no {name}, which this recipe needs"
    if texts["wrong"] == texts["completion"]:
        return "has the same text as completion and as wrong"
    return Record(where=where, another=another, **texts)


def sample_of(segments: Sequence[Segment], *, length: int, wrong: "Sample | None" = None) -> Sample | None:
    """The segments as one sequence, cut to `length` tokens. None: nothing that is learned is left of it."""
    ids, learn, weights = list[int](), list[bool](), list[float]()
    marks: dict[str, list[bool]] = {level: [] for level in LEVELS}
    for segment in segments:
        ids += segment.ids
        learn += [segment.learn] * len(segment.ids)
        weights += [segment.weight] * len(segment.ids)
        for level in LEVELS:
            marks[level] += segment.marks.get(level) or [False] * len(segment.ids)
    cut = {level: flags[:length] for level, flags in marks.items()}
    if not any(learn[1:length]):
        return None
    return Sample(
        ids=ids[:length],
        learn=learn[:length],
        weights=weights[:length],
        marks=cut,
        wrong=wrong,
        truncated=len(ids) > length,
    )


def window_sample(ids: Sequence[int]) -> Sample:
    """A window of text, all of it learned."""
    count = len(ids)
    marks = {level: [False] * count for level in LEVELS}
    return Sample(ids=list(ids), learn=[True] * count, weights=[1.0] * count, marks=marks)


def collate(samples: Sequence[Sample], *, fill: int) -> Batch:
    """fill: the token after the end of shorter ones, which nothing attends to."""
    length = max(len(sample.ids) for sample in samples)

    def rows(pick: Callable[[Sample], Sequence[Any]], empty: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*pick(one), *[empty] * (length - len(one.ids))] for one in samples], dtype=dtype)

    paired = [index for index, sample in enumerate(samples) if sample.wrong is not None]
    return Batch(
        ids=rows(lambda one: one.ids, fill, torch.long),
        attention=rows(lambda one: [1] * len(one.ids), 0, torch.long),
        learn=rows(lambda one: one.learn, False, torch.bool),
        weights=rows(lambda one: one.weights, 1.0, torch.float32),
        marks={level: rows(lambda one, level=level: one.marks[level], False, torch.bool) for level in LEVELS},
        wrong=collate([w for index in paired if (w := samples[index].wrong)], fill=fill) if paired else None,
        wrong_rows=paired,
    )


def split(count: int, held_out: int) -> tuple[list[int], list[int]]:
    """(trained on, held out): numbers spread evenly."""
    held_out = min(held_out, count - 1)
    kept = {index * count // held_out for index in range(held_out)} if held_out > 0 else set[int]()
    return [index for index in range(count) if index not in kept], sorted(kept)


def batches(samples: Sequence[Sample], size: int, *, fill: int) -> Iterator[Batch]:
    for start in range(0, len(samples), size):
        yield collate(samples[start : start + size], fill=fill)
