# SPDX-License-Identifier: Apache-2.0
"""Records made into sequences: plain, with errors and their corrections, with a word on oneself, with cut thinking.

Each transform is a table of a recipe with a switch, `enabled`, and adds to what the others make:

- `lemma` (LEMMA, arXiv:2503.17439): a wrong answer up to its first error, a phrase, and the right one from there
  ("fix"), or the whole wrong answer, a phrase, and the whole right one ("restart").
- `self_evaluation` (Adaptive Inference-Time Compute, arXiv:2410.02725): after an answer, a question and one predefined
  token that says whether another sample would be better; loss is taken of that token alone.
- `elastic` (Elastic Reasoning, arXiv:2505.05315): thinking is cut after a budget of tokens, closed, and answered from;
  the end is learned only where thinking came to it by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from .data import Record, Sample, Segment, sample_of
from .errors import DataError, TuneUsageError
from .fait import compare

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Lemma:
    enabled: bool = False
    mode: str = "fix"
    """fix, restart or both."""
    fix: str = "\nWait, there is an error in what I just wrote. Let me correct it.\n"
    restart: str = "\nThat is not right. Let me start over.\n"
    learn_error: bool = False
    """Take loss of the wrong part too; the paper does."""

    def problems(self) -> list[str]:
        modes = ("fix", "restart", "both")
        return [] if self.mode in modes else [f"transform.lemma.mode is {self.mode!r}, none of {', '.join(modes)}"]


@dataclass(frozen=True, kw_only=True)
class SelfEvaluation:
    enabled: bool = False
    question: str = "\nWould another sample be better?"
    yes: str = " Yes"
    no: str = " No"
    """Each one token of the base's tokenizer."""
    weight: float = 1.0
    """Of that token among the others."""

    def problems(self) -> list[str]:
        return [] if self.weight > 0 else ["transform.self_evaluation.weight must be positive"]


@dataclass(frozen=True, kw_only=True)
class Elastic:
    enabled: bool = False
    budgets: tuple[int, ...] = (64, 128, 256)
    """Tokens of thinking; each record gets one of them by turns."""
    opening: str = "<think>\n"
    closing: str = "\n</think>\n"

    def problems(self) -> list[str]:
        return [] if self.budgets and min(self.budgets) >= 0 else ["transform.elastic.budgets needs numbers from 0 on"]


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """The `[transform]` table."""

    lemma: Lemma = field(default_factory=Lemma)
    self_evaluation: SelfEvaluation = field(default_factory=SelfEvaluation)
    elastic: Elastic = field(default_factory=Elastic)

    def problems(self) -> list[str]:
        return [*self.lemma.problems(), *self.self_evaluation.problems(), *self.elastic.problems()]

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields that every record must have."""
        wanted = (
            (self.lemma.enabled, "wrong"),
            (self.self_evaluation.enabled, "another"),
            (self.elastic.enabled, "thinking"),
        )
        return tuple(name for is_on, name in wanted if is_on)


class Maker:
    """Makes samples of records, in the base's tokens."""

    def __init__(
        self, tokenizer: "Tokenizer", transforms: Transforms, *, eos: int, length: int, template: str, pairs: bool
    ) -> None:
        """pairs: keep the wrong answers beside the right ones, with marks.

        Raises:
            TuneUsageError: the words of self-evaluation are not one token each.
        """
        self._tokenizer, self._transforms, self._eos, self._length = tokenizer, transforms, eos, length
        self._template, self._pairs = template, pairs
        if transforms.self_evaluation.enabled:
            self._words = {word: self._one_token(word) for word in _words(transforms.self_evaluation)}

    def samples(self, records: Sequence[Record]) -> list[Sample]:
        """See `by_record`."""
        return [sample for made in self.by_record(records) for sample in made]

    def by_record(self, records: Sequence[Record]) -> list[list[Sample]]:
        """The samples of each record.

        Raises:
            DataError: naming the lines of which nothing is left within the length, or, behind thinking, not all.
        """
        made, lost = [], dict[str, None]()
        for number, record in enumerate(records):
            found = [build(record) for build in self._builds(number)]
            if None in found:
                lost[record.where] = None
            made.append([sample for sample in found if sample is not None])
        if lost:
            more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
            thinking = self._transforms.elastic.enabled
            what = (
                "the completion does not fit behind its thinking" if thinking else "nothing of the completion is left"
            )
            raise DataError(
                f"{', '.join([*lost][:6])}{more}: {what} within data.length = {self._length} tokens. Raise it, or "
                + ("lower transform.elastic.budgets" if thinking else "shorten the prompts")
            )
        return made

    def _builds(self, number: int) -> list[Callable[[Record], Sample | None]]:
        transforms = self._transforms
        budgets = transforms.elastic.budgets
        first = self._plain
        if transforms.elastic.enabled:
            budget = budgets[number % len(budgets)]
            first = lambda record: self._elastic(record, budget)  # noqa: E731
        found: list[Callable[[Record], Sample | None]] = [first]
        if transforms.lemma.enabled:
            modes = ("fix", "restart") if transforms.lemma.mode == "both" else (transforms.lemma.mode,)
            found += [lambda record, mode=mode: self._lemma(record, mode) for mode in modes]
        if transforms.self_evaluation.enabled:
            found.append(self._self_evaluation)
        return found

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _prompt(self, record: Record) -> Segment:
        return Segment(ids=self._encode(self._template.replace("{prompt}", record.prompt)), learn=False)

    @property
    def _end(self) -> Segment:
        return Segment(ids=[self._eos], learn=True)

    def _plain(self, record: Record) -> Sample | None:
        prompt, wrong = self._prompt(record), None
        answer = Segment(ids=self._encode(record.completion), learn=True)
        if self._pairs and record.wrong:
            answer, other = self._marked(record.completion, record.wrong), self._marked(record.wrong, record.completion)
            wrong = sample_of([prompt, other, self._end], length=self._length)
        return sample_of([prompt, answer, self._end], length=self._length, wrong=wrong)

    def _marked(self, text: str, against: str) -> Segment:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        marks = compare(text, against, found.offsets, found.ids, self._encode(against))
        return Segment(ids=found.ids, learn=True, marks=marks)

    def _lemma(self, record: Record, mode: str) -> Sample | None:
        lemma = self._transforms.lemma
        error, phrase, correction = record.wrong, lemma.restart, record.completion
        if mode == "fix":
            error, correction = split_at_error(record.completion, record.wrong)
            phrase = lemma.fix
        parts = [
            self._prompt(record),
            Segment(ids=self._encode(error), learn=lemma.learn_error),
            Segment(ids=self._encode(phrase), learn=True),
            Segment(ids=self._encode(correction), learn=True),
            self._end,
        ]
        return sample_of(parts, length=self._length)

    def _self_evaluation(self, record: Record) -> Sample | None:
        table = self._transforms.self_evaluation
        word = self._words[table.yes if record.another else table.no]
        asked = Segment(ids=self._encode(record.completion + table.question), learn=False)
        prompt = self._prompt(record)
        room = self._length - 1 - len(asked.ids)
        if room < 0:
            return None
        prompt = replace(prompt, ids=prompt.ids[-room:] if room else [])  # the question must not be what is cut
        return sample_of([prompt, asked, Segment(ids=[word], learn=True, weight=table.weight)], length=self._length)

    def _elastic(self, record: Record, budget: int) -> Sample | None:
        elastic = self._transforms.elastic
        thought = self._encode(record.thinking)
        parts = [
            self._prompt(record),
            Segment(ids=self._encode(elastic.opening), learn=False),
            Segment(ids=thought[:budget], learn=True),
            Segment(ids=self._encode(elastic.closing), learn=len(thought) <= budget),
            Segment(ids=self._encode(record.completion), learn=True),
            self._end,
        ]
        made = sample_of(parts, length=self._length)
        return None if made is None or made.truncated else made  # an answer is what a budget is for

    def _one_token(self, word: str) -> int:
        ids = self._encode(word)
        if len(ids) != 1:
            raise TuneUsageError(
                f"transform.self_evaluation: {word!r} is {len(ids)} tokens of this tokenizer; choose a word of one"
            )
        return ids[0]


def _words(table: SelfEvaluation) -> tuple[str, str]:
    return table.yes, table.no


def split_at_error(right: str, wrong: str) -> tuple[str, str]:
    """(the wrong answer through its first differing line, the right one from that line on).

    A wrong answer that lacks a line first differs in the one that stands in its place; if it merely ends too early, it
    is taken whole.
    """
    rights, wrongs = right.splitlines(keepends=True), wrong.splitlines(keepends=True)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(rights, wrongs, strict=False)))
    return "".join(wrongs[: alike + 1]), "".join(rights[alike:])
